"""The models and methods that are compared. Add your own to `MODELS` or `METHODS`.

The paper compares vanilla, weight decay, adversarial training and spectral norm regularization. It
describes Jacobian regularization and leaves it out; spectral normalization came after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Optimizer

import spectral_torch
from benchmarks import models

from . import small
from .data import Data
from .runs import RunError

Network = Callable[[Tensor], Tensor]
State = dict[str, Tensor]
KINDS = (nn.Conv2d, nn.Linear)

# Each is called with channels, classes, size of the images and width.
MODELS: dict[str, Callable[..., nn.Module]] = {"vgg": models.vgg_16, "nin": models.nin}
MODELS |= {f"densenet-{depth}": partial(models.densenet, depth=depth) for depth in (40, 22)}
MODELS |= {"mlp": small.mlp, "lenet": small.lenet, "nin-bn": small.nin_bn, "vgg-7": small.vgg_7}


def build(name: str, data: Data, width: float, seed: int) -> nn.Module:
    """Return a model for these images, initialized after He et al., 2015; biases start at zero."""
    if name not in MODELS:
        raise RunError(f"no model is named {name!r}: {', '.join(MODELS)}")
    _, channels, size, _ = data.train_images.shape
    model = MODELS[name](channels, data.classes, size, width)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, KINDS):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


@dataclass
class Method:
    """Vanilla: the mean cross-entropy, and nothing else."""

    strength: float = 0.0
    seed: int = 0
    twice: ClassVar[bool] = False  # whether it differentiates a gradient

    def prepare(self, model: nn.Module) -> None:
        """Change the model before the optimizer sees it."""

    def options(self) -> dict[str, Any]:
        """Return options for the optimizer."""
        return {}

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Connect to the optimizer."""

    def loss(self, network: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to minimize, and the plain loss to report."""
        plain = cross_entropy(network(x), y)
        return plain, plain

    def state(self) -> State:
        """Return what a resumed run needs, besides model and optimizer."""
        return {}

    def load(self, state: State) -> None: ...


class Decay(Method):
    """(λ/2)·‖w‖² of all parameters."""

    def options(self) -> dict[str, Any]:
        return {"weight_decay": self.strength}


class Adversarial(Method):
    """α·L(x) + (1 − α)·L(x + η), with η = ε·g/‖g‖₂ and g = ∇ₓL, image by image; ε = 1."""

    epsilon = 1.0

    def loss(self, network: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        plain = cross_entropy(network(x), y)
        (gradient,) = torch.autograd.grad(plain, x, retain_graph=True)
        eta = self.epsilon * unit(gradient.flatten(1).float()).view_as(x)
        moved = cross_entropy(network(x.detach() + eta), y)
        return self.strength * plain + (1 - self.strength) * moved, plain


class Spectral(Method):
    """(λ/2)·Σ σ², by the regularizer; one iteration a step from Gaussian vectors, as the paper."""

    more: ClassVar[dict[str, Any]] = {}  # options of the regularizer

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._regularizer = spectral_torch.SpectralNormRegularizer(
            model, factor=self.strength, warmup_iters=0, seed=self.seed, **self.more
        ).attach(optimizer)

    def state(self) -> State:
        return self._regularizer.state_dict()

    def load(self, state: State) -> None:
        self._regularizer.load_state_dict(state)


class FourVectors(Spectral):
    """The same with four vectors for each matrix."""

    more: ClassVar[dict[str, Any]] = {"n_vectors": 4}


class Operator(Spectral):
    """The same with the norm of each convolution as a map of images."""

    more: ClassVar[dict[str, Any]] = {"norm": "operator"}


class Jacobian(Method):
    """(λ/2)·‖∂y/∂x‖_F² of an image (Hoffman, Roberts & Yaida, 2019): the mean of d·‖∂(rᵀy)/∂x‖².

    r is a unit vector of d outputs, drawn anew each step.
    """

    twice = True

    def loss(self, network: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        outputs = network(x)
        plain = cross_entropy(outputs, y)
        directions = normalize(torch.randn_like(outputs))
        (gradient,) = torch.autograd.grad((directions * outputs).sum(), x, create_graph=True)
        norm = outputs.shape[1] * gradient.float().square().sum() / len(x)
        return plain + self.strength / 2 * norm, plain


class Normalization(Method):
    """W/σ(W) in place of W (Miyato et al., 2018), as PyTorch does it."""

    def prepare(self, model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(module, KINDS):
                spectral_norm(module)


def unit(rows: Tensor) -> Tensor:
    """Scale each row to norm 1, or 0."""
    # First by the largest entry: the squares of an image that is fit well would underflow.
    largest = rows.abs().amax(dim=1, keepdim=True)
    return normalize(rows / largest.clamp_min(torch.finfo(rows.dtype).tiny))


METHODS = {"vanilla": Method, "decay": Decay, "adversarial": Adversarial, "spectral": Spectral}
METHODS |= {"jacobian": Jacobian, "normalization": Normalization}
METHODS |= {"spectral-4": FourVectors, "spectral-operator": Operator}
