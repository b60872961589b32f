"""`python -m spectral_core report PATH`: report the spectral norms of a checkpoint."""

import sys


def main() -> int:
    """Run the command that the first argument names."""
    if sys.argv[1:2] != ["report"]:
        print("usage: python -m spectral_core report PATH [options]", file=sys.stderr)
        return 2
    from ._report.command import main as report

    return report(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
