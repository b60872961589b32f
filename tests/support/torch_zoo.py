"""A model with weights of every kind of layout and memory, for tests of the PyTorch adapter."""

import torch
from torch import nn


def zoo(dtype=torch.float32, device="cpu"):
    """Weights of every kind of layout and memory, with gradients."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(7, 5),
            "wide": nn.Linear(300, 200),
            "conv": nn.Conv2d(3, 4, 3),
            "last": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
            "grouped": nn.Conv1d(4, 8, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 3, 2),
            "gates": nn.LSTM(3, 4),
        }
    ).to(device, dtype)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model["wide"].weight.grad = torch.randn(300, 200, device=device, dtype=dtype).T
    return model


def gradients(model):
    """Copies of the gradients by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters()}
