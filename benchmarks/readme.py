"""Write the generated blocks of README and docs anew: `python -m benchmarks.readme`.

A block stands between `<!-- name -->` and `<!-- /name -->`. It comes from the committed results.
"""

import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import accuracy, certify, norms, operator_norm
from . import report as checkpoints
from .common import RESULTS, markdown, read_json, read_toml
from .paper import page, runs
from .speed import report

ROOT = Path(__file__).parent.parent


def pages() -> list[Path]:
    """Return the pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> dict[str, str]:
    """Return the text of each block by name."""
    speed = report.committed()
    found = {
        "costs": report.costs(speed[0]),
        "speed": "\n\n".join(map(report.summary, speed)),
        "accuracy": accuracy.page(),
        "operator-norm": operator_norm.page(),
        "stacks": stacks(),
        **{f"paper-{suite}": page.block(results) for suite, results in runs.committed().items()},
        "paper-summary": page.summary(runs.committed().values()),
    }
    if (path := RESULTS / "networks.json").exists():
        found["networks"] = networks(read_json(path))
    if (path := RESULTS / "digits.json").exists():
        found["digits"] = digits(result := read_json(path))
        found |= {"vectors": vectors(result)} if "n_vectors" in result else {}
    for module in (certify, norms, checkpoints):
        if (RESULTS / module.FILE).exists():
            found[module.FILE.removesuffix(".json")] = module.page()
    return found


def written(text: str, found: dict[str, str]) -> str:
    """Return the page with its blocks as the results have them."""
    for name, block in found.items():
        marker = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marker.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    return text


def stack_list() -> list[dict[str, Any]]:
    return read_toml(ROOT / "benchmarks" / "stacks.toml")["stack"]


def stacks() -> str:
    """Return the tested stacks with the versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    rows = ["| stack | versions | what is tested |", "|---|---|---|"]
    for stack in stack_list():
        found = ", ".join(f"{package} {versions[package]}" for package in stack["packages"])
        rows.append(f"| {stack['title']} | {found} | {stack['tested']} |")
    return "\n".join(rows)


def digits(result: dict[str, Any]) -> str:
    """Return the table of the demonstration, in percent: mean ± standard deviation over seeds."""
    noise = result["settings"]["noise"]
    rows = [
        f"| batch | method | test accuracy | gap | accuracy under noise (s.d. {noise:g}) |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            f"{mean(row[key]):.1f} ± {stdev(row[key]):.1f}" for key in ("test", "gap", "noise")
        ]
        rows.append(f"| {row['batch']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def vectors(result: dict[str, Any]) -> str:
    """Return the demonstration's table of one, two and four vectors, over the same seeds."""
    rows = ["| λ | batch | `n_vectors` | test accuracy | accuracy under noise | largest σ |"]
    rows.append("|---:|---:|---:|---:|---:|---:|")
    for row in sorted(result["n_vectors"], key=lambda row: (row["strength"], row["batch"])):
        cells = [f"{mean(row[key]):.1f} ± {stdev(row[key]):.1f}" for key in ("test", "noise")]
        largest = f"{mean(map(max, row['sigma'])):.2f}"
        about = f"{row['strength']:g} | {row['batch']} | {row['n_vectors']}"
        rows.append(f"| {about} | {' | '.join(cells)} | {largest} |")
    return "\n".join(rows)


def networks(result: dict[str, Any]) -> str:
    """Return the table of trained networks: logarithms of their norms, the mean over the seeds."""
    columns = {
        "flattened": "product, flattened",
        "operator": "product, operator",
        "eclipse": "ECLipsE-Fast",
        "bound": "bound of the whole",
        "jacobian": "Jacobian, from below",
    }
    rows = []
    for row in result["rows"]:
        cells = [f"{row['network']}, {row['method']}"]
        cells.append(f"{mean(one['accuracy'] for one in row['seeds']):.1f} %")
        for key in columns:
            values = [one[key] for one in row["seeds"]]
            cells.append("–" if None in values else f"{mean(values):.2f}")
        rows.append(cells)
    return markdown(["network", "test accuracy", *columns.values()], rows)


def main() -> None:
    found = blocks()
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := written(text, found)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
