"""Tiny networks, each with inputs for SAMPLES samples, that the gradient tests trace."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ctrak_lightning.gradients import GradientTracer, Projection

SAMPLES = 6
TOLERANCE = 1e-5
PROJECTION = Projection(rank=4, dim=None, seed=3)


@dataclass
class Case:
    """A network, its inputs (each [SAMPLES, ...]) and how it is called with a selection of their
    rows."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor] = field(default=lambda module, *inputs: module(*inputs))

    def forward(self, rows: Tensor) -> Tensor:
        return self.call(self.module, *(value[rows] for value in self.inputs))

    def rows(self, start: int, stop: int) -> "Case":
        return Case(self.module, tuple(value[start:stop] for value in self.inputs), self.call)


def weighted(e: Tensor, rows: Tensor) -> Tensor:
    """A cotangent that is another one for every sample and element."""
    return (torch.arange(e[0].numel(), device=e.device) * 0.7 + 1.3).cos().reshape(e[0].shape) * (
        1 + e.detach()
    )


def sign(e: Tensor, rows: Tensor) -> Tensor:
    return e.detach().sign() / e[0].numel()


def features(
    case: Case,
    engine: Any = "hooks",
    projection: Projection = PROJECTION,
    cotangents: Any = (weighted,),
    batch_size: int | None = None,
    **options: Any,
) -> Tensor:
    """Features [B, k] of the first cotangent."""
    tracer = GradientTracer(case.module, projection, engine=engine, **options)
    return tracer.vjps(case.forward, list(cotangents), batch_size or len(case.inputs[0]))[0]


def row_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative norm of a row's difference."""
    assert ours.shape == theirs.shape
    assert theirs.norm(dim=1).min() > 0
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def randomized(module: nn.Module) -> nn.Module:
    """Moves all parameters off their initial values: zeros and ones hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def unet() -> Case:
    from diffusers import UNet2DModel

    module = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    inputs = (torch.randn(SAMPLES, 2, 8, 8), torch.arange(SAMPLES) * 100)
    return Case(randomized(module), inputs, lambda m, x, t: m(x, t, return_dict=False)[0])


def conditional_unet() -> Case:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    inputs = (
        torch.randn(SAMPLES, 2, 8, 8),
        torch.arange(SAMPLES) * 100,
        torch.randn(SAMPLES, 3, 12),
    )
    return Case(randomized(module), inputs, lambda m, x, t, c: m(x, t, c, return_dict=False)[0])


def lora_unet() -> Case:
    from peft import LoraConfig

    case = conditional_unet()
    case.module.requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    case.module.add_adapter(config)  # type: ignore[operator]
    randomized(case.module)
    return case


def dit() -> Case:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        norm_num_groups=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = (torch.randn(SAMPLES, 2, 8, 8), torch.arange(SAMPLES) * 100, torch.arange(SAMPLES) % 4)

    def call(m: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return m(x, timestep=t, class_labels=y, return_dict=False)[0]

    return Case(randomized(module), inputs, call)


def convolution(module: nn.Module, *shape: int) -> Callable[[], Case]:
    return lambda: Case(randomized(module), (torch.randn(SAMPLES, *shape),))


def embedding() -> Case:
    module = nn.Sequential(nn.Embedding(9, 7, padding_idx=2), nn.Linear(7, 5))
    ids = torch.randint(9, (SAMPLES, 8))
    ids[:, :3] = 2
    ids[:, 3:6] = 5
    return Case(randomized(module), (ids,))


class TwiceCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(x).tanh())


class Decoder(nn.Module):
    """Halves and doubles sizes that are odd and even, which `output_size` tells."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.ConvTranspose2d(4, 6, 3, 2, 1),
        )

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        h = self.down(x).tanh() * (1 + number.view(-1, 1, 1, 1))
        return self.up(h, output_size=x.shape[2:])


class Frames(nn.Module):
    """Folds a dimension into the batch, as video networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 6)
        self.mix = nn.Linear(6, 5)
        self.scale = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x.flatten(0, 1)))
        h = self.scale(self.mix(h.flatten(2).mean(2)))
        return h.unflatten(0, x.shape[:2])


class FramesFirst(Frames):
    """Folds it with the frames before the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class BatchInside(nn.Module):
    """A layer whose input has the batch between two dimensions, and one that sees every sample
    twice, as under guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.twice = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.transpose(0, 1)).tanh().transpose(0, 1)  # x: [B, F, T, 5]
        with_, without = self.twice(torch.cat([h, 2 * h])).chunk(2)
        return without + 3 * with_.tanh()


class PositionsFirst(nn.Module):
    """torch's own transformer layer, which has positions before samples by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.layer.self_attn.requires_grad_(False)  # has no layer kind

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def positions_first(length: int) -> Callable[[], Case]:
    return lambda: Case(randomized(PositionsFirst()), (torch.randn(SAMPLES, length, 8),))


