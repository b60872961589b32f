"""Run Algorithm 1 with SGD and Nesterov momentum on NumPy arrays: the reference for JAX."""

from functools import partial

import jax
import numpy as np

import spectral_core as sc
from fresh import start_of


def sgd(params, gradients, batches, layouts, *, factor, lr, momentum=0.9):
    """Return the parameters by path after one step for each batch, and σ of the last step.

    ``gradients(params, batch)`` returns the gradients of the loss alone. ``layouts`` names the
    weights.
    """
    penalty_gradient = jax.grad(partial(sc.penalty_at, factor=factor))
    params, traces = dict(params), dict.fromkeys(params, 0.0)
    state = sc.init({name: params[name] for name in layouts}, layouts=layouts)
    vectors = {name: V[0] for name, V in state.v.items()}
    for batch in batches:
        grads, sigma = dict(gradients(params, batch)), {}
        for name, layout in layouts.items():
            W = sc.as_matrix(params[name], layout)
            sigma[name], u, vectors[name] = sc.power_iteration(W, start_of(vectors[name]))
            term = np.asarray(penalty_gradient(*map(jax.numpy.asarray, (W, u))))
            grads[name] = grads[name] + sc.from_matrix(term, layout, params[name].shape)
        for name, grad in grads.items():
            traces[name] = momentum * traces[name] + grad
            params[name] = params[name] - lr * (momentum * traces[name] + grad)
    return params, sigma
