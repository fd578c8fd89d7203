"""A trial before the first step: what a capture could not do is refused by name, and nothing has
been written or moved."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ctrak_lightning import (
    Capture,
    DiffusionTask,
    Encoded,
    GradientTracer,
    NoiseSchedule,
    Projection,
    methods,
)
from ctrak_lightning.capture.reference_check import selfcheck
from ctrak_lightning.capture.trial import Question, ZeroGradientWarning, conditions_of
from ctrak_lightning.errors import (
    BatchError,
    ExtensionError,
    GradientError,
    MethodError,
    TrialError,
)
from ctrak_lightning.gradients import layers
from ctrak_lightning.gradients.kinds.convolution import ConvLayer
from ctrak_lightning.gradients.tracer import CHECK_TOLERANCE, HALF_TOLERANCE
from ctrak_lightning.methods.method import Method
from ctrak_lightning.methods.objectives import Joint, MeanOutput, Objective, Prediction, contrast
from ctrak_lightning.methods.trajectories import Inverted, Noised
from ctrak_lightning.utilities.processes import ALONE, Processes

from ..threads import together
from ..toy import scheduler

FAULT = RuntimeError("of mine")
D_TRAK = methods.d_trak(timesteps=2)
INVERTED = replace(D_TRAK, training_trajectory=Inverted(steps=2, guidance=2.0))


class Images(Dataset[dict[str, Any]]):
    def __init__(self, n: int = 6) -> None:
        self.images = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.images[i], "sample_id": f"s{i}"}


class Network(nn.Module):
    """Two convolutions and a table of words; told, with its samples mixed, or with a layer that
    sees them second."""

    def __init__(self, mixes: str = "") -> None:
        super().__init__()
        self.first, self.words, self.last = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Linear(5, 4),
            nn.Conv2d(4, 3, 1),
        )
        self.mixes = mixes

    def forward(self, x: Tensor, words: Tensor | None) -> Tensor:
        h = self.first(x)
        if words is not None:
            h = h + self.words(words)[:, :, None, None]
        if self.mixes == "in both passes":
            h = h - h.mean(0)
        if self.mixes == "in the backward pass":
            h = h + (h - h.detach()).mean(0)
        return self.last(torch.tanh(h))  # type: ignore[no-any-return]


class Task(DiffusionTask, nn.Module):
    """Its members raise what ``faults`` has under their names."""

    def __init__(
        self, faults: dict[str, Exception] | None = None, has_words: bool = True, mixes: str = ""
    ):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = Network(mixes)
        self.drop = nn.Dropout(0.5)
        self.noise_schedule = NoiseSchedule.from_scheduler(scheduler())
        self.faults, self.has_words = faults or {}, has_words

    def _maybe(self, name: str) -> None:
        if name in self.faults:
            raise self.faults[name]

    def encode(self, batch: dict[str, Any]) -> Encoded:
        self._maybe("encode")
        return Encoded(
            latents=batch["image"],
            condition=self.condition("", len(batch["image"])) if self.has_words else {},
            sample_ids=list(batch["sample_id"]),
        )

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        if spec == {}:
            self._maybe("condition")
        return {"words": torch.ones(n, 5)}

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self._maybe("predict")
        return self.denoiser(x_t, condition.get("words"))  # type: ignore[no-any-return]

    def pictures(self, batch: Any) -> Tensor | None:
        self._maybe("pictures")
        return None

    def decode(self, latents: Tensor) -> Tensor:
        self._maybe("decode")
        return latents


def capture(
    path: Path,
    task: Task,
    batches: Iterable[Any] | None = None,
    method: Method = D_TRAK,
    processes: Processes = ALONE,
    **kwargs: Any,
) -> Capture:
    tracer = GradientTracer(task.denoiser, Projection(rank=2, dim=16))
    batches = DataLoader(Images(), 3) if batches is None else batches
    options = {
        "method": method,
        "tracer": tracer,
        "progress": False,
        "processes": processes,
    } | kwargs
    return Capture(str(path / "store"), task, task, batches, **options)


@pytest.mark.parametrize(
    ("member", "method", "told"),
    [
        ("encode", D_TRAK, r"Task\.encode\(batch of dict \['image', 'sample_id'\]\)"),
        (
            "predict",
            D_TRAK,
            r"\['s0', 's1'\].*Task\.predict\(float32 \[2, 3, 6, 6\], int64 \[2\], \{words float32 \[2, 5\]\}\)",
        ),
        ("condition", INVERTED, r"Task\.condition\(\{\}, 2\)"),
        ("pictures", D_TRAK, r"`pictures\(batch\)`"),
        ("decode", D_TRAK, r"`decode\(latents\)`"),
    ],
)
def test_what_a_member_raises_is_told_with_its_name_and_what_it_was_given(
    tmp_path: Path, member: str, method: Method, told: str
) -> None:
    fault = RuntimeError("expected input to have 9 channels")
    with pytest.raises(
        TrialError, match=f"{told}.*RuntimeError: expected input to have 9 channels.*HINT"
    ) as found:
        capture(tmp_path, Task({member: fault}), method=method)
    assert found.value.__cause__ is fault
    assert not (tmp_path / "store").exists()


class OddConv(ConvLayer):
    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        raise FAULT


@dataclass(frozen=True)
class OddObjective(Objective):
    def cotangent(self, prediction: Prediction) -> Tensor:
        raise FAULT


@dataclass(frozen=True)
class ScalarObjective(Objective):
    def cotangent(self, prediction: Prediction) -> Tensor:
        return prediction.e.mean()


@dataclass(frozen=True)
class OddTrajectory(Noised):
    gives: str = ""

    def states(self, *args: Any) -> Any:
        if not self.gives:
            raise FAULT
        return [self.gives]


@pytest.mark.parametrize("mode", ["trial", "selfcheck"])
@pytest.mark.parametrize(
    ("method", "told"),
    [
        (None, r"OddConv\.keep, of layer 'first', raised RuntimeError: of mine"),
        (
            replace(D_TRAK, training=OddObjective()),
            r"OddObjective\.cotangent\(prediction\) raised RuntimeError: of mine",
        ),
        (
            replace(D_TRAK, training=ScalarObjective()),
            r"ScalarObjective\.cotangent\(prediction\) returned shape \[\], expected the shape "
            r"\[2, 3, 6, 6\]",
        ),
        (
            replace(D_TRAK, training_trajectory=OddTrajectory()),
            r"OddTrajectory\.states\(.*\) raised RuntimeError: of mine",
        ),
        (
            replace(D_TRAK, training_trajectory=OddTrajectory(gives="a state")),
            r"OddTrajectory\.states\(.*\) gave str among its states, expected",
        ),
    ],
)
def test_what_an_extension_raises_is_not_said_of_task_and_data(
    tmp_path: Path, method: Method | None, told: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method is None:
        monkeypatch.setitem(layers._KINDS, "torch.nn.modules.conv.Conv2d", OddConv)
    task = Task()
    if mode == "selfcheck":
        with pytest.raises(ExtensionError, match=rf"{told}.*HINT") as found:
            selfcheck(task, next(iter(DataLoader(Images(), 2))), method=method or D_TRAK)
    else:
        with pytest.raises(TrialError, match=rf"{told}.*HINT") as found:
            capture(tmp_path, task, method=method or D_TRAK)
        assert "Task.predict" not in str(found.value)
    if "raised" in told:
        assert found.value.__cause__ is FAULT


def test_a_broken_data_set_and_a_missing_field_are_told(tmp_path: Path) -> None:
    class Broken(Images):
        def __getitem__(self, i: int) -> dict[str, Any]:
            raise OSError("the image is truncated")

    class Nameless(Images):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"image": self.images[i]}

    with pytest.raises(
        TrialError, match="loading the first samples.*OSError: the image is truncated"
    ):
        capture(tmp_path, Task(), DataLoader(Broken(), 3))
    with pytest.raises(
        TrialError, match=r"asked for 'sample_id', and the batch has \['image'\].*HINT"
    ) as found:
        capture(tmp_path, Task(), DataLoader(Nameless(), 3))
    assert isinstance(found.value.__cause__, BatchError)
    with pytest.raises(TrialError, match="gone through once.*HINT"):
        capture(tmp_path, Task(), iter(DataLoader(Images(), 3)))


@pytest.mark.parametrize("samples", [6, 1])
def test_a_network_that_mixes_the_samples_of_a_batch_is_refused_by_layer(
    tmp_path: Path, samples: int
) -> None:
    """Also where there is one sample to try; not where batches are of one sample."""
    batches = DataLoader(Images(samples), 3)
    with pytest.raises(
        TrialError, match=r"depends on the other samples of its batch.*first, words.*HINT"
    ) as found:
        capture(tmp_path, Task(mixes="in both passes"), batches)
    assert isinstance(found.value.__cause__, GradientError)
    assert (
        capture(tmp_path, Task(mixes="in both passes"), batches, rows_at_once=1).trial is not None
    )


def test_buffers_that_every_pass_changes_are_named_where_rows_are_not_a_samples_own(
    tmp_path: Path,
) -> None:
    class Running(Network):
        """A running estimate of the size of its inputs, in evaluation mode too; and a counter that
        nothing depends on."""

        estimate: Tensor

        def __init__(self, is_used: bool) -> None:
            super().__init__()
            self.is_used = is_used
            self.register_buffer("estimate", torch.ones(1))
            self.register_buffer("constant", torch.ones(1))

        def forward(self, x: Tensor, words: Tensor | None) -> Tensor:
            self.estimate.mul_(0.5).add_(x.detach().abs().mean())
            return super().forward(x / self.estimate if self.is_used else x, words)

    for is_used in (True, False):
        task = Task()
        task.denoiser = Running(is_used)
        if is_used:
            with pytest.raises(
                TrialError,
                match=r"differ.*A likely cause.*buffers 'denoiser\.estimate', .*HINT.*training",
            ) as found:
                capture(tmp_path, task)
            assert isinstance(found.value.__cause__, GradientError)
        else:
            assert capture(tmp_path, task).trial is not None
        assert float(task.denoiser.estimate) == 1
    with pytest.raises(TrialError) as mixed:
        capture(tmp_path / "mixed", Task(mixes="in both passes"))
    assert "buffers" not in str(mixed.value)


def test_two_samples_are_taken_from_batches_of_one(tmp_path: Path) -> None:
    found = capture(tmp_path, Task(), DataLoader(Images(), 1)).trial
    assert found is not None
    assert (found.samples, found.blocks, found.all_blocks) == (2, 3, 3)
    assert "the trial on 2 samples passed in" in str(found)


def test_layers_without_a_gradient_are_not_said_to_be_right(tmp_path: Path) -> None:
    task = Task()
    nn.init.zeros_(task.denoiser.last.weight)  # as a network begins whose last layer is zero
    found = capture(tmp_path, task).trial
    assert found is not None
    assert (found.blocks, found.all_blocks) == (1, 3)


@dataclass(frozen=True)
class Masked(Objective):
    """The squared norm, times ``weight``, at the timesteps from ``start`` on."""

    weight: float = 1.0
    start: int = 0

    def cotangent(self, prediction: Prediction) -> Tensor:
        is_on = (prediction.t >= self.start)[:, None, None, None]
        return self.weight * is_on * prediction.e.detach()


@pytest.mark.parametrize("training", [Masked(0.0), Joint(MeanOutput(), Masked(0.0))])
@pytest.mark.parametrize("samples", [6, 1])
def test_an_objective_that_is_always_zero_is_refused(
    tmp_path: Path, training: Objective, samples: int
) -> None:
    """Also as one of several, and where the network's output is zero as well."""
    task = Task()
    for is_zero in (False, True):
        if is_zero:
            nn.init.zeros_(task.denoiser.last.weight)
            nn.init.zeros_(task.denoiser.last.bias)
        with pytest.raises(
            TrialError, match=r"Masked\(weight=0\.0, .*zero everywhere.*HINT"
        ) as found:
            capture(
                tmp_path,
                task,
                DataLoader(Images(samples), 3),
                method=replace(D_TRAK, training=training, query=contrast(training)),
            )
        assert isinstance(found.value.__cause__, MethodError)
        assert not (tmp_path / "store").exists()


