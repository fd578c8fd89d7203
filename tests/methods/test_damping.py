"""Damping rules and ensembles from outside the package, through everything that uses one: a new
rule is one class, such as those here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from ctrak_lightning import Attributor, Concept, Method, Sampler, TraceStore, methods
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.cli import main
from ctrak_lightning.errors import MethodError, StoreMismatchError, UnknownMethodError
from ctrak_lightning.gradients import GradientTracer, Projection
from ctrak_lightning.methods import DampingRule, EnsembleRule
from ctrak_lightning.methods.damping import (
    AGREEMENT_GRID,
    Agreement,
    Fixed,
    SharedAgreement,
    choice,
    grid_of,
)
from ctrak_lightning.methods.ensembles import weights_of
from ctrak_lightning.methods.moments import Moments
from ctrak_lightning.store import Checkpoint

from ..toy import QuickDiffusion, ToyData

RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})
BAR = Concept("bar", {"colour": "red", "shape": "bar"}, {"colour": "red"})


@dataclass(frozen=True)
class LargestMean(DampingRule):
    """A rule of each question: where the checkpoints' mean scores are largest."""

    low: float = 0.1
    high: float = 30.0

    def grid(self, checkpoints: Sequence[Checkpoint]) -> Sequence[float | None]:
        return (self.low, self.high, None)

    def choose(self, moments: Moments) -> Tensor:
        return moments.mean().sum(-1).argmax(0)


@dataclass(frozen=True)
class Condition(DampingRule):
    """A rule of the whole run, from the checkpoints' kernels."""

    share: float

    def grid(self, checkpoints: Sequence[Checkpoint]) -> Sequence[float | None]:
        largest = [float(one.kernel().eigenvalues.max()) for one in checkpoints]
        means = [one.kernel().trace / len(one.kernel().eigenvalues) for one in checkpoints]
        return (self.share * sum(largest) / sum(means),)


@dataclass(frozen=True)
class LastOnly(EnsembleRule):
    """The scores of the last checkpoint alone."""

    def weights(self, checkpoints: Sequence[Checkpoint]) -> list[float] | None:
        return [float(one is checkpoints[-1]) for one in checkpoints]


def method() -> Method:
    return replace(
        methods.concept_trak_norm(timesteps=2), name="own", damping=LargestMean(high=20.0)
    )


def traced(path: Path, features: int = 8, copies: int = 2, seed: int = 0) -> QuickDiffusion:
    """A store of ``24`` samples at two checkpoints, traced by :func:`method`."""
    module = QuickDiffusion(seed=seed)
    data = ToyData(batch_size=6, copies=copies)
    capture = Capture(
        str(path),
        module,
        module,
        torch.utils.data.DataLoader(data.toys, 6),
        method=method(),
        tracer=GradientTracer(module.denoiser, Projection(rank=4, dim=features)),
        progress=False,
    )
    for step in (1, 2):
        capture.run(step, epoch=0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)
    capture.writer.close()
    return module


@pytest.mark.filterwarnings("ignore:The concept direction")
@pytest.mark.parametrize("features", [8, 64], ids=["streamed", "dense"])
def test_a_rule_of_ones_own_chooses_for_every_question(tmp_path: Path, features: int) -> None:
    module = traced(tmp_path, features)
    attributor = Attributor(tmp_path, module, sampler=Sampler(steps=4))  # the store's own method
    assert attributor.method == method()
    assert json.loads(json.dumps(TraceStore(tmp_path).header.method))["damping"] == {
        "class": f"{__name__}.LargestMean",
        "low": 0.1,
        "high": 20.0,
    }
    query = attributor.query([RED, BAR, RED], [0, 1, 2])
    query.features[:, 2] *= -1  # so that not all questions have the same choice
    found = attributor.score(query)
    for i, result in enumerate(found):
        means = {
            damping: float(attributor.score(query, damping)[i].checkpoint_scores.mean(1).sum())
            for damping in (0.1, 20.0, None)
        }
        assert result.damping == max(means, key=means.__getitem__)
        assert torch.equal(result.scores, attributor.score(query, result.damping)[i].scores)
    assert len({result.damping for result in found}) > 1
    # The search through the same rule, block by block or not.
    for records, result in zip(attributor.top(query, 3), found, strict=True):
        expected = result.top(3)
        assert [one.score for one in records] == pytest.approx(
            [one.score for one in expected], rel=1e-4
        )


