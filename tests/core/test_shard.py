"""A block of a tensor is viewed as shards of its matrix."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core._layout import plan_of
from spectral_core._shard import clipped, ordered, shards_of

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


def layout_of(shard):
    return sc.Layout(shard.plan.axes, shard.plan.groups)


@given(blocks())
def test_shards_cover_the_block_and_cut_the_matrix(given_block):
    layout, shape, starts, stops = given_block
    tensor, plan = counted(shape), plan_of(layout, shape, "w")
    block = tensor[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]
    in_order = sc.as_matrix(tensor, layout).reshape([plan.split[axis] for axis in plan.order])
    seen = []
    for shard in shards_of(layout, shape, tuple(starts), block.shape):
        held = block[shard.inside]
        seen += held.reshape(-1).tolist()
        expected = in_order[ordered(shard.ranges, plan)].reshape(shard.plan.matrix)
        np.testing.assert_array_equal(sc.as_matrix(held, layout_of(shard)), expected)
        np.testing.assert_array_equal(
            held.reshape(shard.plan.split), tensor.reshape(plan.split)[shard.ranges]
        )
    assert sorted(seen) == sorted(block.reshape(-1).tolist())


@given(blocks(), st.integers(0, 2**16))
def test_products_of_all_shards_add_up(given_block, seed):
    layout, shape, starts, _ = given_block
    tensor, plan = counted(shape), plan_of(layout, shape, "w")
    v = np.random.default_rng(seed).standard_normal(plan.right)
    found = np.zeros(plan.left_broadcast)
    for lower in np.ndindex(*(2,) * len(shape)):  # cut in two along every axis
        offset = tuple(a if k else 0 for k, a in zip(lower, starts, strict=True))
        ends = tuple(n if k else a for k, a, n in zip(lower, starts, shape, strict=True))
        held = tensor[tuple(slice(a, b) for a, b in zip(offset, ends, strict=True))]
        for shard in shards_of(layout, shape, offset, held.shape):
            columns = clipped(ordered(shard.ranges, plan), plan.right_broadcast)
            rows = clipped(ordered(shard.ranges, plan), plan.left_broadcast)
            W = sc.as_matrix(held[shard.inside], layout_of(shard))
            x = v.reshape(plan.right_broadcast)[columns].reshape(shard.plan.right)
            found[rows] += (W @ x[..., None]).reshape(shard.plan.left_broadcast)
    expected = (sc.as_matrix(tensor, layout) @ v[..., None])[..., 0]
    np.testing.assert_allclose(found.reshape(plan.matrix[:-1]), expected, rtol=1e-10, atol=1e-9)


def test_empty_block_has_no_shard():
    assert shards_of(sc.Layout("oi"), (4, 3), (4, 0), (0, 3)) == ()


@pytest.mark.parametrize(
    ("start", "rows", "expected"), [(0, 8, 1), (1, 6, 3), (2, 4, 1), (1, 1, 1)]
)
def test_cut_within_groups_makes_at_most_three_shards(start, rows, expected):
    shards = shards_of(sc.Layout("(go)i", 4), (8, 3), (start, 0), (rows, 3))
    assert len(shards) == expected
