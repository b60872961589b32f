"""Runs that are killed and resumed end with the parameters of one that was not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import spectral_core as sc

SCRIPT = Path(__file__).parents[1] / "support" / "resumable.py"
STEPS = 20
NEEDS = {
    "numpy": ["numpy"],
    "torch": ["torch"],
    "safetensors": ["torch", "safetensors"],
    "distributed": ["torch"],
    "orbax": ["jax", "optax", "orbax.checkpoint"],
}


def start(kind, folder, every_n_steps, **options):
    arguments = [kind, folder, str(STEPS), "--every-n-steps", str(every_n_steps)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


def parameters(kind, folder, every_n_steps):
    """Return the end of an undisturbed run, its start, and its first step."""
    process = start(kind, folder, every_n_steps, stdin=subprocess.DEVNULL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    with np.load(folder / "parameters.npz") as file:
        return dict(file), int(output.split("\n")[0].removeprefix("begins "))


def kill_at(moment, kind, folder, every_n_steps):
    """Kill a run when it says ``moment``; the step with which it began."""
    process = start(kind, folder, every_n_steps, stdin=subprocess.PIPE)
    first = int(process.stdout.readline().removeprefix("begins "))
    while (said := process.stdout.readline().strip()) != moment:
        assert said, f"the run ended before {moment!r}"
        print(file=process.stdin, flush=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return first


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The parameters of a run that nothing happened to."""

    @cache
    def of(kind, every_n_steps):
        found, first = parameters(kind, tmp_path_factory.mktemp("whole"), every_n_steps)
        assert first == 0
        return found

    return of


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("kind", "every_n_steps"), [*((kind, 4) for kind in NEEDS), ("numpy", 1), ("torch", 1)]
)
def test_a_killed_run_goes_on_bit_for_bit(kind, every_n_steps, undisturbed, tmp_path):
    for package in NEEDS[kind]:
        if find_spec(package.partition(".")[0]) is None:
            pytest.skip(f"{package} is not installed")
    # Within a step, within a checkpoint, and within a step again.
    rng = random.Random(f"{kind} {every_n_steps}")
    early, late = rng.randrange(1, 8), rng.randrange(14, STEPS)
    folder = tmp_path / "killed"
    for moment, begins in [
        (f"step {early}", 0),
        ("written 12", early // 3 * 3),  # but not in its place: 9 is the last
        (f"step {late}", 9),
    ]:
        assert kill_at(moment, kind, folder, every_n_steps) == begins
    found, first = parameters(kind, folder, every_n_steps)
    assert first == late // 3 * 3
    expected = undisturbed("torch" if "torch" in NEEDS[kind] else kind, every_n_steps)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_state_is_needed_for_it(tmp_path):
    """Without the regularizer's state the numbers differ: the runs above would notice."""
    expected, _ = parameters("numpy", tmp_path, 4)
    last = tmp_path / "000018"
    arrays = dict(np.load(last / "state.npz"))
    arrays["in.v"] = arrays["in.v"][..., ::-1]
    np.savez(last / "state.npz", **arrays)
    found, first = parameters("numpy", tmp_path, 4)
    assert first == 18
    assert not np.array_equal(found["in"], expected["in"])


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (
            {"in": (12, 8), "other": (8, 4)},
            sc.NamesError,
            r"missing \['other/w'\], unexpected \['out/w'\]; call init again",
        ),
        (
            {"in": (13, 8), "out": (8, 4)},
            sc.ShapeError,
            r"'in/w' of shape \(12, 8\) needs a v of shape \(k, 12\), but .* has \(1, 13\)",
        ),
        (
            {"in": (12, 9), "out": (9, 4)},
            sc.ShapeError,
            r"'in/w' of shape \(12, 8\) needs a u of shape \(8,\), but the state's has \(9,\)",
        ),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_jax_state_of_another_model_is_refused(shapes, error, message, jit):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    import spectral_jax

    def params(shapes):
        return {name: {"w": jax.numpy.ones(shape)} for name, shape in shapes.items()}

    tx = optax.chain(
        spectral_jax.add_spectral_norm_regularization(factor=0.1, every_n_steps=2), optax.adam(0.01)
    )
    model = params({"in": (12, 8), "out": (8, 4)})
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(error, match=message):
        update(model, tx.init(params(shapes)), model)
