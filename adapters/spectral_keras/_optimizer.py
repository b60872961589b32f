"""Algorithm 1 as a Keras optimizer around another one.

Why an optimizer: a `keras.regularizers.Regularizer` has no place to keep its v. The v would leak
out of the JAX trainer's stateless scopes, be missing in checkpoints, and count in the loss of an
evaluation. A callback cannot change gradients. An optimizer gets the gradients, and Keras tracks,
saves and compiles its variables on every backend. `keras.optimizers.LossScaleOptimizer` wraps an
optimizer in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import keras
import numpy as np

import spectral_core as sc
from spectral_core.engine import (
    Choice,
    Engine,
    by_name,
    check_factor,
    check_factors,
    check_power,
)
from spectral_core.errors import check_int

from ._select import Variable, Weights, choose_variables


@keras.saving.register_keras_serializable(package="spectral_keras")
class SpectralNormRegularizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Add λσuvᵀ to the gradient of every weight matrix, and let another optimizer step.

    Minimizes :math:`L + \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2` by Algorithm 1 of Yoshida & Miyato (2017),
    on the PyTorch and JAX backends of Keras.

    Parameters
    ----------
    inner_optimizer : keras.optimizers.Optimizer
        The optimizer that moves the weights. Its learning rate, weight decay, clipping, averages
        and accumulation work as usual. ``learning_rate`` and ``iterations`` of the regularizer are
        those of the inner optimizer.
    model : keras.Model
        The model to regularize. It must be built. By default the kernels of dense, einsum-dense
        (and so attention), convolution and recurrent layers are regularized. Embeddings, norms
        and biases are not.
    factor : float, `keras.optimizers.schedules.LearningRateSchedule`, or mapping of path or pattern
        λ. A schedule is called with the number of the step. A mapping holds a number or a schedule
        for each weight: ``{"*conv*": 0.05, "*": 0.01}``.
    target : float
        The σ below which a matrix is left alone. The penalty is then the hinge
        (λ/2)·Σ max(0, σ − target)².
    power : int
        2, or 1 for the penalty λ·Σ max(0, σ − target).
    n_iter : int
        Power iterations in a step.
    n_vectors : int
        Number of vectors to iterate with for each matrix: see `spectral_core.block_iteration`.
    include : str, iterable of str, or callable, optional
        Paths (``variable.path``) or shell patterns (``"*head/*"``) of the variables to regularize
        instead of the default ones, or ``include(path, variable) -> bool``.
    exclude : str, iterable of str, or callable, optional
        Variables to skip, in the same forms as ``include``.
    layouts : mapping of path or pattern to `spectral_core.Layout` or str, optional
        The meaning of a variable's axes, where its layer does not determine it. Variables named
        here are regularized even where the default would leave them out.
    seed : int
        Seed of the random start vectors. They depend only on the seed and the paths. Keras goes on
        numbering unnamed layers from model to model until `keras.utils.clear_session` is called.
    name : str, optional
        Name of the optimizer.

    Raises
    ------
    spectral_core.NamesError
        If a pattern matches nothing, or nothing is left to regularize.
    spectral_core.ArgumentError
        If a number is out of its range, the backend is neither PyTorch nor JAX, or the inner
        optimizer scales the loss.

    Notes
    -----
    The inner optimizer's ``clipnorm``, ``global_clipnorm`` and ``clipvalue`` clip after the term
    is added. With its ``gradient_accumulation_steps`` each batch iterates, and the mean of the
    batches' terms is added. Under a ``mixed_float16`` policy, ``compile`` puts a
    `LossScaleOptimizer` around the regularizer. Do the same by hand: the gradients are then
    unscaled, and a skipped step changes no v. Weights of frozen layers are left out. As always in
    Keras, compile again with a new optimizer after ``trainable`` has changed.

    v and σ are saved with the model. To load it, ``import spectral_keras`` first. Models that
    version 0.1.0 saved can be loaded too.

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
        *,
        factor: Any = 0.01,
        target: float = 0.0,
        power: int = 2,
        n_iter: int = 1,
        n_vectors: int = 1,
        include: Choice | None = None,
        exclude: Choice | None = None,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        backend = keras.backend.backend()
        if backend not in ("torch", "jax"):
            raise sc.ArgumentError(
                f"the Keras backend is {backend!r}, but only PyTorch and JAX are supported: set "
                "KERAS_BACKEND to 'torch' or 'jax' before keras is imported"
            )
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise sc.ArgumentError(
                "inner_optimizer scales the loss: put the LossScaleOptimizer around this one"
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        if not isinstance(model, Weights):
            model = choose_variables(model, include, exclude, layouts)
        self._weights = model
        factors = factor if isinstance(factor, Mapping) else {"*": factor}
        self._factors = by_name(factors, model.layouts, "factor")
        check_factors(self._factors_at(0), model.layouts)
        self.n_iter = check_int(n_iter, "n_iter")
        self.n_vectors = check_int(n_vectors, "n_vectors")
        self.seed = check_int(seed, "seed", least=0)
        self.target = check_factor(target, "target")
        self.power = check_power(power)

    def build(self, variables: Sequence[Variable]) -> None:
        """Create v and σ, and the variables of the inner optimizer.

        Parameters
        ----------
        variables : list of keras.Variable
            All trained variables.
        """
        self._weights = self._weights.among(variables)
        weights, layouts = _values(self._weights.variables), self._weights.layouts
        self._engines = _engines()
        self._in_place = any(engine.in_place for engine in self._engines)
        with _full_precision():
            start = _outside_graphs(sc.init)(
                weights,
                seed=self.seed,
                layouts=layouts,
                n_vectors=self.n_vectors,
                engines=() if self._in_place else self._engines,
            )
        # An engine that works in place writes u too, into memory that the state provides.
        self._start = start if self._in_place else replace(start, u={})
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
            The variables of these gradients. The default is those passed to `build`.
        """
        if trainable_variables is None:
            if not self.built:
                raise sc.ArgumentError("give trainable_variables, or call build with them before")
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not self.built:
            self.build(variables)
        weights = self._weights.variables
        gradient_of = {id(v): grad for v, grad in zip(variables, grads, strict=True)}
        own = {path: self._own(gradient_of.get(id(v))) for path, v in weights.items()}
        state = replace(self._start, v=self._owned(self._v), sigma=self._owned(self._sigma))
        options = self._options()
        # The call is here, not in a method of its own: every frame between the user and the
        # product is one more to step through.
        with _full_precision():
            if self._in_place:
                add_gradient_ = _outside_graphs(sc.add_gradient_)
                state = add_gradient_(_values(weights), own, state, **options)
            else:
                own, state = sc.add_gradient(_values(weights), own, state, **options)
        for path, grad in own.items():
            if grad is not None:
                self.assign(self._v[path], state.v[path])
                self.assign(self._sigma[path], state.sigma[path])
                gradient_of[id(weights[path])] = grad
        self.inner_optimizer.apply([gradient_of[id(v)] for v in variables], variables)

    def sigmas(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the newest estimate of each weight's largest singular value.

        Within an epoch on JAX, call ``model.jax_state_sync()`` first.

        Returns
        -------
        dict of path to NumPy array, shape (*stack,)
            The values of the last step, before the weights moved.

        Raises
        ------
        spectral_core.ArgumentError
            If the optimizer is not built yet.
        """
        if not self.built:
            raise sc.ArgumentError("not built yet: fit the model first, or call build")
        return {path: keras.ops.convert_to_numpy(s.value) for path, s in self._sigma.items()}

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Load the variables. A v that 0.1.0 saved without its axis of vectors gets the axis.

        Parameters
        ----------
        store : mapping of str to array
            The arrays of a saved model, by number.
        """
        arrays = {key: store[key] for key in store.keys()}  # noqa: SIM118  (not always iterable)
        v = {id(variable) for variable in self._v.values()} if self.built else set()
        for i, variable in enumerate(self.variables):
            array = arrays.get(str(i))
            if array is not None and id(variable) in v and array.ndim == len(variable.shape) - 1:
                arrays[str(i)] = np.expand_dims(array, -2)
        super().load_own_variables(arrays)

    def _own(self, grad: Any) -> Any:
        """Return a gradient that may be changed, or None where there is none."""
        if grad is None:
            return None
        grad = keras.ops.convert_to_tensor(grad)
        return grad.detach().clone() if self._in_place else grad

    def _owned(self, variables: Mapping[str, Variable]) -> dict[str, Any]:
        """Return values that an engine may write into: those of `stateless_apply` must stay."""
        values = _values(variables)
        return {path: x.clone() for path, x in values.items()} if self._in_place else values

    def _options(self) -> dict[str, Any]:
        """Return the options of this step."""
        scale = self.loss_scale_factor or 1.0
        factors = self._factors_at(self.iterations)
        return {
            "factor": {path: scale * factor for path, factor in factors.items()},
            "target": self.target,
            "power": self.power,
            "n_iter": self.n_iter,
            "engines": self._engines,
        }

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

    # Attributes of the inner optimizer

    @property
    def variables(self) -> list[Variable]:
        """Everything that a checkpoint holds: v and σ, and the inner optimizer's variables."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        """Learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """Number of steps of the inner optimizer."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self) -> float | None:
        """Loss scale of the inner optimizer, which divides the gradients by it."""
        inner = getattr(self, "inner_optimizer", None)
        return None if inner is None else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        if hasattr(self, "inner_optimizer"):  # Keras sets it before there is one
            self.inner_optimizer.loss_scale_factor = factor

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Call the inner optimizer's method."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Call the inner optimizer's method, which may write its averages into the weights."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, with the chosen weights in place of a model."""
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
        """Make the optimizer that `get_config` describes.

        Parameters
        ----------
        config : dict
        custom_objects : dict, optional
            The user's classes that the inner optimizer needs.
        """
        inner = _any_backend(config["inner_optimizer"])
        parts = {
            key: keras.saving.deserialize_keras_object(part, custom_objects=custom_objects)
            for key, part in (("inner_optimizer", inner), ("factor", config["factor"]))
        }
        kept = ("name", "n_iter", "n_vectors", "seed", "target", "power")
        options = {key: config[key] for key in kept}
        return cls(model=Weights.from_config(config), **parts, **options)


def _values(variables: Mapping[str, Variable]) -> dict[str, Any]:
    return {path: variable.value for path, variable in variables.items()}


def _any_backend(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Keras optimizer's config without the name of the backend that saved it."""
    of_keras = str(config["module"]).startswith("keras.src.backend.")
    return {**config, "module": "keras.optimizers"} if of_keras else dict(config)


def _engines() -> tuple[Engine, ...]:
    """Return the engines of the backend. Without them the reference gives the same, slower."""
    if keras.backend.backend() == "torch":
        from spectral_torch.engines import engines

        return engines()
    try:
        from spectral_jax import XlaEngine
    except ImportError:  # optax is not installed, and Keras works without it
        return ()
    return (XlaEngine(),)


def _full_precision() -> AbstractContextManager[Any]:
    """Return a context in which float32 means float32: JAX may round the factors of a product."""
    if keras.backend.backend() == "torch":
        return nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def _outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` so that it runs between two graphs, with ``jit_compile`` on PyTorch."""
    if keras.backend.backend() == "torch":
        import torch

        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return function
