"""Method: everything that decides an attribution score, apart from the model and the data."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ctrak_lightning.errors import MethodError, shorten
from ctrak_lightning.methods.damping import Damping, DampingRule
from ctrak_lightning.methods.ensembles import Ensemble, EnsembleRule
from ctrak_lightning.methods.numbers import MOST_PARTS, check_boolean, number
from ctrak_lightning.methods.objectives import Denoising, Objective, Term
from ctrak_lightning.methods.recorded import Recorded, part_of, refuse_unrecorded
from ctrak_lightning.methods.trajectories import Generated, InTraining, Trajectory

Normalisation = Literal["none", "sample", "layer"]


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
            query the one at which the checkpoints agree most, which needs no label
            (:class:`~ctrak_lightning.methods.damping.Agreement`); or a rule of your own, a
            :class:`~ctrak_lightning.methods.damping.DampingRule`.
        residual: multiply a sample's score by its mean denoising loss at the checkpoint (DAS).
        per_exposure: a score is that of one time that a sample is trained on; multiply it by how
            often that had happened by the checkpoint, where the store knows. A capture cannot see
            it in the weights.
        ensemble: how checkpoints are joined: ``"standardised"`` averages them, each in units of its
            own standard deviation over the samples; ``"learning_rate"`` adds them, each times the
            learning rate it was made at (TracIn); or an
            :class:`~ctrak_lightning.methods.ensembles.EnsembleRule`.

    Raises:
        MethodError: an objective, a trajectory or a rule that a store cannot describe; no query
            term, sides with different numbers of objectives, an unknown normalisation or ensemble,
            or a damping that is not a positive number.
    """

    name: str
    training: Objective
    training_trajectory: Trajectory
    query: tuple[Term, ...]
    query_trajectory: Trajectory
    normalisation: Normalisation = "sample"
    damping: Damping = 1.0
    residual: bool = False
    per_exposure: bool = False
    ensemble: Ensemble = "standardised"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise MethodError(f"Method(name={shorten(self.name)}): expected a text.")
        terms = self.query if isinstance(self.query, (tuple, list)) else ()
        if not 1 <= len(terms) <= MOST_PARTS or not all(isinstance(one, Term) for one in terms):
            raise MethodError(
                f"Method({self.name!r}, query={shorten(self.query, 120)}): expected at least one "
                f"Term, up to {MOST_PARTS}, in a tuple. HINT: query=(Term(SquaredNorm()),)."
            )
        object.__setattr__(self, "query", tuple(terms))
        check_boolean(self, "residual")
        check_boolean(self, "per_exposure")
        self._refuse_unrecorded()
        counts = {len(term.objective.parts) for term in self.query}
        if counts != {len(self.training.parts)}:
            raise ValueError(
                f"Method({self.name!r}): the training side has {len(self.training.parts)} "
                f"objectives and the terms of the query {sorted(counts)}; expected the same number "
                "everywhere. HINT: contrast(Joint(...)) for Joint(...)."
            )
        self._check_damping()
        for field, known, rule in (
            ("normalisation", get_args(Normalisation), None),
            ("ensemble", get_args(get_args(Ensemble)[0]), EnsembleRule),
        ):
            given = getattr(self, field)
            is_rule = rule is not None and isinstance(given, rule)
            if not is_rule and not (isinstance(given, str) and given in known):
                raise MethodError(
                    f"Method({self.name!r}, {field}={shorten(given, 120)}): expected one of {known}"
                    f"{f', or an instance of {rule.__name__}' if rule else ''}."
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

    def _check_damping(self) -> None:
        given: Any = self.damping
        if given is None or isinstance(given, DampingRule):
            return
        found = given if isinstance(given, str) and given == "agreement" else number(given)
        if found is None or (not isinstance(found, str) and found <= 0):
            raise MethodError(
                f"Method({self.name!r}, damping={shorten(given, 120)}): expected a number > 0, "
                "'agreement', None, or an instance of DampingRule. HINT: of several, "
                "ctrak_lightning.methods.damping.Agreement((0.1, 1.0)) takes the best."
            )
        object.__setattr__(self, "damping", found)

    def _refuse_unrecorded(self) -> None:
        refuse_unrecorded(self.name, Objective, self.training)
        for term in self.query:
            refuse_unrecorded(self.name, Objective, term.objective)
        for trajectory in (self.training_trajectory, self.query_trajectory):
            refuse_unrecorded(self.name, Trajectory, trajectory)
        if isinstance(self.damping, DampingRule):
            refuse_unrecorded(self.name, DampingRule, self.damping)
        if isinstance(self.ensemble, EnsembleRule):
            refuse_unrecorded(self.name, EnsembleRule, self.ensemble)

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
            "damping": _recorded(self.damping),
            "residual": self.residual,
            "ensemble": _recorded(self.ensemble),
            **({"per_exposure": True} if self.per_exposure else {}),
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "Method":
        """The method that :meth:`to_dict` described.

        A class of the user's own is found by its place among the classes that are imported.

        Raises:
            UnknownMethodError: there is none at that place.
            ValueError: an argument is unknown here or of the wrong kind, or a class is no name (a
                store of a newer version, or an altered one).
        """
        try:
            training = facts["training"]
            return cls(
                name=facts["name"],
                training=part_of(Objective, training["objective"]),
                training_trajectory=part_of(Trajectory, training["trajectory"]),
                query=tuple(
                    Term(
                        part_of(Objective, term["objective"]),
                        term["side"],
                        term["weight"],
                        term.get("reference"),
                    )
                    for term in _short(facts["query"])
                ),
                query_trajectory=part_of(Trajectory, facts["query_trajectory"]),
                normalisation=training["normalisation"],
                damping=_read(DampingRule, facts["damping"]),
                residual=facts["residual"],
                per_exposure=facts.get("per_exposure", False),
                ensemble=_read(EnsembleRule, facts["ensemble"]),
            )
        # RuntimeError: a RecursionError of values that are nested deeply.
        except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise MethodError(
                f"Method.from_dict: these facts describe no method: {shorten(error, 200)}. HINT: "
                "they are what Method.to_dict gives."
            ) from error


def _recorded(value: Any) -> Any:
    """A rule's class and arguments; what the library has a short word for, as it is."""
    return value.to_dict() if isinstance(value, Recorded) else value


def _short(terms: Any) -> Any:
    """What a store has of the query's terms, before each is built."""
    if not isinstance(terms, list) or len(terms) > MOST_PARTS:
        raise MethodError(
            f"query={shorten(terms[:9] if isinstance(terms, list) else terms)}: expected a list of up to {MOST_PARTS} terms."
        )
    return terms


def _read(base: type[Recorded], value: Any) -> Any:
    return part_of(base, value) if isinstance(value, dict) else value