@pytest.mark.filterwarnings("ignore:The concept direction")
def test_a_rule_of_the_whole_run_looks_at_its_kernels(tmp_path: Path) -> None:
    module = traced(tmp_path)
    attributor = Attributor(tmp_path, module, sampler=Sampler(steps=4))
    query = attributor.query([RED, BAR], [0, 1])
    found = attributor.score(query, damping=Condition(0.5))
    kernels = [one.kernel() for one in attributor.store.checkpoints]
    wanted = 0.5 * sum(float(one.eigenvalues.max()) for one in kernels)
    wanted /= sum(one.trace / min(one.n, one.k) for one in kernels)
    assert [result.damping for result in found] == pytest.approx([wanted] * 2)
    assert torch.equal(found[1].scores, attributor.score(query, damping=wanted)[1].scores)
    assert found[0].method["damping"] == {"class": f"{__name__}.Condition", "share": 0.5}


@pytest.mark.filterwarnings("ignore:The concept direction")
def test_an_ensemble_of_ones_own(tmp_path: Path) -> None:
    module = traced(tmp_path)
    own = replace(method(), ensemble=LastOnly(), damping=3.0)
    assert Method.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    attributor = Attributor(tmp_path, module, method=own, sampler=Sampler(steps=4))
    query = attributor.query([RED], 0)
    [result] = attributor.score(query)
    assert torch.equal(result.scores, result.checkpoint_scores[1].float())
    assert [one.sample_id for one in attributor.top(query, 3)[0]] == [
        one.sample_id for one in result.top(3)
    ]


@pytest.mark.filterwarnings("ignore:The concept direction")
def test_the_command_line_finds_a_rule_by_the_methods_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traced(tmp_path / "traces", seed=3)
    config = tmp_path / "run.yaml"
    model = {"class_path": "tests.toy.QuickDiffusion", "init_args": {"seed": 3}}
    config.write_text(yaml.safe_dump({"model": model}))
    written = tmp_path / "found.json"
    arguments = ["attribute", str(tmp_path / "traces"), "--config", str(config), "--steps", "4"]
    question = ["--present", "colour=red", "shape=bar", "--absent", "shape=bar"]
    place = f"{__name__}.method"
    main([*arguments, *question, "--method", place, "--json", str(written)])
    assert "red-box" in capsys.readouterr().out
    document = json.loads(written.read_text())
    assert document["method"]["damping"]["class"] == f"{__name__}.LargestMean"
    assert document["damping"] in (0.1, 20.0, None)


def test_the_librarys_own_are_recorded_by_their_short_words() -> None:
    for damping in ("agreement", 0.3, 2, None):
        facts = replace(method(), damping=damping).to_dict()  # type: ignore[arg-type]
        assert facts["damping"] == damping
        assert facts["ensemble"] == "standardised"
        assert Method.from_dict(facts).damping == damping
    fewer = replace(method(), damping=Agreement((1.0, None)))
    assert Method.from_dict(json.loads(json.dumps(fewer.to_dict()))) == fewer


def test_what_a_store_says_is_no_reason_to_import_or_run_anything() -> None:
    facts = method().to_dict()
    for place in ("nowhere.Rule", "collections.OrderedDict", f"{__name__}.LastOnly", "Denoising"):
        facts["damping"]["class"] = place
        with pytest.raises(UnknownMethodError, match=rf"a damping rule of .* {place!r}.*HINT"):
            Method.from_dict(facts)


@dataclass(frozen=True)
class Wrong(DampingRule):
    dampings: Any
    chosen: Any = None

    def grid(self, checkpoints: Sequence[Checkpoint]) -> Any:
        return self.dampings

    def choose(self, moments: Moments) -> Tensor:
        return super().choose(moments) if self.chosen is None else torch.tensor(self.chosen)


