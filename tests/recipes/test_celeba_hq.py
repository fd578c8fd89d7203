"""The CelebA-HQ benchmark on a stand-in in the published layout: 96 pictures whose three attributes
are plain to see."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ctrak_lightning import Attributor, Sampler, TraceStore, methods
from recipes.benchmarks import celeba_hq, triples
from recipes.benchmarks.celeba_hq import ANNOTATIONS, IMAGES, CelebAHQ, read_annotations
from recipes.benchmarks.replay import saved_steps
from recipes.benchmarks.triples import VALUES, Run, caption, concept, train_verifier

from .stand_ins import picture

NAMES = ["Bald", "Male", "Smiling", "Young", "Eyeglasses"]
TRIPLE = {"Male": "yes", "Smiling": "yes", "Eyeglasses": "yes"}
COPIES = 12
SETTINGS: dict[str, Any] = {
    **{"seed": 0, "patch": 2, "channels": [8, 16], "steps": 6, "verifier_steps": 120},
    "batch_size": 16,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: the count, the names, and rows with two spaces after the file's name."""
    folder = tmp_path_factory.mktemp("CelebAMask-HQ")
    values = list(itertools.product([False, True], repeat=3)) * COPIES
    (folder / IMAGES).mkdir()
    lines = [str(len(values)), " ".join(NAMES) + " "]
    for i, row in enumerate(values):
        Image.fromarray(picture(*row, noise=i)).save(folder / IMAGES / f"{i}.jpg", quality=95)
        told = (i % 2 == 0, row[0], row[1], i % 3 == 0, row[2])
        lines.append(f"{i}.jpg  " + " ".join("1" if value else "-1" for value in told))
    (folder / ANNOTATIONS).write_text("\n".join(lines) + "\n")
    return folder


def data_of(root: Path, held_out: dict[str, str] = TRIPLE, traced: int = 60) -> CelebAHQ:
    return CelebAHQ(root, held_out, size=8, batch_size=16, traced=traced, seed=0)


def test_the_attribute_list_is_read_by_hand_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ANNOTATIONS
    path.write_text("2\nBald Male Smiling\n0.jpg  -1  1 -1\n7.jpg   1 -1  1 \n")
    names, files, values = read_annotations(path)
    assert (names, files) == (["Bald", "Male", "Smiling"], ["0.jpg", "7.jpg"])
    assert values.tolist() == [[False, True, False], [True, False, True]]
    for text, line in (
        ("2\nBald Male\n0.jpg  1 -1\n", 1),
        ("1\nBald Male\n0.jpg  1\n", 3),
        ("2\nBald Male\n1.jpg 1 1\n0.jpg  1 0\n", 4),
        ("2\nBald\n0.jpg 1\n0.jpg 1\n", 1),
        ("Bald Male\n0.jpg  1 1\n1.jpg 1 1\n", 3),
        ("1\nBald\n", 1),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"line {line}: expected the number of images"):
            read_annotations(path)
    with pytest.raises(FileNotFoundError, match="no such file; expected <root>/CelebAMask"):
        read_annotations(tmp_path / "absent.txt")


def test_training_never_sees_the_triple_and_labels_and_pixels_belong_together(root: Path) -> None:
    triple = {"Male": "yes", "Smiling": "no", "Eyeglasses": "yes"}
    data = data_of(root, triple)
    assert data.combos.count(triple) == COPIES
    assert triple not in data.train_set.combos
    assert len(data.train_set) == 7 * COPIES
    assert data.train_set[0]["sample_id"] == "0.jpg"
    assert data.train_set[0]["caption"] == "no Male, no Smiling, no Eyeglasses"
    for row in range(len(data.train_set)):  # the stand-in's ground is red or blue by Male
        middle = data.train_set[row]["image"][:, 4, 4]
        assert bool(middle[2] > middle[0]) == (data.train_set.combos[row]["Male"] == "yes")
    ids = [name for batch in data.trace_dataloader() for name in batch["sample_id"]]
    assert len(set(ids)) == 60
    assert ids == sorted(ids, key=lambda name: int(name.removesuffix(".jpg")))


def test_what_cannot_be_asked_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"\['Glasses'\]. Known: .*Eyeglasses"):
        data_of(root, {"Male": "yes", "Smiling": "yes", "Glasses": "yes"})
    # Bald is true of every even picture, so no triple with it has all combinations.
    with pytest.raises(ValueError, match="no image shows this triple"):
        data_of(root, {"Bald": "yes", "Eyeglasses": "yes", "Smiling": "yes"})
    data = data_of(root, traced=9)
    with pytest.raises(ValueError, match="expected at least 10. HINT: trace more"):
        data.relevance([(TRIPLE, "Male", 0)])


