"""Tables and sentences about a suite: the paper's Table 1 from our results, and what follows."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan

import pandas as pd

from benchmarks.common import markdown

from . import compare
from .compare import Group, groups, hundredths, place, points
from .runs import COMMITTED, DATA, MODELS, SENTENCES, STRENGTHS, Result

PUBLISHED = pd.read_csv(COMMITTED / "published.csv").set_index(["model", "data", "batch"])


def block(results: Sequence[Result]) -> str:
    """Return all that is said of a suite, or of a grid."""
    if all(result.run.validate for result in results):
        return grid(results)
    found = groups(results)
    parts = [settings(results), table(found), verdicts(found), spectra(found), counts(found)]
    parts.append("\n".join(f"- {sentence}" for sentence in compare.agreements(found)))
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
        sizes = sorted({str(run.subset) for run in runs if run.data == name and run.subset})
        parts += [f"{each(sizes)} training images of {DATA.get(name, name)}"] if sizes else []
    used = {run.method for run in runs if run.strength}
    strengths = [
        f"{method} {each(f'{run.strength:g}' for run in runs if run.method == method)}"
        for method in sorted(used, key=lambda name: place(name, STRENGTHS))
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
    alpha += f" (paper {hundredths(paper['alpha'])})" if paper else ""
    tests, gaps = (cells(group, columns, column, paper) for column in ("test", "gap"))
    return [group.network, str(run.batch), *tests, alpha, *gaps]


def cells(group: Group, columns: Sequence[str], column: str, paper: dict[str, float]) -> list[str]:
    """Return means and intervals, the best in bold."""
    values, texts = group.values(column), []
    # A method that diverged for some seeds has a mean over the lucky ones. Equal in print is equal.
    complete = [method for method in values if not group.lost(method)[0]]
    means = values[complete].mean().round(3)
    best = means.min() if column == "gap" else means.max()
    for method in columns:
        found = values[method].dropna() if method in values else []
        text = str(compare.interval(found)) if len(found) else ""
        text = f"**{text}**" if text and means.get(method) == best else text
        lost, runs = group.lost(method)
        text = ", ".join([text] * bool(text) + [f"diverged {lost}/{runs}"] * bool(lost)) or "–"
        key = f"gap {method}" if column == "gap" else method
        texts.append(text + (f" (paper {points(paper[key])})" if key in paper else ""))
    return texts


def verdicts(found: Sequence[Group]) -> str:
    """Return a sentence for each network, about the paper's claim at the large batch."""
    sentences = [
        f"- {group.title}: {compare.verdict(group)}"
        for group in compare.large(found)
        if "spectral" in group.methods and len(group.methods) > 1
    ]
    claim = "The claim that spectral has the smallest gap at the large batch:"
    return "\n".join([claim, "", *sentences]) if sentences else ""


def spectra(found: Sequence[Group]) -> str:
    """Say in how many pairs the largest singular value is lower, and the spectrum flatter."""
    if (pairs := compare.spectra_compared(found)).empty:
        return ""
    numbers = pairs[["lower", "lower_weights", "weights", "flatter"]].sum()
    means = pairs[["rank", "vanilla"]].mean()
    text = SENTENCES["spectra"].format(runs=len(pairs), **numbers, **means)
    missed = pairs["title"][~(pairs["lower"] & pairs["flatter"])]
    return f"{text} Not so: {'; '.join(missed)}." if len(missed) else text


def counts(found: Iterable[Group]) -> str:
    """Say in how many rows spectral does better than vanilla from every seed, or worse."""
    compared = {group.title: signs for group in found if (signs := compare.better_seeds(group))}
    if not compared:
        return ""
    better = [title for title, (yes, _) in compared.items() if yes]
    worse = [title for title, (_, no) in compared.items() if no]
    numbers = {"better": len(better), "rows": len(compared), "worse": len(worse)}
    names = f" ({'; '.join(better)})" if better else ""
    return SENTENCES["counts"].format(names=names, **numbers)


def grid(results: Sequence[Result]) -> str:
    """Return accuracies on images held out of the training set, by rate, the best in bold."""
    rates = sorted({result.run.rate for result in results})
    lines: dict[tuple[str, int, str], dict[float, str]] = {}
    for result in results:
        run = result.run
        name = (MODELS.get(run.model, run.model), run.batch, f"{run.method} {run.strength:g}")
        found = "diverged" if result.diverged else points(result.last("test"))
        lines.setdefault(name, {})[run.rate] = found
    rows = []
    for name, by_rate in sorted(lines.items()):
        best = max(set(by_rate.values()) - {"diverged"}, default="")
        cells = [by_rate.get(rate, "–") for rate in rates]
        rows.append([*map(str, name), *(f"**{c}**" if c == best else c for c in cells)])
    return markdown(["model", "B", "method", *(f"rate {rate:g}" for rate in rates)], rows)
