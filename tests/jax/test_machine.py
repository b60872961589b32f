"""Random programs: an optax chain with the regularizer or the bound, against Algorithm 1 in NumPy.

The rules are what users do: steps, compiled or not, scanned or with donated buffers, weights
without an update, changes of λ, saving and loading, and moves to the host. After each rule the
parameters and the state must be those of the oracle.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402
from backends import get  # noqa: E402
from oracle import Bound, Oracle  # noqa: E402
from spectral_jax import add_spectral_norm_regularization, constrain_spectral_norm  # noqa: E402

LR = 0.05
SHAPES = {"a": (5, 4), "b": (5, 4), "c": (2, 2, 2, 4), "bias": (4,)}
AXES = {"a": (1, 0), "b": (1, 0), "c": (3, 2, 0, 1)}
LAYOUTS = {"c": "kkio"}
NAMES = tuple(SHAPES)
SCANNED = 3
LEAVES_OUT_B = {"a": True, "b": False, "c": True, "bias": False}


def halving(count):
    return 0.6 / (count + 1)


def growing(count):
    return 0.1 * (count % 5)


def tightening(count):
    return 8.0 / (count + 2)


@dataclass(frozen=True, eq=False)
class Setup:
    """Options of the transformations, and what the oracle needs to know of them."""

    factor: Any
    options: dict[str, Any] = field(default_factory=dict)
    static: tuple[str, ...] = ()  # of `optax.inject_hyperparams`, around the regularizer
    bound: Callable[[int], float] | None = None
    left_out: tuple[str, ...] = ()  # without a term
    still: tuple[str, ...] = ()  # with updates of zero: iterated, but not moved

    def regularizer(self):
        make = add_spectral_norm_regularization
        if self.static:
            make = optax.inject_hyperparams(make, static_args=self.static)
        return make(self.factor, layouts=LAYOUTS, **self.options)

    def transformation(self):
        parts = [self.regularizer(), optax.sgd(LR)]
        if self.still:
            parts.append(optax.masked(optax.set_to_zero(), {n: n in self.still for n in NAMES}))
        if self.bound:
            parts.append(constrain_spectral_norm(self.bound, layouts=LAYOUTS))
        return optax.chain(*parts)


INJECTED = ("n_vectors", "seed")
FEW = {
    "injected, a mask, every third step, bounded": Setup(
        np.float64(0.3),
        {"every_n_steps": 3, "mask": LEAVES_OUT_B},
        static=("mask", "n_iter", "power", "every_n_steps", *INJECTED),
        bound=tightening,
        left_out=("b",),
    ),
}
MORE = {
    "a number": Setup(0.3, still=("b",)),
    "schedules by name": Setup({"a": halving, "b": 0.2, "c": growing}),
    "by pattern, every third step": Setup({"c": halving, "*": 0.2}, {"every_n_steps": 3}),
    "injected, every second step": Setup(np.float64(0.3), {"every_n_steps": 2}, static=INJECTED),
    "a schedule, bounded": Setup(growing, bound=tightening),
    "a mask": Setup(halving, {"mask": LEAVES_OUT_B}, left_out=("b",)),
}


@cache
def functions(setup):
    """Return the first state, a step, the step compiled, and several steps in a scan.

    They are made once for all examples, as XLA compiles each for a second.
    """
    tx = setup.transformation()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        moved = jax.tree.map(
            lambda p, u: p if u is None or isinstance(u, optax.MaskedNode) else p + u,
            params,
            updates,
            is_leaf=lambda x: x is None,
        )
        return moved, state

    def scanned(params, state, grads):
        def body(carry, grads):
            return step(*carry, grads), None

        return jax.lax.scan(body, (params, state), grads)[0]

    donating = jax.jit(step, donate_argnums=(0, 1))
    init, scanned = jax.jit(tx.init), jax.jit(scanned)
    return {"init": init, "eager": step, "donating": donating, "scanned": scanned}


def by_pickle(tree):
    return pickle.loads(pickle.dumps(tree))


def by_flax(tree):
    serialization = pytest.importorskip("flax.serialization")
    like = jax.tree.map(np.zeros_like, tree)
    return serialization.from_bytes(like, serialization.to_bytes(tree))


def by_numpy(tree):
    return jax.tree.map(np.array, tree)


def by_copies(tree):
    return jax.tree.map(jnp.array, tree)


WAYS = {
    "none": lambda tree: tree,
    "pickle": by_pickle,
    "flax": by_flax,
    "numpy": by_numpy,
    "copies": by_copies,
}
SEEDS, ANY_WAY = st.integers(0, 2**16), st.sampled_from(list(WAYS))


class Machine(RuleBasedStateMachine):
    """The programs; a subclass chooses the setups."""

    setups: ClassVar[dict] = FEW

    @initialize(place=st.integers(0, 2**10), seed=SEEDS)
    def start(self, place, seed):
        get("jax-cpu")
        self.setup = list(self.setups.values())[place % len(self.setups)]
        self.functions = functions(self.setup)
        weights = {n: np.random.default_rng(seed).standard_normal(s) for n, s in SHAPES.items()}
        self.params = jax.tree.map(jnp.array, weights)
        self.state = self.functions["init"](self.params)
        v = {name: np.array(V[0]) for name, V in self.nodes()[0].v.items()}
        assert v.keys() == {"a", "b", "c"} - set(self.setup.left_out)
        every = self.setup.options.get("every_n_steps", 1)
        factor = self.setup.factor
        if isinstance(factor, dict):
            factor = {name: factor.get(name, factor.get("*")) for name in v}
        self.oracle = Oracle(weights, v, factor, lr=LR, axes=AXES, every=every)
        self.oracle.start(weights)
        self.bound = None
        if self.setup.bound:
            v = {name: np.array(V[0]) for name, V in self.nodes()[1].v.items()}
            self.bound = Bound(v, AXES)
        self.saved = None

    def nodes(self):
        """Return the states of the regularizer and the bound."""

        def is_ours(node):
            return isinstance(node, spectral_jax.SpectralNormState)

        found = [x for x in jax.tree.leaves(self.state, is_leaf=is_ours) if is_ours(x)]
        return sorted(found, key=lambda node: isinstance(node, spectral_jax.SpectralBoundState))

    def oracle_step(self, grads):
        self.oracle.grads = grads
        bound = self.setup.bound and self.setup.bound(self.oracle.count)
        before = {name: self.oracle.weights[name].copy() for name in self.setup.still}
        self.oracle.step(NAMES)
        self.oracle.weights |= before
        if self.bound:
            moved = [name for name in self.bound.v if grads[name] is not None]
            self.bound.scale(self.oracle.weights, moved, bound)

    def step(self, how, seed, without, way):
        draw = np.random.default_rng(seed).standard_normal
        grads = {name: draw(s) for name, s in SHAPES.items()}
        given = jax.tree.map(jnp.array, grads)
        if without:
            grads["a"] = grads["bias"] = None
            given |= {"a": None, "bias": optax.MaskedNode()}
        self.params, self.state = self.functions[how](*self.through(way), given)
        self.oracle_step(grads)

    def through(self, way):
        """Return a copy of all arrays, as after a restart."""
        return WAYS[way]((self.params, self.state))

    @rule(seed=SEEDS, without=st.booleans(), way=ANY_WAY)
    def eager_step(self, seed, without, way):
        """Step, where some weights may have no update."""
        self.step("eager", seed, without, way)

    @rule(seed=SEEDS, way=ANY_WAY)
    def compiled_step(self, seed, way):
        """Step in one compiled function, which takes the memory of its arguments."""
        self.step("donating", seed, False, way)

    @rule(seed=SEEDS, way=ANY_WAY)
    def scan(self, seed, way):
        """Take several steps in one compiled loop."""
        draw = np.random.default_rng(seed).standard_normal
        grads = {name: draw((SCANNED, *s)) for name, s in SHAPES.items()}
        given = jax.tree.map(jnp.array, grads)
        self.params, self.state = self.functions["scanned"](*self.through(way), given)
        for i in range(SCANNED):
            self.oracle_step({name: g[i] for name, g in grads.items()})

    @precondition(lambda self: self.setup.static)
    @rule(factor=st.sampled_from([0.0, 0.2, 0.4]))
    def set_factor(self, factor):
        hyperparams = self.state[0].hyperparams
        hyperparams["factor"] = jnp.asarray(factor, hyperparams["factor"].dtype)
        self.oracle.factor = factor

    @rule(way=ANY_WAY.filter(lambda way: way != "none"))
    def save(self, way):
        self.saved = self.through(way), copy.deepcopy((self.oracle, self.bound))

    @rule()
    def load(self):
        """Go back to what was saved."""
        if self.saved is not None:
            # Copies, as the next step may take their memory.
            (params, state), oracles = self.saved
            self.params, self.state = jax.tree.map(jnp.array, (params, state))
            self.oracle, self.bound = copy.deepcopy(oracles)

    @rule()
    def ask(self):
        """Asking changes nothing."""
        spectral_jax.sigmas(self.state)
        spectral_jax.summary(self.state, self.params, factor=0.1, layouts=LAYOUTS)

    @invariant()
    def all_is_that_of_the_oracle(self):
        if not hasattr(self, "oracle"):
            return
        for name, weight in self.oracle.weights.items():
            np.testing.assert_allclose(self.params[name], weight, rtol=1e-8, atol=1e-9)
        for node, expected in zip(
            self.nodes(), filter(None, (self.oracle, self.bound)), strict=True
        ):
            assert int(node.count) == self.oracle.count
            assert node.v.keys() == node.sigma.keys() == expected.v.keys()
            for name, v in expected.v.items():
                np.testing.assert_allclose(node.v[name][0], v, rtol=1e-8, atol=1e-9)
            for name, sigma in expected.sigma.items():
                assert float(node.sigma[name]) == pytest.approx(sigma, rel=1e-8)


class More(Machine):
    """The same with other options."""

    setups: ClassVar[dict] = MORE

    @rule(seed=SEEDS, way=ANY_WAY)
    def compiled_step_without_some_updates(self, seed, way):
        self.step("donating", seed, True, way)

    @rule()
    def ask_for_the_penalty(self):
        spectral_jax.penalty(self.params, self.state, factor=0.1, layouts=LAYOUTS)


TestMachine, TestMore = Machine.TestCase, pytest.mark.thorough(More.TestCase)
TestMachine.settings = TestMore.settings = settings(stateful_step_count=12)
pytestmark = pytest.mark.filterwarnings("ignore::spectral_core.SpectralWarning")
