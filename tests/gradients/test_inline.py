"""StepRecorder: rows of a training step's own backward pass against the per-sample loop, and the
step itself untouched."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients import GradientTracer
from tests.gradients.test_graphs import Checkpointed, InPlace
from tests.gradients.test_tracer import Gated, counted_passes
from tests.gradients.zoo import (
    CHANGING,
    PROJECTION,
    SAMPLES,
    SHARED,
    TOLERANCE,
    ZOO,
    Case,
    build,
    features,
    randomized,
    row_error,
    weighted,
)

BF16_TOLERANCE = 2e-2


def loss_of(case: Case, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A mean over the batch whose per-sample cotangents are those of ``weighted``."""
    rows = torch.arange(SAMPLES)
    e = (forward or case.forward)(rows)
    return (weighted(e, rows).detach() * e).sum() / SAMPLES


def inline_rows(case: Case, scale: float = 1.0) -> Tensor:
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    try:
        recorder.begin(SAMPLES)
        loss = loss_of(case) * scale
        recorder.before_backward(loss)
        loss.backward()
        return recorder.rows() * (SAMPLES / scale)
    finally:
        recorder.detach()


def gradients(case: Case) -> dict[str, Tensor]:
    named = case.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.filterwarnings("ignore::ctrak_lightning.gradients.UntracedParameterWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", ZOO)
def test_rows_are_those_of_the_loop_and_the_steps_gradients_stay(name: str) -> None:
    case = build(name)
    case.module.eval()
    expected = features(case, "loop")
    twin = Case(copy.deepcopy(case.module), case.inputs, case.call)
    loss_of(twin).backward()
    rows = inline_rows(case)
    assert row_error(rows, expected) < TOLERANCE
    plain, followed = gradients(twin), gradients(case)
    assert plain.keys() == followed.keys()
    assert all(torch.equal(plain[each], followed[each]) for each in plain)
    assert not any(m._forward_hooks for m in case.module.modules())


@pytest.mark.parametrize("name", ["conditional_unet", "lora_unet"])
def test_checkpointing_that_is_not_reentrant(name: str) -> None:
    case = build(name)
    case.module.eval()
    expected = inline_rows(case)
    case.module.zero_grad()
    case.module.enable_gradient_checkpointing()  # type: ignore[operator]
    case.module.train()  # diffusers checkpoints in training mode only
    assert row_error(inline_rows(case), expected) < TOLERANCE


def test_reentrant_checkpointing_is_refused() -> None:
    case = Case(randomized(Checkpointed(True, x_requires_grad=True)), (torch.randn(SAMPLES, 5),))
    with pytest.raises(GradientError, match=r"\['first', 'second'\].*use_reentrant=False"):
        inline_rows(case)


class Passes(nn.Module):
    """Two layers, of which the first is used once more in one way or another."""

    def __init__(self, again: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = self.again(self.first, self.first(x))
        output: Tensor = self.second(again)
        return output


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = checkpoint(function, x, use_reentrant=True)
    return found


BESIDE_THE_GRAPH: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "its weight in another product": (
        lambda layer, x: nn.functional.linear(x.tanh(), layer.weight), "first.weight' enters the loss 2 times.*only 1 calls",
    ),
    "the layer in reentrant checkpointing": (
        lambda layer, x: reentrant(lambda h: layer(h).tanh(), x), "first.*within the backward pass.*use_reentrant=False",
    ),
    "its weight in reentrant checkpointing": (
        lambda layer, x: reentrant(lambda h: nn.functional.linear(h, layer.weight).tanh(), x),
        "first.weight.*within the backward pass.*use_reentrant=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", BESIDE_THE_GRAPH)
def test_a_layer_used_beside_its_recorded_calls_is_refused(name: str, autocast: bool) -> None:
    """Under autocast the weight is cast once, and the layer's call and the other product share the
    copy."""
    again, message = BESIDE_THE_GRAPH[name]
    module = randomized(Passes(again))
    recorder = GradientTracer(module, PROJECTION).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(torch.randn(SAMPLES, 5)).float().square().mean()

    def step() -> None:
        recorder.before_backward(loss)
        loss.backward()
        recorder.rows()

    with pytest.raises(GradientError, match=message):
        step()
    recorder.detach()
    assert not any(p._backward_hooks for p in module.parameters())


def test_a_layer_called_twice_under_autocast_and_reentrant_checkpointing_without_layers_are_followed() -> (
    None
):
    x = torch.randn(SAMPLES, 5)
    twice = randomized(Passes(lambda layer, h: layer(h.tanh())))
    recorder = GradientTracer(twice, PROJECTION).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = twice(x).float().square().mean()
    recorder.before_backward(loss)
    loss.backward()
    cosine = torch.cosine_similarity(
        recorder.rows() * SAMPLES, features(Case(twice, (x,)), "loop"), dim=1
    )
    recorder.detach()
    assert cosine.shape == (SAMPLES,)
    around = Case(randomized(Passes(lambda layer, h: reentrant(torch.tanh, h))), (x,))
    plain = Case(randomized(Passes(lambda layer, h: h.tanh())), (x,))
    plain.module.load_state_dict(around.module.state_dict())
    assert row_error(inline_rows(around), inline_rows(plain)) < TOLERANCE


def test_operations_in_place() -> None:
    case = Case(randomized(InPlace()), (torch.randn(SAMPLES, 2, 5, 5),))
    assert row_error(inline_rows(case), features(case, "loop")) < TOLERANCE


def test_bfloat16_autocast() -> None:
    case = build("conditional_unet")
    exact = inline_rows(case)
    forward = case.forward

    def cast(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(rows).float()

    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES)
    loss = loss_of(case, cast)
    recorder.before_backward(loss)
    loss.backward()
    rows = recorder.rows() * SAMPLES
    recorder.detach()
    assert rows.dtype == torch.float32
    cosine = torch.cosine_similarity(rows, exact, dim=1)
    assert (cosine > 1 - BF16_TOLERANCE).all()


def test_what_happens_outside_of_the_step_leaves_no_row() -> None:
    """A gradient penalty inside the step, a validation pass, and a step that was given up."""
    case = build("called_twice")
    expected = inline_rows(case)
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES)
    loss_of(case).backward()
    recorder.begin(SAMPLES)
    loss = loss_of(case)
    torch.autograd.grad(loss, list(case.module.parameters()), retain_graph=True)
    recorder.before_backward(loss)
    loss_of(case)
    loss.backward()
    rows = recorder.rows() * SAMPLES
    loss_of(case).backward()
    recorder.detach()
    assert row_error(rows, expected) < TOLERANCE


