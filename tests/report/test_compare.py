"""Drift, overlaps and intruders against singular value decompositions in float64."""

import csv
import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from checkpoints import safetensors
from spectral_core._density import quadratures
from spectral_core._report import compare as module
from spectral_core._report import intruders, tiling
from spectral_core._report import matrix as matrix_module
from spectral_core._report.command import _show_rich, main
from spectral_core._report.intruders import similarity_of, similarity_of_large
from spectral_core._report.numbers import widened

rng = np.random.default_rng(0)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def any_route(request, monkeypatch):
    """Factorize, or compute the first vectors alone, with tiles and bounds."""
    if request.param:
        monkeypatch.setattr(module, "MOST_PROVEN", 0)
        monkeypatch.setattr(matrix_module, "MOST_PROVEN", 0)
        monkeypatch.setattr(tiling, "_TILE", 64)
        monkeypatch.setattr(tiling, "_KEPT", 0)
    return request.param


def orthonormal(n, k, dtype=float):
    x = rng.standard_normal((n, k))
    return np.linalg.qr(x + (1j * rng.standard_normal((n, k)) if dtype is complex else 0))[0]


def with_spectrum(m, n, sigma, dtype=float):
    """Return a matrix of these singular values, and its left and right vectors as columns."""
    U, V = orthonormal(m, len(sigma), dtype), orthonormal(n, len(sigma), dtype)
    return (U * sigma) @ V.conj().T, U, V


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    is_complex=st.booleans(),
    exponent=st.sampled_from([0, -150, 150]),
    seed=st.integers(0, 99),
)
def test_norms_of_the_difference(any_route, m, n, is_complex, exponent, seed):
    draw = np.random.default_rng(seed)

    def matrix():
        x = draw.standard_normal((m, n)) + (1j * draw.standard_normal((m, n)) if is_complex else 0)
        return x * 2.0**exponent

    A, B = matrix(), matrix()
    row = sc.compare({"w": A}, {"w": B}, n_vectors=0)["w"]
    exact = np.linalg.norm(B - A, 2)
    assert row.lower <= exact * (1 + 1e-13)
    assert exact * (1 - 1e-13) <= row.upper
    assert row.sigma == pytest.approx(exact, rel=1e-6)
    assert row.drift == pytest.approx(np.linalg.norm(B - A) / np.linalg.norm(A))
    assert row.sigma_before == pytest.approx(np.linalg.norm(A, 2), rel=1e-6)
    assert row.sigma_after == pytest.approx(np.linalg.norm(B, 2), rel=1e-6)
    rank = (np.linalg.norm(B) / np.linalg.norm(B, 2)) ** 2
    assert row.stable_rank_after == pytest.approx(rank, rel=1e-5)
    assert row.left_overlap is row.left_intruders is None


def test_the_interval_holds_for_the_exact_difference():
    # 1 + 2⁻⁶⁰ rounds to 1: the difference that float64 has is not the exact one.
    row = sc.compare({"w": np.array([[-1.0]])}, {"w": np.array([[2.0**-60]])})["w"]
    assert row.upper > 1.0
    assert row.lower <= 1.0


