"""`python -m benchmarks.speed`: time every case, print a table, save the numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import spectral_core as sc

from .cases import CASES, Step, peers

RESULTS = Path(__file__).parent / "results"
Times = dict[str, list[float]]


def interleaved(steps: dict[str, Step], rounds: int) -> Times:
    """Seconds of each step, taken in turns so that a slow moment of the machine hits all."""
    times: Times = {name: [] for name in steps}
    for timed in range(-3, rounds):
        for name, step in steps.items():
            start = perf_counter()
            step()
            if timed >= 0:
                times[name].append(perf_counter() - start)
    return times


def summary(times: Times) -> dict[str, dict[str, float]]:
    ours = median(times["spectral_torch"])
    return {
        name: {
            "median_ms": 1e3 * median(taken),
            "quartiles_ms": [1e3 * q for q in quantiles(taken, n=4)[::2]],
            "ratio_of_spectral_torch": ours / median(taken),
        }
        for name, taken in times.items()
    }


def machine() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spectral_core": sc.__version__,
        "dtype": "float32",
    }


def table(results: dict[str, Any]) -> Table:
    shown = Table("case", "step", "median", "quartiles", "spectral_torch takes")
    for case, rows in results.items():
        for name, row in rows.items():
            low, high = row["quartiles_ms"]
            shown.add_row(
                case,
                name,
                f"{row['median_ms']:.2f} ms",
                f"{low:.2f}–{high:.2f}",
                f"{row['ratio_of_spectral_torch']:.2f} ×",
            )
            case = ""
        shown.add_section()
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds a case")
    parser.add_argument("--save", action="store_true", help="write the result file of README")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {
        case: summary(interleaved(peers(make()), options.rounds))
        for case, make in track(list(CASES.items()), "timing")
    }
    Console().print(table(results))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        content = {"machine": machine(), "cases": results}
        (RESULTS / "cpu.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