def test_a_judge_learns_the_attributes_and_one_that_has_not_is_refused(root: Path) -> None:
    data = data_of(root)
    verifier, accuracy = train_verifier(data, seed=0, steps=120)
    assert min(accuracy.values()) > 0.9
    images = data.pixels.float() / 255
    other = [{**c, "Smiling": VALUES[1 - VALUES.index(c["Smiling"])]} for c in data.combos]
    assert verifier.verify(images, data.combos).float().mean() > 0.9
    assert verifier.verify(images, other).float().mean() < 0.1
    with pytest.raises(ValueError, match="balanced accuracy.*expected at least 0.8.*HINT"):
        train_verifier(data, seed=0, steps=1)


def test_figures_by_hand(root: Path) -> None:
    data = data_of(root, traced=84)
    asked = [(combo, name, 0) for combo in data.triples for name in TRIPLE if combo[name] == "yes"]
    shown = [data.train_set.combos[i] for i in data.traced]
    scores = torch.rand(len(asked), len(shown), generator=torch.Generator().manual_seed(0))
    found = data.figures(asked, scores)
    for where in triples.WHERE:
        expected = []
        for i, (combo, name, _) in enumerate(asked):
            if name == "Smiling" and (combo == TRIPLE) == (where == "held out"):
                best = sorted(range(len(shown)), key=lambda n: -float(scores[i, n]))[:10]
                expected.append(sum(shown[n]["Smiling"] == "yes" for n in best) / 10)
        assert found[f"P@10, {where}, Smiling"].tolist() == pytest.approx(expected)


def test_a_question_is_against_the_triple_without_the_attribute_or_with_its_other_value() -> None:
    combo = {"Male": "yes", "Smiling": "no", "Eyeglasses": "yes"}
    dropped, swapped = (
        concept((combo, "Smiling", 0), counter) for counter in ("dropped", "swapped")
    )
    assert dropped.present == swapped.present == combo
    assert dropped.absent == {"Male": "yes", "Eyeglasses": "yes"}
    assert swapped.absent == combo | {"Smiling": "yes"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_benchmark_from_the_images_to_the_table(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triples, "TIMESTEPS", 1)
    monkeypatch.setattr(triples, "SAMPLER", Sampler(steps=2))

    def every_second(self: Any, images: Tensor, specs: Any) -> Tensor:
        return torch.arange(len(images)) % 2 == 1

    command = ["--root", str(root), "--size", "8", "--steps", "6", "--channels", "8", "16"]
    command += ["--verifier-steps", "120", "--batch-size", "16", "--traced", "60"]
    command += ["--methods", "d_trak", "concept_trak", "--queries", "2"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(
        ValueError, match=r"verified_seeds.{'Male': .*: \d of 8 .*HINT: train longer"
    ):
        celeba_hq.main(command)
    with monkeypatch.context() as patched:
        patched.setattr("recipes.benchmarks.synthetic.verifier.Verifier.verify", every_second)
        celeba_hq.main(command)  # the run is finished, and is not repeated
    text = (tmp_path / "celeba_hq.md").read_text()
    assert "seed 0: accepts 4 of 8 images of the held-out triple; Male " in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert rows.keys() - {"method"} == {
        *("d_trak", "concept_trak", "concept_trak, swapped"),
        *("label_search", "pixel_similarity", "chance"),
    }
    assert rows["label_search"].count("1.00 [1.00, 1.00] (1.00)") == 6
    # The same figure again, from the finished traces, one image at a time.
    folder = tmp_path / "runs" / "seed-0"
    data = data_of(root)
    run = Run(folder, data, SETTINGS)
    assert saved_steps(folder) == run.steps == [2, 4, 6]
    stores = [TraceStore(path.parent) for path in folder.glob("answers-*/traces/*/finished-*")]
    by_name = {store.header.method["name"]: store for store in stores}
    assert len(stores) == 2  # both counter-conditions share their traces
    options: dict[str, Any] = {"method": methods.d_trak(1), "sampler": Sampler(steps=2)}
    attributor = Attributor(by_name["d_trak"], run.module, **options)
    hits = []
    for seed in (1, 3):
        best = attributor.attribute(concept((TRIPLE, "Smiling", seed), "dropped"), seed).top(10)
        hits.append(sum(record.metadata["Smiling"] == "yes" for record in best) / 10)
    column = lines[0].split(" | ").index("P@10, held out, Smiling")
    assert rows["d_trak"].split(" | ")[column].startswith(f"{sum(hits) / 2:.2f} [")
    with pytest.raises(ValueError, match="holds a run with.*HINT: name a new folder"):
        Run(folder, data, SETTINGS | {"steps": 9})
    assert caption(TRIPLE) == "Male, Smiling, Eyeglasses"
