"""Images per second of a trace on a network of Stable Diffusion 1.5's size, with random weights:
cross-attention, and LoRA.

python -m recipes.benchmarks.sd15 --device cuda            # 64x64 latents, bf16 autocast
python -m recipes.benchmarks.sd15 --device cpu --tiny      # tries the script itself on a small
network

Training steps and traces of one timestep take turns.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ctrak_lightning import GradientTracer, Projection, methods
from ctrak_lightning.capture.trace import trace_batch

from ..lora import add_lora
from .speed import Subject
from .tables import command_of, grid, parser_of, publish

TINY = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
# UNet2DConditionModel's own defaults are Stable Diffusion 1.x's, but for the text encoder's width.
FULL = {"cross_attention_dim": 768}
PROJECTION = Projection(rank=16, dim=4096)


def network(tiny: bool, adapter: bool) -> nn.Module:
    """The denoiser; with LoRA of rank 8 on all attention, or with its cross-attention trainable."""
    unet: nn.Module = UNet2DConditionModel(sample_size=64, **(TINY if tiny else FULL))
    if adapter:
        add_lora(unet, 8, init=False)
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("attn2" in name)
    return unet


def training_step(subject: Subject) -> None:
    output = subject.predict(subject.x_t, subject.t, subject.given)
    (output - subject.x0).float().square().mean().backward()
    subject.denoiser.zero_grad(set_to_none=True)


def traced(subject: Subject, tracer: GradientTracer) -> None:
    trace_batch(subject, tracer, methods.concept_trak(1), subject.encode(), 0)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.sd15", __doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    side = 16 if args.tiny else 64
    rows = []
    for title, adapter in (("cross-attention", False), ("LoRA", True)):
        torch.manual_seed(0)
        condition = torch.randn(args.batch, 77, 64 if args.tiny else 768)
        given = {"encoder_hidden_states": condition}
        subject = Subject(title, network(args.tiny, adapter), (4, side, side), given).on(device)
        tracer = GradientTracer(subject.denoiser, PROJECTION)
        work = partial(training_step, subject), partial(traced, subject, tracer)
        # The first round warms up.
        spent = [[seconds(one, device) for one in work] for _ in range(args.repeats + 1)][1:]
        rate = args.batch / statistics.median(trace for _, trace in spent)
        ratio = statistics.median(trace / step for step, trace in spent)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")
        rows.append((title, f"{rate:.2f}", f"{ratio:.2f}", f"{peak:.1f}"))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
    heads = ("traced", "images a second, one timestep", "trace / training step", "peak GiB")
    where = f"{name}, torch {torch.__version__}, bf16 autocast; latents of 4x{side}x{side}"
    text = "\n".join([f"`{command_of(parser, args)}`; {where}.", "", *grid(heads, rows)])
    publish(args.results / "sd15.md", text + "\n")


if __name__ == "__main__":
    main()
