"""What a trace costs, as multiples of the floor, measured in pairs in one process.

python -m recipes.benchmarks.speed --repeats 15
python -m recipes.benchmarks.speed --repeats 3 --models dit

*Floor*: what no method with the diffusion-posterior-sampling objective can avoid: one forward pass
and two vector-Jacobian products with respect to the input (the direction, and the cotangent through
the network), without any per-sample work. Every measurement stands directly after one of the floor,
so that a machine whose speed drifts does not shift the ratio. Peak memory is that of a process of
its own that does nothing else, beyond what the process held after building the network. traker and
dattri (extra `bench`), where installed, project gradients that are there already.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ctrak_lightning import (
    DiffusionTask,
    Encoded,
    GradientTracer,
    Method,
    NoiseSchedule,
    Projection,
    methods,
)
from ctrak_lightning.capture.trace import Trace, trace_batch
from ctrak_lightning.gradients import tracing_mode
from ctrak_lightning.methods.trajectories import Noised
from ctrak_lightning.utilities.memory import RowLimit

from ..lora import add_lora
from .tables import command_of, grid, machine, parser_of, publish

BATCH = 32
DIM = 2048
RANKS = (8, 16, 32)
CHUNK = 8  # samples at a time in torch.func, which holds every sample's whole gradient
# One state a sample, so that a trace is one forward pass and two vector-Jacobian products.
POSTERIOR = replace(methods.concept_trak_paper(1), training_trajectory=Noised(timesteps=1))
CAPTURED = (methods.concept_trak(1), methods.concept_trak_norm(1))
HALF = "half a batch at a time"
PEERS = {"traker": "trak", "dattri": "dattri"}
Work = Callable[[], Any]


class Subject(DiffusionTask, nn.Module):
    """A network, of which what requires a gradient is traced, and a batch for it: latents of a
    shape, and the network's other arguments, each [B, ...]."""

    def __init__(
        self, name: str, denoiser: nn.Module, latent: tuple[int, ...], condition: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.name, self.denoiser = name, denoiser
        self.noise_schedule = NoiseSchedule.from_scheduler(DDIMScheduler(clip_sample=False))
        self.given = condition
        self.x0 = torch.randn(len(next(iter(condition.values()))), *latent)
        # The very state that a trace looks at.
        trajectory = POSTERIOR.training_trajectory
        [state] = trajectory.states(self, self.x0, condition, self.encode().sample_ids, 0)
        self.x_t, self.t = state.x_t, state.t

    def on(self, device: torch.device) -> "Subject":
        """Moved to a device, with its batch."""
        self.x0, self.t, self.x_t = self.x0.to(device), self.t.to(device), self.x_t.to(device)
        self.given = {name: value.to(device) for name, value in self.given.items()}
        return self.to(device)

    def encode(self, batch: Any = None) -> Encoded:
        return Encoded(
            latents=self.x0, condition=self.given, sample_ids=[str(i) for i in range(len(self.x0))]
        )

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        return {name: value[:n] for name, value in self.given.items()}


def unet() -> Subject:
    network = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    condition = {"encoder_hidden_states": torch.randn(BATCH, 8, 64)}
    return Subject("unet", network, (4, 16, 16), condition)


def sd15() -> Subject:
    """LoRA on a network of Stable Diffusion 1.5's size, with random weights; for a GPU."""
    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    add_lora(network, 8, init=False)
    condition = {"encoder_hidden_states": torch.randn(BATCH, 77, 768)}
    return Subject("Stable Diffusion 1.5, LoRA", network, (4, 64, 64), condition)


def lora() -> Subject:
    subject = unet()
    add_lora(subject.denoiser, 8, init=False)
    subject.name = "unet, LoRA"
    return subject


def dit() -> Subject:
    network = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=8,
    )
    return Subject("DiT", network, (4, 16, 16), {"class_labels": torch.arange(BATCH)})


SUBJECTS = {"unet": unet, "lora": lora, "dit": dit, "sd15": sd15}
DEFAULT_SUBJECTS = ["unet", "lora", "dit"]


