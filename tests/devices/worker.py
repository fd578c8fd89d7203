"""Traces and asks a tiny model on the CPU and on the logical GPU, and prints, as JSON, by how much the
numbers differ and what was copied and waited for."""

import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ctrak_lightning import Attributor, Capture, Concept, GradientTracer, Projection, Sampler
from ctrak_lightning import methods as presets
from ctrak_lightning.capture import trace
from tests.devices.logical_gpu import GPU, TO_HOST, WAITS, Log, logical_gpu
from tests.tasks import tiny
from tests.toy import QuickDiffusion, Toys

ROWS = 4


class Pipeline(nn.Module):
    """A LoRA of a tiny Stable Diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.task = tiny.task_of("sd1")
        tiny.add_lora(self.task.denoiser)


class Images:
    """Batches of random images with captions, the same in every pass."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        side = 2 * tiny.SIZE
        for first in range(0, ROWS * self.batches, ROWS):
            yield {
                "image": torch.rand(ROWS, 3, side, side, generator=generator) * 2 - 1,
                "sample_id": [f"s{i}" for i in range(first, first + ROWS)],
                "caption": list(tiny.CAPTIONS),
            }


def subject(name: str, batches: int) -> tuple[nn.Module, Any, Any, Concept]:
    """A model, its task, its data and a question."""
    if name == "toy":
        toys = [Toys()[i] for i in range(ROWS * batches)]
        columns = [
            {key: [toy[key] for toy in toys[i : i + ROWS]] for key in toys[0]}
            for i in range(0, len(toys), ROWS)
        ]
        loader = [each | {"image": torch.stack(each["image"])} for each in columns]
        module = QuickDiffusion()
        red = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})
        return module, module, loader, red
    module = Pipeline()
    return module, module.task, Images(batches), Concept("cat", "a cat by x", "a picture by x")


def run(name: str, device: Any, states: int, batches: int, log: Log | None) -> dict[str, Any]:
    """What a second capture and a question give, and what that capture copied and waited for."""
    module, task, loader, question = subject(name, batches)
    module.to(device)
    found: dict[str, Any] = {}
    method = presets.influence(timesteps=states, per_exposure=False)
    with tempfile.TemporaryDirectory() as folder:
        capture = Capture(
            folder,
            module,
            task,
            loader,
            method=method,
            tracer=GradientTracer(task.denoiser, Projection(rank=4, dim=64), engine="auto"),
            device=device,
            progress=False,
            thumbnails=False,
        )
        capture.run(1, epoch=0)
        with torch.no_grad():
            for value in module.parameters():
                if value.requires_grad:
                    value.mul_(1.1)
        if log is not None:
            log.events.clear()
        capture.run(2, epoch=1)
        if log is not None:
            found["copies"], found["waits"] = log.total(TO_HOST), log.total(*WAITS)
            found["table"] = log.table()
        # As after `Trainer.fit`, which moves a module to the CPU.
        module.to("cpu")
        options: dict[str, Any] = {"task": task, "sampler": Sampler(steps=3, guidance=2.0)}
        attributor = Attributor(folder, module, device=device, **options)
        assert next(module.parameters()).device == torch.device(device)
        last = attributor.store.checkpoints[-1]
        [answer] = attributor.attribute_many([question], 0)
        found["numbers"] = [last.features(), last.losses(), answer.scores]
    return found


def with_fault(fault: str) -> None:
    """Plants what the counts must show."""
    if fault == "copy in every state":
        before = trace._Evaluation.denoising_loss
        trace._Evaluation.denoising_loss = lambda self: before(self).cpu().to(GPU)  # type: ignore[method-assign]
    if fault == "wait in every state":
        normalised = trace.normalised

        def waiting(rows: Tensor, *args: Any) -> Tensor:
            assert bool(rows.isfinite().all())
            return normalised(rows, *args)

        trace.normalised = waiting


def main() -> None:
    name, fault = sys.argv[1:]
    warnings.simplefilter("ignore")
    exact = run(name, "cpu", 2, 2, None)["numbers"]
    with_fault(fault)
    result: dict[str, Any] = {"counts": {}}
    for states, batches in ((2, 2), (3, 2), (2, 3)):
        with logical_gpu() as log:
            found = run(name, GPU, states, batches, log)
        counts = {key: found[key] for key in ("copies", "waits", "table")}
        result["counts"][f"{states} states, {batches} batches"] = counts
        if (states, batches) == (2, 2):
            pairs = zip(found["numbers"], exact, strict=True)
            result["differences"] = [
                float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs
            ]
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
