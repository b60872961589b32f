"""Weights that a JAX mesh divides: the same numbers, and nothing but vectors sent."""

import re
from math import prod

import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import spectral_jax  # noqa: E402

try:
    jax.config.update("jax_num_cpu_devices", 4)
except RuntimeError:
    pytest.skip("JAX has started already, with one device", allow_module_level=True)

SHAPES = {
    "dense": {"kernel": (64, 96), "bias": (96,)},
    "narrow": {"kernel": (128, 16)},
    "conv": {"kernel": (3, 3, 16, 32)},
    "grouped": {"kernel": (3, 3, 8, 32)},
    "layers": {"kernel": (4, 32, 16)},
}
LONGEST = 4 * 3 * 3 * 8  # of all u and v: the v of the grouped convolution
SMALLEST = 128 * 16 // 2  # what it takes to make a weight whole
LAYOUTS = {"layers/kernel": "sio", "grouped/kernel": spectral_jax.Layout("hwi(go)", groups=4)}
MESHES = {
    "inputs": ((4,), ("x",), "input"),
    "outputs": ((4,), ("x",), "output"),
    "inputs and outputs": ((2, 2), ("x", "y"), "both"),
    "copies and outputs": ((2, 2), ("x", "y"), "output y"),
}
OPTIONS = [{}, {"n_vectors": 2}, {"every_n_steps": 2}, {"mask": "kernels"}, {"bound": 0.5}]


def params():
    rng = np.random.default_rng(0)
    shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return structure.unflatten([jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes])


def spec(leaf, what):
    if leaf.ndim < 2:
        return P()
    inputs, outputs = {
        "input": ("x", None),
        "output": (None, "x"),
        "both": ("x", "y"),
        "output y": (None, "y"),
    }[what]
    return P(*[None] * (leaf.ndim - 2), inputs, outputs)


def divided(tree, name):
    shape, axes, what = MESHES[name]
    mesh = Mesh(np.array(jax.devices()).reshape(shape), axes)
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf, what))), tree
    )


def optimizer(options):
    options = dict(options)
    if "bound" in options:
        cap = spectral_jax.constrain_spectral_norm(layouts=LAYOUTS, **options)
        return optax.chain(optax.sgd(0.1, 0.9, nesterov=True), cap)
    if options.get("mask"):
        options["mask"] = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    return optax.chain(
        spectral_jax.add_spectral_norm_regularization(factor=0.1, layouts=LAYOUTS, **options),
        optax.sgd(0.1, 0.9, nesterov=True),
    )


def step_of(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_mesh_changes_no_number(name, options):
    tx = optimizer(options)
    step = step_of(tx)
    outcomes = []
    for place in (lambda tree: tree, lambda tree: divided(tree, name)):
        weights, grads = place(params()), place(jax.tree.map(jnp.cos, params()))
        state = tx.init(weights)
        for _ in range(5):
            weights, state = step(weights, state, grads)
        outcomes.append((weights, spectral_jax.sigmas(state)))
    assert len(outcomes[1][0]["dense"]["kernel"].sharding.device_set) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *outcomes)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_but_vectors_is_sent(name, options):
    tx = optimizer(options)
    weights, grads = divided(params(), name), divided(params(), name)
    program = step_of(tx).lower(weights, tx.init(weights), grads).compile().as_text()
    n_vectors = options.get("n_vectors", 1)
    sent = sizes_sent(program)
    assert max(sent, default=0) <= n_vectors * LONGEST < SMALLEST, sent
    assert sent or name != "inputs and outputs"


def sizes_sent(program):
    """Return the number of elements in each message of a compiled program."""
    sizes = []
    for line in program.splitlines():
        found = re.search(
            r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
            r"(?:-start)?\(",
            line,
        )
        if found:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes += [prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return sizes


def test_a_run_goes_on_over_another_mesh(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    tx = optimizer({"every_n_steps": 2})
    step = step_of(tx)

    def begun(name):
        weights = divided(params(), name)
        return weights, jax.jit(tx.init)(weights), divided(jax.tree.map(jnp.cos, params()), name)

    weights, state, grads = begun("inputs and outputs")
    for _ in range(3):
        weights, state = step(weights, state, grads)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": weights, "state": state})
    expected, _ = step(weights, state, grads)

    weights, state, grads = begun("outputs")
    with checkpoint.StandardCheckpointer() as checkpointer:
        kept = checkpointer.restore(tmp_path / "run", {"params": weights, "state": state})
    assert kept["params"]["dense"]["kernel"].sharding == weights["dense"]["kernel"].sharding
    resumed, _ = step(kept["params"], kept["state"], grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, resumed
    )
