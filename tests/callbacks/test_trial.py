"""The trial of a training run: what does not fit ends it before the first step, and what fits is
left as it was."""

import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ctrak_lightning import Concept, GradientTracer, Projection, methods
from ctrak_lightning.callbacks import ConceptMonitor
from ctrak_lightning.callbacks.concept_tracer import ConceptTracer
from ctrak_lightning.errors import TrialError

from ..tasks.runs import made, train
from ..toy import ToyDiffusion
from .test_concept_tracer import files_of, fit, tracer

RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})


class Unaskable(ToyDiffusion):
    """Knows no values by name, and raises what a dictionary would for unknown ones; traces as it
    should."""

    def known_attributes(self) -> None:  # type: ignore[override]
        return None

    def tokens(self, colours: list[str | None], shapes: list[str | None]) -> Tensor:
        if "mauve" in colours:
            raise KeyError("mauve")
        if "wide" in colours:
            return super().tokens([None], shapes).repeat(1, 1, 2)
        return super().tokens(colours, shapes)


@pytest.mark.parametrize("mode", ["capture", "inline"])
def test_what_does_not_fit_ends_a_run_before_its_first_step(tmp_path: Path, mode: Any) -> None:
    class Odd(ToyDiffusion):
        is_training = False

        def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            if not self.is_training:
                raise RuntimeError("expected input to have 9 channels")
            return super().predict(x_t, t, condition)

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            raise AssertionError("a step was taken")

    method = methods.inline_trak() if mode == "inline" else methods.d_trak(timesteps=2)
    told = r"`ConceptTracer\(dirpath=.*Odd\.predict\(.*RuntimeError: expected input to have 9 channels.*HINT"
    with pytest.raises(MisconfigurationException, match=told) as found:
        fit(Odd(), [tracer(tmp_path, method=method, mode=mode)])
    assert isinstance(found.value.__cause__, TrialError)
    assert isinstance(found.value.__cause__.__cause__, RuntimeError)
    assert set(files_of(tmp_path / "traces")) <= {"writer.lock"}


@pytest.mark.parametrize("first", ["tracer", "monitor"])
@pytest.mark.parametrize(
    ("colour", "told"),
    [
        ("mauve", r"Concept\('red', present=.*Unaskable\.condition\(.*KeyError: 'mauve'"),
        (
            "wide",
            r"`ConceptTracer\(.*asking Concept\('red'\).*Unaskable\.predict\(.*float32 \[1, 2, 24\]",
        ),
    ],
)
def test_a_monitors_concept_that_cannot_be_asked_ends_a_run_before_its_first_step(
    tmp_path: Path, colour: str, told: str, first: str
) -> None:
    concept = Concept("red", {"colour": colour, "shape": "bar"}, {"shape": "bar"})
    callbacks: list[Any] = [tracer(tmp_path), ConceptMonitor([concept])]
    module = Unaskable()
    with (
        pytest.warns(UserWarning, match="no TensorBoardLogger"),
        pytest.raises(MisconfigurationException, match=f"{told}.*HINT"),
    ):
        fit(module, callbacks if first == "tracer" else callbacks[::-1])
    assert module.trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.filterwarnings("ignore:ConceptMonitor. no TensorBoardLogger")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_it_is_told_once_and_left_out_of_a_dry_run_and_a_resumed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = tracer(tmp_path)
    blocks = len(GradientTracer(ToyDiffusion().denoiser, Projection(rank=4, dim=64)).block_names)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="last")
    with caplog.at_level(logging.INFO):
        fit(ToyDiffusion(), [tracer(tmp_path)], fast_dev_run=True)
        assert "trial" not in caplog.text
        fit(ToyDiffusion(), [callback, keep], max_epochs=1)
        assert caplog.text.count("the trial on 2 samples passed in") == 1
        assert f"the gradients of {blocks} of {blocks} layers" in caplog.text
        assert callback.trial_seconds > 0
        resumed = {"max_epochs": 2, "ckpt_path": str(tmp_path / "ckpt" / "last.ckpt")}
        # No trial, but the concepts may be new ones.
        mauve = ConceptMonitor(
            [Concept("red", {"colour": "mauve", "shape": "bar"}, {"shape": "bar"})]
        )
        with pytest.raises(MisconfigurationException, match=r"ConceptMonitor.*KeyError: 'mauve'"):
            fit(Unaskable(), [tracer(tmp_path), mauve], **resumed)
        fit(ToyDiffusion(), [tracer(tmp_path)], **resumed)
    assert caplog.text.count("the trial") == 1


def test_a_default_method_that_nobody_could_ask_is_refused(tmp_path: Path) -> None:
    told = r"'influence'.*UnconditionalTask has none.*HINT: trace with methods\.d_trak\(\)"
    with pytest.raises(MisconfigurationException, match=told):
        train(made("ddpm"), [ConceptTracer(str(tmp_path / "traces"))])
