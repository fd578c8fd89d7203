from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ctrak_lightning import Concept
from ctrak_lightning.attribution.baselines import (
    as_attributions,
    image_similarity,
    label_search,
    random_order,
    text_search,
)
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.store import SampleTable

OWL = Concept("owl", {"object": "owl", "artist": "x"}, {"artist": "x"})
BOTH = Concept("owl by x", {"object": "owl", "artist": "x"}, {})


def table(thumbnails: Tensor | None = None) -> SampleTable:
    columns = {
        "object": ["owl", "cat", "owl"],
        "artist": ["y", "x", "x"],
        "caption": ["an owl", "a cat", "owl"],
    }
    return SampleTable(["a", "b", "c"], [""] * 3, columns, thumbnails)


def test_label_search_wants_all_of_the_concepts_own_attributes() -> None:
    assert label_search([OWL, BOTH], table()).tolist() == [[1, 0, 1], [0, 0, 1]]
    assert label_search([OWL], table(), {"object": "artist"}).tolist() == [[0, 0, 0]]
    with pytest.raises(
        ConceptError, match="no metadata column 'size'.*Known: artist, caption, object"
    ):
        label_search([Concept("big", {"size": "big"}, {})], table())
    with pytest.raises(ConceptError, match="text_search"):
        label_search([Concept("owl", "an owl", "", alone="an owl")], table())


def test_pixels_are_compared_by_their_root_mean_square_difference() -> None:
    thumbnails = torch.randint(256, (3, 4, 4, 3), dtype=torch.uint8)
    images = torch.rand(2, 3, 4, 4)
    found = image_similarity(images, table(thumbnails))
    for q in range(2):
        for n in range(3):
            known = thumbnails[n].permute(2, 0, 1) / 255
            assert found[q, n] == pytest.approx(
                -float((images[q] - known).square().mean().sqrt()), abs=1e-5
            )
    with pytest.raises(ValueError, match="no thumbnails.*HINT"):
        image_similarity(images, table())


def test_larger_images_are_reduced_to_the_thumbnails() -> None:
    thumbnails = (
        torch.tensor([0, 128, 255], dtype=torch.uint8)
        .view(3, 1, 1, 1)
        .expand(3, 2, 2, 3)
        .contiguous()
    )
    grey = torch.full((1, 3, 16, 16), 0.5)
    assert image_similarity(grey, table(thumbnails)).argmax() == 1


def test_embeddings_are_compared_by_cosine() -> None:
    thumbnails = torch.randint(256, (3, 4, 4, 3), dtype=torch.uint8)
    images = thumbnails[[1]].permute(0, 3, 1, 2) / 255
    scores = image_similarity(images, table(thumbnails), lambda x: 7 * x.flatten(1))
    assert scores.argmax() == 1
    assert scores[0, 1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"returned shape \(3, 4, 4\) for 3 inputs"):
        image_similarity(images.expand(3, -1, -1, -1), table(thumbnails), lambda x: x[:, 0])

    def letters(texts: list[str]) -> Tensor:
        return torch.tensor([[float(text.count(c)) for c in "owlcat"] for text in texts])

    assert text_search(["the owl"], table(), letters).argmax() == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such metadata column.*caption"):
        text_search(["owl"], table(), letters, column="text")  # type: ignore[arg-type]


def test_baselines_rank_as_attributions_do() -> None:
    [result] = as_attributions("label_search", label_search([OWL], table()), [OWL], table())
    assert [r.sample_id for r in result.top(3)] == ["a", "c", "b"]
    assert result.by_group("artist")[0].share == pytest.approx(0.5)


def test_what_is_no_store_is_asked_as_a_store_is() -> None:
    thumbnails = torch.randint(256, (3, 4, 4, 3), dtype=torch.uint8)
    known, images = thumbnails.permute(0, 3, 1, 2) / 255, torch.rand(2, 3, 8, 8)
    assert torch.equal(image_similarity(images, known), image_similarity(images, table(thumbnails)))
    assert torch.equal(
        label_search([OWL, BOTH], table().metadata), label_search([OWL, BOTH], table())
    )

    def letters(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(text.count(c)) for c in "owlcat"] for text in texts])

    captions = table().metadata["caption"]
    assert torch.equal(
        text_search(["owl"], captions, letters), text_search(["owl"], table(), letters)
    )


def test_a_random_order_is_the_seeds() -> None:
    scores = random_order(3, 100, seed=5)
    assert torch.equal(scores, random_order(3, 100, seed=5))
    assert (
        len({tuple(row.argsort().tolist()) for row in [*scores, *random_order(3, 100, seed=6)]})
        == 6
    )
