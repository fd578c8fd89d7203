"""The page, read by the standard library: what it says, and that the data set's texts stay
texts."""

import base64
import hashlib
import io
import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ctrak_lightning import Attribution, Attributor, TraceStore, methods
from ctrak_lightning.attribution.diagnostics import (
    ASKED,
    BLIND,
    INDISTINCT,
    NOT_LEARNT,
    NOT_SHOWN,
    STILL,
    UNSTABLE,
    stability,
)
from ctrak_lightning.capture.trace import FAINT
from ctrak_lightning.errors import ReportError
from ctrak_lightning.provenance import Ledger
from ctrak_lightning.report import content as limits
from ctrak_lightning.report import page as layout
from ctrak_lightning.report import write_report
from ctrak_lightning.report.content import MOST, link, shown
from ctrak_lightning.report.figures import line_chart
from ctrak_lightning.store.facts import provenance_facts
from ctrak_lightning.store.schema import LEDGER_LOCK, WRITER_LOCK

from ..provenance.builder import recorded
from .reporting import HOSTILE, INK, THING, Page, hostile_result, random_result, result_of, table_of
from .test_attributor import BAR, METHODS, RED, SAMPLER, traced


def page_of(tmp_path: Path, *results: Attribution, **options: Any) -> Page:
    write_report(tmp_path / "report.html", list(results), **options)
    return Page(tmp_path / "report.html")


def test_cards_rows_and_opponents_are_those_of_the_ranking(tmp_path: Path) -> None:
    result = random_result(40)
    page = page_of(tmp_path, result)
    order = [record.sample_id for record in result.top(40)]
    images = [a["alt"] for a in page.all("img") if (a["alt"] or "").startswith("Training image")]
    ranked = layout.CARDS + layout.OPPONENTS
    assert images[:ranked] == [f"Training image {name}" for name in order[:12] + order[:-7:-1]]
    data = page.data
    [concept] = data["concepts"]
    assert [data["ids"][i] for i in concept["samples"]] == order
    assert concept["ranks"] == list(range(1, 41))
    assert concept["scores"] == pytest.approx([r.score for r in result.top(40)], abs=1e-4)
    owner = data["columns"][data["group"]]
    assert [owner["values"][owner["codes"][i]] for i in concept["samples"]] == [
        r.metadata["owner"] for r in result.top(40)
    ]
    position = result.samples.sample_ids.index(order[5])
    at = concept["detailed"].index(5)
    assert [row[at] for row in concept["timeline"]] == pytest.approx(
        result.timeline()[:, position].tolist(), abs=1e-4
    )
    best = result.top(1)[0]
    for text in (
        best.sample_id,
        f"{best.score:.2f}",
        best.metadata["owner"],
        best.metadata["caption"],
    ):
        assert text in page.text
    assert "object: thing, ink: blue" in page.text


def test_pictures_are_the_stores_own(tmp_path: Path) -> None:
    result = random_result(20)
    page = page_of(tmp_path, result)
    data = page.data
    for place, index in data["pictures"].items():
        picture = Image.open(
            io.BytesIO(base64.b64decode(data["thumbnails"][index].partition(",")[2]))
        )
        expected = result.samples.thumbnails
        assert expected is not None
        assert torch.equal(
            torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(4, 4, 3),
            expected[result.samples.sample_ids.index(data["ids"][int(place)])],
        )
    same = replace(
        result, samples=replace(result.samples, thumbnails=torch.zeros(20, 4, 4, 3).byte())
    )
    assert len(page_of(tmp_path, same).data["thumbnails"]) == 1


def test_a_card_shows_the_image_of_the_sample_that_it_names(tmp_path: Path) -> None:
    result = random_result(40)
    assert result.samples.thumbnails is not None
    cards = [
        a
        for a in page_of(tmp_path, result).all("img")
        if (a["alt"] or "").startswith("Training image")
    ]
    assert len(cards) == layout.CARDS + layout.OPPONENTS + layout.ALIKE
    for card in cards:
        assert card["src"] is not None
        picture = Image.open(io.BytesIO(base64.b64decode(card["src"].partition(",")[2])))
        shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(4, 4, 3)
        position = result.samples.sample_ids.index(str(card["alt"]).removeprefix("Training image "))
        assert torch.equal(shown, result.samples.thumbnails[position])


