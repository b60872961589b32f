"""Algorithm 1 as a Keras optimizer around another one.

Why an optimizer: a `keras.regularizers.Regularizer` has no place to keep its v. The v would leak
out of the JAX trainer's stateless scopes, be missing in checkpoints, and count in the loss of an
evaluation. A callback cannot change gradients. An optimizer gets the gradients, and Keras tracks,
saves and compiles its variables on every backend. `keras.optimizers.LossScaleOptimizer` wraps an
optimizer in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

import spectral_core as sc
from spectral_core.engine import Choice, Schedule, check_power
from spectral_core.errors import check_int, listed

from ._kernel import SpectralNorm
from ._select import Variable, Weights
from ._wrapper import OptimizerWrapper, full_precision, is_traced, outside_graphs, values_of


@keras.saving.register_keras_serializable(package="spectral_keras")
class SpectralNormRegularizer(OptimizerWrapper):
    r"""Add λσuvᵀ to the gradient of every weight matrix, and let another optimizer step.

    Minimizes :math:`L + \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2` by Algorithm 1 of Yoshida & Miyato (2017),
    on the PyTorch and JAX backends of Keras.

    Parameters
    ----------
    inner_optimizer : keras.optimizers.Optimizer or str
        The optimizer that moves the weights. Its learning rate, weight decay, clipping, averages
        and accumulation work as usual. ``learning_rate`` and ``iterations`` of the regularizer are
        those of the inner optimizer.
    model : keras.Model
        The model to regularize. It must be built. By default the kernels of dense, einsum-dense
        (and so attention), convolution and recurrent layers are regularized. Embeddings, norms,
        biases and frozen weights are not. A matrix of a layer of your own is regularized too, and a
        `spectral_core.SpectralWarning` says so.
    factor : number, function of the step, or mapping of path or pattern to either
        λ. A `keras.optimizers.schedules.LearningRateSchedule` is a function of the step. A mapping
        holds an entry for each weight: ``{"conv*": 0.05, "*": 0.01}``.
    target : number, function of the step, or mapping of path or pattern to either
        The σ below which a matrix is left alone. The penalty is then the hinge
        (λ/2)·Σ max(0, σ − target)².
    power : int
        2, or 1 for the penalty λ·Σ max(0, σ − target).
    n_iter : int
        Power iterations in a step.
    n_vectors : int
        Number of vectors to iterate with for each matrix: see `spectral_core.block_iteration`.
        With ``norm="operator"``, a convolution follows the waves of its layout instead.
    norm : str
        "flattened", the norm of each weight's matrix, as in the paper, or "operator": the norm of a
        convolution as a map of images, with the strides and the dilation rate of its layer. A
        layout that is a `spectral_core.Convolution` chooses it for one weight.
    every_n_steps : int
        Iterate only in every n-th step. The steps between add the term of the last iteration again.
    warmup_iters : int
        Power iterations before the first step. The paper has none: 0.
    include : str, compiled pattern, class, layer, callable, or iterable of these, optional
        Variables to regularize instead of the default ones: paths (``variable.path``), with or
        without the model's name, shell patterns (``"*head/*"``), names of layers (``"head"``),
        classes of layers (``keras.layers.Conv2D``), or ``include(path, variable) -> bool``.
    exclude : str, compiled pattern, class, layer, callable, or iterable of these, optional
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
        If a pattern matches nothing, nothing is left to regularize, or a kernel with three axes or
        more is of an unknown layer.
    spectral_core.ArgumentError
        If a number is out of its range, the model is not built, the backend is neither PyTorch nor
        JAX, or the inner optimizer is no Keras optimizer or scales the loss.

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
    >>> optimizer
    SpectralNormRegularizer(SGD, factor=0.01, n_iter=1, 1 weight, not built)
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    >>> [path.split("/", 1)[1] for path in optimizer.sigmas()]
    ['out/kernel']
    """

    _numbers = ("factor", "target")
    _options = (
        "power",
        "n_iter",
        "n_vectors",
        "norm",
        "every_n_steps",
        "warmup_iters",
        "seed",
    )

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        model: keras.Model | Weights,
        factor: Schedule = 0.01,
        *,
        target: Schedule = 0.0,
        power: int = 2,
        n_iter: int = 1,
        n_vectors: int = 1,
        norm: str = "flattened",
        every_n_steps: int = 1,
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
        self.factor = factor
        self.target = target
        self.power = check_power(power)
        self.every_n_steps = check_int(every_n_steps, "every_n_steps")
        self._warn_of_kernel_regularizers()

    @property
    def factor(self) -> Any:
        """λ, as it was given, or by path; checked when it is set.

        A train step that JAX has compiled keeps the old number until `compile` is called again.
        """
        return self._get_number("factor")

    @factor.setter
    def factor(self, factor: Schedule) -> None:
        self._set_number("factor", factor)

    @property
    def target(self) -> Any:
        """The σ below which the penalty is zero; checked when it is set, as ``factor``."""
        return self._get_number("target")

    @target.setter
    def target(self, target: Schedule) -> None:
        self._set_number("target", target)

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
        variables, gradient_of = self._trained(grads, trainable_variables)
        weights = self._weights.variables
        own = {path: self._own(gradient_of.get(id(v))) for path, v in weights.items()}
        own, state = self._with_terms(own)
        for path, grad in own.items():
            if grad is not None:
                self._keep(path, state)
                gradient_of[id(weights[path])] = grad
        self._count_step()
        self.inner_optimizer.apply([gradient_of[id(v)] for v in variables], variables)

    def _with_terms(self, own: dict[str, Any]) -> tuple[dict[str, Any], sc.SpectralState]:
        """Return the gradients with their terms, and the state after the step."""
        weights, state, options = values_of(self._weights.variables), self._state(), self._step()
        with full_precision():
            if self._in_place:
                # On the host: to read the number of the step on the device would wait for it.
                due = self._steps_on_host() % self.every_n_steps == 0
                add_gradient_ = outside_graphs(sc.add_gradient_)
                n_iter = self.n_iter if due else 0
                return own, add_gradient_(weights, own, state, n_iter=n_iter, **options)
            if self.every_n_steps == 1:
                return sc.add_gradient(weights, own, state, n_iter=self.n_iter, **options)

            def stepped(n_iter: int) -> tuple[Any, ...]:
                new, after = sc.add_gradient(weights, own, state, n_iter=n_iter, **options)
                return new, dict(after.v), dict(after.sigma), dict(after.u)

            steps = self._iterations.value
            due = steps % self.every_n_steps == 0
            if is_traced(steps):
                found = keras.ops.cond(due, lambda: stepped(self.n_iter), lambda: stepped(0))
            else:  # `cond` would compile its branches anew in each step that is not compiled
                found = stepped(self.n_iter if due else 0)
            new, v, sigma, u = found
            return new, sc.SpectralState(v, sigma, state.layouts, u)

    def penalty(self) -> float:
        """Return (λ/2)·Σσ² of the newest σ, to log it.

        With ``target`` and ``power`` it is (λ/power)·Σ max(0, σ − target)^power. Within an epoch on
        JAX, call ``model.jax_state_sync()`` first.

        Returns
        -------
        float

        Raises
        ------
        spectral_core.ArgumentError
            As `sigmas`.
        """
        sigmas = {path: sigma.astype("float64") for path, sigma in self.sigmas().items()}
        step = self._inner_steps()
        factors, targets = (self._numbers_at(what, step, sigmas) for what in self._numbers)
        return float(sc.penalty(sigmas, factor=factors, target=targets, power=self.power))

    def _warn_of_kernel_regularizers(self) -> None:
        """Warn of kernels that a `SpectralNorm` of their layer regularizes too."""
        variables = self._weights.variables
        both = [path for path, v in variables.items() if isinstance(v.regularizer, SpectralNorm)]
        if both:
            warnings.warn(
                f"the kernel_regularizer SpectralNorm acts on {listed(both)} too: remove it, or "
                f"write exclude={both[:10]}",
                sc.SpectralWarning,
                stacklevel=3,
            )

    def _keeps_u(self) -> bool:
        return self.every_n_steps > 1

    def _own(self, grad: Any) -> Any:
        """Return a gradient that may be changed, or None where there is none."""
        if grad is None:
            return None
        grad = keras.ops.convert_to_tensor(grad)
        return grad.detach().clone() if self._in_place else grad

    def _step(self) -> dict[str, Any]:
        """Return the options of this step."""
        step, scale = self.iterations, self.loss_scale_factor or 1.0
        return {
            "factor": {path: scale * x for path, x in self._at("factor", step).items()},
            "target": self._at("target", step),
            "power": self.power,
            "engines": self._engines,
        }
