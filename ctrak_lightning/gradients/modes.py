"""A network that is run for its traces and answers, and is afterwards as it was: also what its
forward pass changes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock, get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctrak_lightning.errors import GradientError, TrialError
from ctrak_lightning.utilities.dtypes import device_of
from ctrak_lightning.utilities.naming import modules_of, parameters_of

Attention = Literal["fused", "math"]
"""The kernels of ``scaled_dot_product_attention``: those that training takes, or the plain one."""

_lock = Lock()
_held: dict[int, list[int]] = {}
"""By a module's id, the thread that traces it and how many times over."""
_math_attention = ExitStack()
_tracing = 0


@contextmanager
def tracing_mode(
    module: nn.Module, *others: nn.Module, attention: Attention = "fused"
) -> Iterator[None]:
    """Evaluation mode, gradients on; everything is as before on exit, also after an error.

    Every submodule's own training flag is restored. Compiled submodules run eagerly. Autocast is
    off: what a training step has of it, a task's ``predict`` brings along
    (:func:`~ctrak_lightning.tasks.under_autocast`). One thread may nest it.

    Args:
        module: the network to be traced.
        others: further modules to put into that state, such as text encoders that are no part of
            it.
        attention: ``"fused"`` leaves the kernels as they are, so that memory is a training step's;
            ``"math"`` takes the plain one, which keeps all of a query's weights, and whose rounding
            does not depend on the batch or the device.

    Raises:
        GradientError: inference mode is on, where no gradient exists; or another thread traces one
            of the modules or a part of it.

    Example:
        >>> network = nn.Dropout(0.5).train()
        >>> with tracing_mode(network):
        ...     network.training
        False
        >>> network.training
        True
    """
    if torch.is_inference_mode_enabled():
        raise GradientError(
            "Tracing was started inside `torch.inference_mode()`, but needs autograd. HINT: wrap "
            "it in `with torch.inference_mode(False):` and `.clone()` there every tensor that was "
            "made in inference mode."
        )
    roots = (module, *others)
    with ExitStack() as stack:
        if attention == "math":
            stack.enter_context(_without_fused_attention())
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(device_of(root).type for root in roots)} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        if _is_held_by_this_thread(roots):
            # In that state already, with all of their parts: of a capture's many passes each would
            # go through hundreds of modules.
            yield
            return
        submodules = [submodule for root in roots for submodule in root.modules()]
        stack.enter_context(_held_by_this_thread(submodules))
        if any(map(is_compiled, submodules)):
            # A compiled graph does not call the hooks of its layers.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluation(submodules))
        yield


def _is_held_by_this_thread(roots: Sequence[nn.Module]) -> bool:
    """Whether this thread traces all of these, or what they are parts of."""
    me = get_ident()
    with _lock:
        held = [_held.get(id(root), (None,))[0] for root in roots]
    return all(thread == me for thread in held) and not any(root.training for root in roots)


@contextmanager
def _held_by_this_thread(submodules: Sequence[nn.Module]) -> Iterator[None]:
    """Refuses a second thread, whose hooks would see this one's calls and who would restore this
    one's flags."""
    me = get_ident()
    with _lock:
        if any(_held.get(id(submodule), (me,))[0] != me for submodule in submodules):
            raise GradientError(
                f"Two threads trace one {type(submodules[0]).__name__}, or networks that share a "
                "part, at the same time: expected one thread at a time, since hooks and training "
                "flags are the module's. HINT: ask one question after the other, or give each "
                "thread a copy of the model."
            )
        for submodule in submodules:
            _held.setdefault(id(submodule), [me, 0])[1] += 1
    try:
        yield
    finally:
        with _lock:
            for submodule in submodules:
                held = _held[id(submodule)]
                held[1] -= 1
                if not held[1]:
                    del _held[id(submodule)]


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """The math backend of attention, whose switch is the process's: the last of several threads to
    leave restores it."""
    global _tracing
    with _lock:
        _tracing += 1
        if _tracing == 1:
            _math_attention.enter_context(sdpa_kernel(SDPBackend.MATH))
    try:
        yield
    finally:
        with _lock:
            _tracing -= 1
            if not _tracing:
                _math_attention.close()


@contextmanager
def evaluation(submodules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode of these modules, each by its own flag; each is as before on exit, also after
    an error."""
    flags = [(submodule, submodule.training) for submodule in submodules]
    try:
        for submodule, _ in flags:
            # Not `.eval()`: an overridden `train()` may have effects of its own, such as merging
            # weights.
            submodule.training = False
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has this module itself."""
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        # Lightning puts a compiled LightningModule back to itself and notes it here.
        or getattr(module, "_compiler_ctx", None) is not None
    )


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: by default convolutions on a GPU have 10 bits of them (TF32)."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    exact: Any = "ieee"
    places, name = [backends.cuda.matmul, getattr(backends.cudnn, "conv", None)], "fp32_precision"
    if not hasattr(places[0], name):  # before torch 2.9
        places, name, exact = [backends.cuda.matmul, backends.cudnn], "allow_tf32", False
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast on this device: what is projected here stays float32."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


_SHOWN = 5


@contextmanager
def undisturbed(
    module: nn.Module, *others: nn.Module, attention: Attention = "fused"
) -> Iterator[Callable[[], list[str]]]:
    """:func:`tracing_mode`, and buffers are as before on exit, also after an error: a counter of
    calls, running statistics that are taken in evaluation mode too. Buffers that were replaced by
    other tensors are put back.

    Args:
        module: the network to be traced.
        others: further modules that are run with it.
        attention: as of :func:`tracing_mode`.

    Yields:
        what gives the names of the buffers that have changed so far.
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    for root in (module, *others):
        for prefix, owner in modules_of(root):
            owners.setdefault(id(owner), (f"{prefix}." if prefix else "", owner))
    with tracing_mode(module, *others, attention=attention):
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
