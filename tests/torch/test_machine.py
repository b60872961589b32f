"""Random programs: a model, its optimizers and a regularizer, against Algorithm 1 in NumPy.

The rules are what users do: backward passes, steps of one of several optimizers or of one in
another thread, freezing, moving, saving and loading, new optimizers, changes of λ. After each rule
the weights, the gradients and the state must be those of the oracle.
"""

import copy
import threading
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402

from oracle import Oracle  # noqa: E402
from spectral_core.engine import ReferenceEngine  # noqa: E402
from spectral_torch import SpectralNormRegularizer  # noqa: E402
from spectral_torch.engines import TritonEngine  # noqa: E402
from spectral_torch.engines.triton_device import interpreted  # noqa: E402

LR = 0.05
SHAPES = {"a": (5, 4), "b": (5, 4), "c": (4, 2, 3, 3)}


class Machine(RuleBasedStateMachine):
    """The programs; a subclass chooses the engines."""

    options: ClassVar[dict] = {}

    @initialize(seed=st.integers(0, 2**16), factor=st.sampled_from([0.0, 0.1, 0.5]))
    def start(self, seed, factor):
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {
            name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for name, shape in SHAPES.items()
        }
        layouts = {"c": "oikk"}
        self.reg = SpectralNormRegularizer(
            self.parameters, factor, layouts=layouts, warmup_iters=3, **self.options
        )
        self.choose_engines()
        self.optimizers = {"ab": self.sgd("ab"), "c": self.sgd("c"), "b": self.sgd("b")}
        self.reg.attach(*self.optimizers.values())
        v = {name: self.reg.state_dict()[f"{name}.v"][0].numpy() for name in SHAPES}
        weights = {name: p.detach().numpy() for name, p in self.parameters.items()}
        self.oracle = Oracle(weights, v, factor, lr=LR)
        self.saved = None

    def choose_engines(self):
        """Leave the engines as they are."""

    def sgd(self, names):
        return torch.optim.SGD([self.parameters[name] for name in names], lr=LR)

    @rule(seed=st.integers(0, 2**16), names=st.sets(st.sampled_from("abc"), min_size=1))
    def backward(self, seed, names):
        """Accumulate, as a backward pass does."""
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(names):
            grad = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
            if name in self.oracle.frozen:
                continue
            (self.parameters[name] * grad).sum().backward()
            old = self.oracle.grads[name]
            self.oracle.grads[name] = grad.numpy() + (0.0 if old is None else old)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=to_none)
        for name, grad in self.oracle.grads.items():
            self.oracle.grads[name] = None if to_none or grad is None else 0.0 * grad

    @rule(which=st.sampled_from(["ab", "c", "b"]), in_thread=st.booleans())
    def step(self, which, in_thread):
        if in_thread:
            thread = threading.Thread(target=self.optimizers[which].step)
            thread.start()
            thread.join()
        else:
            self.optimizers[which].step()
        self.oracle.step(which)

    @rule()
    def two_threads(self):
        """Step the two optimizers that share no weight at the same time."""
        threads = [threading.Thread(target=self.optimizers[k].step) for k in ("ab", "c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.oracle.step("ab")
        self.oracle.step("c")

    @rule(name=st.sampled_from("abc"))
    def freeze_or_thaw(self, name):
        self.oracle.frozen ^= {name}
        self.parameters[name].requires_grad_(name not in self.oracle.frozen)

    @rule(factor=st.sampled_from([0.0, 0.2, 0.4]), tensor=st.booleans())
    def set_factor(self, factor, tensor):
        self.reg.factor = torch.tensor(factor, dtype=torch.float64) if tensor else factor
        self.oracle.factor = factor

    @rule(which=st.sampled_from(["ab", "c", "b"]))
    def make_the_optimizer_anew(self, which):
        self.reg.detach(self.optimizers[which])
        self.optimizers[which] = self.sgd(which)
        self.reg.attach(self.optimizers[which])

    @rule(name=st.sampled_from("abc"))
    def move_the_storage(self, name):
        """As offloading and loading a model do."""
        self.parameters[name].data = self.parameters[name].data.clone()

    @rule()
    def step_on_a_shared_gradient(self):
        """Give two weights one tensor, as `torch.autograd.grad` can."""
        grad = self.oracle.grads["a"]
        if grad is not None and not self.oracle.frozen & {"a", "b"}:
            self.parameters["b"].grad = self.parameters["a"].grad
            self.oracle.grads["b"] = grad.copy()
            self.optimizers["ab"].step()
            self.oracle.step("ab")

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.reg.state_dict())
        self.saved_v = {name: v.copy() for name, v in self.oracle.v.items()}

    @rule()
    def load(self):
        if self.saved is not None:
            self.reg.load_state_dict(self.saved)
            self.oracle.v = {name: v.copy() for name, v in self.saved_v.items()}
            self.oracle.sigma = {}

    @rule(differentiable=st.booleans())
    def ask(self, differentiable):
        """Asking changes nothing."""
        self.reg.penalty(differentiable=differentiable)
        self.reg.sigmas(), repr(self.reg), self.reg.state_dict()

    @invariant()
    def all_is_that_of_the_oracle(self):
        if not hasattr(self, "oracle"):
            return
        for name, p in self.parameters.items():
            np.testing.assert_allclose(p.detach(), self.oracle.weights[name], rtol=1e-8, atol=1e-9)
            grad = self.oracle.grads[name]
            assert (p.grad is None) == (grad is None)
            if grad is not None:
                np.testing.assert_allclose(p.grad, grad, rtol=1e-7, atol=1e-9)
            v = self.reg._state.v[name][0]
            np.testing.assert_allclose(v, self.oracle.v[name], rtol=1e-8, atol=1e-9)
        for name, sigma in self.oracle.sigma.items():
            assert float(self.reg._state.sigma[name]) == pytest.approx(sigma, rel=1e-8)


class Plain(Machine):
    options: ClassVar[dict] = {"kernels": False}


class Counting(TritonEngine):
    """Triton's engine without another to fall back on. It counts its iterations."""

    def __init__(self):
        super().__init__()
        self.iterations = 0
        self.lock = threading.Lock()

    def run(self, jobs, n_iter):
        with self.lock:  # Triton's interpreter changes its own modules while a kernel runs
            # Without an iteration, a term is taken out of the gradients again.
            self.iterations += len(jobs) * n_iter
            return super().run(jobs, n_iter)


class Never(ReferenceEngine):
    """An engine that no job should reach."""

    def run(self, jobs, n_iter):
        assert not jobs, f"{[one.name for one in jobs]} should go through the kernels"
        return super().run(jobs, n_iter)


class Interpreted(Machine):
    """The programs with Triton's kernels, which its interpreter runs on the CPU."""

    def choose_engines(self):
        self.kernels = Counting()
        self.reg._jobs.engines = self.kernels, Never(in_place=True)

    @invariant()
    def each_iteration_was_one_of_the_kernels(self):
        if hasattr(self, "oracle"):
            assert self.kernels.iterations == self.oracle.iterations


def runs(machine, condition, reason, **options):
    """Return the test of a machine, which is skipped unless the condition holds."""
    machine.TestCase.settings = settings(**options)
    return pytest.mark.skipif(not condition, reason=reason)(machine.TestCase)


INTERPRETED = interpreted() and not torch.cuda.is_available()
NO_KERNELS = "the interpreter is for Triton's kernels"
TestCompiled = runs(Machine, not INTERPRETED, NO_KERNELS, stateful_step_count=25)
TestPlain = runs(Plain, not INTERPRETED, NO_KERNELS, stateful_step_count=25)
# The interpreter takes 50 ms for a step, so the profile does not choose the number of examples.
TestInterpreted = runs(
    Interpreted,
    INTERPRETED,
    "runs in the process of test_triton.py's interpreter",
    stateful_step_count=25,
    max_examples=60,
)
pytestmark = pytest.mark.filterwarnings("ignore::spectral_core.SpectralWarning")
