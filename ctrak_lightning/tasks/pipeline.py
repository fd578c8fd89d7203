"""PipelineTask: a diffusers pipeline as a DiffusionTask."""

import copy
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from ctrak_lightning.errors import TaskError
from ctrak_lightning.gradients.modes import evaluation
from ctrak_lightning.schedules import NoiseSchedule, Schedule
from ctrak_lightning.tasks.base import Condition, DiffusionTask, Encoded, plain_ids
from ctrak_lightning.utilities.dtypes import computation_dtype, device_of

UNET_EXPECTED: Mapping[str, Collection[Any]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
}
"""What a UNet2DConditionModel of a text-to-image pipeline has; a plain projection of the text is
the network's own matter."""
_MEANINGS = {
    "in_channels": (
        "inpainting, editing, depth, upscaling and control networks take an image beside the "
        "noised latents"
    ),
    "out_channels": "networks that predict variances or more than the noise need a loss of their own",
    "class_embed_type": "unCLIP, upscaling and variation networks take class labels or an image embedding",
    "num_class_embeds": "upscaling and class-conditional networks take class labels",
    "addition_embed_type": "XL, Kandinsky, DeepFloyd and image-conditioned networks take further embeddings",
    "encoder_hid_dim_type": "IP-Adapters and image-conditioned networks take an image embedding",
    "time_cond_proj_dim": (
        "distilled consistency models take the guidance scale as an input; trace the model it "
        "was distilled from"
    ),
    "attention_type": "GLIGEN networks take boxes and phrases",
    "projection_class_embeddings_input_dim": "refiners take an aesthetic score in place of the size",
    "cross_attention_dim": "the text encoders that are given do not belong to this network",
    "caption_channels": "the text encoder that is given does not belong to this network",
}


def require_config(task: str, network: Any, expected: Mapping[str, Collection[Any]]) -> None:
    """Refuses a network that takes other inputs than its task gives it.

    Args:
        task: the name of the family's class.
        network: a diffusers model.
        expected: the values that entries of its configuration may have; an entry that it lacks, or
            of which nothing is known (no values), is passed over.

    Raises:
        TaskError: an entry has another value; names it, what is supported, and what to do. Or
            there is no configuration.
    """
    config = getattr(network, "config", None)
    if config is None:
        raise TaskError(
            f"{task}: the {type(network).__name__} has no `config`, expected a model of diffusers' "
            "(ModelMixin, ConfigMixin). HINT: of another one write a DiffusionTask: denoiser, "
            "noise_schedule, encode(batch) and condition(spec, n)."
        )
    for entry, allowed in expected.items():
        value = config.get(entry)
        each = value if isinstance(value, (list, tuple)) else [value]
        if value is None or not allowed or all(one in allowed for one in each):
            continue
        listed = " or ".join(repr(one) for one in allowed if one is not None) or "None"
        meaning = f" ({_MEANINGS[entry]})" if entry in _MEANINGS else ""
        raise TaskError(
            f"{task}: the {type(network).__name__} has {entry}={value!r} in its configuration, "
            f"expected {listed}{meaning}. HINT: write a DiffusionTask whose encode(batch) and "
            "condition(spec, n) make these inputs and whose predict(x_t, t, condition) gives them "
            "to the network."
        )


def require_vae(task: str, vae: Any) -> None:
    """Refuses a VAE whose latents are not those of a normal distribution, scaled.

    Raises:
        TaskError: it is one of diffusers' others, or its configuration lacks the scaling factor or
            has means.
    """
    kinds = {base.__name__ for base in type(vae).__mro__}
    name = type(vae).__name__
    theirs = type(vae).__module__.startswith("diffusers.")
    found = None
    if theirs and not kinds & {"AutoencoderKL", "AsymmetricAutoencoderKL"}:
        found = f"is a {name}"
    elif vae.config.get("latents_mean") is not None:
        found = "has `latents_mean`"
    elif vae.config.get("scaling_factor") is None:
        found = f"({name}) has no `scaling_factor`"
    if found is not None:
        raise TaskError(
            f"{task}: the VAE {found}, expected an AutoencoderKL with a scaling and a shift factor "
            "only. HINT: write a DiffusionTask with encode(batch) and decode(latents) of its own."
        )


def text_width(pipeline: Any, *names: str) -> Collection[int | None]:
    """What the hidden states of text encoders have side by side; nothing where one is missing or
    does not say."""
    configs = [getattr(getattr(pipeline, name, None), "config", None) for name in names]
    widths = [
        getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        for config in configs
    ]
    return () if None in widths else (sum(width for width in widths if width is not None),)


FIELDS = ("image", "latents", "sample_id")
Batch = Mapping[str, Any] | Sequence[Any]


