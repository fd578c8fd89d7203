"""Hashes of samples cover what a data set gave for them, whatever the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ctrak_lightning import Encoded
from ctrak_lightning.capture.identity import changed_samples, content_hashes


def encoded(rows: int, latents: Tensor | None = None, **condition: Tensor) -> Encoded:
    latents = torch.zeros(rows, 2) if latents is None else latents
    return Encoded(latents=latents, condition=condition, sample_ids=[str(i) for i in range(rows)])


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, 0, 0))


def palette(*colours: int) -> Image.Image:
    """The same places in another palette."""
    image = Image.new("P", (2, 2))
    image.putdata([0, 1, 1, 0])
    image.putpalette([value for colour in colours for value in (colour, 0, 0)])
    return image


KINDS: dict[str, list[Any]] = {
    "tensor": [torch.arange(5.0), torch.arange(5.0) + 1],
    "array": [np.arange(5.0), np.arange(5.0) + 1],
    "image": [picture(1), picture(2)],
    "floats": [[0.1, 0.2], [0.1, 0.3]],
    "nested": [{"pixels": {"a": torch.zeros(2)}}, {"pixels": {"a": torch.ones(2)}}],
    "bytes": [b"jpeg", b"JPEG"],
    "text": ["a", "b"],
    "missing": [None, "b"],
    "palette": [palette(10, 200), palette(200, 10)],
    "whole numbers": [[1, 23], [12, 3]],
    "shape": [np.arange(12).reshape(3, 4), np.arange(12).reshape(4, 3)],
    "dtype": [np.zeros(2, dtype="float32"), np.zeros(2, dtype="int32")],
    "shape of a tensor": [torch.arange(12).view(3, 4), torch.arange(12).view(4, 3)],
    "dtype of a tensor": [torch.zeros(2), torch.zeros(2, dtype=torch.int32)],
    "nested lists": [
        [[torch.tensor([1]), torch.tensor([2])], [torch.tensor([3])]],
        [[torch.tensor([1])], [torch.tensor([2]), torch.tensor([3])]],
    ],
    "kinds of value": ["1", 1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_any_kind_is_in_the_hash(kind: str) -> None:
    """As rows of a list; the second sample's value is given to the first, and to both."""
    one, other = KINDS[kind]

    def batch(*values: Any) -> dict[str, Any]:
        return {"x": list(values), "pixels": torch.ones(len(values), 2)}

    rows = content_hashes(batch(one, other, one), encoded(3))
    assert rows[0] == rows[2] != rows[1]
    assert content_hashes(batch(one), encoded(1)) == rows[:1]
    assert changed_samples(
        ["a", "b", "c"], rows, content_hashes(batch(one, one, one), encoded(3))
    ) == ["b"]


def test_collated_columns_are_those_of_any_batch_size() -> None:
    """default_collate makes columns of nested mappings, of tuples of numbers and of tuples of
    text."""
    samples = [
        {
            "id": f"{i}",
            "image": {"x": torch.full((2, 2), float(i))},
            "size": (i, 8),
            "words": ("a", f"{i}"),
        }
        for i in range(4)
    ]
    whole = content_hashes(default_collate(samples), encoded(4))
    assert len(set(whole)) == 4
    assert whole == [
        content_hashes(default_collate([sample]), encoded(1))[0] for sample in samples
    ] or whole[:3] == content_hashes(default_collate(samples[:3]), encoded(3))
    for name, value in {
        "image": {"x": torch.zeros(2, 2)},
        "size": (3, 9),
        "words": ("b", "3"),
    }.items():
        changed = content_hashes(
            default_collate([*samples[:3], samples[3] | {name: value}]), encoded(4)
        )
        assert [a == b for a, b in zip(whole, changed, strict=True)] == [True, True, True, False]


def test_latents_and_tokens_stand_in_for_what_cannot_be_taken_apart() -> None:
    class Opaque:
        pass

    latents = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for batch in (
        Opaque(),
        {"id": ["a", "b"]},
        {"id": ["a", "b"], "bag": Opaque(), "mask": torch.ones(2, 4)},
    ):
        before = content_hashes(batch, encoded(2, latents, tokens=torch.tensor([[1], [2]])))
        moved = latents.clone()
        moved[1] += 1
        assert changed_samples(
            "ab", before, content_hashes(batch, encoded(2, moved, tokens=torch.tensor([[1], [2]])))
        ) == ["b"]
        other = content_hashes(batch, encoded(2, latents, tokens=torch.tensor([[1], [3]])))
        assert changed_samples("ab", before, other) == ["b"]
    # Embeddings, which training may change, are not content; nor are latents where the images
    # themselves are there.
    batch = {"image": torch.ones(2, 4), "epoch": 3}
    one = content_hashes(batch, encoded(2, latents, states=torch.zeros(2, 3)))
    assert one == content_hashes(batch, encoded(2, latents + 1, states=torch.ones(2, 3)))
