"""Random programs: a Keras model and its optimizer, against Algorithm 1 in NumPy.

`test_optimizer.py` runs this for each backend of Keras, each in its own process. The rules are what
users do: steps by hand, compiled or of `train_on_batch`, frozen layers, changes of λ, saving and
loading. After each rule the weights and the optimizer's state must be those of the oracle.
"""

import copy
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from keras import layers as kl

import spectral_core as sc
from oracle import Oracle
from spectral_keras import SpectralNormRegularizer

TORCH = keras.backend.backend() == "torch"
LR = 0.125  # a float32 in Keras
WARMUP = 2
SEED = 5


@keras.saving.register_keras_serializable(package="tests")
def rising(step):
    return 0.0625 * (step + 1.0)


FACTORS = (0.0, 0.25, rising, {"hidden": 0.5, "out": rising}, {"*": 0.125})


def factor_of(factor, name):
    """Return the entry of a mapping for a weight."""
    if isinstance(factor, dict):
        return factor.get("*", factor.get(name.split("/")[0]))
    return factor


def name_of(path):
    """Return the path without the model's name, which Keras leaves out in a loaded model."""
    return "/".join(path.split("/")[-2:])


def value(variable):
    return np.array(keras.ops.convert_to_numpy(variable.value))


class Machine(RuleBasedStateMachine):
    """The programs."""

    @initialize(
        seed=st.integers(0, 2**16), factor=st.sampled_from(FACTORS), every=st.sampled_from([1, 3])
    )
    def start(self, seed, factor, every):
        keras.utils.clear_session(free_memory=False)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        layers = [kl.Dense(4, name="hidden"), kl.Dense(3, name="out")]
        self.model = keras.Sequential([keras.Input((5,)), *layers], name="net")
        draw = np.random.default_rng(seed).standard_normal
        self.model.set_weights([draw(variable.shape) for variable in self.model.weights])
        self.every = every
        self.make(factor)
        self.saved = None

    def make(self, factor):
        """Compile the model with a new optimizer, and draw its start vectors by hand."""
        self.optimizer = SpectralNormRegularizer(
            keras.optimizers.SGD(LR),
            self.model,
            factor,
            every_n_steps=self.every,
            warmup_iters=WARMUP,
            seed=SEED,
        )
        self.optimizer.build(self.model.trainable_variables)
        self.compile()
        self.factor = factor
        weights = {name_of(x.path): value(x) for x in self.model.weights}
        v = {
            name_of(x.path): sc.start_vector(x.shape[:1], value(x), seed=SEED, name=x.path)
            for x in self.model.trainable_variables
            if len(x.shape) == 2
        }
        self.oracle = Oracle(
            weights,
            v,
            {name: factor_of(factor, name) for name in v},
            lr=LR,
            axes=dict.fromkeys(v, (1, 0)),
            every=self.every,
        )
        for _ in range(WARMUP):
            for name in v:
                self.oracle.iterate(name, weights[name])

    def compile(self):
        self.model.compile(self.optimizer, loss="mse")
        self.compiled = None

    def draw(self, seed):
        """Return gradients of the trained variables."""
        draw = np.random.default_rng(seed).standard_normal
        return {name_of(x.path): draw(x.shape) for x in self.model.trainable_variables}

    def oracle_step(self, grads):
        self.oracle.grads = {name: grads.get(name) for name in self.oracle.weights}
        self.oracle.step(self.oracle.weights)

    @rule(
        seed=st.integers(0, 2**16),
        without=st.sampled_from([None, "hidden", "out"]),
        none=st.booleans(),
    )
    def apply(self, seed, without, none):
        """Step on the gradients of all layers but one: its gradients are None, or not there."""
        grads = self.draw(seed)
        if without and len(self.oracle.v) > 1:
            grads = {name: grad for name, grad in grads.items() if not name.startswith(without)}
        variables = [x for x in self.model.trainable_variables if none or name_of(x.path) in grads]
        found = [grads.get(name_of(x.path)) for x in variables]
        given = [None if grad is None else keras.ops.convert_to_tensor(grad) for grad in found]
        self.optimizer.apply(given, variables)
        self.oracle_step(grads)

    @rule(seed=st.integers(0, 2**16))
    def stateless_apply(self, seed):
        """Step as a training loop of JAX does: compiled there."""
        grads = self.draw(seed)
        if self.compiled is None:
            self.compiled = self.optimizer.stateless_apply
            if not TORCH:
                import jax

                self.compiled = jax.jit(self.compiled)
        variables, weights = self.optimizer.variables, self.model.trainable_variables
        after = self.compiled(
            [variable.value for variable in variables],
            [keras.ops.convert_to_tensor(grad) for grad in grads.values()],
            [variable.value for variable in weights],
        )
        for group, new in zip((weights, variables), after, strict=True):
            for variable, x in zip(group, new, strict=True):
                variable.assign(x)
        self.oracle_step(grads)

    @rule(seed=st.integers(0, 2**16))
    def train_on_batch(self, seed):
        draw = np.random.default_rng(seed).standard_normal
        x, y = draw((6, 5)), draw((6, 3))
        weights = self.oracle.weights
        W, b, V, c = weights.values()
        h = x @ W + b
        d = 2 * (h @ V + c - y) / y.size
        e = d @ V.T
        grads = dict(zip(weights, (x.T @ e, e.sum(0), h.T @ d, d.sum(0)), strict=True))
        trained = {name_of(x.path) for x in self.model.trainable_variables}
        self.model.train_on_batch(x, y)
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.oracle_step({name: grads[name] for name in trained})

    @rule(name=st.sampled_from(["hidden", "out"]), factor=st.sampled_from(FACTORS))
    def freeze_or_thaw(self, name, factor):
        """Freeze or thaw a layer: Keras asks for a new optimizer then."""
        layer = self.model.get_layer(name)
        others = [other for other in self.model.layers if other is not layer and other.trainable]
        if others:
            layer.trainable = not layer.trainable
            frozen = {other.name for other in self.model.layers if not other.trainable}
            whole = not (isinstance(factor, dict) and frozen)
            self.make(factor if whole else 0.5)

    @rule(factor=st.sampled_from(FACTORS))
    def set_factor(self, factor):
        if isinstance(factor, dict) and len(self.oracle.v) < 2:
            return
        self.optimizer.factor = factor
        self.oracle.factor = {name: factor_of(factor, name) for name in self.oracle.v}
        self.compile()  # a compiled step keeps the old one

    @rule()
    def save_and_load_the_model(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            self.model.save(path)
            self.model = keras.saving.load_model(path)
        self.optimizer, self.compiled = self.model.optimizer, None
        self.saved = None  # of the old variables

    @rule()
    def go_on_with_another_optimizer(self):
        """Make it of its config and variables."""
        store = {}
        self.optimizer.save_own_variables(store)
        store = {key: np.array(x) for key, x in store.items()}
        self.optimizer = SpectralNormRegularizer.from_config(self.optimizer.get_config())
        self.optimizer.build(self.model.trainable_variables)
        self.optimizer.load_own_variables(store)
        self.compile()

    @rule()
    def ask(self):
        """Asking changes nothing."""
        self.optimizer.penalty(), self.optimizer.sigmas(), self.optimizer.get_config()
        str(self.optimizer.summary()), repr(self.optimizer)

    @rule()
    def save(self):
        store = {}
        self.optimizer.save_own_variables(store)
        store = {key: np.array(x) for key, x in store.items()}
        self.saved = self.optimizer, store, self.model.get_weights(), copy.deepcopy(self.oracle)

    @rule()
    def load(self):
        """Go back to what was saved of the same optimizer, with the λ of now."""
        if self.saved is not None and self.saved[0] is self.optimizer:
            _, store, weights, oracle = self.saved
            self.optimizer.load_own_variables(store)
            self.model.set_weights(weights)
            factor, self.oracle = self.oracle.factor, copy.deepcopy(oracle)
            self.oracle.factor = factor

    @invariant()
    def all_is_that_of_the_oracle(self):
        if not hasattr(self, "oracle"):
            return
        close = {"rtol": 1e-6, "atol": 1e-6}  # Keras multiplies float64 in float32
        for variable in self.model.weights:
            expected = self.oracle.weights[name_of(variable.path)]
            np.testing.assert_allclose(value(variable), expected, **close)
        found = {name_of(path): value(v)[0] for path, v in self.optimizer._v.items()}
        assert found.keys() == self.oracle.v.keys()
        for name, v in self.oracle.v.items():
            np.testing.assert_allclose(found[name], v, **close)
        for path, sigma in self.optimizer.sigmas().items():
            assert float(sigma) == pytest.approx(self.oracle.sigma[name_of(path)], rel=1e-6)
        assert int(self.optimizer.iterations) == self.oracle.count


TestMachine = Machine.TestCase
# JAX compiles the steps of each optimizer anew.
TestMachine.settings = settings(
    stateful_step_count=12, max_examples=settings().max_examples // (2 if TORCH else 6)
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::spectral_core.SpectralWarning"),
    pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning"),
]