class Shared(nn.Module):
    """A layer whose input is the same for all samples, beside one of their own."""

    def __init__(self, layer: nn.Module, given: Tensor) -> None:
        super().__init__()
        self.layer, self.own = layer, nn.Linear(5, 5)
        self.register_buffer("given", given)

    def forward(self, x: Tensor) -> Tensor:
        return self.own((x + self.layer(self.given)).tanh())


def shared(layer: nn.Module, given: Tensor) -> Callable[[], Case]:
    return lambda: Case(randomized(Shared(layer, given)), (torch.randn(SAMPLES, 6, 5),))


class Routed(nn.Module):
    """A layer that sees the positions that a router sends to it, more of one sample than of
    another."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.last = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(0, -2)
        chosen = h[:, :1].gt(0.1).squeeze(1).nonzero().squeeze(1)
        return self.last(h.index_add(0, chosen, self.expert(h[chosen])).reshape(x.shape))


class Packed(nn.Module):
    """A layer that sees texts [B, T, 5] without their padding, which a mask takes off, or cuts of
    the texts' lengths put back."""

    def __init__(self, is_cut: bool) -> None:
        super().__init__()
        self.text, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.is_cut = is_cut

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        rows = self.text(x[mask]).tanh()
        if self.is_cut:
            return self.last(torch.stack([part.sum(0) for part in rows.split(lengths.tolist())]))
        return self.last(torch.zeros(len(x), 5).index_add(0, mask.nonzero()[:, 0], rows))


def packed(is_cut: bool) -> Case:
    lengths = torch.full((SAMPLES,), 3)
    return Case(randomized(Packed(is_cut)), (torch.randn(SAMPLES, 5, 5), lengths))


