"""The loops of docs/attach.md: each writes the store that the callback writes for the same
weights."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore, methods
from ctrak_lightning.callbacks import ConceptTracer
from tests.gradients.zoo import TOLERANCE, row_error
from tests.tasks.test_attach import NAMED
from tests.tasks.theirs import TheirData, TheirModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    # A model of random weights hardly knows its concepts.
    pytest.mark.filterwarnings("ignore:The concept direction"),
]
PAGE = Path(__file__).parents[2] / "docs" / "attach.md"
BLOCKS = [part.split("```")[0] for part in PAGE.read_text().split("```python\n")[1:]]
LOOPS = {"plain": 1, "fabric": 2, "accelerate": 3}
METHOD = methods.concept_trak_norm(timesteps=2, damping=1.0)
SMALL = {
    "range(30)": "range(2)",
    "% 10 == 0": "% 2 == 0",
    "% 500 == 0": "% 2 == 0",
    "batch_size=16": "batch_size=2",
    "Projection(rank=16, dim=2048)": "Projection(rank=4, dim=128)",
    "max_epochs=30, ": "max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, ",
    "every_n_epochs=10": "every_n_epochs=2, rank=4, dim=128",
    "Fabric(": "Fabric(accelerator='cpu', ",
    "Accelerator(": "Accelerator(cpu=True, ",
}


def run(block: int, scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    code = BLOCKS[block]
    for written, small in SMALL.items():
        code = code.replace(written, small)
    monkeypatch.setattr("ctrak_lightning.methods.concept_trak", lambda: METHOD)
    L.seed_everything(0, verbose=False)
    exec(compile(code, str(PAGE), "exec"), scope)
    return scope


@pytest.mark.parametrize(
    "loop",
    [pytest.param(loop, marks=[] if loop == "plain" else [pytest.mark.slow]) for loop in LOOPS],
)
def test_a_loop_of_the_documentation(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = TheirModule()
    before = [value.clone() for value in module.parameters()]
    names = ("unet", "vae", "text_encoder", "tokenizer", "noise_scheduler")
    scope = {name: getattr(module, name) for name in names} | {"dataset": TheirData()}
    run(LOOPS[loop], scope, monkeypatch)
    assert any(
        not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True)
    )
    store = TraceStore("runs/x/traces")
    assert store.verify() == []
    [sealed] = store.checkpoints
    assert sealed.step == (
        2 if loop == "accelerate" else 4
    )  # which accumulates two batches for a step

    # The same weights, and a callback at the end of a training that does not change them.
    module.configure_optimizers = lambda: torch.optim.SGD(module.unet.parameters(), lr=0.0)  # type: ignore[method-assign]
    precision: Any = "bf16-mixed" if loop == "fabric" else None
    folder = str(tmp_path / "callback")
    callback = ConceptTracer(folder, METHOD, task=NAMED, rank=4, dim=128, precision=precision)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TheirData(), 2))
    [expected] = TraceStore(tmp_path / "callback").checkpoints
    assert store.samples.sample_ids == TraceStore(tmp_path / "callback").samples.sample_ids
    assert store.samples.content_sha256 == TraceStore(tmp_path / "callback").samples.content_sha256
    assert (
        row_error(sealed.features(), expected.features()) < 10 * TOLERANCE
    )  # other batches: 3e-5 was measured
    torch.testing.assert_close(sealed.losses(), expected.losses())
    weights = {f"unet.{name}": value for name, value in sealed.weights().items()}
    assert weights.keys() == expected.weights().keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.weights().items())

    cat = Concept("cat", present="a cat by x", absent="a picture by x")
    task = NAMED.bind(module)
    asked = Attributor(store, module.unet, task=task, sampler=Sampler(steps=3)).attribute(cat)
    assert asked.scores.std() > 0


def test_the_module_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"L": L, "module": TheirModule(), "loader": DataLoader(TheirData(), 2)}
    monkeypatch.setattr(
        "ctrak_lightning.callbacks.concept_tracer.methods.by_name", lambda name: METHOD
    )
    result = run(0, scope, monkeypatch)["result"]
    assert result.steps == [4]
    assert result.scores.std() > 0