def rows(subject: Subject) -> dict[str, tuple[list[str], Projection]]:
    """Layers, by their names, and projections: by rank, with and without a sketch."""
    wide = [
        name
        for name, module in subject.denoiser.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    groups = {"LoRA" if "LoRA" in subject.name else "all Linear and Conv": wide}
    if any("attn2" in name for name in wide) and "LoRA" not in subject.name:
        groups["cross-attention"] = [name for name in wide if "attn2" in name]
    return {
        f"{title}, {rank}x{rank}, {'no sketch' if dim is None else f'to {dim}'}": (
            layers,
            Projection(rank=rank, dim=dim),
        )
        for title, layers in groups.items()
        for rank in RANKS
        for dim in (DIM, None)
    }


def forward(subject: Subject) -> None:
    with torch.no_grad():
        subject.predict(subject.x_t, subject.t, subject.given)


def floor(subject: Subject) -> None:
    """One forward pass and two input-VJPs of the posterior-sampling objective."""
    with tracing_mode(subject):
        x_t = subject.x_t.detach().requires_grad_()
        output = subject.predict(x_t, subject.t, subject.given)
        e = subject.noise_schedule.epsilon(output[:, : x_t.shape[1]], x_t, subject.t)
        x0_hat = subject.noise_schedule.x0_hat(e, x_t, subject.t)
        error = (x0_hat - subject.x0).square().flatten(1).mean(1).sum()
        (direction,) = torch.autograd.grad(error, x_t, retain_graph=True)
        torch.autograd.grad(e, x_t, -2 * direction / e[0].numel())


def training_step(subject: Subject) -> None:
    output = subject.predict(subject.x_t, subject.t, subject.given)
    (output[:, : subject.x0.shape[1]] - subject.x0).square().mean().backward()
    subject.denoiser.zero_grad()


def traced(
    subject: Subject, tracer: GradientTracer, method: Method = POSTERIOR, rows: int | None = None
) -> Trace:
    """A trace of the batch, ``rows`` samples at a time."""
    return trace_batch(subject, tracer, method, subject.encode(), 0, RowLimit(rows))


def functional(subject: Subject) -> Tensor:
    """The order of work of the reference pipeline: a guidance pass of its own, the squared loss,
    each sample's whole gradient by ``vmap(grad)``: gradients [B, P], not yet projected."""
    parameters: dict[str, Tensor] = {
        name: p for name, p in subject.denoiser.named_parameters() if p.requires_grad
    }
    frozen = {name: p for name, p in subject.denoiser.named_parameters() if not p.requires_grad}
    schedule = subject.noise_schedule

    def predict(
        weights: dict[str, Tensor], x: Tensor, t: Tensor, given: dict[str, Tensor]
    ) -> Tensor:
        arguments = (x, t)
        output: Tensor = functional_call(
            subject.denoiser, weights | frozen, arguments, {**given, "return_dict": False}
        )[0]
        return output[:, : x.shape[1]]

    def loss(
        weights: dict[str, Tensor], x: Tensor, t: Tensor, given: dict[str, Tensor], target: Tensor
    ) -> Tensor:
        one = {name: value[None] for name, value in given.items()}
        return (target - predict(weights, x[None], t[None], one)[0]).square().mean()

    # torch.func has no rule for the fused kernels.
    with tracing_mode(subject, attention="math"):
        x_t = subject.x_t.detach().requires_grad_()
        e = predict(parameters, x_t, subject.t, subject.given)
        x0_hat = schedule.x0_hat(e, x_t, subject.t)
        error = (x0_hat - subject.x0).square().flatten(1).mean(1).sum()
        (direction,) = torch.autograd.grad(error, x_t)
        target = (e + direction).detach()
        detached = {name: p.detach() for name, p in parameters.items()}
        parts = []
        for rows in torch.arange(BATCH).split(CHUNK):
            given = {name: value[rows] for name, value in subject.given.items()}
            gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), randomness="different")(
                detached, subject.x_t[rows], subject.t[rows], given, target[rows]
            )
            parts.append(torch.cat([each.flatten(1) for each in gradients.values()], 1).detach())
    return torch.cat(parts)


def peers(width: int) -> dict[str, Work]:
    """The installed peers' own projections of gradients [B, P] on the CPU, by name."""
    gradients = torch.randn(BATCH, width)
    found: dict[str, Work] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("trak"):
            from trak.projectors import BasicProjector

            projector = BasicProjector(width, DIM, 0, "normal", "cpu", block_size=128)
            found["traker"] = lambda: projector.project(gradients, 0)
        if importlib.util.find_spec("dattri"):
            from dattri.func.projection import random_project

            project = random_project(gradients, BATCH, DIM, 32, proj_type="normal", device="cpu")
            found["dattri"] = lambda: project(gradients)
    return found


