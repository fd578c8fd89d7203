"""ConceptTracer beside Lightning's weight-averaging callbacks: whose weights are traced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from ctrak_lightning import Attributor, Concept, TraceStore
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.errors import StoreError, StoreMismatchError
from ctrak_lightning.methods.trajectories import Sampler
from ctrak_lightning.model.function import refuse_another_function

from .test_trained import Toy, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.*have no hook and are traced"),
]


class Follower(Callback):
    """Keeps the weights that train as they are after every step, and their average by hand."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.current_epoch == 2:  # an epoch of stochastic averaging's own, of the average
            return
        self.raw = {
            name: value.detach().clone() for name, value in pl_module.denoiser.named_parameters()
        }
        for name, value in self.raw.items():
            old = self.average.get(name, value)
            self.average[name] = old * self.decay + value * (1 - self.decay)


class Normed(Toy):
    """With running means, for which stochastic averaging trains an epoch more than it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser.conv_out = nn.Sequential(nn.BatchNorm2d(6), self.denoiser.conv_out)


def stored(path: Path, at: int = -1) -> dict[str, Tensor]:
    weights = TraceStore(path / "traces").checkpoints[at].weights()
    return {name.removeprefix("denoiser."): value for name, value in weights.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


AVERAGING: dict[str, tuple[Callable[[], Callback], type[Toy]]] = {
    "ema": (lambda: EMAWeightAveraging(decay=0.5), Toy),
    "stochastic": (lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1), Toy),
    "stochastic with running means": (
        lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
        Normed,
    ),
}


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("tracer_is_last", [True, False])
def test_traces_are_of_the_raw_weights_whatever_the_order(
    tmp_path: Path, name: str, tracer_is_last: bool
) -> None:
    make, kind = AVERAGING[name]
    follower, module = Follower(0.5), kind()
    fit(tmp_path, module, make(), follower, tracer_first=not tracer_is_last, every_n_epochs=None)
    assert same(stored(tmp_path), follower.raw)
    assert not same(stored(tmp_path), dict(module.denoiser.named_parameters()))
    store = TraceStore(tmp_path / "traces")
    assert store.header.model["weights"] == "raw"
    [checkpoint] = store.checkpoints
    recorded, shape = checkpoint.function(), store.header.dataset["latent_shape"]
    assert recorded is not None
    with pytest.raises(StoreMismatchError, match="outputs differ"):
        refuse_another_function(recorded, module, shape, checkpoint.step)
    module.load_state_dict(checkpoint.weights() | checkpoint.buffers(), strict=False)
    refuse_another_function(recorded, module, shape, checkpoint.step)


def test_averaged_weights_are_traced_when_asked_for(tmp_path: Path) -> None:
    follower, module = Follower(0.5), Toy()
    fit(tmp_path, module, EMAWeightAveraging(decay=0.5), follower, weights="ema", every_n_epochs=1)
    for name, value in stored(tmp_path).items():
        torch.testing.assert_close(value, follower.average[name])
        assert not torch.equal(value, follower.raw[name])
    assert same(stored(tmp_path), dict(module.denoiser.named_parameters()))
    assert TraceStore(tmp_path / "traces").header.model["weights"] == "ema"
    plain = Toy()
    fit(tmp_path / "plain", plain, EMAWeightAveraging(decay=0.5), Follower(0.5))
    assert all(
        torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items()
    )
    ema, raw = (
        TraceStore(path / "traces").checkpoints[0] for path in (tmp_path, tmp_path / "plain")
    )
    assert not torch.allclose(ema.features(), raw.features(), atol=1e-4)
    concept = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})
    Attributor(tmp_path / "traces", Toy(), sampler=Sampler(steps=3)).attribute(concept)


def test_an_average_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"no weight-averaging callback.*HINT.*EMAWeightAveraging"
    ):
        fit(tmp_path / "none", Toy(), weights="ema")
    late = EMAWeightAveraging(decay=0.5, update_starting_at_step=4)
    with pytest.raises(StoreError, match="averaged no weights yet"):
        fit(tmp_path / "late", Toy(), late, weights="ema", on_error="raise")
    for options in ({"weights": "ema", "mode": "inline"}, {"weights": "mean"}):
        with pytest.raises(MisconfigurationException, match=r"expected one of \('raw', 'ema'\)"):
            ConceptTracer("x", **options)  # type: ignore[arg-type]
