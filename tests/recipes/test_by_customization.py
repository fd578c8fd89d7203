"""The AbC benchmark on a stand-in in the published layout, with a tiny Stable Diffusion."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore, methods
from recipes.benchmarks import by_customization
from recipes.benchmarks.by_customization import AbC, read_pool, read_tasks, without_token
from recipes.benchmarks.replay import load_trained
from recipes.text_to_image_lora.module import TextToImageLoRA

from .stand_ins import picture

SIZE = 32
POOL = 12
CAPTION = "A picture in the style of <new1> art"


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(bool(seed & 1), bool(seed & 2), bool(seed & 4), seed)).save(path)


def entry(case: str, name: str, exemplars: int) -> dict[str, Any]:
    made = [f"dataset/synth/{case}/gpt/{name}/samples/{i:05d}.png" for i in range(3)]
    return {
        "exemplar": [f"dataset/exemplar/{case}/images/{name}/{i}.jpg" for i in range(exemplars)],
        "synth": {"gpt": made},
        "class_id": name,
        "category": None,
    }


def query(case: str, index: int, name: str, number: int, prompt: str) -> dict[str, Any]:
    return {
        "synth_image_path": f"dataset/synth/{case}/gpt/{name}/samples/{number:05d}.png",
        "prompt": prompt,
        "test_case": f"test_{case}",
        "test_case_ind": index,
        "train_prompt": CAPTION,
    }


QUERIES = [
    query("artchive", 1, "klee", 0, "The sea in the style of <new1> art"),
    query("bamfg", 0, "x", 0, "The sea in the style of <new1> art"),
    query("artchive", 1, "klee", 1, "A fish in the style of <new1> art"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test cases; ``artchive``'s second model has three exemplars, ``bamfg``'s two."""
    folder = tmp_path_factory.mktemp("abc")
    cases = {
        "artchive": [entry("artchive", "ardon", 1), entry("artchive", "klee", 3)],
        "bamfg": [entry("bamfg", "x", 2)],
    }
    (folder / "json").mkdir()
    seed = 0
    for case, entries in cases.items():
        (folder / "json" / f"test_{case}.json").write_text(json.dumps(entries))
        for path in (p for item in entries for p in item["exemplar"]):
            write_image(folder / path.removeprefix("dataset/"), seed := seed + 1)
    for i in range(POOL):
        write_image(folder / "laion_subset" / f"{i:07d}.png", 100 + i)
    (folder / "tasks.json").write_text(json.dumps(QUERIES))
    return folder


def test_tasks_are_grouped_by_the_model_they_ask_of(root: Path) -> None:
    klee, x = read_tasks(root, root / "tasks.json")
    assert (klee.folder, klee.name, x.folder) == ("test_artchive-0001", "klee", "test_bamfg-0000")
    assert klee.exemplars == [f"exemplar/artchive/images/klee/{i}.jpg" for i in range(3)]
    assert klee.prompts == [QUERIES[0]["prompt"], QUERIES[2]["prompt"]]
    with pytest.raises(ValueError, match="lacks <new1>"):
        without_token("a fish")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_case_ind": 0}, "lists no such image"),  # another model's exemplars
        ({"test_case_ind": 7}, "not of the published form"),
        ({"train_prompt": "<new1> fish"}, "two captions"),
        ({"prompt": "a fish"}, "lacks <new1>"),
        ({"synth_image_path": None}, "lists no such image"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(
    root: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps([QUERIES[0], QUERIES[2] | changed]))
    with pytest.raises(ValueError, match=message):
        read_tasks(root, tmp_path / "tasks.json")
    (tmp_path / "tasks.json").write_text("[{")
    with pytest.raises(ValueError, match="no valid JSON.*HINT"):
        read_tasks(root, tmp_path / "tasks.json")


def test_the_pool_is_a_seeded_choice_and_holds_no_exemplar(root: Path) -> None:
    pool = read_pool(root, 5, seed=0)
    assert pool == sorted(pool) == read_pool(root, 5, seed=0) != read_pool(root, 5, seed=1)
    assert len(read_pool(root, 0, seed=0)) == POOL
    with pytest.raises(ValueError, match="12 images, asked for 13; expected <root>/json"):
        read_pool(root, 13, seed=0)
    klee = read_tasks(root, root / "tasks.json")[0]
    data = AbC(root, klee, pool, SIZE, 4)
    assert data.relevant.tolist() == [True] * 3 + [False] * 5
    captions = [text for batch in data.trace_dataloader() for text in batch["caption"]]
    assert captions == [CAPTION] * 3 + [""] * 5
    with pytest.raises(ValueError, match="exemplars and pool at once"):
        AbC(root, klee, klee.exemplars[:1], SIZE, 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_benchmark_from_the_files_to_the_table(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_customization, "TIMESTEPS", 1)
    command = ["--root", str(root), "--tasks", str(root / "tasks.json"), "--model", "tiny-sd1"]
    command += ["--pool", "10", "--size", str(SIZE), "--steps", "2", "--sampling-steps", "2"]
    command += ["--methods", "d_trak"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    by_customization.main(command)
    text = (tmp_path / "by_customization.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {line[0]: line[1:] for line in lines[1:]}
    assert rows.keys() == {"d_trak", "caption_search", "pixel_similarity", "chance"}
    assert rows["caption_search"][0] == "1.00 [1.00, 1.00] (1.00)"
    # Ten of 13 images for three exemplars, ten of 12 for two: over the two queries and the one.
    assert rows["chance"][0].startswith(f"{(10 / 13 + 10 / 13 + 10 / 12) / 3:.2f} [")
    # The same figure again, one query at a time from the finished traces.
    klee, x = read_tasks(root, root / "tasks.json")
    recalls = []
    for task in (klee, x):
        folder = tmp_path / "runs" / task.folder
        module = TextToImageLoRA("tiny-sd1", rank=8, resolution=SIZE)
        load_trained(module.eval(), folder, 2)
        [done] = folder.glob("answers-*/traces/*/finished-*")
        options: dict[str, Any] = {"sampler": Sampler(steps=2, guidance=6.0), "given": "noised"}
        attributor = Attributor(
            TraceStore(done.parent), module, method=methods.d_trak(1), **options
        )
        for seed, prompt in enumerate(task.prompts):
            best = attributor.attribute(
                Concept(task.name, prompt, without_token(prompt)), seed
            ).top(10)
            hits = sum(record.sample_id in task.exemplars for record in best)
            recalls.append(hits / len(task.exemplars))
        assert (folder / "queries.png").exists()
    assert rows["d_trak"][0].startswith(f"{sum(recalls) / 3:.2f} [")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/step-*")}
    assert len(written) == 4
    by_customization.main(command)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (tmp_path / "by_customization.md").read_text() == text
    with pytest.raises(ValueError, match="holds a run with .*'steps': 2.*HINT: name a new folder"):
        by_customization.main([*command, "--steps", "4"])
