"""Tracing mode: what it turns on, and that everything is as before afterwards."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients import GradientTracer, Projection, tracing_mode
from tests.gradients.zoo import PROJECTION, SAMPLES, Case, build, features, weighted


class Merging(nn.Linear):
    """Has an effect on `train()`, as layers that merge their adapters have."""

    def train(self, mode: bool = True) -> "Merging":
        raise AssertionError("train() was called")


def mixed() -> nn.Module:
    module = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), Merging(4, 4))
    )
    module[0].training = False
    module[2][0].training = False
    return module


def flags(module: nn.Module) -> list[bool]:
    return [submodule.training for submodule in module.modules()]


def test_mixed_flags_are_restored() -> None:
    module = mixed()
    before = flags(module)
    assert len(set(before)) == 2
    with tracing_mode(module):
        assert not any(flags(module))
    assert flags(module) == before


def test_flags_are_restored_after_exceptions() -> None:
    module = mixed()
    before = flags(module)

    def fails(rows: Tensor) -> Tensor:
        raise KeyError("inside")

    tracer = GradientTracer(module, PROJECTION, layers=["0"])
    with pytest.raises(KeyError, match="inside"):
        tracer.vjps(fails, [weighted], SAMPLES)
    assert flags(module) == before
    assert not any(submodule._forward_hooks for submodule in module.modules())


def test_traces_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    case = Case(module, (torch.randn(SAMPLES, 4),))
    dropped = features(case)
    module.eval()
    assert torch.equal(dropped, features(case))


def test_gradients_are_on_inside_no_grad() -> None:
    case = build("linear_2d")
    with torch.no_grad():
        inside = features(case)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, features(case))


def test_inference_mode_is_refused() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(GradientError, match=r"inference_mode.*needs autograd.*HINT"),
    ):
        features(build("linear_2d"))


def test_attention_is_what_training_takes_unless_the_math_backend_is_asked_for() -> None:
    with tracing_mode(nn.Identity()):
        assert torch.backends.cuda.flash_sdp_enabled()
        with tracing_mode(nn.Identity(), attention="math"):
            assert torch.backends.cuda.math_sdp_enabled()
            assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()


def test_a_tracer_runs_its_network_by_the_attention_that_it_was_given() -> None:
    seen = []

    def note(*_: Any) -> None:
        seen.append(torch.backends.cuda.flash_sdp_enabled())

    network, x = nn.Linear(3, 3), torch.randn(2, 3)
    network.register_forward_pre_hook(note)
    given: list[dict[str, Any]] = [{}, {"attention": "math"}, {"engine": "functional"}]
    for options in given:
        seen.clear()
        GradientTracer(network, Projection(rank=2, dim=None), **options).vjps(
            lambda rows: network(x[rows]), [lambda e, rows: e], batch_size=2
        )
        assert set(seen) == {not options}
    with pytest.raises(GradientError, match=r"attention='flash'.*fused.*HINT"):
        GradientTracer(network, attention="flash")  # type: ignore[arg-type]


def test_grad_rng_and_parameters_are_untouched() -> None:
    case = build("lora_unet")
    parameters = dict(case.module.named_parameters())
    for parameter in parameters.values():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 2.0)
    facts = {
        n: (p.requires_grad, p.grad, p._version, p.detach().clone()) for n, p in parameters.items()
    }
    state = torch.get_rng_state()
    for engine in ("hooks", "loop", "functional"):
        features(case, engine)
        assert torch.equal(torch.get_rng_state(), state)
        for name, parameter in case.module.named_parameters():
            requires_grad, grad, version, value = facts[name]
            assert parameter is parameters[name]
            assert parameter.requires_grad == requires_grad
            assert parameter.grad is grad
            assert grad is None or bool((grad == 2).all())
            assert parameter._version == version
            assert torch.equal(parameter, value)
        assert not any(submodule._forward_hooks for submodule in case.module.modules())


@pytest.mark.parametrize("name", ["called_twice", "conditional_unet"])
@pytest.mark.parametrize("engine", ["hooks", "loop", "functional"])
def test_modules_own_their_parameters_afterwards(name: str, engine: str) -> None:
    case = build(name)
    before = {n: id(p) for n, p in case.module.named_parameters(remove_duplicate=False)}
    features(case, engine)
    assert {n: id(p) for n, p in case.module.named_parameters(remove_duplicate=False)} == before


def test_compiled_modules_run_eagerly() -> None:
    case = build("linear_2d")
    expected = features(case, projection=Projection(rank=99, dim=None))
    case.module[0].compile(backend="eager")  # type: ignore[operator, index]
    compiled = Case(torch.compile(case.module, backend="eager"), case.inputs)  # type: ignore[arg-type]
    compiled.module(*case.inputs)
    assert torch.equal(features(compiled, projection=Projection(rank=99, dim=None)), expected)


def test_autocast_does_not_reach_a_trace() -> None:
    """A raw loop may ask for traces inside its own autocast; the network answers in its parameters'
    dtype."""
    module = nn.Linear(4, 4)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        with tracing_mode(module):
            assert torch.equal(module(x), plain)
        assert module(x).dtype == torch.bfloat16


def test_a_second_thread_is_refused_and_flags_are_restored() -> None:
    """Both on one network and on two that share a part; the attention backend is as before when the
    last has left."""
    shared = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    around = nn.Sequential(shared, nn.Linear(3, 3)).train()
    other = nn.Linear(3, 3).train()
    before = torch.backends.cuda.flash_sdp_enabled()
    inside, leave = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with (
            tracing_mode(shared, attention="math"),
            tracing_mode(shared[0]),
            tracing_mode(around),
        ):
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        assert inside.wait(30)
        for module in (shared, around, shared[0]):
            with (
                pytest.raises(GradientError, match="Two threads trace one.*HINT"),
                tracing_mode(module),
            ):
                pass
            assert not shared.training
        with tracing_mode(other, attention="math"):  # a network of its own
            leave.set()
            thread.join()
            assert not other.training
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert shared.training
    finally:
        leave.set()
        thread.join()
    assert all(module.training for module in (*shared.modules(), *around.modules(), other))
    assert torch.backends.cuda.flash_sdp_enabled() == before
    with tracing_mode(around):  # nothing is held any more
        assert not shared.training


def test_a_second_threads_vjps_are_refused_while_the_first_ones_come_out_right() -> None:
    module = nn.Linear(3, 3)
    tracer = GradientTracer(module, Projection(rank=9, dim=None))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    [expected] = tracer.vjps(lambda rows: module(x[rows]), [lambda e, rows: e], 4)
    errors: list[BaseException] = []

    def second() -> None:
        try:
            tracer.vjps(lambda rows: module(x[rows]), [lambda e, rows: e], 4)
        except GradientError as error:
            errors.append(error)
        module(x)  # a plain forward pass of another thread leaves no row

    def forward(rows: Tensor) -> Tensor:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        output: Tensor = module(x[rows])
        return output

    [found] = tracer.vjps(forward, [lambda e, rows: e], 4)
    assert len(errors) == 1
    assert torch.equal(found, expected)
    assert not module._forward_hooks
