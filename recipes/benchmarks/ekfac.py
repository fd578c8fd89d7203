"""EK-FAC influence functions (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv
2308.03296): whole gradients, and a Hessian that is inverted layer by layer.

Rows of `influence`, about its questions and traced runs:

- ``ekfac``: the denoising loss at timesteps of the whole schedule, as that of published use is;
- ``ekfac_high_noise``: the states of ``influence_condition``, whose gradients these are too, so that
  the rows differ by the inverse, and by what projection loses.

A sample's gradient is that of the loss of its predicted clean image, a question's that of what the
concept's name is worth to this loss. The checkpoints' scores are standardised and averaged, as those
of every row (Grosse et al. have one checkpoint).

The Hessian is the Gauss-Newton one of the same loss: targets are drawn from the model's own
Gaussian, not taken from the data. Of a model that has fitted its data the data's own residuals, of
the empirical Fisher, are small exactly where it fitted them. Both are taken at the samples' states.
An embedding is a linear layer of one-hot inputs: its inputs' factor is diagonal, with the counts of
the names. Each layer has a damping of its own, a tenth of its mean eigenvalue (Grosse et al.).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrak_lightning import GradientTracer, Method, Projection, methods
from ctrak_lightning.attribution.scoring import ensemble
from ctrak_lightning.gradients import tracing_mode
from ctrak_lightning.methods.trajectories import Noised
from ctrak_lightning.tasks import Condition

from .compare import Case, Variant, answers, answers_folder
from .replay import load_trained

WHOLE = Projection(rank=100_000, dim=None)
"""A side of at most this many entries is not projected at all; no layer here has more."""
DAMPING = 0.1
DRAWS = 2
"""Targets drawn for each state of a sample."""
STATES = {
    "ekfac": Noised(timesteps=5),
    "ekfac_high_noise": Noised(timesteps=3, start=2 / 3, end=1.0),
}
ROWS = tuple(STATES)


@dataclass(frozen=True)
class Curvature:
    """One layer's block of the Hessian, in the eigenbasis of its Kronecker factors.

    Args:
        outputs: eigenvectors of the second moment of the output's gradients, columns [rows, rows].
        inputs: those of the inputs [cols, cols].
        eigenvalues: the second moment of a gradient's coordinates in both bases [rows, cols].
    """

    outputs: Tensor
    inputs: Tensor
    eigenvalues: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of a gradient."""
        rows, cols = self.eigenvalues.shape
        return rows, cols

    def rotated(self, gradients: Tensor) -> Tensor:
        """Gradients [n, rows, cols] in the eigenbasis."""
        return self.outputs.T @ gradients @ self.inputs

    def solve(self, gradients: Tensor, damping: float = DAMPING) -> Tensor:
        """Gradients [n, rows, cols] times the inverse of the block, to which ``damping`` times its
        mean eigenvalue is added; zero of a layer that no gradient reaches."""
        ridge = damping * self.eigenvalues.mean()
        if ridge == 0:
            return torch.zeros_like(gradients)
        scaled = self.rotated(gradients) / (self.eigenvalues + ridge)
        return self.outputs @ scaled @ self.inputs.T


@dataclass(frozen=True)
class States:
    """Noised samples [B, ...], and what the network is told of them."""

    x_t: Tensor
    t: Tensor
    condition: Condition

    def rows(self, rows: Tensor) -> "States":
        """The same of some rows only."""
        condition = {name: value[rows] for name, value in self.condition.items()}
        return States(self.x_t[rows], self.t[rows], condition)


def states_of(module: Any, batches: Iterable[Any], trajectory: Noised) -> Iterator[States]:
    """The states at which a capture traces the batches, with its seed."""
    for batch in batches:
        encoded = module.encode(batch)
        what = (encoded.latents, encoded.condition, encoded.sample_ids)
        for state in trajectory.states(module, *what, 0):
            yield States(state.x_t, state.t, encoded.condition)


def curvatures(
    module: Any, tracer: GradientTracer, states: Callable[[], Iterable[States]], draws: int = DRAWS
) -> dict[str, Curvature]:
    """Every traced layer's block of the Hessian, by name, in the order of the tracer's rows.

    Args:
        module: a DiffusionTask, whose ``denoiser`` predicts what the loss is a mean square of.
        tracer: of whole gradients.
        states: gives those of the training samples, anew with each call.
        draws: of targets, for each state.

    Raises:
        ValueError: a traced layer is neither linear nor an embedding.
    """
    layers = {name: tracer.module.get_submodule(name) for name in tracer.block_names}
    odd = [name for name, layer in layers.items() if not _is_linear(layer)]
    if odd:
        raise ValueError(
            f"curvatures: {odd} have no Kronecker factors here, expected nn.Linear and "
            "nn.Embedding. HINT: leave them out with GradientTracer(layers=)."
        )
    generator = torch.Generator().manual_seed(0)
    blocks = _eigenbases(module, layers, states(), draws, generator)
    sums = {name: torch.zeros_like(block.eigenvalues) for name, block in blocks.items()}
    count = 0
    for state in states():
        for gradients in _pseudo_gradients(module, tracer, state, draws, generator):
            count += len(gradients)
            for name, own in split(gradients, blocks).items():
                sums[name] += blocks[name].rotated(own).square().sum(0)
    return {name: replace(block, eigenvalues=sums[name] / count) for name, block in blocks.items()}


