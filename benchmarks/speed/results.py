"""Where results lie, and how they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.rounding import rounded

FOLDER = Path(__file__).parent / "results"

DIGITS = 4  # significant ones


def stem(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if machine["device"] == "cpu":
        return "cpu"
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", machine["device_name"].lower()).strip("-")


def write(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(result)}.json"
    text = json.dumps(rounded(result, DIGITS), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_all() -> list[dict[str, Any]]:
    """Of each device that was measured: the CPU first."""
    paths = sorted(FOLDER.glob("*.json"), key=lambda path: (path.stem != "cpu", path.stem))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
