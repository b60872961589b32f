"""`Plan`: a weight is a matrix in memory order, and its vectors are reordered instead."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core._layout import plan_of
from spectral_core._plan import (
    broadcast_outer,
    broadcast_stack,
    from_memory_order,
    inverse,
    make_plan,
    matrix_in_memory_order,
    rearrange,
    reshaped,
    scale_,
    scaled,
    to_memory_order,
    tokens_of,
)

LAYOUTS = {
    "oi": (3, 4),
    "io": (4, 3),
    "oihw": (2, 3, 4, 5),
    "hwio": (4, 5, 3, 2),
    "hiwo": (4, 3, 5, 2),
    "iohw": (3, 2, 2, 2),
    "sio": (2, 3, 4),
    "iso": (3, 2, 4),
    "ioo": (3, 2, 2),
    "kisko": (2, 3, 2, 2, 4),
    "(go)ihw": (6, 2, 2, 2),
    "hwi(go)": (2, 2, 3, 4),
    "ko(gi)": (2, 3, 4),
}
every_layout = pytest.mark.parametrize("axes", LAYOUTS)


def plan_and_weight(axes, dtype="float64"):
    shape, groups = LAYOUTS[axes], 2 if "(" in axes else 1
    layout = sc.Layout(axes, groups)
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return plan_of(layout, shape, "w"), weight, sc.as_matrix(weight, layout)


@every_layout
@pytest.mark.parametrize("k", [1, 3])
def test_product_in_memory_order_equals_the_product(axes, k):
    plan, weight, matrix = plan_and_weight(axes)
    V = np.random.default_rng(1).standard_normal(plan.rows(k))
    ordered = to_memory_order(V, plan, np)
    here = matrix_in_memory_order(weight, plan, np)
    expected = V @ np.swapaxes(matrix, -1, -2)
    np.testing.assert_allclose(ordered @ np.swapaxes(here, -1, -2), expected, rtol=1e-12)
    np.testing.assert_array_equal(from_memory_order(ordered, plan, np), V)


@every_layout
def test_shapes_of_a_plan_are_those_of_its_matrix(axes):
    plan, _, matrix = plan_and_weight(axes)
    assert plan.matrix == matrix.shape
    assert plan.stack == matrix.shape[:-2]
    assert plan.left == matrix.shape[:-1]
    assert plan.right == (*matrix.shape[:-2], matrix.shape[-1])
    assert plan.rows(4) == (*matrix.shape[:-2], 4, matrix.shape[-1])


@every_layout
def test_broadcast_outer_is_the_outer_product(axes):
    plan, weight, _ = plan_and_weight(axes)
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal(plan.left), rng.standard_normal(plan.right)
    a, b = broadcast_outer(u, v, plan, np)
    found = np.broadcast_to(a * b, plan.split).reshape(weight.shape)
    layout = sc.Layout(axes, plan.groups)
    expected = sc.from_matrix(u[..., :, None] * v[..., None, :], layout, weight.shape)
    np.testing.assert_array_equal(found, expected)


@every_layout
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_scaling_multiplies_each_matrix(axes, dtype):
    plan, weight, matrix = plan_and_weight(axes, dtype)
    numbers = np.random.default_rng(2).uniform(1, 2, plan.stack).astype("float32")
    scale = broadcast_stack(numbers, plan, np)
    found = scaled(weight, scale, plan, np)
    product = matrix.astype("float64") * numbers[..., None, None]
    expected = sc.from_matrix(product, sc.Layout(axes, plan.groups), weight.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-3 if dtype == "float16" else 1e-6)
    assert found.dtype == dtype
    assert scale_(weight, scale, plan, np) is weight
    np.testing.assert_array_equal(weight, found)


@pytest.mark.parametrize("axes", ["oihw", "oi", "sio", "(go)ihw", "hwio", "hwi(go)"])
def test_matrix_in_memory_order_is_a_view(axes):
    plan, weight, _ = plan_and_weight(axes)
    assert np.shares_memory(matrix_in_memory_order(weight, plan, np), weight)


def test_only_a_tensor_whose_axes_stay_is_reshaped():
    assert {axes for axes in LAYOUTS if plan_and_weight(axes)[0].reshapes} == {
        "oi",
        "oihw",
        "(go)ihw",
    }


@given(st.permutations(range(5)))
def test_inverse_permutation_undoes_a_permutation(order):
    x = np.arange(120).reshape(1, 2, 3, 4, 5)
    undone = np.transpose(np.transpose(x, order), inverse(tuple(order)))
    np.testing.assert_array_equal(undone, x)


def test_reshape_to_the_same_shape_returns_the_array():
    x = np.ones((2, 3))
    assert reshaped(x, (2, 3), np) is x
    assert rearrange(x, (2, 3), (0, 1), None, np) is x
    assert reshaped(x, (6,), np).shape == (6,)


def test_tokens_are_one_for_each_axis():
    assert tokens_of("(go)ihw") == ["(go)", "i", "h", "w"]
    with pytest.raises(sc.ArgumentError, match="cannot read layout 'ox'"):
        tokens_of("ox")


@pytest.mark.parametrize(
    ("axes", "groups", "shape", "words"),
    [
        ("oi", 1, (2,), "needs 2 axes, not 1"),
        ("oi", 1, (2, 0), "an axis is empty"),
        ("(go)i", 4, (6, 2), "groups=4 does not divide the axis of 6"),
    ],
)
def test_shape_that_does_not_fit_raises(axes, groups, shape, words):
    with pytest.raises(sc.ShapeError, match=words):
        make_plan(axes, groups, shape)


@pytest.mark.parametrize(
    ("axes", "shape", "kinds", "window"),
    [
        ("oi", (2, 3), "oi", 1),
        ("oihw", (2, 3, 4, 5), "oik", 20),
        ("(go)ihw", (6, 2, 2, 2), "oik", 4),
        ("ohwi", (2, 4, 5, 3), "oki", 20),
        ("sio", (2, 3, 4), "io", 1),
        ("ioo", (3, 2, 2), "io", 1),
        ("hwio", (4, 5, 3, 2), "kio", 20),
        ("ihwo", (3, 4, 5, 2), "iko", 20),
        ("iohw", (3, 2, 2, 5), "iok", 10),
        ("(gi)ohw", (4, 3, 2, 2), "iok", 4),
        ("hwi(go)", (2, 2, 3, 4), "kiso", 4),
        ("shwi(go)", (2, 2, 2, 3, 4), "skiso", 4),
        ("iso", (3, 2, 4), "iso", 1),
    ],
)
def test_form_names_the_order_of_axes_in_memory(axes, shape, kinds, window):
    plan = make_plan(axes, 2 if "(" in axes else 1, shape)
    assert plan.form(1) == plan.contiguous == (kinds, window)
    assert plan.form(0) is None


@pytest.mark.parametrize(
    ("axes", "shape", "known"),
    [
        ("oihw", (4, 3, 2, 2), True),
        ("(go)ihw", (4, 3, 2, 2), True),
        ("soik", (2, 4, 3, 4), False),  # the second axis is that of outputs
        ("hwio", (2, 2, 3, 4), False),
    ],
)
def test_form_of_a_tensor_with_its_second_axis_last(axes, shape, known):
    plan = make_plan(axes, 2 if "(" in axes else 1, shape)
    assert plan.form(4) == (("oki", 4) if known else None)
