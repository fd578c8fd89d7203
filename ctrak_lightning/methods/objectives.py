"""Attribution objectives: each is the cotangent ``v`` of one vector-Jacobian product ``J^T v``.

``J = d e / d theta``, or for objectives of the network's own output ``J = d output / d theta``;
``D`` is the number of elements of a latent. A cotangent is always a
constant: the published losses stop the gradient through their targets, and for the losses that do
not, the cotangent is already their derivative.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ctrak_lightning.errors import MethodError, shorten
from ctrak_lightning.methods.numbers import (
    LARGEST_INTEGER,
    MOST_PARTS,
    check_boolean,
    check_integer,
    check_number,
    refuse,
)
from ctrak_lightning.methods.recorded import Recorded, part_of
from ctrak_lightning.schedules import Schedule
from ctrak_lightning.utilities.rng import seeded_noise

Side = Literal["present", "absent"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says of a state, under one condition.

    Args:
        x_t: states [B, ...].
        t: timesteps [B].
        x0: the sample's clean latents [B, ...].
        output: what the network returned [B, ...], with its graph.
        e: the noise prediction that the output stands for [B, ...], with its graph.
        reference: noise prediction [B, ...] under the condition that the objective is held against
            (:attr:`Objective.reference`), without graph, or None.
        schedule: the noise levels.
        reference_output: what the network returned there [B, ...], without graph, or None.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    output: Tensor
    e: Tensor
    reference: Tensor | None
    schedule: Schedule
    reference_output: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """The noise that the state holds [B, ...], however it was made: drawn, inverted or
        generated."""
        a, s = self.schedule.levels(self.t, self.x_t)
        return (self.x_t - a * self.x0) / s

    @property
    def x0_hat(self) -> Tensor:
        """The predicted clean latents [B, ...], with their graph: a function of ``output`` as ``e``
        is, and not of ``e``."""
        return self.schedule.x0_hat(self.output, self.x_t, self.t)


class Objective(Recorded, ABC):
    """A rule that gives the cotangent of a prediction. One of your own is a frozen dataclass.

    Attributes:
        needs_input_gradient: ``prediction.x_t`` requires grad.
        needs_reference: ``prediction.reference`` and ``reference_output`` are there: the prediction
            under another condition, at the cost of a forward pass. Of a training sample it is the
            null condition.
        reference: which condition that is on the query side: ``"other"`` is that of the other side
            (the absent one, for a term on the present side), ``"absent"`` on both sides the one
            without the concept. A :class:`Term` may name another.
        of_output: the cotangent is one of ``prediction.output``, not of ``prediction.e``.
    """

    needs_input_gradient: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    reference: ClassVar[Literal["other", "absent"]] = "other"
    of_output: ClassVar[bool] = False

    @abstractmethod
    def cotangent(self, prediction: Prediction) -> Tensor:
        """The cotangent ``v`` [B, ...] with respect to ``prediction.e``, or to
        ``prediction.output`` where the class says ``of_output = True``."""

    @property
    def parts(self) -> "tuple[Objective, ...]":
        """The objectives whose gradients are taken apart, normalised and sketched each on its own:
        this one alone."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Denoising(Objective):
    """The training loss ``mean((e - eps)^2)`` (TRAK on diffusion; Park et al. 2023, arXiv
    2303.14186)."""

    def cotangent(self, prediction: Prediction) -> Tensor:
        return 2 * (prediction.e - prediction.noise).detach() / _elements(prediction)


@dataclass(frozen=True, slots=True)
class Residual(Objective):
    """The training loss ``mean((f - target)^2)`` of the network's own output ``f``, whatever it
    predicts (noise, v, the clean image, a flow's velocity), with the residual taken under one
    condition and the derivative under another.

    Under the sample's own condition it is the gradient of the training loss (as TracIn's, Pruthi et
    al. 2020, arXiv 2002.08484): how the sample, as it is described, still pulls at the weights.
    That residual fades as training fits the sample. The residual *before* the condition, ``f(x_t,
    null) - target``, does not: it is what the condition is needed for. Of a query the condition
    before the concept is the absent one, so that ``contrast(Residual())`` is the gradient of
    ``L(c) - L(c_minus)``, what the concept's name is worth to the loss.

    The cotangent is one of the output: in noise space the same residual of a network that predicts
    the clean image is larger by ``a / s``, and its gradients by the square of that, so that the
    least noisy state would be all of a sum over states.

    Args:
        of: ``"condition"``, ``"null"``, or ``"both"``: their sum, in one vector-Jacobian product.

    Raises:
        MethodError: another ``of``.
    """

    of: Literal["condition", "null", "both"] = "condition"

    reference: ClassVar[Literal["other", "absent"]] = "absent"
    of_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.of not in ("condition", "null", "both"):
            raise ValueError(f"Residual(of={self.of!r}): expected 'condition', 'null' or 'both'.")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.of != "condition"

    def cotangent(self, prediction: Prediction) -> Tensor:
        target = prediction.schedule.target(prediction.x0, prediction.noise, prediction.t)
        residual = torch.zeros_like(target)
        if self.of != "null":
            residual = residual + prediction.output.detach() - target
        if self.of != "condition":
            assert prediction.reference_output is not None
            residual = residual + prediction.reference_output - target
        return 2 * residual / _elements(prediction)


