"""Pipelines under the Trainer's options: training stays the same to the bit, and the traces are
those of the weights."""

import copy
import gc
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from ctrak_lightning import Capture, GradientTracer, PipelineTask, Projection, TraceStore
from ctrak_lightning.capture.trace import trace_batch
from tests.gradients.zoo import TOLERANCE, row_error
from tests.tasks.runs import METHOD, made, same_weights, tracer, train
from tests.tasks.support import pipelines_of
from tests.tasks.test_fine_tune import SAMPLES, Samples
from tests.tasks.tiny import batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings(
        "ignore:These trainable parameters have no "
        "hook:ctrak_lightning.gradients.SlowParameterWarning"
    ),
    pytest.mark.filterwarnings(
        "ignore:Mismatch dtype between input and weight"
    ),  # PyTorch's, of autocast over a norm
]
ROOT = Path(__file__).parents[2]
IN_HALF = 0.01
"""Relative error of a bfloat16 network's traces beside a loop over the same network; 0.002 was
measured."""
HALF = 0.8
"""The same beside a loop in float32 over the same weights: 0.05 (SD 3) to 0.60 (Flux) was measured,
of random weights."""


def by_loop(task: PipelineTask) -> Tensor:
    """The traces [n, k] of a plain loop over the samples, under the present weights, without
    autocast."""
    loop = GradientTracer(task.denoiser, Projection(rank=4, dim=128), engine="loop")
    return trace_batch(task, loop, METHOD, task.encode(batch(SAMPLES)), 0).features


def last(path: Path) -> Tensor:
    return TraceStore(path).checkpoints[-1].features()


@pytest.mark.parametrize("name", pipelines_of("same training"))
def test_training_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    plain, traced = made(name), made(name)
    untrained = copy.deepcopy(plain)
    train(plain, [])
    train(traced, [tracer(tmp_path)])
    assert same_weights(plain, traced)
    assert not same_weights(plain, untrained)
    assert [c.step for c in TraceStore(tmp_path).checkpoints] == [1, 2]


