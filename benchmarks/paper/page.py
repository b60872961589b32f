"""Tables and sentences about a suite: the paper's Table 1 from our results, and what follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan

import pandas as pd

from benchmarks.common import markdown

from .compare import (
    DATA,
    MODELS,
    Group,
    agreements,
    better_seeds,
    groups,
    hundredths,
    interval,
    large,
    place,
    points,
    spectra_compared,
    verdict,
)
from .runs import COMMITTED, STRENGTHS, Result

PUBLISHED = pd.read_csv(COMMITTED / "published.csv").set_index(["model", "data", "batch"])


def block(results: Sequence[Result]) -> str:
    """Return all that is said of a suite, or of a grid."""
    if all(result.run.validate for result in results):
        return grid(results)
    found = groups(results)
    parts = [settings(results), table(found), verdicts(found), spectra(found), counts(found)]
    parts.append("\n".join(f"- {sentence}" for sentence in agreements(found)))
    return "\n\n".join(part for part in parts if part)


def settings(results: Sequence[Result]) -> str:
    """Return what the runs have in common, and where they differ, each value once."""
    runs = [result.run for result in results]
    seeds = len({run.seed for run in runs})
    parts = [
        f"{len(runs)} runs",
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, mean ± half of the 95 % interval",
        f"{each(str(run.epochs) for run in runs)} epochs",
    ]
    for name in sorted({run.data for run in runs}, key=lambda name: place(name, DATA)):
        sizes = {str(run.subset) for run in runs if run.data == name and run.subset}
        if sizes:
            parts.append(f"{each(sorted(sizes))} training images of {DATA.get(name, name)}")
    methods = sorted({run.method for run in runs}, key=lambda name: place(name, STRENGTHS))
    strengths = [
        f"{method} {each(f'{run.strength:g}' for run in runs if run.method == method)}"
        for method in methods
        if any(run.method == method and run.strength for run in runs)
    ]
    parts += [f"strengths: {', '.join(strengths)}"] if strengths else []
    parts.append(each(computer(result.machine) for result in results))
    return "; ".join(parts) + "."


def each(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values))


def computer(machine: Mapping[str, object]) -> str:
    """Return the processor, and the options that change how it computes."""
    ways = {"bfloat16": "bfloat16", "compiled": "compiled", "channels_last": "channels last"}
    parts = [str(machine.get("device_name", ""))]
    return ", ".join([*parts, *(word for key, word in ways.items() if machine.get(key))])


def table(found: Sequence[Group]) -> str:
    """Return Table 1 with the methods that any run used, and the paper's numbers in brackets."""
    methods = {method for group in found for method in group.methods}
    columns = sorted(methods, key=lambda method: place(method, STRENGTHS))
    first, *rest = columns
    header = ["model, data", "B", f"accuracy: {first}", *rest, "α", f"gap: {first}", *rest]
    return markdown(header, (row(group, columns) for group in found))


def row(group: Group, columns: Sequence[str]) -> list[str]:
    run, paper = group.run, {}
    key = (run.model, run.data, run.batch)
    if (run.width, run.subset) == (1, None) and key in PUBLISHED.index:
        paper = PUBLISHED.loc[key].to_dict()
    alpha = "–" if isnan(group.alpha) else hundredths(group.alpha)
    return [
        group.network,
        str(run.batch),
        *cells(group, columns, "test", paper),
        alpha + (f" (paper {hundredths(paper['alpha'])})" if paper else ""),
        *cells(group, columns, "gap", paper),
    ]


def cells(group: Group, columns: Sequence[str], column: str, paper: dict[str, float]) -> list[str]:
    """Return means and intervals, the best in bold."""
    values, texts = group.values(column), []
    # A method that diverged for some seeds has a mean over the lucky ones. Equal in print is equal.
    complete = [method for method in values if not group.lost(method)[0]]
    means = values[complete].mean().round(3)
    best = means.min() if column == "gap" else means.max()
    for method in columns:
        found = values[method].dropna() if method in values else []
        text = str(interval(found)) if len(found) else ""
        text = f"**{text}**" if text and means.get(method) == best else text
        lost, runs = group.lost(method)
        text = ", ".join([text] * bool(text) + [f"diverged {lost}/{runs}"] * bool(lost)) or "–"
        key = f"gap {method}" if column == "gap" else method
        texts.append(text + (f" (paper {points(paper[key])})" if key in paper else ""))
    return texts


def verdicts(found: Sequence[Group]) -> str:
    """Return a sentence for each network, about the paper's claim at the large batch."""
    chosen = [
        group for group in large(found) if "spectral" in group.methods and len(group.methods) > 1
    ]
    sentences = [f"- {group.title}: {verdict(group)}" for group in chosen]
    claim = "The claim that spectral has the smallest gap at the large batch:"
    return "\n".join([claim, "", *sentences]) if chosen else ""


def spectra(found: Sequence[Group]) -> str:
    """Say in how many pairs the largest singular value is lower, and the spectrum flatter."""
    if (pairs := spectra_compared(found)).empty:
        return ""
    vanilla = pairs["vanilla's rank"]
    flatter = pairs["rank"] > vanilla
    text = (
        f"Compared with vanilla from the same seed, spectral's largest singular value is lower in "
        f"{pairs['lower'].sum()} of {len(pairs)} runs (σ₁ of {pairs['lower weights'].sum()} of "
        f"{pairs['weights'].sum()} weights), and its spectrum is flatter in {flatter.sum()} of "
        f"{len(pairs)}: ‖W‖_F²/σ₁², averaged over the weights, is {pairs['rank'].mean():.1f} "
        f"instead of {vanilla.mean():.1f}."
    )
    missed = pairs["title"][~(pairs["lower"] & flatter)]
    return f"{text} Not so: {'; '.join(missed)}." if len(missed) else text


def counts(found: Iterable[Group]) -> str:
    """Say in how many rows spectral does better than vanilla from every seed, or worse."""
    compared = {group.title: signs for group in found if (signs := better_seeds(group))}
    if not compared:
        return ""
    better = [title for title, (yes, _) in compared.items() if yes]
    names = f" ({'; '.join(better)})" if better else ""
    return (
        "From every seed, spectral has a better test accuracy than vanilla and a smaller gap after "
        f"the last epoch in {len(better)} of {len(compared)} rows{names}. It is worse in both in "
        f"{sum(no for _, no in compared.values())}."
    )


def grid(results: Sequence[Result]) -> str:
    """Return accuracies on images held out of the training set, by rate, the best in bold."""
    rates = sorted({result.run.rate for result in results})
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for result in sorted(results, key=lambda result: (result.run.model, result.run.batch)):
        run = result.run
        model, method = MODELS.get(run.model, run.model), f"{run.method} {run.strength:g}"
        found = "diverged" if result.diverged else points(result.last("test"))
        lines.setdefault((model, str(run.batch), method), {})[run.rate] = found
    rows = []
    for names, by_rate in lines.items():
        best = max((value for value in by_rate.values() if value != "diverged"), default="")
        values = [by_rate.get(rate, "–") for rate in rates]
        rows.append([*names, *(f"**{cell}**" if cell == best else cell for cell in values)])
    return markdown(["model", "B", "method", *(f"rate {rate:g}" for rate in rates)], rows)
