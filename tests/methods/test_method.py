import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrak_lightning import FlowSchedule, Method, methods
from ctrak_lightning.errors import MethodError, UnknownMethodError
from ctrak_lightning.methods.damping import Agreement, Fixed
from ctrak_lightning.methods.ensembles import Standardised
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    Denoising,
    Joint,
    Objective,
    PosteriorSampling,
    Prediction,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.methods.trajectories import Generated, InTraining, Inverted, Noised


@pytest.mark.parametrize("name", list(methods.PRESETS))
def test_a_method_survives_json(name: str) -> None:
    method = methods.by_name(name)
    assert method.name == name
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_joint_objectives_survive_json_and_need_the_same_number_on_both_sides() -> None:
    joint = Joint(SquaredNorm(), ChannelProbe(2))
    method = replace(methods.concept_trak(3), training=joint, query=contrast(joint))
    again = Method.from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert again.training.parts == (SquaredNorm(), ChannelProbe(2))
    assert again != replace(method, training=Joint(SquaredNorm(), ChannelProbe(3)))
    assert Joint(SquaredNorm(), PosteriorSampling()).needs_input_gradient
    assert not joint.needs_input_gradient
    with pytest.raises(ValueError, match=r"training side has 2 objectives.*\[1\]"):
        replace(method, query=contrast(SquaredNorm()))
    with pytest.raises(ValueError, match="two objectives or more"):
        Joint(SquaredNorm())


def test_presets_with_the_same_traces_say_so() -> None:
    assert methods.journey_trak().training_dict() == methods.trak().training_dict()
    assert methods.tracin().training_dict() == methods.trak().training_dict()
    assert methods.retrac().training_dict() != methods.tracin().training_dict()
    assert methods.d_trak().training_dict() != methods.trak().training_dict()
    assert (
        methods.d_trak(timesteps=4).training_dict() != methods.d_trak(timesteps=5).training_dict()
    )
    assert methods.d_trak(damping=2.0).training_dict() == methods.d_trak().training_dict()


def test_concept_methods_look_at_the_absent_condition_and_whole_image_methods_do_not() -> None:
    seeing = {name for name in methods.PRESETS if methods.by_name(name).sees_absent}
    assert seeing == {
        *("concept_trak", "concept_trak_norm", "concept_trak_paper", "inline_trak"),
        *("influence", "random_probe"),
    }


def test_unknown_names_and_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"by_name\('trakk'\).*concept_trak, concept_trak_paper"):
        methods.by_name("trakk")
    facts = methods.trak().to_dict()
    facts["query"][0]["objective"]["class"] = "os.system"
    with pytest.raises(ValueError, match=r"unknown class 'os.system'"):
        Method.from_dict(facts)
    with pytest.raises(ValueError, match="describe no method"):
        Method.from_dict({"name": "x"})


