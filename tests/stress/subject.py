"""What is stressed: a small fine-tune whose every step depends on its number alone, so that two
runs can be held against each other to the bit, also when one was interrupted."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from ctrak_lightning import methods
from ctrak_lightning.callbacks import ConceptTracer, ProvenanceRecorder
from tests.toy import CHANNELS, ToyData, ToyDiffusion, Toys

STEPS, EVERY = 9, 3


class Small(nn.Module):
    """Three layers: what a step costs is Lightning's and the callbacks' own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, 6, 3, padding=1)
        self.text = nn.Linear(12, 6)
        self.conv_out = nn.Conv2d(6, CHANNELS, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        words = self.text(encoder_hidden_states.mean(1))[:, :, None, None]
        return (self.conv_out(nn.functional.silu(self.conv_in(x) + words)),)


class Subject(ToyDiffusion):
    """The toys' task on the small network. Samples, noise and timesteps of a step depend on its
    number alone: where a run is resumed within an epoch, Lightning begins a plain DataLoader
    anew."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = Small()
        super().__init__(denoiser=denoiser)
        toys = Toys()
        size = SubjectData().batch_size
        self.batches = [
            default_collate([toys[i] for i in rows]) for rows in torch.arange(len(toys)).split(size)
        ]
        # Outside the network, so not traced; frozen, for a run without warnings.
        self.embedding.requires_grad_(False)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        batch = self.batches[self.global_step % len(self.batches)]
        latents = batch["image"]
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(0, len(self.noise_schedule), (len(latents),), generator=generator)
        noised = self.noise_schedule.add_noise(latents, noise, t)
        condition = {"encoder_hidden_states": self.tokens(batch["colour"], batch["shape"])}
        return (self.predict(noised, t, condition) - noise).square().mean()


class Resumable(DataLoader[dict[str, Any]]):
    """A DataLoader that goes on where it was: Lightning begins a plain one anew within an epoch,
    and then other samples have been trained on, which the store rightly tells."""

    taken = 0

    def __iter__(self) -> Any:
        self.taken %= len(self)  # an epoch ends with its last batch, and nobody asks for one more
        for batch in itertools.islice(super().__iter__(), self.taken, None):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class SubjectData(ToyData):
    """The toys in their own order: Lightning does not restore the generator that shuffles."""

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return Resumable(self.toys, self.batch_size)


def tracer(folder: Path, **options: Any) -> ConceptTracer:
    """A tracer with several shards to a checkpoint."""
    given = {
        "every_n_train_steps": EVERY,
        "rank": 4,
        "dim": 32,
        "method": methods.concept_trak(timesteps=2),
    }
    return ConceptTracer(str(folder / "traces"), **(given | options))


def fine_tune(folder: Path, *, ledger: bool = True, ckpt_path: str | None = None) -> Subject:
    """The run: ``STEPS`` steps, traces at every third, a checkpoint of Lightning's after each."""
    L.seed_everything(0, verbose=False)
    callbacks: list[Any] = [tracer(folder)]
    if ledger:
        callbacks.append(ProvenanceRecorder())
    callbacks.append(
        ModelCheckpoint(
            folder / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1
        )
    )
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    module = Subject()
    trainer.fit(module, datamodule=SubjectData(), ckpt_path=ckpt_path, weights_only=False)
    return module