def work_of(subject: Subject) -> dict[str, Work]:
    """Everything that is measured for a network, by name."""
    work: dict[str, Work] = {
        "forward pass": partial(forward, subject),
        "floor": partial(floor, subject),
        "training step": partial(training_step, subject),
    }
    for name, (layers, projection) in rows(subject).items():
        tracer = GradientTracer(subject.denoiser, projection, layers=layers)
        work[name] = partial(traced, subject, tracer)
        for method in CAPTURED if projection == Projection() else ():
            # As ConceptTracer captures.
            halved = partial(traced, subject, tracer, method, BATCH // 2)
            work[f"{name}; {method.name}, {HALF}"] = halved
    work["torch.func, whole gradients"] = partial(functional, subject)
    if "LoRA" in subject.name:  # their matrices for a whole network would not fit into memory
        width = sum(p.numel() for p in subject.denoiser.parameters() if p.requires_grad)
        work |= {f"{name}, projection alone": each for name, each in peers(width).items()}
    return work


def measured(work: dict[str, Work], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every piece of work and of the floor directly before it, in turn, ``repeats``
    times after a round that warms up."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, one in work.items():
            before = elapsed(work["floor"])
            spent = elapsed(one)
            if repeat:
                pairs[name].append((spent, before))
    return pairs


def elapsed(work: Work) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def summary(pairs: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    """Median ratios of every piece of work, and the middle half of its ratios to the floor."""
    floors = {name: [spent / floor for spent, floor in each] for name, each in pairs.items()}
    ratios = {name: statistics.median(each) for name, each in floors.items()}
    return {
        name: {
            "floor": ratio,
            "floor_quartiles": statistics.quantiles(floors[name], n=4)[::2],
            "forward pass": ratio / ratios["forward pass"],
            "training step": ratio / ratios["training step"],
        }
        for name, ratio in ratios.items()
    }


def peak(model: str, name: str) -> float:
    """MiB beyond the built network that a process of its own needs at most for a piece of work."""
    command = [sys.executable, "-m", "recipes.benchmarks.speed", "--peak", model, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(model: str, name: str) -> None:
    torch.manual_seed(0)
    work = work_of(SUBJECTS[model]())
    # The high-water mark, reset to what is held now (Linux only).
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmHWM")
    for _ in range(2):
        work[name]()
    print((memory_kib("VmHWM") - before) / 1024)


def memory_kib(field: str) -> int:
    """What this process holds (``VmRSS``), or has held at most (``VmHWM``), in KiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def section(name: str, sizes: tuple[int, int], rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of one network of so many parameters, and trained ones."""
    own = rows["training step"]["peak_mib"]
    cells = []
    for work, row in rows.items():
        low, high = row["floor_quartiles"]
        memory = row["peak_mib"]
        cells.append(
            [
                work,
                f"{row['floor']:.2f} ({low:.2f}-{high:.2f})",
                f"{row['forward pass']:.2f}",
                f"{row['training step']:.2f}",
                *((f"{memory:,.0f}", f"{memory / own:.2f}") if memory else ("", "")),
            ]
        )
    heads = ["/ floor", "/ forward pass", "/ training step"]
    heads += ["peak memory, MiB", "/ training step's"]
    return [
        "",
        f"### {name} ({sizes[0]:,} parameters, {sizes[1]:,} trained)",
        "",
        *grid(["work", *heads], cells),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.speed", __doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=DEFAULT_SUBJECTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        print_peak(*args.peak)
        return
    lines = [
        f"`{command_of(parser, args)}`; {machine()}, {torch.get_num_threads()} threads; batch of "
        f"{BATCH}, one timestep, medians of {args.repeats} runs (the middle half of the ratios in "
        "brackets), each directly after one of the floor."
    ]
    for model in args.models:
        torch.manual_seed(0)
        subject = SUBJECTS[model]().on(torch.device(args.device))
        found = summary(measured(work_of(subject), args.repeats))
        for name, row in found.items():
            known = args.device == "cpu" and "projection alone" not in name
            row["peak_mib"] = peak(model, name) if known else None
        parameters = list(subject.denoiser.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        sizes = sum(p.numel() for p in parameters), trained
        lines += section(subject.name, sizes, found)
    missing = [name for name, module in PEERS.items() if not importlib.util.find_spec(module)]
    if missing:
        names = ", ".join(missing)
        lines += ["", f"Not installed, so not measured: {names} (`pip install -e .[bench]`)."]
    publish(args.results / "speed.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
