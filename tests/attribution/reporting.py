"""Results made up for the tests of the page, and its parts read back."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from ctrak_lightning import Attribution, Concept, methods
from ctrak_lightning.attribution.parts import Parts
from ctrak_lightning.store import SampleTable

THING = Concept("thing", {"object": "thing", "ink": "blue"}, {"ink": "blue"})
INK = Concept("ink", {"object": "thing", "ink": "blue"}, {"object": "thing"})
HOSTILE = [
    "</script><script>window.hit=1;alert(1)</script>",
    '" onerror="window.hit=2" x="',
    "' onmouseover='window.hit=3' '",
    "<img src=x onerror=window.hit=4>",
    "<!--<script>",
    "]]></svg><svg/onload=window.hit=5>",
    "{{ 7 * 191 }}{% raw %}",
    "javascript:window.hit=6",
    "&lt;b&gt;&amp;",
    "emoji 🦉👩‍🎨 猫 naïve",
    "\\u003cscript\\u003e</title></style><base href=//evil.example>",
    "line one\nline two\ttab",
]
"""Texts that a page must show as they are."""


class Page(HTMLParser):
    """A page as the standard library reads it: every element with its attributes, text by element
    id, and the data."""

    void = frozenset({"meta", "img", "br", "input", "link", "base", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th", "dt", "dd", "p", "li", "caption", "h2", "h3"):
            self.texts.append((tuple(self._open), " "))

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind that has these."""
        return [
            found
            for name, found in self.elements
            if name == tag
            and attributes.items() <= {k.replace("-", "_"): v for k, v in found.items()}.items()
        ]

    @property
    def text(self) -> str:
        """All that is to be read, without scripts and styles, with single spaces."""
        read = [text for where, text in self.texts if not {"script", "style"} & set(where)]
        return " ".join("".join(read).split())

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        [text] = [
            text
            for where, text in self.texts
            if where[-1:] == ("script",) and text.startswith('{"ids"')
        ]
        found: dict[str, Any] = json.loads(text)
        return found


def table_of(n: int, pictures: bool = True, **columns: list[str]) -> SampleTable:
    generator = torch.Generator().manual_seed(n)
    images = (
        torch.randint(256, (n, 4, 4, 3), generator=generator, dtype=torch.uint8)
        if pictures
        else None
    )
    return SampleTable([f"img-{i:05d}" for i in range(n)], [""] * n, columns, images)


def result_of(scores: torch.Tensor, table: SampleTable, **changes: Any) -> Attribution:
    """A result with raw scores [M, N]."""
    result = Attribution(
        concept=THING,
        seed=3,
        checkpoint_scores=scores,
        steps=[100 * (i + 1) for i in range(len(scores))],
        samples=table,
        method=methods.concept_trak().to_dict(),
        strength=0.05,
        image=torch.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8),
        damping=1.0,
    )
    return replace(result, **changes)


def random_result(n: int, checkpoints: int = 3, seed: int = 0, **changes: Any) -> Attribution:
    """A result of ``n`` samples by three owners, with parts."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator)
    scores = torch.stack(
        [base + 0.3 * torch.randn(n, generator=generator) for _ in range(checkpoints)]
    )
    table = table_of(
        n,
        owner=[f"owner {'ABC'[i % 3]}" for i in range(n)],
        licence=[("CC0", "MIT")[i % 2] for i in range(n)],
        caption=[f"caption of {i}" for i in range(n)],
        uri=[f"https://example.org/{i}" for i in range(n)],
    )
    result = result_of(scores, table, **changes)
    shares = torch.tensor([0.5, 0.7, -0.2])[:, None]
    parts = Parts(
        timesteps=[100, 900, 500],
        by_timestep=shares * result.scores,
        by_layer_group={
            "convolution": 0.25 * result.scores,
            "cross-attention": 0.75 * result.scores,
        },
    )
    return replace(result, parts=parts)


def hostile_result() -> Attribution:
    """Every text that a data set can bring is hostile, and so is the concept's own."""
    n = len(HOSTILE)
    turned = HOSTILE[1:] + HOSTILE[:1]
    table = SampleTable(
        HOSTILE,
        [""] * n,
        {
            "owner": turned,
            "licence": list(HOSTILE),
            "caption": ["x" * 10_000 + HOSTILE[0], *HOSTILE[1:]],
            "uri": [
                "javascript:alert(1)",
                "https://example.org/ok?a=1&b=2#c",
                "JaVaScRiPt:alert(1)",
                "data:text/html,<script>alert(1)</script>",
                'https://example.org/" onclick="alert(1)',
                "https://example.org/\njavascript:alert(1)",
                *[" http://spaced.example"] * (n - 6),
            ],
            HOSTILE[0]: turned,
        },
        torch.zeros(n, 4, 4, 3, dtype=torch.uint8),
    )
    scores = torch.linspace(3, -2, n).expand(2, n)
    concept = Concept(HOSTILE[0], {HOSTILE[1]: HOSTILE[3]}, {})
    return result_of(scores, table, concept=concept)
