"""Tables and sentences about a suite: the paper's Table 1 from our results, and what follows."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan

import pandas as pd

from benchmarks.common import markdown

from . import compare, effects
from .compare import Group, groups, hundredths, place, points
from .measure import NOISES, SIZES
from .runs import COMMITTED, DATA, MODELS, PAPERS, SENTENCES, STRENGTHS, Result

PUBLISHED = pd.read_csv(COMMITTED / "published.csv").set_index(["model", "data", "batch"])


def block(results: Sequence[Result]) -> str:
    """Return all that is said of a suite, or of a grid."""
    if all(result.run.validate for result in results):
        return grid(results)
    found = groups(results)
    parts = [settings(results), table(found), verdicts(found), spectra(found)]
    parts.append(compared(found))
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
    """Return a sentence for each row about the paper's claim, which it makes for large batches."""
    sentences = [
        f"- {group.title}: {compare.verdict(group)}"
        for group in found
        if "spectral" in group.methods and len(group.methods) > 1
    ]
    claim = "The claim that spectral has the smallest gap:"
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


def compared(found: Iterable[Group]) -> str:
    """Return each row's measures, and what they decide; nothing about rows at chance."""
    shown = [group for group in found if not group.at_chance and "spectral" in group.methods]
    tables = [effects.table(group) for group in shown]
    said = [f"- {one}" for group in shown for one in effects.sentences(group)]
    return "\n\n".join([*tables, "\n".join(said)]) if said else ""


def summary(suites: Iterable[Sequence[Result]]) -> str:
    """Return a line for each row: in how many measures spectral is surely better, and worse.

    Rows of so few seeds that they decide nothing are left out.
    """
    others, lines = [name for name in PAPERS if name != "spectral"], []
    for group in (group for results in suites for group in groups(results)):
        if (
            group.at_chance
            or group.seeds < effects.FEWEST
            or "spectral" not in group.methods
            or group.values("nll").isna().all(None)
        ):
            continue
        signs = [(each.other, each.sign) for each in effects.effects(group) if each.measure.better]
        cells = [f"{signs.count((name, 1))} / {signs.count((name, -1))}" for name in others]
        total = max(sum(other == name for other, _ in signs) for name in others)
        claim = compare.verdict(group).partition(",")[0]
        lines.append([group.title, str(group.seeds), *cells, str(total), claim])
    header = ["network", "seeds", *(f"against {name}" for name in others), "measures"]
    return markdown([*header, "smallest gap"], lines)


def grid(results: Sequence[Result]) -> str:
    """Return what the images held out of the training set say: rates, and then strengths."""
    return "\n\n".join(part for part in (rates(results), strengths(results)) if part)


def rates(results: Sequence[Result]) -> str:
    """Return accuracies by rate, the best in bold."""
    # Strengths have a table of their own where each run measured more than its accuracy.
    results = [one for one in results if not one.final or one.run.method == "vanilla"]
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


def strengths(results: Sequence[Result]) -> str:
    """Return what each strength does at the rate that suits vanilla, the best accuracy in bold."""
    lines = []
    for (model, batch), best in chosen_rates(results).items():
        mine = [
            r for r in results if (r.run.model, r.run.batch, r.run.rate) == (model, batch, best)
        ]
        mine.sort(key=lambda one: (place(one.run.method, STRENGTHS), one.run.strength))
        tests = {one.run: one.last("test") for one in mine if not one.diverged}
        for one in mine:
            top = max(tests[run] for run in tests if run.method == one.run.method)
            lines.append([MODELS.get(model, model), str(batch), *strength(one, top)])
    header = ["model", "B", "method", "accuracy", "train − test", "with noise of s.d. 1"]
    header += ["ten steps of 1", "log₁₀ Π σ"]
    return markdown(header, lines) if lines else ""


def strength(result: Result, top: float) -> list[str]:
    name = f"{result.run.method} {result.run.strength:g}"
    if result.diverged:
        return [name, "diverged", *["–"] * 4]
    test, found = points(result.last("test")), compare.numbers(result)
    keys = ("last_gap", f"noise {NOISES.index(1.0)}", f"ten_steps {SIZES.index(1.0)}")
    shown = [
        f"**{test}**" if result.last("test") == top else test,
        *(points(found[k]) for k in keys),
    ]
    return [name, *shown, f"{found['log_product']:.2f}"]


def chosen_rates(results: Sequence[Result]) -> dict[tuple[str, int], float]:
    """Return vanilla's best rate of each model and batch, where a run measured it at its end."""
    vanilla = [one for one in results if one.run.method == "vanilla" and one.final]
    vanilla.sort(key=lambda one: (-one.last("test"), one.run.rate))
    found: dict[tuple[str, int], float] = {}
    for one in vanilla:
        found.setdefault((one.run.model, one.run.batch), one.run.rate)
    return dict(sorted(found.items()))