def split(rows: Tensor, blocks: Mapping[str, Curvature]) -> dict[str, Tensor]:
    """Whole gradients [n, P] layer by layer, each [n, rows, cols]."""
    sizes = [block.eigenvalues.numel() for block in blocks.values()]
    parts = zip(blocks.items(), rows.split(sizes, 1), strict=True)
    return {name: part.unflatten(1, block.shape) for (name, block), part in parts}


def scores(
    queries: Tensor, traces: Tensor, blocks: Mapping[str, Curvature], damping: float = DAMPING
) -> Tensor:
    """Influence of samples on questions [Q, N], of the whole gradients of both, [Q, P] and [N, P]."""
    found = torch.zeros(len(queries), len(traces), dtype=torch.float64)
    solved, own = split(queries, blocks), split(traces, blocks)
    for name, block in blocks.items():
        directions = block.solve(solved[name], damping).flatten(1)
        found += (directions @ own[name].flatten(1).T).double()
    return found


def method(name: str) -> Method:
    """The gradients of a row."""
    return replace(
        methods.influence("condition", per_exposure=False),
        name=name,
        training_trajectory=STATES[name],
        query_trajectory=STATES[name],
    )


def scores_of(
    folder: Path, case: Case, names: Sequence[str], steps: Sequence[int], what: str
) -> dict[str, Tensor]:
    """Scores [Q, N] of the rows of these names about the case's given images; finished traces,
    answers and curvatures are read from ``folder``."""
    rows = [
        Variant(name=name, method=method(name), steps=tuple(steps), projection=WHOLE, scope="given")
        for name in names
    ]
    found = {}
    for row, attributor, query in answers(
        case, rows, answers_folder(folder, what), folder / "traces"
    ):
        tracer = GradientTracer(case.module.denoiser, WHOLE)
        each = []
        for step, checkpoint, asked in zip(
            row.steps, attributor.store.checkpoints, query.features, strict=True
        ):
            path = folder / "curvature" / f"{row.store_name()}-{step}.safetensors"
            blocks = _kept(path, case, tracer, STATES[row.name], step)
            each.append(scores(asked, checkpoint.features(), blocks))
        found[row.name] = ensemble(torch.stack(each))
    return found


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.Embedding))


def _eigenbases(
    module: Any,
    layers: Mapping[str, nn.Module],
    states: Iterable[States],
    draws: int,
    generator: torch.Generator,
) -> dict[str, Curvature]:
    """The layers' eigenbases, from second moments over all rows (samples, positions) that a layer
    sees; eigenvalues are zeros."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def add(cotangent: Tensor) -> None:
            own = cotangent.detach().flatten(0, -2)
            outputs[name] = outputs.get(name, 0) + own.T @ own

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            own = _inputs(layer, args[0].detach())
            inputs[name] = inputs.get(name, 0) + own.T @ own
            output.register_hook(add)

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    with tracing_mode(module.denoiser):
        for state in states:
            output = module.predict(state.x_t, state.t, state.condition)
            for draw in range(draws):
                pseudo = _pseudo_cotangent(output, generator)
                kept = draw + 1 < draws
                torch.autograd.grad(output, parameters, pseudo, retain_graph=kept)
    for handle in handles:
        handle.remove()
    found = {}
    for name in layers:
        left, right = (torch.linalg.eigh(each[name].double())[1] for each in (outputs, inputs))
        zeros = torch.zeros(len(left), len(right))
        found[name] = Curvature(left.float(), right.float(), zeros)
    return found


def _inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer's weights are multiplied by [R, cols]."""
    if isinstance(layer, nn.Embedding):
        return F.one_hot(x.flatten(), layer.num_embeddings).float()
    rows = x.flatten(0, -2)
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows


def _pseudo_cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    """A cotangent v of outputs [B, ...], at random: the mean of ``J^T v v^T J`` is the Gauss-Newton
    matrix ``2 / D J^T J`` of the mean over D elements of the squared error."""
    noise = torch.randn(output.shape, generator=generator)
    return noise * math.sqrt(2 / output[0].numel())


def _pseudo_gradients(
    module: Any, tracer: GradientTracer, state: States, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Whole gradients [B, P] of each draw."""

    def forward(rows: Tensor) -> Tensor:
        own = state.rows(rows)
        output: Tensor = module.predict(own.x_t, own.t, own.condition)
        return output

    def cotangent(output: Tensor, rows: Tensor) -> Tensor:
        return _pseudo_cotangent(output, generator)

    return tracer.vjps(forward, [cotangent] * draws, len(state.x_t), sketch=False)


def _kept(
    path: Path, case: Case, tracer: GradientTracer, trajectory: Noised, step: int
) -> dict[str, Curvature]:
    """The curvatures at a checkpoint, read from a file if they are there."""
    parts = [field.name for field in fields(Curvature)]
    if not path.exists():
        load_trained(case.module, case.folder, step)
        found = curvatures(
            case.module, tracer, lambda: states_of(case.module, case.batches, trajectory)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}/{part}": getattr(block, part).contiguous()
            for name, block in found.items()
            for part in parts
        }
        draft = path.with_suffix(".part")
        save_file(tensors, draft)
        draft.replace(path)
    known = load_file(path)
    return {
        name: Curvature(*(known[f"{name}/{part}"] for part in parts)) for name in tracer.block_names
    }