@dataclass(frozen=True, slots=True)
class SquaredNorm(Objective):
    """``mean(e^2)``, the output function of D-TRAK (Zheng et al. 2024, arXiv 2311.00500)."""

    def cotangent(self, prediction: Prediction) -> Tensor:
        return 2 * prediction.e.detach() / _elements(prediction)


@dataclass(frozen=True, slots=True)
class MeanOutput(Objective):
    """``mean(e)``, the output function of DAS (arXiv 2410.18639), or ``mean(|e|)`` as
    Concept-TRAK's authors re-ran it.

    Args:
        absolute: take the mean of absolute values.
    """

    absolute: bool = False

    def __post_init__(self) -> None:
        check_boolean(self, "absolute")

    def cotangent(self, prediction: Prediction) -> Tensor:
        e = prediction.e.detach()
        return (e.sign() if self.absolute else torch.ones_like(e)) / _elements(prediction)


@dataclass(frozen=True, slots=True)
class ChannelProbe(Objective):
    """``mean(w e)`` with one standard normal weight per channel, the same at every position, for
    every sample and timestep.

    Inner products of ``J^T w`` are an estimate of the empirical tangent kernel (Jacot et al. 2018,
    arXiv 1806.07572) of the output's mean colour: :class:`MeanOutput` is the probe whose weights
    are all 1.

    Args:
        seed: of the weights.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self, "seed", least=-LARGEST_INTEGER)

    def cotangent(self, prediction: Prediction) -> Tensor:
        e = prediction.e.detach()
        shape = (e.shape[1], *[1] * (e.dim() - 2))
        weights = seeded_noise(shape, self.seed, 0, "channel probe").to(e)
        return weights.expand_as(e) / _elements(prediction)


@dataclass(frozen=True, slots=True)
class RandomProbe(Objective):
    """``mean(w f)`` of the network's own output ``f`` with a standard normal weight for every element,
    drawn once per timestep, the same for every sample.

    Inner products of ``J^T w`` are an estimate of the empirical tangent kernel (Jacot et al. 2018,
    arXiv 1806.07572) of the output, position by position, where :class:`ChannelProbe` sees its mean
    colours alone.

    Args:
        seed: of the weights.
    """

    seed: int = 0

    of_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self, "seed", least=-LARGEST_INTEGER)

    def cotangent(self, prediction: Prediction) -> Tensor:
        output = prediction.output.detach()
        known: dict[float, Tensor] = {}
        timesteps = prediction.t.tolist()
        for t in timesteps:
            if t not in known:
                known[t] = seeded_noise(output.shape[1:], self.seed, t, "random probe")
        weights = torch.stack([known[t] for t in timesteps])
        return weights.to(output) / _elements(prediction)


@dataclass(frozen=True, slots=True)
class PosteriorSampling(Objective):
    """Concept-TRAK's training loss (arXiv 2507.06547): ``mean((stop[e + d] - e)^2)`` with the
    diffusion-posterior-sampling direction ``d = grad_{x_t} mean((x0_hat - x0)^2)``. Needs states
    that require grad."""

    needs_input_gradient: ClassVar[bool] = True

    def cotangent(self, prediction: Prediction) -> Tensor:
        error = (prediction.x0_hat - prediction.x0).square().flatten(1).mean(1).sum()
        (direction,) = torch.autograd.grad(error, prediction.x_t, retain_graph=True)
        return -2 * direction / _elements(prediction)


@dataclass(frozen=True, slots=True)
class ConceptDirection(Objective):
    """Concept-TRAK's concept loss (arXiv 2507.06547): ``mean((stop[e + w u] - e)^2)`` with the
    direction ``u = e(c) - e(c_minus)`` that tells the condition with the concept from the one
    without. On the absent side of a query the direction is ``-u``, so that terms on both sides,
    added, give ``(J(c) - J(c_minus))^T u``."""

    needs_reference: ClassVar[bool] = True

    def cotangent(self, prediction: Prediction) -> Tensor:
        if prediction.reference is None:
            raise ValueError(
                "ConceptDirection needs the prediction under the other condition; it serves "
                "queries only."
            )
        return -2 * (prediction.e.detach() - prediction.reference) / _elements(prediction)


class Joint(Objective):
    """Several objectives from one forward pass: each is one vector-Jacobian product, normalised and
    sketched on its own.

    The sketches are independent, so that inner products of features are the sum of the objectives'
    own, in expectation.

    Args:
        parts: two objectives or more, up to a thousand.

    Raises:
        MethodError: fewer than two, or more, or a Joint among them, or what is no objective, or
            objectives of the output beside those of the noise prediction.
    """

    def __init__(self, *parts: Objective) -> None:
        if not 2 <= len(parts) <= MOST_PARTS or any(
            isinstance(part, Joint) or not isinstance(part, Objective) for part in parts
        ):
            raise MethodError(
                f"Joint{shorten(parts, 120)}: expected two objectives or more, up to {MOST_PARTS}, "
                "none of them a Joint. HINT: Joint(MeanOutput(), ChannelProbe(0))."
            )
        if len({(part.of_output, part.reference) for part in parts}) > 1:
            raise MethodError(
                f"Joint{shorten(parts, 120)}: some are objectives of the network's output and some "
                "of the noise prediction, or they are held against different conditions; expected "
                "those of one kind. HINT: trace them as two methods."
            )
        self._parts = parts

    @property
    def parts(self) -> tuple[Objective, ...]:
        return self._parts

    @property
    def needs_input_gradient(self) -> bool:  # type: ignore[override]
        return any(part.needs_input_gradient for part in self._parts)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return any(part.needs_reference for part in self._parts)

    @property
    def reference(self) -> Literal["other", "absent"]:  # type: ignore[override]
        return self._parts[0].reference

    @property
    def of_output(self) -> bool:  # type: ignore[override]
        return self._parts[0].of_output

    def cotangent(self, prediction: Prediction) -> Tensor:
        raise TypeError("Joint has no cotangent of its own. HINT: take those of its `parts`.")

    def to_dict(self) -> dict[str, Any]:
        return {"class": "Joint", "parts": [part.to_dict() for part in self._parts]}

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> "Joint":
        parts = arguments["parts"]
        if set(arguments) != {"parts"} or not isinstance(parts, list) or len(parts) > MOST_PARTS:
            raise MethodError(
                f"Joint({shorten(dict(arguments), 120)}): expected `parts`, a list of up to "
                f"{MOST_PARTS} objectives. HINT: Joint(MeanOutput(), ChannelProbe(0))."
            )
        return cls(*(part_of(Objective, part) for part in parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Joint) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    def __repr__(self) -> str:
        return f"Joint({', '.join(map(repr, self._parts))})"


@dataclass(frozen=True, slots=True)
class Term:
    """One summand ``weight * J(side)^T v(side)`` of a query's gradient; ``reference`` is the side
    whose prediction the objective is held against, where that is not the objective's own choice."""

    objective: Objective
    side: Side = "present"
    weight: float = 1.0
    reference: Side | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.side, str) and self.side in get_args(Side)):
            refuse(self, "side", f"one of {get_args(Side)}")
        check_number(self, "weight")
        if self.reference is not None and self.reference not in get_args(Side):
            refuse(self, "reference", f"one of {get_args(Side)}, or None")

    @property
    def reference_side(self) -> Side | None:
        """The side whose prediction the objective is held against; None for one that needs none."""
        if not self.objective.needs_reference:
            return None
        if self.reference is not None:
            return self.reference
        return "absent" if self.objective.reference == "absent" else other_side(self.side)

    def to_dict(self) -> dict[str, Any]:
        """JSON values that identify the term."""
        facts = {"objective": self.objective.to_dict(), "side": self.side, "weight": self.weight}
        return facts if self.reference is None else facts | {"reference": self.reference}


