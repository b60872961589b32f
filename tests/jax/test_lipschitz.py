"""A function's bound is above its Jacobians, exact where it is linear, and names what has none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402
from jax import lax, nn  # noqa: E402

import spectral_core as sc  # noqa: E402
from spectral_jax import lipschitz_bound  # noqa: E402

SLACK = 1 + 1e-9  # the tests run in float64


def jacobian_norm(jacobian, x):
    """Return the largest singular value of the matrix that ``jacobian`` computes."""
    J = np.asarray(jacobian(x), dtype=float)
    return np.linalg.norm(J.reshape(len(J), -1), 2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(abs(seed)).standard_normal(shape))


def check(fn, x, points=3, **options):
    found = lipschitz_bound(fn, x, **options)
    assert not found.unbounded, found
    jacobian = jax.jit(jax.jacfwd(lambda y: fn(y).reshape(-1)))
    for i in range(points):
        exact = jacobian_norm(jacobian, x if i == 0 else 3 * normal(i, *x.shape))
        assert exact <= found.upper * SLACK, found
        if i == 0 and found.lower is not None:  # as exact as the Jacobian: Flax has float32
            assert found.lower <= exact * (1 + 1e-6)
    return found


ACTIVATIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu jit": jax.jit(nn.gelu),
    "gelu exact": lambda x: nn.gelu(x, approximate=False),
    "leaky": nn.leaky_relu,
    "steep": lambda x: nn.leaky_relu(x, 3.0),
    "elu": nn.elu,
    "elu 2": lambda x: nn.elu(x, 2.0),
    "selu": nn.selu,
    "celu": nn.celu,
    "mish": nn.mish,
    "softplus": nn.softplus,
    "log_sigmoid": nn.log_sigmoid,
    "hard_tanh": nn.hard_tanh,
    "hard_swish": nn.hard_swish,
    "soft_sign": nn.soft_sign,
    "abs": jnp.abs,
    "clip": lambda x: jnp.clip(x, -1, 2),
    "scale": lambda x: 1 - x / 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_of_activations(name):
    fn = ACTIVATIONS[name]
    found = lipschitz_bound(fn, jnp.ones((1, 3)), max_iter=0)
    assert not found.unbounded, found
    x = jnp.linspace(-9, 9, 40_002)
    steepest = float(jnp.max(jnp.abs(jax.vmap(jax.grad(fn))(x))))
    assert found.upper * (1 - 1e-3) <= steepest <= found.upper * (1 + 1e-5)


@st.composite
def networks(draw):
    """Return a random function of 6×6 images."""
    seed = draw(st.integers(0, 10_000))
    layers, channels = [], 2
    for i in range(draw(st.integers(1, 3))):
        width = draw(st.sampled_from([2, 4]))
        kind = draw(st.sampled_from(["conv", "residual", "concat", "grouped", "scaled"]))
        groups = 2 if kind == "grouped" else 1
        W = normal(seed + i, 3, 3, channels // groups, width)
        stride = 1 if kind == "residual" else draw(st.sampled_from([1, 2]))
        scale = normal(seed - i, width) if kind == "scaled" else jnp.ones(width)
        fn = ACTIVATIONS[draw(st.sampled_from(["relu", "tanh", "silu", "leaky", "softplus"]))]

        def conv(x, W=W, stride=stride, groups=groups, scale=scale):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(
                x, W, (stride,) * 2, "SAME", dimension_numbers=numbers, feature_group_count=groups
            )
            return (y + 1.0) * scale / jnp.sqrt(2.0)

        def layer(x, conv=conv, fn=fn, kind=kind):
            y = fn(conv(x))
            if kind == "residual" and x.shape == y.shape:
                return x + y
            return (
                jnp.concatenate([y, x], -1)
                if kind == "concat" and y.shape[:3] == x.shape[:3]
                else y
            )

        layers.append(layer)
        channels += width if kind == "concat" and stride == 1 else width - channels

    pool = draw(st.sampled_from(["max", "mean", "overlap", "none"]))

    def network(x):
        for layer in layers:
            x = layer(x)
        if pool == "max":
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        if pool == "overlap":
            x = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME") / 9
        if pool == "mean":
            x = x.mean((1, 2))
        x = x.reshape(len(x), -1)
        return x @ normal(seed, x.shape[1], 3)

    return network


@given(networks())
@settings(max_examples=3, deadline=None)
def test_bound_is_above_every_jacobian(network):
    check(network, normal(0, 1, 6, 6, 2), points=2, max_iter=0)


@pytest.mark.thorough
@given(networks())
@settings(max_examples=300, deadline=None)
def test_bound_is_above_every_jacobian_of_many_networks(network):
    check(network, normal(0, 1, 6, 6, 2), points=8, max_iter=5)


def test_linear_chain_has_its_norm():
    A, B, c = normal(0, 6, 5), normal(1, 5, 4), normal(2, 5)
    found = check(lambda x: ((x @ A + 1) * c) @ B, normal(3, 2, 6))
    exact = np.linalg.norm(np.asarray(A * c, float) @ np.asarray(B, float), 2)
    assert found.upper == pytest.approx(exact, rel=1e-6)
    assert found.lower == pytest.approx(exact, rel=1e-4)
    assert found.log10_product > found.log10_upper


def test_chain_of_dense_layers_is_closer_than_the_product():
    weights = [normal(i, 24, 24) for i in range(6)]

    def network(x):
        for W in weights[:-1]:
            x = nn.relu(x @ W)
        return x @ weights[-1]

    found = check(network, normal(9, 1, 24))
    expected = sc.chain_bound([np.asarray(W, float).T for W in weights])
    assert found.log10_eclipse == pytest.approx(expected.log10_upper, abs=1e-9)
    assert found.log10_upper < found.log10_product - 0.3


def test_transposed_and_dilated_convolutions():
    x, W = normal(0, 1, 5, 5, 2), normal(1, 3, 3, 2, 4)
    numbers, pad = ("NHWC", "HWIO", "NHWC"), [(1, 1), (1, 1)]
    check(lambda x: lax.conv_transpose(x, W, (2, 2), "SAME"), x)
    check(lambda x: lax.conv_general_dilated(x, W, (1, 1), "SAME", None, (2, 2), numbers), x)
    check(lambda x: lax.conv_general_dilated(x, W, (2, 2), pad, (2, 2), None, numbers), x)


SPECS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NCHW", "HWIO", "NWHC")]


@settings(max_examples=25)
@given(
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.tuples(st.integers(-1, 3), st.integers(0, 3)), st.just((2, 2))),
    st.sampled_from([((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 3), (1, 2))]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(SPECS),
    st.integers(0, 99),
)
def test_chain_bound_of_one_convolution_is_its_norm(
    sizes, taps, strides, padding, dilations, groups, spec, seed
):
    spread, dilation = dilations
    shapes = {
        "NHWC": (1, *sizes, 2 * groups),
        "NCHW": (1, 2 * groups, *sizes),
        "HWIO": (*taps, 2, 3 * groups),
        "OIHW": (3 * groups, 2, *taps),
    }
    x, W = normal(seed, *shapes[spec[0]]), normal(seed + 1, *shapes[spec[1]])

    def fn(x):
        arguments = padding, spread, dilation, spec, groups
        return lax.conv_general_dilated(x, W, strides, *arguments)

    if 0 in jax.eval_shape(fn, x).shape:
        return
    found = check(fn, x, points=1)
    norm = jacobian_norm(jax.jacfwd(lambda y: fn(y).reshape(-1)), x)
    if norm > 0:
        assert found.log10_eclipse == pytest.approx(np.log10(norm), abs=1e-9)


def test_network_of_convolutions_is_a_chain():
    kernels = normal(0, 3, 3, 1, 3) / 3, normal(1, 3, 3, 3, 4) / 5
    scale, bias, W = normal(2, 3), normal(3, 4), normal(4, 36, 5) / 6

    def fn(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernels[0], (1, 1), "SAME", dimension_numbers=numbers)
        x = nn.relu(x * scale)
        x = lax.conv_general_dilated(x, kernels[1], (1, 1), "SAME", dimension_numbers=numbers)
        x = lax.reduce_window(nn.relu(x + bias), 0.0, lax.add, (1, 3, 2, 1), (1, 2, 2, 1), "SAME")
        return (x / 6).reshape(len(x), -1) @ W

    found = check(fn, normal(5, 1, 6, 6, 1))
    assert found.log10_eclipse < found.log10_product - 0.1


@settings(max_examples=15)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    st.integers(1, 2),
)
def test_chain_bound_of_sums_over_windows_is_their_norm(window, strides, dilation):
    def fn(x):
        pads = [(0, 0), (1, 1), (0, 2), (0, 0)]
        arguments = (1, *window), (1, *strides), pads, None, (1, dilation, 1, 1)
        return lax.reduce_window(x, 0.0, lax.add, *arguments)

    x = normal(0, 1, 6, 5, 2)
    norm = jacobian_norm(jax.jacfwd(lambda y: fn(y).reshape(-1)), x)
    assert check(fn, x, points=1).log10_eclipse == pytest.approx(np.log10(norm), abs=1e-9)


def test_window_of_a_number_is_the_number():
    def fn(x):
        return lax.reduce_window(x.sum(), 0.0, lax.add, (), (), [])

    assert lipschitz_bound(fn, jnp.ones((1, 4))).upper == pytest.approx(2)


def test_samples_that_a_convolution_mixes_are_no_chain():
    numbers = ("HWNC", "HWIO", "HWNC")
    W = normal(0, 2, 2, 1, 1)
    found = check(
        lambda x: lax.conv_general_dilated(x, W, (1, 1), "SAME", dimension_numbers=numbers),
        normal(1, 3, 3, 1, 1),
    )
    assert found.log10_eclipse is None


def test_scale_of_channels_is_part_of_the_map():
    W, scale = jnp.diag(jnp.array([1.0, 100.0])), jnp.array([1.0, 0.01])
    assert lipschitz_bound(lambda x: (x @ W) * scale, jnp.ones((1, 2))).upper == pytest.approx(1)


def test_parts_that_are_constant_are_computed():
    W = normal(0, 4, 4)

    def fn(x):
        normalized = W / jnp.linalg.norm(W, 2)
        mask = jax.jit(lambda y: jnp.where(y > 0, y, 0.0))(jnp.array([1.0, -1.0, 1.0, 1.0]))
        return x @ (normalized * mask)

    assert check(fn, normal(1, 1, 4)).upper <= 1.0001


def test_stacks_and_indices():
    W = normal(0, 3, 4, 5)

    def fn(x):
        y = jnp.einsum("nhi,hio->nho", x, W)
        return jnp.concatenate([y[:, 0], y[:, jnp.array([1, 1, 2])].sum(1), y[:, -1, ::2]], 1)

    check(fn, normal(1, 2, 3, 4))


def test_a_function_of_the_same_name_is_not_taken_for_the_known_one():
    def silu(x):
        return 100 * x * nn.sigmoid(x)

    found = lipschitz_bound(jax.jit(silu), jnp.ones((1, 3)), max_iter=0)
    assert found.upper == np.inf
    assert "both depend" in str(found)


UNKNOWN = {
    "exp": (lambda x: jnp.exp(x), "primitive exp"),
    "square": (lambda x: x * x, "integer_pow|both depend|square"),
    "quotient": (lambda x: 1 / x, "divides"),
    "where": (lambda x: jnp.where(x > 0, x, -5 * x), "primitive gt"),
    "attention": (lambda x: nn.softmax(x @ x.T) @ x, "both depend"),
    "top": (lambda x: x[0, lax.top_k(x[1], 2)[1]], "int32"),
    "argmax": (lambda x: jnp.argmax(x, 1), "argmax"),
    "cast": (lambda x: x.astype(int), "int"),
    "infinite": (lambda x: x * jnp.inf, "not finite"),
    "while": (lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: 2 * y, x), "number of"),
    "long": (lambda x: lax.fori_loop(0, 1001, lambda _, y: y / 2, x), "1001 steps"),
    "endless": (lambda x: lax.while_loop(lambda s: s[1], lambda s: s, (x, True))[0], "more than"),
    "branch": (lambda x: lax.cond(x.sum() > 0, lambda y: 9 * y, jnp.negative, x), "a branch"),
    "layer norm": (lambda x: x * lax.rsqrt(x.var(1, keepdims=True)), "LayerNorm"),
    "no taps": (lambda x: lax.conv_general_dilated(x, jnp.eye(3), (), []), "no axis"),
    "order": (lambda x: lax.sort((x, 2 * x), num_keys=1)[1], "orders one array"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_parts_are_named(name):
    fn, reason = UNKNOWN[name]
    found = lipschitz_bound(fn, jnp.ones((3, 3)), max_iter=0)
    assert found.upper == np.inf
    text = " ".join(f"{where}: {why}" for where, why in found.unbounded.items())
    assert any(part in text for part in reason.split("|")), text
    assert "test_lipschitz.py" in text


def stacked_layers(x, weights):
    def layer(y, W):
        return nn.relu(y @ W), y.sum()

    return lax.scan(layer, x, weights)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_stacked_layers_is_the_loop_over_them(remat):
    weights, x = normal(1, 5, 8, 8), normal(2, 1, 8)
    fn = jax.checkpoint(stacked_layers) if remat else stacked_layers
    found = check(lambda y: fn(y, weights), x)

    def unrolled(y):
        for W in weights:
            y = nn.relu(y @ W)
        return y

    expected = lipschitz_bound(unrolled, x)
    assert found.log10_upper == pytest.approx(expected.log10_upper, abs=1e-12)
    assert found.log10_eclipse == pytest.approx(expected.log10_eclipse, abs=1e-12)
    assert sum("step 3" in row.name for row in found.layers) == 2  # the matrix and the sum


LOOPS = {
    "counted": lambda x: lax.fori_loop(0, 3, lambda i, y: 2 * y, x),
    "counted, traced": lambda x: lax.fori_loop(0, jnp.int32(3), lambda i, y: 2 * y, x),
    "index": lambda x: lax.fori_loop(0, jnp.int32(2), lambda i, y: y * jnp.array([2.0, 4.0])[i], x),
    "random key": lambda x: lax.fori_loop(
        0,
        jnp.int32(3),
        lambda i, s: (2 * s[0], jax.random.fold_in(s[1], i)),
        (x, jax.random.key(0)),
    )[0],
    "reversed": lambda x: lax.scan(
        lambda y, c: (y * c, None), x, jnp.array([2.0, 4.0]), reverse=True
    )[0],
    "each": lambda x: lax.map(lambda row: 8 * row, x),
    "switch": lambda x: lax.scan(
        lambda y, i: (lax.switch(i, [lambda z: 2 * z, lambda z: 4 * z], y), None),
        x,
        jnp.array([0, 1]),
    )[0],
    "branch": lambda x: lax.cond(True, lambda y: 8 * y, lambda y: jnp.exp(y), x),
    "constants": lambda x: x * lax.scan(lambda c, _: (2 * c, c), 2.0, None, length=2)[0],
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_and_branches_are_followed(name):
    assert check(LOOPS[name], normal(0, 3, 4)).upper == pytest.approx(8)


def test_results_of_all_steps_count():
    """Every step's result is an output: their squares add up."""

    def powers(x):
        return lax.scan(lambda y, _: (2 * y, y), x, None, length=4)[1]

    found = check(powers, normal(0, 1, 3))
    assert found.upper == pytest.approx((1 + 4 + 16 + 64) ** 0.5)


