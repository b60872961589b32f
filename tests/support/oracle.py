"""Algorithm 1 by hand, in NumPy: what the machines compare an adapter's programs with."""

import numpy as np

from fresh import start_of


def iteration(W, v):
    """Return σ, u and the next v of a matrix."""
    u = W @ start_of(v)
    u /= np.linalg.norm(u)
    v = W.T @ u
    sigma = np.linalg.norm(v)
    return sigma, u, v / sigma


class Matrices:
    """v, σ and u of weights by name, and how each weight is a matrix.

    ``axes`` holds the axes of a weight in the order of its matrix: rows, inputs, places. The order
    of a weight that it does not name is that of its memory.
    """

    def __init__(self, v, axes=None):
        self.v = {name: x.copy() for name, x in v.items()}
        self.axes = axes or {}
        self.sigma, self.u = {}, {}
        self.iterations = 0

    def matrix(self, name, weight):
        """Return a weight as its matrix."""
        moved = weight.transpose(self.axes.get(name, range(weight.ndim)))
        return moved.reshape(len(moved), -1)

    def iterate(self, name, weight):
        """Make one power iteration."""
        self.iterations += 1
        W = self.matrix(name, weight)
        self.sigma[name], self.u[name], self.v[name] = iteration(W, self.v[name])

    def start(self, weights):
        """Take σ and u of the start vectors, as a state does before its first step."""
        for name, v in self.v.items():
            self.sigma[name], self.u[name], _ = iteration(self.matrix(name, weights[name]), v)

    def outer(self, name, weight):
        """Return σuvᵀ in the axes of the weight."""
        term = self.sigma[name] * np.outer(self.u[name], self.v[name])
        axes = self.axes.get(name, range(weight.ndim))
        moved = term.reshape([weight.shape[axis] for axis in axes])
        return moved.transpose(np.argsort(axes))


class Oracle(Matrices):
    """Weights, their gradients and their matrices, updated by the formulas of the paper.

    A weight without a v has no term: a bias, or a weight that is left out. ``factor`` is λ: a
    number, a function of the step, or a mapping of name to either. A step that is no multiple of
    ``every`` adds the term of the last iteration.
    """

    def __init__(self, weights, v, factor, *, lr, axes=None, every=1):
        super().__init__(v, axes)
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.grads = dict.fromkeys(weights)
        self.frozen = set()
        self.factor, self.lr, self.every = factor, lr, every
        self.count = 0

    def factor_of(self, name):
        """Return λ of a weight in this step."""
        factor = self.factor[name] if isinstance(self.factor, dict) else self.factor
        return factor(self.count) if callable(factor) else factor

    def step(self, names):
        """Step on the gradients of these weights; those without one stay as they are."""
        for name in names:
            if self.grads[name] is not None:
                self.weights[name] -= self.lr * (self.grads[name] + self.term(name))
        self.count += 1

    def term(self, name):
        """Return the gradient of the penalty."""
        if name not in self.v or name in self.frozen:
            return 0.0
        weight = self.weights[name]
        if self.count % self.every == 0:
            self.iterate(name, weight)
        return self.factor_of(name) * self.outer(name, weight)


class Bound(Matrices):
    """The hard bound of the norm, with matrices of its own."""

    def scale(self, weights, names, bound):
        """Scale these of the weights in place, W ← W · min(1, bound/σ)."""
        for name in names:
            self.iterate(name, weights[name])
            scale = min(1.0, bound / self.sigma[name])
            weights[name] *= scale
            self.sigma[name] *= scale