@pytest.mark.parametrize("name", pipelines_of("half"))
def test_mixed_precision_is_traced_as_it_is_trained(name: str, tmp_path: Path) -> None:
    plain, traced = made(name), made(name)
    train(plain, [], precision="bf16-mixed")
    train(traced, [tracer(tmp_path)], precision="bf16-mixed")
    assert same_weights(plain, traced)
    found, in_float32 = last(tmp_path), by_loop(traced.task)
    predict = traced.task.predict

    def as_a_training_step(*args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = predict(*args)
            return output

    traced.task.predict = as_a_training_step  # type: ignore[method-assign]
    assert row_error(found, by_loop(traced.task)) < IN_HALF
    assert row_error(found, in_float32) > IN_HALF
    said = TraceStore(tmp_path).header.method["numerics"]
    assert said == {"attention": "fused", "precision": "bf16-mixed"}


@pytest.mark.parametrize("name", pipelines_of("half"))
def test_true_half_precision_is_traced_in_half(name: str, tmp_path: Path) -> None:
    plain, traced = made(name), made(name)
    train(plain, [], precision="bf16-true")
    train(traced, [tracer(tmp_path)], precision="bf16-true")
    assert next(traced.task.denoiser.parameters()).dtype == torch.bfloat16
    assert same_weights(plain, traced)
    found = last(tmp_path)
    assert found.dtype == torch.float32
    in_half = row_error(found, by_loop(traced.task))
    exact = row_error(found, by_loop(traced.float().task))
    assert in_half < IN_HALF
    assert TOLERANCE < exact < HALF


def test_fp16_is_bf16_on_a_cpu(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        train(made("sd1"), [tracer(tmp_path)], precision="16-mixed")
    assert last(tmp_path).isfinite().all()


@pytest.mark.parametrize("name", pipelines_of("checkpointing"))
def test_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    plain, traced = made(name, checkpointing=True), made(name, checkpointing=True)
    assert traced.task.denoiser.is_gradient_checkpointing
    train(plain, [])
    train(traced, [tracer(tmp_path)])
    assert same_weights(plain, traced)
    traced.task.denoiser.disable_gradient_checkpointing()
    assert row_error(last(tmp_path), by_loop(traced.task)) < TOLERANCE


@pytest.mark.parametrize("name", pipelines_of("accumulation"))
def test_accumulation_and_averaged_weights(name: str, tmp_path: Path) -> None:
    """Traced are the weights that train, unless the average is asked for, which the module has at
    the end."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    plain, raw, traced = made(name), made(name), made(name)
    train(plain, [EMAWeightAveraging(decay=0.5)], **options)
    train(
        raw,
        [tracer(tmp_path / "raw", every_n_train_steps=2), EMAWeightAveraging(decay=0.5)],
        **options,
    )
    averaged = tracer(tmp_path / "ema", every_n_train_steps=2, weights="ema")
    train(traced, [EMAWeightAveraging(decay=0.5), averaged], **options)
    assert same_weights(plain, traced)
    assert same_weights(plain, raw)
    unaveraged = made(name)
    train(unaveraged, [], **options)
    for module, folder in ((unaveraged, "raw"), (traced, "ema")):
        store = TraceStore(tmp_path / folder)
        assert [c.step for c in store.checkpoints] == [2, 3]  # optimizer steps
        kept = store.checkpoints[-1].weights()
        own = dict(module.named_parameters())
        assert all(torch.equal(kept[name], own[name]) for name in kept)
        assert row_error(last(tmp_path / folder), by_loop(module.task)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("name", pipelines_of("resume"))
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uuid.uuid4", lambda: type("Fixed", (), {"hex": "0" * 32}))

    def run(folder: Path, stop: bool) -> Any:
        def callbacks() -> list[Callback]:
            keep = ModelCheckpoint(folder / "ckpt", filename="{epoch}", save_top_k=-1)
            return [tracer(folder / "traces"), SeedSteps(), keep]

        module = made(name)
        if stop:
            with pytest.raises(RuntimeError, match="power cut"):
                train(module, [*callbacks(), PowerCut()], max_epochs=2, enable_checkpointing=True)
            module = made(name)
            checkpoint = str(folder / "ckpt" / "epoch=0.ckpt")
            with pytest.warns(UserWarning, match=r"resumes at step 2; the traces of steps \[3\]"):
                train(module, callbacks(), checkpoint, max_epochs=2, enable_checkpointing=True)
        else:
            train(module, callbacks(), max_epochs=2, enable_checkpointing=True)
        return module, {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "traces").rglob("*"))
            if path.is_file()
        }

    (whole, files), (cut, others) = run(tmp_path / "a", False), run(tmp_path / "b", True)
    assert same_weights(whole, cut)
    assert len(files) > 8
    assert files == others


class SeedSteps(Callback):
    """Lightning does not restore the global generator that the loss draws from."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(trainer.global_step)


class PowerCut(Callback):
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_nothing_is_left_behind_by_a_capture(name: str, tmp_path: Path) -> None:
    """No hooks, no tensors and no random draws: memory is what it was."""
    module = made(name)
    task, denoiser = module.task, module.task.denoiser
    capture = Capture(
        str(tmp_path),
        module,
        task,
        DataLoader(Samples(), 2),
        method=METHOD,
        tracer=GradientTracer(denoiser, Projection(rank=4, dim=128)),
        progress=False,
    )
    capture.run(0, epoch=0)
    state = torch.get_rng_state()
    before = live_bytes()
    capture.run(1, epoch=1)
    assert live_bytes() <= before  # less, where the collector came by what other tests left
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in denoiser.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def live_bytes() -> int:
    """Of all tensors that something still refers to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = {
            found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
            for found in gc.get_objects()
            if type(found) in (Tensor, torch.nn.Parameter)
        }
    return sum(storages.values())


def test_a_half_base_with_a_float32_adapter_is_traced(tmp_path: Path) -> None:
    """As diffusers' LoRA scripts hold a model: what is frozen in half precision, what trains in
    float32."""
    task = made("sd1").task
    for value in task.parameters():
        value.data = value.data.to(torch.float32 if value.requires_grad else torch.bfloat16)
    exact_task = copy.deepcopy(task).float()
    hooks = GradientTracer(task.denoiser, Projection(rank=4, dim=128), engine="hooks")
    found = trace_batch(task, hooks, METHOD, task.encode(batch(SAMPLES)), 0).features
    assert TOLERANCE < row_error(found, by_loop(exact_task)) < HALF


@pytest.mark.parametrize("name", pipelines_of("ddp"))
def test_two_processes(name: str, tmp_path: Path) -> None:
    weights = {}
    for what in ("plain", "traced"):
        command = [sys.executable, "-m", "tests.tasks.ddp_worker", str(tmp_path / what), name, what]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        weights[what] = load_file(tmp_path / what / "weights.safetensors")
    assert weights["plain"].keys() == weights["traced"].keys()
    assert all(
        torch.equal(value, weights["traced"][key]) for key, value in weights["plain"].items()
    )
    store = TraceStore(tmp_path / "traced" / "traces")
    assert store.verify() == []
    assert store.samples.sample_ids == [f"image-{i}" for i in range(SAMPLES)]
    folder = tmp_path / "traced" / "traces" / "checkpoint-00000001"
    assert [path.name for path in sorted(folder.glob("rank*"))] == [
        "rank0-00000.h5",
        "rank1-00000.h5",
    ]
    module = made(name)
    module.load_state_dict(weights["traced"], strict=False)
    assert row_error(last(tmp_path / "traced" / "traces"), by_loop(module.task)) < 10 * TOLERANCE
