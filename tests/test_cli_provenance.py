"""The commands of the ledger, as a user runs them."""

import io
import json
import shutil
from pathlib import Path

import pytest

from ctrak_lightning import TraceStore
from ctrak_lightning.cli import main
from ctrak_lightning.provenance import Ledger

from .provenance.builder import recorded
from .provenance.keys import write_keys
from .store.store_builder import Capture, read_bytes


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


def test_verify_without_a_ledger_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        main(["forget", str(store), "--sample", "image/03.png", "--yes"])
    text = printed(
        capsys, "forget", store, "--sample", "image/003.png", "--sample=image/008.png", "--yes"
    )
    assert "forgotten  2 samples, 8 remain" in text
    assert text.count("tombstone  ") == 2
    assert len(TraceStore(store)) == 8
    assert "nothing is left to forget" in printed(capsys, "forget", store)
    assert "verified" in printed(capsys, "verify", store, "--deep")


def test_who_would_go_is_said_and_nothing_is_changed(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_bytes(store)
    text = printed(capsys, "forget", store, "--where", "artist=ann", "--dry-run")
    assert [line.split()[1] for line in text.splitlines()[:-1]] == [
        f"image/{i:03d}.png" for i in (1, 3, 5, 7, 9)
    ]
    assert text.endswith("would go   5 of 10 samples; nothing was changed\n")
    (tmp_path / "ids").write_bytes("\ufeffimage/008.png\r\n\nimage/002.png\nimage/008.png".encode())
    text = printed(capsys, "forget", store, "--ids-from", tmp_path / "ids", "--dry-run")
    assert text.split()[1:4:2] == ["image/002.png", "image/008.png"]
    assert "would go   2 of 10" in text
    assert read_bytes(store) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--where", "owner=ann"],
            r"no such metadata column.*The store has: 'artist', 'licence/url'.*HINT",
        ),
        (
            ["--where", "artist=anne"],
            r"no sample has that value.*Near: 'ann'\..*'noto' \(5\), 'ann' \(5\)",
        ),
        (["--where", "artist"], "no such metadata column"),
        (
            ["--where", "artist=ann", "--where", "artist=noto"],
            "no sample meets all.*5 have 'artist=ann'",
        ),
        (["--where", "artist=ann", "--sample", "image/003.png"], "expected one or the other"),
        (["--where", "licence/url="], "these are all of its 10 samples"),
        (["--ids-from", "missing"], "--ids-from missing: cannot be read.*HINT"),
        (["--dry-run"], "of no samples.*HINT"),
        (
            ["--sample", "image/003.png"],
            "1 of 10 samples would be forgotten.*no terminal to ask at.*--yes",
        ),
    ],
)
def test_what_is_not_clear_is_not_forgotten(
    store: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_bytes(store)
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    yes = ["--yes"] if "terminal" not in message else []
    with pytest.raises(SystemExit, match=rf"ctrak forget: .*{message}"):
        main(["forget", str(store), *arguments, *yes])
    assert read_bytes(store) == before


@pytest.mark.parametrize(
    ("answer", "goes"), [("5\n", True), ("y\n", False), ("\n", False), ("", False)]
)
def test_a_terminal_is_asked_for_the_number(
    store: Path,
    answer: str,
    goes: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    command = ["forget", str(store), "--where", "artist=ann", "--where", "licence/url="]
    if goes:
        main(command)
        assert "forgotten  5 samples, 5 remain" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="expected '5'; nothing was forgotten"):
            main(command)
    assert len(TraceStore(store)) == (5 if goes else 10)
    assert set(TraceStore(store).samples.metadata["artist"]) == (
        {"noto"} if goes else {"noto", "ann"}
    )


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
    out = tmp_path / "new" / "out"
    assert printed(capsys, "export", store, "--format", form, "--out", out) == ""
    assert out.read_text(encoding="utf-8") == text
    out.write_text("another's")
    with pytest.raises(SystemExit, match="exists. HINT.*--force"):
        main(["export", str(store), "--format", form, "--out", str(out)])
    assert out.read_text() == "another's"
    printed(capsys, "export", store, "--format", form, "--out", out, "--force")
    assert out.read_text(encoding="utf-8") == text
    if form == "model-card":
        assert text.startswith("## Training data and provenance")
    else:
        assert json.loads(text)
        assert "image/003.png" in text


def test_stores_that_are_none_end_with_a_sentence(tmp_path: Path) -> None:
    for command in (["verify"], ["forget"], ["lineage"], ["export", "--format", "prov"]):
        with pytest.raises(SystemExit, match=rf"ctrak {command[0]}: .*HINT"):
            main([command[0], str(tmp_path), *command[1:]])
