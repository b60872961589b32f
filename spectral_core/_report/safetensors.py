"""Read .safetensors: a length, a JSON header, and the tensors one after another."""

from __future__ import annotations

from pathlib import Path

from .entry import Checkpoint, CheckpointError, check_count, checked_shape
from .files import Mapped, parsed_json, short

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}


def read(path: Path) -> Checkpoint:
    """List the tensors of a .safetensors file."""
    file = Mapped(path)
    length = int.from_bytes(file.read(0, 8), "little")
    header = parsed_json(file.read(8, length), "the header")
    metadata = header.pop("__metadata__", None)
    check_count(len(header))
    entries = []
    for name, fields in header.items():
        what = f"tensor {short(name)}"
        if not isinstance(fields, dict):
            raise CheckpointError(f"{what} has no fields")
        shape = checked_shape(fields.get("shape"), what)
        start, stop = _offsets(fields.get("data_offsets"), what)
        start, stop = start + 8 + length, stop + 8 + length
        if not start <= stop <= file.size:
            raise CheckpointError(f"{what} ends past the end of the file")
        own = str(fields.get("dtype"))[:20]
        entries.append(file.entry(name, shape, _NAMES.get(own, own), start, stop - start))
    made_by = metadata.get("format") if isinstance(metadata, dict) else None
    return Checkpoint("flax" if made_by == "flax" else "torch", entries)


def _offsets(found: object, what: str) -> tuple[int, int]:
    match found:
        case [int(start), int(stop)] if 0 <= start <= stop:
            return start, stop
    raise CheckpointError(f"{what} has no pair of offsets")
