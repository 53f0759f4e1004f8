"""The report in a real browser: it draws, sorts, answers keys and the dark, and asks the network for nothing."""

import math
import os
import shutil

import pytest

from surefoot.lab.report.figures import figures
from surefoot.lab.report.html import write_report
from surefoot.lab.stats import analyse

pytestmark = pytest.mark.browser

INF = math.inf
LABELS = ["sgd", "adam[window=600]", "<b>bold</b>", "srprop[etas=0.7375:1.2,window=600]", "lost", *"fghijkl"]
LONG = "adam-upd[batch=5,rate=0.001,window=3000,etas=0.5:1.2,step_sizes=1e-10:1]"


def by_seed(*losses):
    return dict(enumerate(losses))


@pytest.fixture(scope="module")
def study(make_study):
    """Twelve methods over three rates; numbers that sort otherwise as text; one method that always diverged."""
    losses = {
        label: {r: by_seed(i, i + 0.3, i + 0.1) for r in (1e-3, 1e-2)} for i, label in enumerate(LABELS, 1)
    }
    losses["sgd"] = {
        1e-3: by_seed(10.0, 10.5, 10.1),
        1e-2: by_seed(9.5, 9.9, 9.6),
        1e-1: by_seed(INF, 20.0, 20.0),
    }
    losses["lost"] = {1e-3: by_seed(INF, 1.0, 1.0), 1e-2: by_seed(INF, INF, INF)}
    return make_study(losses)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on the PATH")
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    return write_report(study, tmp_path_factory.mktemp("report") / "report.html").as_uri()


@pytest.fixture
def open_report(browser, report):
    """Opens the report; at the end of the test nothing may have been said on the console or asked of the network."""
    complaints, requests, pages = [], [], []

    def open_(width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report)
        page.wait_for_selector("html[data-drawn]", state="attached")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert complaints == []
    assert requests == [report] * len(pages)


def column(page, title, table="#summary"):
    """The cells of a column from top to bottom, as read (first line)."""
    titles = page.locator(f"{table} thead th").all_inner_texts()
    index = next(i for i, text in enumerate(titles) if text.startswith(title))
    return page.eval_on_selector_all(
        f"{table} tbody tr", "(rows, i) => rows.map(row => row.cells[i].innerText.split('\\n')[0])", index
    )


def header(page, title, table="#summary"):
    return page.locator(f"{table} thead th").filter(has_text=title)


def test_every_plot_is_drawn_with_every_trace(open_report, study):
    page = open_report()
    expected = {figure.id: len(figure.plot["data"]) for figure in figures(study, analyse(study))}
    assert set(expected) == {"train-loss", "validation-loss", "metric", "sensitivity", "rates"}
    for name, traces in expected.items():
        plot = page.locator(f"#{name}")
        assert plot.locator(".scatterlayer .trace").count() == traces >= len(LABELS)
        box = plot.locator(".main-svg").first.bounding_box()
        assert box["width"] > 400
        assert box["height"] > 250
        drawn = plot.locator(".scatterlayer .js-line, .scatterlayer .point").evaluate_all(
            "marks => marks.filter(mark => mark.getBBox().width + mark.getBBox().height > 0).length"
        )
        assert drawn >= len(LABELS)


def test_labels_are_shown_as_they_are(open_report):
    page = open_report()
    assert column(page, "optimizer")[:1] == ["adam[window=600]"]
    assert "<b>bold</b>" in column(page, "optimizer")
    assert page.locator(".key b").count() == 0


def test_a_click_sorts_numbers_as_numbers_both_ways(open_report):
    page = open_report()
    losses = [
        "2.13",
        "3.13",
        "4.13",
        "6.13",
        "7.13",
        "8.13",
        "9.13",
        "9.67",
        "10.13",
        "11.13",
        "12.13",
        "diverged",
    ]
    assert column(page, "final validation loss") == losses  # best first from the start
    assert header(page, "final validation loss").get_attribute("aria-sort") == "ascending"
    header(page, "final validation loss").get_by_role("button").click()
    assert column(page, "final validation loss") == losses[::-1]
    assert header(page, "final validation loss").get_attribute("aria-sort") == "descending"
    header(page, "optimizer").get_by_role("button").click()
    assert column(page, "optimizer") != LABELS
    assert sorted(column(page, "optimizer")) == sorted(LABELS)
    assert column(page, "optimizer")[-2:] == ["sgd", "srprop[etas=0.7375:1.2,window=600]"]
    assert header(page, "final validation loss").get_attribute("aria-sort") == "none"


def test_what_has_no_value_stays_last(open_report):
    page = open_report()
    for _ in range(2):
        header(page, "final accuracy").get_by_role("button").click()
        assert column(page, "final accuracy")[-1] == "–"
        assert column(page, "optimizer")[-1] == "lost"


def test_the_keyboard_sorts_too(open_report):
    page = open_report()
    header(page, "lead of the first", "#pairs").get_by_role("button").focus()
    page.keyboard.press("Enter")
    leads = [float(text) for text in column(page, "lead of the first", "#pairs") if text != "–"]
    assert leads == sorted(leads)
    assert len(leads) == 55
    page.keyboard.press("Space")
    assert header(page, "lead of the first", "#pairs").get_attribute("aria-sort") == "descending"


def test_the_key_hides_a_method_in_every_plot(open_report):
    page = open_report()
    shown = "ids => ids.map(id => document.getElementById(id).data.filter(t => t.meta === 1 && t.visible !== false).length)"
    ids = ["train-loss", "validation-loss", "metric", "sensitivity", "rates"]
    assert min(page.evaluate(shown, ids)) > 0
    button = page.locator(".key button").nth(1)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    page.wait_for_function(f"ids => Math.max(...({shown})(ids)) === 0", arg=ids)
    button.click()
    page.wait_for_function(f"ids => Math.min(...({shown})(ids)) > 0", arg=ids)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_never_scrolls_sideways(open_report, width):
    page = open_report(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    "losses",
    [
        {
            LONG: {1e-3: by_seed(INF, 0.1)},
            "sgd": {1e-3: by_seed(0.3, 0.31)},
        },  # long in the headline and a note
        {LONG: {1e-3: by_seed(0.2)}, "sgd": {1e-3: by_seed(0.3)}},
        {LONG: {}, "sgd": {}},  # nothing to draw
    ],
)
def test_a_page_of_another_study_complains_of_nothing_and_never_scrolls_sideways(
    browser, make_study, tmp_path, losses
):
    complaints = []
    page = browser.new_page(viewport={"width": 480, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(write_report(make_study(losses, seeds=[0, 1]), tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 480
    assert page.locator(".plot").count() == page.locator(".plot .main-svg:first-child").count()
    assert (page.locator(".plot").count() == 0) is (page.locator(".key").count() == 0)
    page.close()
    assert complaints == []


def test_the_plots_follow_the_dark(open_report):
    page = open_report(color_scheme="light")
    colour = "document.getElementById('rates').layout.paper_bgcolor"
    assert page.evaluate(colour) == "#fff"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => {colour} !== '#fff'")
