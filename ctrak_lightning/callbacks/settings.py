"""How a run is traced, and what a Trainer must be like for traces to be right."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from ctrak_lightning.gradients import Attention, Projection
from ctrak_lightning.gradients.modes import is_compiled
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.trajectories import InTraining
from ctrak_lightning.model.traced_model import Weights
from ctrak_lightning.store.formats import RowDtype
from ctrak_lightning.tasks import DiffusionTask, InPrecision, Precision

Mode = Literal["capture", "inline"]
OnError = Literal["raise", "warn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSettings:
    """The arguments of a ConceptTracer by which its store is written.

    Raises:
        MisconfigurationException: one is out of range, or two do not go together.
    """

    dirpath: str
    method: Method
    projection: Projection
    mode: Mode
    weights: Weights
    layers: list[str] | None
    batch_size: int | None
    dtype: RowDtype
    thumbnails: bool
    seed: int
    loader: str | int | None
    precision: Precision | None
    attention: Attention

    def __post_init__(self) -> None:
        require_one_of(
            "ConceptTracer", "mode", self.mode, get_args(Mode), "'capture' is the default."
        )
        require_at_least_one("batch_size", self.batch_size)
        if self.weights not in get_args(Weights) or (
            self.weights == "ema" and self.mode == "inline"
        ):
            raise MisconfigurationException(
                f"`ConceptTracer(weights={self.weights!r}, mode={self.mode!r})`: expected one of "
                f"{get_args(Weights)}, and 'raw' in mode 'inline', whose traces are of the "
                "training steps themselves. HINT: mode='capture' traces averaged weights."
            )
        for name, known in (("precision", get_args(Precision)), ("attention", get_args(Attention))):
            hint = "left out, traces have the precision of the Trainer and its attention."
            require_one_of("ConceptTracer", name, getattr(self, name), (None, *known), hint)
        trajectory = self.method.training_trajectory
        if isinstance(trajectory, InTraining) != (self.mode == "inline"):
            raise MisconfigurationException(
                f"`ConceptTracer(method={self.method.name!r}, mode={self.mode!r})`: the method's "
                f"traces are on {trajectory}. HINT: InTraining() goes with mode='inline', as in "
                "methods.inline_trak(), and every other trajectory with mode='capture'."
            )


def require_at_least_one(name: str, value: int | None) -> None:
    """Raises a MisconfigurationException for a count of a ConceptTracer that is 0 or less."""
    if value is not None and value < 1:
        raise MisconfigurationException(
            f"`ConceptTracer({name}={value})`: expected an integer >= 1, or None. HINT: leave it "
            "out to switch it off."
        )


def require_one_of(
    callback: str, name: str, value: object, known: Collection[object], hint: str
) -> None:
    """Raises a MisconfigurationException for an argument that is none of the ``known`` values."""
    if value not in known:
        raise MisconfigurationException(
            f"`{callback}({name}={value!r})`: expected one of {known}. HINT: {hint}"
        )


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """The Trainer's callbacks, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def is_dry_run(trainer: L.Trainer) -> bool:
    """Whether the Trainer only tries a few batches (``fast_dev_run``), of which nothing is kept."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def in_precision_of(trainer: L.Trainer, task: DiffusionTask) -> InPrecision:
    """A task in the precision that a training step has: its batches are converted, and its new
    tensors are of the default dtype there.

    Autocast is none of it: :func:`precision_of`.
    """
    plugin = trainer.precision_plugin
    with plugin.train_step_context():
        dtype = torch.get_default_dtype()
    return InPrecision(task, dtype, plugin.convert_input)


def precision_of(trainer: L.Trainer) -> Precision:
    """Whether a training step runs under autocast, and to which dtype."""
    plugin: Any = trainer.precision_plugin
    with plugin.forward_context():
        device = trainer.strategy.root_device.type
        if not torch.is_autocast_enabled(device):
            return "true"
        dtype = torch.get_autocast_dtype(device)
    return "16-mixed" if dtype == torch.float16 else "bf16-mixed"


_HINT = 'HINT: mode="capture" traces any training loop.'


def refuse_untraceable_steps(
    trainer: L.Trainer, pl_module: L.LightningModule, denoiser: nn.Module
) -> None:
    """Raises a MisconfigurationException for runs whose training steps cannot be followed
    exactly."""
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            '`ConceptTracer(mode="inline")`: manual optimization may scale the loss, or go '
            "backward several times, in ways that a callback cannot see. Expected automatic "
            f"optimization. {_HINT}"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            '`ConceptTracer(mode="inline")`: training_step(dataloader_iter) draws the batches '
            "itself, and no callback sees which one a step has. Expected training_step(batch, "
            f"batch_idx). {_HINT}"
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f'`ConceptTracer(mode="inline")`: {trainer.world_size} processes, expected one: rows '
            f"are gathered in one process. {_HINT}"
        )
    compiled = [
        name or type(module).__name__
        for root in (pl_module, denoiser)
        for name, module in root.named_modules()
        if is_compiled(module)
    ]
    if compiled:
        raise MisconfigurationException(
            f'`ConceptTracer(mode="inline")`: {compiled[0]!r} is compiled, and a compiled graph '
            f"does not call the hooks of its layers. Expected eager training. {_HINT}"
        )


def loss_scale(trainer: L.Trainer) -> float:
    """What Lightning multiplied the loss of a training step with: for accumulation, and by a
    GradScaler."""
    scaler = grad_scaler(trainer)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches


def grad_scaler(trainer: L.Trainer) -> Any:
    """The GradScaler of 16-bit mixed precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)
