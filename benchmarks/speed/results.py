"""Where results lie, and how they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def stem(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if machine["device"] == "cpu":
        return "cpu"
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", machine["device_name"].lower()).strip("-")


def write(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(result)}.json"
    text = json.dumps(rounded(result), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def rounded(value: Any) -> Any:
    """Four significant digits of every float: more would be noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_all() -> list[dict[str, Any]]:
    """Of each device that was measured: the CPU first."""
    paths = sorted(FOLDER.glob("*.json"), key=lambda path: (path.stem != "cpu", path.stem))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
