"""What all benchmarks share: where results are, how numbers, tables and pictures look."""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import re
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from seaborn import FacetGrid

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "jax", "jaxlib", "optax", "flax", "scipy", "numba", "cupy-cuda13x")

STYLE = Path(__file__).with_name("figures.mplstyle")


def add_output(parser: ArgumentParser, name: str) -> None:
    """Add the options that say where a result is written."""
    parser.add_argument("--out", type=Path, default=Path(name), help="where to write")
    parser.add_argument("--save", action="store_true", help="write the repository's results")


def output_of(options: Namespace) -> Path:
    """Return the folder that the options of `add_output` say."""
    return RESULTS if options.save else Path(options.out)


def rounded(value: Any, digits: int) -> Any:
    """Round floats to so many significant digits, as JSON; what is not finite becomes None."""

    def read(number: str) -> float:
        return float(f"{float(number):.{digits}g}")

    text = json.dumps(value, default=list)  # arrays become lists
    return json.loads(text, parse_float=read, parse_constant=lambda _: None)


def write_json(path: Path, value: Any, digits: int) -> None:
    """Write compact JSON, all of it or nothing, compressed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(value, digits), ensure_ascii=False, separators=(",", ":"))
    data, partial = f"{text}\n".encode(), path.with_suffix(".partial")
    # Without a time stamp: equal results are equal files.
    partial.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)
    partial.replace(path)


def read_json(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a PNG of 256 colors, which is smaller; the same picture is the same file."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


@contextmanager
def panels(rows: Iterable[Mapping[str, Any]], **options: Any) -> Iterator[FacetGrid]:
    """Draw y over x in a panel for each value of ``panel``, in the common style."""
    import matplotlib as mpl
    import pandas as pd
    import seaborn as sns

    options |= {"y": "y", "col": "panel", "kind": "line", "height": 3.2, "aspect": 1.3}
    free = {"sharex": False, "sharey": False}
    with mpl.rc_context(fname=STYLE):
        yield sns.relplot(pd.DataFrame(rows), facet_kws=free, **options).set_titles("{col_name}")


def machine(device: str) -> dict[str, Any]:
    """Return what timings depend on, without the name of the machine."""
    import torch

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    processor = names[0] if names else platform.processor() or platform.machine()
    installed = {name: version(name) for name in PACKAGES if [*distributions(name=name)]}
    device_name = torch.cuda.get_device_name() if device == "cuda" else processor
    about = {"date": date.today().isoformat(), "device": device, "device_name": device_name}
    about |= {"architecture": platform.machine(), "processor": processor}
    about |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {"load_at_start": os.getloadavg()[0], "python": platform.python_version()}
    return about | installed
