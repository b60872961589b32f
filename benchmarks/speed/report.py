"""The results as tables in Markdown, without a framework: pages are checked where none is."""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from math import log
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown, read_json, read_toml

Result = dict[str, Any]

DIGITS = 4  # significant ones
NOTES = read_toml(Path(__file__).with_name("peers.toml"))
TITLES = {"torch": "PyTorch", "jax": "JAX", "numpy": "NumPy", "cupy": "CuPy"}
OURS = {group: next(iter(NOTES["steps"][group])) for group in TITLES}
BY_HAND = {group: "jitted loop" if group == "jax" else "paper's formula" for group in TITLES}
WRAPPER = {"torch": "torch spectral_norm", "jax": "nnx.SpectralNorm", "numpy": ""}
COMPILED = "with NumbaEngine"
LISTS = ("cases", "options", "scaling")  # sections of cases; the others are dicts
EMPTY: Result = {section: [] for section in LISTS}
EMPTY |= {one: {} for one in ("training", "compilation", "sharded", "account", "seconds_of")}


def stem(machine: Result) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", machine["device_name"].lower()).strip("-")
    return "speed-cpu" if machine["device"] == "cpu" else f"speed-cuda-{name}"


def committed(folder: Path = RESULTS) -> list[Result]:
    """Return the results of each device that was measured, the CPU first."""
    paths = sorted(folder.glob("speed-*.json.gz"), key=lambda path: ("cpu" not in path.name, path))
    return [EMPTY | read_json(path) for path in paths]


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


def cell(step: Result | None, ratio: str = "ratio_to_ours") -> str:
    return f"{ms(step['median_ms'])} ({times(step[ratio])})" if step else "–"


def steps_of(case: Result, group: str) -> Result:
    """Return the steps of a group, none where the group was left out."""
    return case["peers"].get(group, {}).get("steps", {})


def label(case: Result) -> str:
    return f"{case['title']}, {case['dtype']}"


def costs(result: Result) -> str:
    """Return four rows for README: a small and a large network, and the other frameworks."""
    rows, cases = [], {case["name"]: case for case in result["cases"]}
    for title, case, group, ours, training in NOTES["readme"]["rows"]:
        steps = steps_of(cases[case], group)
        own = steps[ours]["median_ms"]
        row = [title, f"**{ms(own)}**"]
        for other in (BY_HAND[group], WRAPPER[group]):
            taken = steps[other]["median_ms"] if other in steps else None
            row.append(f"{ms(taken)} ({times(taken / own)})" if taken else "–")
        share = result["training"].get(training, {}).get("share")
        rows.append([*row, f"{100 * share:.2g} %" if share else "–"])
    header = ["step", "this library", "the formula by hand", "spectral normalization"]
    table, at = markdown([*header, "share of a training step"], rows), where(result["machine"])
    return f"{table}\n\nAdding all terms in float32, not taking them out: {at}."


def summary(result: Result, *, picture: bool = True) -> str:
    """Return all tables of a device, and what each peer is."""
    machine, speed = result["machine"], f"{result['bytes_per_second'] / 1e9:.1f} GB/s"
    measured = f"Measured on {machine['date']} with {where(machine)}. A large copy moves {speed}."
    parts = [f"{measured} {NOTES['other']['times']}"]
    parts += [f"![Time of a step](../benchmarks/results/{stem(machine)}.png)"] if picture else []
    for title, note, table in tables(result):
        if table.count("\n") > 1:
            parts += [f"### {title}", note, table]
            if title == NOTES["titles"]["scaling"] and picture:
                parts.append(f"![{title}](../benchmarks/results/{stem(machine)}-scaling.png)")
    return "\n\n".join(parts)


def tables(result: Result) -> Iterator[tuple[str, str, str]]:
    """Yield titles, notes and tables; one of two lines has no rows."""
    for group, title in TITLES.items():
        yield f"One step in {title}", notes(NOTES["steps"][group]), peers_table(result, group)
    for group, title in TITLES.items():
        table = options_table(result, group)
        known = {name: note for name, note in NOTES["options"].items() if f"`{name}`" in table}
        yield f"Options in {title}", notes(known), table
    makers = (scaling, training, compilation, account, goals)
    for name, make in zip(NOTES["titles"], makers, strict=True):
        yield NOTES["titles"][name], f"{NOTES['other'][name]}.", make(result)


def notes(found: Result) -> str:
    return "\n".join(f"- `{name}`: {note}." for name, note in found.items())


def peers_table(result: Result, group: str) -> str:
    """Return ours and its peers; a dash where a peer was left out, and the reasons below."""
    cases = [case for case in result["cases"] if steps_of(case, group)]
    names = dict.fromkeys(name for case in cases for name in steps_of(case, group))
    names.pop(OURS[group], None)
    rows, reasons, floor = [], {}, result["machine"]["device"] != "cpu"
    for case in cases:
        steps, left_out = steps_of(case, group), case["peers"][group]["left_out"]
        ours = steps[OURS[group]]
        row = [label(case), f"**{ms(ours['median_ms'])}**", *(cell(steps.get(n)) for n in names)]
        moved, ratio = case["bytes_over_bandwidth_ms"], times(1 / ours["ratio_to_bytes"])
        rows.append([*row, f"{ms(moved)} ({ratio})"] if floor else row)
        reasons |= {f"`{name}`, {label(case)}": reason for name, reason in left_out.items()}
    header = ["weights", *(f"`{name}`" for name in (OURS[group], *names))]
    table = markdown(header + ["bytes / bandwidth"] * floor, rows)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"{table}\n\nLeft out: {why}." if why else table


