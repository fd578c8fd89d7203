"""The page in a real browser, from disk: filter, sort, enlarge, keyboard, print, dark mode, 5,000
rows, hostile texts."""

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrak_lightning.report import write_report
from ctrak_lightning.report.content import PICTURED_BEST

from .reporting import HOSTILE, INK, hostile_result, random_result, result_of, table_of

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

Browser = Any
WIDTHS = {"narrow": 400, "wide": 1280}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Smooth scrolling would move what is clicked.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1000",
        "--force-prefers-reduced-motion",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Browser:
    """A page of 60 images and two concepts."""
    results = [random_result(60), random_result(60, seed=1, concept=INK)]
    write_report(tmp_path / "page.html", results)
    show(browser, tmp_path / "page.html")
    yield browser
    assert browser.get_log("browser") == []


def show(browser: Browser, path: Path) -> None:
    browser.get_log("browser")
    browser.get(path.as_uri())


def one(where: Browser, css: str) -> Any:
    return where.find_element(By.CSS_SELECTOR, css)


def rows(section: Any) -> list[list[str]]:
    """Rank, sample, owner, licence and score of the rows of a section's table."""
    read: list[list[str]] = section.parent.execute_script(
        "return [...arguments[0].querySelectorAll('.ranking tbody tr')].map((tr) => "
        "[...tr.cells].map((td) => td.textContent))",
        section,
    )
    return [[row[0], *row[2:5], row[-1]] for row in read]


def section_of(browser: Browser, number: int = 1) -> Any:
    return one(browser, f"#concept-{number}")


def status(section: Any) -> str:
    text: str = one(section, "[data-part=status]").text
    return text


def test_rows_are_the_ranking_in_pages(opened: Browser) -> None:
    result, section = random_result(60), section_of(opened)
    expected = [
        [str(r.rank), r.sample_id, r.metadata["owner"], r.metadata["licence"], f"{r.score:.2f}"]
        for r in result.top(60)
    ]
    seen = rows(section)
    assert len(seen) == 25
    assert not one(section, "[data-action=previous]").is_enabled()
    for _ in range(2):
        one(section, "[data-action=next]").click()
        seen += rows(section)
    assert [[a.replace("-0.00", "0.00") for a in row] for row in seen] == [
        [a.replace("-0.00", "0.00") for a in row] for row in expected
    ]
    assert status(section) == "Rows 51 to 60 of 60."
    assert not one(section, "[data-action=next]").is_enabled()
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert status(section) == "Rows 26 to 50 of 60."


def test_filters_by_owner_licence_and_text(opened: Browser) -> None:
    section = section_of(opened)
    owner, licence = (
        Select(one(section, f"[data-filter={name}]")) for name in ("group", "licence")
    )
    assert [option.text for option in owner.options] == ["all", *(f"owner {c} (20)" for c in "ABC")]
    owner.select_by_visible_text("owner B (20)")
    assert {row[2] for row in rows(section)} == {"owner B"}
    assert status(section) == "Rows 1 to 20 of 20 that fit, of 60 in all."
    licence.select_by_visible_text("MIT (30)")
    assert {(row[2], row[3]) for row in rows(section)} == {("owner B", "MIT")}
    one(section, "[data-action=clear]").click()
    assert len(rows(section)) == 25
    assert opened.switch_to.active_element.get_attribute("data-filter") == "text"
    opened.switch_to.active_element.send_keys("CAPTION OF 17")
    assert [row[1] for row in rows(section)] == ["img-00017"]
    opened.switch_to.active_element.send_keys(" nothing")
    assert rows(section) == []
    assert status(section) == "None of 60 images fits."
    # The other concept's table is its own.
    assert len(rows(section_of(opened, 2))) == 25


def test_sorts_both_ways(opened: Browser) -> None:
    section = section_of(opened)

    def press(key: str) -> list[list[str]]:
        button = one(section, f"[data-sort={key}]")
        button.send_keys(Keys.ENTER)
        return rows(section)

    assert [row[1] for row in press("id")] == [f"img-{i:05d}" for i in range(25)]
    assert one(section, "th[aria-sort]").text.startswith("Sample")
    assert [row[1] for row in press("id")] == [f"img-{i:05d}" for i in range(59, 34, -1)]
    assert one(section, "th[aria-sort=descending]").text.startswith("Sample")
    assert [row[2] for row in press("group")][:21] == ["owner A"] * 20 + ["owner B"]
    scores = [float(row[4]) for row in press("score")]
    assert scores == sorted(scores, reverse=True)
    scores = [float(row[4]) for row in press("score")]
    assert scores == sorted(scores)
    assert [row[0] for row in press("rank")] == [str(i) for i in range(1, 26)]


