"""What a task must have, what it has by default, and tasks that do not inherit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning import Attributor, Concept, DiffusionTask, Sampler
from ctrak_lightning.errors import TaskError
from ctrak_lightning.tasks import InPrecision, name_of, named_samples, resolve_task, task_modules
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


def test_a_default_hides_nothing_of_a_module_that_was_there_before() -> None:
    class Theirs:
        id_column = "path"

        def decode(self, latents: Tensor) -> Tensor:
            return latents + 1

    class Traced(DiffusionTask, Theirs):
        def latents(self, images: Tensor) -> Tensor:
            return images

    class Derived(Traced):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) + 1

    assert (Traced().id_column, Traced().decode(torch.zeros(())).item()) == ("path", 1)
    assert Derived().decode(torch.zeros(())).item() == 2
    assert Traced().latents(torch.ones(1)).item() == 1
    assert Traced().pictures({}) is None
