"""The model that questions are put to: whose state it is in, and that it is the one that was traced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctrak_lightning import Attributor, Concept, GradientTracer, Projection, methods
from ctrak_lightning.capture import Capture
from ctrak_lightning.trajectory import Sampler

from ..stress.subject import Small
from ..toy import ToyDiffusion, Toys

METHOD = methods.trak(timesteps=2)
RED = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})
SAMPLER = Sampler(steps=3)


class Dropping(ToyDiffusion):
    """Dropout wherever a question meets the module: in its conditions, in encoding and in decoding."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(denoiser=Small())
        self.embedding.requires_grad_(False)
        self.drop = nn.Dropout(0.5)

    def tokens(self, colours: list[str | None], shapes: list[str | None]) -> Tensor:
        dropped: Tensor = self.drop(super().tokens(colours, shapes))
        return dropped

    def latents(self, images: Tensor) -> Tensor:
        dropped: Tensor = self.drop(images)
        return dropped

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(self.drop(latents))


def capture(path: Path, owner: nn.Module, task: Any) -> Capture:
    tracer = GradientTracer(task.denoiser, Projection(rank=4, dim=64))
    loader = DataLoader(Toys(), 6)
    return Capture(str(path), owner, task, loader, method=METHOD, tracer=tracer, progress=False)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dropping]:
    path, module = tmp_path_factory.mktemp("dropping") / "s", Dropping()
    capture(path, module, module).run(1, epoch=0)
    return path, module


@pytest.mark.parametrize("image", [None, "given"])
def test_questions_are_asked_in_evaluation_mode(dropping: tuple[Path, Dropping], image: str | None) -> None:
    path, module = dropping
    concept = (
        RED
        if image is None
        else Concept(RED.name, RED.present, RED.absent, image=Toys().images[0].clamp(-1, 1))
    )
    answers = []
    for training in (True, False):
        module.train(training)
        torch.manual_seed(int(training))
        result = Attributor(path, module, sampler=SAMPLER).attribute(concept)
        answers.append((result.scores, result.image))
        assert all(part.training is training for part in module.modules())
    torch.testing.assert_close(*(scores for scores, _ in answers), rtol=0, atol=0)
    torch.testing.assert_close(*(picture for _, picture in answers), rtol=0, atol=0)


def test_a_tasks_own_modules_are_in_evaluation_mode_as_well(
    dropping: tuple[Path, Dropping], tmp_path: Path
) -> None:
    path, module = dropping
    module.train()
    apart = capture(tmp_path / "s", module.denoiser, module)
    apart.run(1, epoch=0)
    together = Attributor(path, module, sampler=SAMPLER).attribute(RED)
    answer = Attributor(tmp_path / "s", module.denoiser, task=module, sampler=SAMPLER).attribute(RED)
    torch.testing.assert_close(answer.scores, together.scores)
    assert module.drop.training
