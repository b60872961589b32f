"""Spectra in the report: all singular values, or their density."""

import json

import numpy as np
import pytest

import spectral_core as sc
from spectral_core._report import matrix as module
from spectral_core._report import tiling
from spectral_core._report.command import main
from spectral_core._report.matrix import measure
from spectral_core._report.numbers import Widening, stored_dtype
from spectral_core._report.spectrum import sparkline


@pytest.mark.parametrize("exponent", [0, -1000, 1000])
@pytest.mark.parametrize("is_complex", [False, True])
def test_all_values_of_a_small_matrix(exponent, is_complex):
    rng = np.random.default_rng(3)
    W = rng.standard_normal((7, 30)) + (1j * rng.standard_normal((7, 30)) if is_complex else 0)
    found = measure(W * 2.0**exponent, np.asarray, spectrum=True).spectrum
    exact = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(np.array(found) / 2.0**exponent, exact, rtol=1e-12)


@pytest.mark.parametrize("exponent", [0, 900])
def test_density_of_a_large_matrix(monkeypatch, exponent):
    monkeypatch.setattr(module, "MOST_VALUES", 0)
    for name in ("_KEPT", "SERIAL"):  # in threads, decoded in each product
        monkeypatch.setattr(tiling, name, 0)
    W = np.random.default_rng(3).standard_normal((300, 500)) * 2.0**exponent
    found = measure(W, np.asarray, spectrum=True).spectrum
    values, density = (np.array(found[key]) for key in ("values", "density"))
    assert np.trapezoid(density, values) == pytest.approx(1)
    s = np.linalg.svd(W, compute_uv=False)
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(values))])
    exact = np.searchsorted(s[::-1], values) / s.size
    assert np.abs(share - exact).max() < 0.04


def test_threads_do_not_change_a_product(monkeypatch):
    W = np.random.default_rng(3).standard_normal((400, 90))
    monkeypatch.setattr(tiling, "_TILE", 900)
    X = np.random.default_rng(4).standard_normal((3, 90))
    plain = tiling.Tiles(W, np.asarray).gram(X)
    monkeypatch.setattr(tiling, "SERIAL", 0)
    found = []
    for kept, cores in ((0, 1), (0, 3), (10**6, 3)):
        monkeypatch.setattr(tiling, "_KEPT", kept)
        monkeypatch.setattr(tiling, "cores", lambda cores=cores: cores)
        tiles = tiling.Tiles(W, np.asarray)
        list(tiles)  # which keeps them, where they fit
        found.append(tiles.gram(X))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found[0], plain, atol=1e-9)
    np.testing.assert_allclose(found[0], X @ W.T @ W, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float64", "float8_e5m2"])
@pytest.mark.parametrize("turned", [False, True])
def test_memory_that_is_reused_holds_the_same_numbers(dtype, turned):
    codes = np.random.default_rng(3).integers(0, 120, (6, 40)).astype(stored_dtype(dtype))
    codes = codes.T if turned else codes
    decode = Widening(dtype)
    for _ in range(2):
        with decode.reused() as into:
            for rows in (slice(0, 4), slice(4, 6)):  # the last one is smaller
                np.testing.assert_array_equal(into(codes[rows]), decode(codes[rows]))


def test_what_has_no_spectrum():
    assert measure(np.array([[np.nan, 1.0]]), np.asarray, spectrum=True).spectrum is None
    assert measure(np.zeros((3, 2)), np.asarray, spectrum=True).spectrum == (0.0, 0.0)
    assert measure(np.eye(2), np.asarray).spectrum is None


def test_outputs_have_the_spectrum(tmp_path, capsys):
    np.savez(tmp_path / "w.npz", a=np.diag([3.0, 1.0]))
    report = sc.report(tmp_path / "w.npz", spectrum=True)
    assert report["a"].spectrum == pytest.approx((3.0, 1.0))
    assert json.loads(report.to_json())["matrices"][0]["spectrum"] == pytest.approx([3.0, 1.0])
    assert "spectrum" not in report.to_csv()
    assert main([str(tmp_path / "w.npz"), "--spectrum"]) == 0
    assert sparkline((3.0, 1.0)) in capsys.readouterr().out
    assert sc.report(tmp_path / "w.npz")["a"].spectrum is None


def test_sparkline():
    assert sparkline((0.0, 0.0)) == "|█           |"
    assert sparkline({"values": (0.0, 1.0, 2.0), "density": (0.0, 1.0, 0.0)})[7] == "█"


def test_a_spectrum_beyond_float64_is_none(monkeypatch):
    weights = {"w": np.full((3, 3), 1.7e308)}
    for most in (module.MOST_VALUES, 0):
        monkeypatch.setattr(module, "MOST_VALUES", most)
        report = sc.report(weights, spectrum=True)
        assert report["w"].spectrum is report["w"].sigma is None
        report.table()
        json.loads(report.to_json())


def test_the_last_memory_may_go_to_another_thread():
    class Taken(list):
        """A list whose last element is gone before the pop."""

        def __bool__(self):
            return True

    decode = Widening("float32")
    decode._rooms = Taken()
    with decode.reused() as into:
        assert into(np.ones((2, 3), np.float32)).sum() == 6
