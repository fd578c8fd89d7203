"""Scores split by timestep and by group of layers: the parts add up, and each is what it says it
is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctrak_lightning import Attributor, GradientTracer, Method, Projection
from ctrak_lightning.attribution.diagnostics import SelfCheck, self_check, stability
from ctrak_lightning.store import TraceStore

from ..store.store_builder import Capture
from ..toy import tiny_unet
from .test_attributor import BAR, METHODS, RED, SAMPLER, traced

GROUPS = [
    "convolution",
    "cross-attention",
    "feed-forward",
    "normalisation",
    "other layers",
    "self-attention",
]
PART_METHODS = {name: METHODS[name] for name in ("concept_trak", "per_sample", "das", "retrac")}


@pytest.mark.parametrize("method", PART_METHODS.values(), ids=PART_METHODS)
def test_the_parts_add_up_to_the_scores(tmp_path: Path, method: Method) -> None:
    module = traced(tmp_path, method)
    attributor = Attributor(tmp_path, module, sampler=SAMPLER)
    plain = attributor.attribute_many([RED, BAR], [3, 4])
    for whole, split in zip(
        plain, attributor.attribute_many([RED, BAR], [3, 4], parts=True), strict=True
    ):
        assert whole.parts is None
        torch.testing.assert_close(split.checkpoint_scores, whole.checkpoint_scores, rtol=0, atol=0)
        assert split.parts is not None
        assert split.parts.by_timestep.shape == (2, 12)
        assert sorted(split.parts.by_layer_group) == GROUPS
        layers = torch.stack(list(split.parts.by_layer_group.values()))
        tolerance = 1e-5 * float(split.scores.abs().max())
        for parts in (split.parts.by_timestep, layers):
            torch.testing.assert_close(parts.sum(0), split.scores, rtol=0, atol=tolerance)
            assert (parts.abs().amax(1) > 1e-2 * split.scores.abs().max()).sum() > 1


def test_a_timestep_is_what_a_query_of_it_alone_gives(tmp_path: Path) -> None:
    method = replace(METHODS["per_sample"], damping=0.5)
    module = traced(tmp_path, method)
    attributor = Attributor(tmp_path, module, sampler=SAMPLER)
    generation = attributor.generate([RED.present], [3])
    whole = attributor.query([RED], 3, generation=generation, parts=True)
    [result] = attributor.score(whole)
    assert whole.parts is not None
    assert result.parts is not None
    used = [state for state in generation.states if int(state.t[0]) in result.parts.timesteps]
    assert [int(state.t[0]) for state in used] == result.parts.timesteps
    for i, state in enumerate(used):
        alone = replace(method, query_trajectory=replace(method.query_trajectory, timesteps=1))
        only = replace(generation, states=[state])
        single = Attributor(tmp_path, module, method=alone, sampler=SAMPLER).query(
            [RED], 3, generation=only
        )
        for index, parts in enumerate(whole.parts[0]):
            torch.testing.assert_close(parts.by_timestep[i], single.features[index])
        # [k] -> [M, N] raw scores, in the units of the whole
        [scored] = attributor.score(single)
        spread = result.checkpoint_scores.std(1, keepdim=True, correction=0)
        expected = (scored.checkpoint_scores / spread).mean(0).float()
        torch.testing.assert_close(result.parts.by_timestep[i], expected, rtol=1e-4, atol=1e-5)


def test_a_group_is_what_a_query_without_the_other_layers_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = traced(tmp_path, METHODS["concept_trak"], steps=(1,))
    attributor = Attributor(tmp_path, module, sampler=SAMPLER)
    parts = attributor.query([RED], 3, parts=True).parts
    assert parts is not None
    tracer = attributor._model.tracer
    of_all = tracer.vjps
    for name, blocks in tracer.layer_groups().items():

        def of_some(*args: Any, blocks: list[str] = blocks, **kwargs: Any) -> list[torch.Tensor]:
            return [tracer.only(rows, blocks) for rows in of_all(*args, **kwargs)]

        monkeypatch.setattr(tracer, "vjps", of_some)
        torch.testing.assert_close(
            parts[0][0].by_layer_group[name], attributor.query([RED], 3).features[0]
        )


def test_groups_are_separate_in_the_rows() -> None:
    tracer = GradientTracer(tiny_unet(), Projection(rank=4, dim=64))
    groups = tracer.layer_groups()
    assert sorted(name for names in groups.values() for name in names) == sorted(tracer.block_names)
    rows = torch.randn(2, tracer.width)
    split = [tracer.only(rows, names) for names in groups.values()]
    torch.testing.assert_close(torch.stack(split).sum(0), rows, rtol=0, atol=0)
    assert ((torch.stack(split) != 0).sum(0) <= 1).all()
    assert all("attn2" in name for name in groups["cross-attention"])
    assert all("attn1" in name for name in groups["self-attention"])
    assert all(".ff." in name for name in groups["feed-forward"])
    assert {name.rsplit(".", 1)[-1].rstrip("12") for name in groups["normalisation"]} <= {
        "norm",
        "norm3",
        "group_norm",
        "conv_norm_out",
    }


def test_the_group_of_an_adapter_and_of_layers_outside_attention() -> None:
    class CrossAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.ModuleDict({"lora_A": nn.Linear(2, 2)})

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = CrossAttention()
            self.tokens = nn.Embedding(3, 2)
            self.conv = nn.Conv2d(1, 1, 1)
            self.head = nn.Linear(2, 2)

    assert GradientTracer(Network(), Projection(rank=2, dim=None)).layer_groups() == {
        "convolution": ["conv"],
        "cross-attention": ["block.to_q.lora_A"],
        "embedding": ["tokens"],
        "other layers": ["head"],
    }


def test_given_images_have_parts_and_global_queries_have_none(tmp_path: Path) -> None:
    module = traced(tmp_path, METHODS["concept_trak_norm"])
    attributor = Attributor(tmp_path, module, sampler=SAMPLER)
    latents = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    [given] = attributor.score(attributor.query_given([RED], latents, parts=True))
    assert given.parts is not None
    torch.testing.assert_close(given.parts.by_timestep.sum(0), given.scores, rtol=0, atol=1e-4)
    [asked] = attributor.score(attributor.query_global([RED], images=2))
    assert asked.parts is None
    assert asked.store is attributor.store


class Random(Capture):
    """Random traces of different lengths, so that some rank a longer one before themselves."""

    def traces(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        scale = 1 + 3 * torch.rand(self.n, 1, generator=generator)
        return torch.randn(self.n, self.k, generator=generator) * scale, torch.rand(
            self.n, generator=generator
        )


@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, -0.2]])
@pytest.mark.parametrize(("n", "k"), [(30, 6), (20, 30)], ids=["primal", "dual"])
def test_self_check_is_that_of_brute_force(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    k: int,
    damping: float | None,
    residual: bool,
    weights: list[float] | None,
) -> None:
    """Every sample against numpy's inverse of the whole kernel, in one go and with memory for seven
    at once."""
    checkpoints = TraceStore(Random(n, k).run(tmp_path / "store")).checkpoints
    joined = np.zeros((n, n))
    for index, checkpoint in enumerate(checkpoints):
        phi = checkpoint.features().double().numpy()
        scores = phi @ phi.T
        if damping is not None:
            gram = phi.T @ phi
            ridge = damping * np.trace(gram) / min(phi.shape)
            scores = phi @ np.linalg.inv(gram + ridge * np.eye(k)) @ phi.T
        if residual:
            scores = scores * checkpoint.losses().double().numpy()
        if weights is None:
            scores = scores / scores.std(1, keepdims=True)
        joined += scores * (1 if weights is None else weights[index])
    rank_themselves_first = (joined.argmax(1) == np.arange(n)).sum()
    found = self_check(
        checkpoints, damping, factors=("loss",) if residual else (), weights=weights, asked=1000
    )
    assert found == SelfCheck(int(rank_themselves_first), n)
    assert k > n or 0 < found.first < n
    monkeypatch.setattr("ctrak_lightning.attribution.diagnostics.SCORES_AT_ONCE", 7 * 2 * n)
    assert (
        self_check(
            checkpoints, damping, factors=("loss",) if residual else (), weights=weights, asked=1000
        )
        == found
    )


def test_self_check_takes_evenly_spaced_samples(tmp_path: Path) -> None:
    """Sample 1 of 4 is the only one whose twin is longer than itself."""

    class Twins(Capture):
        def traces(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 2.0]]), torch.ones(4)

    checkpoints = TraceStore(Twins(4, 2).run(tmp_path / "store")).checkpoints
    assert self_check(checkpoints, None, asked=64) == SelfCheck(3, 4)
    assert self_check(checkpoints, None, asked=2) == SelfCheck(2, 2)
    assert self_check(checkpoints, None, asked=1) == SelfCheck(1, 1)


def test_stability_is_between_alternate_checkpoints() -> None:
    scores = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [40.0, 30.0, 20.0, 11.0]]
    )
    assert stability(scores) == pytest.approx(-1)
    assert stability(scores[[0, 2, 2, 0]]) == pytest.approx(1)
    assert stability(scores[:1]) is None
    assert stability(torch.ones(2, 4)) is None
    # With weights the halves are sums of the raw scores: 1 * row 0 + 0 * row 2 against 1 * row 1 +
    # 1 * row 3.
    assert stability(scores, [1.0, 1.0, 0.0, 1.0]) == pytest.approx(-1)
