"""Capture: the traces of a whole data set at one checkpoint. For callbacks and for raw training loops."""

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ctrak_lightning.errors import DatasetChangedError, GradientError
from ctrak_lightning.fingerprint import content_hashes, model_fingerprint, trained_parameters
from ctrak_lightning.gradients import GradientTracer, UntracedParameterWarning, tracing_mode
from ctrak_lightning.memory import RowLimit
from ctrak_lightning.method import Method
from ctrak_lightning.rng import isolated_rng
from ctrak_lightning.task import Encoded, encode
from ctrak_lightning.traces import SampleTable, StoreHeader, TraceWriter
from ctrak_lightning.tracing import trace_batch

THUMBNAIL = 64


class Capture:
    """Traces every sample of a data set, as often as asked, into one store.

    Where memory is short, batches go through the network in smaller parts (:class:`~ctrak_lightning.memory.RowLimit`).

    Args:
        path: the store's folder.
        owner: the module whose trained parameters are stored (a LightningModule, or the denoiser itself).
        task: its DiffusionTask.
        batches: the samples to trace: an iterable of batches that gives the same samples in the same order each time.
        method: what to trace.
        tracer: the gradient tracer of ``task.denoiser``.
        seed: of the trajectories' noise and of whatever is random in ``batches``.
        dtype: of the stored rows, ``"float32"``, ``"float16"`` or ``"int8"`` (each row also has a float32 norm and scale).
        thumbnails: store small images for reports, where the task can decode.
        device: where batches are moved to.
        rows_at_once: samples per forward pass at most; None takes whole batches.

    Raises:
        StoreMismatchError: the folder holds traces of another method, projection, model or data set.

    Warns:
        UntracedParameterWarning: the owner trains parameters outside the denoiser.
    """

    def __init__(
        self,
        path: str,
        owner: nn.Module,
        task: Any,
        batches: Iterable[Any],
        *,
        method: Method,
        tracer: GradientTracer,
        seed: int = 0,
        dtype: Literal["float32", "float16", "int8"] = "float32",
        thumbnails: bool = True,
        device: torch.device | str = "cpu",
        rows_at_once: int | None = None,
        progress: bool = True,
    ) -> None:
        self.owner, self.task, self.batches, self.method, self.tracer = owner, task, batches, method, tracer
        self.seed, self.device, self.progress = seed, torch.device(device), progress
        self._row_limit = RowLimit(rows_at_once)
        self._warn_of_parameters_outside()
        table, latent_shape = self._survey(thumbnails)
        header = StoreHeader(
            method=method.to_dict(),
            projection=tracer.describe(),
            model=model_fingerprint(owner, trained_parameters(owner), task.noise_schedule),
            dataset={
                "size": len(table.sample_ids),
                "sample_ids": table.fingerprint(),
                "content": hashlib.sha256("".join(table.content_sha256).encode()).hexdigest(),
                "latent_shape": list(latent_shape),
            },
            dim=tracer.dim,
            dtype=dtype,
        )
        self.sample_ids = table.sample_ids
        self.writer = TraceWriter(path, header)
        self.writer.write_samples(table)

    def run(self, step: int, *, epoch: int, learning_rate: float | None = None) -> None:
        """Traces all samples with the present weights and seals the checkpoint.

        Raises:
            DatasetChangedError: the batches no longer hold the samples of the store.
            GradientError: a sample's gradient is zero or not finite; the message names the samples.
        """
        checkpoint = self.writer.begin_checkpoint(
            step, epoch=epoch, learning_rate=learning_rate, weights=trained_parameters(self.owner)
        )
        position = 0
        with checkpoint, isolated_rng(self.seed), tracing_mode(self.owner):
            bar = tqdm(
                total=len(self.sample_ids), desc=f"trace step {step}", unit="img", disable=not self.progress
            )
            with bar:
                for batch in self.batches:
                    encoded = self._encode(batch)
                    rows = len(encoded.sample_ids)
                    self._check_ids(encoded, position)
                    done = min(max(checkpoint.rows_done - position, 0), rows)
                    if done < rows:
                        rest = encoded.rows(done)
                        trace = trace_batch(
                            self.task, self.tracer, self.method, rest, self.seed, self._row_limit
                        )
                        indices = torch.arange(position + done, position + rows)
                        checkpoint.append(indices, trace.features, trace.loss)
                    position += rows
                    bar.update(rows)
            checkpoint.seal()

    def _warn_of_parameters_outside(self) -> None:
        inside = {id(parameter) for parameter in self.tracer.module.parameters()}
        outside = sorted(
            name for name, value in trained_parameters(self.owner).items() if id(value) not in inside
        )
        if outside:
            warnings.warn(
                f"These trained parameters are outside the denoiser and are not traced: {', '.join(outside)}. What samples "
                "taught through them alone is missed. HINT: that is usual for token embeddings; freeze them, or make them "
                "part of `denoiser`, if it matters.",
                UntracedParameterWarning,
                stacklevel=3,
            )

    def _survey(self, thumbnails: bool) -> tuple[SampleTable, torch.Size]:
        """One pass over the data without the network: who the samples are."""
        ids: list[str] = []
        hashes: list[str] = []
        columns: dict[str, list[str]] = {}
        images: list[Tensor] = []
        shape: torch.Size | None = None
        with isolated_rng(self.seed), tracing_mode(self.owner), torch.no_grad():
            for batch in tqdm(
                self.batches, desc="survey", unit="batch", leave=False, disable=not self.progress
            ):
                encoded = self._encode(batch)
                if shape is not None and shape != encoded.latents.shape[1:]:
                    raise GradientError(
                        f"Latents of shapes {tuple(shape)} and {tuple(encoded.latents.shape[1:])} in one data set; expected "
                        "one shape. HINT: trace buckets of different sizes into stores of their own."
                    )
                shape = encoded.latents.shape[1:]
                if ids and columns.keys() != encoded.metadata.keys():
                    raise DatasetChangedError(
                        f"Metadata columns {sorted(columns)} and {sorted(encoded.metadata)} in one data set; expected the "
                        "same columns in every batch."
                    )
                ids += encoded.sample_ids
                hashes += content_hashes(batch, encoded)
                for name, values in encoded.metadata.items():
                    columns.setdefault(name, []).extend(map(str, values))
                if thumbnails and hasattr(self.task, "decode"):
                    images.append(_thumbnails(self.task.decode(encoded.latents)))
        if shape is None:
            raise GradientError("The data set to trace is empty; expected at least one batch.")
        return SampleTable(ids, hashes, columns, torch.cat(images) if images else None), shape

    def _encode(self, batch: Any) -> Encoded:
        return encode(self.task, _to(batch, self.device))

    def _check_ids(self, encoded: Encoded, position: int) -> None:
        expected = self.sample_ids[position : position + len(encoded.sample_ids)]
        if expected != encoded.sample_ids:
            changed = sorted(set(encoded.sample_ids) - set(expected))[:5] or encoded.sample_ids[:5]
            raise DatasetChangedError(
                f"Samples from position {position} on differ from those the store began with, for example {changed}. "
                "Expected the same samples in the same order at every capture. HINT: no shuffling in trace_dataloader()."
            )


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _thumbnails(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as uint8 [B, h, w, 3], no side longer than THUMBNAIL."""
    longest = max(images.shape[-2:])
    if longest > THUMBNAIL:
        scale = THUMBNAIL / longest
        images = torch.nn.functional.interpolate(
            images.float(), scale_factor=scale, mode="bilinear", antialias=True
        )
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