def test_the_images_that_look_like_it_are_the_nearest_ones_with_their_ranks(tmp_path: Path) -> None:
    result = random_result(40)
    assert result.image is not None
    assert result.samples.thumbnails is not None
    asked = torch.nn.functional.interpolate(
        result.image[None], (4, 4), mode="bilinear", antialias=True
    )[0]
    shown = result.samples.thumbnails.permute(0, 3, 1, 2).double() / 255
    nearest = (shown - asked).square().sum((1, 2, 3)).argsort()[: layout.ALIKE].tolist()
    page = page_of(tmp_path, result)
    [_, alike] = page.text.split("Images that look like it")
    names = re.findall(r"img-\d{5}", alike)[: layout.ALIKE]
    assert names == [result.samples.sample_ids[i] for i in nearest]
    best = {record.sample_id for record in result.top(layout.ALIKE)}
    both = len(best & set(names))
    assert f"{both or 'none'} of them {'is' if both == 1 else 'are'} among the 6 highest" in alike
    assert "did no better than a search by label and likeness" in page.text
    other = page_of(tmp_path, replace(result, method=methods.influence().to_dict())).text
    assert "where the two lists differ, look at both" in other
    assert "what training on an image changed, not what the image shows" in other
    assert "did no better than a search by label and likeness" not in other
    assert (
        "not shown to be better than a search by label and likeness, and was worse than the label for styles"
        in other
    )
    for changes in ({"image": None}, {"samples": table_of(40, pictures=False)}):
        text = page_of(tmp_path, replace(random_result(40), **changes)).text
        assert "Images that look like it" not in text


def test_shares_are_those_of_by_group_with_the_interval(tmp_path: Path) -> None:
    result = random_result(30)
    text = page_of(tmp_path, result).text
    for share in result.by_group("owner"):
        row = (
            f"{share.group} {100 * share.share:.1f} % {100 * share.low:.1f} – "  # noqa: RUF001
            f"{100 * share.high:.1f} % 10"
        )
        assert row in text, row
    by_licence = page_of(tmp_path, result, group="licence")
    assert f"CC0 {100 * result.by_group('licence')[0].share:.1f} %" in by_licence.text or (
        f"MIT {100 * result.by_group('licence')[0].share:.1f} %" in by_licence.text
    )


def test_many_groups_are_summed_up(tmp_path: Path) -> None:
    n = 40
    result = result_of(
        torch.arange(1.0, n + 1)[None], table_of(n, owner=[f"o{i}" for i in range(n)])
    )
    text = page_of(tmp_path, result).text
    rest = sum(share.share for share in result.by_group("owner")[15:])
    assert f"25 more hold {100 * rest:.1f} % together" in text


def test_several_concepts_share_a_page_and_its_samples(tmp_path: Path) -> None:
    first, second = random_result(20), random_result(20, seed=1, concept=INK)
    page = page_of(tmp_path, first, second)
    assert [a["id"] for a in page.all("section") if "data-concept" in a] == [
        "concept-1",
        "concept-2",
    ]
    data = page.data
    assert len(data["ids"]) == 20
    for result, concept in zip((first, second), data["concepts"], strict=True):
        assert [data["ids"][i] for i in concept["samples"]] == [r.sample_id for r in result.top(20)]
    for field, changed in (
        ("seed", replace(second, seed=9)),
        ("present", replace(second, concept=replace(INK, present={"ink": "blue"}, absent={}))),
        ("samples", replace(random_result(21), concept=INK)),
        ("method", replace(second, method=second.method | {"name": "other"})),
    ):
        with pytest.raises(ReportError, match=f"another {field}.*HINT"):
            write_report(tmp_path / "no.html", [first, changed])
    with pytest.raises(ReportError, match="at least one"):
        write_report(tmp_path / "no.html", [])
    assert not (tmp_path / "no.html").exists()


def test_parts_are_shares_of_the_best_images_scores(tmp_path: Path) -> None:
    result = random_result(40)
    text = page_of(tmp_path, result).text
    # Most noise first, whatever the order in which they were computed.
    assert re.search(r"t = 900 70\.0 % t = 500 -20\.0 % t = 100 50\.0 %", text)
    assert re.search(r"cross-attention 75\.0 % convolution 25\.0 %", text)
    without = page_of(tmp_path, replace(result, parts=None))
    assert "Not computed for this result" in without.text
    assert "by_timestep" not in without.data["concepts"][0]


