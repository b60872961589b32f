"""The results as tables in Markdown, without a framework: pages are checked where none is."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown, read_json, read_toml

Result = dict[str, Any]

DIGITS = 4  # significant ones
NOTES = read_toml(Path(__file__).with_name("peers.toml"))
TITLES = {"torch": "PyTorch", "jax": "JAX", "numpy": "NumPy", "cupy": "CuPy"}
OURS = {group: next(iter(NOTES[group])) for group in TITLES}
BY_HAND = {group: "jitted loop" if group == "jax" else "paper's formula" for group in TITLES}
WRAPPER = {"torch": "torch spectral_norm", "jax": "nnx.SpectralNorm", "numpy": ""}
COMPILED = "with NumbaEngine"


def stem(result: Result) -> str:
    machine = result["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", machine["device_name"].lower()).strip("-")
    return "speed-cpu" if machine["device"] == "cpu" else f"speed-cuda-{name}"


def committed(folder: Path = RESULTS) -> list[Result]:
    """Return the results of each device that was measured, the CPU first."""
    paths = sorted(folder.glob("speed-*.json.gz"), key=lambda path: ("cpu" not in path.name, path))
    return [read_json(path) for path in paths]


def where(machine: Result) -> str:
    versions = f"PyTorch {machine['torch']}"
    versions += f", JAX {machine['jax']}" if "jax" in machine else ""
    if machine["device"] == "cpu":
        cores = f"{machine['threads']} threads on {machine['cores']} cores"
        return f"{versions}, {cores} of {machine['processor']} ({machine['architecture']})"
    return f"{versions}, {machine['device_name']}"


def ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def times(ratio: float) -> str:
    return f"{ratio:.2g} ×" if ratio < 10 else f"{ratio:.0f} ×"


def steps_of(result: Result, case: str, group: str) -> Result:
    found = [one["peers"][group]["steps"] for one in result["cases"] if one["name"] == case]
    return dict(found[0]) if found else {}


def label(case: Result) -> str:
    return f"{case['title']}, {case['dtype']}"


def costs(result: Result) -> str:
    """Return four rows for README: a small and a large network, and the other frameworks."""
    rows = []
    for title, case, group, ours, training in NOTES["readme"]["rows"]:
        steps = steps_of(result, case, group)
        own = steps[ours]["median_ms"]
        row = [title, f"**{ms(own)}**"]
        for other in (BY_HAND[group], WRAPPER[group]):
            taken = steps[other]["median_ms"] if other in steps else None
            row.append(f"{ms(taken)} ({times(taken / own)})" if taken else "–")
        share = result["training"].get(training, {}).get("share")
        rows.append([*row, f"{100 * share:.2g} %" if share else "–"])
    header = ["step", "this library", "the formula by hand", "spectral normalization"]
    table = markdown([*header, "share of a training step"], rows)
    return (
        f"{table}\n\nAdding all terms in float32, not taking them out: {where(result['machine'])}."
    )


def summary(result: Result, *, picture: bool = True) -> str:
    """Return all tables of a device, and what each peer is."""
    machine, speed = result["machine"], f"{result['bytes_per_second'] / 1e9:.1f} GB/s"
    measured = f"Measured on {machine['date']} with {where(machine)}. A large copy moves {speed}."
    parts = [f"{measured} {NOTES['other']['times']}"]
    parts += [f"![Time of a step](../benchmarks/results/{stem(result)}.png)"] if picture else []
    for group, title in TITLES.items():
        if any(case["peers"][group]["steps"] for case in result["cases"]):
            notes = [f"- `{name}`: {note}." for name, note in NOTES[group].items()]
            table = peers_table(result, group, floor=machine["device"] != "cpu")
            parts += [f"### One step in {title}", "\n".join(notes), table]
    for title, name, table in (
        ("Peak memory of a step", "memory", memory(result)),
        ("Whole training steps in PyTorch", "training", training(result)),
        ("Tracing and compiling in JAX", "compilation", compilation(result)),
    ):
        if table.count("\n") > 1:
            note = NOTES["other"][name]
            parts += [f"### {title}", f"{note[0].upper()}{note[1:]}.", table]
    return "\n\n".join([*parts, *graph_lines(result)])


def peers_table(result: Result, group: str, *, floor: bool) -> str:
    """Return ours and its peers; a dash where a peer was left out, and the reasons below."""
    cases = [case for case in result["cases"] if case["peers"][group]["steps"]]
    names = dict.fromkeys(name for case in cases for name in case["peers"][group]["steps"])
    others = [name for name in names if name != OURS[group]]
    rows, reasons = [], {}
    for case in cases:
        steps, left_out = case["peers"][group]["steps"], case["peers"][group]["left_out"]
        ours = steps[OURS[group]]
        texts = {
            name: f"{ms(step['median_ms'])} ({times(step['ratio_to_ours'])})"
            for name, step in steps.items()
        }
        row = [label(case), f"**{ms(ours['median_ms'])}**"]
        row += [texts.get(name, "–") for name in others]
        if floor:
            ratio = times(1 / ours["ratio_to_bytes"])
            row.append(f"{ms(case['bytes_over_bandwidth_ms'])} ({ratio})")
        rows.append(row)
        reasons |= {f"`{name}`, {label(case)}": reason for name, reason in left_out.items()}
    header = ["weights", *(f"`{name}`" for name in (OURS[group], *others))]
    table = markdown(header + ["bytes / bandwidth"] * floor, rows)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"{table}\n\nLeft out: {why}." if why else table


def memory(result: Result) -> str:
    rows = [
        [
            label(case),
            f"{TITLES[group]}, `{name}`",
            f"{taken['bytes']:,}",
            times(taken["of_vectors"]),
            times(taken["of_largest_matrix"]),
            "" if taken["python_bytes"] is None else f"{taken['python_bytes']:,}",
        ]
        for case in result["cases"]
        for group, outcome in case["peers"].items()
        for name, taken in outcome["memory"].items()
    ]
    header = ["weights", "step", "bytes", "of u and v", "of the largest matrix", "Python, NumPy"]
    return markdown(header, rows)


def training(result: Result) -> str:
    rows = []
    for one in result["training"].values():
        medians = [one["steps"][key]["median_ms"] for key in ("without", "with")]
        cells = map(ms, [*medians, one["regularizer_ms"]])
        rows.append([one["title"], *cells, f"{100 * one['share']:.2g} %"])
    return markdown(["model", "without", "with", "the regularizer's own", "share"], rows)


def compilation(result: Result) -> str:
    rows = [
        [f"`{who}`", count, *(f"{taken[key]:.2g} s" for key in ("trace_s", "compile_s", "sum_s"))]
        for who, by_count in result["compilation"].get("times", {}).items()
        for count, taken in by_count.items()
    ]
    return markdown(["step", "blocks", "trace", "compile", "sum"], rows)


def graph_lines(result: Result) -> Iterator[str]:
    graph = result["graph"]
    if "steps" in graph:
        replay, launched = (ms(graph["steps"][key]["median_ms"]) for key in ("replay", "launched"))
        yield f"DenseNet-40: {replay} as a replayed CUDA graph, {launched} launched one by one."
    elif "left_out" in graph:
        yield f"CUDA graph: {graph['left_out']}."


def goals(result: Result) -> str:
    """Return the goals that the project sets itself, and whether these results reach them."""
    rows = []
    for text, limit, value in reached(result):
        verdict = "not measured" if value is None else "pass" if value <= limit else "FAIL"
        rows.append([text, verdict, "" if value is None else f"{value:.3g}", f"{limit:g}"])
    return markdown(["goal", "", "value", "limit"], rows)


def reached(result: Result) -> Iterator[tuple[str, float, float | None]]:
    """Yield each goal, its limit, and the value that was measured."""
    for group, limit in {"torch": 1.0, "jax": 1.2}.items():
        peer = BY_HAND[group]
        found = (ours_to(result, case["name"], group, peer) for case in result["cases"])
        worst = max((ratio for ratio in found if ratio is not None), default=None)
        yield f"{TITLES[group]}: the worst case to the {peer}", limit, worst
    for who, counts in result["compilation"].get("times", {}).items():
        if who.startswith(OURS["jax"]) and {"12", "96"} <= counts.keys():
            ratio = counts["96"]["sum_s"] / counts["12"]["sum_s"]
            yield f"{who}: compiling 96 blocks to compiling 12", 1.5, ratio
    training, device = result["training"], result["machine"]["device"]
    share = training.get("resnet-50", {}).get("share")
    yield "ResNet-50: share of the training step", 0.02, share
    for case, group, peer, limit in NOTES["goals"][device]:
        text = f"{case}: ours to {peer or 'bytes / bandwidth'}"
        yield text, limit, ours_to(result, case, group, peer)
    if device != "cpu":
        replay = median_of(result["graph"], "replay")
        yield "DenseNet-40: ms of a graph replay", 0.06, replay
        step = median_of(training.get("densenet-40", {}), "with")
        ratio = replay / step if replay and step else None
        yield "DenseNet-40: graph replay to the training step", 0.03, ratio


def median_of(timed: Result, step: str) -> float | None:
    return timed.get("steps", {}).get(step, {}).get("median_ms")


def ours_to(result: Result, case: str, group: str, peer: str) -> float | None:
    """Return our time as a multiple of the peer's, or of bytes / bandwidth."""
    steps = steps_of(result, case, group)
    if not peer:
        return steps[OURS[group]]["ratio_to_bytes"] if steps else None
    return 1 / steps[peer]["ratio_to_ours"] if peer in steps else None