def test_scan_that_mixes_its_entries_is_not_taken_for_a_map():
    def sums(x):
        return lax.scan(lambda total, row: (total + row, total + row), jnp.zeros(2), x)[1]

    check(sums, normal(0, 6, 2))

    def pairs(x):
        return lax.map(lambda rows: rows[0] + jnp.where(rows[2] > 1, 9.0, 1.0) * rows[1], x)

    first = jnp.array([1.0, 2.0, 1.0])
    found = check(lambda x: pairs((x, 3 * x, first)), normal(0, 3, 2))
    assert found.upper >= 28


@jax.custom_jvp
def lied(x):
    return 3.0 * x


lied.defjvps(lambda t, out, x: 0 * t)


@jax.custom_vjp
def lied_back(x):
    return 3.0 * x


lied_back.defvjp(lambda x: (3.0 * x, None), lambda _, g: (0 * g,))


@pytest.mark.parametrize("fn", [lied, lied_back, jax.jit(lied), jax.checkpoint(lied_back)])
def test_functions_with_derivatives_of_their_own_count_as_they_compute(fn):
    assert lipschitz_bound(fn, jnp.ones((1, 2)), max_iter=0).upper == pytest.approx(3)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_and_its_kin(name, axis):
    function = getattr(nn, name)

    def fn(x):
        return function(9 * x, axis=axis) / 9

    x = normal(0, 3, 4)
    expected = {"softmax": 0.5, "logsumexp": 1.0, "log_softmax": x.shape[axis] ** 0.5}[name]
    found = check(fn, x, max_iter=0)
    assert found.upper == pytest.approx(expected)
    within = lipschitz_bound(jax.jit(lambda y: function(y, axis=axis)), x, max_iter=0)
    assert within.upper == pytest.approx(expected)
    # Two that are equal and above all others: softmax attains its bound.
    pair = (0, slice(2)) if axis else (slice(2), 0)
    check(fn, jnp.full((3, 4), -9.0).at[pair].set(9.0), points=1, max_iter=0)


