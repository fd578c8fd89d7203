"""Which rows of a layer's input belong to which sample: seen from the gradients, not guessed from
shapes.

A row belongs to the sample whose output its cotangent comes from. Some backward passes show that
for all layers at once, whatever the order of dimensions: [B, T, C], [T, B, C], [F * B, C, H, W], a
table that all samples share, or texts without their padding.
"""

import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ctrak_lightning.gradients.checks import pull_back

_SELECTING = re.compile(
    "index|gather|scatter|maskedselect|take|sort|topk|kthvalue|embedding|segmentreduce|nested|jagged|sparse|copyslices|varlen"
    "|^flashattention|^efficientattention",
    re.IGNORECASE,
)
"""Nodes whose ways depend on data; attention of these names is that of packed texts, which torch
tells from its others."""

_CUTTING = {
    "AsStridedBackward0": ("size", "stride", "storage_offset"),
    "ConstantPadNdBackward0": ("pad",),
    "FlipBackward0": ("dims",),
    "RollBackward0": ("dims", "shifts"),
    "SelectBackward0": ("dim", "index"),
    "SliceBackward0": ("dim", "start", "end", "step"),
    "SplitBackward0": ("dim", "split_size"),
    "SplitWithSizesBackward0": ("dim", "split_sizes"),
}
"""Nodes whose ways depend on numbers that need not follow from shapes, and where these are."""


@dataclass(frozen=True, slots=True)
class Routes:
    """The ways to some outputs.

    Args:
        cuts: one value for all graphs that cut and join tensors at the same places.
        chosen: nodes from which all or some ways depend on data beside.
    """

    cuts: Hashable
    chosen: frozenset[Node]


def routes(outputs: Sequence[Tensor]) -> Routes:
    """The ways from all nodes of the graph to these outputs; no tensor that the graph saved is
    touched."""
    cuts: list[Hashable] = []
    chosen: list[Node] = []
    for node in _reached_from([output.grad_fn for output in outputs if output.grad_fn is not None]):
        name = node.name()
        if _SELECTING.search(name):
            chosen += following_nodes(node)
        cuts += [getattr(node, f"_saved_{one}") for one in _CUTTING.get(name, ())]
        cuts += [number for _, number in node.next_functions if number]
    return Routes(hash(tuple(cuts)), frozenset(_reached_from(chosen)))


def _reached_from(nodes: Sequence[Node]) -> Iterator[Node]:
    """These nodes and all that they lead to, each once, in an order that the graph fixes."""
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += following_nodes(node)