def test_gradients_that_begin_as_zero_are_warned_of(tmp_path: Path) -> None:
    """The squared norm of an output that begins as zero; layers behind a last one of zeros."""
    task = Task()
    last = task.denoiser.last
    trained = last.weight.detach().clone()
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with pytest.warns(
        ZeroGradientWarning,
        match=r"SquaredNorm\(\) are exactly zero in all 3 .*\['s0', 's1'\].* for what the "
        r"network predicts now, and not for another.*HINT",
    ):
        made = capture(tmp_path, task)
    last.weight.data.copy_(trained)
    made.run(1, epoch=0)
    made.close()
    assert made.writer.sealed_steps == [1]
    nn.init.zeros_(last.weight)
    with pytest.warns(ZeroGradientWarning, match="all 1 .*no traced layer has a gradient of it"):
        capture(
            tmp_path / "behind",
            task,
            method=replace(D_TRAK, training=MeanOutput()),
            tracer=GradientTracer(task.denoiser, Projection(rank=2, dim=16), layers=["first"]),
        ).close()


def test_an_objective_of_some_timesteps_alone_is_none_of_zeros(tmp_path: Path) -> None:
    """The trial looks at the state in the middle first."""
    method = replace(
        D_TRAK,
        training=Masked(start=90),
        training_trajectory=Noised(timesteps=5),
        normalisation="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture(tmp_path, Task(), method=method).trial is not None
    method = replace(method, training=Masked(start=101))
    with pytest.raises(TrialError, match="zero everywhere"):
        capture(tmp_path / "never", Task(), method=method)


def test_layers_without_a_gradient_are_looked_at_by_the_first_capture(tmp_path: Path) -> None:
    task = Task(mixes="in the backward pass")
    last = task.denoiser.last.weight
    trained = last.detach().clone()
    nn.init.zeros_(last)
    made = capture(tmp_path, task)
    last.data.copy_(trained)
    with pytest.raises(GradientError, match="belong to no sample alone: first, words.*HINT"):
        made.run(3, epoch=0)
    assert made.writer.sealed_steps == []


def test_a_gradient_that_is_not_finite_names_the_sample(tmp_path: Path) -> None:
    images = Images()
    images.images[1] = float("nan")
    with pytest.raises(TrialError, match=r"The gradient of \['s1'\] is not finite.*HINT"):
        capture(tmp_path, Task(), DataLoader(images, 3))


def test_a_method_that_compares_conditions_is_refused_of_a_model_without(tmp_path: Path) -> None:
    with pytest.raises(
        TrialError, match=r"'concept_trak'.*Task has none.*HINT: trace with methods\.d_trak\(\)"
    ):
        capture(tmp_path, Task(has_words=False), method=methods.concept_trak())
    assert capture(tmp_path, Task(has_words=False)).trial is not None


def test_a_store_with_sealed_traces_is_continued_without_a_trial(tmp_path: Path) -> None:
    task = Task()
    capture(tmp_path, task).writer.close()
    made = capture(tmp_path, task)
    assert made.trial is not None
    made.run(3, epoch=0)
    made.writer.close()
    assert capture(tmp_path, task).trial is None


def test_nothing_is_moved(tmp_path: Path) -> None:
    task = Task()
    task.drop.train()
    task.denoiser.eval()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    with pytest.raises(TrialError):
        capture(tmp_path, Task({"predict": ValueError("x")}), method=INVERTED)
    capture(tmp_path, task)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert (task.drop.training, task.denoiser.training) == (True, False)
    assert not any(module._forward_hooks for module in task.modules())


def test_half_precision_is_compared_as_exactly_as_its_kernels_are(tmp_path: Path) -> None:
    class Half(Images):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return super().__getitem__(i) | {"image": self.images[i].bfloat16()}

    def tolerance(task: Task) -> float:
        return GradientTracer(task.denoiser)._tolerance()

    class HalfTask(Task):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            return {name: value.bfloat16() for name, value in super().condition(spec, n).items()}

    task = HalfTask().bfloat16()
    assert capture(tmp_path, task, DataLoader(Half(), 3)).trial is not None
    assert (tolerance(task), tolerance(Task())) == (HALF_TOLERANCE, CHECK_TOLERANCE)


def test_a_batch_that_does_not_fit_into_memory_is_tried_in_parts(tmp_path: Path) -> None:
    class Large(Task):
        def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            if len(x_t) > 1:
                raise MemoryError
            return super().predict(x_t, t, condition)

    with pytest.warns(UserWarning, match="Memory ran out in a pass over 2 samples"):
        assert capture(tmp_path, Large()).trial is not None
    with pytest.raises(TrialError, match="not enough memory to trace a single sample"):
        capture(tmp_path, Task({"predict": MemoryError()}))


def test_one_process_that_fails_is_told_to_all(tmp_path: Path) -> None:
    class Second(Images):
        def __getitem__(self, i: int) -> dict[str, Any]:
            if i >= 3:
                raise OSError("the image is truncated")
            return super().__getitem__(i)

    ended = together(
        2, lambda processes: capture(tmp_path, Task(), DataLoader(Second(), 3), processes=processes)
    )
    assert [type(error) for error in ended] == [TrialError, TrialError]
    assert "The process of rank 1: TrialError" in str(ended[0])


def test_questions_are_tried(tmp_path: Path) -> None:
    class Wordless(Task):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            is_asked = bool(spec) and not isinstance(spec, str)
            return {"words": torch.ones(n, 7)} if is_asked else super().condition(spec, n)

    asked = Question("cat", {"object": "cat"}, {}, is_guided=False)
    with pytest.raises(
        TrialError,
        match=r"asking Concept\('cat'\).*Wordless\.predict\(.*words float32 \[1, 7\].*HINT",
    ):
        capture(tmp_path, Wordless(), questions=[asked])
    capture(tmp_path, Task(), questions=[asked])


@pytest.mark.parametrize("method", [D_TRAK, INVERTED])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda n: {"words": torch.ones(1, 5)}, r"{words: float32 \[1, 5\]}"),
        (lambda n: {"words": torch.ones(n + 1, 5)}, r"{words: float32 \[3, 5\]}"),
        (lambda n: {"words": torch.ones(5 * n)}, r"{words: float32 \[10\]}"),
        (lambda n: {"words": torch.tensor(1.0)}, r"{words: float32 \[\]}"),
        (lambda n: {"words": [1.0] * n}, r"{words: list of 2}"),
        (lambda n: torch.ones(n, 5), r"float32 \[2, 5\]"),
        (lambda n: None, "None"),
    ],
)
def test_a_null_condition_of_other_rows_than_asked_for_is_refused(
    tmp_path: Path, given: Any, told: str, method: Method
) -> None:
    class Odd(Task):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            return given(n) if spec == {} else super().condition(spec, n)  # type: ignore[no-any-return]

    with pytest.raises(
        TrialError,
        match=rf"Odd\.condition\(\{{\}}, 2\) returned {told}, expected a dict of tensors, each "
        r"\[2, \.\.\.\]\. HINT",
    ):
        capture(tmp_path, Odd(), method=method)


