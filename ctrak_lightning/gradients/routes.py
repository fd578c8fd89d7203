"""Whether the rows of a layer belong to the same samples in every batch: read from the graph
between the layer and the output.

Whose a row is shows where its way through the graph ends in the output. Where all operations on the
way are fixed by shapes, so is the end. An index is data, and what it picks may be another sample's
in the next batch. What is lost by this reading: samples that are told apart by numbers alone (a
mask of attention over all texts as one, a product with a table of zeros and ones).
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

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
