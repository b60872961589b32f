"""Put an optimizer around another: the common part of the regularizer and of the bound."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Self

import keras
import numpy as np

import spectral_core as sc
from spectral_core.engine import (
    Choice,
    Engine,
    Row,
    Schedule,
    Summary,
    check_factor,
    check_factors,
    check_norm,
    plan_of,
)
from spectral_core.errors import check_int, listed

from ._select import Variable, Weights, choose_variables


class OptimizerWrapper(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Keep v and σ of a model's weights beside the variables of an inner optimizer.

    Parameters
    ----------
    inner_optimizer, model, n_iter, n_vectors, norm, warmup_iters, include, exclude, layouts, seed,
    name
        See `SpectralNormRegularizer`.
    """

    _numbers: tuple[str, ...]  # names of the attributes that are numbers, mappings or schedules
    _options: tuple[str, ...]  # names of the other arguments

    def __init__(
        self,
        inner_optimizer: Any,
        model: Any,
        *,
        n_iter: int,
        n_vectors: int,
        norm: str,
        warmup_iters: int,
        include: Choice | None,
        exclude: Choice | None,
        layouts: Mapping[str, sc.Layout | str] | None,
        seed: int,
        name: str | None,
    ) -> None:
        inner_optimizer = _checked_optimizer(inner_optimizer, model, type(self).__name__)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.n_iter = check_int(n_iter, "n_iter")
        self.n_vectors = check_int(n_vectors, "n_vectors")
        self.warmup_iters = check_int(warmup_iters, "warmup_iters", least=0)
        self.seed = check_int(seed, "seed", least=0)
        self.norm = check_norm(norm)
        if not isinstance(model, Weights):
            model = choose_variables(_checked_model(model), include, exclude, layouts, norm)
        self._weights = model
        self._steps_before = self._inner_steps()
        self._warned = False
        self._warn_of_a_second()

    # Numbers that may be mappings or schedules

    def _set_number(self, what: str, value: Schedule) -> None:
        """Set ``factor``, ``target`` or ``bound`` for each weight, after checking it."""
        if isinstance(value, Mapping):
            own = self._weights.by_path(value, what)
        else:
            if not isinstance(value, keras.Variable):
                check_factor(_number(value, 0), what)  # an error that names no weight
            own = dict.fromkeys(self._weights.layouts, value)
        for path, number in own.items():
            if isinstance(number, keras.Variable):
                raise sc.ArgumentError(
                    f"{what}[{path!r}] is a keras.Variable: pass a number, or a function of the "
                    f"step, {what}=lambda step: …"
                )
        check_factors({path: _number(x, 0) for path, x in own.items()}, self._weights.layouts, what)
        if self.built and keras.backend.backend() == "jax":
            warnings.warn(
                f"a train step that is compiled already keeps the old {what}: call model.compile "
                f"again, or make {what} a function of the step",
                sc.SpectralWarning,
                stacklevel=3,
            )
        setattr(self, f"_{what}s", own)

    def _get_number(self, what: str) -> Any:
        """Return the number if it is the same for all weights, else the mapping."""
        own = dict(getattr(self, f"_{what}s"))
        values = list(own.values())
        return values[0] if all(value is values[0] for value in values) else own

    def _at(self, what: str, step: Any) -> dict[str, Any]:
        """Return the number of each weight at a step."""
        own = getattr(self, f"_{what}s")
        if any(callable(own[path]) for path in self._weights.layouts):
            step = keras.ops.convert_to_tensor(step)
        return {path: _number(own[path], step) for path in self._weights.layouts}

    def _numbers_at(self, what: str, step: int, paths: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers at a step on the host."""
        own = getattr(self, f"_{what}s")
        return {path: float(_plain(_number(own[path], step))) for path in paths}

    # The state

    def build(self, variables: Sequence[Variable]) -> None:
        """Create v and σ, and the variables of the inner optimizer.

        Parameters
        ----------
        variables : list of keras.Variable
            All trained variables.
        """
        self._weights = self._weights.among(variables)
        self._engines = _engines()
        self._in_place = any(engine.in_place for engine in self._engines)
        start = outside_graphs(self._fresh_state)(self._weights)
        # An engine that works in place writes u too, into memory that the state provides.
        self._start = start if self._in_place or self._keeps_u() else replace(start, u={})
        self._v = {path: self._variable(v, path, "v") for path, v in start.v.items()}
        self._sigma = {path: self._variable(s, path, "sigma") for path, s in start.sigma.items()}
        kept = start.u if self._keeps_u() else {}
        self._u = {path: self._variable(u, path, "u") for path, u in kept.items()}
        self._count = 0  # of the steps, as a number on the host
        self._writes = -1
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    def _keeps_u(self) -> bool:
        """Return True if u is a part of the state that is saved."""
        return False

    def _fresh_state(self, weights: Weights) -> sc.SpectralState:
        """Return the state of the weights as they are now, after the first iterations."""
        engines = _engines()
        if any(engine.in_place for engine in engines):
            engines = ()

        def start(values: Mapping[str, Any]) -> sc.SpectralState:
            state = sc.init(
                values,
                seed=self.seed,
                layouts=weights.layouts,
                n_vectors=self.n_vectors,
                engines=engines,
            )
            if self.warmup_iters:
                state = sc.iterate(values, state, n_iter=self.warmup_iters, engines=engines)
            return state

        waves = any(isinstance(layout, sc.Convolution) for layout in weights.layouts.values())
        with full_precision():
            return (_as_one(start) if waves else start)(values_of(weights.variables))

    def _state(self) -> sc.SpectralState:
        """Return the state of this step. An engine may write into it."""
        u = self._owned(self._u) if self._u else self._start.u
        return replace(self._start, v=self._owned(self._v), sigma=self._owned(self._sigma), u=u)

    def _owned(self, variables: Mapping[str, Variable]) -> dict[str, Any]:
        """Return values that an engine may write into: those of `stateless_apply` must stay."""
        values = values_of(variables)
        return {path: x.clone() for path, x in values.items()} if self._in_place else values

    def _keep(self, path: str, state: sc.SpectralState) -> None:
        """Write a weight's results into the variables."""
        self.assign(self._v[path], state.v[path])
        self.assign(self._sigma[path], state.sigma[path])
        if path in self._u:
            self.assign(self._u[path], state.u[path])

    def _trained(
        self, grads: Sequence[Any], trainable_variables: Sequence[Variable] | None
    ) -> tuple[list[Variable], dict[int, Any]]:
        """Return the variables of a step, and the gradient of each by its id; build if needed."""
        if trainable_variables is None:
            if not self.built:
                raise sc.ArgumentError("give trainable_variables, or call build with them before")
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not self.built:
            self.build(variables)
        return variables, {id(v): grad for v, grad in zip(variables, grads, strict=True)}

    def _count_step(self) -> None:
        self._iterations.assign_add(1)
        self._count += 1
        self._writes = self._writes_of_count()

    def _steps_on_host(self) -> int:
        """Return the number of the step, without waiting for the device.

        The number on the host is that of the variable, unless someone has assigned to the variable:
        PyTorch counts how often a tensor is written into. Only then the device is asked.
        """
        if self._writes != self._writes_of_count():
            self._count = self._own_steps()
            self._writes = self._writes_of_count()
        return self._count

    def _writes_of_count(self) -> int:
        return getattr(self._iterations.value, "_version", 0)

    def _variable(self, value: Any, path: str, what: str) -> Variable:
        variable = self.add_variable(
            tuple(value.shape),
            dtype=keras.backend.standardize_dtype(value.dtype),
            name=f"{path.replace('/', '_')}_{what}",
        )
        variable.assign(value)
        return variable

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
        self._steps_before = self._inner_steps()

    # What happened

    def sigmas(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the newest estimate of each weight's largest singular value.

        Before the first step, these are estimates for the weights as they are now. Within an epoch
        on JAX, call ``model.jax_state_sync()`` first.

        Returns
        -------
        dict of path to NumPy array, shape (*stack,)
            The values of the last step.

        Raises
        ------
        spectral_core.ArgumentError
            If the optimizer is of a saved model and not built yet, or within an epoch on JAX.
        """
        self._warn_if_idle()
        if not self.built:
            sigma = self._fresh_state(self._unbuilt()).sigma
            return {path: keras.ops.convert_to_numpy(s) for path, s in sigma.items()}
        return {path: self._on_host(s) for path, s in self._sigma.items()}

    def _unbuilt(self) -> Weights:
        """Return the weights before `build`."""
        if not self._weights.variables:
            raise sc.ArgumentError(
                "this optimizer was made from a config and is not built yet: call "
                "optimizer.build(model.trainable_variables)"
            )
        return self._weights.trained()

    def _on_host(self, variable: Variable) -> np.ndarray[Any, Any]:
        value = getattr(variable, "_value", None)
        if value is None or getattr(value, "is_deleted", bool)():
            raise sc.ArgumentError(
                "the variables are in the train step now: within an epoch on JAX, call "
                "model.jax_state_sync() first"
            )
        return keras.ops.convert_to_numpy(value)

    def summary(self) -> Summary:
        """Return a table of the weights, and of what is left out and why.

        Returns
        -------
        spectral_core.Summary
            Print it, or let a notebook show it.

        Raises
        ------
        spectral_core.ArgumentError
            As `sigmas`.
        """
        weights = self._weights if self.built else self._unbuilt()
        sigmas, steps = self.sigmas(), self._own_steps()
        shown = self._shown()
        rows = []
        for path, layout in weights.layouts.items():
            shape = tuple(weights.variables[path].shape)
            plan = plan_of(layout, shape, path)
            rows.append(
                Row(
                    path,
                    shape,
                    tuple(plan.matrix),
                    layout.axes,
                    shown[path],
                    float(np.max(sigmas[path])),
                    type(list(chain(self))[-1]).__name__,
                    steps - 1 if steps else None,
                )
            )
        frozen = {path: "frozen" for path in self._weights.layouts if path not in weights.layouts}
        notes = [] if steps else ["no step yet: compile the model with this optimizer, and fit it"]
        return Summary(repr(self), rows, {**weights.left_out, **frozen}, notes=notes)

    def _shown(self) -> dict[str, float | str]:
        """Return the number of each weight for `summary`."""
        return dict(self._numbers_at(self._numbers[0], self._inner_steps(), self._weights.layouts))

    def __repr__(self) -> str:
        what = self._numbers[0]
        value = self._get_number(what)
        entries = value.values() if isinstance(value, dict) else [value]
        shown = list(dict.fromkeys(_text(entry) for entry in entries))
        numbers = ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")
        number = numbers if len(shown) == 1 else f"{{{numbers}}}"
        n = len(self._weights.layouts)
        inner = (
            repr(self.inner_optimizer)
            if isinstance(self.inner_optimizer, OptimizerWrapper)
            else type(self.inner_optimizer).__name__
        )
        return (
            f"{type(self).__name__}({inner}, {what}={number}, n_iter={self.n_iter}, "
            f"{n} weight{'s' * (n != 1)}{'' if self.built else ', not built'})"
        )

    def _own_steps(self) -> int:
        return int(self._on_host(self._iterations)) if self.built else 0

    def _inner_steps(self) -> int:
        inner = self.inner_optimizer
        value = getattr(inner.iterations, "_value", 0) if inner.built else 0
        if value is None or getattr(value, "is_deleted", bool)():
            return 0
        return int(keras.ops.convert_to_numpy(inner.iterations)) if inner.built else 0

    def _warn_if_idle(self) -> None:
        """Warn once if the inner optimizer has made steps without this one."""
        if self._warned or self._own_steps() or self._inner_steps() <= self._steps_before:
            return
        self._warned = True
        steps = self._inner_steps() - self._steps_before
        warnings.warn(
            f"{self.inner_optimizer.name!r} has made {steps} steps without "
            f"{type(self).__name__}, which has had no effect: pass the {type(self).__name__} to "
            "model.compile, not the optimizer within",
            sc.SpectralWarning,
            stacklevel=3,
        )

    def _warn_of_a_second(self) -> None:
        """Warn if an optimizer of the same kind within acts on the same weights."""
        own = {id(variable): path for path, variable in self._weights.variables.items()}
        for inner in chain(self.inner_optimizer):
            if isinstance(inner, OptimizerWrapper) and type(inner) is type(self):
                both = [own[id(v)] for v in inner._weights.variables.values() if id(v) in own]
                if both:
                    warnings.warn(
                        f"two {type(self).__name__}s act on {listed(both)}: exclude "
                        "them from one of the two",
                        sc.SpectralWarning,
                        stacklevel=4,
                    )

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

    # Saving

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of `from_config`, with the chosen weights in place of a model."""
        kept = self._weights.get_config()
        numbers = {}
        for what in self._numbers:
            own = getattr(self, f"_{what}s")
            numbers[what] = keras.saving.serialize_keras_object(
                {path: _plain(own[path]) for path in kept["weights"]}
            )
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            **numbers,
            **{option: getattr(self, option) for option in self._options},
            **kept,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """Make the optimizer that `get_config` describes.

        Parameters
        ----------
        config : dict
        custom_objects : dict, optional
            The user's classes that the inner optimizer needs.
        """
        parts = {"inner_optimizer": _any_backend(config["inner_optimizer"])}
        parts |= {what: config[what] for what in cls._numbers}
        made = {
            key: keras.saving.deserialize_keras_object(part, custom_objects=custom_objects)
            for key, part in parts.items()
        }
        # Version 0.1.0 saved fewer options.
        options = {key: config[key] for key in ("name", *cls._options) if key in config}
        return cls(model=Weights.from_config(config), **made, **options)


def values_of(variables: Mapping[str, Variable]) -> dict[str, Any]:
    """Return the value of each variable."""
    return {path: variable.value for path, variable in variables.items()}


def _checked_optimizer(inner: Any, model: Any, name: str) -> Any:
    """Return the inner optimizer; raise `ArgumentError` if it cannot be one."""
    backend = keras.backend.backend()
    if backend not in ("torch", "jax"):
        raise sc.ArgumentError(
            f"the Keras backend is {backend!r}, but only PyTorch and JAX are supported: set "
            "KERAS_BACKEND to 'torch' or 'jax' before keras is imported"
        )
    if isinstance(model, keras.optimizers.Optimizer) or isinstance(inner, keras.Layer):
        raise sc.ArgumentError(f"the order is {name}(optimizer, model): swap the two")
    if isinstance(inner, (str, dict)):
        inner = keras.optimizers.get(inner)
    if not isinstance(inner, keras.optimizers.Optimizer):
        kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
        line = "keras.optimizers.SGD(0.1)"
        if kind.startswith("torch."):
            line += ", or use spectral_torch in a training loop of PyTorch"
        raise sc.ArgumentError(
            f"inner_optimizer must be a Keras optimizer, not {kind}: pass one such as {line}"
        )
    if any(isinstance(one, keras.optimizers.LossScaleOptimizer) for one in chain(inner)):
        raise sc.ArgumentError(
            "inner_optimizer scales the loss: put the LossScaleOptimizer around this one"
        )
    return inner


def _checked_model(model: Any) -> Any:
    """Return the model; raise `ArgumentError` if it is something else."""
    if isinstance(model, keras.Layer):
        return model
    raise sc.ArgumentError(
        f"model must be a keras.Model or a layer, not {type(model).__name__}: pass the model "
        "itself, and choose among its variables with include and exclude"
    )


def chain(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those within it."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _number(value: Any, step: Any) -> Any:
    """Return a number of a schedule at a step: a float, or a tensor of floats."""
    if not callable(value):
        return value
    value = value(step)
    if isinstance(value, keras.Variable):
        value = keras.ops.convert_to_tensor(value)
    if keras.ops.is_tensor(value) and "int" in keras.backend.standardize_dtype(value.dtype):
        value = keras.ops.cast(value, "float32")
    return value


def _plain(value: Any) -> Any:
    """Return a number that can be saved: arrays become floats."""
    return float(keras.ops.convert_to_numpy(value)) if hasattr(value, "shape") else value


def _text(value: Any) -> str:
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    return f"{float(_plain(value)):.4g}"


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
        from spectral_jax import NumbaXlaEngine, XlaEngine
    except ImportError:  # optax is not installed, and Keras works without it
        return ()
    return NumbaXlaEngine(), XlaEngine()


def full_precision() -> AbstractContextManager[Any]:
    """Return a context in which float32 means float32: JAX may round the factors of a product."""
    if keras.backend.backend() != "jax":
        return nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def _as_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that JAX compiles as one.

    An iteration with waves has hundreds of small operations. Each of them would be compiled alone.
    """
    if keras.backend.backend() != "jax":
        return function
    try:
        import jax

        import spectral_jax  # noqa: F401, for it tells JAX how to return a state
    except ImportError:  # optax is not installed
        return function
    compiled: Callable[..., Any] = jax.jit(function)
    return compiled


def is_traced(x: Any) -> bool:
    """Return True if JAX traces the value, so that it is not known."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` so that it runs between two graphs, with ``jit_compile`` on PyTorch."""
    if keras.backend.backend() == "torch":
        import torch

        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return function