@pytest.mark.parametrize("given", [{}, {"tags": torch.ones(1, 5)}, {"words": torch.ones(1, 4)}])
def test_a_null_condition_that_the_network_does_not_take_is_refused(
    tmp_path: Path, given: dict[str, Tensor]
) -> None:
    class Odd(Task):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            if spec != {}:
                return super().condition(spec, n)
            return {name: value.expand(n, -1) for name, value in given.items()}

        def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return self.denoiser(x_t, condition["words"])  # type: ignore[no-any-return]

    with pytest.raises(
        TrialError,
        match=r"Odd\.predict\(\) does not take what Odd\.condition\(\{\}, 1\) returned.*"
        r"`encode\(batch\)\.condition` of 2 samples has {words: float32 \[2, 5\]}.*HINT",
    ):
        capture(tmp_path, Odd())


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (lambda output: (output,), r"returned tuple of 1, .*HINT: return the network's output al"),
        (lambda output: None, r"returned None, expected the shape of x_t.*HINT"),
        (lambda output: output.mean(1), r"returned float32 \[2, 6, 6\], expected.*HINT"),
        (lambda output: output.repeat(1, 2, 1, 1), r"\[2, 6, 6, 6\].*HINT: .*variance.*chunk"),
    ],
)
def test_predict_gives_the_shape_of_its_input(tmp_path: Path, output: Any, told: str) -> None:
    """A missing dimension would be broadcast, and traced as something else."""

    class Odd(Task):
        def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return output(super().predict(x_t, t, condition))  # type: ignore[no-any-return]

    with pytest.raises(TrialError, match=rf"Odd\.predict\(x_t float32 \[.*, condition\) .*{told}"):
        capture(tmp_path, Odd())


