"""Named presets of :class:`~ctrak_lightning.methods.method.Method`, after the published ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ctrak_lightning.methods.damping import Damping
from ctrak_lightning.methods.method import Method, Normalisation
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    ConceptDirection,
    Denoising,
    Joint,
    MeanOutput,
    Objective,
    PosteriorSampling,
    RandomProbe,
    Residual,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.methods.trajectories import Generated, InTraining, Inverted, Noised, Renoised


def concept_trak(
    timesteps: int = 5,
    damping: Damping = "agreement",
    normalisation: Normalisation = "layer",
    channel_probes: int = 3,
) -> Method:
    """A search by concept: how much a sample's gradient moves the output *because of* the concept,
    through fixed linear probes. It finds images that show the concept, whether they were trained on or
    not; :func:`influence`, the default, asks what training on them changed.

    It keeps Concept-TRAK's question (the same image with and without the concept) and its
    trajectory, and changes the parts that the benchmarks did not bear out: the difference is taken
    between gradients, not between predictions; the objectives are fixed linear functionals of the
    output on both sides (its mean, and means in which every channel has a random weight); every
    layer weighs the same; and the damping is where the checkpoints agree most.
    ``recipes/benchmarks/search_by_concept.md`` has what each is worth, and where it loses. The published
    setting is :func:`concept_trak_paper`; :func:`concept_trak_norm` costs less and finds more
    images with the same label, and misses combinations that training never showed.

    Args:
        timesteps: states per sample and per query; each costs a forward pass and ``1 +
            channel_probes`` vector-Jacobian products.
        damping: see :class:`~ctrak_lightning.methods.method.Method`.
        normalisation: ``"layer"`` lets every layer weigh the same, ``"sample"`` every sample as a
            whole.
        channel_probes: how many random probes beside the mean.

    Raises:
        ValueError: ``channel_probes`` below 1.
    """
    if channel_probes < 1:
        raise ValueError(f"concept_trak(channel_probes={channel_probes}): expected at least 1.")
    probes = Joint(MeanOutput(), *map(ChannelProbe, range(channel_probes)))
    return _contrastive("concept_trak", probes, timesteps, damping, normalisation)


def concept_trak_norm(
    timesteps: int = 5, damping: Damping = "agreement", normalisation: Normalisation = "layer"
) -> Method:
    """:func:`concept_trak` with D-TRAK's objective, ``mean(e^2)`` (arXiv 2311.00500), in place of
    the probes: one vector-Jacobian product per state.

    Args:
        timesteps: states per sample and per query.
        damping: see :class:`~ctrak_lightning.methods.method.Method`.
        normalisation: as in :func:`concept_trak`.
    """
    return _contrastive("concept_trak_norm", SquaredNorm(), timesteps, damping, normalisation)


def influence(
    of: Literal["condition", "null", "both"] = "both",
    timesteps: int = 3,
    damping: Damping = 1.0,
    per_exposure: bool = True,
) -> Method:
    """The default: how much less the concept's name would be worth to the loss on the asked image, had
    the model not been trained on a sample: gradients of the residual in the network's output space, as large as
    they are, at high noise.

    The residual is that of the sample under its own condition, of the sample before any condition,
    or their sum (:class:`~ctrak_lightning.methods.objectives.Residual`). All samples and the
    question have the same noise, at the timesteps of the last third of the schedule. It is asked
    what retraining would do, and is no search: :func:`concept_trak` finds more of the images that
    show the concept.

    Args:
        of: the residual's condition. ``"both"`` and ``"null"`` cost a forward pass more per state.
        timesteps: states per sample and per query, each a vector-Jacobian product.
        damping: see :class:`~ctrak_lightning.methods.method.Method`.
        per_exposure: multiply a sample's score by how often it was trained on: a capture's gradients
            cannot know.
    """
    return _shared_noise("influence", Residual(of), timesteps, damping, per_exposure)


def random_probe(timesteps: int = 3, damping: Damping = 1.0) -> Method:
    """The cheapest search for images that show a concept: one random probe of the output for every
    position and timestep (:class:`~ctrak_lightning.methods.objectives.RandomProbe`), asked under the
    present less the absent condition; one vector-Jacobian product a state.

    Args:
        timesteps: states per sample and per query, in the last third of the schedule.
        damping: see :class:`~ctrak_lightning.methods.method.Method`.
    """
    return _shared_noise("random_probe", RandomProbe(), timesteps, damping, per_exposure=False)


def concept_trak_paper(
    timesteps: int = 10,
    inversion_steps: int = 10,
    guidance: float = 3.0,
    damping: Damping = "agreement",
) -> Method:
    """Concept-TRAK as published (ICLR 2026, arXiv 2507.06547): posterior-sampling traces on
    inverted trajectories, asked with the concept direction.

    The defaults cost less than what its authors run: nine timesteps of 50 inversion steps under
    guidance 7.5, traced in the cross-attention alone (``layers=["*attn2*"]``) at the last
    checkpoint.

    Args:
        timesteps: states per sample and per query.
        inversion_steps: DDIM inversion steps of a training sample.
        guidance: classifier-free guidance of the inversion.
        damping: see :class:`~ctrak_lightning.methods.method.Method`. (The paper picks it with the
            benchmark's labels.)
    """
    return Method(
        name="concept_trak_paper",
        training=PosteriorSampling(),
        training_trajectory=Inverted(steps=inversion_steps, guidance=guidance, timesteps=timesteps),
        query=(Term(ConceptDirection()),),
        query_trajectory=Generated(timesteps=timesteps),
        damping=damping,
    )


def d_trak(timesteps: int = 10, damping: Damping = 1.0) -> Method:
    """D-TRAK (Zheng et al. 2024, arXiv 2311.00500): ``mean(e^2)`` of the whole image, whatever the
    concept."""
    return _whole_image("d_trak", SquaredNorm(), timesteps, damping)


def trak(timesteps: int = 10, damping: Damping = 1.0) -> Method:
    """TRAK on the denoising loss (Park et al. 2023, arXiv 2303.14186) of the whole image."""
    return _whole_image("trak", Denoising(), timesteps, damping)


def inline_trak(
    timesteps: int = 10, damping: Damping = "agreement", normalisation: Normalisation = "layer"
) -> Method:
    """For ``ConceptTracer(mode="inline")``: the gradients that training itself computed, asked as
    :func:`concept_trak` asks: the same objective, the denoising loss, on both sides, under the
    present less the absent condition.

    Denoising traces rank worse than the default's in the benchmarks; see ``docs/inline.md``.

    Args:
        timesteps: states per query; on the training side they are as many as training steps saw the
            sample.
        damping: see :class:`~ctrak_lightning.methods.method.Method`.
        normalisation: of each training step's gradient, before the steps' mean is taken.
    """
    return Method(
        name="inline_trak",
        training=Denoising(),
        training_trajectory=InTraining(),
        query=contrast(Denoising()),
        query_trajectory=Generated(timesteps=timesteps),
        normalisation=normalisation,
        damping=damping,
    )


def das(timesteps: int = 10, damping: Damping = 1.0, absolute: bool = False) -> Method:
    """DAS (arXiv 2410.18639): the mean output's gradient, unit-normalised per timestep; a sample's
    score is multiplied by its denoising loss.

    Args:
        timesteps: states per sample and per query.
        damping: see :class:`~ctrak_lightning.methods.method.Method`.
        absolute: ``mean(|e|)`` instead, as Concept-TRAK's authors re-ran it.
    """
    method = _whole_image("das", MeanOutput(absolute), timesteps, damping)
    return replace(method, normalisation="sample", residual=True)


def journey_trak(timesteps: int = 10, damping: Damping = 1.0) -> Method:
    """Journey-TRAK (arXiv 2312.06205): the denoising loss along the generation, against the clean
    image predicted at each step. (Training timesteps are evenly spaced, where the paper draws
    them.)"""
    method = _whole_image("journey_trak", Denoising(), timesteps, damping)
    return replace(method, query_trajectory=Renoised(timesteps=timesteps))


def tracin(timesteps: int = 10) -> Method:
    """Diffusion-TracIn (arXiv 2401.09031, eq. 5): denoising gradients' inner products, added over
    checkpoints times the learning rate; no kernel."""
    method = _whole_image("tracin", Denoising(), timesteps, None)
    return replace(method, ensemble="learning_rate")


def retrac(timesteps: int = 10) -> Method:
    """Diffusion-ReTrac (arXiv 2401.09031): TracIn with gradients of unit norm, so that timesteps
    and samples with large gradients do not decide alone."""
    return replace(tracin(timesteps), name="retrac", normalisation="sample")


def _contrastive(
    name: str, objective: Objective, timesteps: int, damping: Damping, normalisation: Normalisation
) -> Method:
    return Method(
        name=name,
        training=objective,
        training_trajectory=Noised(timesteps=timesteps),
        query=contrast(objective),
        query_trajectory=Generated(timesteps=timesteps),
        normalisation=normalisation,
        damping=damping,
    )


def _shared_noise(
    name: str, objective: Objective, timesteps: int, damping: Damping, per_exposure: bool
) -> Method:
    """The same objective on both sides, under the present less the absent condition, at states of
    high noise that samples and questions share."""
    states = Noised(timesteps=timesteps, start=2 / 3, end=1.0)
    return Method(
        name=name,
        training=objective,
        training_trajectory=states,
        query=contrast(objective),
        query_trajectory=states,
        normalisation="none",
        damping=damping,
        per_exposure=per_exposure,
    )


def _whole_image(name: str, objective: Objective, timesteps: int, damping: Damping) -> Method:
    """The same objective on both sides, on noised images, gradients as they are."""
    noised = Noised(timesteps=timesteps)
    return Method(
        name=name,
        training=objective,
        training_trajectory=noised,
        query=(Term(objective),),
        query_trajectory=noised,
        normalisation="none",
        damping=damping,
    )


PRESETS: dict[str, Callable[..., Method]] = {
    "concept_trak": concept_trak,
    "concept_trak_paper": concept_trak_paper,
    "concept_trak_norm": concept_trak_norm,
    "influence": influence,
    "random_probe": random_probe,
    "inline_trak": inline_trak,
    "trak": trak,
    "d_trak": d_trak,
    "das": das,
    "journey_trak": journey_trak,
    "tracin": tracin,
    "retrac": retrac,
}


def by_name(name: str) -> Method:
    """The preset of that name with its defaults.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"methods.by_name({name!r}): unknown method. Known: {', '.join(PRESETS)}.")
    return PRESETS[name]()