def test_softmax_with_a_part_that_is_used_elsewhere_is_not_recognized():
    def fn(x):
        e = jnp.exp(x - lax.stop_gradient(x.max(1, keepdims=True)))
        return e / e.sum(1, keepdims=True), e

    assert lipschitz_bound(fn, normal(0, 2, 3), max_iter=0).upper == np.inf


PARTS = {
    "update": lambda x: lax.dynamic_update_slice(2 * x, x[:1], (1, 0)),
    "set": lambda x: x.at[jnp.array([0, 2])].set(3 * x[1]),
    "sort": lambda x: jnp.sort(x, axis=0),
    "top": lambda x: lax.top_k(x, 2)[0],
    "flip": lambda x: jnp.concatenate([x[::-1], jnp.pad(x, ((0, 0), (1, 2)))[:, :4]]),
    "slice": lambda x: lax.dynamic_slice(x, (1, 0), (2, 3)),
    "take": lambda x: x[:, jnp.array([0, 0, 3, 0])],
    "interior": lambda x: lax.pad(x, 1.0, ((0, 1, 1), (-1, 0, 0))),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_move(name):
    check(PARTS[name], normal(0, 3, 4), points=6)


def test_barrier_passes_each_value_on():
    found = lipschitz_bound(
        lambda x: lax.optimization_barrier((x, 2 * x))[1], jnp.ones((1, 2)), max_iter=0
    )
    assert found.upper == pytest.approx(2)


@st.composite
def linear_maps(draw):
    """Return a convolution, a product or a window over images, with its input."""
    seed, kind = draw(st.integers(0, 10_000)), draw(st.sampled_from(["conv", "dot", "window"]))
    if kind == "dot":
        W, x = normal(seed, 3, 4, 2), normal(seed + 1, 2, 3, 4)
        numbers = draw(
            st.sampled_from(["nhi,hio->nho", "nhi,hio->ohn", "nhi,hio->no", "nhi,oih->nho"])
        )
        W = W.transpose(2, 1, 0) if numbers.startswith("nhi,oih") else W
        return lambda y: jnp.einsum(numbers, y, W), x
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = draw(pair), draw(pair)
    padding = draw(st.sampled_from(["SAME", "VALID", [(2, 1), (0, 3)]]))
    if kind == "window":
        reduce = draw(st.sampled_from([(0.0, lax.add), (-jnp.inf, lax.max), (jnp.inf, lax.min)]))
        size = (1, *draw(pair), 1)
        options = {"window_dilation": (1, *dilation, 1)}
        around = padding if isinstance(padding, str) else [(0, 0), *padding, (0, 0)]
        return (
            lambda y: lax.reduce_window(y, *reduce, size, (1, *stride, 1), around, **options),
            normal(seed, 1, 7, 7, 2),
        )
    groups, batch = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2)]))
    W = normal(seed, *draw(pair), 4 // groups, 4)
    spread = draw(pair) if isinstance(padding, list) else (1, 1)
    return (
        lambda y: lax.conv_general_dilated(
            y,
            W,
            stride,
            padding,
            lhs_dilation=spread,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch,
        ),
        normal(seed + 1, 2, 7, 7, 4),  # no window is larger: the output is not empty
    )


@given(linear_maps())
@settings(max_examples=6, deadline=None)
def test_linear_maps_of_all_options(case):
    check(*case, points=2, max_iter=0)


@pytest.mark.thorough
@given(linear_maps())
@settings(max_examples=300, deadline=None)
def test_linear_maps_of_many_options(case):
    check(*case, points=2, max_iter=0)


def test_known_gains_of_jitted_functions():
    @jax.jit
    def norm(x):
        return x / jnp.linalg.norm(x)

    def fn(x):
        return 2 * norm(x + 1)

    x = normal(0, 1, 3)
    found = lipschitz_bound(fn, x, gains={"norm": 5.0})
    assert found.upper == pytest.approx(10)
    assert [row.name for row in found.layers] == ["norm", "mul"]
    with pytest.raises(sc.NamesError, match=r"'nrom'.*jax\.jit"):
        lipschitz_bound(fn, x, gains={"nrom": 5.0})
    with pytest.raises(sc.ArgumentError, match="≥ 0"):
        lipschitz_bound(fn, x, gains={"norm": -1.0})


def test_jacobian_that_jax_cannot_transpose_is_left_out_with_the_reason():
    fn = LOOPS["counted, traced"]
    found = lipschitz_bound(fn, jnp.ones((1, 2)))
    assert found.lower is None or found.lower <= found.upper * SLACK
    assert found.lower is not None or "No Jacobian" in str(found)


def test_parameters_among_the_examples_are_told():
    found = lipschitz_bound(lambda W, x: x @ W, jnp.eye(2), jnp.ones((1, 2)), max_iter=0)
    assert "lambda x: fn(params, x)" in str(found)


def test_function_without_an_array_is_an_error():
    with pytest.raises(sc.ArgumentError, match="no array"):
        lipschitz_bound(lambda x: (), jnp.ones((1, 2)))


def test_equinox_network_under_vmap_is_a_chain():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    model = eqx.nn.MLP(4, 3, 8, 3, key=jax.random.key(0))
    for samples in (1, 8):  # 8 as the width
        found = lipschitz_bound(jax.vmap(model), normal(0, samples, 4), max_iter=0)
        assert found.log10_eclipse < found.log10_product - 0.05
        expected = sc.chain_bound([np.asarray(layer.weight, float) for layer in model.layers])
        assert found.log10_eclipse == pytest.approx(expected.log10_upper, abs=1e-6)


def test_flax_network_with_batch_norm():
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    model = linen.Sequential([
        linen.Conv(4, (3, 3), strides=2),
        linen.BatchNorm(use_running_average=True),
        linen.relu,
        lambda x: linen.avg_pool(x, (2, 2), (2, 2)),
        lambda x: x.reshape(len(x), -1),
        linen.Dense(3),
    ])  # fmt: skip
    x = normal(0, 1, 8, 8, 2)
    variables = model.init(jax.random.key(0), x)
    found = check(lambda x: model.apply(variables, x), x)
    kinds = [row.kind for row in found.layers]
    assert kinds.count("conv_general_dilated") == 1
    assert "mul" not in kinds  # the batch norm is part of the convolution
    names = [row.name for row in found.layers]
    assert "layers_0" in names[0]
    assert "layers_5" in names[-1], names


def test_prints_and_moves_do_not_stop_the_walk():
    def function(x):
        jax.debug.print("{}", x.sum())
        y, z = jax.device_put((x, 2 * x))
        return y + z

    assert check(function, normal(0, 1, 3)).upper == pytest.approx(3)


def test_several_slopes_are_no_known_activation():
    slopes = jnp.array([0.1, 3.0, 0.2])
    found = lipschitz_bound(lambda x: jax.nn.leaky_relu(x, slopes), normal(0, 1, 3))
    assert found.unbounded or found.upper >= 3


@pytest.mark.parametrize("function", [jax.nn.leaky_relu, jax.nn.elu])
def test_a_slope_that_is_no_number_has_no_bound(function):
    found = lipschitz_bound(lambda x: function(x, jnp.nan), normal(0, 1, 3), max_iter=0)
    assert found.upper == np.inf


def test_misfits_are_errors():
    with pytest.raises(sc.DTypeError, match="floating"):
        lipschitz_bound(lambda x: x, jnp.ones((1, 2), int))
    with pytest.raises(sc.ShapeError, match="empty"):
        lipschitz_bound(lambda x: x, jnp.ones((0, 2)))
    with pytest.raises(sc.ArgumentError, match="max_iter"):
        lipschitz_bound(lambda x: x, jnp.ones((1, 2)), max_iter=-1)
    with pytest.raises(sc.ArgumentError, match="traced"):
        jax.jit(lambda x: lipschitz_bound(jnp.tanh, x).upper)(jnp.ones((1, 2)))
