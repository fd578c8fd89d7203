"""A logical GPU for a PyTorch without one: tensors on a device of their own whose numbers are on the
CPU.

Everything runs on it (autograd, hooks, adapters, diffusers), and what a GPU would refuse is refused:
tensors of two devices in one operation, ``.numpy()``. What a GPU would have to copy or wait for is
noted with its place in the library.

    with logical_gpu() as log:
        module.to(GPU)

The device is PrivateUse1, registered from Python, which PyTorch calls experimental: all that depends
on it is in this file, and it is used in a process of its own. (FakeTensorMode does not do: without
CUDA in the build autograd finds no device guard for a tensor that requires grad.)
"""

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

NAME = "gpu"
PACKAGE = "ctrak_lightning"


class _Backend(backend_registration._DummyBackendModule):
    """``torch.gpu``: what PyTorch, autocast and fork_rng ask of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        if _LOGS:
            _LOGS[-1].log.note("synchronize")

    def empty_cache(self) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
GPU = torch.device(NAME, 0)
aten = torch.ops.aten
_INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
}
_COPIES = {aten._to_copy.default, aten.copy_.default}
_WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.is_nonzero.default: "bool",
    aten.equal.default: "equal",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
}
WAITS = (*_WAITS.values(), "boolean index", "tolist", "synchronize")
"""What a GPU has to be waited for."""
TO_HOST, TO_DEVICE = "to host", "to device"


class DeviceMismatchError(RuntimeError):
    """Tensors of two devices in one operation."""


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on the logical GPU."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=GPU,
            requires_grad=False,
        )
        made.elem = elem
        return made

    def __tensor_flatten__(self) -> Any:
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> "OnGpu":
        return OnGpu(inner["elem"])

    def tolist(self) -> Any:
        if _LOGS:
            _LOGS[-1].log.note("tolist")
        return self.elem.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on the logical GPU to numpy. Use Tensor.cpu().")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _LOGS:
            raise RuntimeError(f"{func}: a tensor of the logical GPU outside of logical_gpu()")
        return _LOGS[-1].run(func, args, kwargs or {})


@dataclass
class Log:
    """What was copied between the devices, and waited for, by kind and place."""

    events: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, kind: str) -> None:
        self.events[kind, _place()] += 1

    def total(self, *kinds: str) -> int:
        return sum(n for (kind, _), n in self.events.items() if kind in kinds)

    def table(self) -> str:
        return "\n".join(f"{n:6d}  {kind:14s} {at}" for (kind, at), n in self.events.most_common())


def _place() -> str:
    """The innermost line of the package, or else of what is not PyTorch."""
    other = "?"
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"/{PACKAGE}/" in name:
            return f"{name.split(f'/{PACKAGE}/')[-1]}:{frame.f_lineno}"
        if other == "?" and "/torch/" not in name and __file__ != name:
            other = f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other


def _is_here(value: Any) -> bool:
    return isinstance(value, OnGpu)


class _Mode(TorchDispatchMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch._C._DisablePythonDispatcher():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [value for value in tree_flatten((args, kwargs))[0] if _is_tensor(value)]
        here = [value for value in tensors if _is_here(value)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        makes_here = target is not None and target.type == NAME
        self._look(func, args, here, tensors)
        self._note(func, args, here, target)
        inner, options = tree_map(lambda v: v.elem if _is_here(v) else v, (args, kwargs))
        if makes_here:
            if options.get("generator") is not None:
                raise RuntimeError("Expected a generator of the logical GPU, found one of the CPU.")
            options["device"] = torch.device("cpu")
        if options.get("pin_memory"):
            options["pin_memory"] = False
        with torch._C._DisableTorchDispatch():
            out = func(*inner, **options)
        if target is not None and not makes_here:
            is_same = func is aten._to_copy.default and _is_here(args[0]) and out is args[0].elem
            return out.clone() if is_same else out
        if not here and not makes_here:
            return out
        if func is aten.copy_.default and not _is_here(args[0]):
            return args[0]
        if func is aten._local_scalar_dense.default:
            return out
        wrapped = tree_map(lambda v: OnGpu(v) if _is_tensor(v) and not _is_here(v) else v, out)
        if func._schema.name.endswith("_to_copy") or not here:
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _look(self, func: Any, args: Any, here: list[Any], tensors: list[Any]) -> None:
        """Refuses tensors of two devices; a number, and an index, may come from the CPU."""
        wide = [v for v in tensors if not _is_here(v) and v.device.type == "cpu" and v.dim() > 0]
        if not here or not wide or func in _COPIES:
            return
        if func in _INDEXED and _is_here(args[0]) and (len(args) < 3 or not _is_wide(args[2])):
            for _ in wide:
                self.log.note(TO_DEVICE)
            return
        shapes = [(tuple(value.shape), str(value.device)) for value in tensors]
        raise DeviceMismatchError(
            f"Expected all tensors to be on the same device: {func}, {shapes}"
        )

    def _note(self, func: Any, args: Any, here: list[Any], target: torch.device | None) -> None:
        if func in _WAITS and here:
            self.log.note(_WAITS[func])
        if func in _INDEXED and here:
            for index in args[1]:
                if _is_here(index) and index.dtype in (torch.bool, torch.uint8):
                    self.log.note("boolean index")
        if func is aten._to_copy.default:
            to = target or args[0].device
            if _is_here(args[0]) != (to.type == NAME):
                self.log.note(TO_HOST if _is_here(args[0]) else TO_DEVICE)
        if func is aten.copy_.default and _is_tensor(args[1]):
            moves = _is_here(args[0]) != _is_here(args[1])
            if moves and (args[1].dim() > 0 or not _is_here(args[0])):
                self.log.note(TO_DEVICE if _is_here(args[0]) else TO_HOST)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_wide(value: Any) -> bool:
    return _is_tensor(value) and not _is_here(value) and value.dim() > 0


def _indexed(value: Any) -> Any:
    """``"cuda"``, and ``"gpu"`` without a number, are the logical device."""
    if isinstance(value, str) and value in ("cuda", "cuda:0", NAME):
        return GPU
    if isinstance(value, torch.device) and (value.type == "cuda" or value == torch.device(NAME)):
        return GPU
    return value


class _Indexed(TorchFunctionMode):
    """``tensor.to("cuda")`` goes to the logical device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(GPU)
        named = {name: _indexed(value) for name, value in (kwargs or {}).items()}
        return func(*map(_indexed, args), **named)


_LOGS: list[_Mode] = []


def _below(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What reaches the device's own key, past the modes: tensors that indexing with a list makes."""
    if not _LOGS:
        raise RuntimeError(f"{func}: the logical GPU outside of logical_gpu()")
    if func in (aten.empty.memory_format, aten.empty_strided.default):
        return OnGpu(func(*args, **(kwargs | {"device": "cpu"})))
    return _LOGS[-1].run(func, args, kwargs)


_LIBRARY = torch.library.Library("aten", "IMPL")
for _name in ("empty.memory_format", "empty_strided", "copy_", "_copy_from", "_local_scalar_dense"):
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(aten, _packet), _overload or "default")
    _LIBRARY.impl(
        _name, lambda *args, _op=_op, **kwargs: _below(_op, *args, **kwargs), "PrivateUse1"
    )


@contextlib.contextmanager
def logical_gpu() -> Iterator[Log]:
    """Inside, ``device="cuda"`` works; yields the log."""
    mode = _Mode(Log())
    _LOGS.append(mode)
    try:
        with (
            # The engine has no thread for a device that is not there.
            torch.autograd.set_multithreading_enabled(False),
            mode,
            _Indexed(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
            yield mode.log
    finally:
        _LOGS.pop()
