"""The engines agree with each other, and the loop with gradients written out by hand."""

import numpy as np
import pytest
import torch

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients import GradientTracer, Projection, SlowParameterWarning
from tests.gradients.zoo import (
    CHANGING,
    LARGE,
    PROJECTION,
    SAMPLES,
    SHARED,
    SMALL,
    TOLERANCE,
    ZOO,
    Case,
    build,
    features,
    row_error,
    sign,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("name", ZOO)
def test_hooks_equal_loop(name: str) -> None:
    case = build(name)
    assert row_error(features(case), features(case, "loop")) < TOLERANCE


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_samples_share_go_through_the_loop_and_are_named(name: str) -> None:
    case = build(name)
    with pytest.raises(GradientError, match='no sample alone: (layer|expert).*HINT.*engine="auto"'):
        features(case)
    tracer = GradientTracer(case.module, PROJECTION, engine="auto")
    with pytest.warns(
        SlowParameterWarning, match="no sample alone: (layer|expert).*a pass per sample.*HINT"
    ):
        [ours] = tracer.vjps(case.forward, [weighted], SAMPLES)
    assert row_error(ours, features(case, "loop")) < TOLERANCE
    for rows in (slice(0, 1), slice(2, 5)):  # known by now, and told once
        some = torch.arange(SAMPLES)[rows]
        [again] = tracer.vjps(lambda r, some=some: case.forward(some[r]), [weighted], len(some))
        assert row_error(again, ours[rows]) < TOLERANCE


@pytest.mark.filterwarnings("ignore::ctrak_lightning.gradients.SlowParameterWarning")
@pytest.mark.parametrize("name", CHANGING)
def test_rows_that_change_their_samples_from_batch_to_batch_are_seen_to(name: str) -> None:
    whole = build(name)
    batches = [
        Case(whole.module, (whole.inputs[0][: len(last)], torch.tensor(last)))
        for last in CHANGING[name][1]
    ]
    auto, hooks = (
        GradientTracer(whole.module, PROJECTION, engine=engine) for engine in ("auto", "hooks")
    )
    for position, case in enumerate(batches):
        size, expected = len(case.inputs[0]), features(case, "loop")
        assert row_error(auto.vjps(case.forward, [weighted], size)[0], expected) < TOLERANCE
        if case.inputs[1].unique().numel() == 1 or case.inputs[1].diff().eq(1).all():
            assert row_error(hooks.vjps(case.forward, [weighted], size)[0], expected) < TOLERANCE
        else:
            assert position > 0
            for tracer in (
                hooks,
                GradientTracer(whole.module, PROJECTION),
            ):  # remembering, and at first sight
                with pytest.raises(
                    GradientError, match="no sample alone: (text|inner).*in a regular order"
                ):
                    tracer.vjps(case.forward, [weighted], size)


@pytest.mark.parametrize("name", ZOO)
def test_functional_equals_loop(name: str) -> None:
    case = build(name)
    assert row_error(features(case, "functional"), features(case, "loop")) < TOLERANCE


@pytest.mark.parametrize("name", ZOO)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    case = build(name)
    together = features(case)
    alone = torch.cat([features(case.rows(i, i + 1)) for i in range(SAMPLES)])
    assert row_error(together, alone) < TOLERANCE


@pytest.mark.parametrize("name", SMALL)
def test_identity_projection_gives_the_gradients_themselves(name: str) -> None:
    case = build(name)
    projection = Projection(rank=10_000, dim=None)
    ours = features(case, projection=projection)
    for i in range(SAMPLES):
        gradients = _gradients_of_loss(case, i)
        assert np.isclose(
            float(ours[i].norm()), np.sqrt(sum((g**2).sum() for g in gradients.values())), rtol=1e-5
        )


@pytest.mark.parametrize("engine", ["loop", "hooks"])
@pytest.mark.parametrize(
    "name", ["linear_2d", "conv_groups", "conv_stride_dilation", "called_twice", "conditional_unet"]
)
def test_equals_dense_projection_of_the_loss_gradient(name: str, engine: str) -> None:
    case = build(name)
    case.module.eval()
    tracer = GradientTracer(case.module, PROJECTION, engine=engine)  # type: ignore[arg-type]
    [ours] = tracer.vjps(case.forward, [_residual], SAMPLES)
    expected = []
    for i in range(SAMPLES):
        gradients = _gradients_of_loss(case, i, residual=True)
        row = []
        for block in tracer.block_names:
            dot = f"{block}." if block else ""
            weight, bias = gradients.get(f"{dot}weight"), gradients.get(f"{dot}bias")
            if weight is not None and weight.ndim == 1:
                matrix = np.concatenate([weight, bias])[None]
            else:
                columns = [] if weight is None else [weight.reshape(len(weight), -1)]
                matrix = np.concatenate(columns + ([] if bias is None else [bias[:, None]]), axis=1)
            left, right = tracer._projector.matrices(block, torch.device("cpu"))
            row.append(
                (left.numpy().astype(float).T @ matrix @ right.numpy().astype(float)).ravel()
            )
        expected.append(np.concatenate(row))
    assert row_error(ours.double(), torch.from_numpy(np.stack(expected))) < TOLERANCE


@pytest.mark.parametrize("name", LARGE)
def test_sketched_features_agree(name: str) -> None:
    case = build(name)
    projection = Projection(rank=4, dim=64)
    ours = features(case, projection=projection)
    assert ours.shape == (SAMPLES, 64)
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    assert row_error(ours, features(case, "loop", projection)) < TOLERANCE


@pytest.mark.parametrize("engine", ["hooks", "loop", "functional"])
def test_two_cotangents_equal_two_calls(engine: str) -> None:
    case = build("conditional_unet")
    tracer = GradientTracer(case.module, PROJECTION, engine=engine)  # type: ignore[arg-type]
    first, second = tracer.vjps(case.forward, [weighted, sign], SAMPLES)
    assert torch.equal(first, tracer.vjps(case.forward, [weighted], SAMPLES)[0])
    assert torch.equal(second, tracer.vjps(case.forward, [sign], SAMPLES)[0])
    assert row_error(first, second) > 0.1


def _residual(e: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The cotangent of mean((e - 1)^2) of each sample."""
    return 2 * (e - 1) / e[0].numel()


def _gradients_of_loss(case: Case, row: int, residual: bool = False) -> dict[str, np.ndarray]:
    """A sample's gradient of a scalar loss, by `backward`, without this library."""
    case.module.zero_grad()
    rows = torch.tensor([row])
    e = case.forward(rows)
    loss = ((e - 1) ** 2).mean() if residual else (e * weighted(e, rows)).sum()
    loss.backward()
    gradients = {
        name: p.grad.double().numpy().copy()
        for name, p in case.module.named_parameters()
        if p.grad is not None
    }
    case.module.zero_grad()
    return gradients
