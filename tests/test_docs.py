"""The blocks of docs/prompts.md, run as they stand."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning import Attributor, Concept

from .attribution.test_attributor import METHODS, SAMPLER, traced
from .attribution.test_kinds import PICTURE, Seeing

DOC = (Path(__file__).parent.parent / "docs" / "prompts.md").read_text()


class Worded(Seeing):
    """The toy, told in words: each stands for one of its tokens, whichever."""

    @property
    def known_attributes(self) -> Any:
        raise AttributeError  # it takes prompts

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        words = spec.split() if isinstance(spec, str) else []
        places = [1 + int(hashlib.sha256(word.encode()).hexdigest(), 16) % 7 for word in words] or [0]
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
