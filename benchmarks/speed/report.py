"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .markdown import ms, percent, times, where

Result = dict[str, Any]
STYLES = {"pass": "green", "FAIL": "bold red", "not measured": "dim"}


def show(console: Console, result: Result) -> None:
    console.print(where(result["machine"]), f"{result['bytes_per_second'] / 1e9:.1f} GB/s")
    for each in (cases_table, memory_table, training_table, compilation_table, bars_table):
        shown = each(result)
        if shown.row_count:
            console.print(shown)


def new_table(title: str, *columns: str) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for k, column in enumerate(columns):
        shown.add_column(column, justify="right" if k > 1 else "left")
    return shown


def cases_table(result: Result) -> Table:
    shown = new_table(
        "One step",
        *("case", "step", "median", "quartiles", "rounds", "to ours", "to bytes / bandwidth"),
    )
    for case in result["cases"]:
        label = f"{case['title']} {case['dtype']}"
        for row in case_rows(case):
            shown.add_row(label, *row)
            label = ""
        shown.add_section()
    return shown


def case_rows(case: Result) -> Iterator[tuple[str, ...]]:
    for group, outcome in case["peers"].items():
        for name, step in outcome["steps"].items():
            low, high = step["quartiles_ms"]
            yield (
                f"{group}: {name}",
                ms(step["median_ms"]),
                f"{low:.3g}–{high:.3g}",
                str(step["rounds"]),
                times(step["ratio_to_ours"]),
                times(step["ratio_to_bytes"]),
            )
        for name, reason in outcome["left_out"].items():
            yield f"{group}: {name}", f"[dim]{reason}[/dim]", "", "", "", ""


def memory_table(result: Result) -> Table:
    shown = new_table(
        "Peak memory of a step beside W, G and the state",
        *("case", "step", "bytes", "of u and v", "of the largest matrix", "Python and NumPy"),
    )
    for case in result["cases"]:
        label = f"{case['title']} {case['dtype']}"
        for group, outcome in case["peers"].items():
            for name, taken in outcome["memory"].items():
                python = taken["python_bytes"]
                shown.add_row(
                    label,
                    f"{group}: {name}",
                    f"{taken['bytes']:,}",
                    times(taken["of_vectors"]),
                    times(taken["of_largest_matrix"]),
                    "" if python is None else f"{python:,}",
                )
                label = ""
    return shown


def training_table(result: Result) -> Table:
    shown = new_table(
        "Training steps",
        *("model", "weights", "without", "with", "regularizer", "share", "by difference"),
    )
    for training in result["training"].values():
        steps = training["steps"]
        shown.add_row(
            training["title"],
            str(training["weights"]),
            ms(steps["without"]["median_ms"]),
            ms(steps["with"]["median_ms"]),
            ms(training["regularizer_ms"]),
            percent(training["share"]),
            percent(training["share_by_difference"]),
        )
    return shown


def compilation_table(result: Result) -> Table:
    shown = new_table("JAX compiles GPT-2 blocks", "who", "blocks", "trace", "compile", "sum")
    for who, by_count in result["compilation"].get("times", {}).items():
        for count, taken in by_count.items():
            shown.add_row(
                who, count, *(f"{taken[key]:.2f} s" for key in ("trace_s", "compile_s", "sum_s"))
            )
    return shown


def bars_table(result: Result) -> Table:
    shown = new_table("Bars", "what", "verdict", "value", "limit")
    for bar in result["bars"]:
        verdict, value = bar["verdict"], bar["value"]
        shown.add_row(
            bar["text"],
            f"[{STYLES[verdict]}]{verdict}[/]",
            "" if value is None else f"{value:.3g}",
            f"{bar['limit']:g}",
        )
    return shown
