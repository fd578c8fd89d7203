"""Short memory: smaller passes, the same numbers."""

import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning import (
    Attributor,
    Concept,
    Encoded,
    GradientTracer,
    Method,
    Projection,
    TraceStore,
    methods,
)
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.errors import GradientError
from ctrak_lightning.methods.objectives import Denoising, Term
from ctrak_lightning.methods.trajectories import Inverted, Noised
from ctrak_lightning.utilities.memory import RowLimit, is_out_of_memory

from ..toy import QuickDiffusion, ToyData

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Every pass that fails collects garbage; all that tests import is looked through then, for
    half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
)


class Cramped(QuickDiffusion):
    """Has memory for ``room`` rows at once; ``passes`` are the sizes that were tried."""

    def __init__(self, room: int, error: BaseException = ERRORS[0]) -> None:
        super().__init__()
        self.room, self.error = room, error
        self.passes: list[int] = []

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.passes.append(len(x_t))
        if len(x_t) > self.room and not self.training:
            raise self.error
        return super().predict(x_t, t, condition)


def encoded(module: QuickDiffusion) -> Encoded:
    toys = ToyData().toys
    with torch.no_grad():
        return module.encode(torch.utils.data.default_collate([toys[i] for i in range(12)]))


def method(trajectory: Any) -> Method:
    return Method(
        name="test", training=Denoising(), training_trajectory=trajectory, query=(Term(Denoising()),),
        query_trajectory=Noised(timesteps=2),
    )  # fmt: skip


def features(module: QuickDiffusion, trajectory: Any, row_limit: RowLimit | None = None) -> Tensor:
    module.eval()
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=64))
    return trace_batch(module, tracer, method(trajectory), encoded(module), 0, row_limit).features


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "trajectory",
    [Noised(timesteps=2), Noised(timesteps=2, shared_noise=False), Inverted(steps=2, guidance=2.0)],
    ids=["shared noise", "noise by sample", "inverted"],
)
def test_traces_do_not_depend_on_the_split(error: BaseException, trajectory: Any) -> None:
    whole = features(QuickDiffusion(), trajectory)
    with pytest.warns(UserWarning, match="pass over 12 samples; from here on 3 at a time.*HINT"):
        split = features(Cramped(5, error), trajectory)
    assert ((whole - split).norm(dim=1) <= TOLERANCE * whole.norm(dim=1)).all()


def test_the_smaller_number_is_kept_and_told_once() -> None:
    module, limit = Cramped(6), RowLimit()
    with pytest.warns(UserWarning, match="6 at a time"):
        features(module, Noised(timesteps=1), limit)
    assert module.passes == [12, 6, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features(module, Noised(timesteps=1), limit)
    assert module.passes[3:] == [6, 6]


def test_the_failed_pass_has_let_go_of_its_tensors_when_the_next_begins() -> None:
    held: list[weakref.ref[Tensor]] = []

    def work(start: int, stop: int) -> int:
        assert all(tensor() is None for tensor in held)
        tensor = torch.zeros(stop - start)
        held.append(weakref.ref(tensor))
        if len(tensor) > 2:
            raise MemoryError
        return len(tensor)

    with pytest.warns(UserWarning, match="2 at a time"):
        assert RowLimit().run(8, work) == [2, 2, 2, 2]


def test_without_memory_for_one_sample_the_error_says_what_to_do() -> None:
    with pytest.raises(GradientError, match="single sample: CUDA out of memory.*HINT.*layers="):
        features(Cramped(0), Noised(timesteps=1))


def test_another_error_is_not_taken_for_short_memory() -> None:
    module = Cramped(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        features(module, Noised(timesteps=1))
    assert module.passes == [12]
    assert not is_out_of_memory(KeyError("not enough memory"))


def fitted(path: Path, module: QuickDiffusion) -> TraceStore:
    import lightning as L

    from ..callbacks.test_concept_tracer import fit

    L.seed_everything(2, verbose=False)
    contrastive = methods.concept_trak(timesteps=2)
    fit(
        module, [ConceptTracer(str(path), contrastive, rank=4, dim=64, batch_size=12)], max_epochs=1
    )
    return TraceStore(path)


def test_capture_and_queries_of_a_cramped_module(tmp_path: Path) -> None:
    roomy = fitted(tmp_path / "roomy", QuickDiffusion())
    with pytest.warns(UserWarning, match="12 samples; from here on 3 at a time"):
        cramped = fitted(tmp_path / "cramped", Cramped(4))
    ours, theirs = (store.checkpoints[0].features() for store in (cramped, roomy))
    assert ((ours - theirs).norm(dim=1) <= TOLERANCE * theirs.norm(dim=1)).all()

    concepts = [Concept(name, {"colour": name}, {}) for name in ("red", "green", "blue", "red")]
    queries = [Attributor(roomy, QuickDiffusion()).query(concepts, [0, 1, 2, 3])]
    module = Cramped(1)
    with pytest.warns(UserWarning, match="4 samples; from here on 1 at a time"):
        queries.append(Attributor(roomy, module.eval()).query(concepts, [0, 1, 2, 3]))
    whole, split = (query.features[0] for query in queries)
    # The images themselves come from batches of another size; ten times the tolerance of a trace.
    assert ((whole - split).norm(dim=1) <= 10 * TOLERANCE * whole.norm(dim=1)).all()
