"""The page of a report in headless Chromium: what it does, and that it is accessible."""

import shutil
from itertools import product

import numpy as np
import pytest

import spectral_core as sc

pytest.importorskip("jinja2", reason="Jinja2 is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATH = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(PATH is None, reason=f"none of {', '.join(BROWSERS)} is installed")

# No sandbox: root may run the tests. The others keep Chromium from looking for a network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
rng = np.random.default_rng(0)


def with_spectra(report):
    """Give rows a spectrum: all values, an estimated density, or none."""
    for i, row in enumerate(report.values()):
        middles = np.linspace(0.01, 1, 40) * (row.sigma or 0)
        values = np.linspace(row.sigma or 0, 0.01, 300)
        spectrum = (values, {"values": middles, "density": np.exp(-middles)}, None)[i % 3]
        object.__setattr__(row, "spectrum", spectrum if row.sigma else None)
    return report


def small():
    weights = {f"layer.{i}.weight": rng.standard_normal((8, 6)) for i in range(12)}
    weights |= {
        "far": 1e3 * weights["layer.0.weight"],
        "nan": np.array([[np.nan, 1.0]]),
        "zero": np.zeros((3, 3)),
        "</script><script>window.hacked = 1</script>": np.eye(2),
        "<img src=x onerror='window.hacked = 1'>": np.eye(2),
        "long_name." * 90: np.eye(2),
    }
    return sc.report({**weights, "bias": np.ones(3), "conv": rng.standard_normal((4, 3, 3, 3))})


REPORTS = {
    "three": lambda: sc.report({"a": np.eye(2), "b": 2 * np.eye(3), "c": np.ones((2, 3))}),
    "small": small,
    "spectra": lambda: with_spectra(small()),
    "many": lambda: sc.report({f"w.{i}": (1 + i % 7) * np.eye(2) for i in range(260)}),
    "none": lambda: sc.report({"b": np.ones(3)}),
}


@pytest.fixture(scope="module")
def reports():
    return {name: make() for name, make in REPORTS.items()}


@pytest.fixture(scope="module")
def folder(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(report.to_html(), encoding="utf-8", newline="\n")
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, folder):
    """Open a page in a window of its own. It must neither fail nor ask for anything."""
    contexts, problems = [], []

    def open_page(name, *, theme="light", width=1400, **options):
        view = {"width": width, "height": 900}
        context = browser.new_context(color_scheme=theme, viewport=view, **options)
        contexts.append(context)
        page = context.new_page()
        address = (folder / f"{name}.html").as_uri()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: asked.url == address or problems.append(asked.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def column(page, label):
    """Return the texts of a column, as shown."""
    heads = page.locator("thead th").all_inner_texts()
    place = [text.strip(" ↑↓") for text in heads].index(label)
    return page.locator(f"tbody tr > :nth-child({place + 1})").all_inner_texts()


def head(page, label):
    return page.locator("thead th").filter(has=page.get_by_role("button", name=label, exact=True))


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize(
    ("name", "theme", "width"),
    [
        *product(["spectra"], ["light", "dark"], [390, 1400]),
        ("three", "light", 1400),
        ("three", "dark", 390),
        ("none", "light", 390),
        ("none", "dark", 1400),
    ],
)
def test_accessibility(show, name, theme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    page = show(name, theme=theme, width=width)
    for summary in page.locator("summary").all():
        summary.click()
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert len(found.response["passes"]) > 10
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_sort_by_click(show, reports):
    page = show("small")
    assert column(page, "name")[0] == "layer.0.weight"
    head(page, "σ₁").get_by_role("button").click()
    assert head(page, "σ₁").get_attribute("aria-sort") == "descending"
    assert page.locator("[aria-sort]").count() == 1
    shown = column(page, "σ₁")
    assert column(page, "name")[0] == reports["small"].largest
    assert shown[-1] == "–"
    assert sorted(map(float, shown[:-1]), reverse=True) == list(map(float, shown[:-1]))
    head(page, "σ₁").get_by_role("button").click()
    assert head(page, "σ₁").get_attribute("aria-sort") == "ascending"
    assert column(page, "σ₁") == [*shown[-2::-1], "–"]
    assert "by σ₁, ascending" in page.get_by_role("status").inner_text()


def test_sort_by_keyboard(show):
    page = show("small")
    button = head(page, "name").get_by_role("button")
    head(page, "#").get_by_role("button").focus()
    page.keyboard.press("Tab")
    assert button.evaluate("node => node === document.activeElement")
    assert button.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    names = [name for name in column(page, "name") if name.startswith("layer")]
    assert names == [f"layer.{i}.weight" for i in range(12)]  # 10 after 9
    page.keyboard.press("Space")
    assert head(page, "name").get_attribute("aria-sort") == "descending"
    assert [x for x in column(page, "name") if x.startswith("layer")] == names[::-1]


def test_search(show):
    page = show("small")
    box = page.get_by_role("searchbox", name="Search")
    box.fill("LAYER .1")
    assert column(page, "name") == [f"layer.{i}.weight" for i in (1, 10, 11)]
    assert page.get_by_role("status").inner_text() == "3 of 19 matrices"
    page.locator("#depth .dots.dim").first.wait_for(state="attached")
    plot = page.locator("#depth svg").bounding_box()
    page.mouse.move(plot["x"] + 60, plot["y"] + plot["height"] / 2)  # above layer.0
    assert "layer.1.weight" in page.locator("#depth .tip").inner_text()
    box.fill("outlier")
    assert "far" in column(page, "name")
    box.fill("nothing like it")
    assert column(page, "name") == []
    box.fill("")
    assert len(column(page, "name")) == 19


def test_pointer_on_the_plot(show, reports):
    page = show("small")
    svg = page.locator("#depth svg")
    box = svg.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
    first = next(iter(reports["small"].values()))
    tip = page.locator("#depth .tip")
    assert first.name in tip.inner_text()
    assert f"σ₁ {first.sigma:.5g}" in tip.inner_text()
    page.mouse.click(box["x"] + 60, box["y"] + box["height"] / 2)
    assert page.locator("#chosen-name").inner_text() == first.name
    page.mouse.move(box["x"], box["y"] + box["height"] + 200)
    assert not tip.is_visible()


def test_keyboard_on_the_plot(show, reports):
    page = show("small")
    slider = page.get_by_role("slider", name="Matrix in file order")
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    second = list(reports["small"].values())[1]
    spoken = slider.get_attribute("aria-valuetext")
    assert spoken.startswith(f"{second.name}, σ₁ {second.sigma:.5g}")
    assert second.name in page.locator("#depth .tip").inner_text()
    assert page.locator("#chosen-name").inner_text() == second.name
    page.keyboard.press("Escape")
    assert not page.locator("#depth .tip").is_visible()


def test_the_plot_has_a_text(show, reports):
    page = show("small")
    text = page.locator("#depth-caption").inner_text()
    assert f"to {reports['small'].sigma['far']:.5g} (far)" in text
    assert page.get_by_role("img").get_attribute("aria-labelledby") == "depth-caption"
    page.get_by_label("Plot").select_option("‖W‖")
    assert page.locator("#depth-caption").inner_text().startswith("‖W‖ of 18 matrices")


def test_from_the_plot_to_the_row(show):
    page = show("many")
    page.get_by_role("searchbox").fill("w.7")
    page.get_by_role("slider").focus()
    page.keyboard.press("End")
    page.get_by_role("button", name="Show in the table").click()
    assert page.evaluate("document.activeElement.cells[1].textContent") == "w.259"
    assert page.locator("tr[aria-current=true] th").inner_text() == "w.259"
    assert page.get_by_role("searchbox").input_value() == ""
    page.locator("tbody tr").nth(3).click()
    assert page.locator("#chosen-name").inner_text() == "w.3"


def test_many_rows_are_shown_in_parts(show):
    page = show("many")
    assert len(column(page, "name")) == 100
    page.get_by_role("button", name="Show more").click()
    assert len(column(page, "name")) == 200
    page.get_by_role("button", name="Show all").click()
    assert len(column(page, "name")) == 260
    assert not page.locator("#rest").is_visible()
    head(page, "σ₁").get_by_role("button").click()
    assert {float(x) for x in column(page, "σ₁")} == {5, 6, 7}  # of all rows, not of the shown


def test_theme(show):
    page = show("three")
    light = background(page)
    page.get_by_label("Theme").select_option("dark")
    assert background(page) != light
    page.reload()
    assert background(page) != light
    page.get_by_label("Theme").select_option("system")
    assert background(page) == light
    assert background(show("three", theme="dark")) != light


def test_spectra(show, reports):
    page = show("spectra")
    slider = page.get_by_role("slider", name="Matrix in file order")
    place = page.get_by_role("slider", name="Place in the spectrum")
    slider.focus()
    page.keyboard.press("Home")
    assert "300 singular values" in page.locator("#spectrum-caption").inner_text()
    sigma = reports["spectra"]["layer.0.weight"].sigma
    assert place.get_attribute("aria-valuetext") == f"σ {sigma:.4g}, number 1 of 300"
    place.focus()
    page.keyboard.press("End")
    assert place.get_attribute("aria-valuetext") == "σ 0.01, number 300 of 300"
    assert "σ 0.01" in page.locator("#spectrum .tip").inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert "Estimated density" in page.locator("#spectrum-caption").inner_text()
    page.keyboard.press("ArrowRight")
    assert not page.locator("#spectrum").is_visible()
    assert not show("small").locator("#spectrum-section").is_visible()


def test_hostile_names_do_nothing(show):
    page = show("small")
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(19):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None
    assert "<img src=x onerror='window.hacked = 1'>" in column(page, "name")


def test_the_policy_stops_what_is_not_ours(browser, folder):
    """Even a script that stood in the page would not run."""
    text = (folder / "three.html").read_text(encoding="utf-8")
    bad = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    (folder / "bad.html").write_text(text.replace("<main>", f"<main>{bad}"), encoding="utf-8")
    page = browser.new_page()
    page.goto((folder / "bad.html").as_uri())
    assert page.evaluate("window.hacked") is None
    assert page.locator("#chosen-name").inner_text() == "c"  # ours ran
    page.close()


def test_without_javascript(show, reports):
    page = show("many", java_script_enabled=False)
    assert len(column(page, "name")) == len(reports["many"])
    assert page.locator("noscript").count() == 1
    assert not page.get_by_role("button").count()
    assert not page.locator("#search").is_visible()