class PipelineTask(DiffusionTask, nn.Module):
    """A diffusers pipeline as a DiffusionTask: one subclass per family of pipelines, chosen by
    :class:`~ctrak_lightning.DiffusersTask`.

    It holds the denoiser, the VAE and the text encoders as submodules, so that they move with the
    module whose attribute ``task`` it is, and the store knows their weights. What trains is what
    you leave trainable in the denoiser; the VAE and text encoders, which diffusers loads trainable,
    are frozen and stay in evaluation mode.

    A batch is a mapping with ``image`` [B, 3, H, W] in [-1, 1] (or ``latents`` [B, C, h, w],
    encoded before and scaled as the network sees them), ``sample_id`` (B strings) and what the
    family needs (``caption``, ``class``); a tuple is a mapping with the keys ``"0"``, ``"1"``, ...
    Its other columns of strings become the samples' metadata.

    Args:
        pipeline: the pipeline.
        resolution: height and width of images in pixels, or one number for both; None takes the
            pipeline's own. It matters where the network or the schedule is told the size.
        batch: what the dataset's columns are, where they have other names: ``{"pixel_values":
            "image"}``.
        owns_parts: False leaves the parts alone: another module decides what is trainable and in
            which mode.

    Raises:
        TaskError: the pipeline lacks a part, or has one that cannot be used; ``batch`` names an
            unknown column.
    """

    pipelines: ClassVar[tuple[str | type, ...]] = ()
    """The pipelines that the family serves: classes, or names of diffusers' own."""
    denoisers: ClassVar[tuple[str, ...]] = ()
    """The names of their denoisers' classes, by which a module's parts are recognised."""
    denoiser: Any
    denoiser_part: ClassVar[str] = "transformer"
    may_predict_variances: ClassVar[bool] = False
    """Whether networks of the family may have a second half of outputs, of which nothing is
    made."""
    frozen_parts: ClassVar[tuple[str, ...]] = ("vae",)
    optional_parts: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = FIELDS

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int | tuple[int, int] | None = None,
        batch: Mapping[str, str] | None = None,
        owns_parts: bool = True,
    ) -> None:
        super().__init__()
        self._wide_vae: tuple[Any] | None = None
        self._names = self._columns(batch or {})
        self.id_column = self._names["sample_id"]
        self._check_parts(pipeline, set((batch or {}).values()))
        self.pipeline = pipeline
        self.denoiser = getattr(pipeline, self.denoiser_part)
        candidates = (*self.frozen_parts, *self.optional_parts)
        self.parts = tuple(name for name in candidates if getattr(pipeline, name, None) is not None)
        self._owns_parts = owns_parts
        for name in self.parts:
            part = getattr(pipeline, name)
            self.add_module(name, part)
            if owns_parts and all(parameter.requires_grad for parameter in part.parameters()):
                part.requires_grad_(False)
        self.resolution = self._resolution(resolution)
        try:
            self.noise_schedule = self.schedule()
            check_usable(self.noise_schedule)
        except (TypeError, ValueError) as error:
            raise TaskError(f"{type(self).__name__}({type(pipeline).__name__}): {error}") from error
        if owns_parts:
            self.train()

    @classmethod
    def variant(cls, denoiser: Any) -> "type[PipelineTask]":
        """The class of the task for a pipeline with this denoiser, of families that have
        several."""
        return cls

    @classmethod
    def pipeline_for(cls, denoiser: Any, parts: Collection[str]) -> str | type | None:
        """Which of ``pipelines`` a denoiser of one of ``denoisers`` and parts of these names belong
        to; None if they are another family's."""
        return cls.pipelines[0]

    def schedule(self) -> Schedule:
        """The noise schedule of the pipeline's scheduler."""
        return NoiseSchedule.from_scheduler(self.pipeline.scheduler)

    def expected_config(self, pipeline: Any) -> Mapping[str, Collection[Any]]:
        """What entries of the network's configuration may be, for it to take what this family gives
        it and no more; None may be any."""
        config = getattr(pipeline, self.denoiser_part).config
        vae = getattr(pipeline, "vae", None)
        parts = (1, 2) if self.may_predict_variances else (1,)
        if vae is not None:
            channels = [vae.config.get("latent_channels") or config.get("in_channels")]
        else:  # latents that were made before: the network alone says how many channels they have
            out = config.get("out_channels") or config.get("in_channels")
            channels = [out // n for n in parts]
        return {
            "in_channels": channels,
            "out_channels": [n * each for each in channels for n in parts],
        }

    def encode(self, batch: Batch) -> Encoded:
        """A batch as the network sees it; the latents are the mean of the VAE's distribution, not a
        draw."""
        return Encoded(
            latents=self._batch_latents(batch),
            condition=self.batch_condition(batch),
            sample_ids=self.sample_ids(batch),
            metadata=self.metadata(batch),
        )

    def pictures(self, batch: Batch) -> Tensor | None:
        """The batch's own images [B, 3, H, W] in [0, 1], for thumbnails; None where it holds
        latents, or images without colour."""
        if self.has_column(batch, "latents"):
            return None
        images: Tensor = self.column(batch, "image")
        return ((images.float() + 1) / 2).clamp(0, 1) if images.shape[1] == 3 else None

    def sample_ids(self, batch: Batch) -> list[str]:
        """The ids of a batch's samples."""
        return plain_ids(self.column(batch, "sample_id"))

    def metadata(self, batch: Batch) -> dict[str, list[str]]:
        """The columns of strings of a batch, but for the ids."""
        ids = self._names["sample_id"]
        return {
            name: list(values)
            for name, values in as_mapping(batch).items()
            if name != ids
            and isinstance(values, (list, tuple))
            and all(isinstance(v, str) for v in values)
        }

    @abstractmethod
    def batch_condition(self, batch: Batch) -> Condition:
        """The network's keyword arguments for a batch."""

    def loss(self, batch: Batch) -> Tensor:
        """The training loss [] of a batch: the mean squared error of the network's output, at
        timesteps drawn uniformly (under the scheduler's shift, if it is a flow's)."""
        encoded = self.encode(batch)
        noise = torch.randn_like(encoded.latents)
        t = self.noise_schedule.random_timesteps(len(noise)).to(noise.device)
        x_t = self.noise_schedule.add_noise(encoded.latents, noise, t)
        output = self.predict(x_t, t, encoded.condition)
        target = self.noise_schedule.target(encoded.latents, noise, t)
        return (output.float() - target.float()).square().mean()

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents [B, C, h, w]: ``(z - shift) * scaling`` of the
        VAE's mean ``z``.

        Raises:
            TaskError: there is no VAE.
        """
        if "vae" not in self.parts:
            raise TaskError(
                f"{type(self).__name__}: an image cannot be encoded without a VAE. HINT: "
                "DiffusersTask(vae='the attribute of the module that holds it')."
            )
        vae = self._computing_vae()
        with self.in_evaluation("vae"):
            z = vae.encode(images.to(self.device, vae.dtype)).latent_dist.mode()
        shift, scaling = self._vae_factors()
        latents: Tensor = (z - shift) * scaling
        return latents.to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor | None:
        """Latents [B, C, h, w] to images [B, 3, H, W] in [0, 1]; None without a VAE."""
        if "vae" not in self.parts:
            return None
        # One at a time: a VAE needs much memory.
        vae = self._computing_vae()
        shift, scaling = self._vae_factors()
        z = (latents / scaling + shift).to(self.device, vae.dtype)
        with self.in_evaluation("vae"):
            images = [vae.decode(row[None], return_dict=False)[0] for row in z]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def column(self, batch: Batch, name: str) -> Any:
        """A column of a batch by our name of it."""
        return as_mapping(batch)[self._theirs(name)]

    def has_column(self, batch: Batch, name: str) -> bool:
        """Whether a batch has a column, by our name of it."""
        return self._theirs(name) in as_mapping(batch)

    def _theirs(self, name: str) -> str:
        if name not in self._names:
            family = type(self).__name__
            raise TaskError(
                f"{family}: {name!r} is none of its columns, {sorted(self.fields)}. HINT: in "
                f"{family}, `fields = (*PipelineTask.fields, {name!r})`."
            )
        return self._names[name]

    def image_size(self, batch: Batch) -> tuple[int, int]:
        """Height and width of a batch's images in pixels."""
        if self.has_column(batch, "latents"):
            height, width = self.column(batch, "latents").shape[-2:]
            scale = self._pixels_per_latent()
            return height * scale, width * scale
        height, width = self.column(batch, "image").shape[-2:]
        return height, width

    def in_evaluation(self, *parts: str) -> AbstractContextManager[None]:
        """Evaluation mode for parts that another module has in another mode."""
        return evaluation(
            submodule
            for name in parts
            if not self._owns_parts and name in self.parts
            for submodule in getattr(self, name).modules()
        )

    @property
    def device(self) -> torch.device:
        """Of the denoiser."""
        return device_of(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """In which the denoiser computes: of its first parameter that is neither quantised nor
        stored in 8 bits, which is what diffusers' pipelines go by."""
        return computation_dtype(self.denoiser)

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.parts:
            if not is_trained(getattr(self, name)):
                getattr(self, name).eval()  # T5 has dropout
        return self

    def _resolution(self, given: int | tuple[int, int] | None) -> tuple[int, int]:
        if given is None:
            size: Any = getattr(
                self.pipeline, "default_sample_size", None
            ) or self.denoiser.config.get("sample_size")
            if size is None:
                raise TaskError(
                    f"{type(self).__name__}({type(self.pipeline).__name__}): neither the pipeline "
                    "nor the network's configuration says how large images are. HINT: "
                    "resolution=512, say."
                )
            height, width = size if isinstance(size, Sequence) else (size, size)
            scale = self._pixels_per_latent()
            return int(height) * scale, int(width) * scale
        return (given, given) if isinstance(given, int) else given

    def _pixels_per_latent(self) -> int:
        scale = getattr(self.pipeline, "vae_scale_factor", None)
        if scale is not None:
            return int(scale)
        vae: Any = getattr(self, "vae", None)
        return 1 if vae is None else int(2 ** (len(vae.config.block_out_channels) - 1))

    def _batch_latents(self, batch: Batch) -> Tensor:
        if self.has_column(batch, "latents"):
            latents: Tensor = self.column(batch, "latents").to(self.device, self.dtype)
            return latents
        return self.latents(self.column(batch, "image"))

    def _columns(self, batch: Mapping[str, str]) -> dict[str, str]:
        """The dataset's name of each column, by ours."""
        unknown = sorted(set(batch.values()) - set(self.fields))
        if unknown:
            raise TaskError(
                f"{type(self).__name__}(batch={dict(batch)!r}): unknown {unknown}, expected names "
                f"among {sorted(self.fields)}. HINT: the key is the dataset's name, the value "
                "ours: {'pixel_values': 'image'}."
            )
        if len(set(batch.values())) < len(batch):
            raise TaskError(
                f"{type(self).__name__}(batch={dict(batch)!r}): two columns under one name of "
                "ours. HINT: name each once."
            )
        return {name: name for name in self.fields} | {
            ours: theirs for theirs, ours in batch.items()
        }

    def _check_parts(self, pipeline: Any, columns: Collection[str]) -> None:
        """That the pipeline has what is needed, for batches that have these columns ready made."""
        needed = {self.denoiser_part, *self.frozen_parts, "scheduler"}
        if "latents" in columns:
            needed.discard("vae")
        if "prompt_embeds" in columns:
            needed -= {name for name in self.frozen_parts if name.startswith("text_encoder")}
        missing = sorted(name for name in needed if getattr(pipeline, name, None) is None)
        if missing:
            raise TaskError(
                f"{type(self).__name__}({type(pipeline).__name__}): the pipeline lacks "
                f"{', '.join(missing)}. HINT: load it with all its parts, or give them to "
                "DiffusersTask.from_parts; for batches that were encoded before, say so: "
                "batch={'my_latents': 'latents', 'my_embeddings': 'prompt_embeds'}."
            )
        vae = getattr(pipeline, "vae", None)
        if vae is not None:
            require_vae(type(self).__name__, vae)
        require_config(type(self).__name__, getattr(pipeline, self.denoiser_part), {})
        require_config(
            type(self).__name__,
            getattr(pipeline, self.denoiser_part),
            self.expected_config(pipeline),
        )

    def _computing_vae(self) -> Any:
        """The VAE, or in float32 where it is float16 and its configuration says that it overflows
        there (``force_upcast``, Stable Diffusion XL's): a copy, since its weights stay as they
        are."""
        vae: Any = self.vae
        if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
            return vae
        if self._wide_vae is None:
            # Not a submodule: it is no part of the model.
            self._wide_vae = (copy.deepcopy(vae).float().requires_grad_(False).eval(),)
        return self._wide_vae[0].to(vae.device)

    def _vae_factors(self) -> tuple[float, float]:
        vae: Any = self.vae
        return float(vae.config.get("shift_factor") or 0.0), float(vae.config["scaling_factor"])


def is_trained(part: nn.Module) -> bool:
    """Whether any of a part's parameters requires a gradient."""
    return any(parameter.requires_grad for parameter in part.parameters())


def as_mapping(batch: Batch) -> Mapping[str, Any]:
    """A batch as a mapping; a tuple's keys are ``"0"``, ``"1"``, ..."""
    return (
        batch if isinstance(batch, Mapping) else {str(i): column for i, column in enumerate(batch)}
    )


def check_usable(schedule: Schedule) -> None:
    """Raises a ValueError for a schedule under which a network says nothing of x0 at some
    timestep."""
    if not isinstance(schedule, NoiseSchedule) or schedule.prediction_type != "epsilon":
        return
    silent = (schedule.alpha_bar == 0).nonzero().flatten().tolist()
    if silent:
        raise ValueError(
            f"the schedule has no signal at timestep {silent[0]} (zero terminal SNR), where a "
            "network that predicts noise says nothing of the image: it cannot be sampled or "
            "inverted there. HINT: prediction_type='v_prediction', if the network was trained so; "
            "else a scheduler without rescale_betas_zero_snr."
        )
