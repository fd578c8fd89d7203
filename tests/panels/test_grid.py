"""The picture of a concept, pixel by pixel where images are."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctrak_lightning import Concept
from ctrak_lightning.panels import Answer
from ctrak_lightning.panels.grid import CELL, GENERATED, MAT, Geometry, concept_grid
from ctrak_lightning.panels.watch import Shown

from .answers import answer_of, thumbnails

SCORES = [0.5, -3.0, 2.0, 1.0, -1.0, 4.0, 0.1]
ORDER = [5, 2, 3, 0, 6, 4, 1]  # by falling score
OWNERS = {"owner": ["ann", "bo", "ann", "cy", "bo", "ann", "cy"]}


def pixels(picture: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(picture.crop(box))


def enlarged(image: Tensor, factor: int) -> np.ndarray:
    return image.numpy().repeat(factor, 0).repeat(factor, 1)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_images_stand_in_their_places(side: int) -> None:
    images = thumbnails(7, side, side)
    generated = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
    picture = concept_grid(
        answer_of(SCORES, OWNERS, images=images, image=generated),
        Shown(group="owner", top=5, bottom=2),
    )
    geometry = Geometry(5, 2)
    assert picture.size == geometry.size
    for i, position in enumerate(ORDER[:5]):
        np.testing.assert_array_equal(
            pixels(picture, geometry.proponent(i)), enlarged(images[position], CELL // side)
        )
    for i, position in enumerate([1, 4]):
        np.testing.assert_array_equal(
            pixels(picture, geometry.opponent(i)), enlarged(images[position], CELL // side)
        )
    factor = GENERATED // side
    margin = (GENERATED - factor * side) // 2
    inner = pixels(picture, geometry.generated)[
        margin : margin + factor * side, margin : margin + factor * side
    ]
    expected = (generated * 255).round().byte().permute(1, 2, 0)
    np.testing.assert_array_equal(inner, enlarged(expected, factor))


def test_boxes_do_not_touch_and_lie_inside() -> None:
    geometry = Geometry(11, 6)
    boxes = [
        geometry.generated,
        *map(geometry.proponent, range(11)),
        *map(geometry.opponent, range(6)),
    ]
    width, height = geometry.size
    covered = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in boxes:
        assert 0 < left < right < width
        assert 0 < top < bottom < height
        covered[top - 1 : bottom + 1, left - 1 : right + 1] += 1
    assert covered.max() == 1


def test_a_wide_image_keeps_its_shape_on_a_mat() -> None:
    images = thumbnails(7, 16, 64)
    picture = concept_grid(answer_of(SCORES, images=images), Shown(group=None, top=1, bottom=0))
    cell = pixels(picture, Geometry(1, 0).proponent(0))
    np.testing.assert_array_equal(cell[48:80], enlarged(images[5], 2))
    assert (cell[:48] == MAT).all()
    assert (cell[80:] == MAT).all()


def test_a_huge_image_is_reduced() -> None:
    huge = torch.zeros(3, 1024, 2048)
    huge[0, :, :1024] = 1.0
    picture = concept_grid(answer_of(SCORES, image=huge), Shown(group=None))
    box = pixels(picture, Geometry(7, 4).generated)
    shown = box[GENERATED // 4 : 3 * GENERATED // 4]
    assert (shown[:, 4 : GENERATED // 2 - 4] == (255, 0, 0)).all()
    assert (shown[:, GENERATED // 2 + 4 : -4] == 0).all()
    assert (box[: GENERATED // 4 - 1] == MAT).all()


def ink(picture: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Pixels darker than the mat."""
    return int((pixels(picture, box).min(-1) < 200).sum())


def test_without_images_the_frames_tell_ids_and_why() -> None:
    picture = concept_grid(answer_of(SCORES, OWNERS), Shown(group="owner", top=2, bottom=0))
    geometry = Geometry(2, 0)
    assert ink(picture, geometry.proponent(0)) > 20
    assert ink(picture, geometry.generated) > 200


def test_rank_score_owner_are_drawn_below_each_image() -> None:
    def below(answer: Answer, group: str | None) -> np.ndarray:
        picture = concept_grid(answer, Shown(group=group, top=1, bottom=0))
        left, _, right, bottom = Geometry(1, 0).proponent(0)
        return pixels(picture, (left, bottom + 1, right, bottom + 74))

    images = thumbnails(7)
    plain = below(answer_of(SCORES, OWNERS, images=images), None)
    owner = below(answer_of(SCORES, OWNERS, images=images), "owner")
    other = below(answer_of(SCORES, {"owner": ["zed"] * 7}, images=images), "owner")
    score = below(
        answer_of([2 * s for s in SCORES[:5]] + [9.0, 0.2], OWNERS, images=images), "owner"
    )
    assert (plain[:26] == owner[:26]).all()
    assert (plain[26:46] == 255).all()
    assert (owner[26:46] != other[26:46]).any()
    assert (owner[:26] == other[:26]).all()
    assert (score[:26] != owner[:26]).any()
    assert (score[26:] == owner[26:]).all()


def test_bars_are_as_long_as_the_shares() -> None:
    answer = answer_of(SCORES, OWNERS, images=thumbnails(7), image=torch.zeros(3, 16, 16))
    assert answer.result is not None
    shares = answer.result.by_group("owner", resamples=1)
    picture = np.asarray(concept_grid(answer, Shown(group="owner", top=8, bottom=4, shares=shares)))
    runs = [int((row[: 24 + GENERATED] == (58, 110, 165)).all(-1).sum()) for row in picture]
    lengths = [a for a, b in zip(runs, [0, *runs[:-1]], strict=True) if a and a != b]
    # ann: s0, s2, s5 = 6.5; cy: s3, s6 = 1.1; bo: nothing
    assert lengths == [round(GENERATED * 6.5 / 7.6), round(GENERATED * 1.1 / 7.6)]


def test_a_concept_within_noise_says_so_in_the_title() -> None:
    def title(strength: float) -> np.ndarray:
        return np.asarray(concept_grid(answer_of(SCORES, strength=strength), Shown(group=None)))[
            :60
        ]

    reds = [
        (title(s)[..., 0].astype(int) - title(s)[..., 1]).max() for s in (0.2, float("nan"), 1e-5)
    ]
    assert reds[0] == reds[1] < 20 < 100 < reds[2]


def test_hostile_text_and_missing_results() -> None:
    hostile = {
        "owner": ["\u202e猫🦉\n\n\x1b[31m" * 50] * 7,
        "caption": ["<img src=x>\0".replace("\0", "\x01")] * 7,
    }
    picture = concept_grid(
        answer_of(SCORES, hostile, name="名\n" * 300, images=thumbnails(7)), Shown(group="owner")
    )
    assert picture.size == Geometry(7, 4).size
    nothing = Answer(Concept("x", {"a": "b"}, {}), None, "zero gradient")
    with pytest.raises(ValueError, match="no result to show .zero gradient.*HINT"):
        concept_grid(nothing, Shown(group=None))
