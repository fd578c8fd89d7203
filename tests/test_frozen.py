"""What of a module is frozen and used: found by watching, hashed once, and told when it changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning import frozen
from ctrak_lightning.errors import TrainingChangedError
from ctrak_lightning.frozen import BUFFER_LIMIT, Frozen, Used, changing_buffers, parts_of


class Nested(nn.Module):
    """A network in pieces, of which some are used by a call, some functionally, and some not at all."""

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
    plain = frozen._bytes
    monkeypatch.setattr(frozen, "_bytes", lambda value: hashed.append(value.numel()) or plain(value))
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