class Sorted(nn.Module):
    """A layer that sees the samples in the order of a key, as packed recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        order = key.argsort()
        return self.last(self.inner(x[order]).tanh()[order.argsort()])


def norms() -> Case:
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm

    module = nn.Sequential(
        nn.Linear(6, 6),
        nn.LayerNorm((3, 6)),
        nn.RMSNorm(6),
        nn.LayerNorm(6, bias=False),
        RMSNorm(6, eps=1e-3, bias=True),
        FP32LayerNorm(6),
        nn.GroupNorm(3, 3),
        nn.RMSNorm(6, eps=0.1),
    )
    return Case(randomized(module), (torch.randn(SAMPLES, 3, 6),))


def frozen(case: Case, *names: str) -> Case:
    """The case with exactly these parameters trainable."""
    for name, parameter in case.module.named_parameters():
        parameter.requires_grad_(name in names)
    return case


def partial(module: nn.Module, x: Tensor, *names: str) -> Callable[[], Case]:
    return lambda: frozen(Case(randomized(module), (x,)), *names)


LARGE: dict[str, Callable[[], Case]] = {
    "unet": unet,
    "conditional_unet": conditional_unet,
    "lora_unet": lora_unet,
    "dit": dit,
}
SMALL: dict[str, Callable[[], Case]] = {
    "linear_2d": lambda: Case(
        nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6)), (torch.randn(SAMPLES, 7),)
    ),
    "linear_4d": lambda: Case(nn.Linear(7, 5), (torch.randn(SAMPLES, 2, 3, 7),)),
    "linear_no_bias": lambda: Case(nn.Linear(7, 5, bias=False), (torch.randn(SAMPLES, 3, 7),)),
    "linear_weight_only": partial(nn.Linear(7, 5), torch.randn(SAMPLES, 3, 7), "weight"),
    "linear_bias_only": partial(nn.Linear(7, 5), torch.randn(SAMPLES, 3, 7), "bias"),
    "conv": convolution(nn.Conv2d(3, 5, 3), 3, 7, 6),
    "conv_no_bias": convolution(nn.Conv2d(3, 5, (2, 3), bias=False), 3, 7, 6),
    "conv_weight_only": partial(nn.Conv2d(3, 5, 3), torch.randn(SAMPLES, 3, 7, 6), "weight"),
    "conv_bias_only": partial(nn.Conv2d(4, 6, 3, groups=2), torch.randn(SAMPLES, 4, 7, 6), "bias"),
    "conv_stride_dilation": convolution(
        nn.Conv2d(3, 5, 3, stride=(2, 1), dilation=(1, 2), padding=1), 3, 9, 8
    ),
    "conv_same": convolution(nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), 3, 7, 6),
    "conv_valid": convolution(nn.Conv2d(3, 5, 3, padding="valid"), 3, 7, 6),
    "conv_reflect": convolution(
        nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), 3, 7, 6
    ),
    "conv_circular_same": convolution(
        nn.Conv2d(3, 5, (4, 3), padding="same", padding_mode="circular"), 3, 7, 6
    ),
    "conv_groups": convolution(nn.Conv2d(6, 9, 3, groups=3, padding=1), 6, 7, 6),
    "conv_depthwise": convolution(nn.Conv2d(6, 6, 3, groups=6), 6, 7, 6),
    "conv_1d": convolution(nn.Conv1d(3, 5, 4, padding=2, stride=3), 3, 11),
    "conv_3d": convolution(nn.Conv3d(2, 6, (2, 3, 1), padding="same", groups=2), 2, 4, 5, 3),
    "conv_1d_groups_circular": convolution(
        nn.Conv1d(6, 4, 3, groups=2, padding=2, padding_mode="circular", dilation=2), 6, 11
    ),
    "conv_depthwise_multiplied": convolution(
        nn.Conv2d(3, 9, (1, 4), groups=3, stride=(2, 3), padding=(0, 2), bias=False), 3, 5, 8
    ),
    "conv_3d_groups": convolution(
        nn.Conv3d(4, 10, (1, 2, 3), groups=2, stride=(1, 2, 1), padding=(1, 0, 1)), 4, 3, 5, 4
    ),
    "conv_groups_weight_only": partial(
        nn.Conv2d(4, 6, (3, 2), groups=2), torch.randn(SAMPLES, 4, 5, 4), "weight"
    ),
    "transposed_1d": convolution(
        nn.ConvTranspose1d(3, 5, 4, stride=3, padding=2, output_padding=1, dilation=2), 3, 6
    ),
    "transposed": convolution(
        nn.ConvTranspose2d(3, 5, (2, 3), stride=(2, 3), output_padding=(1, 2)), 3, 4, 3
    ),
    "transposed_groups": convolution(
        nn.ConvTranspose2d(
            6, 9, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=3, bias=False
        ),
        6,
        5,
        4,
    ),
    "transposed_depthwise": convolution(
        nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, groups=4), 4, 3, 5
    ),
    "transposed_3d": convolution(
        nn.ConvTranspose3d(4, 6, (1, 3, 2), stride=(1, 2, 3), padding=(0, 1, 0), groups=2),
        4,
        2,
        4,
        3,
    ),
    "transposed_weight_only": partial(
        nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(SAMPLES, 4, 4, 3), "weight"
    ),
    "transposed_bias_only": partial(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.randn(SAMPLES, 4, 4, 3), "bias"
    ),
    "transposed_output_size": lambda: Case(
        randomized(Decoder()), (torch.randn(SAMPLES, 3, 7, 8), torch.arange(SAMPLES))
    ),
    "embedding": embedding,
    "norms": norms,
    "norm_weight_only": partial(nn.GroupNorm(2, 6), torch.randn(SAMPLES, 6, 4, 3), "weight"),
    "norm_bias_only": partial(nn.LayerNorm(6), torch.randn(SAMPLES, 4, 6), "bias"),
    "called_twice": lambda: Case(TwiceCalled(), (torch.randn(SAMPLES, 4, 6),)),
    "folded_batch": lambda: Case(randomized(Frames()), (torch.randn(SAMPLES, 3, 4, 5, 5),)),
}
REORDERED: dict[str, Callable[[], Case]] = {
    "positions_first": positions_first(5),
    "as_many_positions_as_samples": positions_first(SAMPLES),
    "twice_as_many_positions": positions_first(2 * SAMPLES),
    "frames_first": lambda: Case(randomized(FramesFirst()), (torch.randn(SAMPLES, 3, 4, 5, 5),)),
    "as_many_frames_as_samples": lambda: Case(
        randomized(FramesFirst()), (torch.randn(SAMPLES, SAMPLES, 4, 5, 5),)
    ),
    "batch_inside": lambda: Case(randomized(BatchInside()), (torch.randn(SAMPLES, SAMPLES, 2, 5),)),
}
"""Inputs of layers that are not batch first."""
SHARED: dict[str, Callable[[], Case]] = {
    "position_ids": shared(nn.Embedding(6, 5), torch.arange(6)),
    "position_ids_of_one_row": shared(nn.Embedding(6, 5), torch.arange(6)[None]),
    "constant_tokens": shared(nn.Linear(4, 5), torch.randn(6, 4)),
    "one_time": shared(nn.Linear(4, 5), torch.randn(4)),
    "learned_queries": shared(
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), torch.randn(1, 6, 4)
    ),
    "routed": lambda: Case(randomized(Routed()), (torch.randn(SAMPLES, 4, 5),)),
}
"""Layers with rows that are no sample's own, or in no order: these go through a pass per sample."""
CHANGING: dict[str, tuple[Callable[[], Case], list[list[int]]]] = {
    "packed": (lambda: packed(False), [[3, 3, 3, 3, 3, 3], [4, 3, 3, 3, 3, 2], [5, 1]]),
    "packed_and_cut": (
        lambda: packed(True),
        [[3, 3, 3, 3, 3, 3], [3, 3, 5, 1, 3, 3], [3, 3], [5, 1]],
    ),
    "sorted": (
        lambda: Case(randomized(Sorted()), (torch.randn(SAMPLES, 5), torch.arange(SAMPLES))),
        [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [0, 1, 2, 4, 3]],
    ),
}
"""Cases whose last input changes the rows of a layer from batch to batch, and what it is in some
batches; in the first of a number of samples the rows may be in order, with the shape of the
others."""
ZOO = LARGE | SMALL | REORDERED


def build(name: str) -> Case:
    """A case of the zoo, the same one every time."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return (ZOO | SHARED | {name: make for name, (make, _) in CHANGING.items()})[name]()
