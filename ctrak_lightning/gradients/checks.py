"""What the engines require of a forward pass and its cotangents, and errors that explain autograd's
own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ctrak_lightning import errors
from ctrak_lightning.errors import ExtensionError, GradientError
from ctrak_lightning.utilities.memory import is_out_of_memory

Forward = Callable[[Tensor], Tensor]
Cotangent = Callable[[Tensor, Tensor], Tensor]


def run_forward(forward: Forward, rows: Tensor) -> Tensor:
    """The network's output [B, ...] for these rows, with its graph.

    Raises:
        GradientError: it is not a floating-point tensor with one row per sample and a graph.
    """
    with explained_errors():
        output = forward(rows)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        given = f"{output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise GradientError(
            f"`forward(rows)` returned {given}, expected the network's floating-point output. "
            "HINT: with diffusers, take `model(..., return_dict=False)[0]`."
        )
    if output.dim() == 0 or len(output) != len(rows):
        raise GradientError(
            f"`forward(rows)` returned shape {tuple(output.shape)} for {len(rows)} rows, expected "
            f"[{len(rows)}, ...]. HINT: index the inputs with `rows` and keep the batch dimension."
        )
    if not output.requires_grad:
        raise GradientError(
            "`forward(rows)` returned an output without a graph, so no traced parameter has a "
            "gradient. HINT: it must call the traced module, without `torch.no_grad()`, "
            "`.detach()` or reentrant checkpointing."
        )
    return output


def run_cotangent(cotangent: Cotangent, output: Tensor, rows: Tensor) -> Tensor:
    """The cotangent v of an output, detached, in its shape and dtype.

    Raises:
        GradientError: v has another shape.
    """
    with explained_errors():
        v = cotangent(output, rows)
    if not isinstance(v, Tensor) or v.shape != output.shape:
        given = f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        raise GradientError(
            f"`cotangent(e, rows)` returned {given}, expected e's shape {tuple(output.shape)}. "
            "HINT: return one number per element of e; the scalar loss itself is never needed."
        )
    return v.detach().to(output)


class Scaled:
    """A cotangent whose rows are scaled to a largest entry of about 1, by powers of two.

    Args:
        cotangent: what is scaled.
        batch_size: rows are numbers below this.
    """

    def __init__(self, cotangent: Cotangent, batch_size: int) -> None:
        self._cotangent = cotangent
        self._exponents: Tensor | None = None  # [batch_size], of the powers
        self._batch_size = batch_size

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        v = self._cotangent(output, rows)
        if not isinstance(v, Tensor) or v.shape != output.shape or not v.is_floating_point():
            return v  # refused by who asked
        # Wide before it is scaled: it would lose its small numbers in the output's own dtype.
        v = v.detach() if v.dtype == torch.float64 else v.detach().float()
        largest = v.flatten(1).abs().amax(1) if v.dim() > 1 else v.abs()  # [b]
        exponents = torch.frexp(largest).exponent.clamp(-_LARGEST, _LARGEST)
        exponents = exponents.where(largest.isfinite(), 0)
        if self._exponents is None:
            self._exponents = exponents.new_zeros(self._batch_size)
        self._exponents[rows] = exponents
        return torch.ldexp(v, -exponents.view(-1, *(1,) * (v.dim() - 1)))

    def undone(self, blocks: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Blocks [b, ...] of these rows as of the cotangent itself."""
        if self._exponents is None:
            return dict(blocks)
        exponents = self._exponents[rows][:, None]
        return {name: torch.ldexp(block, exponents) for name, block in blocks.items()}


_LARGEST = 100
"""Of exponents, so that the powers themselves are finite in float32."""


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vs: Sequence[Tensor],
    keep_graph: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad` of outputs with respect to tensors or graph edges; an unused one gives
    None."""
    with explained_errors():
        return list(
            torch.autograd.grad(outputs, inputs, vs, retain_graph=keep_graph, allow_unused=True)
        )


def require_contribution(has_any: bool) -> None:
    """Raises a GradientError where no traced parameter is in the output's graph."""
    if not has_any:
        raise GradientError(
            "The output of `forward(rows)` does not depend on any traced parameter. Expected it "
            "to call the traced module. HINT: give the tracer the module that `forward` calls; "
            "avoid `torch.no_grad()` and reentrant checkpointing."
        )


TYPED = tuple(
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
"""The library's own errors, which say what to do."""


@contextmanager
def naming_extension(what: str) -> Iterator[None]:
    """Says of an error which extension raised it: ``what`` is its place, the member and the layer.

    The library's own errors and those of memory (for RowLimit) pass as they are.

    Raises:
        ExtensionError: something else was raised inside, which is its cause.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TYPED) or is_out_of_memory(error):
            raise
        hint = next(
            (hint for symptom, hint in _HINTS.items() if symptom in str(error)),
            "the error is that member's own, and not one of the data or the network.",
        )
        raise ExtensionError(
            f"{what} raised {type(error).__name__}: {error} HINT: {hint}"
        ) from error


@contextmanager
def explained_errors() -> Iterator[None]:
    """Turns the autograd errors that a user can cause into GradientErrors that say what to do."""
    try:
        yield
    except RuntimeError as error:
        for symptom, hint in _HINTS.items():
            if symptom in str(error):
                raise GradientError(f"Tracing failed in autograd: {error} HINT: {hint}") from error
        raise


_HINTS = {
    "use_reentrant": (
        "turn on gradient checkpointing with `use_reentrant=False`; reentrant checkpointing "
        "cannot be traced."
    ),
    "second time": "a cotangent that calls `torch.autograd.grad` must pass `retain_graph=True`.",
    "modified by an inplace operation": "an operation such as `ReLU(inplace=True)` overwrites what a gradient needs.",
    "Inference tensor": "clone the tensors that were made under `torch.inference_mode()`.",
}
