"""Stores that earlier versions wrote: they open, answer as they did, and would be written the same.

``earlier/schema_4`` is of commit 1532d64 and ``earlier/schema_5`` of 33044ca, made by the same fit
of :class:`~tests.toy.QuickDiffusion`; both versions gave the scores in ``earlier/scores.json``.
"""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer

from ..toy import QuickDiffusion, ToyData

EARLIER = Path(__file__).with_name("earlier")
RED = Concept("red", present={"colour": "red", "shape": "dot"}, absent={"shape": "dot"})
# Scores are about 1 to 5; another processor rounds a training step otherwise.
ROUNDING = 1e-3

pytestmark = pytest.mark.parametrize("version", ["schema_4", "schema_5"])


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    """The same fit, traced by this version."""
    path = tmp_path_factory.mktemp("now") / "traces"
    tracer = ConceptTracer(
        str(path), methods.concept_trak(), every_n_epochs=1, rank=2, dim=16, seed=3
    )
    with torch.random.fork_rng():
        L.seed_everything(5)
        trainer = L.Trainer(
            max_epochs=2,
            callbacks=[tracer],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(QuickDiffusion(), datamodule=ToyData())
    return TraceStore(path)


def test_they_answer_as_they_did(version: str, tmp_path: Path) -> None:
    path = shutil.copytree(EARLIER / version, tmp_path / "traces")
    result = Attributor(path, QuickDiffusion(), sampler=Sampler(steps=10)).attribute(RED, seed=0)
    expected = json.loads((EARLIER / "scores.json").read_text())
    found = dict(zip(result.samples.sample_ids, result.scores.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=ROUNDING)


def test_this_version_writes_the_same(version: str, rewritten: TraceStore, tmp_path: Path) -> None:
    before = TraceStore(shutil.copytree(EARLIER / version, tmp_path / "traces"))
    # The seed of the noise is recorded since questions share it, and how the network was run.
    beside = {"noise_seed": 3, "numerics": {"attention": "fused", "precision": "true"}}
    assert rewritten.header.method == before.header.method | beside
    assert rewritten.header.projection == before.header.projection
    assert rewritten.samples.sample_ids == before.samples.sample_ids
    if version != "schema_4":  # content was hashed otherwise
        assert rewritten.samples.content_sha256 == before.samples.content_sha256
    assert [c.step for c in rewritten.checkpoints] == [c.step for c in before.checkpoints]
    for now, then in zip(rewritten.checkpoints, before.checkpoints, strict=True):
        assert torch.allclose(now.features(), then.features(), atol=ROUNDING)
        assert torch.allclose(now.norms(), then.norms(), rtol=ROUNDING)
        assert torch.allclose(now.losses(), then.losses(), rtol=ROUNDING)
