"""A training run that may be killed at any time, and goes on from its last checkpoint.

``python tests/support/resumable.py torch FOLDER 20`` makes 20 steps, and saves every third one.
Before each step, and when a checkpoint is written but not yet in its place, it says so and waits
for a line: at the end of the input it goes on at once.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

SAVE_EVERY = 3
FACTOR = 0.1


def batch(step):
    """Inputs and targets, the same for a step whenever it is made."""
    rng = np.random.default_rng(step)
    x = rng.standard_normal((16, 12))
    return x, np.tanh(x[:, :4])


def announce(*words):
    print(*words, flush=True)
    sys.stdin.readline()


def last_checkpoint(folder):
    """The step and the folder of the newest checkpoint, or (0, None)."""
    found = max((path for path in folder.iterdir() if path.name.isdigit()), default=None)
    return (0, None) if found is None else (int(found.name), found)


def save(folder, step, write):
    """Let ``write`` fill a folder, which gets its name when it is whole: a rename is atomic."""
    part = folder / "unfinished"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(part)
    announce("written", step)
    part.rename(folder / f"{step:06}")


class Numpy:
    def __init__(self, every_n_steps):
        import spectral_core as sc

        self.sc, self.every_n_steps = sc, every_n_steps
        rng = np.random.default_rng(0)
        self.weights = {"in": rng.standard_normal((8, 12)) / 3, "out": rng.standard_normal((4, 8))}
        self.momenta = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.state = sc.init(self.weights)

    def step(self, step):
        x, y = batch(step)
        hidden = x @ self.weights["in"].T
        error = (hidden @ self.weights["out"].T - y) / len(x)
        grads = {"in": (error @ self.weights["out"]).T @ x, "out": error.T @ hidden}
        self.state = self.sc.add_gradient_(
            self.weights,
            grads,
            self.state,
            factor=FACTOR,
            n_iter=int(step % self.every_n_steps == 0),
        )
        for name, weight in self.weights.items():
            self.momenta[name] = 0.9 * self.momenta[name] + grads[name]
            weight -= 0.02 * self.momenta[name]

    def save(self, folder):
        for what in ("weights", "momenta"):
            np.savez(folder / f"{what}.npz", **getattr(self, what))
        np.savez(folder / "state.npz", **self.sc.state_dict(self.state))

    def load(self, folder):
        self.weights = dict(np.load(folder / "weights.npz"))
        self.momenta = dict(np.load(folder / "momenta.npz"))
        self.state = self.sc.load_state_dict(self.state, np.load(folder / "state.npz"))

    def parameters(self):
        return self.weights


class Torch:
    def __init__(self, every_n_steps):
        import torch

        import spectral_torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.torch = torch
        self.model = torch.nn.Sequential(
            torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.reg = spectral_torch.SpectralNormRegularizer(
            self.model, factor=FACTOR, every_n_steps=every_n_steps
        ).attach(self.optimizer)

    def step(self, step):
        x, y = (self.torch.tensor(part, dtype=self.torch.float32) for part in batch(step))
        self.optimizer.zero_grad()
        (self.model(x) - y).square().mean().backward()
        self.optimizer.step()

    def save(self, folder):
        parts = {"model": self.model, "optimizer": self.optimizer, "reg": self.reg}
        kept = {name: part.state_dict() for name, part in parts.items()}
        self.torch.save(kept, folder / "run.pt")

    def load(self, folder):
        kept = self.torch.load(folder / "run.pt")
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.reg.load_state_dict(kept["reg"])

    def parameters(self):
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}


class Safetensors(Torch):
    def save(self, folder):
        from safetensors.torch import save_file

        save_file(self.model.state_dict(), folder / "model.safetensors")
        save_file(self.reg.state_dict(), folder / "reg.safetensors")
        self.torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder):
        from safetensors.torch import load_file

        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.reg.load_state_dict(load_file(folder / "reg.safetensors"))
        self.optimizer.load_state_dict(self.torch.load(folder / "optimizer.pt"))


class Distributed(Torch):
    """`torch.distributed.checkpoint`, in one process."""

    def save(self, folder):
        from torch.distributed import checkpoint

        checkpoint.save(self.state(), checkpoint_id=folder)

    def load(self, folder):
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict import set_state_dict

        kept = self.state()
        checkpoint.load(kept, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=kept["model"],
            optim_state_dict=kept["optimizer"],
        )
        self.reg.load_state_dict(kept["reg"])

    def state(self):
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "reg": self.reg.state_dict()}


class Jax:
    def __init__(self, every_n_steps):
        import jax
        import jax.numpy as jnp
        import optax

        import spectral_jax

        self.jax = jax
        tx = optax.chain(
            spectral_jax.add_spectral_norm_regularization(
                factor=FACTOR, every_n_steps=every_n_steps
            ),
            optax.adam(0.01),
        )

        def loss(params, x, y):
            return jnp.mean((jnp.tanh(x @ params["in"]["w"]) @ params["out"]["w"] - y) ** 2)

        @jax.jit
        def update(params, state, x, y):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        self.update = update
        keys = jax.random.split(jax.random.key(0))
        shapes = {"in": (12, 8), "out": (8, 4)}
        self.params = {
            name: {"w": jax.random.normal(key, shape) / 3}
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        self.state = tx.init(self.params)

    def step(self, step):
        x, y = (part.astype("float32") for part in batch(step))
        self.params, self.state = self.update(self.params, self.state, x, y)

    def save(self, folder):
        from orbax.checkpoint import StandardCheckpointer

        with StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve() / "run", (self.params, self.state))

    def load(self, folder):
        from orbax.checkpoint import StandardCheckpointer

        with StandardCheckpointer() as checkpointer:
            kept = checkpointer.restore(folder.resolve() / "run", (self.params, self.state))
        self.params, self.state = kept

    def parameters(self):
        return {name: np.asarray(layer["w"]) for name, layer in self.params.items()}


KINDS = {
    "numpy": Numpy,
    "torch": Torch,
    "safetensors": Safetensors,
    "distributed": Distributed,
    "orbax": Jax,
}


def main(kind, folder, steps, every_n_steps):
    folder.mkdir(exist_ok=True)
    run = KINDS[kind](every_n_steps)
    first, checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        run.load(checkpoint)
    print("begins", first, flush=True)
    for step in range(first, steps):
        announce("step", step)
        run.step(step)
        if (step + 1) % SAVE_EVERY == 0:
            save(folder, step + 1, run.save)
    np.savez(folder / "parameters.npz", **run.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--every-n-steps", type=int, default=1)
    main(**vars(parser.parse_args()))