def test_timeline_points_are_the_scores(tmp_path: Path) -> None:
    result = random_result(30)
    page = page_of(tmp_path, result)
    charts = [a for a in page.all("polyline") if len((a["points"] or "").split()) == 3]
    ticks = line_chart([("a", "a", torch.tensor([0.0, 1.0]))], [0, 10])
    assert [t for _, t in ticks.y_ticks] == ["0.0", "0.5", "1.0"]
    assert ticks.lines[0].points == "56.0,256.0 676.0,16.0"
    assert len(charts) == 6 + 3
    first = result.samples.sample_ids.index(result.top(1)[0].sample_id)
    values = " ".join(f"{v:.2f}" for v in result.timeline()[:, first].tolist())
    assert f"#1 {result.top(1)[0].sample_id} {values}" in page.text
    single = page_of(tmp_path, random_result(30, checkpoints=1))
    assert "traced at one checkpoint only" in single.text
    assert "rests on a single checkpoint" in single.text


def test_labels_at_line_ends_do_not_cover_each_other() -> None:
    values = [torch.tensor([float(i), 1.0]) for i in range(6)]
    marks = sorted(
        line.mark_y for line in line_chart([("x", "x", v) for v in values], [1, 2]).lines
    )
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(marks))
    assert 10 < marks[0] < marks[-1] < 280


@pytest.mark.parametrize("value", [0.0, 1e-12, 3e7, -5.0])
def test_charts_of_equal_and_extreme_values(value: float) -> None:
    chart = line_chart([("a", "a", torch.tensor([value, value]))], [5, 5])
    for x, y in chart.lines[0].dots:
        assert 0 <= x <= 720
        assert 16 <= y <= 256


def test_hostile_texts_add_no_element_and_no_attribute(tmp_path: Path) -> None:
    """The same result with harmless texts of the same shape gives the same elements with the same
    attributes."""
    page = page_of(tmp_path, hostile_result())
    allowed = {"a": {"href", "rel", "target", "class"}, "img": {"src", "alt"}}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            attributes
        )
        if tag in allowed:
            assert set(attributes) <= allowed[tag]
    assert len(page.all("script")) == 2
    assert len(page.all("style")) == 1
    assert not page.all("base")
    assert not page.all("iframe")
    sources = [a["src"] for a in page.all("img")]
    assert all(
        source is not None and source.startswith("data:image/png;base64,") for source in sources
    )
    data = page.data
    assert sorted(data["ids"]) == sorted(HOSTILE)
    caption = data["columns"][data["caption"]]["values"]
    assert caption[0] == "x" * 1000 + f"… ({9000 + len(HOSTILE[0]):,} more characters)"
    for text in HOSTILE[:6]:
        assert text in page.text
    assert "1337" not in page.text


def test_only_web_addresses_become_links(tmp_path: Path) -> None:
    page = page_of(tmp_path, hostile_result())
    out = [a for a in page.all("a") if not (a["href"] or "").startswith("#")]
    assert {a["href"] for a in out} == {"https://example.org/ok?a=1&b=2#c"}
    assert all(a["rel"] == "noreferrer noopener" for a in out)
    [uri] = [column for column in page.data["columns"] if column["name"] == "uri"]
    linked = [value for value, is_link in zip(uri["values"], uri["links"], strict=True) if is_link]
    assert linked == ["https://example.org/ok?a=1&b=2#c"]
    assert [c["links"] for c in page.data["columns"] if c["name"] != "uri"] == [None] * 4
    for bad in (
        "//x.example",
        "ftp://x.example",
        "https://",
        "https://a b",
        "vbscript:x",
        "https://x\u202e",
    ):
        assert link(shown(bad)) is None or bad == "https://x\u202e"
    assert link("HTTP://x.example/") == "HTTP://x.example/"


def test_what_is_invisible_is_spelt_out() -> None:
    assert shown("safe\u202egpj.exe") == "safe[U+202E]gpj.exe"
    assert shown("bell\x07 del\x7f csi\x9b") == "bell␇ del␡ csi[U+009B]"
    assert shown("a\udce9b") == "a\\udce9b"
    assert shown("two\nlines\tand 👩‍🎨 עברית") == "two\nlines\tand 👩‍🎨 עברית"


