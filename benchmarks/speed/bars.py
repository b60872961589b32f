"""What the project sets itself to reach, and whether these results do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Result = dict[str, Any]
STACKED = "spectral_jax, layers stacked"


@dataclass(frozen=True)
class Bar:
    text: str
    value: float | None  # None: not measured
    limit: float

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "pass" if self.value <= self.limit else "FAIL"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def bars(result: Result) -> list[Bar]:
    every = [*shared(result)]
    every += on_cpu(result) if result["machine"]["device"] == "cpu" else on_gpu(result)
    return every


def shared(result: Result) -> Iterator[Bar]:
    compared = {
        case["name"]: ratio
        for case in result["cases"]
        if (ratio := ours_to(result, case["name"], "torch", "paper's formula")) is not None
    }
    worst = max(compared, key=lambda name: compared[name], default=None)
    yield Bar(
        f"no case slower than the paper's formula (worst: {worst})",
        compared[worst] if worst else None,
        1.0,
    )
    loops = {
        case["name"]: ratio
        for case in result["cases"]
        if (ratio := ours_to(result, case["name"], "jax", "jitted loop")) is not None
    }
    worst = max(loops, key=lambda name: loops[name], default=None)
    yield Bar(
        f"JAX: ours to the jitted loop (worst: {worst})", loops[worst] if worst else None, 1.2
    )
    for who, which in (("spectral_jax", "a leaf each"), (STACKED, "stacked")):
        ratio = compile_ratio(result, who)
        yield Bar(f"JAX: compiling 96 blocks to compiling 12, {which}", ratio, 1.5)


def on_cpu(result: Result) -> Iterator[Bar]:
    for n in (4096, 8192):
        ratio = ours_to(result, f"square-{n}-float32", "torch", "G.add_(W)")
        yield Bar(f"{n} × {n} float32: ours to G.add_(W)", ratio, 1.5)
    ratio = ours_to(result, "densenet-40-36-float32", "torch", "torch spectral_norm")
    yield Bar("DenseNet-40, 36 convolutions: ours to torch's spectral_norm", ratio, 0.15)
    yield Bar("ResNet-50: share of the training step", share(result, "resnet-50"), 0.02)


def on_gpu(result: Result) -> Iterator[Bar]:
    for dtype in ("float32", "bfloat16"):
        case = f"square-8192-{dtype}"
        yield Bar(f"8192 × 8192 {dtype}: ours to bytes / bandwidth", to_floor(result, case), 1.3)
    replay = result["graph"].get("steps", {}).get("replay", {}).get("median_ms")
    yield Bar("DenseNet-40: µs, graph replay", None if replay is None else 1e3 * replay, 60.0)
    step = result["training"].get("densenet-40", {}).get("steps", {}).get("with", {})
    known = replay is not None and step
    ratio = replay / step["median_ms"] if known else None
    yield Bar("DenseNet-40: graph replay to the training step", ratio, 0.03)
    yield Bar("ResNet-50: share of the training step", share(result, "resnet-50"), 0.02)


def ours_to(result: Result, case: str, group: str, peer: str) -> float | None:
    """How much of the peer's time ours takes."""
    steps = steps_of(result, case, group)
    return 1 / steps[peer]["ratio_to_ours"] if peer in steps else None


def to_floor(result: Result, case: str) -> float | None:
    steps = steps_of(result, case, "torch")
    return steps["spectral_torch"]["ratio_to_bytes"] if steps else None


def steps_of(result: Result, case: str, group: str) -> dict[str, Any]:
    for candidate in result["cases"]:
        if candidate["name"] == case:
            return dict(candidate["peers"].get(group, {}).get("steps", {}))
    return {}


def share(result: Result, training: str) -> float | None:
    found = result["training"].get(training)
    return found["share"] if found else None


def compile_ratio(result: Result, who: str) -> float | None:
    times = result["compilation"].get("times", {}).get(who, {})
    return times["96"]["sum_s"] / times["12"]["sum_s"] if {"12", "96"} <= times.keys() else None
