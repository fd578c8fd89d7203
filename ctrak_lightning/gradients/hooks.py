"""The hook engine: one forward pass, one vector-Jacobian product per cotangent, for all samples of
a batch at once."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

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
from ctrak_lightning.gradients.layers import Layer, member_of, require_shape
from ctrak_lightning.gradients.layouts import Layout, Layouts
from ctrak_lightning.gradients.modes import full_precision
from ctrak_lightning.gradients.plan import SHOWN_NAMES
from ctrak_lightning.gradients.projection import BlockProjector
from ctrak_lightning.utilities.naming import place_of


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded call.

    Args:
        layer: what was called.
        position: the number of the call among the layer's own in this pass.
        edge: where the output's cotangent will arrive.
        leading: the sizes of the input's dimensions that hold rows (samples, positions, frames).
        kept: what is kept of the input, one entry for each of its rows.
        version: of ``kept``, to notice that it was overwritten.
    """

    layer: Layer
    position: int
    edge: GradientEdge
    leading: tuple[int, ...]
    kept: Tensor
    version: int

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.layer.name

    def gradient(self, cotangent: Tensor, layout: Layout, projector: BlockProjector) -> Tensor:
        """The call's share of the layer's projected gradient [B, p_out * p_in].

        Raises:
            GradientError: the input was overwritten in place after the layer had used it.
        """
        if self.kept._version != self.version:
            raise GradientError(
                f"The input of layer {self.name!r} was overwritten in place after the layer used "
                "it, expected it unchanged. HINT: exclude the layer with `layers=`, or make the "
                "operation after it not in-place."
            )
        left, right = projector.matrices(self.name, cotangent.device)
        with (
            full_precision(cotangent.device),
            naming_extension(member_of(self.layer, "contract")),
        ):
            part = self.layer.contract(self.kept, cotangent.detach(), left, right, layout)
        expected = (layout.batch_size, left.shape[1], right.shape[1])
        return require_shape(self.layer, "contract", part, *expected).flatten(1)


