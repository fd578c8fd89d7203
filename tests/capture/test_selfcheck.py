"""The selfcheck passes a sound model and finds what is wrong with others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import default_collate

from ctrak_lightning import methods
from ctrak_lightning.capture.reference_check import Check, selfcheck
from ctrak_lightning.cli import main
from ctrak_lightning.errors import BatchError, GradientError
from ctrak_lightning.gradients import Projection

from ..test_cli import write_callback, write_config
from ..toy import CHANNELS, ToyDiffusion, Toys

NOISE = "the network's output, read by the schedule, predicts the noise"
SMALL = Projection(rank=4, dim=64)
pytestmark = pytest.mark.filterwarnings("ignore:These trained parameters:UserWarning")


class Small(nn.Module):
    """A network of three layers, and something done to its output."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv_in = nn.Conv2d(CHANNELS, 6, 3, padding=1)
            self.text = nn.Linear(12, 6)
            self.conv_out = nn.Conv2d(6, CHANNELS, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        words = self.text(encoder_hidden_states.mean(1))[:, :, None, None]
        return (self.after(self.conv_out(nn.functional.silu(self.conv_in(x) + words))),)

    def after(self, output: Tensor) -> Tensor:
        return output


class Mixing(Small):
    def after(self, output: Tensor) -> Tensor:
        return output * output.mean()


class Restless(Small):
    def after(self, output: Tensor) -> Tensor:
        return output * (1 + 0.1 * torch.rand(()))


class Counting(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def after(self, output: Tensor) -> Tensor:
        self.calls += 1
        return output


class Broken(Small):
    def after(self, output: Tensor) -> Tensor:
        return output / torch.zeros_like(output)


def checked(denoiser: nn.Module | None = None, **arguments: Any) -> dict[str, Check]:
    module = ToyDiffusion(denoiser=denoiser or Small())
    batch = default_collate([Toys()[i] for i in range(4)])
    options = {"method": methods.concept_trak(timesteps=2), "projection": SMALL} | arguments
    return {check.name: check for check in selfcheck(module, batch, **options)}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.outcome == "fail"}


def test_a_sound_model_passes() -> None:
    checks = checked()
    assert not failed(checks), checks
    covered = checks["all that trains is traced"]
    # The toys' token embedding stands beside the network.
    assert covered.outcome == "note"
    assert "outside of the denoiser: embedding.weight" in covered.found


@pytest.mark.parametrize(
    ("denoiser", "name"),
    [
        (Restless, "traced twice, the same to the bit"),
        (Counting, "the model and the random generators are as before"),
        (Broken, "every trace is finite and not zero"),
    ],
)
def test_what_is_wrong_is_found(denoiser: type[nn.Module], name: str) -> None:
    found = failed(checked(denoiser()))
    assert name in found
    if denoiser is Counting:
        assert found == {name}


def test_samples_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(
        GradientError, match=r"depends on the other samples.*conv_in, conv_out, text.*HINT"
    ):
        checked(Mixing())


def test_how_many_layers_had_a_gradient_is_told() -> None:
    name = "every layer has a gradient to compare"
    check = checked()[name]
    assert (check.outcome, check.found) == ("pass", "3 of 3 layers had gradients")
    network = Small()
    nn.init.zeros_(network.conv_out.weight)
    check = checked(network)[name]
    assert check.outcome == "note"
    assert check.found.startswith("1 of 3 layers had gradients; ")
    assert check.found.endswith("had none: conv_in, text")
    assert "behind a last layer of zeros" in check.hint
    nn.init.zeros_(network.conv_out.bias)
    every = checked(network, method=methods.d_trak(timesteps=2))
    assert {name, "every trace is finite and not zero"} <= failed(every)
    assert every[name].found.startswith("0 of 3 layers had gradients")


def test_layers_that_are_left_out_are_told() -> None:
    covered = checked(layers=["text", "conv_out"])["all that trains is traced"]
    assert covered.outcome == "note"
    assert "not chosen: conv_in" in covered.found


def test_a_network_that_predicts_nothing_is_noted() -> None:
    network = Small()
    nn.init.constant_(network.conv_out.bias, 3.0)
    assert checked(network)[NOISE].outcome == "note"


def test_a_network_that_predicts_the_noise_passes() -> None:
    class Blurry(ToyDiffusion):
        """Takes every image for one of a single colour, which is right enough to tell most of the
        noise."""

        def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            _, s = self.noise_schedule.levels(t, x_t)
            guess = (x_t - x_t.mean((2, 3), keepdim=True)) / s
            return guess + 1e-3 * super().predict(x_t, t, condition)

    batch = default_collate([Toys()[i] for i in range(4)])
    checks = selfcheck(
        Blurry(denoiser=Small()), batch, method=methods.concept_trak(timesteps=2), projection=SMALL
    )
    assert {check.name: check for check in checks}[NOISE].outcome == "pass"


def test_one_sample_cannot_be_compared() -> None:
    with pytest.raises(BatchError, match=r"batch of 1.*at least two"):
        selfcheck(ToyDiffusion(), default_collate([Toys()[0]]))


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, callback = write_config(tmp_path), write_callback(tmp_path)
    facts = yaml.safe_load(callback.read_text())
    facts["trainer"]["callbacks+"][0]["init_args"] |= {
        "layers": ["*attn2*"],
        "rank": 4,
        "dim": 64,
        "method": "tracin",
    }
    callback.write_text(yaml.safe_dump(facts))
    main(["selfcheck", "--config", str(config), "--config", str(callback), "--samples", "2"])
    out = capsys.readouterr().out
    assert "0 failed" in out or "none failed" in out
    # The tracer's own settings are what is tried.
    assert "not chosen: conv_in" in out
    assert not (tmp_path / "traces").exists()