def reference(A, B, k, threshold):
    """Return the left and the right intruders, and principal angles, by the definition."""
    (U, s, Vh), (P, _, Qh) = (np.linalg.svd(x, full_matrices=False) for x in (A, B))
    rank = int((s > 1e-10 * s[0]).sum())
    sides = ((U[:, :rank], P[:, :k]), (Vh.conj().T[:, :rank], Qh.conj().T[:, :k]))
    counts = tuple(int((abs(x.conj().T @ y).max(axis=0) < threshold).sum()) for x, y in sides)
    angles = []
    for x, y in sides:
        cosines = np.linalg.svd(x[:, :k].conj().T @ y, compute_uv=False)
        angles.append(np.degrees(np.arccos(min(1.0, cosines[-1]))))
    overlaps = tuple(abs(x[:, 0].conj() @ y[:, 0]) for x, y in sides)
    return counts, angles, overlaps


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (60, 12)])
@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_similarity(shape, strength, dtype):
    A, _, _ = with_spectrum(*shape, np.linspace(4, 1, min(shape)), dtype)
    u, v = orthonormal(shape[0], 3, dtype), orthonormal(shape[1], 3, dtype)
    B = A + strength * (u * [3.0, 2.0, 1.5]) @ v.conj().T
    counts, angles, overlaps = reference(A, B, 5, 0.6)
    found = similarity_of(A, B, 5, 0.6)
    assert found.intruders == counts
    assert found.angles == pytest.approx(angles, abs=1e-5)
    assert found.overlaps == pytest.approx(overlaps, abs=1e-9)
    if strength == 0:
        assert found.intruders == (0, 0)
        assert max(found.angles) < 1e-5
    if strength == 3:
        assert min(counts) >= 1


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (200, 50)])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 3.0])
def test_first_vectors_alone_find_the_same_intruders(shape, strength):
    A, _, _ = with_spectrum(*shape, np.linspace(4, 1, min(shape)))
    u, v = orthonormal(shape[0], 3), orthonormal(shape[1], 3)
    B = A + strength * (u * [3.0, 2.5, 2.0]) @ v.T
    exact, found = (f(A, B, 6, 0.5) for f in (similarity_of, similarity_of_large))
    for ours, theirs in zip(found.intruders, exact.intruders, strict=True):
        assert ours <= theirs <= ours + found.undecided
    assert found.converged
    # The first vectors are found to 1e-4 in σ², which leaves angles of about the root of that.
    assert found.angles == pytest.approx(exact.angles, abs=5e-2)
    assert found.overlaps == pytest.approx(exact.overlaps, abs=1e-3)
    if strength in (0.0, 3.0):
        assert found.undecided == 0


def test_a_vector_like_a_late_one_of_the_base_is_undecided():
    A, U, V = with_spectrum(150, 120, np.linspace(4, 1, 120))
    B = A + 9 * np.outer(U[:, 100], V[:, 100])  # lifts an old direction to the first place
    assert similarity_of(A, B, 1, 0.5).intruders == (0, 0)
    found = similarity_of_large(A, B, 1, 0.5)
    assert found.intruders == (0, 0)
    assert found.undecided == 2
    report = sc.compare({"w": A}, {"w": B}, n_vectors=1, similarity=0.5)
    assert report["w"].undecided == 0


@pytest.mark.parametrize("exponent", [-100, 0, 60, 100])
def test_squares_outside_of_float32_change_no_intruder(any_route, exponent):
    A, U, V = with_spectrum(60, 50, np.linspace(4, 1, 50))
    B = A + 9 * np.outer(U[:, 40], V[:, 40])  # a late direction of the base: no intruder
    A, B = (np.ldexp(x, exponent).astype(np.float32) for x in (A, B))
    row = sc.compare({"w": A}, {"w": B}, n_vectors=1)["w"]
    assert (row.left_intruders, row.right_intruders) == (0, 0)


def test_intruders_of_a_base_with_equal_values():
    # Any rotation of the identity's vectors is as good, so nothing is unlike all of them.
    x = rng.standard_normal(20)
    row = sc.compare({"w": np.eye(20)}, {"w": np.eye(20) + np.outer(x, x)})["w"]
    assert row.left_intruders == row.right_intruders == 0


def test_vectors_that_the_base_maps_to_nothing_are_intruders(any_route):
    A, _, _ = with_spectrum(60, 50, np.linspace(4, 2, 10))
    u, v = (np.linalg.svd(X)[0][:, -1] for X in (A, A.T))
    row = sc.compare({"w": A}, {"w": A + 8 * np.outer(u, v)}, n_vectors=4)["w"]
    assert (row.left_intruders, row.right_intruders, row.undecided) == (1, 1, 0)


@given(n=st.integers(1, 20), steps=st.integers(1, 25), seed=st.integers(0, 99))
def test_quadratures_have_the_moments_of_the_measure(n, steps, seed):
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((n, n))
    G = X @ X.T / n
    starts = draw.standard_normal((3, n))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    for x, (nodes, weights) in zip(
        starts, quadratures(lambda rows: rows @ G, starts, min(steps, n), np), strict=True
    ):
        assert weights.sum() == pytest.approx(1)
        for power in range(min(2 * min(steps, n), 6)):
            moment = x @ np.linalg.matrix_power(G, power) @ x
            assert (weights * nodes**power).sum() == pytest.approx(moment, rel=1e-8)


