"""Method: everything that decides an attribution score, apart from the model and the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ctrak_lightning.errors import UnknownMethodError
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    ConceptDirection,
    Denoising,
    Joint,
    MeanOutput,
    Objective,
    PosteriorSampling,
    SquaredNorm,
    Term,
)
from ctrak_lightning.methods.trajectories import (
    Generated,
    InTraining,
    Inverted,
    Noised,
    Renoised,
    Trajectory,
)
from ctrak_lightning.utilities.naming import place_of

OBJECTIVES: dict[str, type[Objective]] = {
    cls.__name__: cls
    for cls in (
        ChannelProbe,
        ConceptDirection,
        Denoising,
        MeanOutput,
        PosteriorSampling,
        SquaredNorm,
    )
}
TRAJECTORIES: dict[str, type[Trajectory]] = {
    cls.__name__: cls for cls in (Generated, InTraining, Inverted, Noised, Renoised)
}
Normalisation = Literal["none", "sample", "layer"]
Ensemble = Literal["standardised", "learning_rate"]
Damping = float | Literal["agreement"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """An attribution method.

    Args:
        name: shown in stores, tables and reports.
        training: objective of the training samples.
        training_trajectory: the states of a training sample.
        query: the terms whose sum is a query's gradient at a state.
        query_trajectory: the states of a query.
        normalisation: of every projected gradient, per sample and timestep, before timesteps are
            summed: ``"sample"`` scales it to norm 1, ``"layer"`` scales each layer's part of it to
            norm 1, ``"none"`` leaves it.
        damping: lambda of the kernel, relative to the mean eigenvalue ``tr(K) / min(n, k)``; None
            uses no kernel at all (the limit of strong damping); ``"agreement"`` takes for each
            query the one at which the checkpoints agree most
            (:func:`ctrak_lightning.attribution.scoring.agreement`), which needs no label.
        residual: multiply a sample's score by its mean denoising loss at the checkpoint (DAS).
        ensemble: how checkpoints are joined: ``"standardised"`` averages them, each in units of its
            own standard deviation over the samples; ``"learning_rate"`` adds them, each times the
            learning rate it was made at (TracIn).

    Raises:
        ValueError: no query term, sides with different numbers of objectives, an unknown
            normalisation or ensemble, or a damping that is not positive.
    """

    name: str
    training: Objective
    training_trajectory: Trajectory
    query: tuple[Term, ...]
    query_trajectory: Trajectory
    normalisation: Normalisation = "sample"
    damping: Damping = 1.0
    residual: bool = False
    ensemble: Ensemble = "standardised"

    def __post_init__(self) -> None:
        if not self.query:
            raise ValueError(f"Method({self.name!r}, query=()): expected at least one Term.")
        counts = {len(term.objective.parts) for term in self.query}
        if counts != {len(self.training.parts)}:
            raise ValueError(
                f"Method({self.name!r}): the training side has {len(self.training.parts)} "
                f"objectives and the terms of the query {sorted(counts)}; expected the same number "
                "everywhere. HINT: contrast(Joint(...)) for Joint(...)."
            )
        if isinstance(self.damping, str):
            valid = self.damping == "agreement"
        else:
            valid = self.damping is None or self.damping > 0
        if not valid:
            raise ValueError(
                f"Method({self.name!r}, damping={self.damping!r}): expected a number > 0, "
                "'agreement', or None."
            )
        for field, kind in (("normalisation", Normalisation), ("ensemble", Ensemble)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(
                    f"Method({self.name!r}, {field}={getattr(self, field)!r}): expected one of "
                    f"{get_args(kind)}."
                )
        if isinstance(self.training_trajectory, Generated):
            raise ValueError(
                f"Method({self.name!r}): {type(self.training_trajectory).__name__}() is a query "
                "trajectory; training images have no states."
            )
        if isinstance(self.query_trajectory, InTraining):
            raise ValueError(
                f"Method({self.name!r}): InTraining() is a training trajectory; a query takes part "
                "in no training step."
            )
        if isinstance(self.training_trajectory, InTraining) and (
            self.training != Denoising() or self.residual
        ):
            raise ValueError(
                f"Method({self.name!r}, training={self.training}, residual={self.residual}): "
                "training steps have the gradient of the training loss and no loss of a single "
                "sample; expected training=Denoising() and residual=False with InTraining()."
            )

    @property
    def sees_absent(self) -> bool:
        """Whether a query looks at the absent condition; a whole-image method does not, and asks
        the same of every concept."""
        return any(term.side == "absent" or term.objective.needs_reference for term in self.query)

    def training_dict(self) -> dict[str, Any]:
        """The part that traces depend on, as JSON values: a store holds it and refuses another."""
        return {
            "objective": self.training.to_dict(),
            "trajectory": self.training_trajectory.to_dict(),
            "normalisation": self.normalisation,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "name": self.name,
            "training": self.training_dict(),
            "query": [term.to_dict() for term in self.query],
            "query_trajectory": self.query_trajectory.to_dict(),
            "damping": self.damping,
            "residual": self.residual,
            "ensemble": self.ensemble,
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "Method":
        """The method that :meth:`to_dict` described.

        An objective or trajectory of the user's own is found by its place among the classes that
        are imported.

        Raises:
            UnknownMethodError: there is none at that place.
            ValueError: an argument is unknown here, or a class is no name (a store of a newer
                version, or an altered one).
        """
        try:
            training = facts["training"]
            return cls(
                name=facts["name"],
                training=_built(OBJECTIVES, training["objective"]),
                training_trajectory=_built(TRAJECTORIES, training["trajectory"]),
                query=tuple(
                    Term(_built(OBJECTIVES, term["objective"]), term["side"], term["weight"])
                    for term in facts["query"]
                ),
                query_trajectory=_built(TRAJECTORIES, facts["query_trajectory"]),
                normalisation=training["normalisation"],
                damping=facts["damping"],
                residual=facts["residual"],
                ensemble=facts["ensemble"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Method.from_dict: these facts describe no method: {error!r}."
            ) from error


def _built(known: dict[str, Any], facts: dict[str, Any]) -> Any:
    arguments = dict(facts)
    name = arguments.pop("class")
    if name == Joint.__name__ and known is OBJECTIVES:
        return Joint(*(_built(known, part) for part in arguments["parts"]))
    return (known.get(name) or _own(Objective if known is OBJECTIVES else Trajectory, name))(
        **arguments
    )


def _own(base: type, place: str) -> Any:
    """A user's class: the subclass that is imported from that place. Nothing is imported for a
    store's sake, and nothing else is run."""
    if not (isinstance(place, str) and place):
        raise ValueError(f"Method.from_dict: unknown class {place!r}, which is no name of one.")
    # By place, since @dataclass(slots=True) and a notebook's cell that is run again leave earlier
    # ones behind.
    imported = {place_of(cls): cls for cls in _subclasses(base)}
    if place in imported:
        return imported[place]
    module, _, name = place.rpartition(".")
    # A script's own classes are elsewhere when another one asks; earlier stores have the name
    # alone.
    found = [
        one for one in imported if one.rpartition(".")[2] == name and module in ("", "__main__")
    ]
    if len(found) == 1:
        return imported[found[0]]
    there = f"there are several: {sorted(found)}" if found else "none is imported"
    raise UnknownMethodError(
        f"The method has a {base.__name__.lower()} of the unknown class {place!r}. It is none of "
        f"the library's; expected one from there, and {there}. HINT: import the module that "
        "defines it before, or give the method itself: Attributor(store, module, method=...), or "
        "`--method package.module.name`."
    )


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield cls
        yield from _subclasses(cls)
