"""Time the report of a checkpoint, and compare it with WeightWatcher.

The command writes a bfloat16 checkpoint with the shapes of a Llama into a temporary folder, 4 GB by
default, and deletes it. The report runs in a process of its own, whose peak memory is read from
Linux. The yardstick reads the file once, and multiplies each matrix by BLAS in float32.

WeightWatcher is optional. It may need versions of its own. Make an environment for it by
``python -m venv peers && peers/bin/pip install weightwatcher torch -e .``, and run it there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import numpy as np

import spectral_core as sc

from .common import RESULTS, add_output, machine, markdown, output_of, read_json, write_json
from .norms import timed

FILE = "report.json"
PRODUCTS = 30
WIDTH, HIDDEN, TOKENS = 4096, 11008, 32000
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 4, WIDTH),
    "self_attn.v_proj": (WIDTH // 4, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
ROWS = 512  # that are drawn at once
# Of the checkpoint that WeightWatcher measures too: one layer of a GPT-2.
LINEAR = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]


def shapes(gigabytes: float) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of a checkpoint of about that size: whole layers."""
    found = {"model.embed_tokens.weight": (TOKENS, WIDTH)}
    each = sum(2 * m * n for m, n in LAYER.values())
    for i in range(max(1, round((gigabytes * 1e9 - 2 * TOKENS * WIDTH) / each))):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    return found


def write_checkpoint(path: Path, tensors: dict[str, tuple[int, int]]) -> None:
    """Write Gaussian weights in bfloat16, a few rows at a time."""
    header, place = {}, 0
    for name, (m, n) in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": [m, n],
            "data_offsets": [place, place + 2 * m * n],
        }
        place += 2 * m * n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the format's own writer does: numbers are aligned
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for m, n in tensors.values():
            for start in range(0, m, ROWS):
                rows = rng.standard_normal((min(ROWS, m - start), n), dtype=np.float32)
                rows *= n**-0.5
                file.write((rows.view(np.uint32) >> 16).astype(np.uint16).tobytes())


# What runs in a process of its own


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB, or NaN."""
    status = Path("/proc/self/status")  # of this program: `getrusage` inherits that of its parent
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def of_report(path: str) -> dict[str, Any]:
    """Return the time and memory of a report, and how wide its intervals are."""
    before, start, busy = peak(), perf_counter(), process_time()
    found = sc.report(path)
    seconds, busy = perf_counter() - start, process_time() - busy
    gaps = [row.upper / row.lower - 1 for row in found.values() if row.lower and row.upper]
    return {
        "seconds": seconds,
        "cpu_seconds": busy,  # of all threads: other programs disturb it less
        "peak_mb": peak(),
        "import_mb": before,
        "matrices": len(found),
        "largest_gap": max(gaps),
    }


def of_yardstick(path: str, tensors: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Return the seconds of reading a file, of decoding it to float32 and of products with it."""
    found = dict.fromkeys(("read", "decode", "times", "adjoint_times"), 0.0)
    busy = process_time()

    def clocked(name: str, action: Any) -> Any:
        start = perf_counter()
        result = action()
        found[name] += perf_counter() - start
        return result

    rng = np.random.default_rng(1)
    with Path(path).open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for m, n in tensors.values():
            stored = np.empty((m, n), np.uint16)
            clocked("read", lambda stored=stored: file.readinto(stored.data.cast("B")))
            W = clocked("decode", lambda stored=stored: widened(stored))
            x, y = (rng.standard_normal(size, dtype=np.float32) for size in (n, m))
            clocked("times", lambda W=W, x=x: [W @ x for _ in range(PRODUCTS)])
            clocked("adjoint_times", lambda W=W, y=y: [y @ W for _ in range(PRODUCTS)])
    return found | {"cpu_seconds": process_time() - busy}


