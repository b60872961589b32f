"""The command line: `spectral-report PATH`, or `python -m spectral_core report PATH`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path

from .._layout import Layout
from ..errors import SpectralError
from .compare import compared
from .compiled import advice
from .drift import Comparison
from .entry import TensorEntry
from .hdf5 import needed
from .layouts import parsed
from .output import checked, write
from .result import Report
from .run import report_of
from .texts import first, printable

GOOD, ABOVE, BAD = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: all is measured. 1: ``--fail-above`` found a norm above its bound. 2: the input is bad.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    problem = _contradiction(parser, options)
    if problem:
        parser.error(problem)
    try:
        target = _page_target(options)
        layouts = dict(map(parsed, options.layout))
        report = (_report if options.compare is None else _comparison)(layouts, options)
    except (KeyboardInterrupt, BrokenPipeError):
        return BAD
    except (SpectralError, OSError) as error:  # a disk may fail, or a file go, in the middle
        print(f"spectral-report: {_one_line(error)}", file=sys.stderr)
        return BAD
    except MemoryError:
        print(f"spectral-report: {_one_line(options.path)}: not enough memory", file=sys.stderr)
        return BAD
    with contextlib.suppress(AttributeError):  # a stream of a test
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        _show(report, options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    if target and isinstance(report, Report) and not _write_page(report, target):
        return BAD
    return _verdict(report, options)


_OF_TWO = ("fail_drift", "vectors", "similarity")
_OF_ONE = ("spectrum", "heads", "config", "base", "lora_scale", "no_convolutions", "html")


def _contradiction(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return what is wrong with options that would have no effect, or ""."""

    def given(names: Sequence[str]) -> list[str]:
        changed = (x for x in names if getattr(options, x) != parser.get_default(x))
        return [f"--{name.replace('_', '-')}" for name in changed]

    if options.compare is None and given(_OF_TWO):
        return f"{given(_OF_TWO)[0]} needs --compare OTHER"
    if options.compare is not None and given(_OF_ONE):
        return f"{given(_OF_ONE)[0]} is for one checkpoint: leave --compare out"
    if options.force and options.html is None:
        return "--force needs --html PATH"
    return ""


def _verdict(report: Report | Comparison, options: argparse.Namespace) -> int:
    """Print what exceeds a bound, and return the exit code."""
    found = []
    if options.fail_above is not None:
        found.append((f"above {options.fail_above:g}", report.above(options.fail_above)))
    if options.fail_drift is not None and isinstance(report, Comparison):
        found.append(
            (f"moved by more than {options.fail_drift:g}", report.drifted(options.fail_drift))
        )
    for what, names in found:
        if names:
            shown = printable(first(names))
            print(f"spectral-report: {what}, or not finite: {shown}", file=sys.stderr)
    return ABOVE if any(names for _, names in found) else GOOD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-report",
        description="Report the spectral norms of a checkpoint: .safetensors, .pt, .npz, .npy, "
        ".h5, .keras, .msgpack, .gguf, and folders of them, of Orbax and of "
        "torch.distributed.checkpoint. No code of a file runs.",
        epilog="Exit codes: 0 measured, 1 above --fail-above or --fail-drift, 2 bad input.",
    )
    parser.add_argument("path", help="a file or a folder")
    parser.add_argument(
        "--layout",
        metavar="PATTERN=AXES",
        action="append",
        default=[],
        help="axes of the tensors whose name fits, such as '*.conv.weight=oihw', "
        "'*.qkv.weight=(go)i:3' for three groups, or '*.wpe.weight=skip'; may be repeated",
    )
    parser.add_argument("--proven", action="store_true", help="prove all bounds, also large ones")
    parser.add_argument(
        "--fail-above",
        type=_threshold,
        metavar="X",
        help="exit with 1 if a norm may be larger than X, or is not finite",
    )
    _add_measurements(parser.add_argument_group("measurements of one checkpoint"))
    _add_comparison(parser.add_argument_group("comparison of two checkpoints"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_measurements(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--spectrum",
        action="store_true",
        help="show all singular values, or their density where the matrix is large",
    )
    group.add_argument(
        "--heads",
        type=_count,
        nargs="?",
        const=True,
        default=False,
        metavar="N",
        help="measure each head of attention; N is their number where no config.json says it",
    )
    group.add_argument("--config", metavar="PATH", help="a config.json for --heads")
    group.add_argument(
        "--base", metavar="PATH", help="weights to which the LoRA factors in the file belong"
    )
    group.add_argument(
        "--lora-scale",
        type=float,
        metavar="S",
        help="factor of B·A, instead of what adapter_config.json or the file says",
    )
    group.add_argument(
        "--no-convolutions", action="store_true", help="leave out norms of convolutions"
    )


def _add_comparison(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compare", metavar="OTHER", help="show how far each matrix of OTHER moved from PATH's"
    )
    group.add_argument(
        "--vectors",
        type=_natural,
        default=10,
        metavar="K",
        help="with --compare: number of singular vectors to compare; 10 by default, 0 is fast",
    )
    group.add_argument(
        "--similarity",
        type=float,
        default=0.5,
        metavar="E",
        help="with --compare: a singular vector of OTHER whose cosines with those of PATH are all "
        "below E is an intruder; 0.5 by default",
    )
    group.add_argument(
        "--fail-drift",
        type=_threshold,
        metavar="X",
        help="with --compare: exit with 1 if a relative drift is larger than X, or no number",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--top",
        type=_positive,
        metavar="K",
        help="show only the K largest norms, or drifts, in the table",
    )
    group.add_argument(
        "--html", metavar="PATH", help="write one page too, with plots, that needs no network"
    )
    group.add_argument(
        "--force", action="store_true", help="let --html replace a file that is no such page"
    )
    formats = group.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="write JSON")
    formats.add_argument("--csv", action="store_true", help="write CSV")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"{_one_line(text)!r} is no number of heads: put the path first, or write --heads=N"
        )
    return int(text)


