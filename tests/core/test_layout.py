"""Layouts view tensors as matrices, and the gradient is right in each of them."""

import re

import array_api_compat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import gaussian, on, outer
from fresh import start_of
from spectral_core import Layout, as_matrix, from_matrix
from spectral_core import _layout as layout_module

# layout: tensor shape, matrix shape, and where an element goes: (*stack, row, column).
CASES = {
    Layout("oi"): ((3, 4), (3, 4), lambda o, i: (o, i)),
    Layout("io"): ((4, 3), (3, 4), lambda i, o: (o, i)),
    Layout("oik"): ((2, 3, 4), (2, 12), lambda o, i, k: (o, i * 4 + k)),
    Layout("kio"): ((4, 3, 2), (2, 12), lambda k, i, o: (o, i * 4 + k)),
    Layout("oihw"): ((2, 3, 4, 5), (2, 60), lambda o, i, h, w: (o, (i * 4 + h) * 5 + w)),
    Layout("hwio"): ((4, 5, 3, 2), (2, 60), lambda h, w, i, o: (o, (i * 4 + h) * 5 + w)),
    Layout("hiwo"): ((4, 3, 5, 2), (2, 60), lambda h, i, w, o: (o, (i * 4 + h) * 5 + w)),
    Layout("iohw"): ((3, 2, 4, 5), (2, 60), lambda i, o, h, w: (o, (i * 4 + h) * 5 + w)),
    Layout("oidhw"): (
        (3, 2, 2, 3, 4),
        (3, 48),
        lambda o, i, d, h, w: (o, ((i * 2 + d) * 3 + h) * 4 + w),
    ),
    Layout("dhwio"): (
        (2, 3, 4, 2, 3),
        (3, 48),
        lambda d, h, w, i, o: (o, ((i * 2 + d) * 3 + h) * 4 + w),
    ),
    Layout("(go)ihw", groups=4): (
        (8, 3, 2, 5),
        (4, 2, 30),
        lambda c, i, h, w: (c // 2, c % 2, (i * 2 + h) * 5 + w),
    ),
    Layout("hwi(go)", groups=4): (
        (2, 5, 3, 8),
        (4, 2, 30),
        lambda h, w, i, c: (c // 2, c % 2, (i * 2 + h) * 5 + w),
    ),
    Layout("(gi)ohw", groups=4): (
        (12, 2, 2, 5),
        (4, 2, 30),
        lambda c, o, h, w: (c // 3, o, ((c % 3) * 2 + h) * 5 + w),
    ),
    Layout("(go)i", groups=4): ((12, 5), (4, 3, 5), lambda c, i: (c // 3, c % 3, i)),
    Layout("s(go)i", groups=2): (
        (3, 4, 5),
        (3, 2, 2, 5),
        lambda s, c, i: (s, c // 2, c % 2, i),
    ),
    Layout("sio"): ((2, 4, 3), (2, 3, 4), lambda s, i, o: (s, o, i)),
    Layout("iso"): ((4, 2, 3), (2, 3, 4), lambda i, s, o: (s, o, i)),
    Layout("ssoi"): ((2, 3, 4, 5), (2, 3, 4, 5), lambda s, t, o, i: (s, t, o, i)),
    Layout("ioo"): ((4, 2, 3), (6, 4), lambda i, o, p: (o * 3 + p, i)),
    Layout("iio"): ((2, 3, 5), (5, 6), lambda i, j, o: (o, i * 3 + j)),
}
every_layout = pytest.mark.parametrize("layout", CASES, ids=lambda layout: layout.axes)


def test_cases_cover_every_layout_of_the_docstring():
    table = layout_module.__doc__.split("The usual layers need")[1]
    documented = re.findall(r'Layout\("([^"]+)", groups=(\d+)\)', table)
    documented += [(axes, 1) for axes in re.findall(r'``"([^"]+)"``', table)]
    assert len(documented) > 15
    for axes, groups in documented:
        assert Layout(axes, int(groups)) in CASES


@every_layout
def test_matrix_equals_the_loop_over_indices(backend, layout):
    shape, matrix_shape, place = CASES[layout]
    W = gaussian(np.random.default_rng(0), *shape)
    expected = np.full(matrix_shape, np.nan)
    for index in np.ndindex(*shape):
        expected[place(*index)] = W[index]
    matrix = as_matrix(backend.asarray(W), layout)
    np.testing.assert_array_equal(backend.to_numpy(matrix), expected)
    np.testing.assert_array_equal(backend.to_numpy(from_matrix(matrix, layout, shape)), W)


@given(st.data())
def test_same_weights_in_two_layouts_give_the_same_matrix(data):
    canonical = "".join(
        letter * data.draw(st.integers(least, 2), label=letter)
        for letter, least in (("s", 0), ("o", 1), ("i", 1), ("k", 0))
    )
    shape = data.draw(st.tuples(*(st.integers(1, 4) for _ in canonical)))
    # Axes of one letter keep their order, which is the order in which they are joined.
    shuffled = "".join(data.draw(st.permutations(canonical)))
    order = sorted(range(len(shuffled)), key=lambda axis: ("soik".index(shuffled[axis]), axis))
    W = np.arange(np.prod(shape)).reshape(shape)
    other = W.transpose(np.argsort(order))
    matrix = as_matrix(other, shuffled)
    np.testing.assert_array_equal(matrix, as_matrix(W, canonical))
    np.testing.assert_array_equal(from_matrix(matrix, shuffled, other.shape), other)


def test_kernel_letters_are_synonyms():
    W = np.arange(120).reshape(2, 3, 4, 5)
    for axes in ("oikk", "oidh", "oiwd"):
        np.testing.assert_array_equal(as_matrix(W, axes), as_matrix(W, "oihw"))


@on(module="numpy")
def test_oihw_is_a_view_in_numpy(backend):
    W = backend.asarray(np.zeros((4, 3, 2, 2)))
    matrix = as_matrix(W, "oihw")
    assert np.shares_memory(matrix, W)
    assert np.shares_memory(from_matrix(matrix, "oihw", W.shape), W)


@on(module="torch")
def test_oihw_is_a_view_in_torch(backend):
    W = backend.asarray(np.zeros((4, 3, 2, 2)))
    matrix = as_matrix(W, "oihw")
    assert matrix.data_ptr() == W.data_ptr()
    assert from_matrix(matrix, "oihw", W.shape).data_ptr() == W.data_ptr()


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((3, 4), "oihw", "conv of shape (3, 4): layout 'oihw' needs 4 axes, not 2"),
        ((2, 3, 4), "oi", "(2, 3, 4).*one 's' for each stack axis"),
        ((3, 0), "oi", "conv of shape (3, 0): an axis is empty"),
        ((6, 4), Layout("(go)i", groups=4), "(6, 4).*groups=4 does not divide the axis of 6"),
    ],
)
def test_shape_errors_name_the_array_and_its_shape(shape, layout, words):
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(sc.ShapeError, match=pattern):
        as_matrix(np.zeros(shape), layout, name="conv")


def test_from_matrix_names_both_shapes():
    with pytest.raises(sc.ShapeError, match=r"\(2, 3\).*\(2, 3, 2\).*'oik'.*\(2, 6\)"):
        from_matrix(np.zeros((2, 3)), "oik", (2, 3, 2))


@pytest.mark.parametrize(
    ("axes", "groups", "words"),
    [
        ("oxhw", 1, "cannot read layout 'oxhw'"),
        ("(g)oi", 1, r"cannot read layout '\(g\)oi'"),
        ("o i", 1, "cannot read layout"),
        ("ihw", 1, "'ihw' has no output axis 'o'"),
        ("", 1, "no output axis"),
        ("ohw", 1, "'ohw' has no input axis 'i'"),
        ("oihw", 2, r"'oihw' with groups=2.*\(go\)"),
        ("(go)(gi)", 2, "the one axis that holds the groups"),
        ("(go)i", 0, "groups must be an integer ≥ 1, not 0"),
        ("(go)i", 2.0, r"groups must be an integer ≥ 1, not 2\.0"),
    ],
)
def test_unreadable_layouts_raise(axes, groups, words):
    with pytest.raises(sc.ArgumentError, match=words):
        Layout(axes, groups)


def gradient_case(layout, dtype):
    rng = np.random.default_rng(1)
    shape = CASES[layout][0]
    return gaussian(rng, *shape, dtype=dtype), gaussian(rng, *shape, dtype=dtype)


def regularized(backend, W, G, state, layout, factor):
    """Return the gradient by definition, from a power iteration on the matrix, in NumPy."""
    start = backend.asarray(start_of(backend.to_numpy(state.v["w"])[..., 0, :]))
    triple = sc.power_iteration(as_matrix(W, layout), start)
    term = factor * outer(*(backend.to_numpy(part) for part in triple))
    return from_matrix(as_matrix(G, layout) + term, layout, G.shape)


@pytest.mark.thorough("jax-cpu")  # tests/jax has a layout test of its own
@every_layout
def test_gradient_is_right_in_every_layout(backend, layout):
    W, G = gradient_case(layout, "complex128")
    weights, grads = {"w": backend.asarray(W)}, {"w": backend.asarray(G)}
    state = sc.init(weights, layouts=layout)
    expected = regularized(backend, weights["w"], G, state, layout, 0.7)
    new, _ = sc.add_gradient(weights, grads, state, factor=0.7)
    np.testing.assert_allclose(backend.to_numpy(new["w"]), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(backend.to_numpy(grads["w"]), G)


def contiguous(xp, grad):
    return grad, grad


def strided(xp, grad):
    """Return the gradient as a view with gaps and reversed axes, and the memory it views."""
    axes = tuple(reversed(range(grad.ndim)))
    memory = xp.stack([xp.permute_dims(grad, axes)] * 2, axis=1)
    return xp.permute_dims(memory[:, 0, ...], axes), memory


@on(in_place=True)
@every_layout
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("place", [contiguous, strided])
def test_gradient_in_place_is_right_in_every_layout(backend, layout, dtype, place):
    W, G = gradient_case(layout, dtype)
    weights = {"w": backend.asarray(W)}
    xp = array_api_compat.array_namespace(weights["w"])
    grad, memory = place(xp, backend.asarray(G))
    state = sc.init(weights, layouts=layout)
    expected = regularized(backend, weights["w"], G, state, layout, 0.7)
    sc.add_gradient_(weights, {"w": grad}, state, factor=0.7)
    np.testing.assert_allclose(backend.to_numpy(grad), expected, rtol=1e-13, atol=1e-13)
    if place is strided:
        written, gaps = memory[:, 0, ...], memory[:, 1, ...]
        np.testing.assert_array_equal(backend.to_numpy(written), backend.to_numpy(grad).T)
        np.testing.assert_array_equal(backend.to_numpy(gaps), G.T)


@pytest.mark.parametrize(
    ("layouts", "axes"),
    [
        (("oihw", "hwio"), (2, 3, 1, 0)),
        (("oihw", "iohw"), (1, 0, 2, 3)),
        (("oihw", "hiwo"), (2, 1, 3, 0)),
        ((Layout("(go)ihw", 2), Layout("hwi(go)", 2)), (2, 3, 1, 0)),
    ],
    ids=str,
)
def test_trajectory_does_not_depend_on_the_layout(layouts, axes):
    rng = np.random.default_rng(2)
    W, G = gaussian(rng, 4, 3, 2, 5), gaussian(rng, 4, 3, 2, 5)

    def three_steps(W, G, layout):
        state = sc.init({"conv": W}, layouts=layout)
        for _ in range(3):
            grads, state = sc.add_gradient({"conv": W}, {"conv": G}, state, factor=0.1)
            W = W - 0.1 * grads["conv"]
        return W, state

    W1, state1 = three_steps(W, G, layouts[0])
    W2, state2 = three_steps(W.transpose(axes), G.transpose(axes), layouts[1])
    np.testing.assert_allclose(W2, W1.transpose(axes), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(state2.sigma["conv"], state1.sigma["conv"], rtol=1e-12)
    np.testing.assert_allclose(state2.v["conv"], state1.v["conv"], rtol=1e-12, atol=1e-13)


def test_v_of_the_state_is_in_the_order_of_as_matrix():
    """A v of the state multiplies the matrix of `as_matrix`, whatever the order of the axes."""
    W = gaussian(np.random.default_rng(3), 3, 2, 4, 5)
    state = sc.iterate({"w": W}, sc.init({"w": W}, layouts="hwio"), n_iter=500)
    product = as_matrix(W, "hwio") @ state.v["w"][0]
    np.testing.assert_allclose(np.linalg.norm(product), state.sigma["w"], rtol=1e-6)