def widened(stored: Any) -> Any:
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def alone(action: Any, *arguments: Any, **environment: str) -> Any:
    """Run a function in a new process, with some more variables of the environment."""
    with (
        patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(action, *arguments).result()


def checkpoint(gigabytes: float) -> dict[str, Any]:
    """Return the numbers of a large checkpoint."""
    tensors = shapes(gigabytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, tensors)
        size = path.stat().st_size / 1e9
        report = alone(of_report, str(path))
        by_numpy = alone(of_report, str(path), NUMBA_DISABLE_JIT="1")
        yardstick = alone(of_yardstick, str(path), tensors)
    largest = max(2 * m * n for m, n in tensors.values()) / 1e6
    found = {"gb": size, "largest_mb": largest, "numba": find_spec("numba") is not None}
    return found | {"report": report, "by_numpy": by_numpy, "yardstick": yardstick}


# WeightWatcher

SAME = {  # WeightWatcher's name, and the same number from a row
    "spectral_norm": lambda row: row.sigma**2,
    "log_spectral_norm": lambda row: 2 * np.log10(row.sigma),
    "norm": lambda row: row.frobenius**2,
    "log_norm": lambda row: 2 * np.log10(row.frobenius),
    "stable_rank": lambda row: row.stable_rank,
    "sv_max": lambda row: row.sigma,
    "sv_min": lambda row: row.spectrum[-1],
}


def weightwatcher() -> dict[str, Any]:
    """Return times of both on one checkpoint, and how far their common numbers are apart."""
    import torch
    from weightwatcher import WeightWatcher

    for name in ("weightwatcher", "powerlaw"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, m, bias=False) for m, n in LINEAR]
    model = torch.nn.Sequential(*layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model.state_dict(), path)
        watcher = WeightWatcher(model=model, log_level=logging.ERROR)
        results: dict[str, Any] = {}
        methods = {
            "report": lambda: results.update(plain=sc.report(path)),
            "report, spectrum": lambda: results.update(report=sc.report(path, spectrum=True)),
            "WeightWatcher": lambda: results.update(peer=watcher.analyze()),
        }
        times = timed(methods)
    return {
        "seconds": {name: median(seconds) for name, seconds in times.items()},
        "matrices": len(results["report"]),
        "difference": differences(results["report"], results["peer"]),
        "version": version("weightwatcher"),
    }


def differences(report: Mapping[str, Any], peer: Any) -> dict[str, float]:
    """Return the largest relative difference of each number that both measure."""
    found = dict.fromkeys(SAME, 0.0)
    for _, line in peer.iterrows():
        row = report[f"{line['longname']}.weight"]
        for name, own in SAME.items():
            difference = abs(own(row) - line[name]) / abs(line[name])
            found[name] = max(found[name], float(difference))
    return found


# The page


def in_seconds(*values: float) -> list[str]:
    return [f"{value:.0f} s" for value in values]


def page(folder: Path = RESULTS) -> str:
    """Return the tables of the time and memory, and of WeightWatcher."""
    result = read_json(folder / FILE)
    found = result["checkpoint"]
    own, by_numpy, yard = found["report"], found["by_numpy"], found["yardstick"]
    products = yard["times"] + yard["adjoint_times"]
    whole = yard["read"] + yard["decode"] + products
    reports = {"report, NumPy alone": by_numpy}
    if found["numba"]:
        reports = {"report, with Numba": own} | reports
    rows = [
        *(
            [name, *in_seconds(one["seconds"], one["cpu_seconds"]), f"{one['peak_mb']:.0f} MB"]
            for name, one in reports.items()
        ),
        [
            f"reading it, {PRODUCTS} products with W and Wᵀ each",
            *in_seconds(whole, yard["cpu_seconds"]),
            "",
        ],
        ["largest tensor", "", "", f"{found['largest_mb']:.0f} MB"],
    ]
    about = result["machine"]
    head = f"{found['gb']:.1f} GB in bfloat16, {own['matrices']} matrices, {about['cores']} cores"
    text = [markdown([head, "time", "time of all cores", "memory"], rows)]
    text.append(f"The widest interval is {100 * own['largest_gap']:.0f} % of σ₁.")
    if peer := result.get("weightwatcher"):
        lines = [[name, f"{seconds:.1f} s"] for name, seconds in peer["seconds"].items()]
        head = f"{peer['matrices']} matrices in float32; WeightWatcher {peer['version']}"
        text.append(markdown([head, "time"], lines))
        lines = [[f"`{name}`", f"{x:.0e}"] for name, x in peer["difference"].items()]
        text.append(markdown(["number of WeightWatcher", "largest relative difference"], lines))
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ("checkpoint", "weightwatcher")
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    add_output(parser, "report-output")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the folder is deleted
    path = output_of(options) / FILE
    result = read_json(path) if path.exists() else {}
    if "checkpoint" in options.parts:
        result |= {"checkpoint": checkpoint(options.gigabytes), "machine": machine("cpu")}
        write_json(path, result, 4)  # before WeightWatcher can fail
    if "weightwatcher" in options.parts:
        if find_spec("weightwatcher") is None:
            parser.error("WeightWatcher is missing: python -m pip install weightwatcher")
        result |= {"weightwatcher": weightwatcher(), "machine": machine("cpu")}
        write_json(path, result, 4)
    print(page(path.parent) if "checkpoint" in result else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