def test_a_method_that_cannot_work_is_refused() -> None:
    good = {
        "name": "m",
        "training": SquaredNorm(),
        "training_trajectory": Noised(),
        "query_trajectory": Generated(),
    }
    with pytest.raises(ValueError, match="at least one Term"):
        Method(**good, query=())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping=0"):
        Method(**good, query=(Term(SquaredNorm()),), damping=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping='oracle'.*'agreement'"):
        Method(**good, query=(Term(SquaredNorm()),), damping="oracle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ensemble='mean'.*standardised"):
        Method(**good, query=(Term(SquaredNorm()),), ensemble="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalisation=True.*layer"):
        Method(**good, query=(Term(SquaredNorm()),), normalisation=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query trajectory"):
        Method(**(good | {"training_trajectory": Generated()}), query=(Term(SquaredNorm()),))  # type: ignore[arg-type]
    inline = good | {"training_trajectory": InTraining(), "query": (Term(Denoising()),)}
    with pytest.raises(ValueError, match=r"training=SquaredNorm\(\).*expected training=Denoising"):
        Method(**inline)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="residual=True"):
        Method(**(inline | {"training": Denoising()}), residual=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"InTraining\(\) is a training trajectory"):
        Method(**(good | {"query_trajectory": InTraining()}), query=(Term(SquaredNorm()),))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class FourthPower(Objective):
    scale: float = 1.0

    def cotangent(self, prediction: Prediction) -> Tensor:
        return self.scale * 4 * prediction.e.detach() ** 3 / prediction.e[0].numel()


def test_an_objective_of_ones_own_is_found_among_the_imported_classes() -> None:
    method = replace(methods.d_trak(), training=FourthPower(2.0), query=contrast(FourthPower(2.0)))
    facts = json.loads(json.dumps(method.to_dict()))
    assert Method.from_dict(facts) == method
    assert facts["training"]["objective"]["class"] == f"{__name__}.FourthPower"
    for place in (
        "FourthPower",
        "__main__.FourthPower",
    ):  # an earlier store's, and that of a script
        facts["training"]["objective"]["class"] = place
        assert Method.from_dict(facts) == method
    for place in (
        "FifthPower",
        "another.module.FourthPower",
        "collections.OrderedDict",
        "os.system",
    ):
        facts["training"]["objective"]["class"] = place
        told = rf"unknown class '{place}'.*none is imported.*HINT.*method="
        with pytest.raises(UnknownMethodError, match=told):
            Method.from_dict(facts)

    @dataclass(frozen=True)
    class Other(FourthPower):
        pass

    Other.__qualname__ = "Elsewhere.FourthPower"
    assert Method.from_dict(method.to_dict()) == method
    facts["training"]["objective"]["class"] = "FourthPower"
    with pytest.raises(
        UnknownMethodError, match=r"there are several: .*Elsewhere\.FourthPower.*HINT"
    ):
        Method.from_dict(facts)


class Plain(Objective):
    def cotangent(self, prediction: Prediction) -> Tensor:
        return prediction.e.detach()


@dataclass(frozen=True)
class Weighted(Plain):
    weights: Tensor | tuple[float, ...] | float = 1.0


@dataclass(frozen=True)
class Shifted(Plain):
    shift: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", self.shift + 1)


class Initialised(Shifted):
    """What its initialiser takes is in no field."""

    def __init__(self, shift: float, other: float = 2.0) -> None:
        super().__init__(shift)
        object.__setattr__(self, "other", other)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (Initialised(1.0, 5.0), "Initialised is no dataclass"),
        (Plain(), r"Plain is no dataclass: expected @dataclass\(frozen=True\)"),
        (
            Weighted(torch.ones(3)),
            "Object of type Tensor is not JSON serializable: expected numbers and texts",
        ),
        (
            Weighted(float("nan")),
            "Out of range .* not JSON compliant.*: expected numbers and texts",
        ),
        (Weighted((1.0, torch.ones(2))), "Object of type Tensor is not JSON serializable"),  # type: ignore[arg-type]
        (Shifted(1.0), r"read back it would be Shifted\(shift=3.0\)"),
        (SquaredNorm, "it is no Objective: .*an instance rather than the class"),
    ],
    ids=["own initialiser", "no dataclass", "tensor", "nan", "tuple", "changed", "class"],
)
def test_an_objective_that_a_store_cannot_describe_is_refused_where_the_method_is_made(
    objective: Any, told: str
) -> None:
    good = methods.d_trak()
    for changed in ({"training": objective}, {"query": (Term(objective),)}):
        with pytest.raises(MethodError, match=rf"'d_trak'.*as an objective, for {told}.*HINT"):
            replace(good, **changed)


@dataclass(frozen=True)
class Windowed(Noised):
    """With fields that JSON has not as they are."""

    window: tuple[float, ...] = (0.25, 0.75)
    pairs: tuple[tuple[int, int], ...] = ()
    names: list[str] | None = None
    shift: float = 0.0


NUMBERS = [
    (np.float64(0.1), 0.1),
    (np.float32(0.5), 0.5),
    (np.int64(2), 2),
    (np.array(0.5), 0.5),
    (torch.tensor(0.5), 0.5),
    (3, 3),
]


@pytest.mark.parametrize(("given", "plain"), NUMBERS, ids=repr)
def test_numbers_of_numpy_and_torch_are_recorded_as_plain_ones(given: Any, plain: float) -> None:
    good = methods.d_trak()
    several = (given, None, given)
    for damping in (given, Fixed(given), *map(Agreement, (several, list(several)))):
        method = replace(good, damping=damping)
        facts = json.loads(json.dumps(method.to_dict()))
        assert Method.from_dict(facts) == method
        numbers = facts["damping"]
        if isinstance(numbers, dict):
            numbers = numbers.get("damping", numbers.get("dampings"))
        numbers = numbers if isinstance(numbers, list) else [numbers]
        assert numbers in ([plain], [plain, None, plain])
        assert type(method.to_dict()["damping"]) in (dict, type(plain))
    assert type(replace(good, damping=given).damping) is type(plain)
    assert Agreement(np.array([0.1, 1.0])).dampings == (0.1, 1.0)  # type: ignore[arg-type]
    assert replace(good, residual=np.bool_(True)).residual is True
    term = Term(SquaredNorm(), "present", given)
    assert type(term.weight) is type(plain)
    assert type(Windowed(shift=given).to_dict()["shift"]) is type(plain)


