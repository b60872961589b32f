"""A block of a tensor, as parts of its matrix."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core.layout import plan_of
from spectral_core.parts import clipped, ordered, parts_of

LAYOUTS = [
    (sc.Layout("oi"), (7, 5)),
    (sc.Layout("hwio"), (3, 2, 4, 5)),
    (sc.Layout("sio"), (3, 4, 2)),
    (sc.Layout("ioo"), (4, 3, 2)),
    (sc.Layout("(go)ik", 4), (12, 2, 3)),
    (sc.Layout("ki(go)", 2), (3, 2, 10)),
    (sc.Layout("(gi)ok", 3), (9, 2, 2)),
    (sc.Layout("(go)i", 1), (4, 3)),
]


@st.composite
def blocks(draw):
    layout, shape = draw(st.sampled_from(LAYOUTS))
    starts = [draw(st.integers(0, size)) for size in shape]
    stops = [draw(st.integers(start, size)) for start, size in zip(starts, shape, strict=True)]
    return layout, shape, starts, stops


def counted(shape):
    return np.arange(1.0, 1 + prod(shape)).reshape(shape)


@given(blocks())
def test_the_parts_are_the_block_and_their_matrices_are_cut_from_the_whole_one(given_block):
    layout, shape, starts, stops = given_block
    tensor, plan = counted(shape), plan_of(layout, shape, "w")
    block = tensor[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]
    in_order = sc.as_matrix(tensor, layout).reshape([plan.split[axis] for axis in plan.order])
    seen = []
    for part in parts_of(layout, shape, tuple(starts), block.shape):
        held = block[part.inside]
        seen += held.reshape(-1).tolist()
        expected = in_order[ordered(part.ranges, plan)].reshape(part.plan.matrix)
        np.testing.assert_array_equal(sc.as_matrix(held, part.plan.layout), expected)
        np.testing.assert_array_equal(
            held.reshape(part.plan.split), tensor.reshape(plan.split)[part.ranges]
        )
    assert sorted(seen) == sorted(block.reshape(-1).tolist())


@given(blocks(), st.integers(0, 2**16))
def test_the_products_of_all_parts_of_a_divided_tensor_add_up(given_block, seed):
    layout, shape, starts, _ = given_block
    tensor, plan = counted(shape), plan_of(layout, shape, "w")
    v = np.random.default_rng(seed).standard_normal(plan.right)
    found = np.zeros(plan.left_spread)
    for lower in np.ndindex(*(2,) * len(shape)):  # cut in two along every axis
        offset = tuple(a if k else 0 for k, a in zip(lower, starts, strict=True))
        ends = tuple(n if k else a for k, a, n in zip(lower, starts, shape, strict=True))
        held = tensor[tuple(slice(a, b) for a, b in zip(offset, ends, strict=True))]
        for part in parts_of(layout, shape, offset, held.shape):
            columns = clipped(ordered(part.ranges, plan), plan.right_spread)
            rows = clipped(ordered(part.ranges, plan), plan.left_spread)
            W = sc.as_matrix(held[part.inside], part.plan.layout)
            x = v.reshape(plan.right_spread)[columns].reshape(part.plan.right)
            found[rows] += (W @ x[..., None]).reshape(part.plan.left_spread)
    expected = (sc.as_matrix(tensor, layout) @ v[..., None])[..., 0]
    np.testing.assert_allclose(found.reshape(plan.matrix[:-1]), expected, rtol=1e-10, atol=1e-9)


def test_an_empty_block_has_no_part():
    assert parts_of(sc.Layout("oi"), (4, 3), (4, 0), (0, 3)) == ()


@pytest.mark.parametrize(
    ("start", "rows", "expected"), [(0, 8, 1), (1, 6, 3), (2, 4, 1), (1, 1, 1)]
)
def test_a_cut_within_groups_makes_no_more_than_three_parts(start, rows, expected):
    parts = parts_of(sc.Layout("(go)i", 4), (8, 3), (start, 0), (rows, 3))
    assert len(parts) == expected
