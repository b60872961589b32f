"""The norm of a convolution against a dense SVD of the framework's own layer."""

from __future__ import annotations

import tracemalloc
from math import cos, pi

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core import _symbol
from spectral_core._cells import Kind, first_cells

torch = pytest.importorskip("torch")

MODES = ["zeros", "circular", "reflect", "replicate"]
CLASSES = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
TRANSPOSED = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
KERNEL = {1: "k", 2: "hw", 3: "dhw"}


def dense_norm(layer, channels, size):
    """Return the largest singular value of a layer, from its outputs of an identity batch."""
    count = channels * int(np.prod(size))
    with torch.no_grad():
        rows = layer(torch.eye(count, dtype=torch.float64).reshape(count, channels, *size))
    return float(np.linalg.norm(rows.reshape(count, -1).numpy(), 2))


def layout_of(n, groups, transposed=False):
    first = "(gi)o" if transposed else "(go)i"
    return sc.Layout(first + KERNEL[n], groups=groups)


@st.composite
def layers(draw, modes=MODES):
    """Draw a layer of PyTorch, the size of its image, and the options that describe it."""
    n = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    transposed = len(modes) > 1 and draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    o, i = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(n))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(n))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(n))
    size = tuple(draw(st.integers(2, 6 if n < 3 else 3)) for _ in range(n))
    mode = "zeros" if transposed else draw(st.sampled_from(modes))
    padding = tuple(draw(st.integers(0, min(2, (m - 1 if mode == "reflect" else m)))) for m in size)
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    extra = {"groups": groups, "bias": False, "dtype": torch.float64}
    torch.manual_seed(draw(st.integers(0, 999)))
    if transposed:
        layer = TRANSPOSED[n](i, o, kernel, **options, **extra)
        told = {**options, "transposed": True}
    else:
        layer = CLASSES[n](i, o, kernel, padding_mode=mode, **options, **extra)
        told = {**options, "padding_mode": mode}
    return layer, i, size, layout_of(n, groups, transposed), told


def fits(layer, channels, size):
    try:
        with torch.no_grad():
            layer(torch.zeros(1, channels, *size, dtype=torch.float64))
    except (RuntimeError, ValueError):
        return False
    return True


@given(layers())
def test_bounds_hold_the_norm_of_the_framework_s_layer(case):
    layer, channels, size, layout, told = case
    weight = layer.weight.detach()
    if not fits(layer, channels, size):
        with pytest.raises(sc.ShapeError):
            sc.convolution_norm(weight, layout, size=size, **told)
        return
    exact = dense_norm(layer, channels, size)
    found = sc.convolution_norm(weight, layout, size=size, **told)
    assert found.lower <= exact * (1 + 1e-12)
    assert exact <= found.upper * (1 + 1e-12)
    # From below, the iteration converges.
    assert found.lower >= exact * (1 - 1e-5)
    anywhere = sc.convolution_norm(weight, layout, **told)
    if told.get("padding_mode") != "circular":
        assert exact <= anywhere.upper * (1 + 1e-12)


