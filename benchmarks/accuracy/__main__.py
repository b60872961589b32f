"""`python -m benchmarks.accuracy`: run every scheme, print a table, save numbers and a picture."""

from __future__ import annotations

import argparse
import json
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import figure
from .errors import errors, exact, quantiles
from .matrices import RATIOS, close_pair, drifting, training
from .schemes import SCHEMES, SELDOM, Matrix

RESULTS = Path(__file__).parent / "results"
BUDGET = 120  # readings of W from a cold start


def static(seeds: int) -> dict[str, Any]:
    """Errors after each step on a matrix that stays: the median over seeds."""
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        cases = [(seed, W := close_pair(ratio, seed), exact(W)) for seed in range(seeds)]
        found[str(ratio)] = {
            name: {"passes": scheme.passes}
            | medians(
                [
                    errors(scheme, [W] * steps, repeat(truth, steps), seed)._asdict()
                    for seed, W, truth in cases
                ]
            )
            for name, scheme in SCHEMES.items()
            if (steps := BUDGET // scheme.passes)
        }
    return found


def medians(runs: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {key: np.median([run[key] for run in runs], axis=0).tolist() for key in runs[0]}


def tracking() -> dict[str, Any]:
    """Errors at each step of matrices that move, one step of the scheme each."""
    paths: dict[str, list[Matrix]] = {
        f"{method} training, {layer}": [step[layer] for step in steps]
        for method, steps in training().items()
        for layer in steps[0]
    }
    paths["synthetic drift"] = list(drifting())
    found: dict[str, Any] = {}
    for title, matrices in paths.items():
        truths = [exact(W) for W in matrices]
        found[title] = {
            name: {"passes": scheme.passes} | errors(scheme, matrices, truths)._asdict()
            for name, scheme in (SCHEMES | SELDOM).items()
        }
    return found


def summary(tracks: dict[str, Any], skip: int = 50) -> dict[str, Any]:
    """Quantiles over all steps but the first ones, of each path, scheme and error."""
    return {
        title: {
            name: {key: quantiles(rows[name][key][skip:]) for key in ("sigma", "angle", "term")}
            for name in rows
        }
        for title, rows in tracks.items()
    }


def table(results: dict[str, Any]) -> Table:
    """σ after 48 and 120 readings; of the moving, the worst path's term."""
    shown = Table("scheme", "reads/step", *(f"σ₂/σ₁ = {r}" for r in RATIOS), *map(str, GROUPS))
    for name, scheme in (SCHEMES | SELDOM).items():
        cells = [
            " ".join(f"{rows[name]['sigma'][p // scheme.passes - 1]:.0e}" for p in (48, BUDGET))
            if name in rows
            else ""
            for rows in results["static"].values()
        ]
        for group in GROUPS:
            of = [rows for title, rows in results["summary"].items() if title.startswith(group)]
            worst = max((rows[name]["term"] for rows in of), key=lambda q: q["p95"])
            cells.append(" ".join(f"{value:.0e}" for value in worst.values()))
        shown.add_row(name, f"{scheme.passes / scheme.every:g}", *cells)
    return shown


GROUPS = ("vanilla", "spectral", "synthetic")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of the static matrices")
    parser.add_argument("--save", action="store_true", help="write into the repository's results")
    options = parser.parse_args()
    results = {"static": static(options.seeds), "tracking": tracking()}
    results["summary"] = summary(results["tracking"])
    console = Console(width=150)
    console.print("static: error of σ after 48 and 120 readings; moving: median, 95 % and largest")
    console.print("error of σuvᵀ after step 50 on the path where that 95 % is worst")
    console.print(table(results))
    folder = RESULTS if options.save else Path("accuracy-output")
    figure.save(folder / "accuracy.png", results)
    (folder / "accuracy.json").write_text(json.dumps(rounded(results)) + "\n")
    console.print(f"wrote accuracy.png and accuracy.json into {folder.name}")


def rounded(value: Any) -> Any:
    """Three digits, and every fifth step of the long paths: the file stays small."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [float(f"{x:.2e}") for x in value[:: 5 if len(value) > BUDGET else 1]]
    return value


if __name__ == "__main__":
    main()
