"""FaceArtists and what is judged on it."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.benchmarks import face_parts, faces
from recipes.benchmarks.counterfactual import best_ranked
from recipes.benchmarks.face_parts import (
    HELD,
    LIKENESS,
    Drawing,
    LeftOut,
    PartFaces,
    PartRun,
    Training,
    drawing_mask,
    experiments,
    likeness,
    lost,
    lost_table,
    masked_losses,
    retrieved,
)
from recipes.benchmarks.faces import FaceTriples
from recipes.benchmarks.synthetic.model import FactorDiffusion
from recipes.face_artists.data import ATTRIBUTES, FaceArtists, Faces, FaceSet

TINY = Training(patch=8, channels=(8, 8), base_steps=2, steps=3, batch_size=8)


@pytest.fixture(scope="module")
def lorelei() -> Faces:
    return Faces.load(("lorelei",))


@pytest.fixture(scope="module")
def data(lorelei: Faces) -> PartFaces:
    return PartFaces.split(lorelei)


def test_labels_and_parts_agree_and_pixels_are_the_files_own() -> None:
    every = Faces.load()
    assert len(every) == len(set(every.sample_ids)) == 4800
    assert {name: every.artists.count(name) for name in set(every.artists)} == dict.fromkeys(
        ("lorelei", "open-peeps", "notionists"), 1600
    )
    names = {
        "lorelei": ("glasses", "beard"),
        "open-peeps": ("accessories", "facialHair"),
        "notionists": ("glasses", "beard"),
    }
    for artist, known, parts in zip(every.artists, every.attributes, every.parts, strict=True):
        glasses, beard = names[artist]
        assert (known["glasses"] == "yes") == (glasses in parts)
        assert (known["beard"] == "yes") == (beard in parts)
        assert (known["smile"] == "") == (artist == "notionists")
        if artist == "lorelei":
            assert (known["smile"] == "yes") == parts["mouth"].startswith("happy")
    with np.load(
        faces.__file__.replace("benchmarks/faces.py", "face_artists/data/face_artists.npz")
    ) as file:
        row = every.sample_ids.index("notionists/0007")
        assert torch.equal(
            every.pixels[row], torch.from_numpy(file["images"][row]).permute(2, 0, 1)
        )
    with pytest.raises(ValueError, match=r"unknown \['nobody'\]. Known: lorelei"):
        Faces.load(("nobody",))


def test_faces_are_chosen_with_all_that_is_known_of_them(lorelei: Faces) -> None:
    rows = [5, 2, 1200]
    some = lorelei.only(rows)
    assert some.sample_ids == [lorelei.sample_ids[i] for i in rows]
    assert some.parts[2] is lorelei.parts[1200]
    assert torch.equal(some.pixels[1], lorelei.pixels[2])
    item = FaceSet(some)[0]
    assert item["owner"] == "Lisa Wischofsky"
    assert item["glasses"] == lorelei.attributes[5]["glasses"]
    said = ", ".join(f"{'' if item[name] == 'yes' else 'no '}{name}" for name in ATTRIBUTES)
    assert item["caption"] == f"{said}, by lorelei"
    module = FaceArtists(lorelei, 10, kept=[3, 4, *range(100, 118)])
    trained = {name for batch in module.train_dataloader() for name in batch["sample_id"]}
    assert trained == {lorelei.sample_ids[i] for i in module.kept}
    traced = [name for batch in module.trace_dataloader() for name in batch["sample_id"]]
    assert traced == lorelei.sample_ids


def test_the_held_out_triple_is_never_shown_and_its_values_are() -> None:
    triple = {"glasses": "yes", "beard": "no", "smile": "yes"}
    data = FaceTriples(triple, batch_size=16, traced=200, seed=0)
    assert len(data.combos) == 3200
    assert triple in data.combos
    assert triple not in data.train_set.combos
    assert len(data.train_set) == 3200 - data.combos.count(triple)
    shown = {tuple(combo.values()) for combo in data.train_set.combos}
    assert shown == {*itertools.product(("no", "yes"), repeat=3)} - {tuple(triple.values())}
    every = Faces.load()
    for row in (0, 1000, len(data.train_set) - 1):
        name = data.train_set.files[row]
        at = every.sample_ids.index(name)
        assert data.train_set.combos[row] == every.attributes[at]
        assert torch.equal(data.train_set.pixels[row], every.pixels[at])
        assert not name.startswith("notionists")


def test_held_back_faces_are_not_trained_on_and_have_what_they_are_asked_for(
    data: PartFaces,
) -> None:
    assert not {*data.held.sample_ids} & {*data.train.sample_ids}
    assert len({*data.held.sample_ids, *data.train.sample_ids}) == 1600
    assert len(data.held) == HELD * (12 + 5 + 2)
    for drawing, parts in zip(data.asked, data.held.parts, strict=True):
        assert parts[drawing.part] == drawing.variant
    assert [data.asked.count(drawing) for drawing in data.drawings] == [HELD] * 19
    for q in (0, 50, 75):
        drawing = data.asked[q]
        own = [parts.get(drawing.part) == drawing.variant for parts in data.train.parts]
        assert data.relevance[q].tolist() == own
    assert data.relevance.sum(1).min() >= 24
    for concept, known in zip(data.concepts(), data.held.attributes, strict=True):
        assert concept.present == {name: known[name] for name in ("glasses", "beard")}
        assert concept.absent == {}


def square(variant: str, i: int) -> tuple[Tensor, dict[str, str]]:
    """A grey face with noise at the bottom, and a black square whose place is the variant's."""
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    top = {"a": 2, "b": 12}[variant]
    image[:, top : top + 4, 8:12] = 0
    image[:, 28:] = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(i)).byte()
    return image, {"hair": variant}


