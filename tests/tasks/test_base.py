"""What a task must have, what it has by default, and tasks that do not inherit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning import Attributor, Concept, DiffusionTask, Encoded, Sampler
from ctrak_lightning.errors import BatchError, TaskError
from ctrak_lightning.tasks import (
    InPrecision,
    OptionalMembers,
    name_of,
    named_samples,
    resolve_task,
    task_modules,
    whole,
)
from tests.attribution.test_attributor import METHODS, traced
from tests.toy import QuickDiffusion

RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})
OPTIONAL = ("sample_ids", "decode", "pictures", "latents", "latent_mask")


class Bare:
    """What a task must have, without inheriting anything."""

    def __init__(self, module: QuickDiffusion) -> None:
        self.denoiser, self.noise_schedule = module.denoiser, module.noise_schedule
        self.encode, self.condition, self.predict = module.encode, module.condition, module.predict


class Duck(Bare):
    """The same with more."""

    id_column = "sample_id"

    def decode(self, latents: Tensor) -> Tensor:
        return latents * 2


def test_a_class_that_does_not_inherit_has_the_defaults_of_what_it_lacks() -> None:
    module = QuickDiffusion()
    task = resolve_task(module, Bare(module))
    assert isinstance(task, DiffusionTask)
    assert all(getattr(task, name)(torch.ones(2, 3)) is None for name in OPTIONAL)
    assert task.known_attributes() is None
    assert task.id_column is None
    assert named_samples(task, {}) is None
    assert task.denoiser is module.denoiser
    assert name_of(task) == "Bare"
    assert task_modules(task) == [module.denoiser]

    more = resolve_task(Duck(module))
    assert more.id_column == "sample_id"
    halves = InPrecision(more, torch.bfloat16)
    assert torch.equal(halves.decode(torch.ones(1)), torch.full((1,), 2.0))  # type: ignore[arg-type]
    assert halves.pictures({}) is None
    assert name_of(halves) == "Duck"


def test_it_answers_as_the_task_that_inherits_does(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["trak"])
    sampler = Sampler(steps=3, guidance=1.0)
    expected = Attributor(tmp_path / "s", module, sampler=sampler).attribute(RED)
    found = Attributor(tmp_path / "s", module, task=Bare(module), sampler=sampler).attribute(RED)  # type: ignore[arg-type]
    assert torch.equal(found.scores, expected.scores)
    assert expected.image is not None
    assert found.image is None


def test_what_is_left_undefined_is_named() -> None:
    class Half(DiffusionTask):
        denoiser = nn.Linear(1, 1)

        def encode(self, batch: Any) -> Any:
            return batch

    with pytest.raises(
        TaskError, match=r"Half is no .*: it lacks noise_schedule, condition\. HINT"
    ):
        resolve_task(Half())
    with pytest.raises(NotImplementedError, match=r"Half\.condition\(spec, n\) -> dict"):
        Half().condition({}, 1)
    odd = Bare(QuickDiffusion())
    odd.denoiser = "unet"  # type: ignore[assignment]
    with pytest.raises(TaskError, match=r"Bare\.denoiser is str, expected an nn\.Module"):
        resolve_task(odd)


class Theirs:
    id_column = "path"

    def decode(self, latents: Tensor) -> Tensor:
        return latents + 1


def test_a_default_hides_nothing_of_a_module_that_was_there_before() -> None:
    class Traced(DiffusionTask, Theirs):
        def latents(self, images: Tensor) -> Tensor:
            return images

    class Derived(Traced):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) + 1

    task = whole(Derived())
    assert (task.id_column, task.decode(torch.zeros(())).item()) == ("path", 2)  # type: ignore[union-attr]
    assert Traced().decode(torch.zeros(())).item() == 1  # type: ignore[union-attr]
    assert task.latents(torch.ones(1)).item() == 1  # type: ignore[union-attr]
    assert task.pictures({}) is None


def test_no_default_is_before_a_later_class() -> None:
    class Later(Theirs):
        def decode(self, latents: Tensor) -> Tensor:
            return latents + 5

    class Traced(DiffusionTask, Theirs):
        pass

    class Both(Traced, Later):
        pass

    assert Both().decode(torch.zeros(())).item() == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*OPTIONAL, "known_attributes", "check_concept"])
def test_a_module_keeps_what_it_has_by_the_name_of_a_member(name: str) -> None:
    """As it had before it inherited: a submodule, a parameter, a buffer, a plain attribute."""
    module = QuickDiffusion()
    for kind in (Own, OwnParameter, OwnBuffer, OwnTensor):
        theirs = kind(name)
        assert torch.equal(theirs(torch.ones(2)), torch.full((2,), 3.0))
        task = whole(theirs)
        if kind is Own:
            assert getattr(task, name) is getattr(theirs, name)
        else:
            assert getattr(task, name).__func__ is getattr(OptionalMembers, name)
    assert whole(module).id_column is None


class Own(DiffusionTask, nn.Module):
    """A submodule."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        layer = nn.Linear(2, 2)
        nn.init.ones_(layer.weight)
        nn.init.ones_(layer.bias)
        setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, self.name)(x)
        return found


class OwnTensor(DiffusionTask, nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.keep(name, torch.full((2,), 2.0))

    def keep(self, name: str, value: Tensor) -> None:
        setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + getattr(self, self.name)
        return found


class OwnParameter(OwnTensor):
    def keep(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value))


class OwnBuffer(OwnTensor):
    def keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)


def test_a_property_that_has_nothing_is_no_member() -> None:
    class Without(DiffusionTask):
        decode = property()  # type: ignore[assignment]
        known_attributes = property()  # type: ignore[assignment]

    task = whole(Without())
    assert task.decode(torch.ones(1)) is None
    assert task.known_attributes() is None


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            {"latents": [torch.ones(3)] * 2},
            r"latents=list of 2\): expected a floating-point tensor",
        ),
        ({"latents": torch.ones(2, 3).byte()}, r"latents=uint8 \[2, 3\]\): expected a floating"),
        ({"latents": torch.tensor(1.0)}, r"expected \[B, \.\.\.\], one for each image"),
        ({"condition": {"words": [1, 2]}}, r"condition={words: list of 2}\): expected a dict"),
        ({"condition": {"words": torch.tensor(1)}}, r"condition={words: int64 \[\]}\): expected"),
        ({"condition": torch.ones(2)}, r"condition=float32 \[2\]\): expected a dict"),
        ({"condition": None}, r"condition=None\): expected a dict"),
        ({"sample_ids": None}, r"sample_ids=None\): expected one id for each sample"),
        ({"sample_ids": 3}, r"sample_ids=int\): expected one id for each sample"),
    ],
)
def test_the_parts_of_a_batch_must_be_of_their_kind(part: dict[str, Any], told: str) -> None:
    sound: dict[str, Any] = {
        "latents": torch.ones(2, 3),
        "condition": {"words": torch.ones(2, 4)},
        "sample_ids": ["a", "b"],
    }
    Encoded(**sound)
    with pytest.raises(BatchError, match=rf"Encoded\(.*{told}"):
        Encoded(**(sound | part))
