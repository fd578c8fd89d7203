"""The command line, run as a user runs it, and the YAML files that are attached to runs."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import ctrak_lightning
from ctrak_lightning import Concept, Method, TraceStore, methods
from ctrak_lightning.cli import COMMANDS, main, report
from ctrak_lightning.cli.question import (
    add_question,
    concepts_of,
    load_module,
    method_at,
    parse_spec,
)
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.provenance import Ledger, verify
from ctrak_lightning.provenance.recording import record_run
from ctrak_lightning.tasks import Spec

from .attribution.reporting import Page
from .lenient import lenient
from .provenance.builder import run_facts
from .toy import ToyDiffusion

ROOT = Path(__file__).parent.parent


def write_config(folder: Path) -> Path:
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [],
        },
        "model": {"class_path": "tests.toy.ToyDiffusion", "init_args": {"seed": 3}},
        "data": {"class_path": "tests.toy.ToyData"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_callback(folder: Path, name: str = "concept_tracer.yaml") -> Path:
    """The committed YAML, with its store in ``folder``."""
    facts = yaml.safe_load((ROOT / "callbacks" / name).read_text())
    facts["trainer"]["callbacks+"][0]["init_args"]["dirpath"] = str(folder / "traces")
    path = folder / name
    path.write_text(yaml.safe_dump(facts))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run: ``ctrak fit`` with the callback's YAML as a second
    ``--config``."""
    folder = tmp_path_factory.mktemp("run")
    command = [
        sys.executable,
        "-m",
        "ctrak_lightning.cli",
        *fit(write_config(folder), write_callback(folder)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def fit(config: Path, callback: Path) -> list[str]:
    return ["fit", f"--config={config}", f"--config={callback}"]


def test_the_yaml_of_the_inline_mode(tmp_path: Path) -> None:
    main(fit(write_config(tmp_path), write_callback(tmp_path, "concept_tracer_inline.yaml")))
    store = TraceStore(tmp_path / "traces")
    assert store.header.method["name"] == "inline_trak"
    visits = store.checkpoints[0].visits()
    assert visits is not None
    assert visits.counts.tolist() == [2] * 12


@pytest.mark.filterwarnings("ignore:The rankings of these concepts say nothing")
@pytest.mark.parametrize("form", ["plain", "class_path"])
def test_the_yaml_of_the_monitor(tmp_path: Path, form: str) -> None:
    """As committed, but for the folders, the concepts and a short sampler."""
    facts = yaml.safe_load((ROOT / "callbacks" / "concept_monitor.yaml").read_text())
    tracer, monitor = facts["trainer"]["callbacks+"]
    tracer["init_args"]["dirpath"] = str(tmp_path / "traces")
    facts["trainer"]["logger"]["init_args"] |= {
        "save_dir": str(tmp_path),
        "name": "board",
        "version": "",
    }
    asked = {
        "name": "red",
        "present": {"colour": "red", "shape": "bar"},
        "absent": {"shape": "bar"},
    }
    asked_otherwise = {"class_path": "ctrak_lightning.Concept", "init_args": asked}
    assert all(concept.keys() == asked.keys() for concept in monitor["init_args"]["concepts"])
    monitor["init_args"]["concepts"] = [asked if form == "plain" else asked_otherwise]
    monitor["init_args"] |= {"sampler": {"steps": 6}, "on_error": "raise"}
    callback = tmp_path / "monitor.yaml"
    callback.write_text(yaml.safe_dump(facts))
    main(fit(write_config(tmp_path), callback))
    tags = EventAccumulator(str(tmp_path / "board")).Reload().Tags()
    assert tags["images"] == ["ctrak/concept/red"]
    assert "ctrak/strength/red" in tags["scalars"]
    assert (tmp_path / "board" / "projector_config.pbtxt").exists()


def test_fit_attaches_the_callback_from_its_yaml(run: Path) -> None:
    store = TraceStore(run / "traces")
    assert store.header.method["name"] == "influence"
    assert [c.step for c in store.checkpoints] == [6]
    assert len(store) == 12


@pytest.mark.filterwarnings("ignore:damping='agreement' compares checkpoints")
def test_attribute_prints_and_writes_the_ranking(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "attribute",
        str(run / "traces"),
        "--config",
        str(run / "run.yaml"),
        "--seed",
        "2",
        "--steps",
        "12",
    ]
    question = ["--present", "colour=red", "shape=bar", "--absent", "shape=bar", "--group", "owner"]
    with lenient():
        main(
            [
                *arguments,
                *question,
                "--top",
                "3",
                "--csv",
                str(run / "r.csv"),
                "--json",
                str(run / "r.json"),
            ]
        )
    printed = capsys.readouterr().out
    document = json.loads((run / "r.json").read_text())
    assert document["concept"] == {
        "name": "red",
        "present": {"colour": "red", "shape": "bar"},
        "absent": {"shape": "bar"},
    }
    with open(run / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    ranked = re.findall(r"^ +\d+ +-?\d+\.\d+ +(\S+)$", printed, re.MULTILINE)
    assert ranked == [row["sample_id"] for row in rows[:3]]
    assert "owner of red" in printed


@pytest.mark.filterwarnings("ignore:damping='agreement' compares checkpoints")
def test_report_asks_each_attribute_and_splits_the_scores(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "page.html"
    arguments = ["report", str(run / "traces"), "--config", str(run / "run.yaml"), "--steps", "6"]
    main(
        [*arguments, "--present", "colour=red", "shape=bar", "--out", str(out), "--group", "shape"]
    )
    assert f"{out}: red, bar" in capsys.readouterr().out
    page = Page(out)
    assert [a["id"] for a in page.all("section") if "data-concept" in a] == [
        "concept-1",
        "concept-2",
    ]
    assert page.data["columns"][page.data["group"]]["name"] == "shape"
    assert all(concept["by_timestep"] for concept in page.data["concepts"])
    assert "rests on a single checkpoint" in page.text


@pytest.mark.parametrize("command", ["attribute", "report"])
def test_files_and_groups_are_checked_before_any_work(
    run: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ctrak_lightning.cli.question.load_module", worked)
    (tmp_path / "kept").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "locked").mkdir(mode=0o500)
    option = {"attribute": "--csv", "report": "--out"}[command]
    wrong = [
        ([option, str(tmp_path)], "is a folder"),
        ([option, str(tmp_path / "kept")], "exists. HINT.*--force"),
        ([option, str(tmp_path / "link")], "exists. HINT.*--force"),
        (
            [option, str(tmp_path / "kept" / "x.csv")],
            "cannot be written: its folder cannot be made",
        ),
        ([option, str(run / "traces" / "x.csv")], "lies in the folder of the traces"),
        (["--group", "nobody"], "--group 'nobody'.*The store has: colour, owner, shape"),
    ]
    if os.geteuid() != 0:  # root may write everywhere
        wrong.append(
            ([option, str(tmp_path / "locked" / "x")], "cannot be written: this user may not")
        )
    if command == "attribute":
        wrong += [
            (
                ["--csv", str(tmp_path / "n"), "--json", str(tmp_path / "." / "n")],
                "is also what --csv names",
            ),
            (["--json", str(tmp_path / "kept")], "exists"),
        ]
    arguments = [
        command,
        str(run / "traces"),
        "--config",
        str(run / "run.yaml"),
        "--present",
        "colour=red",
    ]
    monkeypatch.chdir(tmp_path)
    for words, message in wrong:
        with pytest.raises(SystemExit, match=f"ctrak {command}: .*{message}"):
            main([*arguments, *words])
    assert (tmp_path / "kept").read_text() == "years of work"
    assert not (tmp_path / "n").exists()
    # What is allowed gets as far as the model: --force, and what is no regular file. Missing
    # folders are made.
    for words in (
        [option, str(tmp_path / "kept"), "--force"],
        [option, "/dev/null"],
        [option, "a/b/c"],
    ):
        with pytest.raises(AssertionError, match="the model was loaded"):
            main([*arguments, *words])
    assert (tmp_path / "a" / "b").is_dir()
    if command == "attribute":
        with pytest.raises(SystemExit):
            main([*arguments, "--top", "0"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["a=1", "b=2"],
            [("1", {"a": "1", "b": "2"}, {"b": "2"}), ("2", {"a": "1", "b": "2"}, {"a": "1"})],
        ),
        (["a=1", "b=2", "--absent", "b=2"], [("1", {"a": "1", "b": "2"}, {"b": "2"})]),
        (["a=1", "--absent"], [("1", {"a": "1"}, {})]),
        (["an owl"], [("an owl", "an owl", {})]),
        (["an owl", "--absent", "a bird", "--name", "owl"], [("owl", "an owl", "a bird")]),
        (
            ["a=1", "--concept", "x y: b='2 3' c=4", "--concept", "z:"],
            [("x y", {"a": "1"}, {"b": "2 3", "c": "4"}), ("z", {"a": "1"}, {})],
        ),
        (["an owl", "--concept", "owl: a bird: grey"], [("owl", "an owl", "a bird: grey")]),
    ],
)
def test_concepts_of_a_report(
    words: list[str],
    expected: list[tuple[str, Spec, Spec]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What the command asks, without a model."""
    asked: list[Concept] = []

    class Asked:
        def attribute_many(
            self, concepts: list[Concept], seed: int, *, parts: bool
        ) -> list[object]:
            assert parts
            asked.extend(concepts)
            return []

    monkeypatch.setattr(report, "opened_store", lambda args: None)
    monkeypatch.setattr(report, "attributor_of", lambda args, store: Asked())
    monkeypatch.setattr(report, "write_report", lambda out, results, group: None)
    given = ["store", "--config", "x.yaml", "--out", str(tmp_path / "p.html"), "--present", *words]
    report.run(report.parser().parse_args(given))
    assert asked == [Concept(*each) for each in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concept", "x: b=2", "--absent", "b=2"], "expected one or the other"),
        (["--concept", "owl"], "expected 'NAME: what is left"),
        (["--concept", ": b=2"], "expected 'NAME: what is left"),
        (["--concept", "x: b=2 c"], "attribute=value"),
        (["--concept", "x: b='2"], "quotation"),
    ],
)
def test_concepts_of_a_report_that_say_nothing(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"ctrak report: .*{message}"):
        main(["report", str(tmp_path), "--config", "x.yaml", "--present", "a=1", *words])


PROMPT = "a cat in the style of Picasso"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--concept", "cat"], [("cat", PROMPT, "a picture in the style of Picasso", "cat")]),
        (
            ["--concept", "Picasso", "--concept", "cat"],
            [
                ("Picasso", PROMPT, "a cat", "Picasso"),
                ("cat", PROMPT, "a picture in the style of Picasso", "cat"),
            ],
        ),
        (
            ["--concept", "cat", "--absent-prompt", "a dog", "--name", "it"],
            [("it", PROMPT, "a dog", "cat")],
        ),
    ],
)
def test_concepts_of_a_prompt(words: list[str], expected: list[tuple[str, str, str, str]]) -> None:
    assert concepts_of(parsed("--prompt", PROMPT, *words)) == [Concept(*each) for each in expected]


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    add_question(parser)
    return parser.parse_args(["store", "--config", "x.yaml", *words])


def test_images_masks_and_no_image_at_all(tmp_path: Path) -> None:
    picture = np.zeros((4, 6, 4), np.uint8)
    picture[..., 3] = 255
    picture[0, 0] = (255, 0, 51, 255)
    picture[1, 1] = (9, 9, 9, 0)  # transparent
    Image.fromarray(picture).save(tmp_path / "i.png")
    white = np.zeros((4, 6), np.uint8)
    white[:, 3:] = 255
    Image.fromarray(white).save(tmp_path / "m.png")
    question = ["--present", "a=1"]
    [concept] = concepts_of(
        parsed(*question, "--image", str(tmp_path / "i.png"), "--mask", str(tmp_path / "m.png"))
    )
    assert isinstance(concept.image, torch.Tensor)
    torch.testing.assert_close(concept.image[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    assert concept.image[:, 1, 1].tolist() == [1, 1, 1]
    assert concept.image[:, 2, 2].tolist() == [-1, -1, -1]
    assert concept.mask is not None
    assert concept.mask.tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    [distribution] = concepts_of(parsed("--prompt", PROMPT, "--concept", "cat", "--global"))
    assert distribution == Concept.from_prompt(PROMPT, "cat", image=None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --prompt or --present, and not both"),
        (["--prompt", PROMPT, "--present", "a=1"], "and not both"),
        (["--prompt", PROMPT], "expected --concept with words of it"),
        (
            ["--prompt", PROMPT, "--concept", "cat", "--absent", "a dog"],
            "no --absent. HINT: --absent-prompt",
        ),
        (["--prompt", PROMPT, "--concept", "dog"], "'dog'.*: the concept is not in the prompt"),
        (
            [
                "--prompt",
                PROMPT,
                "--concept",
                "cat",
                "--concept",
                "Picasso",
                "--absent-prompt",
                "a dog",
            ],
            "expected one with --absent-prompt",
        ),
        (["--present", "a=1", "--absent-prompt", "a dog"], "--absent-prompt goes with --prompt"),
        (["--present", "a=1", "--global", "--image", "i.png"], "--global and --image"),
        (["--present", "a=1", "--image", "nowhere.png"], "nowhere.png"),
        (["--present", "a=1", "b=2", "--global"], "--global with 2 concepts"),
    ],
)
def test_questions_that_say_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"ctrak report: .*{message}"):
        main(["report", str(tmp_path), "--config", "x.yaml", *words])


@pytest.mark.filterwarnings("ignore:damping='agreement' compares checkpoints")
def test_several_concepts_a_part_and_the_distribution(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "attribute",
        str(run / "traces"),
        "--config",
        str(run / "run.yaml"),
        "--steps",
        "6",
    ]
    question = [
        "--present",
        "colour=red",
        "shape=bar",
        "--concept",
        "red: shape=bar",
        "--concept",
        "bar: colour=red",
    ]
    main(
        [
            *arguments,
            *question,
            "--top",
            "3",
            "--csv",
            str(tmp_path / "t.csv"),
            "--json",
            str(tmp_path / "t.json"),
        ]
    )
    printed = capsys.readouterr().out
    assert "red: colour=red, shape=bar without it: shape=bar" in printed
    document = json.loads((tmp_path / "t.json").read_text())
    assert [each["name"] for each in document["concepts"]] == ["red", "bar"]
    cosine = document["cosines"][0][1]
    assert f"cosine of 'red' and 'bar': {cosine:.2f}" in printed
    with open(tmp_path / "t.csv", newline="") as file:
        rows = {row["sample_id"]: row for row in csv.DictReader(file)}
    by_rank = [
        sample for sample, row in sorted(rows.items(), key=lambda pair: int(pair[1]["rank bar"]))
    ]
    ranked = re.findall(r"^ +\d+ +-?\d+\.\d+ +(\S+)$", printed, re.MULTILINE)
    assert ranked[3:6] == by_rank[:3]
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    single = ["--present", "colour=red", "shape=bar", "--absent", "shape=bar"]
    report_of = ["report", *arguments[1:], "--out", str(tmp_path / "p.html"), "--force"]
    main([*report_of, *single, "--mask", str(tmp_path / "m.png")])
    assert "Asked of a part of the image only, 25 % of it." in Page(tmp_path / "p.html").text
    main([*report_of, *single, "--global"])
    text = Page(tmp_path / "p.html").text
    assert (
        "told colour: red, what would it not show when it is told nothing (the null condition)"
        in text
    )
    assert "Asked of several images of the concept alone" in text
    with pytest.raises(SystemExit, match="ctrak attribute: ToyDiffusion has no `latents`"):
        main([*arguments, *single, "--image", str(tmp_path / "m.png")])


@pytest.mark.filterwarnings("ignore:damping='agreement' compares checkpoints")
def test_who_asks_stands_in_the_ledger(run: Path, tmp_path: Path) -> None:
    store = shutil.copytree(run / "traces", tmp_path / "traces")
    record_run(store, run_facts(store), resumed=False)
    arguments = [
        "attribute",
        str(store),
        "--config",
        str(run / "run.yaml"),
        "--present",
        "colour=red",
        "shape=bar",
    ]
    main([*arguments, "--asker", "a clerk"])
    last = Ledger(store).entries()[-1]
    assert (last.kind, last.facts["asker"]) == ("query", "a clerk")
    assert verify(store) == []


def test_attribute_reports_an_unknown_value(run: Path) -> None:
    arguments = ["attribute", str(run / "traces"), "--config", str(run / "run.yaml")]
    with pytest.raises(SystemExit, match=r"ctrak attribute: .*unknown colour 'rad'. Known: red"):
        main([*arguments, "--present", "colour=rad"])


def test_info_shows_and_verifies(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["info", str(run / "traces"), "--verify"])
    printed = capsys.readouterr().out
    assert "influence" in printed
    assert "12, metadata: colour, owner, shape" in printed
    assert "verified" in printed
    shutil.copytree(run / "traces", tmp_path / "broken")
    shard = next((tmp_path / "broken").rglob("rank0-*.h5"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "broken"), "--verify"])
    assert shard.name in capsys.readouterr().out


def test_mistakes_end_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"unknown command 'atribute'\. The known ones, the nearest first: attribute, ",
    ):
        main(["atribute"])
    with pytest.raises(SystemExit, match="ctrak info: .*nowhere"):
        main(["info", str(tmp_path / "nowhere")])
    (tmp_path / "x.yaml").write_text("trainer: {}\n")
    with pytest.raises(ValueError, match=r"class_path.*HINT.*--model package\.module\.MyModule"):
        load_module(tmp_path / "x.yaml")


def ours() -> Method:
    return replace(methods.d_trak(), name="ours")


def test_a_method_is_named_by_its_place() -> None:
    assert method_at("d_trak") == methods.d_trak()
    assert method_at(f"{__name__}.ours") == ours()
    for place, told in {
        "nowhere.ours": "No module named 'nowhere'.*HINT",
        f"{__name__}.theirs": "no attribute 'theirs'.*HINT",
        f"{__name__}.ROOT": "expected a Method",
        "d_trakk": r"by_name\('d_trakk'\)",
    }.items():
        with pytest.raises(ValueError, match=told):
            method_at(place)


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], ["--version"], ["-V"]])
def test_help_and_version_wait_for_nothing(words: list[str]) -> None:
    code = (
        "import sys; from ctrak_lightning.cli import main\n"
        f"try: print(main({words}), end='')\n"
        "except SystemExit as end: print(end.code, end='')\n"
        "print('', sorted({'torch', 'lightning', 'numpy', 'h5py', "
        "'diffusers'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    if words in (["--version"], ["-V"]):
        assert printed == f"ctrak-lightning {ctrak_lightning.__version__}\nNone []\n"
    else:
        assert printed.endswith("0 []\n")
        assert all(f"\n    {command} " in printed for command in COMMANDS)


def test_each_command_says_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="^0$"):
            main(["help", command])
        printed = capsys.readouterr().out
        assert "--help" in printed
        assert "lambda" not in printed


def test_what_a_command_lacks_is_named_as_the_command_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(["info"])
    told = capsys.readouterr().err
    assert "usage: ctrak info " in told
    assert "required: store" in told
    assert "info.store" not in told
    assert "ctrak info --help" in told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["completion", shell])
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "absent-prompt" in script
    assert "public-key" in script


def test_a_mistake_in_a_yaml_is_not_hidden_among_the_types_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracer = {"dirpath": str(tmp_path / "traces"), "method": wrong_method()}
    callback = {"class_path": "ctrak_lightning.callbacks.ConceptTracer", "init_args": tracer}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"seed_everything": 1, "trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit, match="^2$"):
        main(["fit", "--config", str(config), "--model", "tests.toy.ToyDiffusion"])
    told = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert len(told) <= 6
    assert "damping=-3" in told[-1]
    assert "expected a number > 0" in told[-1]


def wrong_method() -> dict[str, Any]:
    objective = {"class_path": "ctrak_lightning.methods.objectives.Denoising"}
    trajectory = {"class_path": "ctrak_lightning.methods.trajectories.Noised"}
    arguments = {
        "name": "wrong",
        "training": objective,
        "training_trajectory": trajectory,
        "query": [{"objective": objective, "side": "present"}],
        "query_trajectory": trajectory,
        "damping": -3,
    }
    return {"class_path": "ctrak_lightning.Method", "init_args": arguments}


def test_an_error_of_training_code_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # LightningCLI saves the configuration there
    (tmp_path / "run.yaml").write_text(
        "seed_everything: 1\nmodel: {class_path: tests.test_cli.Failing}\ndata: {class_path: tests.toy.ToyData}\n"
        "trainer: {max_epochs: 1, logger: false, enable_checkpointing: false}\n"
    )
    with pytest.raises(ValueError, match="of the user's own"):
        main(["fit", "--config", str(tmp_path / "run.yaml")])


class Failing(ToyDiffusion):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        raise ValueError("of the user's own")


def test_every_public_name_is_found_and_no_other() -> None:
    for name in ctrak_lightning.__all__:
        assert name in dir(ctrak_lightning)
        found = getattr(ctrak_lightning, name)
        assert name == found.__name__.rpartition(".")[2]
    with pytest.raises(AttributeError, match="no attribute 'Atributor'"):
        ctrak_lightning.Atributor  # noqa: B018


def test_a_config_builds_the_module_of_the_run(tmp_path: Path) -> None:
    from .toy import ToyDiffusion

    # As a LightningCLI that was given its class saves it, too.
    (tmp_path / "bare.yaml").write_text("model: {seed: 3, dropout: 0.0}\ntrainer: {}\nnote: x\n")
    bare = load_module(tmp_path / "bare.yaml", "tests.toy.ToyDiffusion")
    expected = ToyDiffusion(seed=3).state_dict()
    for module in (load_module(write_config(tmp_path)), bare):
        assert all(
            torch.equal(value, expected[name]) for name, value in module.state_dict().items()
        )


def test_specs() -> None:
    assert parse_spec(["a red bar"]) == "a red bar"
    assert parse_spec([]) == {}
    assert parse_spec(["object=a=b", "artist="]) == {"object": "a=b", "artist": ""}
    for wrong in (["object=x", "artist"], ["=x", "a=b"], ["a=b", "a=c"]):
        with pytest.raises(ConceptError, match="attribute=value"):
            parse_spec(wrong)


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.yaml")), ids=lambda p: p.name)
def test_every_callback_yaml_is_named_in_the_docs(path: Path) -> None:
    assert f"callbacks/{path.name}" in (ROOT / "docs" / "cli.md").read_text()
