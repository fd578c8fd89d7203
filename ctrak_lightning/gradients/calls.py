"""One call of a traced layer: what is kept of it in the forward pass until its output's cotangent
arrives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients.layers import Layer
from ctrak_lightning.gradients.layouts import Layout
from ctrak_lightning.gradients.modes import full_precision
from ctrak_lightning.gradients.projection import BlockProjector


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

    def block(self, cotangent: Tensor, layout: Layout, projector: BlockProjector) -> Tensor:
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
        with full_precision(cotangent.device):
            return self.layer.contract(self.kept, cotangent.detach(), left, right, layout).flatten(
                1
            )


def record(
    layer: Layer,
    position: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    projector: BlockProjector,
) -> Call:
    """The call of a layer that a forward hook was told of."""
    x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
    _, right = projector.matrices(layer.name, x.device)
    with full_precision(x.device):
        kept = layer.keep(x, output, right)
    edge = get_gradient_edge(anchor(output))
    return Call(layer, position, edge, layer.leading(x), kept, kept._version)


def anchor(output: Tensor) -> Tensor:
    """The tensor at whose graph node the output's cotangent is taken.

    A Linear with a bias returns a view of a matrix. An in-place operation on that view gives it a
    new node, which would bypass the old one, but still leads to the node of the matrix.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