def following_nodes(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


REMEMBERED_CUTS = 64
"""After layouts for graphs that cut tensors at so many other places, all are forgotten, so that
their number stays bounded."""


class RecordedCall(Protocol):
    """What is asked of a call of a layer (:class:`~ctrak_lightning.gradients.hooks.Call`)."""

    @property
    def name(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def edge(self) -> GradientEdge: ...
    @property
    def leading(self) -> tuple[int, ...]: ...


class NotBySampleError(Exception):
    """Layers whose rows no layout sorts by sample, since samples share them or they come in no
    regular order.

    Why: of these a hook cannot say whose gradient is whose.

    What to do: nothing: it is caught inside the library, which traces these layers by a pass per
    sample.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = list(names)


class Layouts:
    """The layouts of layers' calls, as far as they have been seen.

    A layout holds for a call of a layer, by its number in a pass, with rows of one shape in a batch
    of one size, and a graph that cuts tensors at the same places; so each is looked for once, but
    for calls whose rows an index leads to the output, which are looked at in every pass. A call
    without gradient (a LoRA before its first step) shows nothing, and is looked at again when it
    has one. A pass is :meth:`follow`, then all other methods.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, Layout | None] = {}
        self.dtypes: set[torch.dtype] = set()
        """Of the layers' outputs, under autocast others than the parameters'."""
        self._silent: set[Hashable] = set()
        self._chosen: set[Hashable] = set()
        self._cuts: Hashable = None
        self._remembered: set[Hashable] = set()

    def follow(
        self, outputs: Sequence[Tensor], calls: Sequence[RecordedCall], batch_size: int
    ) -> None:
        """Takes up a pass with these outputs and calls; forgets what need not hold in it."""
        if batch_size == 1:
            return
        found = routes(outputs)
        self._cuts = found.cuts
        self._remembered.add(found.cuts)
        if len(self._remembered) > REMEMBERED_CUTS:
            self._remembered = {found.cuts}
            self._seen, self._silent = {}, set()
        self._chosen = {
            self._key(call, batch_size) for call in calls if call.edge.node in found.chosen
        }
        for key in self._chosen:
            self._seen.pop(key, None)
            self._silent.discard(key)

    def find(self, call: RecordedCall, batch_size: int) -> "Layout | None":
        """The layout of a call; where it has not shown, for want of a gradient, batch first, or
        None if that cannot be."""
        seen = self._seen.get(self._key(call, batch_size))
        inner, remainder = divmod(math.prod(call.leading), batch_size)
        return seen or (None if remainder else Layout(outer=1, batch_size=batch_size, inner=inner))

    def fresh(self, calls: Sequence[RecordedCall], batch_size: int) -> bool:
        """Whether any of these calls was never looked at, or has to be looked at in every pass."""
        keys = [self._key(call, batch_size) for call in calls]
        return batch_size > 1 and any(
            key not in self._seen and key not in self._silent for key in keys
        )

    def silent(self, calls: Sequence[RecordedCall], batch_size: int) -> list[int]:
        """Which of these calls were looked at without result."""
        if batch_size == 1 or not self._silent:
            return []
        return [i for i, call in enumerate(calls) if self._key(call, batch_size) in self._silent]

    def learn(
        self, outputs: Sequence[Tensor], calls: Sequence[RecordedCall], batch_size: int
    ) -> None:
        """Looks at those calls of a pass whose layout is not known; the graph stays.

        Args:
            outputs: of the pass, each [B, ...].
            calls: those recorded in it.
            batch_size: B.

        Raises:
            NotBySampleError: no layout sorts the rows of some layers; names them all.
        """
        unknown = [call for call in calls if self._key(call, batch_size) not in self._seen]
        groups = _groups(batch_size)
        for call, reached in zip(unknown, _reached(outputs, unknown, groups), strict=True):
            key = self._key(call, batch_size)
            if not reached.any():
                self._silent.add(key)
                continue
            self._silent.discard(key)
            self._seen[key] = _layout(call.leading, groups, reached)
        self.require(calls, batch_size)

    def learn_by_shape(self, calls: Sequence[RecordedCall], batch_size: int) -> None:
        """Takes the layouts of calls that shapes leave one possibility, where gradients cannot be
        asked for.

        Raises:
            NotBySampleError: shapes leave none, or several, or it is not shapes that decide.
        """
        for call in calls:
            key, candidates = self._key(call, batch_size), _candidates(call.leading, batch_size)
            self._silent.discard(key)
            is_only = len(candidates) == 1 and key not in self._chosen
            self._seen[key] = candidates[0] if is_only else None
        self.require(calls, batch_size)

    def require(self, calls: Sequence[RecordedCall], batch_size: int) -> None:
        """Raises NotBySampleError for calls that are known to have no layout."""
        keys = {self._key(call, batch_size): call.name for call in calls}
        names = {
            name for key, name in keys.items() if key in self._seen and self._seen[key] is None
        }
        if batch_size > 1 and names:
            raise NotBySampleError(sorted(names))

    def _key(self, call: RecordedCall, batch_size: int) -> Hashable:
        return call.name, call.position, call.leading, batch_size, self._cuts


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows in the order [outer, B, inner]: batch first where ``outer`` is 1, batch last where
    ``inner`` is."""

    outer: int
    batch_size: int
    inner: int

    def by_sample(self, rows: Tensor) -> Tensor:
        """Rows [outer * B * inner, ...] as [B, outer * inner, ...]; a view where the batch comes
        first."""
        split = rows.reshape(self.outer, self.batch_size, self.inner, *rows.shape[1:])
        return split.movedim(1, 0).flatten(1, 2)

    def owners(self) -> Tensor:
        """The sample of each row [outer * B * inner]."""
        rows = torch.arange(self.outer * self.batch_size * self.inner)
        return rows.div(self.inner, rounding_mode="floor") % self.batch_size


def _groups(batch_size: int) -> Tensor:
    """Groups of samples such that a row reached by exactly the groups of one sample is that
    sample's alone: bool [groups, B].

    Each sample alone, or, where that takes fewer, those with a bit of their number set and those
    without it: what two samples share is reached from both groups of a bit in which the two differ.
    """
    samples = torch.arange(batch_size)
    bits = [
        samples.bitwise_right_shift(bit) % 2 == 1 for bit in range((batch_size - 1).bit_length())
    ]
    coded = torch.stack([half for bit in bits for half in (bit, ~bit)])
    return coded if len(coded) < batch_size else torch.eye(batch_size, dtype=torch.bool)


def _layout(leading: Sequence[int], groups: Tensor, reached: Tensor) -> Layout | None:
    """The only layout under which each row is reached by its own sample alone, given groups [G, B]
    and [G, rows]."""
    known = reached.any(0)
    fitting = [
        layout
        for layout in _candidates(leading, groups.shape[1])
        if groups[:, layout.owners()[known]].equal(reached[:, known])
    ]
    return fitting[0] if len(fitting) == 1 else None


def _candidates(leading: Sequence[int], batch_size: int) -> list[Layout]:
    """The layouts that put the batch into one dimension, alone or beside frames or positions."""
    found = []
    for dim, size in enumerate(leading):
        rest, remainder = divmod(size, batch_size)
        if remainder:
            continue
        before, after = math.prod(leading[:dim]), math.prod(leading[dim + 1 :])
        outers = (outer for outer in range(1, rest + 1) if rest % outer == 0)
        found += [Layout(before * outer, batch_size, rest // outer * after) for outer in outers]
    return list(dict.fromkeys(found))


def _reached(
    outputs: Sequence[Tensor], calls: Sequence[RecordedCall], groups: Tensor
) -> list[Tensor]:
    """For each call which rows the cotangents of which groups of samples [G, B] reach: bool [G,
    rows], on the CPU."""
    found: list[list[Tensor | None]] = [[None] * len(groups) for _ in calls]
    present = 0

    def note(i: int, cotangent: Tensor | None) -> None:
        if cotangent is not None:
            rows = cotangent.reshape(math.prod(calls[i].leading), -1)
            # What is not finite says nothing: zero times infinity is not zero.
            found[i][present] = (rows.ne(0) & rows.isfinite()).any(1)

    handles = [
        call.edge.node.register_prehook(
            lambda cotangents, i=i, nr=call.edge.output_nr: note(i, cotangents[nr])
        )
        for i, call in enumerate(calls)
    ]
    deepest = _deepest([call.edge.node for call in calls])
    edges = [calls[i].edge for i in deepest]
    try:
        for present, samples in enumerate(groups):  # noqa: B007, as `note` reads it
            v = [_cotangent(output, samples) for output in outputs]
            # Asked for are the deepest alone, so that not all cotangents are held at once; the
            # others pass by their hooks.
            for i, cotangent in zip(
                deepest, pull_back(outputs, edges, v, keep_graph=True), strict=True
            ):
                note(i, cotangent)
    finally:
        for handle in handles:
            handle.remove()
    sizes = [math.prod(call.leading) for call in calls]
    device = outputs[0].device
    each = [
        torch.zeros(size, dtype=torch.bool, device=device) if row is None else row.to(device)
        for rows, size in zip(found, sizes, strict=True)
        for row in rows
    ]
    # One copy from the device for all of them.
    together = torch.cat(each).cpu() if each else torch.zeros(0, dtype=torch.bool)
    parts = together.split([size * len(groups) for size in sizes])
    return [part.view(len(groups), size) for part, size in zip(parts, sizes, strict=True)]


def _cotangent(output: Tensor, samples: Tensor) -> Tensor:
    """Numbers without a pattern for some samples, zero for the others: of ones, a norm's gradient
    would vanish."""
    numbers = (
        torch.arange(output[0].numel(), device=output.device, dtype=torch.float32).mul(0.7).cos()
    )
    v = torch.zeros_like(output)
    v[samples.nonzero().flatten().to(output.device)] = numbers.reshape(output[0].shape).to(
        output.dtype
    )
    return v


def _deepest(nodes: Sequence[Node]) -> list[int]:
    """The positions of those nodes from which no other is reached."""
    wanted = set(nodes)
    reaches: dict[Node, bool] = {}
    for start in nodes:
        stack = [start]
        while stack:
            following = following_nodes(stack[-1])
            open_ones = [node for node in following if node not in reaches]
            if open_ones:
                stack += open_ones
            else:
                reaches[stack.pop()] = any(node in wanted or reaches[node] for node in following)
    return [i for i, node in enumerate(nodes) if not reaches[node]]
