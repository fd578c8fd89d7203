"""Several processes search one store: what they find is what one finds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ctrak_lightning.attribution.search import Best, TopScores, top_scores
from ctrak_lightning.errors import CorruptStoreError
from ctrak_lightning.methods.damping import Agreement, Fixed
from ctrak_lightning.methods.moments import Moments
from ctrak_lightning.utilities.processes import Processes

from ..threads import together
from .test_top import store_of, traces


@pytest.mark.parametrize("count", [2, 3, 7], ids=["2", "3", "more than shards"])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": Fixed(1.0)},
        {"rule": Agreement()},
        {"rule": Agreement(), "factors": ("loss",)},
        {"rule": Fixed(None), "weights": (0.1, 2.0, 0.5)},
    ],
    ids=["one damping", "agreement", "loss", "weights"],
)
@pytest.mark.parametrize("orders", [(0, 0, 0), (0, 1, 0)], ids=["same order", "other order"])
def test_processes_find_what_one_finds(
    tmp_path: Path, count: int, options: dict[str, Any], orders: tuple[int, ...]
) -> None:
    phi, queries = traces(230, 24, 3)
    store = store_of(tmp_path / "s.ctrak", phi, orders)
    given = dict(options)
    rule = given.pop("rule")
    expected = top_scores(queries, store.checkpoints, 12, rule, **given)
    # What the others ask is not used: their rounding might differ.
    found = together(
        count,
        lambda processes: top_scores(
            queries if processes.is_first else queries + 1,
            store.checkpoints,
            12,
            rule,
            **given,
            processes=processes,
        ),
    )
    for each in found:
        assert isinstance(each, TopScores), each
        assert torch.equal(each.positions, expected.positions)
        torch.testing.assert_close(each.scores, expected.scores, rtol=1e-5, atol=1e-6)
        assert each.dampings == expected.dampings


def test_few_samples_are_searched_by_each(tmp_path: Path) -> None:
    phi, queries = traces(20, 60, 2)
    store = store_of(tmp_path / "s.ctrak", phi, (0, 0))
    expected = top_scores(queries, store.checkpoints, 5, Fixed(1.0))
    for each in together(
        2,
        lambda processes: top_scores(
            queries, store.checkpoints, 5, Fixed(1.0), processes=processes
        ),
    ):
        assert torch.equal(each.positions, expected.positions)


def test_a_share_that_is_damaged_is_told_in_all(tmp_path: Path) -> None:
    phi, queries = traces(230, 24, 1)
    store = store_of(tmp_path / "s.ctrak", phi, (0,))
    shard = tmp_path / "s.ctrak" / "checkpoint-00000000" / "rank0-00001.h5"
    content = bytearray(shard.read_bytes())
    for position in range(4096, len(content), 512):
        content[position] ^= 1
    shard.write_bytes(content)
    for error in together(
        3,
        lambda processes: top_scores(
            queries, store.checkpoints, 5, Fixed(1.0), processes=processes
        ),
    ):
        assert isinstance(error, CorruptStoreError), error


def test_moments_of_parts_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    # Far from zero, and each part around a mean of its own.
    scores = 50 + torch.randn(2, 3, 90, generator=generator, dtype=torch.float64)
    scores[..., 30:] += 7
    whole = Moments()
    whole.add(scores)

    def part(processes: Processes) -> Moments:
        moments = Moments()
        if processes.rank < 2:
            for block in scores[..., 30 * processes.rank : 30 + 60 * processes.rank].split(20, -1):
                moments.add(block)
        return moments.over(processes)

    for found in together(3, part):
        assert found.count == 90
        torch.testing.assert_close(found.deviation(), scores.std(-1, correction=0))
        torch.testing.assert_close(found.agreement(), whole.agreement())


def test_the_best_of_parts_are_those_of_the_whole_and_ties_go_to_the_lower_position() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 0.0, 3.0]])

    def part(processes: Processes) -> tuple[torch.Tensor, torch.Tensor]:
        best = Best(3)
        own = torch.arange(6)[processes.rank :: 4]
        best.add(scores[:, own], own)
        return best.over(processes).sorted()

    for positions, found in together(4, part):
        assert positions.tolist() == [[1, 3, 5]]
        assert found.tolist() == [[3.0, 3.0, 3.0]]
