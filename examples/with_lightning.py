"""Lightning: one line where the optimizer is made, and two hooks that keep v and σ in checkpoints.

Run as ``python examples/with_lightning.py``.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from spectral_torch import SpectralNormRegularizer


class Digits(pl.LightningModule):
    """A classifier that is regularized wherever it is trained."""

    def __init__(self, factor: float = 0.01, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.reg = SpectralNormRegularizer(self, factor=factor)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.reg.attach(optimizer)  # <- every step now adds λσuvᵀ
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["spectral"] = self.reg.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.reg.load_state_dict(checkpoint["spectral"])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())


def main(epochs: int = 10, factor: float = 0.01) -> tuple[Digits, float]:
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(data, [0.5, 0.5])
    model = Digits(factor)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, 64, shuffle=True))
    accuracy = trainer.test(model, DataLoader(test, 256), verbose=False)[0]["accuracy"]
    print("σ", {name: round(float(sigma), 2) for name, sigma in model.reg.sigmas().items()})
    print(f"accuracy {accuracy:.3f}")
    return model, accuracy


if __name__ == "__main__":
    main()
