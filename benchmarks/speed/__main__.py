"""`python -m benchmarks.speed`: time a step beside its peers, report, and save the numbers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console


def main() -> None:
    options = arguments()
    # Before the frameworks are imported: each on the device that is asked for, and quiet.
    os.environ["JAX_PLATFORMS"] = "cpu" if options.device == "cpu" else ""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler counts memory, and announces itself
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from .session import session

    terminal = Console()
    session(options, terminal if terminal.is_terminal else Console(width=140))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        default=["*"],
        help="cases by name, such as 'square-4096-*', 'training-*', compilation",
    )
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a case and framework")
    parser.add_argument("--rounds", type=int, default=200, help="at most, of a case and framework")
    parser.add_argument("--quick", action="store_true", help="a few small cases, briefly")
    parser.add_argument("--out", type=Path, help="folder to write the results into")
    parser.add_argument("--save", action="store_true", help="write the repository's results")
    options = parser.parse_args()
    if options.save and (options.quick or options.only != ["*"]):
        parser.error("--save writes a whole run: leave --quick and --only out")
    return options


if __name__ == "__main__":
    main()
