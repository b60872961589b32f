"""skorch: the regularizer is made where the optimizer is, so that grid searches can choose λ too.

Run as ``python examples/with_skorch.py``.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from torch import nn

from spectral_torch import SpectralNormRegularizer


class SpectralClassifier(NeuralNetClassifier):
    """A classifier with a parameter ``factor``: λ."""

    def __init__(self, *args: object, factor: float = 0.01, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def initialize_optimizer(self) -> "SpectralClassifier":
        super().initialize_optimizer()
        self.reg_ = SpectralNormRegularizer(self.module_, factor=self.factor).attach(
            self.optimizer_
        )
        return self


def main(epochs: int = 10, factor: float = 0.01) -> tuple[SpectralClassifier, float]:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (images / 16).astype(np.float32), labels, test_size=0.5, random_state=0
    )
    classifier = SpectralClassifier(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        factor=factor,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=0.1,
        batch_size=64,
        max_epochs=epochs,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    )
    classifier.fit(x, y)
    accuracy = classifier.score(test_x, test_y)
    print("σ", {name: round(float(sigma), 2) for name, sigma in classifier.reg_.sigmas().items()})
    print(f"accuracy {accuracy:.3f}")
    return classifier, accuracy


if __name__ == "__main__":
    main()
