"""The Text dashboard's table, as TensorBoard itself renders it."""

import warnings
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrak_lightning import Concept
from ctrak_lightning.attribution import Share
from ctrak_lightning.attribution.diagnostics import NOT_LEARNT
from ctrak_lightning.panels import Answer
from ctrak_lightning.panels.tables import escaped, ranking
from ctrak_lightning.panels.watch import Shown

from .answers import answer_of

with warnings.catch_warnings():
    # Raised while TensorBoard imports its own copy of bleach.
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard import plugin_util

HOSTILE = [
    "<script>alert(1)</script>",
    "| a | b |",
    "[click](javascript:alert(1))",
    "![x](http://example.invalid/x.png)",
    "**bold** _it_ `code` ~~~ # head",
    "line\n\n- list\n1. one",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &#124; \\| \\\\",
    "http://example.invalid/?a=b&c=d",
    "naïve 猫 🦉",
]


class Tables(HTMLParser):
    """Cells of every table, and all tags that occur."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: set[str] = set()
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def rendered(markdown: str) -> Tables:
    return Tables(plugin_util.markdown_to_safe_html(markdown))


def test_the_ranking_is_shown_whole_and_hostile_text_is_inert() -> None:
    n = len(HOSTILE)
    metadata = {"owner": HOSTILE, "caption": HOSTILE[::-1]}
    ids = [f"{text}/{i}" for i, text in enumerate(HOSTILE)]
    answer = answer_of([float(n - i) - 4.5 for i in range(n)], metadata, ids=ids, name=HOSTILE[0])
    shown = Shown(group="owner", top=n, bottom=2, shares=[Share(HOSTILE[1], 0.625, 0, 1, 5)])
    page = rendered(ranking(answer, shown))
    assert page.tags <= {"h3", "h4", "p", "table", "thead", "tbody", "tr", "th", "td"}
    facts, proponents, opponents, shares = page.tables
    assert answer.result is not None
    scores = [f"{score:.3f}" for score in answer.result.scores.tolist()]
    one_line = [" ".join(text.split()) for text in HOSTILE]
    expected = [
        [str(i + 1), " ".join(ids[i].split()), one_line[i], one_line[n - 1 - i], scores[i]]
        for i in range(n)
    ]
    assert proponents == [["rank", "id", "owner", "caption", "score"], *expected]
    assert opponents[1:] == [expected[-1], expected[-2]]
    assert shares == [["owner", "share", "samples"], [one_line[1], "62.5%", "5"]]
    assert dict(zip(*facts, strict=True))["present"] == "object: owl, artist: noto"
    assert dict(zip(*facts, strict=True))["damping"] == "10"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=120))
def test_any_text_survives_a_cell(text: str) -> None:
    page = rendered(f"| a |\n| --- |\n| x{escaped(text)}x |")
    [[_, [cell]]] = page.tables
    assert cell[1:-1].split() == "".join(c if c.isprintable() else " " for c in text).split()


def test_what_is_missing_is_left_out_or_said() -> None:
    page = rendered(ranking(answer_of([1.0, -1.0, 0.5]), Shown(group=None, top=2, bottom=0)))
    assert len(page.tables) == 2
    assert page.tables[1][0] == ["rank", "id", "score"]
    assert [row[1] for row in page.tables[1][1:]] == ["s0", "s2"]
    unlearnt = ranking(answer_of([1.0, 2.0], strength=1e-6), Shown(group=None))
    assert rendered(unlearnt).tags == {
        "h3",
        "h4",
        "p",
        "strong",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert 0 < unlearnt.index(escaped(NOT_LEARNT)) < unlearnt.index("Proponents")
    assert "says nothing" not in ranking(answer_of([1.0, 2.0]), Shown(group=None))
    undefined = rendered(ranking(answer_of([1.0, 2.0], strength=float("nan")), Shown(group=None)))
    assert dict(zip(*undefined.tables[0], strict=True))["concept strength"] == "-"
    nothing = Answer(Concept("x", "a prompt", ""), None, "the gradients are zero <b>")
    text = ranking(nothing, Shown(group=None))
    assert "No scores at this checkpoint: the gradients are zero &#60;b&#62;" in text


@pytest.mark.parametrize(("group", "columns"), [("caption", ["caption"]), ("none", ["caption"])])
def test_columns(group: str, columns: list[str]) -> None:
    answer = answer_of([1.0, 2.0], {"caption": ["a", "b"], "other": ["c", "d"]})
    page = rendered(ranking(answer, Shown(group=group)))
    assert page.tables[1][0] == ["rank", "id", *columns, "score"]
