"""Convolutions, and their transposes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ctrak_lightning.gradients.kinds.linear import LinearLayer
from ctrak_lightning.gradients.layers import register_layer
from ctrak_lightning.gradients.layouts import Layout

TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvLayer(LinearLayer):
    """nn.Conv1d, 2d and 3d: [out, in / groups * kernel (+ 1)], as in torch's weight layout.

    Convolving with P_in as the kernel projects every patch without unfolding it.
    """

    group: ClassVar[str] = "convolution"

    def event_dims(self, x: Tensor) -> int:
        return len(self.layer.kernel_size) + 1

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        groups, p_in = self.layer.groups, right.shape[1]
        positions = output.shape[-len(self.layer.kernel_size) :].numel()
        weight, bias = self._split(right)
        if weight is None:
            return right.expand(output.numel() // (self.rows * positions), groups, 1, positions)
        bias = None if bias is None else bias.repeat(groups)
        patches = self.project_patches(x.float(), weight, bias, output)
        return patches.reshape(-1, groups, p_in, positions)

    def project_patches(
        self, x: Tensor, right: Tensor, bias: Tensor | None, output: Tensor
    ) -> Tensor:
        """What of the input meets each output position, times P_in ``right`` [in / groups * kernel,
        p_in]: [..., groups * p_in, *positions]."""
        kernel = right.mT.reshape(-1, *self.layer.weight.shape[1:])  # [p_in, in / groups, *kernel]
        kernel = kernel.repeat(self.layer.groups, *[1] * (kernel.dim() - 1))
        # The layer's own method honours its stride, padding and padding mode.
        patches: Tensor = self.layer._conv_forward(x, kernel, bias)
        return patches

    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        images, groups, _, positions = kept.shape
        g = cotangent.reshape(images, groups, self.rows // groups, positions).float()
        sides = left.reshape(groups, self.rows // groups, -1).mT.expand(images, -1, -1, -1)
        # Images and groups are further positions to sum over: [B, F, groups, p_out, L].
        return (
            _join_positions(layout.by_sample(sides @ g))
            @ _join_positions(layout.by_sample(kept)).mT
        )


@register_layer(*TRANSPOSES)
class ConvTransposeLayer(ConvLayer):
    """nn.ConvTranspose1d, 2d and 3d: [out, in / groups * kernel (+ 1)], where torch's weight is
    [in, out / groups, *kernel]."""

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        self.rows = module.out_channels
        taps = module.weight.numel() // module.out_channels  # in / groups * kernel
        self.cols = taps * self.has_weight + self.has_bias

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        if not self.has_weight:
            return super().matrix(gradients)
        groups, weight = self.layer.groups, gradients["weight"]  # [B, in, out / groups, *kernel]
        split = weight.unflatten(1, (groups, -1)).transpose(2, 3)
        return super().matrix({**gradients, "weight": split.flatten(1, 2)})

    def project_patches(
        self, x: Tensor, right: Tensor, bias: Tensor | None, output: Tensor
    ) -> Tensor:
        layer, dims = self.layer, len(self.layer.kernel_size)
        # [in / groups * kernel, p_in] as [in, p_in, *kernel], the same for each group
        kernel = right.reshape(-1, *layer.kernel_size, right.shape[1]).movedim(-1, 1)
        kernel = kernel.repeat(layer.groups, *[1] * (dims + 1))
        # Of the output's size, not of the layer: the caller may have given `output_size`.
        smallest = (
            (length - 1) * stride - 2 * cut + dilation * (size - 1) + 1
            for length, stride, cut, dilation, size in zip(
                x.shape[-dims:],
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.kernel_size,
                strict=True,
            )
        )
        padding = [size - least for size, least in zip(output.shape[-dims:], smallest, strict=True)]
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return transposed(
            x, kernel, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


def _join_positions(maps: Tensor) -> Tensor:
    """[B, F, groups, p, L] as [B, p, F * groups * L]."""
    return maps.permute(0, 3, 1, 2, 4).flatten(2)
