"""What tells one network from another with the same weights: its answers, its conditions and how
its adapters are applied."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ctrak_lightning import DiffusionTask
from ctrak_lightning.attribution.checkpoint_model import model_facts, refuse_differences
from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.model.fingerprint import adapter_facts, model_fingerprint
from ctrak_lightning.model.function import (
    UnrecordedFunctionWarning,
    conditions_of,
    fixed_condition,
    function_of,
    outputs_under,
    refuse_another_function,
)
from ctrak_lightning.store.sections import Function

from ..stress.subject import Small
from ..toy import CHANNELS, COLOURS, SIZE, ToyDiffusion

SHAPE = [CHANNELS, SIZE, SIZE]


class Zeros(ToyDiffusion):
    """The null condition is zeros, as that of Stable Diffusion XL is."""

    def __init__(self, scale: float = 1.0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(denoiser=Small())
        self.scale = scale

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        given = super().condition(spec, n)
        tokens = given["encoder_hidden_states"] if spec else given["encoder_hidden_states"] * 0
        return {
            "encoder_hidden_states": tokens,
            "mask": torch.ones(n, 2),
            "size": torch.full((n, 1), 7),
        }

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert (condition["mask"] == 1).all()
        assert (condition["size"] == 7).all()
        return super().predict(
            x_t, t, {"encoder_hidden_states": self.scale * condition["encoder_hidden_states"]}
        )


def function(task: Any) -> Function:
    found = function_of(task, SHAPE)
    assert found is not None
    return found


def test_what_does_nothing_under_a_null_condition_of_zeros_is_noticed_under_noise() -> None:
    stored, other = function(Zeros()), function(Zeros(scale=2))
    errors = stored.differences(other)
    assert errors[:3].max() < 1e-6
    assert errors[3:].min() > 1e-3
    assert stored.differences(function(Zeros())).max() == 0
    with pytest.raises(StoreMismatchError, match=r"outputs differ.*predict\(\)"):
        refuse_another_function(stored, Zeros(scale=2), SHAPE, 3)
    # What was not recorded is not compared; what was and now is not, is.
    null_alone = Function(
        timesteps=stored.timesteps[:3], outputs=stored.outputs[:3], dtype="float32", on_cpu=True
    )
    refuse_another_function(null_alone, Zeros(scale=2), SHAPE, 3)
    assert stored.differences(null_alone).isinf().all()


@pytest.mark.parametrize("problem", ["ValueError: only zeros", "not finite"])
def test_a_network_that_cannot_be_asked_under_noise_is_told(problem: str) -> None:
    class Picky(Zeros):
        def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            if condition["encoder_hidden_states"].any():
                if problem == "not finite":
                    return x_t * torch.nan
                raise ValueError("only zeros")
            return super().predict(x_t, t, condition)

    with pytest.warns(UnrecordedFunctionWarning, match=problem):
        assert len(function(Picky()).timesteps) == 3


class Labels(Zeros):
    """Another label map: each colour has the next one's token."""

    def tokens(self, colours: list[str | None], shapes: list[str | None]) -> Tensor:
        following = [name and COLOURS[(COLOURS.index(name) + 1) % len(COLOURS)] for name in colours]
        return super().tokens(following, shapes)


def test_another_label_map_is_refused_and_another_list_of_labels_is_not_compared() -> None:
    stored = function(Zeros())
    assert stored.specs == 7
    refuse_another_function(stored, Zeros(), SHAPE, 3)
    with pytest.raises(
        StoreMismatchError, match=r"step 3, Labels\.condition\(\) gives other conditions.*HINT"
    ):
        refuse_another_function(stored, Labels(), SHAPE, 3)

    class Longer(Labels):
        def known_attributes(self) -> dict[str, tuple[str, ...]]:
            return super().known_attributes() | {"shape": ("dot",)}

    refuse_another_function(stored, Longer(), SHAPE, 3)


class Without(Zeros):
    """No null condition; the first of its labels in the order of their names is (colour, blue)."""

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        if not spec:
            raise KeyError("colour")
        return super().condition(spec, n)


