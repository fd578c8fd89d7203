"""What the engines require of a forward pass and its cotangents, and errors that explain autograd's
own."""

from collections.abc import Callable, Iterator, Sequence
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
