import json
from dataclasses import replace

import pytest

from ctrak_lightning import Method, methods
from ctrak_lightning.objective import (
    ChannelProbe,
    Denoising,
    Joint,
    PosteriorSampling,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.trajectory import Generated, InTraining, Noised


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
    assert methods.d_trak(timesteps=4).training_dict() != methods.d_trak(timesteps=5).training_dict()
    assert methods.d_trak(damping=2.0).training_dict() == methods.d_trak().training_dict()


def test_concept_methods_look_at_the_absent_condition_and_whole_image_methods_do_not() -> None:
    seeing = {name for name in methods.PRESETS if methods.by_name(name).sees_absent}
    assert seeing == {"concept_trak", "concept_trak_norm", "concept_trak_paper", "inline_trak"}


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