def test_without_a_null_condition_the_first_known_label_is_taken() -> None:
    fixed = fixed_condition(Without())
    assert isinstance(fixed.error, KeyError)
    assert fixed.condition is not None
    named = Without().condition({"colour": "blue"}, 1)
    assert all(torch.equal(value, named[name]) for name, value in fixed.condition.items())
    stored = function(Without())
    assert torch.equal(stored.outputs[:3], outputs_under(Without(), SHAPE, named))
    refuse_another_function(stored, Without(), SHAPE, 3)
    with pytest.raises(StoreMismatchError, match=r"outputs differ"):
        refuse_another_function(stored, Without(scale=2), SHAPE, 3)

    class Moved(Labels, Without):
        pass

    with pytest.raises(StoreMismatchError, match=r"outputs differ.*label map"):
        refuse_another_function(stored, Moved(), SHAPE, 3)

    class Longer(Without):
        def known_attributes(self) -> dict[str, tuple[str, ...]]:
            return super().known_attributes() | {"colour": ("a", *COLOURS)}

        def tokens(self, colours: list[str | None], shapes: list[str | None]) -> Tensor:
            return super().tokens([None if name == "a" else name for name in colours], shapes)

    refuse_another_function(stored, Longer(), SHAPE, 3)  # its first label is another one
    assert fixed_condition(Zeros()).error is None

    class Unknown(Without):
        def known_attributes(self) -> None:  # type: ignore[override]
            return None

    unknown = fixed_condition(Unknown())  # which takes no prompts
    assert unknown.condition is None
    assert isinstance(unknown.error, KeyError)


class Prompts(DiffusionTask):
    """A task of prompts, with a tokenizer."""

    def __init__(self, first: int) -> None:
        self.first = first

    def condition(self, spec: str, n: int) -> dict[str, Tensor]:
        return {"ids": torch.tensor([[self.first, *map(ord, spec)]]), "text": torch.ones(1, 5)}


def test_tokenizers_are_told_apart_by_whole_numbers_that_are_far_larger_than_their_difference() -> (
    None
):
    (mine, count), (same, _), (other, _) = (
        conditions_of(Prompts(first)) for first in (10**6, 10**6, 10**6 + 1)
    )
    assert mine is not None
    assert same is not None
    assert other is not None
    assert count == 2
    assert torch.equal(mine, same)
    assert (mine[0] - other[0]).norm() > 0.5 * mine[0].norm()
    assert torch.equal(mine[1], other[1])


def test_a_task_without_specs_of_ours_has_no_conditions_recorded() -> None:
    class Strange(Prompts):
        def known_attributes(self) -> Any:
            raise RuntimeError

    assert conditions_of(Strange(0)) == (None, 0)


def adapted(**kwargs: Any) -> nn.Module:
    network = nn.ModuleDict(
        {"net": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "copy": nn.Linear(3, 3)}
    )
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "1", "copy"], **kwargs), network)
    return network


def test_how_adapters_are_applied_is_readable_and_told_apart() -> None:
    network: Any = adapted(lora_alpha=8)
    facts = adapter_facts(network, ["net"])
    assert facts["adapters"].startswith("default, scaling 2 (layers: 2); sha256 ")
    assert adapter_facts(adapted(lora_alpha=8), ["net.0.lora_A", "net.1"]) == facts
    assert (
        "scaling 4 (layers: 2)"
        in adapter_facts(adapted(lora_alpha=8, use_rslora=True), ["net"])["adapters"]
    )
    assert "scaling 2 (layers: 3)" in adapter_facts(network, [""])["adapters"]
    found = {facts["adapters"]}
    network["copy"].set_scale("default", 9)
    assert adapter_facts(network, ["net"]) == facts
    for change in (
        lambda: network["net"][0].scale_layer(0.7),
        network["net"][0].unscale_layer,
        lambda: network["net"][1].scale_layer(0.7),
        lambda: network["net"][1].enable_adapters(False),
        lambda: network["net"][0].merge(),
    ):
        change()
        found.add(adapter_facts(network, ["net"])["adapters"])
    # Scaled and back again is as before; which of two layers is scaled is known.
    assert len(found) == 5
    assert "default, scaling 2, merged (layers: 1); disabled (layers: 1)" in "".join(found)
    assert adapter_facts(nn.Linear(2, 2), [""]) == {}


def test_adapters_are_compared_where_a_store_knows_them() -> None:
    traced, asked = adapted(lora_alpha=8), adapted(lora_alpha=2)
    asked.load_state_dict(traced.state_dict())
    trained = [name for name, _ in traced.named_parameters() if "lora" in name]
    schedule = Zeros().noise_schedule
    model = model_fingerprint(traced, trained, schedule, ["net"])
    store: Any = SimpleNamespace(header=SimpleNamespace(model=model))
    refuse_differences("model", *model_facts(store, traced, trained, schedule))
    with pytest.raises(StoreMismatchError, match=r"model\.adapters.*scaling 2 .*scaling 0\.5 "):
        refuse_differences("model", *model_facts(store, asked, trained, schedule))
    del model["adapters"]
    refuse_differences("model", *model_facts(store, asked, trained, schedule))
