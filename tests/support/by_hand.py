"""Algorithm 1 beside SGD with Nesterov's momentum, on NumPy arrays: what JAX must equal."""

from functools import partial

import jax
import numpy as np

import spectral_core as sc


def sgd(params, gradients, batches, layouts, *, factor, lr, momentum=0.9):
    """The parameters by path after a step for each batch, and the σ of the last one.

    ``gradients(params, batch)`` are those of the loss alone; ``layouts`` name the weights.
    """
    penalty_gradient = jax.grad(partial(sc.penalty_at, factor=factor))
    params, traces = dict(params), dict.fromkeys(params, 0.0)
    v = dict(sc.init({name: params[name] for name in layouts}, layouts=layouts).v)
    for batch in batches:
        grads, sigma = dict(gradients(params, batch)), {}
        for name, layout in layouts.items():
            W = sc.as_matrix(params[name], layout)
            sigma[name], u, v[name] = sc.power_iteration(W, v[name])
            term = np.asarray(penalty_gradient(*map(jax.numpy.asarray, (W, u))))
            grads[name] = grads[name] + sc.from_matrix(term, layout, params[name].shape)
        for name, grad in grads.items():
            traces[name] = momentum * traces[name] + grad
            params[name] = params[name] - lr * (momentum * traces[name] + grad)
    return params, sigma