def test_the_policy_allows_this_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    page = page_of(tmp_path, random_result(5))
    [policy] = page.all("meta", http_equiv="Content-Security-Policy")
    directives = dict(part.strip().split(" ", 1) for part in (policy["content"] or "").split(";"))
    for kind in ("script", "style"):
        opening = "<script>" if kind == "script" else "<style>"
        body = page.html.split(opening)[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert directives[f"{kind}-src"] == f"'sha256-{digest}'"
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert not re.search(r"(?:src|href)=\"(?!data:|#|https://example\.org/)", page.html)
    assert "innerHTML" not in page.html
    assert "eval(" not in page.html


def test_landmarks_headings_and_labels(tmp_path: Path) -> None:
    page = page_of(tmp_path, random_result(30), random_result(30, seed=1, concept=INK))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.all("html", lang="en")
    for landmark in ("main", "header", "nav"):
        assert len(page.all(landmark)) == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "href"):
            target = attributes.get(name) or ""
            if name == "aria-labelledby" and target:
                assert target in ids
            elif target.startswith("#"):
                assert target[1:] in ids
    assert all(a.get("alt") for a in page.all("img"))
    assert all("scope" in a for a in page.all("th"))
    # Every control stands in a label.
    for tag in ("input", "select"):
        for attributes in page.all(tag):
            where = page.html.index(f'data-filter="{attributes["data-filter"]}"')
            assert page.html.rindex("<label>", 0, where) > page.html.rfind("</label>", 0, where)


def test_without_images_and_columns_the_rest_is_there(tmp_path: Path) -> None:
    bare = result_of(torch.tensor([[2.0, 1.0, -1.0]]), table_of(3, pictures=False), image=None)
    page = page_of(tmp_path, bare)
    assert not page.all("img")
    for sentence in (
        "No picture: the model was asked without a decoder",
        "The store holds no thumbnails",
        "The data set states no owner and no artist",
        "This result was given without its store",
    ):
        assert sentence in page.text, sentence
    assert [a["data-filter"] for a in page.all("input")] == ["text"]
    assert not page.all("select")
    assert page.data["group"] is None
    artist = result_of(torch.tensor([[2.0, 1.0, -1.0]]), table_of(3, Artist=["猫", "b", "猫"]))
    assert "猫 66.7 %" in page_of(tmp_path, artist).text
    with pytest.raises(ReportError, match=r"group='nobody'.*The store has: Artist.*HINT"):
        write_report(tmp_path / "report.html", artist, group="nobody")


def test_no_positive_score(tmp_path: Path) -> None:
    result = result_of(
        torch.tensor([[-2.0, -1.0, -3.0], [-2.0, -1.0, -3.0]]), table_of(3, owner=["a", "b", "c"])
    )
    split = replace(result, parts=random_result(3).parts)
    page = page_of(tmp_path, split)
    for sentence in (
        "No training image has a positive score",
        "None has a score above zero",
        "nothing to share out",
        "No image has a positive score to split",
    ):
        assert sentence in page.text, sentence
    zero = result_of(torch.zeros(2, 3), table_of(3, owner=["a", "b", "c"]))
    assert "No image has a score below zero" in page_of(tmp_path, zero).text


def test_a_ranking_that_says_nothing_is_said_first_and_withholds_its_shares(tmp_path: Path) -> None:
    faint = random_result(20, strength=FAINT / 2)
    page = page_of(tmp_path, faint)
    head = page.text.index("Concept attribution report")
    assert head < page.text.index(NOT_LEARNT) < page.text.index("The generated image")
    assert f"{FAINT / 2:.1e}, below {FAINT:g}" in page.text
    assert (
        len(page.all("p", **{"class": "warning grave"})) == 2
    )  # the page's head, and the concept's section
    for claim in ("Images that taught it", "When it was learnt", "Each owner's", "Opponents"):
        assert claim not in page.text, claim
    assert "Withheld: the ranking says nothing" in page.text
    assert "Shares of thing" not in page.text
    assert "Shares of thing" in page_of(tmp_path, replace(faint, strength=2 * FAINT)).text
    strong = page_of(tmp_path, random_result(20, strength=2 * FAINT))
    assert not strong.all("p", **{"class": "warning grave"})
    assert not strong.all("p", **{"class": "warning"})
    assert "the ranking says nothing" in strong.text  # of an image that does not show the concept
    assert "Look at it first" in strong.text
    assert "Withheld" not in strong.text
    both = page_of(tmp_path, random_result(20, strength=2 * FAINT), replace(faint, concept=INK))
    assert f"{NOT_LEARNT} (Concept: ink.)" in both.text
    assert both.text.count("Images that taught it") == 1
    unknown = page_of(tmp_path, random_result(20, strength=float("nan")))
    assert "looks at one condition only" in unknown.text


