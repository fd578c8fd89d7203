"""Named presets of :class:`~ctrak_lightning.method.Method`, after the published ones."""

from collections.abc import Callable

from ctrak_lightning.method import Method
from ctrak_lightning.objective import (
    ConceptDirection,
    Denoising,
    PosteriorSampling,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.trajectory import Generated, Inverted, Noised


def concept_trak(
    timesteps: int = 10, inversion_steps: int = 10, guidance: float = 3.0, damping: float | None = 1.0
) -> Method:
    """Concept-TRAK (ICLR 2026, arXiv 2507.06547): posterior-sampling traces on inverted trajectories, concept direction.

    Args:
        timesteps: states per sample and per query.
        inversion_steps: DDIM inversion steps of a training sample.
        guidance: classifier-free guidance of the inversion.
        damping: see :class:`~ctrak_lightning.method.Method`.
    """
    return Method(
        name="concept_trak",
        training=PosteriorSampling(),
        training_trajectory=Inverted(steps=inversion_steps, guidance=guidance, timesteps=timesteps),
        query=(Term(ConceptDirection()),),
        query_trajectory=Generated(timesteps=timesteps),
        damping=damping,
    )


def contrastive_d_trak(timesteps: int = 10, damping: float | None = 1.0) -> Method:
    """D-TRAK traces, asked with the difference of the gradients under the present and the absent condition."""
    return Method(
        name="contrastive_d_trak",
        training=SquaredNorm(),
        training_trajectory=Noised(timesteps=timesteps),
        query=contrast(SquaredNorm()),
        query_trajectory=Generated(timesteps=timesteps),
        damping=damping,
    )


def d_trak(timesteps: int = 10, damping: float | None = 1.0) -> Method:
    """D-TRAK (Zheng et al. 2024, arXiv 2311.00500): attributes the whole generated image, whatever the concept."""
    return Method(
        name="d_trak",
        training=SquaredNorm(),
        training_trajectory=Noised(timesteps=timesteps),
        query=(Term(SquaredNorm()),),
        query_trajectory=Noised(timesteps=timesteps),
        damping=damping,
    )


def trak(timesteps: int = 10, damping: float | None = 1.0) -> Method:
    """TRAK on the denoising loss (Park et al. 2023, arXiv 2303.14186): attributes the whole generated image."""
    return Method(
        name="trak",
        training=Denoising(),
        training_trajectory=Noised(timesteps=timesteps),
        query=(Term(Denoising()),),
        query_trajectory=Noised(timesteps=timesteps),
        damping=damping,
    )


PRESETS: dict[str, Callable[..., Method]] = {
    "concept_trak": concept_trak,
    "contrastive_d_trak": contrastive_d_trak,
    "d_trak": d_trak,
    "trak": trak,
}


def by_name(name: str) -> Method:
    """The preset of that name with its defaults.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"methods.by_name({name!r}): unknown method. Known: {', '.join(PRESETS)}.")
    return PRESETS[name]()
