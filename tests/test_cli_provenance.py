"""The commands of the ledger, as a user runs them."""

import json
import shutil
from pathlib import Path

import pytest

from ctrak_lightning import TraceStore
from ctrak_lightning.cli import main
from ctrak_lightning.provenance import Ledger

from .provenance.builder import recorded
from .provenance.keys import write_keys
from .traces.store_builder import Capture


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("cli") / "store")


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "store")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    if code:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == code
    else:
        main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_verify_prints_the_head_and_names_what_differs(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "verify", store, "--deep")
    assert Ledger(store).entries()[-1].sha256 in text
    assert "verified: every file is what was recorded" in text
    shard = store / "checkpoint-00000300" / "rank0-00001.h5"
    shard.write_bytes(shard.read_bytes()[::-1])
    text = printed(capsys, "verify", store, code=1)
    assert "checkpoint-00000300/rank0-00001.h5: sha256 is" in text
    assert "verified" not in text


def test_verify_without_a_ledger_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "verify", Capture().run(tmp_path / "store"))
    assert "ledger     none: only the manifest vouches" in text
    assert "verified" in text


def test_sign_then_verify_with_the_key(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = write_keys(tmp_path)
    assert "is missing, the ledger is not signed" in printed(
        capsys, "verify", store, "--public-key", public, code=1
    )
    assert "signed 4 entries, head" in printed(capsys, "sign", store, "--key", private)
    text = printed(capsys, "verify", store, "--public-key", public)
    assert "signature  of entry 3 by " in text
    with pytest.raises(SystemExit, match=r"ctrak sign: .*no Ed25519 private key.*HINT"):
        main(["sign", str(store), "--key", str(public)])


def test_forget_and_its_mistakes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        SystemExit, match=r"ctrak forget: .*no sample 'image/03\.png'.*Near: 'image/003\.png'"
    ):
        main(["forget", str(store), "--sample", "image/03.png"])
    text = printed(capsys, "forget", store, "--sample", "image/003.png", "--sample=image/008.png")
    assert "forgotten  2 samples, 8 remain" in text
    assert text.count("tombstone  ") == 2
    assert len(TraceStore(store)) == 8
    assert "nothing is left to forget" in printed(capsys, "forget", store)
    assert "verified" in printed(capsys, "verify", store, "--deep")


def test_lineage_prints_the_chain(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "lineage", store)
    assert text.startswith("run run  ")
    assert "base model base/model" in text
    assert f"2 checkpoints, 4 entries, head {Ledger(store).entries()[-1].sha256}" in text


@pytest.mark.parametrize("form", ["prov", "croissant", "model-card"])
def test_export_writes_what_it_prints(
    store: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "export", store, "--format", form)
    assert printed(capsys, "export", store, "--format", form, "--out", tmp_path / "out") == ""
    assert (tmp_path / "out").read_text(encoding="utf-8") == text
    if form == "model-card":
        assert text.startswith("## Training data and provenance")
    else:
        assert json.loads(text)
        assert "image/003.png" in text


def test_stores_that_are_none_end_with_a_sentence(tmp_path: Path) -> None:
    for command in (["verify"], ["forget"], ["lineage"], ["export", "--format", "prov"]):
        with pytest.raises(SystemExit, match=rf"ctrak {command[0]}: .*HINT"):
            main([command[0], str(tmp_path), *command[1:]])
