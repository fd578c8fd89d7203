"""A store is the same whether or not ``torch.compile`` has wrapped the network, or a part of it,
and opens with either."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, inject_adapter_in_model

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.gradients import GradientTracer
from ctrak_lightning.model.fingerprint import adapter_facts
from ctrak_lightning.utilities.naming import parameters_of

from ..stress.subject import Small
from ..toy import ToyDiffusion
from .test_concept_tracer import fit, tracer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:damping='agreement' compares checkpoints and the store has one"
    ),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})
WRAPPED = ("nothing", "network", "layer")


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def made(wrapped: str) -> ToyDiffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = ToyDiffusion(denoiser=Small())
    module.embedding.requires_grad_(False)
    module.denoiser.conv_in.requires_grad_(False)
    if wrapped == "network":
        module.denoiser = compiled(module.denoiser)
    if wrapped == "layer":
        module.denoiser.text = compiled(module.denoiser.text)
        module.denoiser.conv_in = compiled(module.denoiser.conv_in)
    return module


def test_stores_are_equal_and_open_with_either(tmp_path: Path) -> None:
    stores, results = {}, {}
    for wrapped in WRAPPED:
        L.seed_everything(0, verbose=False)
        callback = tracer(
            tmp_path / wrapped, method=methods.concept_trak_norm(timesteps=2), on_error="raise"
        )
        fit(made(wrapped), [callback], max_epochs=1)
        stores[wrapped] = store = TraceStore(tmp_path / wrapped / "traces")
        for asked in WRAPPED:
            attributor = Attributor(store, made(asked), sampler=Sampler(steps=3))
            results[wrapped, asked] = attributor.attribute(RED, parts=True)
    plain, first = stores["nothing"], results["nothing", "nothing"]
    for store in stores.values():
        assert store.header == plain.header
        ours, theirs = store.checkpoints[0], plain.checkpoints[0]
        assert ours.weights().keys() == theirs.weights().keys()
        assert all(
            torch.equal(value, ours.weights()[name]) for name, value in theirs.weights().items()
        )
        torch.testing.assert_close(ours.features(), theirs.features())
        assert ours.exposures() is not None
    for result in results.values():
        torch.testing.assert_close(result.scores, first.scores)
        assert result.parts is not None
        assert first.parts is not None
        assert result.parts.by_layer_group.keys() == first.parts.by_layer_group.keys()


@pytest.mark.parametrize("wrapped", ["network", "layer"])
def test_names_that_are_told_have_no_wrappers(tmp_path: Path, wrapped: str) -> None:
    module = made(wrapped)
    assert parameters_of(module).keys() == dict(made("nothing").named_parameters()).keys()
    assert GradientTracer(module.denoiser).parameter_names == [
        "conv_out.bias",
        "conv_out.weight",
        "text.bias",
        "text.weight",
    ]

    class Sum(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + x.mean(0)

    module.denoiser.conv_out = torch.nn.Sequential(module.denoiser.conv_out, Sum())
    with pytest.raises(
        MisconfigurationException, match=r"differ.* conv_out\.0|layers: conv_out\.0"
    ) as found:
        fit(module, [tracer(tmp_path)])
    assert "_orig_mod" not in str(found.value)


def test_attention_and_adapters_are_known_inside_wrappers() -> None:
    class TinyCrossAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = torch.nn.Linear(2, 2)

    plain, wrapped = (
        TinyCrossAttention(),
        torch.nn.ModuleDict({"attn": compiled(TinyCrossAttention())}),
    )
    assert GradientTracer(wrapped).layer_groups() == {"cross-attention": ["attn.to_q"]}
    for module in (plain, wrapped["attn"]):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), module)
    found = adapter_facts(wrapped, ["attn"])
    assert found
    assert found == adapter_facts(torch.nn.ModuleDict({"attn": plain}), ["attn"])