def _page_target(options: argparse.Namespace) -> Path | None:
    """Return the file of the page: what prevents it is said before minutes of measuring."""
    if options.html is None:
        return None
    needed("jinja2")
    return checked(options.html, force=options.force)


def _write_page(report: Report, target: Path) -> bool:
    """Write the page and say so; return False if it cannot be written."""
    try:
        write(target, report.to_html())
    except OSError as error:
        print(f"spectral-report: {_one_line(error)}", file=sys.stderr)
        return False
    print(f"spectral-report: wrote {printable(str(target))}", file=sys.stderr)
    return True


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{_one_line(text)!r} is no whole number above 0")
    return int(text)


def _threshold(text: str) -> float:
    """Return a number. Nothing is above NaN: as a bound it would let everything pass."""
    try:
        value = float(text)
    except ValueError:
        value = nan
    if isnan(value):
        raise argparse.ArgumentTypeError(f"{_one_line(text)!r} is no number")
    return value


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _comparison(layouts: dict[str, Layout | None], options: argparse.Namespace) -> Comparison:
    return compared(
        options.path,
        options.compare,
        layouts=layouts,
        proven=options.proven,
        n_vectors=options.vectors,
        similarity=options.similarity,
        progress=_progress,
    )


def _report(layouts: dict[str, Layout | None], options: argparse.Namespace) -> Report:
    return report_of(
        options.path,
        layouts=layouts,
        proven=options.proven,
        convolutions=not options.no_convolutions,
        spectrum=options.spectrum,
        heads=options.heads or (options.config is not None),
        config=options.config,
        base=options.base,
        lora_scale=options.lora_scale,
        progress=_progress,
    )


def _one_line(error: object) -> str:
    """Return a message whose characters all print on one line: names in it come from a file."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "�" for c in text)[:500]


def _progress(entries: Sequence[TensorEntry]) -> Iterator[TensorEntry]:
    """Show a progress bar on the error stream, where that is a terminal and rich is installed.

    First say what would be faster: the user can still stop and install it.
    """
    if text := advice(entries):
        print(f"spectral-report: {text}", file=sys.stderr)
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield from entries
        return
    console = import_module("rich.console").Console(stderr=True)
    progress = import_module("rich.progress").Progress(console=console, transient=True)
    with progress:
        task = progress.add_task("", total=sum(entry.size for entry in entries))
        for entry in entries:
            progress.update(task, description=_one_line(entry.name)[-40:])
            yield entry
            progress.advance(task, entry.size)


def _show(report: Report | Comparison, options: argparse.Namespace) -> None:
    if options.json:
        print(report.to_json())
    elif options.csv:
        print(report.to_csv(), end="")
    elif sys.stdout.isatty() and find_spec("rich") is not None:
        _show_rich(report, options.top)
    else:
        print(report.table(options.top))


_FOLDED = ("name", "")  # columns whose texts may be folded
_NARROWEST = 16  # characters of a folded column


def _needed_width(lines: Sequence[tuple[str, ...]]) -> int:
    """Return the columns of a terminal in which no number is folded or cut."""
    width = 1
    for label, *cells in zip(*lines, strict=True):
        widest = max(map(len, (label, *cells)))
        width += 3 + (min(widest, _NARROWEST) if label in _FOLDED else widest)
    return width


def _show_rich(report: Report | Comparison, top: int | None) -> None:
    console = import_module("rich.console").Console()
    lines = report.cells(top)
    if console.width < _needed_width([report.columns, *lines]):
        print(report.table(top))
        return
    table = import_module("rich.table").Table(title=_text(report.source))
    for column in report.columns:
        left, folds = column in ("name", "layout", ""), column in _FOLDED
        table.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=not folds
        )
    for line in lines:
        table.add_row(*map(_text, line))
    console.print(table)
    for sentence in report.footer():
        console.print(_text(sentence))


def _text(content: str) -> object:
    """Return a text without markup: a name may contain brackets."""
    return import_module("rich.text").Text(_one_line(content))