def test_no_checkpoint_and_broken_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="has 0 checkpoints and 3 of 3 scores.*HINT"):
        result_of(torch.zeros(0, 3), table_of(3)).report(tmp_path / "no.html")
    with pytest.raises(ReportError, match="has 1 checkpoints and [1-3] of 3 scores.*HINT"):
        result_of(torch.tensor([[1.0, float("nan"), 2.0]]), table_of(3)).report(
            tmp_path / "no.html"
        )
    assert not (tmp_path / "no.html").exists()
    lone = result_of(torch.tensor([[1.0]]), table_of(1, owner=["a"]))
    assert "a 100.0 %" in page_of(tmp_path, lone).text


def test_checkpoints_that_disagree_are_warned_of(tmp_path: Path) -> None:
    scores = torch.arange(10.0)
    result = result_of(torch.stack([scores, scores.flip(0)]), table_of(10, owner=["a"] * 10))
    text = page_of(tmp_path, result).text
    assert "hardly agree (rank correlation -1.00)" in text
    assert NOT_SHOWN not in text


@pytest.mark.parametrize(
    ("damping", "told"),
    [
        ("agreement", "Chosen where the checkpoints agree most"),
        (1.0, "As the method sets it."),
        (
            {"class": "mine.rules.Largest", "low": 0.1, "names": ["<b>"]},
            "As Largest(low=0.1, names=['<b>']) sets it.",
        ),
        ({"class": "Agreement", "dampings": [0.5] * 1000}, "As Agreement(dampings=[0.5, 0.5"),
    ],
)
def test_the_page_says_where_the_damping_comes_from(
    tmp_path: Path, damping: Any, told: str
) -> None:
    result = random_result(5)
    result = replace(result, method=result.method | {"damping": damping})
    page = page_of(tmp_path, result)
    assert told in page.text
    assert "0.5, " * 100 not in page.text


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Attribution]:
    """Two concepts asked of a real store, with parts."""
    path = tmp_path_factory.mktemp("store")
    module = traced(path, METHODS["concept_trak_norm"])
    return Attributor(path, module, sampler=SAMPLER).attribute_many([RED, BAR], 3, parts=True)


def test_a_real_result_is_reported_with_checks_and_provenance(
    tmp_path: Path, asked: list[Attribution]
) -> None:
    for result in asked:
        result.report(tmp_path / "one.html")
    page = page_of(tmp_path, *asked)
    store = asked[0].store
    assert store is not None
    manifest = store.path / "manifest.json"
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() in page.text
    assert f"{stability(asked[0].checkpoint_scores):.2f}" in page.text
    assert re.search(r"Self-check \d+ of 12", page.text)
    assert "cross-attention" in page.text
    assert "owner of red" in page.text


def test_the_ledger_stands_on_the_page_and_a_damaged_one_is_told(
    tmp_path: Path, asked: list[Attribution]
) -> None:
    path = recorded(tmp_path / "store")
    result = replace(asked[0], store=TraceStore(path))
    head = Ledger(path).entries()[-1].sha256
    assert head not in page_of(tmp_path, asked[0]).text
    page = page_of(tmp_path, result)
    assert f"ledger: ledger head {head}" in page.text
    assert "ledger: base model base/model, revision r1" in page.text
    lines = Ledger(path).path.read_bytes().splitlines(keepends=True)
    Ledger(path).path.write_bytes(b"".join(lines[1:]))
    page = page_of(tmp_path, result)
    assert "ledger damaged, so that it shows nothing" in page.text
    assert head not in page.text


def test_provenance_facts_are_the_hashes_of_the_files(asked: list[Attribution]) -> None:
    store = asked[0].store
    assert store is not None
    facts = provenance_facts(store)
    locks = {WRITER_LOCK, LEDGER_LOCK}  # of the writer that was, and no part of the record
    files = [path for path in store.path.rglob("*") if path.is_file() and path.name not in locks]
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert hashes <= set(facts.values())
    for path in files:
        name = path.relative_to(store.path).as_posix()
        [key] = [key for key in facts if key.endswith(f"sha256 of {name}")]
        assert facts[key] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["run"] == store.run_id
    assert facts["method"] == "concept_trak_norm"
    assert "learning rate 0.001" in facts["checkpoint at step 1"]
    assert all(isinstance(value, str) for value in facts.values())
    assert facts["version of torch"] == torch.__version__


