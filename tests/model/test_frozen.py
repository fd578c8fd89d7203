"""What of a module is frozen and used: found by watching, hashed once, and told when it changes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctrak_lightning import (
    Attributor,
    Capture,
    GradientTracer,
    Projection,
    TraceStore,
    methods,
)
from ctrak_lightning.errors import StoreMismatchError, TrainingChangedError
from ctrak_lightning.model import frozen
from ctrak_lightning.model.frozen import (
    BUFFER_LIMIT,
    ROUNDING,
    Frozen,
    RoundedWeightsWarning,
    Used,
    changing_buffers,
    is_rounded,
    parts_of,
)

from ..stress.subject import Small
from ..toy import CHANNELS, ToyDiffusion, Toys


class Nested(nn.Module):
    """A network in pieces, of which some are used by a call, some functionally, and some not at
    all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.average = nn.Linear(3, 3)
        self.pair = nn.ModuleDict({"student": nn.Linear(3, 3), "teacher": nn.Linear(3, 3)})
        self.functional = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(BUFFER_LIMIT + 1))
        self.register_buffer("codes", torch.arange(3))
        self.register_buffer("idle", torch.arange(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        table: Any = self.table
        y = self.pair["student"](self.net(x)) * self.scale * table[:3] + self.codes + self.cache
        return nn.functional.linear(y, self.functional.weight[:2].detach())


def test_the_parts_are_those_that_were_used_however_they_were() -> None:
    module, used = Nested().eval(), Used()
    with used.watching(), torch.no_grad():
        module(torch.ones(2, 3))
    expected = ["codes", "functional.weight", "net", "pair.student", "scale", "table"]
    assert parts_of(module, used, trained=[]) == expected
    # What trains is used, whether or not this input led through it.
    assert parts_of(module, used, trained=["functional.bias"]) == [
        "functional" if name == "functional.weight" else name for name in expected
    ]


def test_parts_for_some_noise_levels_alone_are_found(tmp_path: Path) -> None:
    class Experts(Small):
        def __init__(self) -> None:
            super().__init__()
            self.clean, self.noisy, self.idle = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(3))

        def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            rows = [
                (self.noisy if level > 50 else self.clean)(row)
                for row, level in zip(x, t, strict=True)
            ]
            return super().forward(torch.stack(rows), t, *args, **kwargs)

    module = ToyDiffusion(denoiser=Experts())
    module.embedding.requires_grad_(False)
    for name in ("clean", "noisy", "idle"):
        module.denoiser.get_submodule(name).requires_grad_(False)
    tracer = GradientTracer(module.denoiser, Projection(rank=2, dim=32))
    loader, method = DataLoader(Toys(), 6), methods.trak(timesteps=2)
    capture = Capture(
        str(tmp_path), module, module, loader, method=method, tracer=tracer, progress=False
    )
    parts = json.loads(capture.writer.header.model["frozen_parts"])
    assert {"denoiser.clean", "denoiser.noisy", "embedding"} <= set(parts)
    assert not {"denoiser", "denoiser.idle"} & set(parts)


def test_what_compile_has_wrapped_is_named_as_before() -> None:
    module = Nested().eval()
    state = module.state_dict()
    expected = ["codes", "functional.weight", "net", "pair.student", "scale", "table"]
    wrapped = torch.nn.ModuleDict({"inner": torch.compile(module, backend="eager")})
    wrapped["inner"].pair["student"] = torch.compile(module.pair["student"], backend="eager")
    used = Used()
    with used.watching(), torch.no_grad():
        module(torch.ones(2, 3))
    found = parts_of(wrapped, used, trained=[])
    assert found == [f"inner.{name}" for name in expected]
    buffers = changing_buffers(wrapped, found)
    assert buffers.keys() == {f"inner.{name}" for name in changing_buffers(Nested(), ["net"])}
    plain = Nested()
    plain.load_state_dict(state)
    whole = torch.nn.ModuleDict({"inner": plain})
    assert Frozen(wrapped, found, []).digest == Frozen(whole, found, []).digest


def test_a_hash_is_of_the_frozen_parts_alone() -> None:
    module = Nested()
    parts, trained = ["net", "pair.student", "table"], ["net.0.weight"]
    before = Frozen(module, parts, trained).digest
    with torch.no_grad():
        for untouched in (
            module.average.weight,
            module.pair["teacher"].weight,
            module.net[0].weight,
            module.net[1].running_mean,
        ):
            untouched.add_(1)
    assert Frozen(module, parts, trained).digest == before
    for value in (module.net[0].bias, module.pair["student"].weight, module.table):
        kept = value.detach().clone()
        with torch.no_grad():
            value.add_(1)
            assert Frozen(module, parts, trained).digest != before
            value.copy_(kept)
        # Past the version counter, as averages are often kept.
        value.data.add_(1)
        assert Frozen(module, parts, trained).digest != before
        value.data.copy_(kept)
        assert Frozen(module, parts, trained).digest == before


def test_each_weight_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hashed = Nested(), []
    plain = frozen.bytes_of
    monkeypatch.setattr(
        frozen, "bytes_of", lambda value: hashed.append(value.numel()) or plain(value)
    )
    Frozen(module, [""], [])
    assert max(hashed) > BUFFER_LIMIT
    hashed.clear()
    Frozen(module, [""], []).require_unchanged()
    assert max(hashed) <= 2 * frozen._SAMPLED


def test_a_change_is_named() -> None:
    module = Nested()
    known = Frozen(module, ["net"], [])
    known.require_unchanged()
    module.net[1].running_mean.add_(1)  # stored with every checkpoint
    module.average.weight.data.add_(1)
    known.require_unchanged()
    module.net[0].weight.data.mul_(2)
    with pytest.raises(TrainingChangedError, match=r"1 weights.*net\.0\.weight.*HINT"):
        known.require_unchanged()


def test_buffers_that_training_may_change_are_small_and_of_the_state_dict() -> None:
    names = {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
    assert changing_buffers(Nested(), ["net", "table", "codes", "cache"]).keys() == names
    assert changing_buffers(Nested(), ["net.0", "pair"]) == {}
    assert changing_buffers(Nested(), [""]).keys() == names


def preview(weight: Tensor, times: int = 1) -> None:
    """What merging LoRA into a weight and unmerging it does."""
    generator = torch.Generator().manual_seed(times)
    before = weight.detach().clone()
    with torch.no_grad():
        for _ in range(times):
            delta = (
                torch.randn(weight.shape, generator=generator).to(weight)
                * 0.3
                * weight.float().std()
            )
            weight.add_(delta).sub_(delta)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_in_16_bits_is_a_change(dtype: torch.dtype) -> None:
    module = nn.Linear(200, 300).to(dtype)
    known = Frozen(module, [""], [])
    preview(module.weight)
    with pytest.raises(TrainingChangedError, match=r"^1 weights.*'weight'.*HINT.*in 16 bits"):
        known.require_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_told_once_and_a_change_is_refused(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 20)).to(dtype)
    known = Frozen(module, [""], [])
    for layer in module:
        preview(layer.weight, 10)
    with pytest.warns(RoundedWeightsWarning, match=r"2 of them, such as '0\.weight'.*HINT"):
        known.require_unchanged()
    known.require_unchanged()  # another warning would be an error
    weight = module[0].weight
    kept = weight.detach().clone()
    tolerance = ROUNDING[str(dtype).removeprefix("torch.")]
    changes = [2 * tolerance, max(1e-3, 2 * tolerance)]
    with torch.no_grad():
        for size in changes:
            weight[7, 11] += size * weight.norm()  # one element
            with pytest.raises(
                TrainingChangedError, match=r"^1 weights.*'0\.weight'.*HINT.*merged"
            ):
                known.require_unchanged()
            weight.copy_(kept)
            weight.mul_(1 + 2 * size)  # all of them a little
            with pytest.raises(TrainingChangedError):
                known.require_unchanged()
            weight.copy_(kept)
    known.require_unchanged()
    module.double() if dtype != torch.float64 else module.append(nn.Linear(1, 1))
    with pytest.raises(TrainingChangedError):
        known.require_unchanged()  # the same numbers, in another format, and numbers that are new


def test_a_sketch_tells_rounding_from_everything_else() -> None:
    def network(a: int = 0, b: int = 1) -> nn.ModuleDict:
        made = nn.ModuleDict(
            {"a": nn.Linear(30, 30, bias=False), "b": nn.Linear(30, 30, bias=False)}
        )
        for name, seed in (("a", a), ("b", b)):
            nn.init.normal_(made[name].weight, generator=torch.Generator().manual_seed(seed))
        made.register_buffer("codes", torch.arange(3))
        return made

    def sketch(module: nn.Module) -> str:
        return Frozen(module, [""], []).sketch

    stored, moved = sketch(network()), network()
    preview(moved["a"].weight)
    assert is_rounded(stored, sketch(moved))
    moved.codes += 1
    assert not is_rounded(stored, sketch(moved))
    assert not is_rounded(stored, sketch(network(1, 0)))  # changed places
    assert not is_rounded(stored, sketch(network().double()))
    wider = network()
    wider["b"].double()
    assert not is_rounded(stored, sketch(wider))
    empty = network()
    empty.register_parameter("c", nn.Parameter(torch.zeros(3)))
    assert not is_rounded(stored, sketch(empty))
    moved = network()
    with torch.no_grad():
        moved["b"].weight[0, 0] += 1e-3 * moved["b"].weight.norm()
    assert not is_rounded(stored, sketch(moved))
    for damaged in (
        "",
        "[]",
        '["float32", 1, 2]',
        stored.replace("[", "[[", 1),
        stored.replace("float32", "odd"),
    ):
        assert not is_rounded(damaged, stored)
    assert not is_rounded(stored.replace("float32", "odd"), stored.replace("float32", "odd"))


def test_a_store_is_gone_on_with_and_asked_after_a_preview(tmp_path: Path) -> None:
    def made() -> ToyDiffusion:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = ToyDiffusion(denoiser=Small())
        module.embedding.requires_grad_(False)
        module.denoiser.conv_in.requires_grad_(False)
        return module

    def capture(module: ToyDiffusion) -> Capture:
        tracer = GradientTracer(module.denoiser, Projection(rank=2, dim=32))
        loader = DataLoader(Toys(), 6)
        return Capture(
            str(tmp_path),
            module,
            module,
            loader,
            method=methods.d_trak(timesteps=2),
            tracer=tracer,
            progress=False,
        )

    module = made()
    first = capture(module)
    first.run(1, epoch=0)
    header = TraceStore(tmp_path).header
    preview(module.denoiser.conv_in.weight)
    with pytest.warns(RoundedWeightsWarning, match=r"denoiser\.conv_in\.weight"):
        first.run(2, epoch=1)
    first.close()
    with pytest.warns(RoundedWeightsWarning, match="in the store"):
        again = capture(module)
    again.run(3, epoch=2)  # told already
    again.close()
    assert TraceStore(tmp_path).header == header
    with pytest.warns(RoundedWeightsWarning, match="in the store"):
        Attributor(tmp_path, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Attributor(tmp_path, made())
    with torch.no_grad():
        module.denoiser.conv_in.weight[0, 0, 0, 0] += 0.1
    with pytest.raises(StoreMismatchError, match=r"model\.frozen_weights.*HINT.*unmerged"):
        Attributor(tmp_path, module)
    with pytest.raises(StoreMismatchError, match=r"model\.frozen_weights"):
        capture(module)
