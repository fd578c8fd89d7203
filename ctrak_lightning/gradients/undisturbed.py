"""A network that is run for its traces and answers, and is afterwards as it was: also what its
forward pass changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import TrialError
from ctrak_lightning.gradients.modes import tracing_mode
from ctrak_lightning.naming import modules_of, parameters_of

_SHOWN = 5


@contextmanager
def undisturbed(module: nn.Module, *others: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """:func:`tracing_mode`, and buffers are as before on exit, also after an error: a counter of
    calls, running statistics that are taken in evaluation mode too. Buffers that were replaced by
    other tensors are put back.

    Args:
        module: the network to be traced.
        others: further modules that are run with it.

    Yields:
        what gives the names of the buffers that have changed so far.
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    for root in (module, *others):
        for prefix, owner in modules_of(root):
            owners.setdefault(id(owner), (f"{prefix}." if prefix else "", owner))
    with tracing_mode(module, *others):
        kept = [
            (prefix, owner, name, buffer, None if buffer is None else buffer.detach().clone())
            for prefix, owner in owners.values()
            for name, buffer in owner._buffers.items()
        ]
        try:
            yield lambda: sorted(
                f"{prefix}{name}"
                for prefix, owner, name, _, value in kept
                if value is not None and not _is_still(owner._buffers.get(name), value)
            )
        finally:
            for _, owner, name, buffer, value in kept:
                owner._buffers[name] = buffer
                if buffer is not None and value is not None and not _equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)


@contextmanager
def parameters_unmoved(module: nn.Module) -> Iterator[None]:
    """Refuses a network whose forward pass changes its parameters: they cannot be kept twice, and
    training would start from others.

    Raises:
        TrialError: so it does; names them.
    """
    versions = {
        name: value._version
        for name, value in parameters_of(module).items()
        if not value.is_inference()
    }
    yield
    moved = [
        name
        for name, value in parameters_of(module).items()
        if name in versions and value._version != versions[name]
    ]
    if moved:
        raise TrialError(
            f"A pass without a training step changed {len(moved)} parameters, such as "
            f"{moved[:_SHOWN]}; expected a forward pass that leaves them alone. HINT: a layer that "
            "takes its first values from the first batch (ActNorm) must have seen one before "
            "training starts: call the network once on a batch of yours before `fit`."
        )


def _is_still(buffer: Tensor | None, value: Tensor) -> bool:
    return buffer is not None and _equal(buffer, value)


def _equal(buffer: Tensor, value: Tensor) -> bool:
    # NaN is no sign of a change here, and a copy costs no more than a comparison that finds one.
    return buffer.shape == value.shape and torch.equal(buffer, value)
