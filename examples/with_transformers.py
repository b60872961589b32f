"""Hugging Face's Trainer: give it an attached optimizer, whose checkpoints also keep v and σ.

Run as ``python examples/with_transformers.py``.
"""

from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import random_split
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spectral_torch import SpectralNormRegularizer


def digits() -> list[dict]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]


def network(width: int = 16) -> ConvNextForImageClassification:
    stages = {"num_stages": 2, "hidden_sizes": [width, 2 * width], "depths": [1, 1]}
    config = ConvNextConfig(num_channels=1, patch_size=2, num_labels=10, **stages)
    return ConvNextForImageClassification(config)


def regularized(
    model: nn.Module, optimizer: torch.optim.Optimizer, factor: float
) -> SpectralNormRegularizer:
    reg = SpectralNormRegularizer(model, factor=factor).attach(optimizer)  # <- the line
    # The Trainer's checkpoints hold what the optimizer says of itself: let it say v and σ too.
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"spectral": reg.state_dict()})
    optimizer.register_load_state_dict_pre_hook(lambda _, s: reg.load_state_dict(s["spectral"]))
    return reg


def main(epochs: int = 10, factor: float = 0.01) -> tuple[SpectralNormRegularizer, float]:
    set_seed(0)
    train, test = random_split(digits(), [0.5, 0.5])
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reg = regularized(model, optimizer, factor)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, None))
        trainer.train()
        predicted = trainer.predict(test)
    accuracy = float((predicted.predictions.argmax(1) == predicted.label_ids).mean())
    print("largest σ", round(max(float(sigma.max()) for sigma in reg.sigmas().values()), 2))
    print(f"accuracy {accuracy:.3f}")
    return reg, accuracy


if __name__ == "__main__":
    main()
