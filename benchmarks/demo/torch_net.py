"""The network in PyTorch: the regularizer is one line, and the loop does not change."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import spectral_torch

from .data import Images, Labels
from .net import LAYOUTS, MOMENTUM, SHAPES, Plan, initial_weights

# So small a network runs no faster on several, and the step's time is steadier on one.
torch.set_num_threads(1)


class TorchNet:
    layouts = LAYOUTS

    def __init__(self, plan: Plan) -> None:
        self._model = model(plan.seed)
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), lr=plan.rate, momentum=MOMENTUM, nesterov=True
        )
        self._scheduler = torch.optim.lr_scheduler.MultiStepLR(self._optimizer, plan.milestones)
        self._regularizer = None
        if plan.factor:
            self._regularizer = spectral_torch.SpectralNormRegularizer(
                self._model, factor=plan.factor
            ).attach(self._optimizer)

    def step(self, images: Images, labels: Labels) -> None:
        self._optimizer.zero_grad()
        logits = self._model(tensor(images))
        nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        self._optimizer.step()
        self._scheduler.step()

    def wait(self) -> None:
        pass

    @torch.inference_mode()
    def predict(self, images: Images) -> Labels:
        found: Labels = self._model(tensor(images)).argmax(dim=1).numpy()
        return found

    def weights(self) -> dict[str, NDArray[np.float32]]:
        parameters = dict(self._model.named_parameters())
        return {layer: parameters[f"{layer}.weight"].detach().numpy().copy() for layer in SHAPES}

    def sigmas(self) -> dict[str, float]:
        if self._regularizer is None:
            return {}
        sigmas = self._regularizer.sigmas()
        return {layer: float(sigmas[f"{layer}.weight"]) for layer in SHAPES}


def model(seed: int) -> nn.Module:
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(1, 32, 3, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 3, stride=2, padding=1),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        dense1=nn.Linear(1024, 128),
        relu3=nn.ReLU(),
        dense2=nn.Linear(128, 10),
    )
    net = nn.Sequential(layers)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for layer, weight in initial_weights(seed).items():
        state[f"{layer}.weight"] = torch.from_numpy(weight)
    net.load_state_dict(state)
    return net


def tensor(images: Images) -> Tensor:
    return torch.from_numpy(images).unsqueeze(1)
