"""The method as hyperparameters, for the HParams dashboard."""

from collections.abc import Mapping, Sequence
from typing import Any

from ctrak_lightning.gradients import Projection
from ctrak_lightning.inspection.tags import ROOT
from ctrak_lightning.method import Method

HParams = dict[str, bool | int | float | str]


def method_hparams(method: Method, projection: Projection, layers: Sequence[str] | None) -> HParams:
    """What was traced and how, by name."""
    facts = {
        "method": method.name,
        "normalisation": method.normalisation,
        "damping": "none" if method.damping is None else str(method.damping),
        "ensemble": method.ensemble,
        "timesteps": getattr(method.training_trajectory, "timesteps", None) or "all",
        "rank": projection.rank,
        "dim": projection.dim or "all",
        "layers": "all" if layers is None else " ".join(layers),
    }
    return {f"{ROOT}/{name}": value for name, value in facts.items()}


def write_hparams(
    writer: Any, values: Mapping[str, bool | int | float | str], metrics: Sequence[str]
) -> None:
    """One summary of hyperparameters; the dashboard shows the last value of the scalars ``metrics``
    beside them.

    TensorBoard takes the first such summary of a run and no other. ``SummaryWriter.add_hparams``
    would start a run of its own, so the summary goes to the writer's file, as Lightning's loggers
    write theirs.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):
        writer._get_file_writer().add_summary(summary)
