"""The model that questions are put to: whose state it is in, and that it is the one that was
traced."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctrak_lightning import Attributor, Concept, GradientTracer, Projection, TraceStore, methods
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.methods.trajectories import Sampler
from ctrak_lightning.model.fingerprint import model_fingerprint
from ctrak_lightning.model.function import UnrecordedFunctionWarning, refuse_another_function
from ctrak_lightning.model.weights import loaded, trained_parameters
from ctrak_lightning.store.manifest import manifest_text, read_manifest
from ctrak_lightning.store.store import Checkpoint

from ..stress.subject import Small
from ..toy import ToyDiffusion, Toys

METHOD = methods.trak(timesteps=2)
RED = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})
SAMPLER = Sampler(steps=3)


class Dropping(ToyDiffusion):
    """Dropout wherever a question meets the module: in its conditions, in encoding and in
    decoding."""

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
def test_questions_are_asked_in_evaluation_mode(
    dropping: tuple[Path, Dropping], image: str | None
) -> None:
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
    answer = Attributor(tmp_path / "s", module.denoiser, task=module, sampler=SAMPLER).attribute(
        RED
    )
    torch.testing.assert_close(answer.scores, together.scores)
    assert module.drop.training


class Moving(nn.Module):
    """A network with running means, a table of constants, a scale that is no parameter, and state
    that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small()
        self.norm = nn.BatchNorm2d(3)
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        self.register_buffer("codes", torch.arange(3))

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        codes: Any = self.codes
        x = self.norm(x) + self.shift + codes.view(-1, 1, 1)
        return (self.scale * self.small(x, t, encoder_hidden_states)[0],)


class MovingToy(ToyDiffusion):
    """The toys on that network, beside an average of it that no answer needs."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(denoiser=Moving())
            self.average = nn.Linear(2, 2).requires_grad_(False)
        self.embedding.requires_grad_(False)
        self.denoiser.norm.requires_grad_(False)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MovingToy]:
    """Two checkpoints, between which the weights and the running means have moved."""
    path, module = tmp_path_factory.mktemp("moving") / "s", MovingToy()
    taken = capture(path, module, module)
    for step in (1, 2):
        with torch.no_grad():
            module.denoiser.norm.running_mean.add_(0.3 * step)
            module.denoiser.small.conv_out.weight.add_(0.1)
            module.average.weight.add_(1)
        taken.run(step, epoch=0)
    return path, module


def test_running_means_are_stored_and_taken_on_and_given_back(
    moving: tuple[Path, MovingToy],
) -> None:
    path, module = moving
    means = [one.buffers()["denoiser.norm.running_mean"] for one in TraceStore(path).checkpoints]
    torch.testing.assert_close(means[0], torch.full((3,), 0.3))
    torch.testing.assert_close(means[1], torch.full((3,), 0.9))
    fresh = MovingToy()
    state = {name: value.clone() for name, value in fresh.state_dict().items()}
    ours, theirs = (Attributor(path, m, sampler=SAMPLER).attribute(RED) for m in (module, fresh))
    torch.testing.assert_close(ours.checkpoint_scores, theirs.checkpoint_scores, rtol=0, atol=0)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    # With the means of the last checkpoint at both, the answer is another one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ctrak_lightning.attribution.checkpoint_model.refuse_another_function",
            lambda *args: None,
        )
        patch.setattr(Checkpoint, "buffers", lambda self: {"denoiser.norm.running_mean": means[1]})
        wrong = Attributor(path, fresh, sampler=SAMPLER).attribute(RED)
    assert not torch.allclose(wrong.checkpoint_scores[0], ours.checkpoint_scores[0], rtol=1e-2)


def test_a_network_that_is_another_function_is_refused(moving: tuple[Path, MovingToy]) -> None:
    path, _ = moving
    for change in ("scale", "shift", "null"):
        module = MovingToy()
        if change == "scale":
            module.denoiser.scale = 1.01
        elif change == "shift":
            module.denoiser.shift.add_(0.05)
        else:
            module.embedding.register_forward_hook(lambda *given: given[-1] + 0.1)
        with pytest.raises(
            StoreMismatchError, match=r"step 2, this network's outputs differ.*lora_alpha"
        ):
            Attributor(path, module, sampler=SAMPLER).attribute(RED)
    within = MovingToy()
    within.denoiser.scale = 1 + 2e-5
    Attributor(path, within, sampler=SAMPLER).attribute(RED)
    within.denoiser.scale = 1 + 5e-4
    with within_checkpoint(path, within) as (stored, shape):
        with pytest.raises(StoreMismatchError, match=r"expected at most 0\.0001 \(float32\)"):
            refuse_another_function(stored, within, shape, 2)
        refuse_another_function(replace(stored, on_cpu=False), within, shape, 2)
        refuse_another_function(replace(stored, dtype="bfloat16"), within, shape, 2)


@contextmanager
def within_checkpoint(path: Path, module: nn.Module) -> Iterator[tuple[Any, Any]]:
    store = TraceStore(path)
    last = store.checkpoints[-1]
    with loaded(module, last.weights() | last.buffers()):
        yield last.function(), store.header.dataset["latent_shape"]


def test_frozen_constants_are_compared_and_what_is_beside_the_network_is_not(
    moving: tuple[Path, MovingToy],
) -> None:
    path, _ = moving
    header = TraceStore(path).header.model
    assert json.loads(header["frozen_parts"]) == ["denoiser", "embedding"]
    for buffer in ("codes", None):
        module = MovingToy()
        changed = module.embedding.weight if buffer is None else module.denoiser.codes
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(StoreMismatchError, match=r"model\.frozen_weights"):
            Attributor(path, module)
    module.average.weight.data.add_(1)


def test_a_task_without_a_null_condition_is_told_and_still_answers(tmp_path: Path) -> None:
    class Strict(MovingToy):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            if not spec:
                raise KeyError("colour")
            return super().condition(spec, n)

        def known_attributes(self) -> None:  # type: ignore[override]
            return None

    module = Strict()
    with pytest.warns(
        UnrecordedFunctionWarning,
        match=r"Strict\.condition\({}, 1\).*\(KeyError: 'colour'\).*HINT.*known_attributes",
    ):
        capture(tmp_path / "s", module, module).run(1, epoch=0)
    assert TraceStore(tmp_path / "s").checkpoints[0].function() is None
    Attributor(tmp_path / "s", Strict(), sampler=Sampler(steps=3, guidance=1.0)).attribute(RED)


def test_a_store_of_schema_4_is_compared_in_what_it_has(
    moving: tuple[Path, MovingToy], tmp_path: Path
) -> None:
    path, module = moving
    old = tmp_path / "old"
    shutil.copytree(path, old)
    manifest = read_manifest(old)
    with_average = model_fingerprint(
        module, trained_parameters(module), module.noise_schedule, None
    )
    gone = [
        name for name in manifest.files if name.endswith(("function.h5", "buffers.safetensors"))
    ]
    assert len(gone) == 4
    files = {name: known for name, known in manifest.files.items() if name not in gone}
    manifest = replace(manifest, files=files, header=replace(manifest.header, model=with_average))
    (old / "manifest.json").write_text(manifest_text(manifest, schema=4))
    Attributor(old, module, sampler=SAMPLER).attribute(RED)
    with pytest.raises(StoreMismatchError, match=r"model\.frozen_weights"):
        Attributor(old, MovingToy())
