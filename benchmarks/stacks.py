"""The training stacks that are tested, and in which versions: README's table of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Stack(NamedTuple):
    """A row: what was tested of which packages, and by which file of tests/integrations."""

    title: str
    packages: tuple[str, ...]
    tested: str
    test: str


STACKS = (
    Stack(
        "PyTorch, many processes",
        ("torch",),
        "DDP, FSDP2 (also hybrid, offloaded, mixed precision with GradScaler), tensor parallelism, "
        "2-D meshes; saved on 4, resumed on 2",
        "torch_distributed",
    ),
    Stack(
        "`torch.compile`",
        ("torch",),
        "whole steps: no graph break and no recompilation more than without",
        "torch_compile",
    ),
    Stack(
        "JAX meshes, Orbax",
        ("jax", "optax", "orbax-checkpoint"),
        "1-D and 2-D meshes, messages of vectors alone, restored onto another mesh",
        "jax_mesh",
    ),
    Stack(
        "Lightning",
        ("lightning",),
        "accumulation, clipping, 16-mixed and bf16-mixed, fused optimizers, checkpoints",
        "lightning",
    ),
    Stack(
        "Hugging Face Trainer",
        ("transformers", "accelerate"),
        "accumulation, clipping, checkpoints",
        "transformers",
    ),
    Stack(
        "Accelerate",
        ("accelerate",),
        "accumulation, clipping, GradScaler, checkpoints",
        "accelerate",
    ),
    Stack("skorch", ("skorch",), "clipping, `partial_fit`, checkpoints", "skorch"),
    Stack(
        "optimizers",
        ("bitsandbytes", "torchao", "schedulefree", "lion-pytorch"),
        "8- and 4-bit, schedule-free, Lion, Muon, Adafactor, ZeRO, in the backward pass",
        "optimizers",
    ),
    Stack("Flax NNX", ("flax",), "`nnx.Optimizer`, split and merge", "flax_nnx"),
    Stack("Equinox", ("equinox",), "`filter_jit`, serialisation", "equinox"),
    Stack(
        "Keras, on PyTorch and on JAX",
        ("keras",),
        "`fit`, mixed precision, accumulation, EMA, every kind of layer, saved and loaded",
        "keras",
    ),
    Stack("TensorBoard", ("tensorboard",), "what `Watch` logs, read back", "watching"),
    Stack(
        "killed and resumed",
        ("numpy", "torch", "safetensors", "orbax-checkpoint"),
        "npz, `torch.save`, safetensors, `torch.distributed.checkpoint`, Orbax: equal in every bit",
        "resume",
    ),
)


def table() -> str:
    """The table, with the versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    rows = ["| stack | version | tested |", "|---|---|---|"]
    for title, packages, tested, test in STACKS:
        named = len(packages) > 1 or packages[0] not in title.lower()
        found = ", ".join(f"{p} {versions[p]}" if named else versions[p] for p in packages)
        rows.append(f"| [{title}](tests/integrations/test_{test}.py) | {found} | {tested} |")
    return "\n".join(rows)