@given(layers(["circular"]))
def test_a_circular_convolution_is_exact(case):
    layer, channels, size, layout, told = case
    size = tuple(s * max(1, round(m / s)) for m, s in zip(size, told["stride"], strict=True))
    found = sc.convolution_norm(
        layer.weight, layout, size=size, **{**told, "padding": "same"}, tol=1e-9
    )
    reach = [d * (k - 1) for d, k in zip(told["dilation"], layer.kernel_size, strict=True)]
    pads = []
    for m, s, r in zip(size, told["stride"], reach, strict=True):
        total = max((m // s - 1) * s + r + 1 - m, 0)
        pads.append((total // 2, total - total // 2))
    count = channels * int(np.prod(size))
    x = np.eye(count).reshape(count, channels, *size)
    x = np.pad(x, [(0, 0), (0, 0), *pads], mode="wrap")
    plain = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, stride=told["stride"],
        dilation=told["dilation"], groups=layer.groups, bias=False, dtype=torch.float64,
    )  # fmt: skip
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        rows = plain(torch.from_numpy(x)).reshape(count, -1).numpy()
    exact = float(np.linalg.norm(rows, 2))
    assert found.lower <= exact * (1 + 1e-12)
    assert exact <= found.upper * (1 + 1e-12)
    assert found.upper <= found.lower * (1 + 1e-8)


@pytest.mark.parametrize(
    ("kernel", "norm"),
    [
        (np.full((1, 1, 3, 3), 1 / 9), 1.0),  # the mean filter
        (np.array([[[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]]]), 8.0),  # Sobel
        (np.zeros((1, 1, 3, 3)), 0.0),
    ],
)
def test_closed_forms(kernel, norm):
    found = sc.convolution_norm(kernel, "oihw", tol=1e-9)
    assert found.lower == pytest.approx(norm, rel=1e-9, abs=1e-12)
    assert norm <= found.upper <= norm * (1 + 2e-9)


def test_zero_padded_ones_have_their_closed_form():
    for n in (1, 2, 5, 12):
        found = sc.convolution_norm(np.ones((1, 1, 3)), "oik", size=n, padding=1)
        assert found.lower == pytest.approx(1 + 2 * cos(pi / (n + 1)), rel=1e-9)
        assert found.upper == pytest.approx(3, rel=2e-6)


def test_one_tap_is_the_matrix():
    W = np.random.default_rng(0).standard_normal((4, 6))
    kernel = np.zeros((4, 6, 3, 3))
    kernel[:, :, 1, 2] = W
    for size in (None, 5):
        found = sc.convolution_norm(kernel, "oihw", size=size, padding_mode="circular", tol=1e-12)
        assert found.lower == pytest.approx(np.linalg.norm(W, 2), rel=1e-11)
        assert found.upper == pytest.approx(np.linalg.norm(W, 2), rel=1e-9)


@pytest.mark.parametrize(
    ("taps", "norm"),
    [
        ([1.0, -1.0], 0.0),
        ([1.0, -1.0, 1e-170], 1e-170),
        ([0.1, 0.2, -0.3], 2.0**-55),  # in floating point, the sum is twice as much
    ],
)
def test_taps_that_cancel_on_a_grid_have_bounds(taps, norm):
    kernel = np.array(taps).reshape(1, 1, -1)
    found = sc.convolution_norm(kernel, "oik", size=1, padding_mode="circular")
    assert found.lower <= norm <= found.upper < 1e-14


def test_stride_of_the_kernel_s_size_is_the_flattened_matrix():
    kernel = np.random.default_rng(0).standard_normal((5, 3, 2, 2))
    found = sc.convolution_norm(kernel, "oihw", stride=2, tol=1e-9)
    assert found.lower == pytest.approx(np.linalg.norm(kernel.reshape(5, -1), 2), rel=1e-9)


def test_layouts_agree():
    kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 5))
    first = sc.convolution_norm(kernel, "oihw", stride=(1, 2))
    assert sc.convolution_norm(kernel.transpose(2, 3, 1, 0), "hwio", stride=(1, 2)) == first
    turned = sc.convolution_norm(kernel, "iohw", stride=(1, 2), transposed=True, padding=0)
    assert turned.lower == pytest.approx(first.lower, rel=2e-6)


@pytest.mark.parametrize("factor", [1e-300, 1e-160, 1e160, 1e300])
def test_scales_do_not_matter(factor):
    kernel = np.random.default_rng(0).standard_normal((2, 3, 3, 3))
    one, scaled = (sc.convolution_norm(k, "oihw") for k in (kernel, kernel * factor))
    assert scaled.lower == pytest.approx(one.lower * factor, rel=2e-6)


def test_many_equal_maxima_end_and_say_how_far_they_came():
    # Every frequency of a shift by one sample in one channel and none in the other is a maximum.
    kernel = np.zeros((2, 2, 3, 3))
    kernel[0, 0, 0, 0] = kernel[1, 1, 2, 2] = 1.0
    found = sc.convolution_norm(kernel, "oihw", tol=1e-7)
    assert found.lower == pytest.approx(1)
    assert 1 <= found.upper < 1.01


@pytest.mark.parametrize("size", [None, 6])
def test_a_tolerance_of_zero_ends_at_rounding(size):
    kernel = np.random.default_rng(0).standard_normal((2, 3, 3))
    found = sc.convolution_norm(kernel, "oik", size=size, padding_mode="circular", tol=0)
    assert found.lower <= found.upper <= found.lower * (1 + 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_the_stored_numbers_are_bounded(dtype):
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float32).to(dtype)
    exact = kernel.to(torch.complex128 if dtype.is_complex else torch.float64)
    assert sc.convolution_norm(kernel, "oihw") == sc.convolution_norm(exact, "oihw")


def test_nan_is_nan():
    kernel = np.ones((2, 2, 3))
    kernel[0, 0, 0] = np.nan
    assert np.isnan(sc.convolution_norm(kernel, "oik").upper)


@pytest.mark.parametrize(
    ("kernel", "layout", "options", "error", "words"),
    [
        (np.ones((2, 2)), "oi", {}, sc.ShapeError, "no convolution"),
        (np.ones((2, 2, 3), int), "oik", {}, sc.DTypeError, "int"),
        (np.ones((2, 2, 3)), "oihw", {}, sc.ShapeError, "4 axes"),
        (np.ones((2, 2, 3)), "oik", {"stride": 0}, sc.ArgumentError, "stride"),
        (np.ones((2, 2, 3)), "oik", {"size": (4, 4)}, sc.ArgumentError, "size"),
        (np.ones((2, 2, 3)), "oik", {"padding": "full"}, sc.ArgumentError, "padding"),
        (np.ones((2, 2, 3)), "oik", {"padding_mode": "wrap"}, sc.ArgumentError, "circular"),
        (np.ones((2, 2, 3)), "oik", {"size": 2, "padding": 0}, sc.ShapeError, "does not fit"),
        (np.ones((2, 2, 3)), "oik", {"transposed": True}, sc.ArgumentError, "transposed"),
        (np.ones((4, 2, 2, 3)), "soik", {}, sc.ShapeError, "stack"),
    ],
)
def test_errors_name_the_argument(kernel, layout, options, error, words):
    with pytest.raises(error, match=words):
        sc.convolution_norm(kernel, layout, **options)


def waves_of(shape, channels):
    """Return a kernel whose channels are sums of amplitude·cos(f·ω − phase), centred."""
    kernel = np.zeros((len(channels), len(channels), *shape), complex)
    middle = np.array(shape) // 2
    for channel, terms in enumerate(channels):
        for frequency, amplitude, phase in terms:
            for sign in (-1, 1):
                tap = (channel, channel, *(middle + sign * np.array(frequency)))
                kernel[tap] += amplitude / 2 * np.exp(1j * sign * phase)
    return kernel


def test_a_maximum_between_the_points_of_a_grid_hides_none_of_them():
    """The best point is beside the symbol's maximum, and falls faster than a maximum does."""
    step = 2 * pi / 16
    for best in range(16):
        kernel = waves_of((3,), [[((1,), 1.0, (best + 0.49) * step)], [((1,), 0.97, 9.5 * step)]])
        found = sc.convolution_norm(kernel, "oik", size=16, padding_mode="circular")
        norm = max(cos(0.49 * step), 0.97 * cos(0.5 * step))
        assert found.lower <= norm * (1 + 1e-12)
        assert norm <= found.upper * (1 + 1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(12, 48), st.integers(2, 5), st.booleans())
def test_a_circular_convolution_is_exact_at_larger_sizes(seed, size, taps, is_complex):
    """Cells have several points there."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((2, 2, taps)) * np.eye(2)[..., None]
    kernel = kernel + 1j * is_complex * rng.standard_normal(kernel.shape)
    symbol = np.fft.fft(kernel, size, axis=2)
    norm = np.linalg.norm(np.moveaxis(symbol, 2, 0), 2, axis=(1, 2)).max()
    found = sc.convolution_norm(kernel, "oik", size=size, padding_mode="circular")
    assert found.lower <= norm * (1 + 1e-12)
    assert norm <= found.upper * (1 + 1e-12)
    assert found.upper <= found.lower * (1 + 1.01e-6)


def test_a_maximum_in_the_corner_of_a_cell_is_found():
    """Both axes together lead from it to the centre, where the symbol is less than half of it.

    A ridge runs through the corner. The next cells see it below the maximum of the other channel.
    """
    e, far = 0.11, 9 * pi / 8
    ridge = [((2, 2), 0.9, 4 * e), ((2, -2), 0.05, 0.0), ((1, 0), 0.025, e), ((0, 1), 0.025, e)]
    hill = [((0, 0), 0.25, 0.0), ((1, 0), 0.25, far), ((0, 1), 0.25, far)]
    hill += [((1, 1), 0.125, 2 * far), ((1, -1), 0.125, 0.0)]
    other = [(frequency, 0.998 * amplitude, phase) for frequency, amplitude, phase in hill]
    found = sc.convolution_norm(waves_of((5, 5), [ridge, other]), "oihw")
    assert found.lower <= 1 + 1e-12
    assert found.upper >= 1 - 1e-12


def holds(cells, points, is_real):
    """Return for each frequency whether a cell has it, or a real kernel's has its opposite."""
    found = np.zeros(len(points), bool)
    units = cells.units
    for sign in (1, -1) if is_real else (1,):
        apart = (sign * points[:, None] - cells.centres[None] + pi) % (2 * pi) - pi
        shares = abs(apart) / np.where(cells.halves > 0, cells.halves, 1)
        shares[:, cells.halves == 0] = 0  # an axis with one tap has one frequency
        inside = [shares[..., axes].sum(axis=-1) <= 1 for axes in units]
        found |= np.all(inside, axis=0).any(axis=1)
    return found


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.booleans(),
    st.floats(0.3, 1.2),
    st.integers(0, 2**32 - 1),
)
def test_cells_leave_no_gap(sizes, is_real, widest, seed):
    """Neither the first ones, nor their parts. Borders are where a gap would be."""
    rng = np.random.default_rng(seed)
    degrees = (np.array(sizes) - 1) / 2
    cells = first_cells(Kind(degrees, is_real, 1, 1), widest=widest)
    for _ in range(3):
        some = rng.integers(len(cells), size=40)
        ends = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], (40, len(sizes)))
        ends /= np.maximum(abs(ends[:, [*cells.diamond]]).sum(axis=1, keepdims=True), 1)
        edge = cells.centres[some] + ends * cells.halves[some] * (1 - 1e-12)
        points = np.concatenate([rng.uniform(0, 2 * pi, edge.shape), edge])
        assert holds(cells, points, is_real).all()
        reach = cells.of_units(degrees * cells.halves)
        assert (reach <= widest * (1 + 1e-9)).all()
        cells = cells.split(np.where(reach > 0, rng.integers(1, 3, reach.shape), 1))