def test_a_penalty_on_weights_is_refused() -> None:
    case = build("linear_2d")
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES)
    penalty = sum(p.square().sum() for p in case.module.parameters())
    with pytest.raises(
        GradientError, match="'0.bias' enters the loss 2 times.*penalty.*HINT|HINT: a penalty"
    ):
        recorder.before_backward(loss_of(case) + penalty)
    recorder.detach()


def test_a_batch_of_other_samples_is_refused() -> None:
    case = build("linear_2d")
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES - 1)
    with pytest.raises(
        GradientError, match=rf"output of shape \(6, 6\).*batch of {SAMPLES - 1} samples.*HINT"
    ):
        recorder.before_backward(loss_of(case))
    recorder.detach()


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_samples_share_are_refused(name: str) -> None:
    with pytest.raises(
        GradientError,
        match=r"no sample of the training batch of 6 alone: \['(layer|expert).*capture",
    ):
        inline_rows(build(name))


@pytest.mark.parametrize("name", CHANGING)
def test_rows_that_change_their_samples_from_step_to_step_are_refused(name: str) -> None:
    case = build(name)
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    for last in CHANGING[name][1][:2]:
        case.inputs = (case.inputs[0], torch.tensor(last))
        recorder.begin(SAMPLES)
        loss = loss_of(case)
        if last != CHANGING[name][1][0]:
            with pytest.raises(
                GradientError, match=r"no sample of the training batch of 6 alone: \['(text|inner)"
            ):
                recorder.before_backward(loss)
            break
        recorder.before_backward(loss)
        loss.backward()
        assert row_error(recorder.rows() * SAMPLES, features(case, "loop")) < TOLERANCE
    recorder.detach()


def test_a_layer_without_gradient_is_looked_at_again_and_the_rest_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(Gated(), (torch.randn(SAMPLES, SAMPLES, 4),))
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    passes = counted_passes(monkeypatch)
    counts = []
    for gate in (0.0, 0.0, 1.0, 2.0, 2.0):
        case.module.gate = gate  # type: ignore[assignment]
        passes.clear()
        recorder.begin(SAMPLES)
        loss = loss_of(case)
        recorder.before_backward(loss)
        loss.backward()
        counts.append(len(passes))
        assert row_error(recorder.rows() * SAMPLES, features(case, "loop")) < TOLERANCE
    recorder.detach()
    assert counts == [6, 6, 6, 0, 0]


def test_the_steps_gradients_stay_under_checkpointing_with_dropout() -> None:
    """Looking for layouts runs the checkpointed part again; the step's own recomputation must draw
    the same numbers."""

    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            def part(h: Tensor) -> Tensor:
                return torch.nn.functional.dropout(self.first(h), 0.5)

            return self.last(checkpoint(part, x, use_reentrant=False))

    case = Case(Dropping().train(), (torch.randn(SAMPLES, 4),))
    twin = Case(copy.deepcopy(case.module), case.inputs)
    torch.manual_seed(1)
    loss_of(twin).backward()
    drawn = torch.rand(())
    torch.manual_seed(1)
    inline_rows(case)
    assert torch.equal(torch.rand(()), drawn)
    plain, followed = gradients(twin), gradients(case)
    assert all(torch.equal(plain[each], followed[each]) for each in plain)


def test_a_backward_pass_elsewhere_is_refused() -> None:
    case = build("linear_2d")
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.begin(SAMPLES)
    loss = loss_of(case)
    recorder.before_backward(loss, check=False)
    loss.backward()
    with pytest.raises(GradientError, match="reached no traced layer.*torch.compile"):
        recorder.rows()


def test_what_a_hook_meets_is_raised_after_the_pass_and_does_not_stop_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room for a block")

    case = build("linear_4d")
    recorder = GradientTracer(case.module, PROJECTION).step_recorder()
    recorder.attach()
    for place, after in (("hooks.Recording.add", "forward"), ("hooks.Call.gradient", "backward")):
        with monkeypatch.context() as patch:
            patch.setattr(f"ctrak_lightning.gradients.{place}", failing)
            recorder.begin(SAMPLES)
            loss = loss_of(case)
            if after == "forward":
                with pytest.raises(MemoryError, match="no room"):
                    recorder.before_backward(loss)
            else:
                recorder.before_backward(loss)
                loss.backward()
                with pytest.raises(MemoryError, match="no room"):
                    recorder.rows()
        assert any(parameter.grad is not None for parameter in case.module.parameters()) == (
            after == "backward"
        )
    recorder.begin(SAMPLES)
    loss = loss_of(case)
    recorder.before_backward(loss)
    loss.backward()
    assert recorder.rows().isfinite().all()
    recorder.detach()