def other_side(side: Side) -> Side:
    """The condition on the other side of a question."""
    return "absent" if side == "present" else "present"


def contrast(objective: Objective) -> tuple[Term, Term]:
    """``J(c)^T v(c) - J(c_minus)^T v(c_minus)``: cancels what the two conditions share in the
    weights' space."""
    return Term(objective, "present", 1.0), Term(objective, "absent", -1.0)


_GRAPH_ERRORS = ("not have been used in the graph", "does not require grad", "second time")
"""What torch says of a derivative that a graph does not have."""


def cotangent_of(objective: Objective, prediction: Prediction) -> Tensor:
    """The objective's cotangent [B, ...].

    Raises:
        MethodError: it takes a derivative that there is not.
    """
    try:
        return objective.cotangent(prediction)
    except RuntimeError as error:
        if not any(words in str(error) for words in _GRAPH_ERRORS):
            raise
        raise MethodError(
            f"{objective}.cotangent() takes a derivative that there is not ({error}). Of a "
            "prediction, `e` and `x0_hat` are both functions of `output`, and neither of the "
            "other; `x_t` requires grad where the class says needs_input_gradient = True. HINT: "
            "with respect to e, `a, s = prediction.schedule.levels(prediction.t, prediction.x_t)` "
            "and `x0_hat = (prediction.x_t - s * e) / a` of `e = "
            "prediction.e.detach().requires_grad_()`; with respect to x_t, "
            "torch.autograd.grad(..., prediction.x_t, retain_graph=True)."
        ) from error


def _elements(prediction: Prediction) -> int:
    return prediction.e[0].numel()
