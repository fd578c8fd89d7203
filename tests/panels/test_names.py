"""Tags, letters and the Custom Scalars layout."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from ctrak_lightning.panels.drawing import drawable, font, shortened, wrapped
from ctrak_lightning.panels.tags import TagNames, layout


@given(st.lists(st.text(), max_size=20))
def test_tag_parts_are_safe_and_one_to_one(names: list[str]) -> None:
    tags = TagNames(reserved=["others"])
    parts = {name: tags.of(name) for name in names}
    assert all(re.fullmatch(r"[\w.\-]*", part) for part in parts.values())
    assert len(set(parts.values())) == len(parts)
    assert "others" not in parts.values()
    assert parts == {name: tags.of(name) for name in names}


def test_equal_names_of_several_things_get_parts_of_their_own() -> None:
    assert TagNames().one_each(["a/b", "a b", "a/b", "猫"]) == ["a_b", "a_b_2", "a_b_3", "猫"]
    assert TagNames().of("x" * 500) == "x" * 60


def test_letters_that_the_font_lacks_are_replaced() -> None:
    assert (
        drawable("José Ångström") == "Jose Angstrom" == drawable("Jose\u0301 A\u030angstro\u0308m")
    )
    assert drawable("猫 owl 🦉") == "? owl ?"
    assert drawable("a\n\tb\x00\u202ec") == "a b c"
    assert drawable("Ⅻ ™") == "XII ™"
    assert drawable("~!@#$%^&*()[]{}|\\\"'<>,.?/") == "~!@#$%^&*()[]{}|\\\"'<>,.?/"


@given(st.text(max_size=200), st.integers(20, 300))
def test_no_line_is_wider_than_asked(text: str, width: int) -> None:
    assert font(17).getlength(shortened(text, 17, width)) <= width
    lines = wrapped(text, 17, width, 3)
    assert len(lines) <= 3
    assert all(font(17).getlength(line) <= width for line in lines)


def test_lines_break_between_words_and_keep_all_that_fits() -> None:
    text = "one two three four five six seven"
    lines = wrapped(text, 17, 110, 9)
    assert " ".join(lines) == text
    for line, following in pairwise(lines):
        assert font(17).getlength(f"{line} {following.split()[0]}") > 110
    assert wrapped(text, 17, 110, 2)[-1].endswith("…")
    assert "".join(wrapped("w" * 30, 17, 110, 99)) == "w" * 30


def test_the_font_is_a_real_one() -> None:
    assert isinstance(font(20), ImageFont.FreeTypeFont)


@pytest.mark.parametrize("group", ["owner", None])
def test_each_chart_matches_its_own_tags_only(group: str | None) -> None:
    charts = {
        title: lines[1][0]
        for category in layout({"a.b": "a/b", "axb": "axb"}, group).values()
        for title, lines in category.items()
    }
    tags = [
        *(
            "ctrak/share/a.b/noto",
            "ctrak/share/axb/noto",
            "ctrak/strength/a.b",
            "ctrak/contributors/axb",
        ),
        *("ctrak/trace_norm/q50", "ctrak/seconds/tracer", "ctrak/overhead/monitor", "train_loss"),
    ]
    found = {
        title: [tag for tag in tags if re.match(pattern, tag)] for title, pattern in charts.items()
    }
    expected = {
        "concept strength": ["ctrak/strength/a.b"],
        "effective number of contributors": ["ctrak/contributors/axb"],
        "trace norm, quantiles": ["ctrak/trace_norm/q50"],
        "seconds per checkpoint": ["ctrak/seconds/tracer"],
        "share of the run's time": ["ctrak/overhead/monitor"],
    }
    if group:
        expected |= {
            "a/b: share by owner": ["ctrak/share/a.b/noto"],
            "axb: share by owner": ["ctrak/share/axb/noto"],
        }
    assert found == expected