@pytest.mark.parametrize("rows", [2, 200])
def test_an_eigenvector_is_bounded_in_its_place(rows):
    """The numbers hold for any vector, and for the first one are close."""
    rng = np.random.default_rng(0)
    for is_complex in (False, True):
        kernel = rng.standard_normal((1, rows, rows + 3, 2, 2))
        kernel = kernel + 1j * is_complex * rng.standard_normal(kernel.shape)
        symbol = _symbol.Symbol(kernel if is_complex else kernel.real)
        frequencies = rng.uniform(0, 2 * pi, (2, 2))
        grams = symbol.gram(0, frequencies)
        some = rng.standard_normal((2, rows)) + 1j * rng.standard_normal((2, rows))
        for vectors in (some, np.linalg.eigh(grams)[1][..., -1]):
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            for gram, v, top in zip(
                grams, vectors, symbol.tops(0, frequencies, vectors), strict=True
            ):
                value = (v.conj() @ gram @ v).real
                rest = np.linalg.norm(gram @ v - value * v)
                assert top.lower <= value <= top.upper
                assert top.upper - top.lower <= 1e-8 * value
                assert rest * (1 - 1e-9) - 1e-12 * value <= top.rest <= rest + 1e-7 * value
        if symbol.is_narrow:
            narrow = symbol.gram(0, frequencies, narrow=True)
            errors = np.linalg.norm(narrow - grams, 2, axis=(1, 2))
            assert (errors <= symbol.narrow_error(0, frequencies)).all()