def options_table(result: Result, group: str) -> str:
    """Return a row for each step, a column for each case; the first row is compared to."""
    cases = [case for case in result["options"] if steps_of(case, group)]
    names = dict.fromkeys(name for case in cases for name in steps_of(case, group))
    rows = [[f"`{n}`", *(cell(steps_of(case, group).get(n)) for case in cases)] for n in names]
    if group == "torch" and result["sharded"]:
        found = [result["sharded"].get(case["name"].removeprefix("options-"), {}) for case in cases]
        for name in ("whole", "sharded"):
            cells = (cell(steps.get(name), "ratio_to_first") for steps in found)
            rows.append([f"`2 processes, {name}`", *cells])
    return markdown(["step", *map(label, cases)], rows)


def scaling(result: Result) -> str:
    """Return the largest of each series, and the power by which time grows up to it."""
    rows = []
    for (series, group, name), points in grown(result).items():
        first, last = points[-3:][0], points[-1]
        if (growth := log(last["x"] / first["x"])) > 0:
            power = f"{log(last['ms'] / first['ms']) / growth:.2f}"
            memory = "" if last["bytes"] is None else f"{last['bytes']:,}"
            title = f"{series}, {TITLES[group]}, `{name}`"
            rows.append([title, last["title"], ms(last["ms"]), power, memory])
    return markdown(["what grows", "up to", "time", "power", "peak memory, bytes"], rows)


def grown(result: Result) -> dict[tuple[str, str, str], list[Result]]:
    """Return what a step needs by the number of layers, or by the bytes of ever wider ones."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for case in result["scaling"]:
        series = case["name"].split("-")[0]
        x = case["bytes_of_weights" if series == "width" else "weights"]
        for group, outcome in case["peers"].items():
            for name, step in outcome["steps"].items():
                point = {"x": x, "ms": step["median_ms"], "title": case["title"]}
                point["bytes"] = outcome["memory"].get(name)
                found.setdefault((series, group, name), []).append(point)
    return found


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


def account(result: Result) -> str:
    """Return what a step moves and sends, and its share of a training step."""
    if not (found := result["account"]):
        return ""
    rows = []
    for name, row in found["rows"].items():
        cells = [f"{row['moved'] / 1e9:.3g} GB", f"{row['operations']:,}", f"{row['messages']}"]
        cells.append(f"{row['sent'] / row['messages'] / 1e6:.3g} MB")
        cells += [ms(1e3 * row[key]) for key in ("memory_s", "launch_s", "network_s")]
        rows.append([f"`{name}`", *cells, f"{100 * row['share']:.2g} %"])
    header = ["step", "moved", "operations", "messages", "a message", "memory", "launches"]
    assumed = NOTES["other"]["assumed"].format(**found, **found["assumed"])
    return f"{markdown([*header, 'network', 'share'], rows)}\n\n{assumed}"


def goals(result: Result) -> str:
    """Return the goals that the project sets itself, and whether these results reach them."""
    rows = []
    known = NOTES["goals"]["all"] + NOTES["goals"][result["machine"]["device"]]
    for cases, group, step, peer, limit in known:
        key, found = "ratio_to_ours" if peer else "ratio_to_bytes", {}
        for case in result["options" if cases.startswith("options-") else "cases"]:
            steps = steps_of(case, group)
            if fnmatch(case["name"], cases) and {step, peer or step} <= steps.keys():
                found[case["name"]] = steps[step][key] / (steps[peer][key] if peer else 1)
        text = f"{TITLES[group]}, `{cases}`: `{step}` to {f'`{peer}`' if peer else 'the bytes'}"
        rows.append(goal(text, limit, found))
    for who, counts in result["compilation"].get("times", {}).items():
        if who.startswith(OURS["jax"]) and {"12", "96"} <= counts.keys():
            text, few, many = f"{who}: compiling 96 blocks to 12", counts["12"], counts["96"]
            rows.append(goal(text, 2.0, {who: many["sum_s"] / few["sum_s"]}))
    shares = {name: one["share"] for name, one in result["training"].items()}
    rows.append(goal("Share of a training step", 0.02, shares))
    return markdown(["goal", "", "value", "limit"], rows)


def goal(text: str, limit: float, values: dict[str, float]) -> list[str]:
    if not values:
        return [text, "not measured", "", f"{limit:g}"]
    worst = max(values, key=lambda name: values[name])
    met = "met" if float(f"{values[worst]:.3g}") <= limit else "not met"  # as it is printed
    text = f"{text}, worst in {worst}" if len(values) > 1 else text
    return [text, met, f"{values[worst]:.3g}", f"{limit:g}"]