def test_the_page_points_to_what_its_method_reached_elsewhere(tmp_path: Path) -> None:
    result = random_result(5)
    page = page_of(tmp_path, replace(result, method=result.method | {"name": "das"}))
    assert "What das reached where the truth is known" in page.text
    root = Path(__file__).parents[2]
    for name in ("docs/evidence.md", "recipes/benchmarks/README.md"):
        assert name in page.text
        assert (root / name).exists()


def test_a_very_large_ranking_is_cut_at_both_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BEST": 20, "LOWEST": 5, "PICTURED_BEST": 4, "PICTURED_LOWEST": 2}.items():
        monkeypatch.setattr(limits, name, value)
        monkeypatch.setattr(f"ctrak_lightning.report.page.{name}", value)
    result = random_result(60)
    page = page_of(tmp_path, result)
    [concept] = page.data["concepts"]
    assert concept["ranks"] == [*range(1, 21), *range(56, 61)]
    assert [page.data["ids"][i] for i in concept["samples"]][-1] == result.top(60)[-1].sample_id
    assert concept["detailed"] == [0, 1, 2, 3, 23, 24]
    assert "holds the 20 highest and the 5 lowest of 60 images" in page.text
    assert "The 4 highest and the 2 lowest have a picture" in page.text


def test_the_docs_state_the_limits_that_are_used() -> None:
    text = " ".join(
        (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8").split()
    )
    for sentence in (
        f"the {limits.BEST:,} highest and the {limits.LOWEST:,} lowest rows",
        f"the {limits.PICTURED_BEST} highest and the {limits.PICTURED_LOWEST} lowest have a "
        "picture",
        f"the {layout.CARDS} highest and the {layout.OPPONENTS} lowest scores",
        f"| below {FAINT:g} | not learnt: the model does not tell",
        f"| above {BLIND:g} | not learnt",
        f"| below {STILL:g} | nothing learnt in between",
        f"Below {UNSTABLE:g} a caution says that the ranking is another one",
        {0.5: "| fewer than half | the traces hardly tell"}[INDISTINCT],
        NOT_LEARNT,
        NOT_SHOWN,
        f"up to {ASKED} stored traces",
        f"more than {MOST:,} characters",
    ):
        assert sentence in text, sentence


def test_huge_and_broken_images_are_scaled_and_shown(tmp_path: Path) -> None:
    huge = torch.rand(3, 1200, 2400)
    huge[:, 0, 0] = float("nan")
    table = replace(table_of(2), thumbnails=torch.zeros(2, 500, 1000, 3, dtype=torch.uint8))
    page = page_of(tmp_path, result_of(torch.tensor([[1.0, -1.0]]), table, image=huge))
    sizes = {
        Image.open(io.BytesIO(base64.b64decode((a["src"] or "").partition(",")[2]))).size
        for a in page.all("img")
    }
    assert sizes == {(768, 384), (128, 64)}


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = random_result(5)
    with pytest.raises(ReportError, match="is a folder.*HINT.*report.html"):
        result.report(tmp_path)
    with pytest.raises(ReportError, match="cannot be written.*HINT"):
        result.report(tmp_path / "nowhere" / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        result.report(tmp_path / "file" / "report.html")
    monkeypatch.setattr("ctrak_lightning.report.page.os.access", lambda path, mode: False)
    with pytest.raises(ReportError, match="no folder that this user may write to"):
        result.report(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_keeps_the_old_page(tmp_path: Path) -> None:
    random_result(5).report(tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ReportError, match="cannot be written"):
            random_result(6).report(tmp_path / "report.html")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_write_that_fails_leaves_the_old_page_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_result(5).report(tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctrak_lightning.store.files.os.replace", full)
    with pytest.raises(ReportError, match="No space left.*HINT"):
        random_result(6).report(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


def test_prompts_and_names_in_any_language(tmp_path: Path) -> None:
    concept = replace(
        THING, name="フクロウ", present="une chouette à lunettes «\xa0noire\xa0» \udcff", absent=""
    )
    page = page_of(tmp_path, random_result(5, concept=concept))
    assert "フクロウ" in page.text
    assert "une chouette à lunettes « noire » \\udcff" in page.text


def test_the_store_is_not_part_of_a_results_text(asked: list[Attribution]) -> None:
    assert isinstance(asked[0].store, TraceStore)
    assert str(asked[0].store.path) not in repr(asked[0])
