"""DiffusersTask: a diffusers pipeline as a DiffusionTask."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from ctrak_lightning.errors import TaskError
from ctrak_lightning.parameterization import NoiseSchedule
from ctrak_lightning.schedule import Schedule
from ctrak_lightning.task.protocol import Condition, DiffusionTask, Encoded

FIELDS = ("image", "sample_id")


class DiffusersTask(DiffusionTask, nn.Module):
    """A diffusers pipeline as a DiffusionTask: one subclass per family of pipelines, chosen by :meth:`from_pipeline`.

    Give it to a LightningModule as its attribute ``task``: it holds the denoiser, the VAE and the text encoders as submodules,
    so that they move with the module and the store knows their weights. What trains is what you leave trainable in the
    denoiser; the VAE and text encoders, which diffusers loads trainable, are frozen and stay in evaluation mode.

    A batch is a mapping with ``image`` [B, 3, H, W] in [-1, 1], ``sample_id`` (B strings) and what the family needs
    (``caption``, ``class``). Its other columns of strings become the samples' metadata.

    Args:
        pipeline: the pipeline.
        resolution: height and width of images in pixels, or one number for both; None takes the pipeline's own. It matters
            where the network or the schedule is told the size.
        fields: where the dataset's columns have other names, theirs: ``{"image": "pixel_values"}``.

    Raises:
        TaskError: the pipeline is of no known family, or lacks a part; ``fields`` names an unknown column.

    Example::

        class LoraFineTune(L.LightningModule):
            def __init__(self, pipeline):
                super().__init__()
                pipeline.unet.requires_grad_(False)
                pipeline.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
                self.task = DiffusersTask.from_pipeline(pipeline)

            def training_step(self, batch, batch_idx):
                return self.task.loss(batch)

            def configure_optimizers(self):
                return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)
    """

    denoiser: Any
    denoiser_part: ClassVar[str] = "transformer"
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae",)
    optional_parts: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = FIELDS

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int | tuple[int, int] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        needed = (self.denoiser_part, *self.frozen_parts, "scheduler")
        missing = [name for name in needed if getattr(pipeline, name, None) is None]
        if missing:
            raise TaskError(
                f"{type(self).__name__}({type(pipeline).__name__}): the pipeline lacks {', '.join(missing)}. HINT: load it with "
                "all its parts, or give them to DiffusersTask.from_parts."
            )
        unknown = sorted(set(fields or {}) - set(self.fields))
        if unknown:
            raise TaskError(
                f"{type(self).__name__}(fields={dict(fields or {})!r}): unknown {unknown}, expected names among "
                f"{sorted(self.fields)}. HINT: the key is our name, the value the dataset's."
            )
        vae: Any = getattr(pipeline, "vae", None)
        if vae is not None and vae.config.get("latents_mean") is not None:
            raise TaskError(
                f"{type(self).__name__}({type(pipeline).__name__}): the VAE has `latents_mean`, expected one with a scaling and a "
                "shift factor only. HINT: write a DiffusionTask with encode(batch) and decode(latents) of its own."
            )
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_part)
        optional = [name for name in self.optional_parts if getattr(pipeline, name, None) is not None]
        self.parts = (*self.frozen_parts, *optional)
        for name in self.parts:
            part = getattr(pipeline, name)
            self.add_module(name, part)
            if all(parameter.requires_grad for parameter in part.parameters()):
                part.requires_grad_(False)
        self._names = {name: name for name in self.fields} | dict(fields or {})
        self.resolution = self._resolution(resolution)
        self.noise_schedule = self.schedule()
        self.train()

    @staticmethod
    def from_pipeline(pipeline: Any, **options: Any) -> "DiffusersTask":
        """The task of a diffusers pipeline.

        Args:
            pipeline: a loaded pipeline; ``docs/adapters.md`` lists the families.
            options: of the family's class; see there.

        Raises:
            TaskError: its family is unknown, or it lacks a part.
        """
        from ctrak_lightning.task.families import family_of

        return family_of(pipeline)(pipeline, **options)

    @staticmethod
    def from_parts(pipeline_class: type, parts: Mapping[str, Any], **options: Any) -> "DiffusersTask":
        """The same from separate parts.

        Args:
            pipeline_class: the diffusers pipeline that the parts belong to, such as ``StableDiffusionPipeline``.
            parts: its components by name: ``{"unet": unet, "vae": vae, ...}``. Safety checkers may be left out.
            options: as of :meth:`from_pipeline`.

        Raises:
            TaskError: parts are missing or unknown; the message names them.
        """
        accepted = dict(list(inspect.signature(pipeline_class.__init__).parameters.items())[1:])  # type: ignore[misc]
        unknown = sorted(set(parts) - set(accepted))
        required = [name for name, parameter in accepted.items() if parameter.default is parameter.empty]
        missing = [name for name in required if name not in parts and name not in _NOT_NEEDED]
        if unknown or missing:
            raise TaskError(
                f"DiffusersTask.from_parts({pipeline_class.__name__}, {sorted(parts)}): missing {missing}, unknown {unknown}. "
                f"Expected {sorted(set(required) - set(_NOT_NEEDED))}."
            )
        given = {name: None for name in required if name in _NOT_NEEDED} | dict(parts)
        if "requires_safety_checker" in accepted:
            given.setdefault("requires_safety_checker", False)
        return DiffusersTask.from_pipeline(pipeline_class(**given), **options)

    def schedule(self) -> Schedule:
        """The noise schedule of the pipeline's scheduler."""
        return NoiseSchedule.from_scheduler(self.pipeline.scheduler)

    def encode(self, batch: Mapping[str, Any]) -> Encoded:
        """A batch as the network sees it; the latents are the mean of the VAE's distribution, not a draw."""
        return Encoded(
            latents=self.latents(self.column(batch, "image")),
            condition=self.batch_condition(batch),
            sample_ids=self.sample_ids(batch),
            metadata=self.metadata(batch),
        )

    def sample_ids(self, batch: Mapping[str, Any]) -> list[str]:
        """The ids of a batch's samples."""
        return list(map(str, self.column(batch, "sample_id")))

    def metadata(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """The columns of strings of a batch, but for the ids."""
        ids = self._names["sample_id"]
        return {
            name: list(values)
            for name, values in batch.items()
            if name != ids and isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
        }

    def batch_condition(self, batch: Mapping[str, Any]) -> Condition:
        """The network's keyword arguments for a batch."""
        raise NotImplementedError

    def condition(self, spec: Any, n: int) -> Condition:
        """The network's keyword arguments for a concept's ``present`` or ``absent``, ``n`` times."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The training loss [] of a batch: the mean squared error of the network's output, at timesteps drawn uniformly
        (under the scheduler's shift, if it is a flow's)."""
        encoded = self.encode(batch)
        noise = torch.randn_like(encoded.latents)
        t = self.noise_schedule.random_timesteps(len(noise)).to(noise.device)
        x_t = self.noise_schedule.add_noise(encoded.latents, noise, t)
        output = self.predict(x_t, t, encoded.condition)
        target = self.noise_schedule.target(encoded.latents, noise, t)
        return (output.float() - target.float()).square().mean()

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents [B, C, h, w]: ``(z - shift) * scaling`` of the VAE's mean ``z``."""
        vae: Any = self.vae
        z = vae.encode(images.to(self.device, vae.dtype)).latent_dist.mode()
        shift, scaling = self._vae_factors()
        latents: Tensor = (z - shift) * scaling
        return latents.to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W] in [0, 1], one at a time: a VAE needs much memory."""
        vae: Any = self.vae
        shift, scaling = self._vae_factors()
        z = (latents / scaling + shift).to(self.device, vae.dtype)
        images = [vae.decode(row[None], return_dict=False)[0] for row in z]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def column(self, batch: Mapping[str, Any], name: str) -> Any:
        """A column of a batch by our name of it."""
        return batch[self._names[name]]

    @property
    def device(self) -> torch.device:
        """Of the denoiser."""
        device: torch.device = next(self.denoiser.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's first parameter, which is what diffusers' pipelines go by."""
        dtype: torch.dtype = next(self.denoiser.parameters()).dtype
        return dtype

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.parts:
            if not is_trained(getattr(self, name)):
                getattr(self, name).eval()  # T5 has dropout
        return self

    def _resolution(self, given: int | tuple[int, int] | None) -> tuple[int, int]:
        if given is None:
            size: Any = (
                getattr(self.pipeline, "default_sample_size", None) or self.denoiser.config.sample_size
            )
            height, width = size if isinstance(size, Sequence) else (size, size)
            scale = getattr(self.pipeline, "vae_scale_factor", None) or self._vae_scale()
            return int(height) * scale, int(width) * scale
        return (given, given) if isinstance(given, int) else given

    def _vae_scale(self) -> int:
        """Pixels per latent position."""
        vae: Any = getattr(self, "vae", None)
        return 1 if vae is None else int(2 ** (len(vae.config.block_out_channels) - 1))

    def _vae_factors(self) -> tuple[float, float]:
        vae: Any = self.vae
        return float(vae.config.get("shift_factor") or 0.0), float(vae.config["scaling_factor"])


def is_trained(part: nn.Module) -> bool:
    """Whether any of a part's parameters requires a gradient."""
    return any(parameter.requires_grad for parameter in part.parameters())


_NOT_NEEDED = ("safety_checker", "feature_extractor")
