"""The command line: `spectral-report PATH`, or `python -m spectral_core report PATH`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from .._layout import Layout
from ..errors import SpectralError
from .entry import TensorEntry
from .layouts import parsed
from .result import COLUMNS, Report, printable
from .run import report_of

GOOD, ABOVE, BAD = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: all is measured. 1: ``--fail-above`` found a norm above its bound. 2: the input is bad.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compare and (options.json or options.csv):
        parser.error("--compare writes a table: leave --json and --csv out")
    try:
        layouts = dict(map(parsed, options.layout))
        reports = [
            _report(path, layouts, options) for path in (options.path, options.compare) if path
        ]
    except SpectralError as error:
        print(f"spectral-report: {_one_line(error)}", file=sys.stderr)
        return BAD
    except (KeyboardInterrupt, BrokenPipeError):
        return BAD
    except MemoryError:
        print(f"spectral-report: {options.path}: not enough memory", file=sys.stderr)
        return BAD
    with contextlib.suppress(AttributeError):  # a stream of a test
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        _show(reports, options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    bound = options.fail_above
    above = (
        [name for report in reports for name in report.above(bound)] if bound is not None else []
    )
    if above:
        shown = ", ".join(above[:10]) + (", …" if len(above) > 10 else "")
        print(
            f"spectral-report: above {bound:g}, or not finite: {printable(shown)}", file=sys.stderr
        )
    return ABOVE if above else GOOD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-report",
        description="Report the spectral norms of a checkpoint: .safetensors, .pt, .npz, .npy, "
        ".h5, .keras, .msgpack, .gguf, and folders of them, of Orbax and of "
        "torch.distributed.checkpoint. No code of a file runs.",
        epilog="Exit codes: 0 measured, 1 above --fail-above, 2 bad input.",
    )
    parser.add_argument("path", help="a file or a folder")
    parser.add_argument("--compare", metavar="OTHER", help="measure OTHER too, and show both")
    parser.add_argument(
        "--layout",
        metavar="PATTERN=AXES",
        action="append",
        default=[],
        help="axes of the tensors whose name fits, such as '*.conv.weight=oihw', "
        "'*.qkv.weight=(go)i:3' for three groups, or '*.wpe.weight=skip'; may be repeated",
    )
    parser.add_argument("--top", type=_positive, metavar="K", help="show the K largest norms only")
    parser.add_argument("--proven", action="store_true", help="prove all bounds, also large ones")
    parser.add_argument(
        "--no-convolutions", action="store_true", help="leave out norms of convolutions"
    )
    parser.add_argument(
        "--fail-above", type=float, metavar="X", help="exit with 1 if a norm may be larger than X"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="write JSON")
    output.add_argument("--csv", action="store_true", help="write CSV")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _report(path: str, layouts: dict[str, Layout | None], options: argparse.Namespace) -> Report:
    return report_of(
        path,
        layouts=layouts,
        proven=options.proven,
        convolutions=not options.no_convolutions,
        progress=_progress,
    )


def _one_line(error: Exception) -> str:
    """Return a message whose characters all print on one line: names in it come from a file."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "�" for c in text)[:500]


def _progress(entries: Sequence[TensorEntry]) -> Iterator[TensorEntry]:
    """Show a progress bar on the error stream, where that is a terminal and rich is installed."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield from entries
        return
    console = import_module("rich.console").Console(stderr=True)
    progress = import_module("rich.progress").Progress(console=console, transient=True)
    with progress:
        task = progress.add_task("", total=sum(entry.size for entry in entries))
        for entry in entries:
            progress.update(task, description=_one_line(ValueError(entry.name))[-40:])
            yield entry
            progress.advance(task, entry.size)


def _show(reports: list[Report], options: argparse.Namespace) -> None:
    if len(reports) == 2:
        print(compared(*reports))
    elif options.json:
        print(reports[0].to_json())
    elif options.csv:
        print(reports[0].to_csv(), end="")
    elif sys.stdout.isatty() and find_spec("rich") is not None:
        _show_rich(reports[0], options.top)
    else:
        print(reports[0].table(options.top))


def _show_rich(report: Report, top: int | None) -> None:
    table = import_module("rich.table").Table(title=_text(report.source))
    for i, column in enumerate(COLUMNS):
        left = i in (0, 2, 10)
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for line in report.cells(top):
        table.add_row(*map(_text, line))
    console = import_module("rich.console").Console()
    console.print(table)
    for sentence in report.footer():
        console.print(_text(sentence))


def _text(content: str) -> object:
    """Return a text without markup: a name may contain brackets."""
    return import_module("rich.text").Text(_one_line(ValueError(content)))


def compared(before: Report, after: Report) -> str:
    """Return a table of the norms in two reports, and of what is in one of them alone."""
    lines: list[tuple[str, ...]] = [
        ("name", "σ₁ before", "σ₁ after", "ratio", "‖W‖ before", "‖W‖ after")
    ]
    for name in [name for name in before if name in after]:
        a, b = before[name], after[name]
        ratio = f"{b.sigma / a.sigma:.4f}" if a.sigma and b.sigma is not None else "–"
        cells = (f"{x:.5g}" if x is not None else "–" for x in (a.sigma, b.sigma))
        norms = (f"{x:.5g}" if x is not None else "–" for x in (a.frobenius, b.frobenius))
        lines.append((name, *cells, ratio, *norms))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    text = [
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    for own, other, what in ((before, after, "before"), (after, before, "after")):
        alone = [name for name in own if name not in other]
        if alone:
            text.append(f"Only {what}: {', '.join(alone[:10])}{', …' if len(alone) > 10 else ''}")
    return "\n".join(map(printable, text))
