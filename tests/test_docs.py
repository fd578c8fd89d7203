"""README and docs: blocks of code run as they stand, links lead somewhere, the front page stays
short."""

import hashlib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from ctrak_lightning import Attributor, Concept, DiffusersTask, Method, TraceStore, methods
from ctrak_lightning.gradients import layers
from ctrak_lightning.methods.objectives import Objective
from ctrak_lightning.methods.trajectories import Trajectory
from ctrak_lightning.tasks.registry import FAMILIES

from .attribution.test_attributor import METHODS, SAMPLER, traced
from .attribution.test_kinds import PICTURE, Seeing
from .gradients.test_kinds_of_layers import Gain
from .gradients.test_kinds_of_layers import case as gains
from .gradients.zoo import TOLERANCE, features, row_error
from .tasks.test_fine_tune import Samples
from .tasks.test_registry import ToneNet, TonePipeline
from .tasks.tiny import build

DOC = (Path(__file__).parent.parent / "docs" / "prompts.md").read_text()


class Worded(Seeing):
    """The toy, told in words: each stands for one of its tokens, whichever."""

    def known_attributes(self) -> None:  # type: ignore[override]
        return None  # it takes prompts

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        words = spec.split() if isinstance(spec, str) else []
        places = [1 + int(hashlib.sha256(word.encode()).hexdigest(), 16) % 7 for word in words] or [
            0
        ]
        rows = self.embedding(torch.tensor(places)).mean(0).expand(n, 2, -1)
        return {"encoder_hidden_states": rows}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_the_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Worded().double()
    module.load_state_dict(traced(tmp_path / "s", METHODS["per_sample"], steps=(1,)).state_dict())
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"attributor": attributor, "picture": PICTURE, "torch": torch}
    found = blocks("python")
    assert len(found) == 6
    exec(found[0], names)
    [shown] = blocks("text")
    assert capsys.readouterr().out == shown
    for block in found[1:]:
        exec(block, names)
    assert (tmp_path / "both.csv").exists()
    assert [result.concept.name for result in names["results"]] == ["Pikachu", "Picasso"]


def test_the_table_of_counter_prompts() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DOC, re.MULTILINE)
    made = [(p, c, a) for p, c, a in rows if p not in ("prompt",)]
    assert len(made) >= 6
    for prompt, concept, absent in made:
        assert Concept.from_prompt(prompt, concept).absent == absent


ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs" / "notebooks").glob("*.md"),
        *(ROOT / "docs" / "reference").glob("*.md"),
        *(ROOT / "recipes").glob("**/README.md"),
    ],
    key=lambda path: str(path.relative_to(ROOT)),
)


@pytest.mark.parametrize("page", ["architecture.md", "extending.md"])
def test_the_paths_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+(?:/|\.py|\.md))`", text))
    assert len(named) > 10
    package = ROOT / "ctrak_lightning"
    roots = [ROOT, package, *(path for path in package.iterdir() if path.is_dir())]
    missing = {name for name in named if not any((root / name).exists() for root in roots)}
    assert missing == set()


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the site takes for public."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    return importlib.import_module("public")


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere() -> None:
    dead = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            if link.startswith(("http", "mailto:")):
                continue
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (
                anchor and target.suffix == ".md" and anchor not in anchors(target)
            ):
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert dead == []


def test_every_page_is_on_the_index() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    names |= {f"notebooks/{path.name}" for path in (ROOT / "docs" / "notebooks").glob("*.md")}
    assert {name for name in names if f"({name})" in listed} == names


def test_every_public_package_has_a_page_of_reference(public: Any) -> None:
    folder = ROOT / "docs" / "reference"
    pages = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    listed = pages.pop("README.md")
    assert {name for name in pages if f"({name})" in listed} == pages.keys()
    there = re.findall(r"<!-- names of (\S+) -->", "".join(pages.values()))
    assert sorted(there) == sorted(module.__name__ for module in public.modules())


def test_every_error_says_when_why_and_what_to_do(public: Any) -> None:
    found = public.problems()
    assert len(found["errors"]) >= 16
    assert len(found["warnings"]) >= 11
    for one in (*found["errors"], *found["warnings"]):
        parts = public.parts(one)
        assert all((parts.when, parts.why, parts.to_do)), f"{one.__name__}: {parts}"


def test_the_front_page_is_read_in_two_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 800
    assert len(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)) <= 30


METHODS_CODE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL
)


def test_an_objective_of_ones_own_is_traced_and_described() -> None:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(METHODS_CODE[0], names)
    method = names["quartic"]()
    assert method.to_dict()["training"]["objective"] == {"class": "mine.Quartic", "scale": 1.0}
    assert Method.from_dict(method.to_dict()) == method


def test_two_methods_are_compared() -> None:
    names: dict[str, Any] = {}
    exec(METHODS_CODE[1], names)
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(6, 40, generator=generator)
    noise = torch.rand(6, 40, generator=generator)
    kept = torch.rand(30, 40, generator=generator) < 0.5
    found = names["compared"](truth, noise, truth > 0.8, kept, truth @ kept.float().T, k=5)
    assert found["recall"][0] == (1, 1, 1)
    assert found["datamodeling"][0][0] == pytest.approx(1)
    for ours, other, (_, low, _) in found.values():
        assert ours[0] > other[0]
        assert low > 0


def test_a_family_and_a_layer_kind_of_ones_own_are_made_known() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [family] = [block for block in blocks if "@register_family" in block]
    [kind] = [block for block in blocks if "@register_layer" in block]
    known, kinds = dict(FAMILIES), dict(layers._KINDS)
    names: dict[str, Any] = {"TonePipeline": TonePipeline, "Gain": Gain, "__name__": "mine"}
    try:
        exec(family, names)
        pipeline = TonePipeline(ToneNet(), DDIMScheduler(clip_sample=False))
        task = DiffusersTask.from_pipeline(pipeline)
        rows = {
            "image": torch.rand(2, 3, 6, 6),
            "tone": torch.tensor([1, 3]),
            "sample_id": ["a", "b"],
        }
        assert type(task) is names["ToneTask"]
        assert task.loss(rows).isfinite()
        exec(kind, names)
        case = gains()
        assert row_error(features(case), features(case, "loop")) < TOLERANCE
    finally:
        for registry, before in ((FAMILIES, known), (layers._KINDS, kinds)):
            registry.clear()
            registry.update(before)  # type: ignore[arg-type]


def test_the_page_of_methods_names_them_all() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    parts = [*Objective.__subclasses__(), *Trajectory.__subclasses__()]
    own = [one.__name__ for one in parts if one.__module__.startswith("ctrak_lightning.")]
    for name in (*methods.PRESETS, *own):
        assert f"`{name}" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:.*the tokenizers cut")  # to the tiny one's 16 tokens
def test_the_front_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, asking = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    torch.manual_seed(5)  # one with which some sample has a positive score
    pipeline = build("sd1")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"pipeline": pipeline, "loader": DataLoader(Samples(), 2)}
    # As it stands, but for the number of epochs and what the Trainer prints.
    shorter = training.replace(
        "max_epochs=30", "max_epochs=2, logger=False, enable_progress_bar=False"
    )
    exec(shorter.replace("every_n_epochs=10", "every_n_epochs=1"), names)
    assert [one.step for one in TraceStore("runs/x/traces").checkpoints] == [2, 4]
    exec(asking, names)
    assert Path("cat.html").exists()
    assert len(names["result"].scores) == len(Samples())