class Recording:
    """The calls of traced layers in one forward pass, of the thread that makes this.

    Args:
        layers: the traced layers.
        projector: their projections.
    """

    def __init__(self, layers: Sequence[Layer], projector: BlockProjector) -> None:
        self.calls: list[Call] = []
        self.without_graph: set[str] = set()
        """The layers that were called where no gradient flows."""
        self._layers, self._projector = layers, projector
        self._counts: Counter[str] = Counter()
        self._thread = get_ident()

    def is_another_threads(self) -> bool:
        """Whether this call is none of the pass."""
        return get_ident() != self._thread

    def add(
        self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Call:
        """The call of a layer that a forward hook was told of."""
        x = _input(args, kwargs).detach()
        _, right = self._projector.matrices(layer.name, x.device)
        with naming_extension(member_of(layer, "event_dims")):
            leading = layer.leading(x)
        with full_precision(x.device), naming_extension(member_of(layer, "keep")):
            kept = layer.keep(x, output, right)
        require_shape(layer, "keep", kept, math.prod(leading), None)
        edge, position = get_gradient_edge(anchor(output)), self._counts[layer.name]
        call = Call(layer, position, edge, leading, kept, kept._version)
        self._counts[layer.name] += 1
        self.calls.append(call)
        return call

    def require_graphs(self) -> None:
        """Raises a GradientError for layers that no recorded call has a gradient of."""
        if missing := sorted(self.without_graph - {call.name for call in self.calls}):
            raise GradientError(
                "These traced layers ran without a graph (`torch.no_grad()` or reentrant "
                f"checkpointing): {missing}. Expected gradients to flow through them. HINT: use "
                "checkpointing with `use_reentrant=False`, or exclude them with `layers=`."
            )

    def reached(
        self, nodes: Collection[Node], uses: Counter[Tensor], end: str, hint: str
    ) -> Counter[str]:
        """How many calls of each layer lead to what the graph was walked from.

        Args:
            nodes, uses: of :func:`walk`.
            end: what it was walked from, and ``hint``: what to do, for the message.

        Raises:
            GradientError: a parameter enters it in another way than by these calls.
        """
        reached = Counter(call.name for call in self.calls if call.edge.node in nodes)
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                if uses[parameter] > reached[layer.name]:
                    raise GradientError(
                        f"Parameter {name!r} enters the {end} {uses[parameter]} times, but only "
                        f"{reached[layer.name]} calls of its {type(layer.module).__name__} could "
                        f"be recorded. {hint}"
                    )
        return reached


def require_tensors(
    layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Raises a GradientError for a call whose input or output is no tensor: whatever kind it is
    registered with, such a layer cannot be followed."""
    x = _input(args, kwargs)
    if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
        raise GradientError(
            f"Layer {layer.name!r} ({type(layer.module).__name__}, traced by "
            f"{place_of(type(layer))}) was given {type(x).__name__} and returned "
            f"{type(output).__name__}, expected a tensor as first argument and as output. HINT: "
            "leave it out with `layers=`, or put what is to be traced into a module of its own "
            "that takes and gives one tensor."
        )


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def anchor(output: Tensor) -> Tensor:
    """The tensor at whose graph node the output's cotangent is taken.

    A Linear with a bias returns a view of a matrix. An in-place operation on that view gives it a
    new node, which would bypass the old one, but still leads to the node of the matrix.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


REENTRANT = "CheckpointFunctionBackward"
"""The graph's node of ``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)``."""


def hooked_vjps(
    layers: Sequence[Layer],
    projector: BlockProjector,
    layouts: Layouts,
    forward: Forward,
    cotangents: Sequence[Cotangent],
    rows: Tensor,
) -> list[dict[str, Tensor]]:
    """Projected per-sample gradients J^T v.

    Args:
        layers: the traced layers.
        projector: their projections.
        layouts: what has been seen of their layouts; calls that are new are looked at.
        forward: rows [B] -> e [B, ...], calling the traced module.
        cotangents: each (e, rows) -> v of e's shape.
        rows: the sample indices [B].

    Returns:
        for each cotangent, blocks [B, p_out * p_in] by name; a layer without a contribution is
        absent.

    Raises:
        GradientError: a layer's gradient would not be exact.
        NotBySampleError: the rows of some layers belong to no sample alone.
    """
    recorder = _Recorder(layers, projector, layouts, len(rows))
    with recorder.hooked():
        with recorder.recording():
            output = run_forward(forward, rows)
        recorder.check(output)
        has_silent = recorder.look(output)
        edges = [call.edge for call in recorder.calls]
        results = []
        for position, cotangent in enumerate(cotangents, start=1):
            v = run_cotangent(cotangent, output, rows)
            gradients = pull_back(
                [output], edges, [v], keep_graph=has_silent or position < len(cotangents)
            )
            if has_silent:
                recorder.look_again(output, gradients)
            results.append(recorder.blocks(gradients))
    return results


class _Recorder:
    def __init__(
        self, layers: Sequence[Layer], projector: BlockProjector, layouts: Layouts, batch_size: int
    ) -> None:
        self._recording = Recording(layers, projector)
        self.calls = self._recording.calls
        self._layers, self._projector, self._layouts = layers, projector, layouts
        self._batch_size = batch_size
        self._is_recording = False
        self._own = {layer.name: _weights(layer) for layer in layers}
        self._replaced: set[str] = set()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the layers; they stay during the backward passes, where checkpointing runs
        layers again."""
        handles = []
        try:
            for layer in self._layers:
                hook = self._hook(layer)
                handles.append(
                    layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The part in which calls are recorded."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def check(self, output: Tensor) -> None:
        """Refuses layers whose parameters influence the output in another way than by the recorded
        calls."""
        self._recording.require_graphs()
        if self._replaced:
            raise GradientError(
                "These traced layers were called with other weights than their own: "
                f"{sorted(self._replaced)[:SHOWN_NAMES]}. Expected those of the traced module, "
                "which are what a store holds. HINT: put the weights into the module instead of "
                "giving them to `torch.func.functional_call`."
            )
        nodes, uses = walk(output)
        if any(node.name() == REENTRANT for node in nodes):
            raise GradientError(
                "The network uses reentrant checkpointing, which gives no gradients but in a "
                "training step. Expected a graph that can be asked for gradients. HINT: use "
                "checkpointing with `use_reentrant=False`."
            )
        hint = (
            "HINT: if its weight is used without calling the layer, or its output is overwritten "
            'in place, exclude the layer with `layers=` or use `engine="loop"`.'
        )
        require_contribution(bool(self._recording.reached(nodes, uses, "output", hint)))

    def look(self, output: Tensor) -> bool:
        """Learns the layouts of calls that are new; whether there are any whose layout did not
        show."""
        self._layouts.follow([output], self.calls, self._batch_size)
        if self._layouts.fresh(self.calls, self._batch_size):
            self._layouts.learn([output], self.calls, self._batch_size)
        self._layouts.require(self.calls, self._batch_size)
        return bool(self._layouts.silent(self.calls, self._batch_size))

    def look_again(self, output: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Learns the layouts of calls that showed none, once a cotangent other than zero has come
        to them."""
        silent = (gradients[i] for i in self._layouts.silent(self.calls, self._batch_size))
        present = [gradient.count_nonzero() for gradient in silent if gradient is not None]
        if present and torch.stack(present).any():
            self._layouts.learn([output], self.calls, self._batch_size)

    def blocks(self, gradients: list[Tensor | None]) -> dict[str, Tensor]:
        """Blocks from the cotangents of the recorded calls' outputs; consumes the list to free them
        early."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for position, call in enumerate(self.calls):
            gradient, gradients[position] = gradients[position], None
            layout = self._layouts.find(call, self._batch_size)
            if gradient is not None and layout is not None:
                parts[call.name].append(call.gradient(gradient, layout, self._projector))
        return {name: torch.stack(several).sum(0) for name, several in parts.items()}

    def _hook(self, layer: Layer) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
        ) -> Tensor | None:
            if self._is_recording and self._recording.is_another_threads():
                return None
            require_tensors(layer, args, kwargs, output)
            if not torch.is_grad_enabled():
                if self._is_recording:
                    self._recording.without_graph.add(layer.name)
                return None
            replaced = None
            if not output.requires_grad:
                # A leaf, so that a frozen layer on a constant input has a cotangent; the clone may
                # be overwritten in place. Recomputation under checkpointing must do the same, or it
                # would save other tensors than the first pass.
                output = replaced = output.detach().requires_grad_().clone()
            if self._is_recording:
                pairs = zip(_weights(layer), self._own[layer.name], strict=True)
                if any(present is not own for present, own in pairs):
                    self._replaced.add(layer.name)
                self._recording.add(layer, args, kwargs, output)
                self._layouts.dtypes.add(output.dtype)
            return replaced

        return hook


def _weights(layer: Layer) -> list[Tensor]:
    return [getattr(layer.module, own) for own in layer.own_names]


def walk(output: Tensor) -> tuple[set[Node], Counter[Tensor]]:
    """All nodes of an output's graph, and how many edges lead to each leaf that requires a
    gradient.

    Autocast casts a weight once and gives all who use it the copy, so edges to the copy are
    counted.
    """
    uses: Counter[Tensor] = Counter()
    root = output.grad_fn
    nodes: set[Node] = set() if root is None else {root}
    pending = list(nodes)
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is None:
                continue
            if (leaf := _leaf(node)) is not None:
                uses[leaf] += 1
            if node.name() != ACCUMULATE and node not in nodes:
                nodes.add(node)
                pending.extend([node] if leaf is None else [])
    return nodes, uses


ACCUMULATE = "torch::autograd::AccumulateGrad"


def _leaf(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates, or casts to the leaf's dtype; None of other
    nodes."""
    if node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0] or node
    return node.variable if node.name() == ACCUMULATE else None  # type: ignore[attr-defined]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a network's output, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from tensors_in(one)
    elif isinstance(output, Mapping) or hasattr(output, "__dict__"):
        yield from tensors_in(
            list(dict(output if isinstance(output, Mapping) else vars(output)).values())
        )
