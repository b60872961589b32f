"""Accelerate: attach the optimizer before `prepare` wraps it, and register v and σ to be saved.

Run as ``python examples/with_accelerate.py``.
"""

from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_torch import SpectralNormRegularizer


def main(
    epochs: int = 10, factor: float = 0.01
) -> tuple[nn.Module, SpectralNormRegularizer, float]:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=0.5, random_state=0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    reg = SpectralNormRegularizer(model, factor=factor).attach(optimizer)  # <- before `prepare`

    accelerator = Accelerator(gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(reg)
    for _ in range(epochs):
        for batch, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(batch), target))
                optimizer.step()
                optimizer.zero_grad()

    with TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)  # with v and σ
    model = accelerator.unwrap_model(model)
    with torch.no_grad():
        predicted = model(test_x.to(accelerator.device)).argmax(1).cpu()
    accuracy = float((predicted == test_y).float().mean())
    print("σ", {name: round(float(sigma), 2) for name, sigma in reg.sigmas().items()})
    print(f"accuracy {accuracy:.3f}")
    return model, reg, accuracy


if __name__ == "__main__":
    main()
