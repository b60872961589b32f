"""Each adapter's `Watch` logs the numbers of an SVD, and never waits for a busy device."""

import math
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import spectral_core as sc
from backends import get, on, svd_norm

SHAPES = {"in": (12, 8), "out": (6, 9)}


class Log(list):
    def __call__(self, values, step):
        self.append((step, values))


def weights_at(step):
    """Return matrices close to 1 + step in every entry: a few iterations find σ."""
    rng = np.random.default_rng(0)
    return {
        name: (1 + step) * (1 + 0.2 * rng.standard_normal(shape)) for name, shape in SHAPES.items()
    }


def assert_logged(log, steps, factor):
    assert [step for step, _ in log] == steps
    for step, values in log:
        sigma = {name: float(svd_norm(weight)) for name, weight in weights_at(step).items()}
        expected = {f"spectral/sigma/{name}": value for name, value in sigma.items()}
        expected["spectral/log10_sigma_product"] = math.log10(sigma["in"] * sigma["out"])
        expected["spectral/penalty"] = factor / 2 * (sigma["in"] ** 2 + sigma["out"] ** 2)
        assert values == pytest.approx(expected, rel=1e-5)


class Torch:
    """A regularizer whose weights are set by hand, and its watch."""

    def __init__(self, backend, log):
        import torch

        import spectral_torch

        self.torch, self.backend = torch, backend
        self.weights = {
            name: torch.nn.Parameter(weight)
            for name, weight in backend.tree(weights_at(0), "float32").items()
        }
        factor = backend.asarray(np.array(0.1), "float32")
        self.reg = spectral_torch.SpectralNormRegularizer(self.weights.items(), factor=factor)
        self.watch = spectral_torch.Watch(log, every_n_steps=2)

    def step(self, number):
        with self.torch.no_grad():
            for name, weight in self.backend.tree(weights_at(number), "float32").items():
                self.weights[name].copy_(weight)
        self.reg.iterate_(15)

    def look(self, number):
        self.watch(self.reg, number)

    @contextmanager
    def no_wait(self):
        if self.backend.name == "torch-cpu":
            yield
            return
        self.torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.torch.cuda.set_sync_debug_mode("default")

    def keep_busy(self):
        self.torch.cuda._sleep(4_000_000_000)  # cycles: a second or more

    def is_busy(self):
        return not self.torch.cuda.current_stream().query()

    def await_device(self):
        self.torch.cuda.synchronize()


class Jax:
    """An optimizer state, updated in a compiled step that can be made slow."""

    def __init__(self, backend, log):
        import jax
        import jax.numpy as jnp

        import spectral_jax

        self.jax, self.backend = jax, backend
        self.tx = spectral_jax.add_spectral_norm_regularization(
            factor=lambda count: 0.1 + 0 * count, n_iter=15, layouts={"*": "io"}
        )
        self.state = self.tx.init(backend.tree(weights_at(0), "float32"))
        self.watch = spectral_jax.Watch(log, factor=lambda count: 0.1 + 0 * count, every_n_steps=2)

        products = {"jax-cpu": 30, "jax-gpu": 20_000}[backend.name]  # seconds

        @jax.jit
        def long(weights):
            x = jnp.ones((1000, 1000)) + jnp.eye(1000)
            x = jax.lax.fori_loop(0, products, lambda _, x: x @ x / jnp.linalg.norm(x), x)
            return jax.tree.map(lambda weight: weight + 0 * x[0, 0].astype(weight.dtype), weights)

        @jax.jit
        def update(weights, state):
            return self.tx.update(weights, state, weights)[1]

        self.long, self.update = long, update

    def step(self, number):
        weights = self.backend.tree(weights_at(number), "float32")
        self.state = self.update(weights, self.state)

    def look(self, number):
        self.watch(self.state, number)

    def no_wait(self):
        return self.jax.transfer_guard_device_to_host("disallow")


class CuPy:
    """The core's state of arrays on the GPU, and the adapter's watch."""

    def __init__(self, backend, log):
        import cupy

        import spectral_cupy

        self.cupy, self.backend, self.gate = cupy, backend, threading.Event()
        factor = backend.asarray(np.array(0.1), "float32")
        self.state = spectral_cupy.init(backend.tree(weights_at(0), "float32"))
        self.watch = spectral_cupy.Watch(log, factor=factor, every_n_steps=2)

    def step(self, number):
        weights = self.backend.tree(weights_at(number), "float32")
        self.state = sc.iterate(weights, self.state, n_iter=15)

    def look(self, number):
        self.watch(self.state, number)

    @contextmanager
    def no_wait(self):
        yield

    def keep_busy(self):
        stream = self.cupy.cuda.get_current_stream()
        stream.launch_host_func(lambda _: self.gate.wait(timeout=20), None)

    def is_busy(self):
        return not self.cupy.cuda.get_current_stream().done

    def await_device(self):
        self.gate.set()
        self.cupy.cuda.Device().synchronize()


LOOPS = {"torch": Torch, "jax": Jax, "cupy": CuPy}


@on("torch-cpu", "torch-cuda", "jax-cpu", "jax-gpu", "cupy")
def test_due_steps_are_logged_with_their_numbers(backend):
    log = Log()
    loop = LOOPS[backend.module](backend, log)
    for number in range(5):
        loop.step(number)
        with loop.no_wait():
            loop.look(number)
    loop.watch.close()
    assert_logged(log, [0, 2, 4], 0.1)


@on("torch-cuda", "cupy")
def test_watch_does_not_wait_for_a_busy_gpu(backend):
    log = Log()
    loop = LOOPS[backend.module](backend, log)
    loop.step(0)
    loop.look(0)
    loop.watch.flush()  # pinned memory exists from here on: allocating it may wait
    loop.step(2)
    loop.keep_busy()
    with loop.no_wait():
        loop.look(2)
        loop.look(3)
    assert loop.is_busy()  # a wait would have ended only when the device was idle
    assert [step for step, _ in log] == [0]
    loop.await_device()
    loop.look(5)
    assert_logged(log, [0, 2], 0.1)


@pytest.mark.parametrize("name", ["jax-cpu", "jax-gpu"])
def test_watch_does_not_wait_for_a_pending_step(name):
    log = Log()
    loop = Jax(get(name), log)
    loop.step(0)
    loop.look(0)
    loop.watch.flush()
    loop.state = loop.state._replace(sigma=loop.long(loop.state.sigma))
    loop.look(2)
    loop.look(3)
    assert [step for step, _ in log] == [0]
    assert not loop.state.sigma["in"].is_ready()  # else the test would prove nothing
    loop.watch.flush()
    assert [step for step, _ in log] == [0, 2]
    assert log[1][1] == log[0][1]


def test_traced_state_raises():
    loop = Jax(get("jax-cpu"), print)
    with pytest.raises(sc.ArgumentError, match="between jitted steps"):
        loop.jax.jit(lambda state: loop.watch(state, 0))(loop.state)


def test_schedule_is_read_at_the_step_that_was_made():
    log = Log()
    loop = Jax(get("jax-cpu"), log)
    loop.watch.factor, loop.watch.every_n_steps = lambda count: 0.1 * (count + 1), 1
    for number in range(3):
        loop.step(number)
        loop.look(number)
    loop.watch.flush()
    for step, values in log:
        squares = sum(svd_norm(weight) ** 2 for weight in weights_at(step).values())
        assert values["spectral/penalty"] == pytest.approx(0.05 * (step + 1) * squares, rel=1e-5)
