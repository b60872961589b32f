"""The results as Markdown: a short block for README, and everything in a file of its own.

It imports no framework: README is checked where there may be none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .results import stem

Result = dict[str, Any]

OURS = {
    "torch": "spectral_torch",
    "jax": "spectral_jax",
    "numpy": "sc.add_gradient_",
    "cupy": "spectral_cupy",
}
SHOWN = {
    "torch": ("kernels=False", "paper's formula", "torch spectral_norm", "G.add_(W)"),
    "jax": ("jitted loop", "nnx.SpectralNorm", "add_decayed_weights"),
}


def summary(result: Result) -> str:
    """For README."""
    machine = result["machine"]
    shown = [
        case
        for case in result["cases"]
        if case["n"] is None or case["n"] == 4096 or case["dtype"] == "float32"
    ]
    name, on_cpu = stem(result), machine["device"] == "cpu"
    command = "nox -s bench" + ("" if on_cpu else " -- --device cuda")
    # A copy on a CPU also reads what it overwrites, and so tells less than `G.add_(W)`.
    floor = (
        "`G.add_(W)` moves the fewest bytes that any step can."
        if on_cpu
        else "*Floor* is the time to read W and to read and write G once at "
        f"{result['bytes_per_second'] / 1e9:.0f} GB/s, which a large copy reaches here."
    )
    return "\n".join(
        [
            f"`{command}`, {where(machine)}: one step of all weights, medians of interleaved "
            f"rounds; in brackets the multiple of ours. {floor}",
            "",
            *peers_table(shown, "torch", floor=not on_cpu),
            "",
            *peers_table(shown, "jax", floor=False),
            "",
            *training_lines(result),
            *compilation_lines(result),
            "",
            f"![Time of a step](benchmarks/speed/results/{name}.png)",
            "",
            f"All numbers, what each peer is, and who was left out and why: "
            f"[{name}.md](benchmarks/speed/results/{name}.md).",
        ]
    )


def where(machine: dict[str, Any]) -> str:
    versions = f"PyTorch {machine['torch']}"
    if "jax" in machine:
        versions += f", JAX {machine['jax']}"
    if machine["device"] == "cpu":
        return f"{versions}, {machine['threads']} threads on {machine['cores']} cores of " + (
            f"{machine['processor']} ({machine['architecture']})"
        )
    return f"{versions}, {machine['device_name']}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def peers_table(cases: Sequence[Result], group: str, *, floor: bool) -> list[str]:
    """Ours and its peers; a dash where a peer was left out."""
    ours, others = OURS[group], SHOWN[group]
    rows = []
    for case in cases:
        steps = case["peers"][group]["steps"]
        if not steps:
            continue
        cells = [f"{case['title']}, {case['dtype']}", f"**{ms(steps[ours]['median_ms'])}**"]
        cells += [with_ratio(steps.get(name)) for name in others]
        if floor:
            time = case["bytes_over_bandwidth_ms"]
            cells.append(f"{ms(time)} ({times(1 / steps[ours]['ratio_to_bytes'])})")
        rows.append(cells)
    if not rows:
        return []
    header = ["weights", *(f"`{name}`" for name in (ours, *others))]
    return table(header + ["floor"] * floor, rows)


def with_ratio(step: dict[str, Any] | None) -> str:
    return "–" if step is None else f"{ms(step['median_ms'])} ({times(step['ratio_to_ours'])})"


def ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def times(ratio: float) -> str:
    return f"{ratio:.2g} ×" if ratio < 10 else f"{ratio:.0f} ×"


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def training_lines(result: Result) -> Iterator[str]:
    shares = [
        f"{training['title']}: {percent(training['share'])}"
        for training in result["training"].values()
    ]
    if shares:
        yield f"Share of a whole training step: {'; '.join(shares)}."


def compilation_lines(result: Result) -> Iterator[str]:
    found = result["compilation"].get("times", {})
    if found:
        parts = []
        for who, by_count in found.items():
            seconds = [f"{taken['sum_s']:.2g} s for {n}" for n, taken in by_count.items()]
            parts.append(f"`{who}` {' and '.join(seconds)}")
        yield f"JAX traces and compiles GPT-2 blocks: {'; '.join(parts)}."


def everything(result: Result) -> str:
    """All that the JSON file holds, to read."""
    name = stem(result)
    return "\n".join(
        [
            "# What a step costs",
            "",
            f"{result['machine']['date']}, {where(result['machine'])}, "
            f"{result['bytes_per_second'] / 1e9:.1f} GB/s.",
            "",
            f"![Time of a step]({name}.png)",
            "",
            *(line for notes in result["notes"].values() for line in note_lines(notes)),
            "",
            "## Bars",
            "",
            *bars_table(result),
            "",
            "## Steps",
            "",
            *steps_table(result),
            "",
            "## Memory",
            "",
            *memory_table(result),
            "",
            "## Training",
            "",
            *training_table(result),
            "",
            *compilation_lines(result),
            *graph_lines(result),
            "",
        ]
    )


def note_lines(notes: dict[str, str]) -> list[str]:
    return [f"- `{name}`: {note}" for name, note in notes.items()]


def bars_table(result: Result) -> list[str]:
    rows = [
        [
            bar["text"],
            bar["verdict"],
            "" if bar["value"] is None else f"{bar['value']:.3g}",
            f"{bar['limit']:g}",
        ]
        for bar in result["bars"]
    ]
    return table(["bar", "", "value", "limit"], rows)


def steps_table(result: Result) -> list[str]:
    header = ["weights", "step", "median", "quartiles, ms", "rounds", "to ours", "to floor"]
    rows: list[list[str]] = []
    for case in result["cases"]:
        label = f"{case['title']}, {case['dtype']}"
        for group, outcome in case["peers"].items():
            for name, step in outcome["steps"].items():
                low, high = step["quartiles_ms"]
                row = [label, f"{group}: {name}", ms(step["median_ms"]), f"{low:.3g}–{high:.3g}"]
                ratios = [times(step[key]) for key in ("ratio_to_ours", "ratio_to_bytes")]
                rows.append([*row, str(step["rounds"]), *ratios])
            for name, reason in outcome["left_out"].items():
                rows.append([label, f"{group}: {name}", "–", reason, "", "", ""])
    return table(header, rows)


def memory_table(result: Result) -> list[str]:
    header = ["weights", "step", "bytes", "of u and v", "of the largest matrix", "Python, NumPy"]
    rows = [
        [
            f"{case['title']}, {case['dtype']}",
            f"{group}: {name}",
            f"{taken['bytes']:,}",
            times(taken["of_vectors"]),
            times(taken["of_largest_matrix"]),
            "" if taken["python_bytes"] is None else f"{taken['python_bytes']:,}",
        ]
        for case in result["cases"]
        for group, outcome in case["peers"].items()
        for name, taken in outcome["memory"].items()
    ]
    return table(header, rows)


def training_table(result: Result) -> list[str]:
    header = ["model", "without", "with", "the regularizer's own", "share", "by difference"]
    rows = [
        [
            training["title"],
            ms(training["steps"]["without"]["median_ms"]),
            ms(training["steps"]["with"]["median_ms"]),
            ms(training["regularizer_ms"]),
            percent(training["share"]),
            percent(training["share_by_difference"]),
        ]
        for training in result["training"].values()
    ]
    return table(header, rows)


def graph_lines(result: Result) -> Iterator[str]:
    graph = result["graph"]
    if "steps" in graph:
        replay, launched = (graph["steps"][key]["median_ms"] for key in ("replay", "launched"))
        yield (
            f"DenseNet-40, {graph['weights']} weights: {ms(replay)} as a replayed CUDA graph, "
            f"{ms(launched)} launched one by one."
        )
    elif "left_out" in graph:
        yield f"CUDA graph: {graph['left_out']}."
