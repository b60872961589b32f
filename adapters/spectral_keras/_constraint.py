"""Bound spectral norms after each step, as a Keras optimizer around another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

import spectral_core as sc
from spectral_core.engine import Choice, Schedule, select

from ._select import Variable, Weights
from ._wrapper import OptimizerWrapper, full_precision, outside_graphs, values_of


@keras.saving.register_keras_serializable(package="spectral_keras")
class SpectralNormConstraint(OptimizerWrapper):
    r"""Let another optimizer step, and scale every weight matrix to σ ≤ ``bound``.

    .. math:: W ← W · \min(1, \text{bound}/σ)

    This is the hard bound of `spectral_core.constrain`. Unlike `keras.layers.SpectralNormalization`
    it wraps no layer, it leaves matrices with a smaller σ alone, and it knows which axes of a
    kernel are its outputs. It can be put around a `SpectralNormRegularizer`.

    Parameters
    ----------
    inner_optimizer : keras.optimizers.Optimizer or str
        The optimizer that moves the weights.
    model : keras.Model
        As for `SpectralNormRegularizer`.
    bound : number, function of the step, or mapping of path or pattern to either
        The largest spectral norm of each matrix.
    normalize : bool
        Whether to scale smaller matrices up to the bound too.
    n_iter, n_vectors, norm, warmup_iters, include, exclude, layouts, seed, name
        As for `SpectralNormRegularizer`.

    Raises
    ------
    spectral_core.NamesError, spectral_core.ArgumentError
        As `SpectralNormRegularizer`.

    Notes
    -----
    A step scales only weights with a gradient. Power iteration underestimates σ, so the true norm
    can exceed the bound slightly: see `spectral_core.constrain`. The bound is on the kernel's
    matrix, unless ``norm="operator"``: a convolution as a map of images can have a larger norm.
    Moments and averages of the inner optimizer are not scaled.

    v and σ are saved with the model. To load it, ``import spectral_keras`` first.

    Examples
    --------
    >>> import keras, numpy as np, spectral_keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="out")])
    >>> optimizer = spectral_keras.SpectralNormConstraint("sgd", model, bound=0.5)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=3, verbose=0)
    >>> bool(np.linalg.norm(model.get_weights()[0], 2) < 0.51)
    True
    """

    _numbers = ("bound",)
    _options = ("normalize", "n_iter", "n_vectors", "norm", "warmup_iters", "seed")

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        model: keras.Model | Weights,
        bound: Schedule = 1.0,
        *,
        normalize: bool = False,
        n_iter: int = 1,
        n_vectors: int = 1,
        norm: str = "flattened",
        warmup_iters: int = 15,
        include: Choice | None = None,
        exclude: Choice | None = None,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            inner_optimizer,
            model,
            n_iter=n_iter,
            n_vectors=n_vectors,
            norm=norm,
            warmup_iters=warmup_iters,
            include=include,
            exclude=exclude,
            layouts=layouts,
            seed=seed,
            name=name,
        )
        self.bound = bound
        self.normalize = bool(normalize)

    @property
    def bound(self) -> Any:
        """The largest spectral norm, as it was given, or by path; checked when it is set.

        A train step that JAX has compiled keeps the old number until `compile` is called again.
        """
        return self._get_number("bound")

    @bound.setter
    def bound(self, bound: Schedule) -> None:
        self._set_number("bound", bound)

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Let the inner optimizer apply the gradients, and scale the weights.

        Parameters
        ----------
        grads : list of tensor or None
        trainable_variables : list of keras.Variable, optional
            The variables of these gradients. The default is those passed to `build`.
        """
        variables, gradient_of = self._trained(grads, trainable_variables)
        bounds = self._at("bound", self.iterations)
        self.inner_optimizer.apply(list(grads), variables)
        weights = {
            path: variable
            for path, variable in self._weights.variables.items()
            if gradient_of.get(id(variable)) is not None
        }
        self._count_step()
        if not weights:
            return
        with full_precision():
            scaled = values_of(weights)
            arguments = scaled, select(self._state(), weights)
            options: dict[str, Any] = {
                "bound": {path: bounds[path] for path in weights},
                "normalize": self.normalize,
                "n_iter": self.n_iter,
                "engines": self._engines,
            }
            if self._in_place:
                state = outside_graphs(sc.constrain_)(*arguments, **options)
            else:
                scaled, state = sc.constrain(*arguments, **options)
        for path, variable in weights.items():
            if not self._in_place:
                self.assign(variable, scaled[path])
            self._keep(path, state)

    def _shown(self) -> dict[str, float | str]:
        return {path: f"σ ≤ {bound:.4g}" for path, bound in super()._shown().items()}
