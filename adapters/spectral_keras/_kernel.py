"""Stateless faces: a `kernel_regularizer` and a `kernel_constraint` for one layer.

Keras calls them with the kernel alone, and gives them no place for a vector between two calls. So
each call starts from the same random vector, and iterates more often than an optimizer needs to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

import spectral_core as sc
from spectral_core.engine import as_layout, check_factor, check_power
from spectral_core.errors import check_int

from ._wrapper import full_precision


@keras.saving.register_keras_serializable(package="spectral_keras")
class SpectralNorm(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Add (λ/2)·σ² of one kernel to the loss: a ``kernel_regularizer`` without a state.

    Prefer `SpectralNormRegularizer`, which keeps its vectors from step to step: it needs one power
    iteration in a step, and this needs ``n_iter``. The value is also in the loss of an evaluation,
    as with every regularizer of Keras.

    Parameters
    ----------
    factor : float
        λ.
    layout : Layout or str, optional
        The meaning of the kernel's axes. The default is ``"io"`` for a matrix. A kernel with three
        axes or more needs one: ``"kkio"`` for `Conv2D`, ``"kkoi"`` for `Conv2DTranspose`.
    target, power
        As for `SpectralNormRegularizer`.
    n_iter : int
        Power iterations in each call, from the same start vector.
    seed : int
        Seed of the start vector.

    Raises
    ------
    spectral_core.ArgumentError
        If a number is out of its range, or ``factor`` is no number.
    spectral_core.ShapeError
        When it is called, if the kernel has three axes or more and there is no layout.

    Notes
    -----
    The gradient is λσuvᵀ: u is held constant, as in Algorithm 1. After few iterations σ is too
    small by up to a few per cent.

    Examples
    --------
    >>> import keras, numpy as np, spectral_keras
    >>> regularizer = spectral_keras.SpectralNorm(factor=0.1)
    >>> layer = keras.layers.Dense(2, kernel_regularizer=regularizer)
    >>> value = regularizer(keras.ops.convert_to_tensor(np.diag([4.0, 1.0])))
    >>> round(float(value), 4)
    0.8
    """

    def __init__(
        self,
        factor: float = 0.01,
        *,
        layout: sc.Layout | str | None = None,
        target: float = 0.0,
        power: int = 2,
        n_iter: int = 20,
        seed: int = 0,
    ) -> None:
        self.factor = _plain_number(factor, "factor")
        self.target = _plain_number(target, "target")
        self.power = check_power(power)
        self.layout = _of_a_matrix(layout)
        self.n_iter = check_int(n_iter, "n_iter")
        self.seed = check_int(seed, "seed", least=0)

    def __call__(self, x: Any) -> Any:
        """Return the penalty of a kernel."""
        x = keras.ops.convert_to_tensor(x)
        layout = _layout_of(x, self.layout, "regularizer")
        with full_precision():
            state = _iterated(x, layout, self.n_iter, self.seed)
            W = sc.as_matrix(x, layout, name="kernel")
            return sc.penalty_at(
                W, state.u["kernel"], factor=self.factor, target=self.target, power=self.power
            )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {
            "factor": self.factor,
            "layout": _as_config(self.layout),
            "target": self.target,
            "power": self.power,
            "n_iter": self.n_iter,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpectralNorm:
        """Make the regularizer that `get_config` describes."""
        return cls(**{**config, "layout": _from_config(config["layout"])})


@keras.saving.register_keras_serializable(package="spectral_keras")
class SpectralNormBound(keras.constraints.Constraint):  # type: ignore[misc]
    """Scale one kernel to σ ≤ ``bound`` after each step: a ``kernel_constraint`` without a state.

    Prefer `SpectralNormConstraint`, which keeps its vectors from step to step.

    Parameters
    ----------
    bound : float
        The largest spectral norm.
    layout, n_iter, seed
        As for `SpectralNorm`.
    normalize : bool
        Whether to scale smaller kernels up to the bound too.

    Raises
    ------
    spectral_core.ArgumentError, spectral_core.ShapeError
        As `SpectralNorm`.

    Examples
    --------
    >>> import keras, numpy as np, spectral_keras
    >>> constraint = spectral_keras.SpectralNormBound(2.0)
    >>> layer = keras.layers.Dense(2, kernel_constraint=constraint)
    >>> kernel = constraint(keras.ops.convert_to_tensor(np.diag([4.0, 1.0])))
    >>> np.round(keras.ops.convert_to_numpy(kernel), 4)
    array([[2. , 0. ],
           [0. , 0.5]])
    """

    def __init__(
        self,
        bound: float = 1.0,
        *,
        layout: sc.Layout | str | None = None,
        normalize: bool = False,
        n_iter: int = 20,
        seed: int = 0,
    ) -> None:
        self.bound = _plain_number(bound, "bound")
        self.layout = _of_a_matrix(layout)
        self.normalize = bool(normalize)
        self.n_iter = check_int(n_iter, "n_iter")
        self.seed = check_int(seed, "seed", least=0)

    def __call__(self, w: Any) -> Any:
        """Return the scaled kernel."""
        w = keras.ops.convert_to_tensor(w)
        layout = _layout_of(w, self.layout, "constraint")
        with full_precision():
            state = _iterated(w, layout, self.n_iter, self.seed)
            scaled, _ = sc.constrain(
                {"kernel": w}, state, bound=self.bound, normalize=self.normalize
            )
        return scaled["kernel"]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {
            "bound": self.bound,
            "layout": _as_config(self.layout),
            "normalize": self.normalize,
            "n_iter": self.n_iter,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpectralNormBound:
        """Make the constraint that `get_config` describes."""
        return cls(**{**config, "layout": _from_config(config["layout"])})


def _iterated(x: Any, layout: sc.Layout, n_iter: int, seed: int) -> sc.SpectralState:
    """Return σ, u and v of a kernel after so many iterations from the start vector."""
    weights = {"kernel": keras.ops.stop_gradient(x)}
    state = sc.init(weights, layouts=layout, seed=seed)
    W = sc.as_matrix(weights["kernel"], layout, name="kernel")

    def once(_: Any, v: Any) -> Any:
        return sc.power_iteration(W, v).v

    # In a loop of the backend: a loop of Python would compile each iteration anew.
    v = keras.ops.fori_loop(0, n_iter - 1, once, state.v["kernel"][..., 0, :])
    sigma, u, v = sc.power_iteration(W, v)
    return replace(state, v={"kernel": v[..., None, :]}, sigma={"kernel": sigma}, u={"kernel": u})


def _layout_of(x: Any, layout: sc.Layout | None, what: str) -> sc.Layout:
    """Return the kernel's layout; raise `ShapeError` where it would be a guess."""
    backend, shape = keras.backend.backend(), tuple(x.shape)
    if backend not in ("torch", "jax", "numpy"):
        raise sc.ArgumentError(f"the Keras backend is {backend!r}: use PyTorch or JAX")
    if layout is not None:
        return layout
    if len(shape) == 2:
        return sc.Layout("io")
    lines = {
        3: '"kio" (Conv1D) or "koi" (Conv1DTranspose)',
        4: '"kkio" (Conv2D) or "kkoi" (Conv2DTranspose)',
        5: '"kkkio" (Conv3D) or "kkkoi" (Conv3DTranspose)',
    }
    write = f"write layout={lines[len(shape)]}" if len(shape) in lines else "use it on kernels"
    raise sc.ShapeError(
        f"this {what} sees a tensor of shape {shape} without its layer, and does not guess which "
        f"axes are inputs and outputs: {write}, or use spectral_keras.SpectralNormRegularizer, "
        "which reads the layers"
    )


def _of_a_matrix(layout: sc.Layout | str | None) -> sc.Layout | None:
    """Return the layout; raise `ArgumentError` for one that needs a state."""
    found = None if layout is None else as_layout(layout)
    if isinstance(found, sc.Convolution):
        raise sc.ArgumentError(
            "layout is a Convolution, whose waves need a state between the steps: use a Layout, or "
            'spectral_keras.SpectralNormRegularizer(…, norm="operator")'
        )
    return found


def _plain_number(value: Any, name: str) -> float:
    number = None if callable(value) else check_factor(value, name)
    if isinstance(number, float):
        return number
    raise sc.ArgumentError(
        f"{name} must be a number here, not {value!r}: schedules and mappings are taken by "
        "spectral_keras.SpectralNormRegularizer and SpectralNormConstraint"
    )


def _as_config(layout: sc.Layout | None) -> list[Any] | None:
    return None if layout is None else [layout.axes, layout.groups]


def _from_config(layout: Any) -> sc.Layout | None:
    return None if layout is None else sc.Layout(*layout)