def test_mass_bounds_hold(monkeypatch):
    monkeypatch.setattr(intruders, "_STEPS", 12)
    X = rng.standard_normal((40, 40))
    vectors = np.linalg.eigh(X @ X.T)[1]
    starts = rng.standard_normal((30, 40)) + 4 * vectors[:, rng.integers(0, 40, 30)].T
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    exact = (abs(starts @ vectors) ** 2).max(axis=1)
    bounds = intruders._largest_masses(lambda rows: rows @ (X @ X.T), starts)
    assert (bounds >= exact * (1 - 1e-9)).all()
    assert bounds.min() < 0.9


@pytest.fixture
def paths(tmp_path):
    x = rng.standard_normal((6, 5))
    one = {"a": x, "conv": np.ones((4, 3, 3, 3)), "b": np.ones(2), "t": np.eye(3), "g": np.eye(2)}
    two = {**one, "a": 2 * x, "t": np.eye(4), "new": np.eye(2)}
    del two["g"]
    np.savez(tmp_path / "one.npz", **one)
    np.savez(tmp_path / "two.npz", **two)
    return [str(tmp_path / "one.npz"), "--compare", str(tmp_path / "two.npz")]


def test_outputs_agree(paths, capsys):
    report = sc.compare(paths[0], paths[2])
    assert list(report) == ["a", "conv"]
    assert report["a"].drift == pytest.approx(1)
    assert report["a"].left_overlap == pytest.approx(1)
    assert (report["conv"].drift, report["conv"].upper) == (0, 0)
    assert (report.only_before, report.only_after) == (["g"], ["new"])
    assert report.shapes == {"t": ((3, 3), (4, 4))}
    assert report.skipped == {"b": "not a matrix: fewer than two axes"}
    assert report.largest == "a"
    assert main([*paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["drift"] for row in found["matrices"]] == [x.drift for x in report.values()]
    assert found["summary"]["drift"] == report.drift
    assert found["shapes"] == {"t": [[3, 3], [4, 4]]}
    assert main([*paths, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["drift"]) for row in rows] == [x.drift for x in report.values()]
    assert main([*paths, "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "conv" not in out
    for line in ("Only before: g", "Only after: new", "Of two shapes: t 3×3 and 4×4"):
        assert out.count(line) == 1


def test_to_pandas(paths):
    pytest.importorskip("pandas", reason="pandas is not installed")
    assert list(sc.compare(paths[0], paths[2]).to_pandas().index) == ["a", "conv"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fail-drift", "0.99"], 1, "moved by more than 0.99, or not finite: a"),
        (["--fail-drift", "1.01"], 0, ""),
        (["--fail-above", "0.1"], 1, "above 0.1, or not finite: a, conv"),
        (["--fail-above", "1e3", "--fail-drift", "1e3"], 0, ""),
        (["--similarity", "2"], 2, "similarity must be above 0 and at most 1"),
    ],
)
def test_exit_codes(paths, options, code, message, capsys):
    assert main([*paths, *options]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == bool(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fail-drift", "1"], "--fail-drift needs --compare OTHER"),
        (["--vectors", "3"], "--vectors needs --compare OTHER"),
        (["--similarity", "0.4"], "--similarity needs --compare OTHER"),
        (["--force"], "--force needs --html PATH"),
        (["--top", "0"], "'0' is no whole number above 0"),
        (["--vectors", "-1"], "'-1' is no whole number above 0"),
        (["--vectors", "x"], "'x' is no whole number above 0"),
        (["--fail-above", "nan"], "'nan' is no number"),
        (["--fail-above", "x"], "'x' is no number"),
    ],
)
def test_options_that_mean_nothing(paths, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([paths[0], *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        ["--heads"],
        ["--config", "x"],
        ["--base", "x"],
        ["--lora-scale", "0"],
        ["--spectrum"],
        ["--no-convolutions"],
        ["--html", "x"],
    ],
)
def test_what_describes_one_checkpoint_is_refused(paths, options, capsys):
    with pytest.raises(SystemExit):
        main([*paths, *options])
    message = f"{options[0]} is for one checkpoint: leave --compare out"
    assert message in capsys.readouterr().err


def test_an_error_of_the_disk_is_one_line(paths, capsys, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(5, "Input/output error", "w")

    monkeypatch.setattr("spectral_core._report.command.report_of", failing)
    assert main([paths[0]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_in_common(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=np.eye(2))
    np.savez(tmp_path / "b.npz", y=np.eye(2))
    assert main([str(tmp_path / "a.npz"), "--compare", str(tmp_path / "b.npz")]) == 2
    assert "no tensor of the same name" in capsys.readouterr().err


def test_what_is_not_finite_or_zero():
    bad = np.array([[np.nan, 1.0], [1.0, np.inf]])
    found = sc.compare(
        {"m": np.eye(2), "n": np.eye(2), "z": np.zeros((2, 2)), "o": np.zeros((2, 2))},
        {"m": 2 * np.eye(2), "n": bad, "z": np.eye(2), "o": np.zeros((2, 2))},
    )
    assert found["n"].drift is None
    assert found["n"].note == "NaN or Inf"
    assert found["z"].drift is None
    assert (found["z"].sigma, found["z"].left_intruders) == (1, None)
    assert found["o"].drift == 0
    assert found.drifted(1e9) == ["n", "z"]
    assert found.above(1e9) == ["n"]
    json.loads(found.to_json())
    assert sc.compare({"n": np.eye(2)}, {"n": bad}, n_vectors=0)["n"].note == "NaN or Inf"
    assert {name for name, *_ in found.cells(top=2)} == {"n", "z"}  # not behind a small drift


@pytest.mark.parametrize("width", [60, 120, 300])
@pytest.mark.parametrize("compared", [False, True])
def test_a_terminal_folds_no_number(width, compared, monkeypatch, capsys):
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", str(width))
    weights = {"model.layers.0.self_attn.q_proj.weight": rng.standard_normal((300, 40))}
    moved = {name: x + rng.standard_normal(x.shape) for name, x in weights.items()}
    found = sc.compare(weights, moved) if compared else sc.report(weights)
    _show_rich(found, None)
    out = capsys.readouterr().out
    (line,) = found.cells()
    for label, cell in zip(found.columns, line, strict=True):
        if label not in ("name", ""):
            assert cell in out, label
    assert ("│" in out) or width < 300


def test_norms_near_the_end_of_float64():
    found = sc.compare({"w": np.full((2, 2), 4e307)}, {"w": np.full((2, 2), 8e307)})
    assert found.drift == found["w"].drift == pytest.approx(1)
    json.loads(found.to_json())
    assert "drift of all 1" in found.table()


@pytest.mark.filterwarnings("error")
def test_norms_beyond_float64(any_route):
    top = np.finfo(float).max
    found = sc.compare(
        {"w": np.full((3, 2), top), "c": np.full((3, 2), top * (1 + 1j))},
        {"w": np.full((3, 2), -top), "c": np.ones((3, 2))},
    )
    assert found["w"].upper is None
    assert found["c"].upper is None
    assert found["c"].note == "beyond float64"
    assert found.above(1) == found.drifted(1) == ["w", "c"]
    json.loads(found.to_json())


NUMBERS = st.sampled_from([0.0, 1.0, -3.0, 5e-324, 1e-200, 1e200, 1.7e308, np.nan, np.inf])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@given(
    shape=st.sampled_from([(1, 1), (2, 3), (3, 40), (0, 3), (2, 3, 1, 2)]),
    numbers=st.lists(st.lists(NUMBERS, min_size=1, max_size=3), min_size=2, max_size=2),
    part=st.sampled_from([1, 1j, 1 + 1j]),
)
def test_any_numbers_can_be_reported_and_compared(any_route, shape, numbers, part):
    with np.errstate(all="ignore"):
        before, after = (np.resize(x, shape) * (part if part != 1 else 1.0) for x in numbers)
    found = sc.report({"w": before}, spectrum=True), sc.compare({"w": before}, {"w": after})
    for result in found:
        json.loads(result.to_json())
        result.table()
        for row in result.values():
            if row.sigma is not None:
                assert row.lower <= row.sigma
                assert row.upper is None or row.sigma <= row.upper
    bounded = [row.upper for row in found[0].values()]
    assert len(found[0].above(1e300)) == sum(upper is None or upper > 1e300 for upper in bounded)


def test_no_row_is_lost_where_names_are_equal():
    x = rng.standard_normal((2, 3, 3))
    weights = {"w": x, "w[0]": np.diag([5.0, 1.0])}
    for found in (
        sc.report(weights, layouts={"w": "soi"}),
        sc.compare(weights, weights, layouts={"w": "soi"}),
    ):
        assert list(found) == [row.name for row in found.values()] == ["w[0]", "w[1]", "w[0] (2)"]


def test_tensors_of_one_name_are_compared_in_their_order():
    before = {"1": np.eye(2), 1: 2 * np.eye(2), "a/b": np.eye(3), "a": {"b": np.eye(2)}}
    found = sc.compare(before, {"1": np.eye(2), 1: np.eye(2), "a/b": 4 * np.eye(3)})
    assert list(found) == ["1", "1 (2)", "a/b"]
    assert [row.drift for row in found.values()] == pytest.approx([0.0, 0.5, 3.0])
    assert found.only_before == ["a/b (2)"]


def test_names_cannot_write_to_the_terminal(capsys):
    name = "\x1b[2J\n\u202e"
    found = sc.compare({name: np.eye(2), f"{name}1": np.eye(2)}, {name: np.eye(2)})
    for text in (found.table(), found.to_csv(), repr(found)):
        assert all(c.isprintable() or c == "\n" for c in text)


def test_layouts_and_stacks():
    x = rng.standard_normal((12, 4))
    found = sc.compare({"x": x}, {"x": x + 1}, layouts={"x": sc.Layout("(go)i", 3)})
    assert list(found) == ["x[0]", "x[1]", "x[2]"]
    assert found["x[1]"].sigma == pytest.approx(4)
    assert found["x[1]"].drift == pytest.approx(4 / np.linalg.norm(x[4:8]))


@pytest.mark.parametrize("shape", [(), (20,), (20, 3)])
def test_scales_of_float8(any_route, tmp_path, shape):
    codes = rng.integers(0, 0x7E, (20, 12)).astype(np.uint8)
    numbers = widened(codes, "float8_e4m3fn")
    scales = [rng.uniform(0.01, 0.1, shape).astype(np.float32) for _ in range(2)]
    for path, scale in zip("ab", scales, strict=True):
        tensors = {"q.weight": ("F8_E4M3", codes), "q.weight_scale_inv": ("F32", scale)}
        (tmp_path / f"{path}.safetensors").write_bytes(safetensors(tensors))
    found = sc.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    wide = [x.reshape(-1, 1) if len(shape) < 2 else x.repeat(4, axis=1) for x in scales]
    A, B = (numbers * x.astype(float) for x in wide)
    row = found["q.weight"]
    assert row.lower <= np.linalg.norm(B - A, 2) <= row.upper
    assert row.drift == pytest.approx(np.linalg.norm(B - A) / np.linalg.norm(A))
    assert row.sigma_after == pytest.approx(np.linalg.norm(B, 2), rel=1e-6)
    assert row.note.startswith("times its scale")


def test_a_scale_in_one_of_the_two_is_said(tmp_path):
    codes = rng.integers(0, 0x7E, (4, 3)).astype(np.uint8)
    tensors = {"q.weight": ("F8_E4M3", codes)}
    (tmp_path / "a.safetensors").write_bytes(safetensors(tensors))
    tensors["q.weight_scale"] = ("F32", np.full((), 2, np.float32))
    (tmp_path / "b.safetensors").write_bytes(safetensors(tensors))
    row = sc.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")["q.weight"]
    assert row.drift == pytest.approx(1)
    assert row.note == "after: times its scale"


def test_two_matrices_at_a_time(tmp_path):
    shape, count = (150, 200), 8
    for i in range(2):
        weights = {f"w{j}": np.full(shape, i + 1, np.float32) for j in range(count)}
        np.savez(tmp_path / f"{i}.npz", **weights)
    sc.compare(tmp_path / "0.npz", tmp_path / "1.npz")  # what is imported stays
    tracemalloc.start()
    sc.compare(tmp_path / "0.npz", tmp_path / "1.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14 * shape[0] * shape[1] * 8  # of both: the matrices, vectors, work of LAPACK
