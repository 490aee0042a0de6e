"""The page in headless Chromium: no error, no overflow, accessible, and its parts work by mouse and keyboard.

Needs the extra `browser` and Debian's package `chromium`; run by `make test-report`, skipped without them.
"""

import dataclasses
import shutil

import pytest

from anyexperts_jax.report.page import render
from anyexperts_jax.report.sections import sections
from report import made_up

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
base = pytest.importorskip("axe_playwright_python.base", reason="needs the extra `browser`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VIEWS = [(360, 740, "light"), (360, 740, "dark"), (1440, 900, "light"), (1440, 900, "dark")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


def written(source, folder):
    folder.mkdir()
    path = folder / "index.html"
    path.write_text(render(source, sections(source, folder)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of each page by name: of a whole run, of one that just began, and of one with static top-k."""
    root = tmp_path_factory.mktemp("runs")
    whole = made_up.source(root / "whole")
    begun = dataclasses.replace(
        whole, records=[], evaluation=None, step=None, no_checkpoint="no checkpoint in it", routing=None, followed={}
    )
    static = dataclasses.replace(whole, config=made_up.static(whole.config), separations=(), evaluation=None)
    found = {"whole": whole, "begun": begun, "static": static}
    return {name: written(source, root / f"page_{name}") for name, source in found.items()}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page; fails at the end of the test if the page wrote anything to the console or fetched anything."""
    contexts, said = [], []

    def open_page(address, width=1440, height=900, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        context.set_default_timeout(120_000)  # a busy machine is no fault of the page
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else 0,
        )
        page.goto(address)
        if options.get("java_script_enabled", True) and page.locator("#follow-data").count():
            page.wait_for_selector("#follow-here tbody tr")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def require_fits(page):
    wide, there = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= there, f"the page is {wide} pixels wide where {there} are there"


def require_accessible(page):
    page.evaluate(base.AXE_FILE_PATH.read_text())
    found = page.evaluate("axe.run()")
    assert found["passes"], "axe ran"
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []


@pytest.mark.parametrize("name", ["whole", "begun", "static"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: f"{view[0]}-{view[2]}")
def test_a_page_fits_and_is_accessible(open_page, pages, name, view):
    page = open_page(pages[name], *view)
    require_fits(page)
    require_accessible(page)


def test_the_first_screen_of_a_phone_says_how_the_run_did(open_page, pages):
    page = open_page(pages["whole"], 360, 740)
    table = page.locator("table.scores").bounding_box()
    assert table["y"] + table["height"] <= 740
    assert "7 of 8" in page.locator("dl.tiles").inner_text()


@pytest.mark.parametrize("width", [360, 1440])
def test_every_question_shows_all_its_tokens(open_page, pages, width):
    page = open_page(pages["whole"], width)
    for number, (domain, (item,)) in enumerate(made_up.items().items()):
        page.select_option("#follow-question", str(number))
        length = len(made_up.followed(domain, item).sequence.tokens_T)
        page.wait_for_function("most => document.getElementById('follow-token').max === most", arg=str(length - 1))
        media = page.evaluate("document.querySelectorAll('.sequence canvas').length")
        assert media == {"general": 2, "video": 4, "speech": 1, "chat": 5, "text": 0}[domain]
        require_fits(page)
    require_accessible(page)


def rows_of(page):
    return [row.inner_text().split() for row in page.locator("#follow-here tbody tr").all()]


def test_the_keyboard_goes_token_by_token(open_page, pages):
    page = open_page(pages["whole"])
    (item,) = made_up.items()["general"]
    routing = made_up.followed("general", item).routing
    slider = page.locator("#follow-token")
    slider.focus()
    page.keyboard.press("Home")
    for token in range(4):
        label = page.locator("label[for=follow-token]").inner_text()
        assert label.startswith(f"Token {token} of "), label
        for layer, words in enumerate(rows_of(page)):
            assert words[0] == str(layer)
            assert float(words[1]) == pytest.approx(float(routing.importance_LBT[layer, 0, token]), abs=0.006)
            shown = {
                int(words[i - 1]): float(words[i + 1])
                for i, word in enumerate(words)
                if word == "·" and words[i + 1] != "no"
            }
            assert set(routing.experts(layer, 0, token)) <= set(shown)
        page.keyboard.press("ArrowRight")
    assert "patch, row 0, column 3" in slider.get_attribute("aria-valuetext")


def test_an_expert_of_a_token_is_picked_and_its_tokens_are_underlined(open_page, pages):
    page = open_page(pages["whole"])
    page.select_option("#follow-question", "4")
    page.wait_for_function("document.querySelectorAll('.sequence canvas').length === 0")
    page.locator(".tokens span").nth(5).click()
    chip = page.locator("#follow-here tbody tr").nth(1).locator("button").first
    expert = chip.inner_text().split()[0]
    chip.focus()
    page.keyboard.press("Enter")
    assert page.locator("#follow-layer").input_value() == "1"
    assert page.locator("#follow-expert").input_value() == expert
    (item,) = made_up.items()["text"]
    routing = made_up.followed("text", item).routing
    length = routing.valid_BT.shape[1]
    expected = [t for t in range(length) if int(expert) in routing.experts(1, 0, t)]
    classes = page.evaluate("[...document.querySelectorAll('.tokens span')].map((span) => span.className)")
    hit = [token for token, names in enumerate(classes) if "hit" in names]
    assert hit == expected
    require_accessible(page)


def test_a_patch_is_picked_by_clicking_it(open_page, pages):
    page = open_page(pages["whole"])
    canvas = page.locator(".sequence canvas").nth(1)
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 3.5 / 6, "y": box["height"] * 1.5 / 6})
    assert "row 1, column 3" in page.locator("label[for=follow-token]").inner_text()


@pytest.mark.parametrize("width", [360, 1440])
def test_pictures_enlarge_and_close_by_keyboard(open_page, pages, width):
    page = open_page(pages["whole"], width)
    button = page.locator("button.enlarge").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog").is_visible()
    shown = page.evaluate("(i => [i.clientWidth, i.naturalWidth])(document.querySelector('dialog img'))")
    assert shown[0] == shown[1] > 1000
    require_accessible(page)
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    require_fits(page)


def test_without_scripts_the_page_says_what_is_missing(open_page, pages):
    page = open_page(pages["whole"], 360, 740, java_script_enabled=False)
    assert "needs JavaScript" in page.locator("#follow").inner_text()
    assert "Conversations and documents (chat, text)" in page.locator("#maps").inner_text()
    assert page.locator("figure img").count() >= 7
