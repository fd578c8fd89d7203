"""A network whose layers are not batch first, traced through the Trainer and asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from ctrak_lightning import Attributor, Concept, GradientTracer, Projection, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.gradients import SlowParameterWarning

from ..toy import SIZE, ToyData, ToyDiffusion, Toys
from .test_concept_tracer import fit

POSITIONS = SIZE * SIZE // 4


class Positions(nn.Module):
    """Patches with a table of positions [T, C] for all samples, then layers on [T, B, C]; T is a
    multiple of B."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.position, self.words = nn.Embedding(POSITIONS, 8), nn.Linear(12, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> Any:
        words = self.words(encoder_hidden_states).sum(1)
        h = self.patch(x).flatten(2).permute(2, 0, 1) + words  # [T, B, C]
        h = h + self.position(torch.arange(POSITIONS))[:, None]
        h = self.out(self.norm(h).tanh()).permute(1, 2, 0)
        return (nn.functional.pixel_shuffle(h.unflatten(2, (SIZE // 2, SIZE // 2)), 2),)


def module() -> ToyDiffusion:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ToyDiffusion(denoiser=Positions())


def test_traces_are_those_of_the_loop_and_can_be_asked(tmp_path: Path) -> None:
    traced, method = module(), methods.d_trak(timesteps=2)
    tracer = ConceptTracer(str(tmp_path), method, rank=4, dim=64, every_n_epochs=1)
    with pytest.warns(
        SlowParameterWarning,
        match="no sample alone: position. They are traced by a pass per sample",
    ):
        fit(traced, [tracer], max_epochs=1)
    loop = GradientTracer(traced.denoiser, Projection(rank=4, dim=64), engine="loop")
    batch = next(iter(ToyData(batch_size=len(Toys())).train_dataloader()))
    encoded = traced.encode(batch)
    store = TraceStore(tmp_path)
    order = [store.samples.sample_ids.index(one) for one in encoded.sample_ids]
    expected = trace_batch(traced, loop, method, encoded, 0).features
    torch.testing.assert_close(
        store.checkpoints[-1].features()[order], expected, rtol=1e-4, atol=1e-6
    )
    concepts = [
        Concept(colour, present={"colour": colour}, absent={}) for colour in ("red", "blue")
    ]
    with pytest.warns(SlowParameterWarning, match="position"):
        [result, _] = Attributor(str(tmp_path), traced).attribute_many(concepts)
    assert result.scores.isfinite().all()


def test_inline_refuses_a_table_that_samples_share(tmp_path: Path) -> None:
    tracer = ConceptTracer(
        str(tmp_path), methods.inline_trak(), mode="inline", rank=4, dim=64, every_n_epochs=1
    )
    with pytest.raises(MisconfigurationException, match=r"no sample alone: position.*HINT"):
        fit(module(), [tracer], max_epochs=1)