def test_a_mask_is_where_the_drawing_is_and_no_other_part() -> None:
    made = [square("ab"[i % 2], i) for i in range(60)]
    known = {"glasses": "no", "beard": "no", "smile": "no"}
    toy = Faces(
        torch.stack([image for image, _ in made]),
        *([str(i) for i in range(60)], ["lorelei"] * 60, [known] * 60, [p for _, p in made]),
    )
    expected = torch.zeros(32, 32, dtype=torch.bool)
    # The other's square too: that there is none is as much a part of this drawing.
    expected[2:6, 8:12] = expected[12:16, 8:12] = True
    assert torch.equal(drawing_mask(toy, Drawing("hair", "a")), expected)
    assert torch.equal(drawing_mask(toy, Drawing("hair", "b")), expected)


def test_masks_of_real_parts_lie_where_the_parts_are(data: PartFaces) -> None:
    rows = torch.arange(32.0)[:, None].expand(32, 32)
    heights = {}
    for part in ("hair", "glasses", "beard"):
        masks = data.masks[[drawing.part == part for drawing in data.asked]]
        heights[part] = float(rows.expand_as(masks)[masks].mean())
        assert masks.flatten(1).any(1).all()
    assert heights["hair"] < heights["glasses"] < heights["beard"]
    glasses = data.masks[[drawing.part == "glasses" for drawing in data.asked]]
    assert glasses.float().mean() < 0.08


def test_the_loss_is_that_of_the_mask_alone(
    data: PartFaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = FactorDiffusion(dict.fromkeys(("glasses", "beard"), ("no", "yes")), 32, 8, (8, 8))
    some = dataclasses.replace(data, held=data.held.only(range(8)), asked=data.asked[:8])
    losses = masked_losses(module, some)
    assert torch.equal(losses, masked_losses(module, some))
    plain = module.predict
    for inside in (False, True):
        # A prediction that is wrong where the mask is not costs nothing.
        where = (some.masks if inside else ~some.masks)[:, None].expand(-1, 3, -1, -1)
        error = module.latents(torch.where(where, 40.0, 0.0))

        def bent(x: Tensor, t: Tensor, condition: Any, error: Tensor = error) -> Tensor:
            return plain(x, t, condition) + error

        monkeypatch.setattr(module, "predict", bent)
        changed = masked_losses(module, some)
        assert bool((changed > losses + 1000).all()) == inside
        assert inside or torch.allclose(changed, losses)


def test_rankings_are_judged_by_the_same_drawing(data: PartFaces) -> None:
    scores = likeness(data) | {"truth": data.relevance.float(), "wrong": -data.relevance.float()}
    scores = {name: scores[name] for name in (LIKENESS, "truth", "wrong")}
    lines = [line for line in retrieved(data, scores) if line.startswith("| ")]
    heads = [i for i, line in enumerate(lines) if "R-precision, hair" in line]
    found, less = lines[: heads[1]], lines[heads[1] :]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in found[1:]}
    assert rows.keys() == {LIKENESS, "truth", "wrong"}
    assert [cell.strip("| ") for cell in rows["truth"]] == ["1.00 [1.00, 1.00]"] * 6
    assert [cell.strip("| ") for cell in rows["wrong"]] == ["0.00 [0.00, 0.00]"] * 6
    # In the mask the strokes are the same.
    assert rows[LIKENESS][0] == "1.00 [1.00, 1.00]"
    assert less[2].startswith("| wrong | -1.00 [-1.00, -1.00]")


