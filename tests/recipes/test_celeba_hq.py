"""The CelebA-HQ recipe on a stand-in in the published layout: 96 pictures whose three attributes are plain to see."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctrak_lightning import Attributor, Sampler, TraceStore, methods
from recipes.benchmarks.replay import saved_steps
from recipes.celeba_hq import benchmark
from recipes.celeba_hq.data import (
    ANNOTATIONS,
    IMAGES,
    VALUES,
    CelebAHQ,
    caption,
    find_images,
    read_annotations,
    read_images,
)
from recipes.celeba_hq.train import train
from recipes.celeba_hq.verifier import Trust, measure, train_verifier
from recipes.pictures import read_square
from recipes.synthetic.verifier import Verifier

NAMES = ["Bald", "Male", "Smiling", "Young", "Eyeglasses"]
ASKED = ["Male", "Smiling", "Eyeglasses"]
COPIES = 12
SIZE = 24


def picture(male: bool, smiling: bool, glasses: bool, noise: int) -> np.ndarray:
    """A ground in red or blue, a white bar below, a black bar above, and a little noise."""
    image = np.full((SIZE, SIZE, 3), (40, 60, 200) if male else (200, 60, 40), dtype=np.int64)
    if smiling:
        image[-8:] = 255
    if glasses:
        image[:8] = 0
    rng = np.random.default_rng(noise)
    return np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8)


def annotation(values: list[tuple[bool, ...]]) -> str:
    """As published: the count, the names, and rows with two spaces after the file's name."""
    rows = [
        f"{i}.jpg  " + " ".join("1" if v else "-1" for v in (i % 2 == 0, row[0], row[1], i % 3 == 0, row[2]))
        for i, row in enumerate(values)
    ]
    return "\n".join([str(len(rows)), " ".join(NAMES) + " ", *rows]) + "\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("CelebAMask-HQ")
    values = list(itertools.product([False, True], repeat=3)) * COPIES
    (folder / IMAGES).mkdir()
    for i, row in enumerate(values):
        Image.fromarray(picture(*row, noise=i)).save(folder / IMAGES / f"{i}.jpg", quality=95)
    (folder / ANNOTATIONS).write_text(annotation(values))
    return folder


@pytest.fixture
def data(root: Path) -> CelebAHQ:
    return CelebAHQ(root, ASKED, size=8, batch_size=16)


def test_the_attribute_list_is_read_by_hand(tmp_path: Path) -> None:
    path = tmp_path / ANNOTATIONS
    path.write_text("2\nBald Male Smiling\n0.jpg  -1  1 -1\n7.jpg   1 -1  1 \n")
    found = read_annotations(path)
    assert (found.names, found.files) == (["Bald", "Male", "Smiling"], ["0.jpg", "7.jpg"])
    assert found.values.tolist() == [[False, True, False], [True, False, True]]
    assert found.columns(["Smiling", "Bald"]) == [2, 0]
    with pytest.raises(ValueError, match="Unknown attribute 'Smilling'. Known: Smiling, Bald, Male"):
        found.columns(["Smilling"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\nBald Male\n0.jpg  1 -1\n", "1 image lines.*first line says 2"),
        ("1\nBald Male\n0.jpg  1\n", r"line 1 \('0.jpg'\) has 1 values, expected 2"),
        ("1\nBald Male\n0.jpg  1 0\n", "values of 1 or -1"),
        ("2\nBald\n0.jpg 1\n0.jpg 1\n", "with 1 different names"),
        ("Bald Male\n0.jpg  1 1\n1.jpg 1 1\n", "expected the number of images in the first line"),
    ],
)
def test_a_damaged_attribute_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / ANNOTATIONS).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / ANNOTATIONS)


