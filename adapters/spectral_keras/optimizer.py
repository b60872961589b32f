"""Algorithm 1 as a Keras optimizer around another one.

A `keras.regularizers.Regularizer` sees one variable and no place to keep its v, which would leak
out of the JAX trainer's stateless scopes, be left out of checkpoints, and count in evaluation's
loss; a callback cannot change gradients. The variables of an optimizer are tracked, saved and
threaded through a compiled step on each backend, and it is given the gradients: so, as
`keras.optimizers.LossScaleOptimizer` does, this stands around the one that moves the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from spectral_core.patterns import by_name
from spectral_core.penalty import check_factor, check_power, factors_of

import spectral_core as sc
from spectral_core.errors import checked_int

from .selection import Choice, Variable, Weights, choose


@keras.saving.register_keras_serializable(package="spectral_keras")
class SpectralNormRegularizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Add λσuvᵀ to the gradient of every weight matrix, and let another optimizer step.

    Minimizes :math:`L + \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2` by Algorithm 1 of Yoshida & Miyato (2017),
    on the PyTorch and JAX backends of Keras.

    Parameters
    ----------
    inner_optimizer : keras.optimizers.Optimizer
        The one that moves the weights. Its learning rate, weight decay, clipping, averages and
        accumulation work as without this; ``learning_rate`` and ``iterations`` are its own.
    model : keras.Model
        What to regularize, built: the kernels of its dense, einsum-dense (and so attention),
        convolution and recurrent layers, not embeddings, norms and biases.
    factor : float, `keras.optimizers.schedules.LearningRateSchedule`, or mapping of path or pattern
        λ; a schedule is called with the number of the step. A mapping holds one of the first two
        for each weight: ``{"*conv*": 0.05, "*": 0.01}``.
    n_iter : int
        Power iterations a step.
    n_vectors : int
        How many vectors to iterate with for each matrix (`spectral_core.block_iteration`).
    include : str, iterable of str, or callable, optional
        Paths (``variable.path``) or shell patterns (``"*head/*"``) of the variables to regularize
        instead of the default ones, or ``include(path, variable) -> bool``.
    exclude : str, iterable of str, or callable, optional
        Of those, the ones to leave out.
    layouts : mapping of path or pattern to `spectral_core.Layout` or str, optional
        What the axes of a variable are where its layer does not tell, or tells otherwise. What is
        named here is regularized, if the default would leave it out.
    seed : int
        Of the start vectors, which depend on it and on the paths alone. (Keras goes on numbering
        layers without a name from model to model, until `keras.utils.clear_session` is called.)
    target : float
        The σ below which a matrix is left alone: the penalty is the hinge
        (λ/2)·Σ max(0, σ − target)².
    power : int
        2, or 1 for the penalty λ·Σ max(0, σ − target).
    name : str, optional
        The optimizer's.

    Raises
    ------
    spectral_core.NamesError
        If a pattern matches nothing, or nothing is left to regularize.
    spectral_core.ArgumentError
        If a number is out of its range, the backend is another, or the inner optimizer is one
        that scales the loss.

    Notes
    -----
    The inner optimizer's ``clipnorm``, ``global_clipnorm`` and ``clipvalue`` clip after the term
    is added. With its ``gradient_accumulation_steps`` each batch iterates, and the mean of their
    terms is added. Under a ``mixed_float16`` policy, ``compile`` puts the `LossScaleOptimizer`
    around this one, and so do so by hand: the gradients are unscaled then, and a step that is
    skipped changes no v. Weights of frozen layers are left out: as always in Keras, compile
    again, with a new optimizer, after ``trainable`` has changed.

    v and σ are saved with the model. To load it, ``import spectral_keras`` first.

    Examples
    --------
    >>> import keras, numpy as np, spectral_keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="out")])
    >>> optimizer = spectral_keras.SpectralNormRegularizer(
    ...     keras.optimizers.SGD(0.1, momentum=0.9), model, factor=0.01
    ... )
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    >>> [path.split("/", 1)[1] for path in optimizer.sigmas()]
    ['out/kernel']
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        model: keras.Model | Weights,
        factor: Any = 0.01,
        *,
        n_iter: int = 1,
        n_vectors: int = 1,
        include: Choice | None = None,
        exclude: Choice | None = None,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        seed: int = 0,
        target: float = 0.0,
        power: int = 2,
        name: str | None = None,
    ) -> None:
        backend = keras.backend.backend()
        if backend not in ("torch", "jax"):
            raise sc.ArgumentError(
                f"the Keras backend is {backend!r}, whose tensors are no arrays of the array API "
                "that train: set KERAS_BACKEND to 'torch' or 'jax' before keras is imported"
            )
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise sc.ArgumentError(
                "inner_optimizer scales the loss: put the LossScaleOptimizer around this one"
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        if not isinstance(model, Weights):
            model = choose(model, include, exclude, layouts)
        self._weights = model
        given = factor if isinstance(factor, Mapping) else {"*": factor}
        self._factors = by_name(given, model.layouts, "factor")
        factors_of(self._factors_at(0), model.layouts)
        self.n_iter = checked_int(n_iter, "n_iter")
        self.n_vectors = checked_int(n_vectors, "n_vectors")
        self.seed = checked_int(seed, "seed", least=0)
        self.target = check_factor(target, "target")
        self.power = check_power(power)

    def build(self, variables: Sequence[Variable]) -> None:
        """Make v and σ, and what the inner optimizer keeps.

        Parameters
        ----------
        variables : list of keras.Variable
            All that are trained.
        """
        self._weights = self._weights.among(variables)
        weights, layouts = _values(self._weights.variables), self._weights.layouts
        options = {"seed": self.seed, "layouts": layouts, "n_vectors": self.n_vectors}
        start = _as_written(sc.init, weights, **options)
        self._start = replace(start, u={})
        self._v = {path: self._variable(v, path, "v") for path, v in start.v.items()}
        self._sigma = {path: self._variable(s, path, "sigma") for path, s in start.sigma.items()}
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[Variable] | None = None
    ) -> None:
        """Add the term to the gradients, and let the inner optimizer apply them.

        Parameters
        ----------
        grads : list of tensor or None
        trainable_variables : list of keras.Variable, optional
            Whose gradients they are: those that it was built with, if it is not given.
        """
        if trainable_variables is None:
            if not self.built:
                raise sc.ArgumentError("give trainable_variables, or call build with them before")
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not self.built:
            self.build(variables)
        self.inner_optimizer.apply(self._with_term(grads, variables), variables)

    def sigmas(self) -> dict[str, np.ndarray[Any, Any]]:
        """The newest estimate of each weight's largest singular value.

        Within an epoch on JAX, call ``model.jax_state_sync()`` first.

        Returns
        -------
        dict of path to NumPy array, shape (*stack,)
            As of the last step, before the weights moved.

        Raises
        ------
        spectral_core.ArgumentError
            If the optimizer is not built yet.
        """
        if not self.built:
            raise sc.ArgumentError("not built yet: fit the model first, or call build")
        return {path: keras.ops.convert_to_numpy(s.value) for path, s in self._sigma.items()}

    def _with_term(self, grads: Sequence[Any], variables: Sequence[Variable]) -> list[Any]:
        gradient_of = {id(v): grad for v, grad in zip(variables, grads, strict=True)}
        weights = self._weights.variables
        given = {path: _tensor(gradient_of.get(id(v))) for path, v in weights.items()}
        state = replace(self._start, v=_values(self._v), sigma=_values(self._sigma))
        scale = self.loss_scale_factor or 1.0
        factors = self._factors_at(self.iterations)
        new, state = _as_written(
            sc.add_gradient,
            _values(weights),
            given,
            state,
            factor={path: scale * factor for path, factor in factors.items()},
            target=self.target,
            power=self.power,
            n_iter=self.n_iter,
        )
        for path, grad in given.items():
            if grad is not None:
                self.assign(self._v[path], state.v[path])
                self.assign(self._sigma[path], state.sigma[path])
                gradient_of[id(weights[path])] = new[path]
        return [gradient_of[id(variable)] for variable in variables]

    def _factors_at(self, step: Any) -> dict[str, Any]:
        factors = {path: f for path, f in self._factors.items() if path in self._weights.layouts}
        return {path: f(step) if callable(f) else f for path, f in factors.items()}

    def _variable(self, value: Any, path: str, what: str) -> Variable:
        variable = self.add_variable(
            tuple(value.shape),
            dtype=keras.backend.standardize_dtype(value.dtype),
            name=f"{path.replace('/', '_')}_{what}",
        )
        variable.assign(value)
        return variable

    # What is the inner optimizer's

    @property
    def variables(self) -> list[Variable]:
        """All that a checkpoint holds: v and σ, and the inner optimizer's."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's, which divides the gradients by it."""
        inner = getattr(self, "inner_optimizer", None)
        return None if inner is None else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if hasattr(self, "inner_optimizer"):  # Keras sets it before there is one
            self.inner_optimizer.loss_scale_factor = factor

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """As the inner optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """As the inner optimizer's, which may write its averages into the weights."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes; the chosen weights in it, so that it needs no model."""
        kept = self._weights.get_config()
        factors = {path: self._factors[path] for path in kept["weights"]}
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "factor": keras.saving.serialize_keras_object(factors),
            "n_iter": self.n_iter,
            "n_vectors": self.n_vectors,
            "seed": self.seed,
            "target": self.target,
            "power": self.power,
            **kept,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> SpectralNormRegularizer:
        """Undo `get_config`.

        Parameters
        ----------
        config : dict
        custom_objects : dict, optional
            Classes of the user's that the inner optimizer needs.
        """
        parts = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("inner_optimizer", "factor")
        }
        kept = ("name", "n_iter", "n_vectors", "seed", "target", "power")
        options = {key: config[key] for key in kept}
        return cls(model=Weights.from_config(config), **parts, **options)


def _tensor(grad: Any) -> Any:
    return None if grad is None else keras.ops.convert_to_tensor(grad)


def _values(variables: Mapping[str, Variable]) -> dict[str, Any]:
    return {path: variable.value for path, variable in variables.items()}


def _as_written(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call it outside of what rounds or traces its arithmetic."""
    if keras.backend.backend() == "jax":
        import jax

        # float32 means float32: the default on GPU and TPU may round the products' operands.
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)
    import torch

    if torch.compiler.is_compiling():  # with jit_compile: between two graphs
        function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return function(*args, **kwargs)