def test_exactly_the_best_ranked_faces_are_left_out(data: PartFaces) -> None:
    scores = torch.zeros(len(data.asked), len(data.train))
    experiment = LeftOut("x", ("glasses",), 3)
    rows = experiment.rows(data)
    assert [data.asked[i].part for i in rows] == ["glasses"] * 5 * HELD
    expected = set()
    for i, q in enumerate(rows[::HELD]):
        for j in range(3):  # one face each, best by the mean of the drawing's questions
            scores[q : q + HELD, 10 * i + j] = 5.0
            expected.add(10 * i + j)
        scores[q, 500 + i] = 9.0  # best by one of the four questions alone
    scores[0, 700:720] = 50.0  # of hair: not asked here
    assert experiment.faces(data, scores) == expected
    assert best_ranked(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2) == {1, 3}
    named = {each.name: each for each in experiments(data)}
    assert named["hair-24"].count == 24
    assert named["larger-1"].count == 15
    assert named["glasses-5"].count == 76
    truth = named["hair-24"].faces(data, data.relevance.float())
    assert len(truth) == 24 * 12  # a face has one hair
    assert truth <= set(data.relevance[:48].any(0).nonzero().flatten().tolist())


def test_a_run_goes_on_where_it_was_and_refuses_other_faces(
    data: PartFaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Faces.load(("notionists",)).only(range(32))
    run = PartRun(tmp_path, data, TINY, base)
    trained: list[list[int]] = []
    plain = face_parts.fitted

    def counted(module: Any, faces: Any, *rest: Any) -> Any:
        trained.append(faces.kept)
        return plain(module, faces, *rest)

    monkeypatch.setattr(face_parts, "fitted", counted)
    without = run.losses("without", {3, 60}, 0)
    assert without.shape == (76,)
    assert trained == [list(range(32)), [i for i in range(1524) if i not in (3, 60)]]
    full = run.losses("full", set(), 0)
    assert not torch.equal(full, without)
    again = PartRun(tmp_path, data, TINY, base)
    assert torch.equal(again.losses("without", {60, 3}, 0), without)
    assert len(trained) == 3  # the base, and one for each
    with pytest.raises(ValueError, match="holds a run with.*HINT: name a new folder"):
        again.losses("without", {3}, 0)
    module, folder = again.full(0)
    torch.testing.assert_close(masked_losses(module, data).double(), full)
    assert sorted(path.name for path in folder.glob("step-*")) == [
        f"step-{step:08d}.safetensors" for step in (1, 2, 3)
    ]
    # What is lost is the rise above the full model, one value per drawing.
    experiment = LeftOut("hair-2", ("hair",), 2)
    monkeypatch.setattr(face_parts, "WITHOUT_GRADIENTS", (face_parts.ANY,))
    scores = {"random": torch.rand(76, 1524)}
    found = lost(again, experiment, scores, ["random"], [0])
    left = experiment.faces(data, scores["random"])
    rise = (again.losses("hair-2-random", left, 0) - full)[:48].view(12, HELD).mean(1)
    assert torch.equal(found["random"][0], rise)
    assert found["all that have it"].shape == (1, 12)
    rows = lost_table({"hair-2": found | {LIKENESS: found["random"] - 1.0}})
    assert any(row.startswith("| random | +1000.00 [+1000.00, +1000.00]") for row in rows)
