"""Reference engines: explicit per-sample gradients, projected afterwards. Slow; what the hook
engine is held against."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients.checks import (
    Cotangent,
    Forward,
    naming_extension,
    pull_back,
    require_contribution,
    run_cotangent,
    run_forward,
)
from ctrak_lightning.gradients.layers import Block, member_of, require_shape
from ctrak_lightning.gradients.modes import full_precision
from ctrak_lightning.gradients.projection import BlockProjector


def looped_vjps(
    blocks: Sequence[Block],
    projector: BlockProjector,
    forward: Forward,
    cotangents: Sequence[Cotangent],
    rows: Tensor,
    *,
    required: bool = True,
) -> list[dict[str, Tensor]]:
    """As :func:`~ctrak_lightning.gradients.hooks.hooked_vjps`, by one forward and backward pass per
    sample.

    Args:
        required: refuse a forward pass that depends on none of the parameters.
    """
    parameters = _parameters(blocks)
    results: list[list[dict[str, Tensor]]] = [[] for _ in cotangents]
    with _requiring_gradients(parameters.values()):
        for row in rows.split(1):
            output = run_forward(forward, row)
            for position, cotangent in enumerate(cotangents, start=1):
                v = run_cotangent(cotangent, output, row)
                gradients = pull_back(
                    [output], list(parameters.values()), [v], keep_graph=position < len(cotangents)
                )
                require_contribution(
                    not required or any(gradient is not None for gradient in gradients)
                )
                named = {
                    name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
                    for (name, parameter), gradient in zip(
                        parameters.items(), gradients, strict=True
                    )
                }
                one = {name: gradient.unsqueeze(0) for name, gradient in named.items()}
                results[position - 1].append(_project(blocks, projector, one))
    return [
        {block.name: torch.cat([row[block.name] for row in result]) for block in blocks}
        for result in results
    ]


def functional_vjps(
    blocks: Sequence[Block],
    projector: BlockProjector,
    module: nn.Module,
    forward: Forward,
    cotangents: Sequence[Cotangent],
    rows: Tensor,
) -> list[dict[str, Tensor]]:
    """As :func:`looped_vjps`, by `torch.func.vmap` over `torch.func.vjp`.

    Raises:
        GradientError: `torch.func` cannot run this forward pass, e.g. under gradient checkpointing.
    """
    parameters = _parameters(blocks)
    with _requiring_gradients(parameters.values()):
        output = run_forward(forward, rows)
        vs = [run_cotangent(cotangent, output, rows) for cotangent in cotangents]
    caller = _Caller(module, forward)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    places = {
        f"module.{path}.{own}" if path else f"module.{own}": names[id(parameter)]
        for path, submodule in module.named_modules()
        for own, parameter in submodule.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    }

    def one_sample(row: Tensor, *v: Tensor) -> list[dict[str, Tensor]]:
        def call(values: dict[str, Tensor]) -> Tensor:
            swapped = {place: values[name] for place, name in places.items()}
            # Shared parameters are tied here: `tie_weights=True` does not restore a module that has
            # two names.
            output: Tensor = torch.func.functional_call(
                caller, swapped, (row.unsqueeze(0),), tie_weights=False
            )
            return output

        pull = torch.func.vjp(call, values)[1]
        return [pull(cotangent.unsqueeze(0))[0] for cotangent in v]

    try:
        results = torch.func.vmap(one_sample)(rows, *vs)
    except RuntimeError as error:
        raise GradientError(
            f'`engine="functional"` cannot run this forward pass: {error} HINT: use the engine '
            '"hooks" or "loop", or turn off gradient checkpointing.'
        ) from error
    return [_project(blocks, projector, gradients) for gradients in results]


class _Caller(nn.Module):
    """Gives a closure over `module` the parameters that `functional_call` swaps in."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, rows: Tensor) -> Tensor:
        return self._forward(rows)


def _parameters(blocks: Sequence[Block]) -> dict[str, nn.Parameter]:
    return {name: parameter for block in blocks for name, parameter in block.parameters.items()}


def _project(
    blocks: Sequence[Block], projector: BlockProjector, gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Blocks [B, p_out * p_in] from the gradients [B, *shape] of all traced parameters."""
    projected = {}
    for block in blocks:
        own = {
            own: gradients[name]
            for own, name in zip(block.own_names, block.parameters, strict=True)
        }
        with naming_extension(member_of(block, "matrix")):
            matrix = block.matrix(own)
        rows = len(next(iter(own.values())))
        require_shape(block, "matrix", matrix, rows, block.rows, block.cols)
        _refuse_incomplete(block, matrix, own)
        with full_precision(matrix.device):
            projected[block.name] = projector.project(block.name, matrix)
    return projected


def _refuse_incomplete(block: Block, matrix: Tensor, own: Mapping[str, Tensor]) -> None:
    """The loop reads gradients through the kind's own ``matrix``, so a kind that leaves some out, or
    scales them, would agree with itself."""
    found = matrix.flatten(1).double().square().sum(1)
    expected = torch.stack([g.flatten(1).double().square().sum(1) for g in own.values()]).sum(0)
    if not torch.allclose(found, expected, rtol=1e-3, atol=0.0, equal_nan=True):
        raise GradientError(
            f"{type(block).__name__}.matrix, of layer {block.name!r}: the squares of its entries add "
            f"up to {found.tolist()[0]:.4g}, those of the gradients of {list(own)} to "
            f"{expected.tolist()[0]:.4g}. HINT: the matrix has every entry of these gradients "
            "once, in any order."
        )


@contextmanager
def _requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that were frozen after the tracer was made take part while this lasts."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