def test_the_default_predict_of_another_network_is_told(tmp_path: Path) -> None:
    class Default(Task):
        predict = DiffusionTask.predict  # type: ignore[assignment]

    with pytest.raises(TrialError, match=r"return_dict.*HINT: .*define predict\(x_t, t, cond"):
        capture(tmp_path, Default())


@pytest.mark.parametrize(
    "images",
    [
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.mean(1),
        lambda x: x[:1],
        lambda x: x.mul(255).byte(),
        lambda x: list(x),
    ],
)
def test_pictures_that_are_none_are_told(tmp_path: Path, images: Any) -> None:
    class Odd(Task):
        def decode(self, latents: Tensor) -> Tensor:
            return images(latents)  # type: ignore[no-any-return]

    with pytest.raises(TrialError, match=r"expected floating-point images \[3, 3, H, W\].*HINT"):
        capture(tmp_path, Odd())


def test_a_network_that_draws_in_evaluation_mode_is_told_from_one_that_mixes_samples(
    tmp_path: Path,
) -> None:
    class Drawing(Network):
        def forward(self, x: Tensor, words: Tensor | None) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5), words)

    task = Task()
    task.denoiser = Drawing()
    with pytest.raises(
        TrialError, match="the network's outputs in two passes of the same samples.*HINT.*drawn"
    ):
        capture(tmp_path, task)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"words": torch.ones(2, 5)}, r"it gave words float32 \[2, 5\], expected one row"),
        (
            {"words": torch.ones(1, 5), "more": torch.ones(1)},
            r"expected one row \[1, ...\] of each of \['words'\]",
        ),
        (KeyError("dragon"), r"KeyError: 'dragon'.*HINT"),
    ],
)
def test_a_condition_that_is_none_is_refused_with_its_side(given: Any, told: str) -> None:
    class Odd(Task):
        def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
            if spec:
                return super().condition(spec, n)
            if isinstance(given, Exception):
                raise given
            return given  # type: ignore[no-any-return]

    with pytest.raises(
        TrialError, match=rf"Concept\('cat', absent=\{{\}}\): Odd\.condition\(\{{\}}, 1\).*{told}"
    ):
        conditions_of(Odd(), Question("cat", {"object": "cat"}, {}, is_guided=True))
    with pytest.raises(TrialError, match=r"Concept\('cat', null=\{\}\)"):
        conditions_of(Odd(), Question("cat", {"object": "cat"}, "a dog", is_guided=True))


