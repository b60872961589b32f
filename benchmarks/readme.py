"""`python -m benchmarks.readme`: write the numbers of README anew, results and versions."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import stacks
from benchmarks.blocks import replaced
from benchmarks.paper import page
from benchmarks.speed import markdown, results

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def demo() -> str:
    """What training with and without gave, of the PyTorch run."""
    result = _load("demo/results/torch.json")
    rows = [
        "| batch | method | test accuracy | gap at α | σ of the layers, first to last |",
        "|---|---|---|---|---|",
    ]
    for batch, alpha in result["alpha"].items():
        for method in ("vanilla", "spectral"):
            runs = [
                run
                for run in result["runs"]
                if run["method"] == method and run["batch"] == int(batch)
            ]
            accuracy = _percent([run["test"][-1] for run in runs])
            gap = _percent([run["gap_at_alpha"] for run in runs])
            sigmas = [
                f"{mean(run['sigma_after'][layer] for run in runs):.2f}"
                for layer in runs[0]["sigma_after"]
            ]
            rows.append(
                f"| {batch} | {method} | {accuracy} | {gap} (α = {100 * alpha:.0f} %) "
                f"| {', '.join(sigmas)} |"
            )
    versions = result["machine"]
    shares = ", ".join(f"{100 * s['share']:.0f} % at batch {s['batch']}" for s in result["step"])
    seeds = len({run["seed"] for run in result["runs"]})
    return "\n".join(
        [
            f"`nox -s demo`, {seeds} seeds, mean ± standard deviation, λ = 0.01, PyTorch "
            f"{versions['torch']}, {versions['cpus']} {versions['architecture']} cores. The "
            f"regularizer took {100 * result['share']:.0f} % of the time of all training steps: "
            f"{shares}.",
            "",
            *rows,
            "",
            *(f"- {_verdict(batch, d)}" for batch, d in result["spectral_minus_vanilla"].items()),
            "",
            "This is a check that all works on real data, and too small to judge the method by. "
            "What it shows without doubt is the flattened spectrum.",
            "",
            "![Curves and singular spectra](benchmarks/demo/results/torch.png)",
        ]
    )


def speed() -> str:
    """What a step costs, on each device that was measured."""
    return "\n\n".join(markdown.summary(result) for result in results.read_all())


def accuracy() -> str:
    """How near the term of a step comes to the exact one, while a network trains."""
    result = _load("accuracy/results/accuracy.json")["summary"]
    shown = {
        "power": "one vector (the default)",
        "block, k = 2": "`n_vectors=2`",
        "block, k = 4": "`n_vectors=4`",
        "power, every 4 steps": "`every_n_steps=4`",
        "block, k = 4, every 4 steps": "`n_vectors=4, every_n_steps=4`",
    }
    rows = ["| | without the regularizer | with it |", "|---|---:|---:|"]
    for scheme, title in shown.items():
        cells = []
        for method in ("vanilla", "spectral"):
            layers = [rows[scheme]["term"] for path, rows in result.items() if method in path]
            medians, tails = ([layer[key] for layer in layers] for key in ("median", "p95"))
            cells.append(f"{_short(max(medians))}, {_short(max(tails))}")
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "`python -m benchmarks.accuracy`: ‖σuvᵀ − σ₁u₁v₁ᵀ‖/σ₁ against SVD in float64, over 350 "
            "steps of the demonstration's network at batch 64: the median step, and the 95th "
            "percentile, of the layer where each is worst.",
            "",
            *rows,
            "",
            "The regularizer pushes σ₁ down to σ₂. When they meet, one vector stays with what is "
            "now the second one for tens of steps; several follow.",
            "",
            "![Errors over readings of W and over steps](benchmarks/accuracy/results/accuracy.png)",
        ]
    )


def written(text: str) -> str:
    """README with its blocks as the results have them."""
    blocks = {
        "paper": page.summary(),
        "demo": demo(),
        "speed": speed(),
        "accuracy": accuracy(),
        "stacks": stacks.table(),
    }
    for name, block in blocks.items():
        text = replaced(text, name, block)
    return text


def _load(path: str) -> dict[str, Any]:
    return dict(json.loads((HERE / path).read_text(encoding="utf-8")))


def _short(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _percent(values: list[float]) -> str:
    return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f} %"


def _verdict(batch: str, differences: dict[str, dict[str, float]]) -> str:
    gap = differences["gap_at_alpha"]
    narrower = gap["mean"] < 0
    count = gap["negative" if narrower else "positive"]
    word = "narrower" if narrower else "wider"
    return (
        f"Batch {batch}: with the regularizer the gap is {abs(100 * gap['mean']):.2f} points "
        f"{word} on average, and {word} in {count} of {gap['seeds']} seeds."
    )


def write() -> None:
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