def test_enlarges_by_click_and_by_key_and_gives_the_focus_back(opened: Browser) -> None:
    result = random_result(60)
    top = result.top(3)
    dialog = one(opened, "dialog")
    card = one(opened, "#concept-1 .proponents [data-row='1']")
    assert not dialog.is_displayed()
    card.click()
    assert one(dialog, "h2").text == top[1].sample_id
    assert f"{top[1].score:.4f}" in dialog.text
    assert top[1].metadata["caption"] in dialog.text
    link = one(dialog, "a")
    assert link.get_attribute("href") == top[1].metadata["uri"]
    assert link.get_attribute("rel") == "noreferrer noopener"
    position = result.samples.sample_ids.index(top[1].sample_id)
    assert f"step 200: {float(result.timeline()[1, position]):.2f}" in dialog.text
    assert result.parts is not None
    assert f"t = 900: {float(result.parts.by_timestep[1, position]):.2f}" in dialog.text
    assert (
        f"cross-attention: {float(result.parts.by_layer_group['cross-attention'][position]):.2f}"
        in dialog.text
    )
    image = one(dialog, "img")
    assert image.size["width"] > 3 * card.size["width"] / 2
    assert image.get_attribute("naturalWidth") == "4"
    one(dialog, "[data-action=worse]").click()
    assert one(dialog, "h2").text == top[2].sample_id
    one(dialog, "[data-action=better]").click()
    one(dialog, "[data-action=better]").click()
    assert one(dialog, "h2").text == top[0].sample_id
    assert not one(dialog, "[data-action=better]").is_enabled()
    assert opened.switch_to.active_element == one(dialog, "[data-action=worse]")
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert opened.switch_to.active_element == card

    opener = one(opened, "#concept-1 .ranking tbody tr:nth-child(3) button")
    opener.send_keys(Keys.ENTER)
    assert one(dialog, "h2").text == top[2].sample_id
    one(dialog, "[data-action=close]").click()
    assert not dialog.is_displayed()
    one(opened, "#generated").send_keys(Keys.ENTER)
    assert one(dialog, "h2").text.startswith("The generated image. Look at it first")
    assert not one(dialog, "[data-action=better]").is_displayed()


def test_the_second_concepts_cards_enlarge_its_own_ranking(opened: Browser) -> None:
    one(opened, "#concept-2 .opponents [data-row='59']").click()
    last = random_result(60, seed=1).top(60)[-1]
    assert one(opened, "dialog h2").text == last.sample_id
    assert f"{last.score:.4f}" in one(opened, "dialog").text


def test_the_keyboard_reaches_everything_and_the_focus_is_seen(opened: Browser) -> None:
    body = one(opened, "body")
    body.send_keys(Keys.TAB)
    skip = opened.switch_to.active_element
    assert skip.text == "Skip to the report"
    assert skip.rect["x"] >= 0
    skip.send_keys(Keys.ENTER)
    seen = set()
    for _ in range(90):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        active = opened.switch_to.active_element
        seen.add(
            active.get_attribute("data-filter")
            or active.get_attribute("data-sort")
            or active.get_attribute("data-row")
            or active.get_attribute("id")
        )
        if active.tag_name == "button":
            assert opened.execute_script(
                "return getComputedStyle(document.activeElement).outlineStyle"
            ) not in ("", "none")
    assert {"generated", "0", "text", "group", "licence", "rank", "score"} <= seen


def test_hostile_texts_are_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    hostile_result().report(tmp_path / "hostile.html")
    show(browser, tmp_path / "hostile.html")
    section = section_of(browser)
    assert {row[1] for row in rows(section)} == set(HOSTILE)
    assert {row[2] for row in rows(section)} == set(HOSTILE)
    for name in ("group", "licence"):
        options = [option.text for option in Select(one(section, f"[data-filter={name}]")).options]
        assert len(options) == 1 + len(HOSTILE)
    for opener in browser.find_elements(By.CSS_SELECTOR, "#concept-1 .ranking tbody button"):
        browser.execute_script("arguments[0].click()", opener)
        browser.execute_script("document.querySelector('dialog').close()")
    for text in HOSTILE[:4]:
        box = one(section, "[data-filter=text]")
        box.clear()
        box.send_keys(text)
        assert text in [row[1] for row in rows(section)]
    links = browser.execute_script(
        "return [...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))"
    )
    assert {link for link in links if not link.startswith("#")} == {
        "https://example.org/ok?a=1&b=2#c"
    }
    assert browser.execute_script("return window.hit") is None
    assert browser.execute_script("return document.scripts.length") == 2
    assert (
        browser.execute_script(
            "return document.querySelectorAll('[onerror],[onmouseover],base').length"
        )
        == 0
    )
    # An alert would have failed the calls above; a refused script or style would be in the log.
    assert browser.get_log("browser") == []