@pytest.mark.parametrize(
    "grid",
    [[], [0.0], [-1.0, None], [float("inf")], [float("nan")], 1.0, None, "1.0,x"],
)
def test_a_grid_without_dampings_is_refused(grid: Any) -> None:
    with pytest.raises(
        MethodError, match="Wrong.*its dampings are .*expected a sequence of at least one"
    ):
        grid_of(Wrong(grid), [])


def test_a_choice_that_is_none_is_refused() -> None:
    moments = Moments()
    moments.add(torch.randn(2, 3, 4, 9))  # 2 dampings, 3 questions, 4 checkpoints
    assert choice(Wrong([1.0, 2.0], [0, 1, 1]), moments).tolist() == [0, 1, 1]
    for chosen in ([0, 1], [0, 1, 2], [0, 1, -1]):
        with pytest.raises(MethodError, match="for 3 questions and 2 dampings.*from 0 to 1"):
            choice(Wrong([1.0, 2.0], chosen), moments)
    for chosen in ([0.0, 1.0, 1.0], [True, False, True], 1):
        with pytest.raises(MethodError, match="for 3 questions and 2 dampings.*HINT"):
            choice(Wrong([1.0, 2.0], chosen), moments)
    with pytest.raises(MethodError, match=r"Wrong has no choose\(\)"):
        choice(Wrong([1.0, 2.0]), moments)


def test_dampings_of_a_tensor_are_numbers() -> None:
    grid = grid_of(Wrong(torch.tensor([1.0, 2.0])), [])
    assert [type(d) for d in grid] == [float, float]


def test_shared_agreement_takes_one_damping_for_all_questions() -> None:
    torch.manual_seed(0)
    truth = torch.randn(3, 1, 50).double()  # questions, checkpoints, samples
    noise = torch.randn(2, 3, 4, 50).double()
    # The first question alone agrees best at the first damping, the mean of all at the second.
    size = torch.tensor([[0.1, 1.5, 1.5], [0.3, 0.3, 0.3]])[:, :, None, None]
    moments = Moments()
    moments.add(truth[None] + size * noise)
    assert choice(Agreement((1.0, 2.0)), moments).tolist() == [0, 1, 1]
    assert choice(SharedAgreement((1.0, 2.0)), moments).tolist() == [1, 1, 1]
    method = replace(methods.influence(), damping=SharedAgreement((0.5, None)))
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_agreement_with_one_checkpoint_takes_one_damping() -> None:
    lone: list[Checkpoint] = [None]  # type: ignore[list-item]
    with pytest.warns(UserWarning, match="the store has one: 10.0 is used.*HINT"):
        assert grid_of(Agreement(), lone) == (10.0,)
    assert grid_of(Agreement(), lone * 2) == AGREEMENT_GRID
    assert grid_of(Fixed(None), lone) == (None,)


def test_learning_rates_that_a_store_lacks(tmp_path: Path) -> None:
    module = traced(tmp_path)
    attributor = Attributor(
        tmp_path,
        module,
        method=replace(method(), ensemble="learning_rate"),
        sampler=Sampler(steps=4),
    )
    query = attributor.query([RED], 0)
    for ask in (attributor.score, attributor.top):
        with pytest.raises(StoreMismatchError, match=r"no learning rate for steps \[1, 2\]"):
            ask(query)  # type: ignore[operator]


@dataclass(frozen=True)
class Weighing(EnsembleRule):
    given: str

    def weights(self, checkpoints: Sequence[Checkpoint]) -> Any:
        return {"short": [1.0], "nan": [1.0, float("nan")], "text": "ab", "numpy": np.ones(2)}[
            self.given
        ]


@pytest.mark.parametrize("given", ["short", "nan", "text"])
def test_weights_that_are_not_a_number_for_each_checkpoint_are_refused(given: str) -> None:
    with pytest.raises(MethodError, match="Weighing.*a finite number for each of 2 checkp.*HINT"):
        weights_of(Weighing(given), [None, None])  # type: ignore[list-item]
    assert weights_of(Weighing("numpy"), [None, None]) == [1.0, 1.0]  # type: ignore[list-item]