def test_images_are_found_by_name_or_by_number_and_missing_ones_are_named(tmp_path: Path) -> None:
    for name in ("0.jpg", "00001.png", "notes.txt", "12.jpg"):
        (tmp_path / name).touch()
    found = find_images(tmp_path, ["12.jpg", "1.jpg", "0.jpg"])
    assert [path.name for path in found] == ["12.jpg", "00001.png", "0.jpg"]
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 .*first \['2.jpg', '3.jpg'\]; expected <root>/CelebA"
    ):
        find_images(tmp_path, ["0.jpg", "2.jpg", "3.jpg"])
    with pytest.raises(FileNotFoundError, match="no such folder; expected <root>/CelebA"):
        find_images(tmp_path / "absent", ["0.jpg"])
    with pytest.raises(FileNotFoundError, match="CelebAMask-HQ-attribute-anno.txt: no such file; expected"):
        read_annotations(tmp_path / ANNOTATIONS)


def test_an_image_is_cut_to_its_centre_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    square = read_square(tmp_path / "wide.png", 8)
    assert square.dtype == torch.uint8
    assert torch.equal(square, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.jpg: cannot be read as an image"):
        read_square(tmp_path / "broken.jpg", 8)
    with pytest.raises(FileNotFoundError, match="absent.jpg: no such image"):
        read_square(tmp_path / "absent.jpg", 8)


def test_a_cache_is_used_for_the_same_files_only(tmp_path: Path) -> None:
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
        Image.fromarray(np.full((8, 8, 3), colour, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    first, second = tmp_path / "0.png", tmp_path / "1.png"
    cache = tmp_path / "cache" / "images.safetensors"
    read = read_images([first, second], 8, cache)
    assert torch.equal(read, torch.stack([read_square(first, 8), read_square(second, 8)]))
    written = cache.stat().st_mtime_ns
    assert torch.equal(read_images([first, second], 8, cache), read)
    assert cache.stat().st_mtime_ns == written
    assert torch.equal(read_images([second, first], 8, cache), read.flip(0))
    assert read_images([second, first], 4, cache).shape == (2, 3, 4, 4)


def test_training_never_sees_the_triple_and_the_verifier_does(root: Path) -> None:
    data = CelebAHQ(root, ASKED, ["yes", "no", "yes"], size=8)
    triple = {"Male": "yes", "Smiling": "no", "Eyeglasses": "yes"}
    assert data.held_out == triple
    assert data.combos.count(triple) == COPIES
    assert triple not in data.train_set.combos
    assert len(data.train_set) == 7 * COPIES
    item = data.train_set[0]
    assert (item["sample_id"], item["Male"], item["caption"]) == (
        "0.jpg",
        "no",
        "no Male, no Smiling, no Eyeglasses",
    )
    # The stand-in's ground is red or blue by Male: labels and pixels belong together, after the triple is gone too.
    for row in range(len(data.train_set)):
        middle = data.train_set[row]["image"][:, 4, 4]
        assert bool(middle[2] > middle[0]) == (data.train_set.combos[row]["Male"] == "yes")


def test_the_traced_images_are_a_seeded_choice_in_file_order(root: Path) -> None:
    data, again, other = (CelebAHQ(root, ASKED, size=8, traced=20, seed=seed) for seed in (1, 1, 2))
    ids = [name for batch in data.trace_dataloader() for name in batch["sample_id"]]
    assert len(set(ids)) == 20
    assert ids == sorted(ids, key=lambda name: int(name.removesuffix(".jpg")))
    assert again.traced == data.traced != other.traced
    columns = [row for batch in data.trace_dataloader() for row in batch["Smiling"]]
    assert columns == [combo["Smiling"] for combo in data.traced_combos()]


def test_what_cannot_be_asked_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'Glasses'. Known: .*Eyeglasses"):
        CelebAHQ(root, ["Male", "Smiling", "Glasses"])
    with pytest.raises(ValueError, match="three different attributes"):
        CelebAHQ(root, ["Male", "Male", "Smiling"])
    with pytest.raises(ValueError, match=r"\['yes', 'si', 'no'\].*'no', 'yes'"):
        CelebAHQ(root, ASKED, ["yes", "si", "no"])
    with pytest.raises(ValueError, match="traced=85.*between 1 and 84"):
        CelebAHQ(root, ASKED, size=8, traced=85)
    # Young and Bald depend on the image's number alone; no image is all of an impossible triple.
    values = [row for row in itertools.product([False, True], repeat=3) if row != (True, True, True)]
    (tmp_path / ANNOTATIONS).write_text(annotation(values))
    shutil.copytree(root / IMAGES, tmp_path / IMAGES)
    with pytest.raises(ValueError, match="no image shows this triple"):
        CelebAHQ(tmp_path, ASKED)
    (tmp_path / ANNOTATIONS).write_text(
        annotation([(True, True, True), (False, True, False), (False, False, False)])
    )
    with pytest.raises(ValueError, match=r"without the triple, Male is \['no'\]"):
        CelebAHQ(tmp_path, ASKED)


def test_the_verifier_is_measured_on_real_images_and_by_hand(data: CelebAHQ) -> None:
    class Oracle(Verifier):
        """Sees glasses everywhere and is right otherwise."""

        def verify(self, images: Tensor, specs: Any) -> Tensor:
            truth = [
                {
                    "Male": VALUES[int(image[2, 4, 4] > image[0, 4, 4])],
                    "Smiling": VALUES[int(image[:, -1, 4].min() > 0.6)],
                    "Eyeglasses": "yes",
                }
                for image in images
            ]
            return torch.tensor(
                [all(t[k] == v for k, v in spec.items()) for t, spec in zip(truth, specs, strict=True)]
            )

    found = measure(Oracle(data.factors, 8), data.pixels, data.combos, data.held_out)
    assert found.accuracy == {"Male": 1.0, "Smiling": 1.0, "Eyeglasses": 0.5}
    assert found.images == 96
    assert found.accepts_triple == 1
    assert found.accepts_others == pytest.approx(1 / 7)  # smiling men without glasses
    # With few glasses, saying "yes" always is right for few images, and its balanced accuracy is chance all the same.
    rare = [i for i, c in enumerate(data.combos) if c["Eyeglasses"] == "no" or i < 8]
    few = measure(Oracle(data.factors, 8), data.pixels[rare], [data.combos[i] for i in rare], data.held_out)
    assert few.accuracy["Eyeglasses"] == 0.5
    with pytest.raises(ValueError, match="all 2 images kept back have Male 'no'"):
        measure(Oracle(data.factors, 8), data.pixels[:2], data.combos[:2], data.held_out)


def test_a_verifier_learns_the_attributes_and_one_that_has_not_is_refused(data: CelebAHQ) -> None:
    verifier, trust = train_verifier(data, seed=0, steps=120)
    assert min(trust.accuracy.values()) > 0.9
    assert trust.images == 10
    images = data.pixels.float() / 255
    own = verifier.verify(images, data.combos).float().mean()
    swapped = [{**combo, "Smiling": VALUES[1 - VALUES.index(combo["Smiling"])]} for combo in data.combos]
    assert own > 0.9
    assert verifier.verify(images, swapped).float().mean() < 0.1
    with pytest.raises(ValueError, match="balanced accuracy.*expected at least 0.8.*HINT"):
        train_verifier(data, seed=0, steps=1)


def test_questions_ask_for_the_held_out_values_only(data: CelebAHQ) -> None:
    data.held_out = {"Male": "yes", "Smiling": "no", "Eyeglasses": "yes"}
    seeds = {caption(combo): [5, 9] for combo in data.all_combos()}
    asked = benchmark.questions(data, benchmark.Queries(seeds, {}, 8))
    # Each of the three values is part of 4 of the 8 triples; two images each.
    assert len(asked) == 3 * 4 * 2
    assert {(q.attribute, q.combo[q.attribute]) for q in asked} == set(data.held_out.items())
    assert sum(q.combo == data.held_out for q in asked) == 6
    question = next(q for q in asked if q.attribute == "Smiling")
    dropped, swapped = question.concept("dropped"), question.concept("swapped")
    assert dropped.present == swapped.present == question.combo
    assert "Smiling" not in dropped.absent
    assert swapped.absent == {**question.combo, "Smiling": "yes"}


def test_figures_by_hand(data: CelebAHQ) -> None:
    seeds = {caption(combo): [0, 1] for combo in data.all_combos()}
    asked = benchmark.questions(data, benchmark.Queries(seeds, {}, 8))
    shown = data.traced_combos()
    scores = torch.rand(len(asked), len(shown), generator=torch.Generator().manual_seed(0))
    found = benchmark.figures(data, asked, scores)
    for where in benchmark.WHERE:
        rows = [
            i
            for i, q in enumerate(asked)
            if q.attribute == "Smiling" and (q.combo == data.held_out) == (where == "held out")
        ]
        expected = []
        for i in rows:
            best = sorted(range(len(shown)), key=lambda n: -float(scores[i, n]))[:10]
            expected.append(sum(shown[n]["Smiling"] == "yes" for n in best) / 10)
        assert found[f"P@10, {where}, Smiling"].tolist() == pytest.approx(expected)
    references = benchmark.references(data, asked, torch.rand(len(asked), 3, 8, 8))
    perfect = benchmark.figures(data, asked, references["label_search"])
    chance = benchmark.figures(data, asked, references["chance"])
    assert {float(values.min()) for values in perfect.values()} == {1.0}
    share = sum(combo["Male"] == "yes" for combo in shown) / len(shown)  # 36 of 84
    assert chance["P@10, held out, Male"].tolist() == pytest.approx([share] * 2)
    assert chance["AUROC, held out, Male"].tolist() == [0.5, 0.5]
    data.traced = data.traced[:20]
    with pytest.raises(ValueError, match=r"\d of 20 traced images have .*=yes, expected at least 10. HINT"):
        benchmark.relevance(data, asked)


def test_rows_ask_of_generated_images_only() -> None:
    chosen = benchmark.rows([1, 2], None)
    assert {"concept_trak_paper", "concept_trak", "trak_global", "das"} <= {row.name for row in chosen}
    assert {row.scope for row in chosen} == {"local", "global"}
    with pytest.raises(ValueError, match="ask of given images"):
        benchmark.rows([1], ["d_trak", "d_trak_given"])


def tiny(out: Path, data: CelebAHQ, **changed: Any) -> Any:
    arguments = {"steps": 8, "channels": (8, 16), "checkpoints": 2, "verifier_steps": 120}
    return train(out, data, 0, **(arguments | changed))


class Watch(L.Callback):
    """Notes where training starts, and cuts it after a step."""

    def __init__(self, cut: int | None = None) -> None:
        self.cut, self.started = cut, -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.cut:
            raise RuntimeError("cut")


def test_a_run_that_was_cut_goes_on_and_a_finished_one_is_not_repeated(
    tmp_path: Path, data: CelebAHQ
) -> None:
    with pytest.raises(RuntimeError, match="cut"):
        tiny(tmp_path, data, callbacks=[Watch(7)])  # five steps an epoch
    assert not (tmp_path / "facts.json").exists()
    early, judge = (tmp_path / name for name in ("step-00000004.safetensors", "verifier.safetensors"))
    written = [path.stat().st_mtime_ns for path in (early, judge)]
    watch = Watch()
    run = tiny(tmp_path, data, callbacks=[watch])
    assert watch.started == 5
    assert saved_steps(tmp_path) == [4, 8]
    assert [path.stat().st_mtime_ns for path in (early, judge)] == written
    again = Watch()
    same = tiny(tmp_path, data, callbacks=[again])
    assert again.started == -1
    for name, value in run.module.state_dict().items():
        assert torch.equal(value, same.module.state_dict()[name])
    assert Trust(**same.facts["verifier"]).images == 10
    with pytest.raises(ValueError, match=r"other arguments .*'steps': \(8, 9\).*HINT"):
        tiny(tmp_path, data, steps=9)


def test_too_few_images_that_show_their_triple_are_reported_with_the_counts(
    tmp_path: Path, data: CelebAHQ
) -> None:
    run = tiny(tmp_path, data, steps=2)
    with pytest.raises(ValueError, match=r"too few.*Male, Smiling, Eyeglasses: \d of 8.*HINT: train longer"):
        benchmark.verified(run, 2, Sampler(steps=2))

    def every_second(images: Tensor, specs: Any) -> Tensor:
        return torch.arange(len(images)) % 2 == 1

    run.verifier.verify = every_second
    queries = benchmark.verified(run, 2, Sampler(steps=2))
    assert queries.tried == 8
    assert set(map(tuple, queries.seeds.values())) == {(1, 3)}
    assert set(queries.accepted.values()) == {4}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_benchmark_from_the_images_to_the_table(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "TIMESTEPS", 1)
    monkeypatch.setattr(benchmark, "SAMPLER", Sampler(steps=2))
    monkeypatch.setattr(benchmark, "verified", lambda run, wanted: chosen(run.data))

    def chosen(data: CelebAHQ) -> benchmark.Queries:
        names = [caption(combo) for combo in data.all_combos()]
        return benchmark.Queries({name: [0, 3] for name in names}, dict.fromkeys(names, 5), 8)

    small = ["--size", "8", "--steps", "6", "--channels", "8", "16", "--verifier-steps", "120"]
    command = ["--root", str(root), *small, "--batch-size", "16", "--traced", "60", "--queries", "2"]
    command += ["--methods", "d_trak", "concept_trak"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    benchmark.main(command)
    facts = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert facts["held_out"] == dict.fromkeys(ASKED, "yes")
    assert facts["training_images"] == 84
    assert facts["accepted"]["0"]["Male, Smiling, Eyeglasses"] == 5
    assert facts["verifier"]["0"]["accuracy"].keys() == set(ASKED)
    rows = facts["rows"]
    assert set(rows) == {
        *("d_trak", "concept_trak", "concept_trak_swapped"),
        *("label_search", "pixel_similarity", "chance"),
    }
    assert rows["label_search"]["P@10, held out, Eyeglasses"]["mean"] == 1
    # The same figure again, from the finished traces, one image at a time.
    folder = tmp_path / "runs" / "seed-0"
    data = CelebAHQ(root, ASKED, size=8, batch_size=16, traced=60)
    run = train(folder, data, steps=6, channels=(8, 16), verifier_steps=120)
    wanted = methods.d_trak(1)
    stores = [TraceStore(path.parent) for path in folder.glob("answers-*/traces/*/finished-*")]
    by_name = {store.header.method["name"]: store for store in stores}
    assert len(stores) == 2  # both counter-conditions share their traces
    attributor = Attributor(by_name["d_trak"], run.module, method=wanted, sampler=Sampler(steps=2))
    triple = benchmark.Question(data.held_out, "Smiling", 0).concept("dropped")
    hits = []
    for seed in (0, 3):
        best = attributor.attribute(triple, seed).top(10)
        hits.append(sum(record.metadata["Smiling"] == "yes" for record in best) / 10)
    assert rows["d_trak"]["P@10, held out, Smiling"]["mean"] == pytest.approx(sum(hits) / 2)
    text = (tmp_path / "results" / "benchmark.md").read_text()
    assert "accepts: seed 0: 5 of 8" in text
    assert "| label_search | 1.00 [1.00, 1.00] (1.00) |" in text
    with pytest.raises(SystemExit):
        benchmark.main([*command, "--queries", "1"])