def test_the_policy_stops_a_script_that_got_in(browser: Browser, tmp_path: Path) -> None:
    random_result(5).report(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    planted = (
        "<script>window.hit = 1</script><img src='https://example.org/x.png' "
        "onerror='window.hit = 2'>"
    )
    (tmp_path / "page.html").write_text(
        text.replace("<main", f"{planted}<main", 1), encoding="utf-8"
    )
    show(browser, tmp_path / "page.html")
    assert browser.execute_script("return window.hit") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) >= 2


def test_five_thousand_rows_stay_usable(browser: Browser, tmp_path: Path) -> None:
    n = 5000
    table = table_of(
        n,
        owner=[f"owner {i % 700}" for i in range(n)],
        licence=["CC0"] * n,
        caption=[f"caption of {i}" for i in range(n)],
    )
    scores = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    write_report(tmp_path / "large.html", result_of(scores, table))
    assert (tmp_path / "large.html").stat().st_size < 2_000_000
    begun = time.monotonic()
    show(browser, tmp_path / "large.html")
    section = section_of(browser)
    assert status(section) == "Rows 1 to 25 of 5,000."
    assert time.monotonic() - begun < 15
    took = browser.execute_script(
        """const box = document.querySelector("[data-filter=text]"), begun = performance.now();
        box.value = "caption of 4999"; box.dispatchEvent(new Event("input"));
        document.querySelector("[data-sort=caption]").click();
        return performance.now() - begun;"""
    )
    assert [row[1] for row in rows(section)] == ["img-04999"]
    assert took < 3000
    assert browser.execute_script("return document.querySelectorAll('*').length") < 3000
    assert browser.execute_script("return document.querySelectorAll('.ranking img').length") <= 25
    one(section, "[data-action=clear]").click()
    one(section, "[data-sort=rank]").click()
    for _ in range(PICTURED_BEST // 25):
        one(section, "[data-action=next]").click()
    assert one(section, ".ranking tbody tr:first-child").text.startswith(str(PICTURED_BEST + 1))
    one(section, ".ranking tbody tr:first-child button").click()
    assert "This page holds no picture of it" in one(browser, "dialog").text


def media(browser: Browser, **features: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {
            "media": features.pop("media", ""),
            "features": [
                {"name": name.replace("_", "-"), "value": v} for name, v in features.items()
            ],
        },
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(opened: Browser, scheme: str) -> None:
    """WCAG 2.2 AA, 4.5 to 1 (3 to 1 for lines and bars), for every element that has text of its
    own."""
    media(opened, prefers_color_scheme=scheme)
    poor = opened.execute_script(
        """
        const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
          .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
          if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
        const found = [];
        for (const e of document.querySelectorAll("body *")) {
          if (e.closest("script, style, [disabled], option, dialog:not([open]), noscript")) continue;
          const style = getComputedStyle(e);
          const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
          const inSvg = e.namespaceURI.endsWith("svg");
          if (own) found.push([ratio(parse(inSvg ? style.fill : style.color), behind(e)), 4.5, e.outerHTML.slice(0, 80)]);
          else if (e.tagName === "polyline") found.push([ratio(parse(style.stroke), behind(e)), 3, e.outerHTML.slice(0, 80)]);
          else if (e.matches(".fill, .interval, .zero")) {
            const paint = e.matches(".zero") ? style.stroke : style.fill;
            found.push([ratio(parse(paint), behind(e)), 3, e.outerHTML.slice(0, 80)]);
          }
        }
        if (found.length < 200) throw new Error(`only ${found.length} looked at`);
        return found.filter(([has, needs]) => has < needs);
        """
    )
    media(opened)
    assert poor == []


def test_dark_and_light_differ(opened: Browser) -> None:
    colours = []
    for scheme in ("light", "dark"):
        media(opened, prefers_color_scheme=scheme)
        colours.append(
            opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
    media(opened)
    assert colours == ["rgb(255, 255, 255)", "rgb(17, 22, 27)"]


def test_prints_light_without_controls_and_with_the_numbers(opened: Browser) -> None:
    media(opened, media="print", prefers_color_scheme="dark")
    assert (
        opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    for css in (".controls", ".pager", "nav", ".status"):
        assert not one(opened, css).is_displayed(), css
    for css in (".cards", ".ranking", ".provenance, .notice", ".chart"):
        assert one(opened, css).is_displayed(), css
    opened.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert one(opened, ".numbers").is_displayed()
    media(opened)
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF-")
    assert 4 <= pdf.count(b"/Type /Page\n") <= 20 or 4 <= pdf.count(b"/Type /Page ") <= 20


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_no_width_scrolls_sideways(opened: Browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_scripts_the_rest_is_there(browser: Browser, tmp_path: Path) -> None:
    random_result(20).report(tmp_path / "page.html")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, tmp_path / "page.html")
        text = one(browser, "body").text
        assert "Scripts are off" in text
        assert random_result(20).top(1)[0].sample_id in text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
