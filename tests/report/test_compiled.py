"""Compiled products and sums against those of NumPy, and against a singular value decomposition."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from checkpoints import safetensors
from spectral_core._report import command, compiled, matrix, tiling
from spectral_core._report.entry import TensorEntry
from spectral_core._report.matrix import measure
from spectral_core._report.numbers import Widening, stored_dtype, widened

KINDS = ("bfloat16", "float16", "float32", "float64")
# As it is, transposed, rows or columns of a larger matrix, and the last row first.
ORDERS = ("C", "F", "rows", "columns", "backwards")


@pytest.fixture
def small(monkeypatch):
    """Use the compiled loops for small matrices too, in parts, panels and Lanczos steps."""
    pytest.importorskip("numba", reason="Numba is not installed")
    for module, name, value in (
        (compiled, "_SMALL", 0),
        (compiled, "_WORTH", 0),
        (compiled, "_PANEL", 32),
        (compiled, "_PANEL_SIZE", 0),
        (tiling, "SERIAL", 400),
        (matrix, "MOST_PROVEN", 0),
    ):
        monkeypatch.setattr(module, name, value)


def stored(values, name):
    """Return numbers as a file stores them."""
    if name == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values).astype(stored_dtype(name))


def laid_out(W, order):
    """Return an array of the same numbers with another order in memory."""
    if order == "rows":
        return np.concatenate([W, W])[: len(W)]
    if order == "columns":
        return np.concatenate([W, W], axis=1)[:, : W.shape[1]]
    if order == "backwards":
        return np.ascontiguousarray(W[::-1])[::-1]
    return np.asarray(W, order=order)


def both(W, name):
    """Return compiled products and those of NumPy."""
    found = compiled.tiles_of(W, Widening(name), compiled=True)
    assert isinstance(found, compiled.CompiledTiles)
    return found, tiling.Tiles(W, Widening(name))


def assert_equal(found, expected):
    """Compare two measurements, of which sums and products may be rounded in another order."""
    for name in ("zeros", "dead_rows", "dead_columns", "nonfinite", "largest", "method"):
        np.testing.assert_equal(getattr(found, name), getattr(expected, name), name)
    for name in ("sigma", "lower", "upper", "frobenius", "ratio"):
        exact = getattr(expected, name)
        rel = 1e-6 if name == "ratio" else 1e-11  # σ₂ of few steps is less exact
        assert getattr(found, name) == pytest.approx(exact, rel=rel, abs=1e-12, nan_ok=True), name


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(KINDS),
    st.sampled_from(ORDERS),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_products(small, m, n, name, order, count, seed):
    rng = np.random.default_rng(seed)
    W = laid_out(stored(rng.standard_normal((m, n)), name), order)
    found, plain = both(W, name)
    X = rng.standard_normal((count, min(m, n)) if count else min(m, n))
    exact = plain.gram(X)
    np.testing.assert_allclose(found.gram(X), exact, rtol=1e-12, atol=1e-12 * np.abs(exact).max())


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(KINDS),
    st.sampled_from(ORDERS),
    st.sampled_from(["plain", "zeros", "subnormal", "huge", "nan", "inf"]),
    st.integers(0, 99),
)
def test_sums(small, m, n, name, order, what, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((m, n))
    if what == "zeros":
        values *= (rng.random((m, 1)) < 0.7) & (rng.random((1, n)) < 0.7)  # of both signs
    elif what in ("subnormal", "huge"):
        exponents = {"float16": (-24, 13), "float64": (-1070, 1000)}.get(name, (-130, 120))
        values *= 2.0 ** exponents[what == "huge"]
    elif what in ("nan", "inf"):
        values[rng.random((m, n)) < 0.2] = float(what)
    W = laid_out(stored(values, name), order)
    found, plain = both(W, name)
    a, b = found.sums(), plain.sums()
    assert (a.zeros, a.nonfinite, a.dead, a.largest) == (b.zeros, b.nonfinite, b.dead, b.largest)
    assert found.exponent == plain.exponent
    assert a.frobenius == pytest.approx(b.frobenius, rel=1e-13, abs=0, nan_ok=True)
    if not b.nonfinite:
        assert a.product == pytest.approx(b.product, rel=1e-13, abs=0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (61, 61), (1, 50)])
def test_interval_holds_sigma(small, name, order, shape):
    W = laid_out(stored(np.random.default_rng(3).standard_normal(shape), name), order)
    found = measure(W, Widening(name), compiled=True)
    sigma = np.linalg.svd(widened(W, name), compute_uv=False)[0]
    assert found.lower <= sigma * (1 + 1e-13)
    assert sigma * (1 - 1e-13) <= found.upper
    assert_equal(found, measure(W, Widening(name)))


@pytest.mark.parametrize("scale", [1e-300, 1e300, 5e-324])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_whose_squares_leave_float64(small, scale, order):
    W = laid_out(np.random.default_rng(3).standard_normal((50, 40)) * scale, order)
    found = measure(W, Widening("float64"), compiled=True, spectrum=True)
    assert found == measure(W, Widening("float64"), spectrum=True)  # NumPy computes both
    assert found.sigma > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_finite(small, name, value):
    values = np.random.default_rng(3).standard_normal((50, 40))
    values[7, 3] = value
    W = stored(values, name)
    found = measure(W, Widening(name), compiled=True)
    assert found.nonfinite == 1
    assert np.isnan([found.sigma, found.lower, found.upper, found.frobenius]).all()
    assert found.largest == np.nanmax(np.abs(widened(W, name)))
    assert_equal(found, measure(W, Widening(name)))


def test_signaling_nan(small):
    W = np.full((50, 40), 0x3F80, np.uint16)
    W[1, 2] = 0x7F81
    assert measure(W, Widening("bfloat16"), compiled=True).nonfinite == 1


def test_zero_matrix(small):
    found = measure(np.zeros((50, 40), np.float32), Widening("float32"), compiled=True)
    assert found[:4] == (0.0, 0.0, 0.0, "proven")
    assert (found.zeros, found.dead_rows, found.dead_columns) == (1.0, 50, 40)


@pytest.mark.parametrize("order", ["C", "F"])
def test_density(small, monkeypatch, order):
    monkeypatch.setattr(matrix, "MOST_VALUES", 0)
    W = laid_out(np.random.default_rng(3).standard_normal((70, 60)).astype(np.float32), order)
    found, expected = (
        measure(W, Widening("float32"), spectrum=True, compiled=x).spectrum for x in (True, False)
    )
    for key in ("values", "density"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("order", ["C", "F"])
def test_cores_do_not_change_a_result(small, monkeypatch, order):
    W = laid_out(np.random.default_rng(3).standard_normal((120, 60)).astype(np.float32), order)
    found = []
    for cores in (1, 2, 16):
        monkeypatch.setattr(tiling, "cores", lambda cores=cores: cores)
        found.append(measure(W, Widening("float32"), compiled=True))
    assert found[0] == found[1] == found[2]
    assert len(both(W, "float32")[0]._memory._parts()) > 8


@pytest.mark.parametrize("shape", [(400, 90), (33, 5), (1, 40), (7, 300)])
def test_panels_and_parts_cover_a_matrix(small, shape):
    tiles, _ = both(np.ones(shape, np.float32), "float32")
    assert [i for part in tiles._memory._parts() for i in part] == list(range(shape[0]))
    assert [i for panel in tiles._panels() for i in panel] == list(range(shape[1]))


W = np.random.default_rng(3).standard_normal((50, 40))


def at_odd_address(W):
    raw = np.zeros(W.nbytes + 1, np.uint8)
    raw[1:] = W.reshape(-1).view(np.uint8)
    return raw[1:].view(W.dtype).reshape(W.shape)


@pytest.mark.parametrize(
    ("W", "decode"),
    [
        (W.astype(">f4"), Widening("float32")),
        (at_odd_address(W), Widening("float64")),
        (W[:, ::2], Widening("float64")),
        (np.broadcast_to(W[:, :1], (50, 40)), Widening("float64")),
        (W.astype(np.complex128), Widening("complex128")),
        (np.ones((50, 40), np.uint8), Widening("float8_e5m2")),
        (np.ones((50, 40), np.uint16), Widening("uint16")),
        (W, np.asarray),
        (W, lambda x: 2.0 * x),
    ],
    ids=["order", "address", "steps", "repeated", "complex", "float8", "integers", "any", "scaled"],
)
def test_numpy_measures_what_the_loops_do_not_know(small, W, decode):
    assert type(compiled.tiles_of(W, decode, compiled=True)) is tiling.Tiles
    assert measure(W, decode, compiled=True).sigma > 0


def test_a_live_bfloat16_comes_as_float32(small):
    both(W.astype(np.float32), "bfloat16")


@pytest.fixture
def checkpoint(tmp_path):
    """Return the path of a file with a tall, a wide and a transposed matrix, and a vector."""
    rng = np.random.default_rng(3)
    shapes = {"up.weight": (70, 41), "down.weight": (41, 70), "h.0.attn.c_proj.weight": (52, 52)}
    tensors = {
        name: ("BF16", stored(rng.standard_normal(shape), "bfloat16"))
        for name, shape in shapes.items()
    }
    tensors["bias"] = ("F32", np.ones(5, np.float32))
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(tensors))
    return path


@pytest.fixture
def grams(monkeypatch):
    """Return a list that gets the shape of each matrix with a compiled product."""
    found, gram = [], compiled.CompiledTiles.gram

    def recorded(self, x):
        found.append(self.shape)
        return gram(self, x)

    monkeypatch.setattr(compiled.CompiledTiles, "gram", recorded)
    return found


def test_report(small, checkpoint, grams, monkeypatch):
    found = sc.report(checkpoint)
    assert set(grams) == {(70, 41), (52, 52)}
    monkeypatch.setattr(compiled, "_WORTH", 2**25)
    grams.clear()
    expected = sc.report(checkpoint)
    assert not grams
    for name, row in expected.items():
        assert_equal(found[name], row)


def test_comparison(small, checkpoint, grams, monkeypatch):
    found = sc.compare(checkpoint, checkpoint, n_vectors=0)
    assert set(grams) == {(70, 41), (52, 52)}
    monkeypatch.setattr(compiled, "_WORTH", 2**25)
    for name, row in sc.compare(checkpoint, checkpoint, n_vectors=0).items():
        assert found[name].sigma_after == pytest.approx(row.sigma_after, rel=1e-11)


def entries(*sizes, dtype="bfloat16"):
    return [TensorEntry("w", (1024, size // 1024), dtype, lambda: None) for size in sizes]


def test_loops_are_for_large_checkpoints():
    """To compile them takes seconds, and so does the report of a small checkpoint without."""
    assert not compiled.is_worth(entries(2**24))
    assert compiled.is_worth(entries(*[2**20] * 33))
    assert not compiled.is_worth(entries(*[2**17] * 400))
    assert not compiled.is_worth(entries(2**26, dtype="float8_e4m3fn"))
    assert not compiled.is_worth([TensorEntry("b", (2**26,), "float32", lambda: None)])


@pytest.fixture
def forgetful():
    """Look for Numba anew in the test, and after it."""
    compiled._kernels.cache_clear()
    yield
    compiled._kernels.cache_clear()


@pytest.fixture
def without_numba(forgetful, monkeypatch):
    monkeypatch.setattr(compiled, "_is_missing", lambda: True)


def test_the_command_says_what_would_be_faster(
    small, without_numba, checkpoint, grams, monkeypatch, capsys
):
    assert command.main([str(checkpoint)]) == 0
    assert "pip install spectral-core[numba]" in capsys.readouterr().err
    assert not grams
    monkeypatch.setattr(compiled, "_WORTH", 2**25)
    assert command.main([str(checkpoint)]) == 0
    assert capsys.readouterr().err == ""


def test_the_command_says_nothing_with_numba(small, checkpoint, capsys):
    assert command.main([str(checkpoint)]) == 0
    assert capsys.readouterr().err == ""


def test_a_broken_numba_is_a_warning(small, forgetful, checkpoint, grams, monkeypatch):
    monkeypatch.setitem(sys.modules, "spectral_core.numba.gram_kernels", None)
    monkeypatch.delattr("spectral_core.numba.gram_kernels", raising=False)
    with pytest.warns(sc.SpectralWarning, match="Numba does not work here"):
        assert len(sc.report(checkpoint)) == 3
    assert not grams


def test_where_numba_must_not_compile(small, forgetful, checkpoint, grams, monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert len(sc.report(checkpoint)) == 3
    assert not grams
