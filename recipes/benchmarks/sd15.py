"""Images per second of a trace on a network of Stable Diffusion 1.5's size, with random weights: cross-attention, and LoRA.

python -m recipes.benchmarks.sd15 --device cuda                   # 64x64 latents, bf16 autocast
python -m recipes.benchmarks.sd15 --device cpu --tiny             # tries the script itself on a small network

Alternates training steps and traces of one timestep, and writes results/sd15.json.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from ctrak_lightning import GradientTracer, Projection, methods
from ctrak_lightning.capture.trace import trace_batch
from recipes.benchmarks.speed import RESULTS, Subject

TINY = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
# UNet2DConditionModel's own defaults are Stable Diffusion 1.x's, but for the width of the text encoder.
FULL = {"cross_attention_dim": 768}
PROJECTION = Projection(rank=16, dim=4096)


def network(tiny: bool, adapter: bool) -> nn.Module:
    """The denoiser; with LoRA of rank 8 on all attention, or with its cross-attention trainable."""
    unet = UNet2DConditionModel(sample_size=64, **(TINY if tiny else FULL))
    unet.requires_grad_(False)
    if adapter:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("attn2" in name)
    result: nn.Module = unet
    return result


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    side = 16 if args.tiny else 64
    rows: dict[str, dict[str, float]] = {}
    for title, adapter in (("cross-attention", False), ("LoRA", True)):
        torch.manual_seed(0)
        unet = network(args.tiny, adapter)
        condition = {"encoder_hidden_states": torch.randn(args.batch, 77, 64 if args.tiny else 768)}
        subject = Subject(title, unet, (4, side, side), condition).on(device)
        tracer = GradientTracer(subject.denoiser, PROJECTION)
        work = {
            "training step": partial(training_step, subject),
            "trace": partial(traced, subject, tracer),
        }
        spent: dict[str, list[float]] = {each: [] for each in work}
        for repeat in range(args.repeats + 1):
            for each, one in work.items():
                took = seconds(one, device)
                if repeat:
                    spent[each].append(took)
        rows[title] = {
            "images traced per second, one timestep": args.batch / statistics.median(spent["trace"]),
            "trace / training step": statistics.median(
                a / b for a, b in zip(spent["trace"], spent["training step"], strict=True)
            ),
        }
        if device.type == "cuda":
            rows[title]["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.reset_peak_memory_stats(device)
    options = f"--device {args.device} --batch {args.batch} --repeats {args.repeats}"
    facts = {
        "command": f"python -m recipes.benchmarks.sd15 {options}{' --tiny' if args.tiny else ''}",
        "machine": f"{name}, torch {torch.__version__}, bf16 autocast",
        "latents": [4, side, side],
        "rows": rows,
    }
    text = json.dumps(facts, indent=1)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "sd15.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