def test_fields_that_are_tuples_are_read_back_as_they_were() -> None:
    own = Windowed(window=(0.1, np.float32(0.5)), pairs=((1, 2),), names=["a"])  # type: ignore[arg-type]
    method = replace(
        methods.d_trak(),
        query_trajectory=own,
        training=Weighted((1.0, 2.0)),
        query=(Term(Weighted((1.0, 2.0))),),
    )
    facts = json.loads(json.dumps(method.to_dict()))
    assert facts["query_trajectory"]["window"] == [0.1, 0.5]
    again = Method.from_dict(facts)
    assert again == method
    assert hash(again.training) == hash(method.training)
    # As a store's are compared with a method's.
    assert facts["training"] == method.training_dict()
    listed = replace(method, query_trajectory=replace(own, window=[0.1, 0.5]))
    assert listed.to_dict() == facts


@pytest.mark.parametrize(
    "bad",
    [True, 0, -1, float("inf"), float("nan"), "x", 10**400, np.bool_(True), [0.1], {}, ()],
    ids=str,
)
def test_dampings_that_are_no_number_above_0_are_refused(bad: Any) -> None:
    for make in (
        Fixed,
        lambda one: Agreement((1.0, one)),
        lambda one: replace(methods.d_trak(), damping=one),
    ):
        with pytest.raises(MethodError, match=r"expected a .*number > 0.*HINT"):
            make(bad)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Agreement(()), r"Agreement\(dampings=\(\)\): expected 1 to 1000 dampings"),
        (lambda: Agreement((1.0,) * 1001), r"expected 1 to 1000 dampings.*HINT"),
        (lambda: Agreement("1.0"), r"expected 1 to 1000 dampings.*HINT"),  # type: ignore[arg-type]
        (lambda: Term(SquaredNorm(), "left"), r"Term\(side='left'\): expected one of .*absent"),  # type: ignore[arg-type]
        (lambda: Term(SquaredNorm(), weight=float("nan")), r"Term\(weight=nan\): expected a finite"),
        (lambda: Noised(timesteps=True), r"Noised\(timesteps=True\): expected an integer"),
        (lambda: Noised(timesteps=0), r"Noised\(timesteps=0\): expected an integer of at least 1"),
        (lambda: Noised(start=0.5, end=0.5), r"Noised\(start=0\.5\): expected a share below"),
        (lambda: Noised(shared_noise="no"), r"Noised\(shared_noise='no'\): expected True or False"),  # type: ignore[arg-type]
        (lambda: Generated(timesteps=0), r"Generated\(timesteps=0\): .* or None"),
        (lambda: Inverted(steps=2.5), r"Inverted\(steps=2\.5\): expected an integer"),  # type: ignore[arg-type]
        (lambda: Inverted(guidance=float("inf")), r"Inverted\(guidance=inf\): expected a finite"),
        (lambda: ChannelProbe("1"), r"ChannelProbe\(seed='1'\): expected an integer"),  # type: ignore[arg-type]
        (lambda: Joint(*[SquaredNorm()] * 1001), r"two objectives or more, up to 1000"),
        (lambda: Joint(SquaredNorm(), 1), r"two objectives or more"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), name=1), r"Method\(name=1\): expected a text"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), query=Term(SquaredNorm())), r"query=Term.*expected at least one Term"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), query=(SquaredNorm(),)), r"expected at least one Term"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), residual=1), r"Method\(residual=1\): expected True or False"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), normalisation=Standardised()), r"normalisation=Standardised\(\)\): expected one of \('none', 'sample', 'layer'\)\."),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), ensemble=Fixed(1.0)), r"ensemble=Fixed.*'learning_rate'\), or an instance of EnsembleRule"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), ensemble=Standardised), r"ensemble=<class.*or an instance of EnsembleRule"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), damping=Standardised()), r"damping=Standardised.*instance of DampingRule"),  # type: ignore[arg-type]
        (lambda: replace(methods.d_trak(), query_trajectory=SquaredNorm()), r"it is no Trajectory"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_named(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(MethodError, match=told):
        make()


def test_a_name_that_the_library_has_too_is_one_at_another_place() -> None:
    @dataclass(frozen=True)
    class Shadow(SquaredNorm):
        pass

    Shadow.__name__ = "MeanOutput"
    method = replace(methods.d_trak(), training=Shadow(), query=contrast(Shadow()))
    assert Method.from_dict(method.to_dict()) == method


def test_the_probes_of_the_default_are_different_ones() -> None:
    """Two probes of one seed would be one probe that weighs double."""
    clean = torch.zeros(1, 8, 2, 2)
    e = torch.linspace(-1, 1, 32).view_as(clean)
    prediction = Prediction(clean, torch.zeros(1), clean, e, e, None, FlowSchedule())
    method = methods.concept_trak()
    sides = [method.training, *(term.objective for term in method.query)]
    assert len(sides) == 3
    for objective in sides:
        cotangents = torch.stack([part.cotangent(prediction).flatten() for part in objective.parts])
        assert len(cotangents) == 4
        assert torch.linalg.matrix_rank(cotangents) == 4
        cosines = torch.corrcoef(cotangents[1:])[~torch.eye(3, dtype=torch.bool)]
        assert float(cosines.abs().max()) < 0.9
