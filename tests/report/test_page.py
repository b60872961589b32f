import os
import re
import stat
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import numpy as np
import pytest

import spectral_core as sc
from spectral_core._report import command, matrix
from spectral_core._report.command import main

rng = np.random.default_rng(0)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}",
    "a\x00b\nc\u202ed\ud800",
    "$x_{$",
    "&lt;b&gt;",
    "long." * 200,
]


class Page(HTMLParser):
    """The tags of a page, its texts by tag, and the cells of its table."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.lines = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.texts.append("")
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data
        if self.lines and self.lines[-1] and self.tags[-1] in ("td", "th", "span"):
            self.lines[-1][-1] += data.strip("\n")

    def all(self, tag):
        return [text for name, text in zip(self.tags, self.texts, strict=True) if name == tag]


@pytest.fixture
def jinja():
    return pytest.importorskip("jinja2", reason="Jinja2 is not installed")


@pytest.fixture
def report():
    weights = {name: rng.standard_normal((4, 3)) for name in HOSTILE}
    weights |= {"nan": np.array([[np.nan, 1.0]]), "zero": np.zeros((2, 2)), "b": np.ones(2)}
    return sc.report({**weights, "conv": rng.standard_normal((4, 3, 3, 3))})


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.eye(3), b=np.ones((2, 4)))
    return tmp_path / "w.npz"


def printable(name):
    return "".join(c if c.isprintable() else "�" for c in name)


@pytest.mark.usefixtures("jinja")
def test_hostile_names_are_texts(report):
    plain = Page(sc.report({"w": np.eye(2), "nan": np.array([[np.nan]])}).to_html())
    page = Page(report.to_html())
    assert set(page.tags) <= set(plain.tags) | {"li", "ul"}
    assert page.tags.count("script") == plain.tags.count("script") == 3
    names = [line[1] for line in page.lines[1:]]
    assert names == [printable(name) for name in report]
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    report.to_html().encode()  # no lone surrogate


@pytest.mark.usefixtures("jinja")
def test_the_table_has_the_cells_of_the_report(report):
    head, *lines = Page(report.to_html()).lines
    columns = dict(zip(report.columns, zip(*report.cells(), strict=True), strict=True))
    for label, found in zip(head, zip(*lines, strict=True), strict=True):
        if label in columns and label != "name":
            assert found == columns[label], label
    assert {"#", "name", "σ₁", "interval", "notes", "shape", "conv"} <= set(head)
    assert "dtype" not in head  # of all the same: the summary has it


@pytest.mark.usefixtures("jinja")
def test_what_says_nothing_is_left_out():
    head, *_ = Page(sc.report({"a": np.eye(2), "b": np.eye(3)}).to_html()).lines
    assert not {"shape", "dtype", "conv", "notes"} & set(head)


@pytest.mark.usefixtures("jinja")
def test_the_policy_admits_our_style_and_scripts_alone(report):
    text = report.to_html()
    page = Page(text)
    (policy,) = [value for key, value in page.attributes if "default-src" in str(value)]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    own = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.DOTALL)
    assert len(own) == 3
    assert sorted(allowed) == sorted(b64encode(sha256(x.encode()).digest()).decode() for x in own)


@pytest.mark.usefixtures("jinja")
def test_the_page_names_no_address(report):
    text = report.to_html().replace("http://www.w3.org/2000/svg", "")  # a name, never loaded
    assert "http:" not in text
    assert "https:" not in text


@pytest.mark.usefixtures("jinja")
def test_equal_reports_give_equal_pages(report):
    assert report.to_html() == report.to_html()


@pytest.mark.usefixtures("jinja")
def test_a_report_without_matrices_has_a_page():
    page = Page(sc.report({"b": np.ones(3)}).to_html())
    assert "table" not in page.tags
    assert "Skipped: " not in page.texts


@pytest.mark.usefixtures("jinja")
def test_the_page_has_the_heads():
    weights = {f"attn.{x}_proj.weight": rng.standard_normal((4, 4)) for x in "qkvo"}
    report = sc.report(weights, heads=2)
    page = Page(report.to_html())
    assert "Heads of attention (6)" in page.texts
    lines = [line for line in report.footer() if "2 heads: σ₁ from" in line]
    assert len(lines) == 6
    assert set(lines) <= {text.strip() for text in page.texts}


@pytest.mark.usefixtures("jinja")
def test_lists_are_bounded():
    weights = {f"w{i}": np.eye(2) for i in range(3)}
    report = sc.report(weights)
    report.skipped.update({f"b{i}": "common" for i in range(1000)})
    report.skipped.update({f"c{i}": f"the same tensor as b{i}" for i in range(1000)})
    page = Page(report.to_html())
    assert page.tags.count("li") == 2 * 201
    assert any("and 800 more" in text for text in page.all("li"))


@pytest.mark.usefixtures("jinja")
def test_spectra_are_thinned(monkeypatch):
    from spectral_core._report.page import _spectra

    exact = np.linspace(900, 1, 900)
    weights = {"a": np.diag(exact), "b": np.full((2, 2), np.nan), "c": np.diag([1.0, 2.0])}
    found = _spectra(sc.report(weights, spectrum=True))
    assert list(found["rows"]) == [0, 2]
    places, y = found["places"][900], found["rows"][0]["y"]
    assert len(places) == len(y) < 200
    assert (places[0], places[-1]) == (1, 900)
    np.testing.assert_allclose(y, exact[np.array(places) - 1], rtol=1e-3)
    assert found["rows"][2]["y"] == [2.0, 1.0]
    monkeypatch.setattr(matrix, "MOST_VALUES", 0)
    report = sc.report(weights, spectrum=True)
    density = _spectra(report)["rows"][0]
    np.testing.assert_allclose(density["x"], report["a"].spectrum["values"], rtol=1e-3)
    np.testing.assert_allclose(density["y"], report["a"].spectrum["density"], rtol=1e-3)


@pytest.mark.usefixtures("jinja")
def test_the_largest_number_of_float64_in_a_spectrum():
    report = sc.report({"w": np.array([[np.finfo(float).max]])}, spectrum=True)
    assert '"y":[1.7976931348623157e+308]' in report.to_html()


# The command


@pytest.mark.usefixtures("jinja")
def test_html_option(path, tmp_path, capsys):
    target = tmp_path / "norms.html"
    assert main([str(path), "--html", str(target)]) == 0
    out, err = capsys.readouterr()
    assert "norms.html" in err
    assert "a  " in out  # the table is printed too
    assert target.read_text("utf-8") == sc.report(str(path)).to_html()
    assert main([str(path), "--layout", "a=skip", "--json", "--html", str(target)]) == 0
    assert capsys.readouterr().out.startswith("{")
    assert len(Page(target.read_text("utf-8")).lines) == 2  # our own page is replaced
    assert {x.name for x in tmp_path.iterdir()} == {"norms.html", "w.npz"}


@pytest.mark.usefixtures("jinja")
def test_no_other_file_is_replaced(path, capsys, monkeypatch):
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(command, "report_of", pytest.fail)  # it is said before the measurement
        assert main([str(path), "--html", str(path)]) == 2
        assert main([str(path), "--html", str(path.parent)]) == 2
        assert main([str(path), "--html", str(path.parent / "absent" / "x.html")]) == 2
        assert main([str(path), "--html", str(path.with_name("x" * 300))]) == 2
    err = capsys.readouterr().err
    assert "--force" in err
    assert "not a regular file" in err
    assert "folder does not exist" in err
    assert "too long" in err
    assert len(err.splitlines()) == 4
    assert path.read_bytes() == content
    other = path.with_name("other.html")
    other.write_text("<p>by hand</p>")
    assert main([str(path), "--html", str(other), "--force"]) == 0
    assert other.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_comparison_has_no_page(path, tmp_path):
    with pytest.raises(SystemExit):
        main([str(path), "--compare", str(path), "--html", str(tmp_path / "x.html")])
    assert not (tmp_path / "x.html").exists()


@pytest.mark.usefixtures("jinja")
def test_a_failed_write_leaves_the_old_page(path, tmp_path, capsys, monkeypatch):
    target = tmp_path / "norms.html"
    assert main([str(path), "--html", str(target)]) == 0
    content = target.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(path), "--html", str(target)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert target.read_bytes() == content
    assert {x.name for x in tmp_path.iterdir()} == {"norms.html", "w.npz"}


@pytest.mark.usefixtures("jinja")
@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_links_and_modes_stay(path, tmp_path):
    link, target = tmp_path / "link.html", tmp_path / "norms.html"
    link.symlink_to(target)
    old = os.umask(0o022)
    try:
        assert main([str(path), "--html", str(link)]) == 0
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
        target.chmod(0o600)
        assert main([str(path), "--html", str(link)]) == 0
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_the_page_says_what_it_needs(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main([str(path), "--html", str(tmp_path / "x.html")]) == 2
    assert "pip install 'spectral-core[report]'" in capsys.readouterr().err
    with pytest.raises(sc.SpectralError, match="jinja2"):
        sc.report(path).to_html()


# The table of a notebook


def test_table_of_a_notebook(report):
    text = report._repr_html_()
    page = Page(text)
    assert not {"script", "style", "img"} & set(page.tags)
    assert [line[0] for line in page.lines[1:]] == [printable(name) for name in report]
    many = sc.report({f"w{i}": np.eye(2) for i in range(100)})
    assert len(Page(many._repr_html_()).lines) == 61
    assert "40 more rows" in many._repr_html_()


# Matplotlib


@pytest.fixture
def ax():
    figure = pytest.importorskip("matplotlib.figure", reason="Matplotlib is not installed")
    return figure.Figure().subplots()


def test_plot_against_depth(report, ax):
    assert report.plot(ax=ax) is ax
    drawn = {x: y for line in ax.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    for i, row in enumerate(report.values(), start=1):
        assert drawn[i] == (row.sigma or 0.0)
    ax.figure.canvas.draw()  # a dollar sign in a name starts no formula
    assert len(ax.get_xticklabels()) == len(report)
    assert max(len(x.get_text()) for x in ax.get_xticklabels()) <= 28


def test_plot_of_another_column_marks_outliers(ax):
    weights = {f"w{i}": rng.standard_normal((8, 8)) for i in range(10)}
    report = sc.report({**weights, "far": 1e3 * weights["w0"]})
    report.plot("frobenius", ax=ax)
    (outliers,) = [line for line in ax.get_lines() if line.get_label() == "outlier"]
    assert list(outliers.get_ydata()) == [report["far"].frobenius]
    assert ax.get_yscale() == "log"
    with pytest.raises(sc.SpectralError, match="column must be one of sigma"):
        report.plot("name", ax=ax)


def test_plot_makes_a_figure(report, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    matplotlib.use("Agg")
    ax = report.plot()
    assert ax.get_ylabel() == "σ₁"
    sys.modules["matplotlib.pyplot"].close(ax.figure)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(sc.SpectralError, match="pip install"):
        report.plot()
