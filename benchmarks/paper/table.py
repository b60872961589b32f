"""The paper's Table 1 from our results, with its own numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .comparison import Group, Interval, hundredths, points, shown
from .results import PAPERS, STRENGTHS


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 1."""

    accuracy: Mapping[str, float]
    alpha: float
    gap: Mapping[str, float]


def published(accuracy: Sequence[float], alpha: float, gap: Sequence[float]) -> Published:
    """Numbers in the order of the paper's columns."""
    return Published(
        dict(zip(PAPERS, accuracy, strict=True)), alpha, dict(zip(PAPERS, gap, strict=True))
    )


# By model, data and batch.
PAPER = {
    ("vgg", "cifar-10", 64): published(
        (0.898, 0.897, 0.884, 0.904), 0.88, (0.079, 0.074, 0.109, 0.068)
    ),
    ("vgg", "cifar-10", 4096): published(
        (0.858, 0.863, 0.870, 0.885), 0.85, (0.092, 0.064, 0.064, 0.045)
    ),
    ("nin", "cifar-100", 64): published(
        (0.626, 0.672, 0.627, 0.669), 0.62, (0.231, 0.120, 0.253, 0.090)
    ),
    ("nin", "cifar-100", 4096): published(
        (0.597, 0.618, 0.607, 0.640), 0.59, (0.205, 0.119, 0.196, 0.090)
    ),
    ("densenet-40", "cifar-100", 64): published(
        (0.675, 0.718, 0.675, 0.709), 0.67, (0.317, 0.080, 0.299, 0.095)
    ),
    ("densenet-40", "cifar-100", 4096): published(
        (0.639, 0.671, 0.649, 0.697), 0.63, (0.235, 0.111, 0.110, 0.051)
    ),
    ("densenet-22", "stl-10", 64): published(
        (0.724, 0.723, 0.707, 0.735), 0.70, (0.063, 0.073, 0.069, 0.068)
    ),
    ("densenet-22", "stl-10", 4096): published(
        (0.686, 0.689, 0.676, 0.697), 0.67, (0.096, 0.057, 0.015, 0.042)
    ),
}


def table(found: Sequence[Group], methods: Iterable[str] = STRENGTHS) -> str:
    """Markdown, with those of the methods that any run used."""
    columns = [method for method in methods if any(method in group.runs for group in found)]
    head = [
        *("model, data", "B"),
        *(f"{'accuracy: ' if k == 0 else ''}{method}" for k, method in enumerate(columns)),
        "α",
        *(f"{'gap: ' if k == 0 else ''}{method}" for k, method in enumerate(columns)),
    ]
    rows = [head, ["---", *(["---:"] * (len(head) - 1))]]
    rows += [row(group, columns) for group in found]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(group: Group, columns: Sequence[str]) -> list[str]:
    network = group.network
    paper = PAPER.get((network.model, network.data, group.batch)) if network.is_papers else None
    alpha = "–" if group.alpha is None else hundredths(group.alpha)
    if paper:
        alpha += f" (paper {hundredths(paper.alpha)})"
    return [
        network.title,
        str(group.batch),
        *cells(group, columns, group.accuracies, max, paper.accuracy if paper else {}),
        alpha,
        *cells(group, columns, group.gaps, min, paper.gap if paper else {}),
    ]


def cells(
    group: Group,
    columns: Sequence[str],
    measure: Callable[[str], Mapping[int, float]],
    best: Callable[[list[float]], float],
    paper: Mapping[str, float],
) -> list[str]:
    """Means and intervals, the best in bold."""
    values = {method: list(measure(method).values()) for method in columns if method in group.runs}
    # Equal in print is equal. What diverged for some seeds has a mean over the lucky ones.
    means = {
        method: round(Interval.of(found).mean, 3)
        for method, found in values.items()
        if found and not diverged(group, method)
    }
    first = best(list(means.values())) if means else None
    return [
        cell(
            values.get(method, ()),
            diverged(group, method),
            method in means and means[method] == first,
            paper.get(method),
        )
        for method in columns
    ]


def cell(values: Sequence[float], lost: str, bold: bool, paper: float | None) -> str:
    text = shown(Interval.of(values)) if values else ""
    text = ", ".join(part for part in (f"**{text}**" if bold else text, lost) if part) or "–"
    return text if paper is None else f"{text} (paper {points(paper)})"


def diverged(group: Group, method: str) -> str:
    """How many runs of how many, if any."""
    runs = group.runs.get(method, ())
    lost = sum(result.diverged for result in runs)
    return f"diverged {lost}/{len(runs)}" if lost else ""