class Counting(nn.Module):
    """Counts its calls, also in evaluation mode: in place, or by a new tensor."""

    def __init__(self, inner: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = inner, in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, words: Tensor | None) -> Tensor:
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.inner(x, words)  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_forward_pass_counts_is_as_before(tmp_path: Path, in_place: bool) -> None:
    task = Task()
    task.denoiser = Counting(task.denoiser, in_place)
    calls = task.denoiser.calls
    kept = capture(tmp_path, task)
    kept.run(0, epoch=0)
    assert task.denoiser.calls is calls
    assert float(calls) == 0


def test_a_network_that_takes_its_first_values_from_a_batch_is_refused(tmp_path: Path) -> None:
    class ActNorm(Network):
        def forward(self, x: Tensor, words: Tensor | None) -> Tensor:
            if not bool(self.last.bias.isnan().any()):
                return super().forward(x, words)
            with torch.no_grad():
                self.last.bias.copy_(x.mean((0, 2, 3)))
            return super().forward(x, words)

    task = Task()
    task.denoiser = ActNorm()
    with torch.no_grad():
        task.denoiser.last.bias.fill_(float("nan"))
    with pytest.raises(
        TrialError, match=r"changed 1 parameters, such as \['denoiser\.last\.bias'\]"
    ):
        capture(tmp_path, task)
    assert not (tmp_path / "store").exists()
    capture(tmp_path, task)  # it has seen a batch now
