"""DiT."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ctrak_lightning.tasks.base import Condition
from ctrak_lightning.tasks.classes import ClassTask
from ctrak_lightning.tasks.registry import register_family


@register_family
class DiTTask(ClassTask):
    """``DiTPipeline``. The null class is the label after the last; of a network that predicts
    variances too, only the noise is taken. Arguments: :class:`ClassTask`."""

    pipelines: ClassVar[tuple[str | type, ...]] = ("DiTPipeline",)
    denoisers: ClassVar[tuple[str, ...]] = ("DiTTransformer2DModel",)
    may_predict_variances: ClassVar[bool] = True

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        if self.null_class is None:
            self.null_class = self.label_count()

    def label_count(self) -> int:
        return int(self.denoiser.config.num_embeds_ada_norm)

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        return {
            **super().expected_config(pipeline),
            "norm_type": ("ada_norm_zero",),
        }

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(x_t, timestep=t, return_dict=False, **condition)[0]
        return output[:, : x_t.shape[1]]
