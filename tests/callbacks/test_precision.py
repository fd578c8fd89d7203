"""A module that leaves conversion to the Trainer's precision is traced, and asked, in that
precision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ctrak_lightning import Attributor, Concept, Encoded, Sampler, TraceStore, methods
from ctrak_lightning.callbacks import ConceptMonitor, ConceptTracer

from ..stress.subject import Small
from ..toy import COLOURS, ToyDiffusion
from .test_concept_tracer import fit, tracer

pytestmark = pytest.mark.filterwarnings("ignore:ConceptMonitor. no TensorBoardLogger")
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
RED = Concept("red", {"colour": "red"}, {})


class Relying(ToyDiffusion):
    """Casts nothing: its batches are converted for it, and new tensors are of the default dtype."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(denoiser=Small())
        del self.embedding
        self.register_buffer("table", torch.eye(12))
        self.seen: set[torch.dtype] = set()

    def tokens(self, colours: list[str | None], shapes: list[str | None]) -> Tensor:
        rows = [[float(name == colour) for colour in COLOURS * 4] for name in colours]
        found: Tensor = torch.tensor(rows) @ self.table  # which refuses another dtype
        return found[:, None]

    def encode(self, batch: dict[str, Any]) -> Encoded:
        self.seen.add(batch["image"].dtype)
        condition = {"encoder_hidden_states": self.tokens(batch["colour"], batch["shape"])}
        return Encoded(
            latents=batch["image"], condition=condition, sample_ids=list(batch["sample_id"])
        )

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        # A convolution takes what is of the weights' dtype alone.
        return super().predict(x_t + torch.zeros(1), t, condition)

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        assert not isinstance(spec, str)
        return {"encoder_hidden_states": self.tokens([spec.get("colour")] * n, [None] * n)}


def trained(precision: Any, callbacks: list[L.Callback]) -> Relying:
    L.seed_everything(0, verbose=False)
    module = Relying()
    fit(module, callbacks, precision=precision, max_epochs=1)
    return module


@pytest.mark.parametrize("mode", ["capture", "inline"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_it_is_traced_and_asked_as_it_is_trained(tmp_path: Path, precision: str, mode: Any) -> None:
    dtype = DTYPES[precision]
    method = (
        methods.inline_trak(timesteps=2)
        if mode == "inline"
        else methods.concept_trak_norm(timesteps=2)
    )
    callback = tracer(tmp_path, method=method, mode=mode, on_error="raise")
    plain, traced = (
        trained(precision, []),
        trained(precision, [callback, ConceptMonitor([RED], group=None)]),
    )
    assert traced.seen == {dtype}
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), traced.parameters(), strict=True)
    )
    assert torch.get_default_dtype() == torch.float32
    store = TraceStore(tmp_path / "traces")
    [checkpoint] = store.checkpoints
    assert checkpoint.features().dtype == torch.float32
    assert checkpoint.weights()["denoiser.text.weight"].dtype == dtype
    assert checkpoint.function() is not None
    assert store.samples.thumbnails is not None
    asked = Relying().to(dtype)
    attributor = Attributor(store, asked, sampler=Sampler(steps=3))
    with pytest.warns(UserWarning, match="compares checkpoints and the store has one"):
        scores = attributor.attribute(RED).scores
    assert scores.isfinite().all()
    assert scores.std() > 0


def test_its_numbers_are_those_of_float32_as_far_as_its_precision_goes(tmp_path: Path) -> None:
    rows = {}
    for precision in ("32-true", "16-true", "bf16-true", "64-true"):
        path = tmp_path / precision
        callback = ConceptTracer(str(path), methods.d_trak(timesteps=2), rank=4, dim=64)
        L.seed_everything(0, verbose=False)
        # A step of no length, so that all have the same weights.
        module = Relying()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore  # noqa: B023
        fit(module, [callback], precision=precision, max_epochs=1, limit_train_batches=1)
        rows[precision] = TraceStore(path).checkpoints[-1].features()
    exact = rows.pop("32-true")
    errors = {name: float((found - exact).norm() / exact.norm()) for name, found in rows.items()}
    assert errors["64-true"] < 1e-5
    assert errors["16-true"] < 0.01
    assert errors["16-true"] < errors["bf16-true"] < 0.1
