"""Stores of layers whose kind comes from outside, or came after the store was made."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore, methods, register_layer
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.gradients import GradientTracer, Projection, layers

from ..gradients.test_kinds_of_layers import Gain, GainLayer
from ..toy import CHANNELS, Layers, QuickDiffusion, Toys

RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})
METHOD = replace(methods.concept_trak_norm(timesteps=2), damping=1.0)
HERE = "tests.gradients.test_kinds_of_layers"
TRANSPOSED = "torch.nn.modules.conv.ConvTranspose2d"

pytestmark = [
    pytest.mark.filterwarnings("ignore:These trainable parameters"),
    pytest.mark.filterwarnings("ignore:The concept direction"),
]


class OtherGainLayer(GainLayer):
    """Another formula: the matrix is [n, 1]."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.rows, self.cols = self.cols, self.rows


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    known = dict(layers._KINDS)
    yield
    layers._KINDS.clear()
    layers._KINDS.update(known)


class Network(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.gain = Gain(SIDE)
        self.up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (self.gain(self.up(super().forward(*args, **kwargs)[0])),)


SIDE = Toys()[0]["image"].shape[-1]


def model() -> QuickDiffusion:
    torch.manual_seed(0)
    return QuickDiffusion(denoiser=Network())


def made(path: Path, unused: Collection[str] = (), engine: str = "auto") -> None:
    module = model()
    tracer = GradientTracer(
        module.denoiser,
        Projection(rank=2, dim=32),
        engine=engine,  # type: ignore[arg-type]
        unused_kinds=unused,
    )
    loader = DataLoader(Toys(), 6)
    capture = Capture(
        str(path), module, module, loader, method=METHOD, tracer=tracer, progress=False
    )
    capture.run(1, epoch=0)
    capture.close()


def scores(path: Path) -> Tensor:
    attributor = Attributor(path, model(), sampler=Sampler(steps=3), record=False)
    return attributor.attribute(RED).scores


def test_a_store_names_the_kinds_from_outside_that_made_it(tmp_path: Path) -> None:
    made(tmp_path / "none")
    assert "kinds" not in TraceStore(tmp_path / "none").header.projection
    register_layer(Gain)(GainLayer)
    register_layer("elsewhere.Unused")(GainLayer)
    made(tmp_path / "own")
    facts = TraceStore(tmp_path / "own").header.projection
    assert facts["kinds"] == {f"{HERE}.Gain": f"{HERE}.GainLayer"}
    assert "parameters_without_hook" not in facts
    assert scores(tmp_path / "own").std() > 0


@pytest.mark.parametrize("other", [None, OtherGainLayer])
def test_a_store_is_not_asked_with_another_kind(
    tmp_path: Path, other: type[GainLayer] | None
) -> None:
    register_layer(Gain)(GainLayer)
    made(tmp_path)
    del layers._KINDS[f"{HERE}.Gain"]
    if other:
        register_layer(Gain)(other)
    told = rf"{HERE}\.Gain' were made by .*{HERE}\.GainLayer'.*HINT: .*register_layer"
    with pytest.raises(StoreMismatchError, match=told):
        scores(tmp_path)
    with pytest.raises(StoreMismatchError, match=r"projection\.kinds.*HINT: .*register_layer"):
        made(tmp_path)


def test_a_scripts_own_kinds_are_found_where_they_are_now(tmp_path: Path) -> None:
    register_layer(Gain)(GainLayer)
    made(tmp_path)
    expected = scores(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{HERE}.', '"__main__.'))
    assert torch.equal(scores(tmp_path), expected)


@pytest.mark.parametrize("engine", ["auto", "hooks"])
@pytest.mark.parametrize("hooked_then", [True, False], ids=["transposes had hooks", "had none"])
def test_a_kind_that_came_later_leaves_a_store_as_it_was(
    tmp_path: Path, engine: str, hooked_then: bool
) -> None:
    transposes = set() if hooked_then else {TRANSPOSED}
    made(tmp_path, transposes, engine)
    before = dict(layers._KINDS)
    for place in transposes:  # as the version that made the store asks it
        del layers._KINDS[place]
    expected = scores(tmp_path)
    layers._KINDS.update(before)
    assert torch.equal(scores(tmp_path), expected)
    register_layer(Gain)(GainLayer)
    assert torch.equal(scores(tmp_path), expected)
