"""The page of results, and what of it stands in the main README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.blocks import replaced

from .comparison import (
    DATA,
    MODELS,
    Group,
    agreements,
    groups,
    large,
    pairs,
    place,
    points,
    seeds_sentence,
    spectra_sentence,
    verdict,
)
from .results import RESULTS, STRENGTHS, Result, read_all
from .table import table

PAGE = Path(__file__).parent / "README.md"
CAPTIONS = {
    1: "Accuracy against epoch",
    2: "‖∇ₓ loss‖₂ against epoch",
    3: "Largest eigenvalue of the Hessian against epoch",
    4: "Singular values of one weight matrix",
    5: "Accuracy against epoch, the other networks",
    6: "‖∇ₓ loss‖₂ against epoch, the other networks",
}


def suites(root: Path = RESULTS) -> dict[str, list[Result]]:
    """The complete runs by folder; of no account is what only chose settings."""
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    found = {folder.name: read_all(folder) for folder in folders}
    return {name: results for name, results in found.items() if results}


def written(text: str, root: Path = RESULTS) -> str:
    """The page with the block of each suite as the results have it; a new one at the end."""
    for name, results in suites(root).items():
        if f"<!-- {name} -->" not in text:
            text = f"{text.rstrip()}\n\n## {name}\n\n<!-- {name} -->\n<!-- /{name} -->\n"
        text = replaced(text, name, block(results, root / name))
    return text


def block(results: Sequence[Result], folder: Path) -> str:
    """All that is said of a suite, or of a grid."""
    if all(result.run.validate for result in results):
        return grid(results)
    found = groups(results)
    parts = [
        settings(results),
        table(found),
        *findings(found),
        pictures(folder),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(root: Path = RESULTS) -> str:
    """For the main README: vanilla beside spectral, and what became of the paper's claim."""
    parts = []
    for name, results in suites(root).items():
        found = groups(results)
        if not found:
            continue
        chosen = [group for group in found if {"vanilla", "spectral"} & group.runs.keys()]
        parts += [
            f"**{name}**. {settings(results)}",
            table(chosen, ("vanilla", "spectral")) if chosen else "",
            *findings(found),
        ]
    return "\n\n".join(part for part in parts if part)


def findings(found: Sequence[Group]) -> list[str]:
    """What follows from a suite, in words."""
    return [
        verdicts(found),
        spectra_sentence(pairs(found)),
        seeds_sentence(found),
        "\n".join(f"- {sentence}" for sentence in agreements(found)),
    ]


def verdicts(found: Sequence[Group]) -> str:
    """At the large batch, a sentence for each network."""
    chosen = [group for group in large(found) if "spectral" in group.runs and len(group.runs) > 1]
    sentences = [f"- {verdict(group).sentence}" for group in chosen]
    claim = "The claim that spectral has the smallest gap at the large batch:"
    return "\n".join([claim, "", *sentences]) if chosen else ""


def settings(results: Sequence[Result]) -> str:
    """What the runs have in common, and where they differ, each value once."""
    runs = [result.run for result in results]
    seeds = len({run.seed for run in runs})
    parts = [
        f"{len(runs)} runs",
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, mean ± half of the 95 % interval",
        f"{_each(str(run.epochs) for run in runs)} epochs",
    ]
    for name in sorted({run.data for run in runs}, key=lambda name: place(name, DATA)):
        sizes = {str(run.subset) for run in runs if run.data == name and run.subset}
        if sizes:
            parts.append(f"{_each(sorted(sizes))} training images of {DATA.get(name, name)}")
    strengths = [
        f"{method} {_each(f'{run.strength:g}' for run in runs if run.method == method)}"
        for method in STRENGTHS
        if any(run.method == method and run.strength for run in runs)
    ]
    parts += [f"strengths: {', '.join(strengths)}"] if strengths else []
    parts.append(_each(computer(result) for result in results))
    return "; ".join(parts) + "."


def computer(result: Result) -> str:
    """Who computed it, and how."""
    machine = result.machine
    ways = {"bfloat16": "bfloat16", "compiled": "compiled", "channels_last": "channels last"}
    parts = [machine.get("device_name", ""), *(ways[key] for key in ways if machine.get(key))]
    return ", ".join(part for part in parts if part)


def grid(results: Sequence[Result]) -> str:
    """Accuracy on images held out of the training set, by rate, the best in bold."""
    rates = sorted({result.run.rate for result in results})
    rows: dict[str, dict[float, str]] = {}
    for result in sorted(results, key=lambda result: (result.run.model, result.run.batch)):
        run = result.run
        name = f"{MODELS.get(run.model, run.model)} | {run.batch} | {run.method} {run.strength:g}"
        found = "diverged" if result.diverged else points(result.curve("test")[-1])
        rows.setdefault(name, {})[run.rate] = found
    lines = [f"| model | B | method | {' | '.join(f'rate {rate:g}' for rate in rates)} |"]
    lines.append("|---|---:|---|" + "---:|" * len(rates))
    for name, found in rows.items():
        best = max((value for value in found.values() if value != "diverged"), default="")
        cells = [found.get(rate, "–") for rate in rates]
        cells = [f"**{cell}**" if cell == best else cell for cell in cells]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pictures(folder: Path) -> str:
    """Those that were drawn."""
    return "\n\n".join(
        f"![{caption}](results/{folder.name}/figure-{number}.png)"
        for number, caption in CAPTIONS.items()
        if (folder / f"figure-{number}.png").exists()
    )


def _each(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values))


def write(root: Path = RESULTS, page: Path = PAGE) -> None:
    page.write_text(written(page.read_text(encoding="utf-8"), root), encoding="utf-8")
