"""Tables for the terminal, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rounding import rounded

from .cost import Cost, whole_share
from .net import SHAPES
from .results import Spread, differences, estimate_error, machine, select, steps, threshold
from .train import METHODS, RATES, Run

DIGITS = 5  # significant ones, in the JSON file

MEASURES = {"test": "test accuracy", "gap": "gap", "gap_at_alpha": "gap at α"}


def print_report(
    console: Console, backend: str, runs: Sequence[Run], costs: Sequence[Cost]
) -> None:
    console.print(accuracy_table(runs))
    counts = [f"{count} at batch {batch}" for batch, count in steps(runs).items()]
    console.print(
        f"Steps: {', '.join(counts)}. "
        "gap: train minus test accuracy. gap at α: its minimum over the epochs whose test accuracy "
        "exceeds α, as in the paper; α is the highest hundredth that every run of its batch size "
        "exceeds.\n",
        style="dim",
    )
    console.print(sigma_table(runs))
    console.print(
        "The regularizer's own estimates, from one iteration a step, are within "
        f"{100 * estimate_error(runs):.1f} % of these.\n",
        style="dim",
    )
    console.print(runs_table(runs))
    console.print(cost_table(costs))
    share = 100 * whole_share(costs, steps(runs))
    console.print(f"Of all steps here, the regularizer takes {share:.1f} %.\n", style="dim")
    console.print(difference_table(runs))
    for batch in RATES:
        console.print(verdict(runs, batch))
    console.print(", ".join(f"{k} {v}" for k, v in machine(backend).items()), style="dim")


def accuracy_table(runs: Sequence[Run]) -> Table:
    n = len({run.plan.seed for run in runs})
    table = new_table(
        f"After the last epoch, in percent ({n} seeds, mean ± standard deviation)",
        *("batch", "method", "test", "train", "gap", "α", "gap at α"),
    )
    for batch in RATES:
        alpha = threshold(runs, batch)
        for method in METHODS:
            chosen = select(runs, method, batch)
            table.add_row(
                str(batch),
                method,
                percent([run.test[-1] for run in chosen]),
                percent([run.train[-1] for run in chosen]),
                percent([run.gaps[-1] for run in chosen]),
                f"{100 * alpha:.0f}",
                percent([run.gap_at(alpha) for run in chosen]),
                end_section=method == "spectral",
            )
    return table


def sigma_table(runs: Sequence[Run]) -> Table:
    columns = [f"{method} {batch}" for batch in RATES for method in METHODS]
    table = new_table(
        "Largest singular value by layer (exact, by SVD)", "layer", "before", *columns
    )
    groups = [select(runs, method, batch) for batch in RATES for method in METHODS]
    for layer in SHAPES:
        table.add_row(
            layer,
            plain([run.before[layer][0] for run in groups[0]]),
            *(plain([run.after[layer][0] for run in group]) for group in groups),
        )
    table.add_section()
    table.add_row(
        "product",
        plain([prod(values[0] for values in run.before.values()) for run in groups[0]], 0),
        *(
            plain([prod(values[0] for values in run.after.values()) for run in group], 0)
            for group in groups
        ),
    )
    return table


def runs_table(runs: Sequence[Run]) -> Table:
    table = new_table(
        "All runs, in percent",
        "batch",
        "seed",
        *(f"{key}\n{m}" for key in ("test", "gap", "gap at α") for m in METHODS),
    )
    for batch in RATES:
        alpha = threshold(runs, batch)
        pairs = list(zip(*(select(runs, method, batch) for method in METHODS), strict=True))
        for pair in pairs:
            table.add_row(
                str(batch),
                str(pair[0].plan.seed),
                *(f"{100 * run.test[-1]:.2f}" for run in pair),
                *(f"{100 * run.gaps[-1]:.2f}" for run in pair),
                *(f"{100 * run.gap_at(alpha):.2f}" for run in pair),
                end_section=pair is pairs[-1],
            )
    return table


def cost_table(costs: Sequence[Cost]) -> Table:
    table = new_table(
        "Training step, medians in ms", "batch", "vanilla", "spectral", "share of the regularizer"
    )
    for cost in costs:
        table.add_row(
            str(cost.batch),
            f"{cost.vanilla_ms:.3f}",
            f"{cost.spectral_ms:.3f}",
            f"{100 * cost.share:.1f} %",
        )
    return table


def difference_table(runs: Sequence[Run]) -> Table:
    table = new_table(
        "Spectral minus vanilla, in points, seed by seed", "batch", *MEASURES.values()
    )
    for batch in RATES:
        found = differences(runs, batch)
        table.add_row(str(batch), *(percent_of(found[key], "+") for key in MEASURES))
    return table


def verdict(runs: Sequence[Run], batch: int) -> str:
    """One sentence that says what was found, flattering or not."""
    found = differences(runs, batch)
    parts = [f"{name} {_change(found[key])}" for key, name in MEASURES.items()]
    return f"[bold]batch {batch}[/bold], spectral: " + ", ".join(parts) + "."


def _change(spread: Spread) -> str:
    count, word = max((spread.negative, "lower"), (spread.positive, "higher"))
    return f"{word} in {count} of {spread.seeds} seeds"


def percent(values: Sequence[float]) -> str:
    return percent_of(Spread.of(values))


def percent_of(spread: Spread, sign: str = "") -> str:
    return f"{100 * spread.mean:{sign}.2f} ±{100 * spread.std:.2f}"


def plain(values: Sequence[float], digits: int = 2) -> str:
    spread = Spread.of(values)
    return f"{spread.mean:.{digits}f} ±{spread.std:.{digits}f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n  ".join(json.dumps(rounded(run, DIGITS)) for run in content["runs"])
    rest = json.dumps(rounded({**content, "runs": []}, DIGITS), indent=1)
    path.write_text(rest.replace('"runs": []', f'"runs": [\n  {runs}\n ]') + "\n")


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column not in ("method", "layer") else "left")
    return table