def test_a_ridge_along_both_axes_is_bounded_from_the_centre_of_a_cell():
    """The symbol is cos(ω₁ + ω₂ − φ): it falls from its maximum as fast as the bound allows."""
    for phase in np.linspace(0, pi, 7):
        ridge = waves_of((3, 3), [[((1, 1), 1.0, phase)], [((1, -1), 0.9999, 2 * phase)]])
        found = sc.convolution_norm(ridge, "oihw", tol=1e-4)
        assert found.lower <= 1 + 1e-12
        assert 1 - 1e-12 <= found.upper <= 1 + 1.01e-4


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (3, 5, 2, 4), (2, 2, 1, 5), (2, 3, 3, 2, 2)])
def test_no_size_of_a_circular_convolution_has_a_larger_norm(shape, factor):
    rng = np.random.default_rng(1)
    axes = tuple(range(2, len(shape)))
    delta, flat = np.zeros(shape), np.zeros(shape)
    delta[(..., *(k // 2 for k in shape[2:]))] = rng.standard_normal(shape[:2])
    flat[0, 0].flat[0] = flat[1, 1].flat[-1] = 1.0
    for kernel in (rng.standard_normal(shape), np.ones(shape), delta, flat):
        kernel = kernel * factor
        found = sc.convolution_norm(kernel, "oi" + KERNEL[len(axes)], tol=1e-3)
        for size in (7, 16, 23)[: 2 + (len(axes) < 3)]:
            symbol = np.fft.fftn(kernel, [size] * len(axes), axes=axes)
            norms = np.linalg.norm(np.moveaxis(symbol, (0, 1), (-2, -1)), 2, axis=(-2, -1))
            assert norms.max() <= found.upper * (1 + 1e-12)
        assert found.lower <= found.upper


@pytest.mark.parametrize("kind", ["random", "equal values", "two equal values", "one value"])
def test_many_channels_are_bounded(kind):
    """They are tested in float32 first."""
    pytest.importorskip("scipy")
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.standard_normal((192, 192)))[0]
    kernel = rng.standard_normal((192, 192, 3)) / 192**0.5
    if kind != "random":
        values = np.ones(192)
        if kind == "two equal values":
            values[2:] = rng.uniform(0, 0.9, 190)
        if kind == "one value":
            values[1:] = 0
        kernel = np.zeros_like(kernel)
        kernel[..., 1] = turn * values
        kernel[..., 2] = 0.3 * turn * values  # the largest sum is at the frequency zero
    found = sc.convolution_norm(kernel * 1e-20, "oik")
    symbol = np.fft.fft(kernel, 64 if kind == "random" else 1, axis=2)
    if kind != "random":
        symbol = kernel.sum(axis=2, keepdims=True)
    norm = np.linalg.norm(np.moveaxis(symbol, 2, 0), 2, axis=(1, 2)).max() * 1e-20
    assert norm <= found.upper * (1 + 1e-12)
    assert found.upper <= found.lower * (1 + 1.01e-6)
    assert kind == "random" or found.lower <= norm * (1 + 1e-12)


def test_float32_needs_no_more_frequencies(monkeypatch):
    """A peak that float32 cannot tell from the best one is climbed all the same."""
    pytest.importorskip("scipy")
    kernel = np.random.default_rng(0).standard_normal((200, 200, 3))
    tested, counts = _symbol._tested_, []

    def counted(symbol, cells, *rest, **options):
        counts[-1] += len(cells)
        return tested(symbol, cells, *rest, **options)

    monkeypatch.setattr(_symbol, "_tested_", counted)
    for _ in range(2):
        counts.append(0)
        found = sc.convolution_norm(kernel, "oik", tol=1e-9)
        assert found.upper <= found.lower * (1 + 1.01e-9)
        monkeypatch.setattr(_symbol, "pays_narrow", lambda n: False)
    assert counts[0] <= counts[1] + 10


def test_a_long_kernel_needs_no_square_of_its_taps():
    """A step towards a peak, and the angles of many cells, could need gigabytes."""
    kernel = np.random.default_rng(0).standard_normal((1, 1, 3001))
    norm = abs(np.fft.fft(kernel[0, 0], 2**16)).max()
    tracemalloc.start()
    try:
        lower, upper, _ = sc.convolution_norm(kernel, "oik", tol=1e-3)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert norm * (1 - 1e-12) <= upper <= lower * (1 + 1.01e-3)
    assert lower <= norm * (1 + 1e-4)
    assert most < 3001**2 * 8


@pytest.mark.parametrize("gap", [6.8e-6, 2.5e-5])
def test_a_value_just_above_many_equal_ones_is_found(gap):
    """For float32, all of them are one value: a vector that it finds is not good enough."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((200, 200)))[0] for _ in range(2))
    values = np.ones(200)
    values[0] += gap
    lower, upper, _ = sc.convolution_norm((left * values @ right)[..., None], "oik")
    assert lower <= (1 + gap) * (1 + 1e-13)
    assert (1 + gap) * (1 - 1e-13) <= upper
    assert upper <= lower * (1 + 1.01e-6)


def test_float32_proves_almost_all(monkeypatch):
    """Few of the factorizations are in float64: only where two values are close to the limit."""
    pytest.importorskip("scipy")
    kernel = np.random.default_rng(0).standard_normal((200, 200, 3))
    proven, counts = {}, {"is_proven_narrow": 0, "is_proven_below": 0}

    def counted(name):
        def count(*args):
            counts[name] += 1
            return proven[name](*args)

        return count

    for name in counts:
        proven[name] = getattr(_symbol, name)
        monkeypatch.setattr(_symbol, name, counted(name))
    sc.convolution_norm(kernel, "oik")
    assert counts["is_proven_narrow"] > 20
    assert counts["is_proven_below"] <= 0.1 * counts["is_proven_narrow"]
