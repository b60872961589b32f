"""Compare the bounds with the exact singular value, in integers: a campaign over many small cases.

A case is one bound of one matrix. The matrices are integers times a power of two, so the test
whether σ₁ ≤ τ is exact: it is whether τ²I − WᴴW has no negative eigenvalue, by elimination without
rounding. Convolutions are compared at the frequencies 0, π/2, π and 3π/2, where the symbol of an
integer kernel is an integer matrix, and with a dense SVD of PyTorch's own layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import spectral_core as sc
from spectral_core._certificate import Top, is_proven_below, is_proven_narrow

from .common import RESULTS, add_output, machine, markdown, output_of, read_json, write_json

Matrix = NDArray[Any]
FILE = "certify.json"
BACKENDS = ("numpy", "torch", "array_api_strict", "jax")
STACK = 50  # matrices of one shape, kind, dtype and scale
SEED = 0
CLOSE = 1e-10  # relative distance from a dense SVD at which a bound has met the norm
# Bits of a significand, and the exponents of the smallest and largest power of two.
DTYPES = {
    "float64": (53, -1074, 1023),
    "float32": (24, -149, 127),
    "float16": (11, -24, 15),
    "bfloat16": (8, -133, 127),
    "complex128": (53, -1074, 1023),
    "complex64": (24, -149, 127),
}
OF_BACKEND = {
    "numpy": ("float64", "float32", "float16", "complex128", "complex64"),
    "torch": tuple(DTYPES),
    "array_api_strict": ("float64", "float32", "complex128"),
    "jax": ("float64", "float32", "float16", "bfloat16", "complex128"),
}


class Stack(NamedTuple):
    """Integers, exact as Python's, of which the array is the product with 2^exponent."""

    whole: Matrix  # objects, (B, m, n); complex numbers are two parts, (2, B, m, n)
    exponent: int
    array: Any


class Number(NamedTuple):
    """Exact numbers: integers times a power of two, (B,) objects each."""

    digits: Matrix
    exponents: Matrix


def exact(x: Any) -> Number:
    """Return floats as integers and exponents; infinity becomes a number beyond all, NaN zero."""
    values = np.array([float(one) for one in x])
    finite = np.isfinite(values)
    fraction, exponent = np.frexp(np.where(finite, values, 1.0 * np.isinf(values)))
    digits = np.array([int(d) for d in np.ldexp(fraction, 53)], object)
    return Number(digits, exponent.astype(int) - 53 + 4000 * np.isinf(values))


def total(a: Number, b: Number, sign: int = 1) -> Number:
    """Return a ± b."""
    least = np.where(b.digits == 0, a.exponents, np.minimum(a.exponents, b.exponents))
    shifted = [
        np.array(
            [
                int(d) << int(s) if d else 0
                for d, s in zip(n.digits, n.exponents - least, strict=True)
            ]
        )
        for n in (a, b)
    ]
    return Number(shifted[0].astype(object) + sign * shifted[1].astype(object), least)


# The exact test


def gram_of(stack: Stack) -> Matrix:
    """Return WᴴW of the integers, as real matrices of twice the size if W is complex."""
    W = stack.whole
    if W.ndim == 4:
        re, im = W
        W = np.concatenate([np.concatenate([re, -im], -1), np.concatenate([im, re], -1)], -2)
    if W.shape[-1] > W.shape[-2]:
        W = W.swapaxes(-1, -2)
    return np.einsum("bki,bkj->bij", W, W)


def is_positive(square: Matrix, gram: Matrix, *, strictly: bool) -> Matrix:
    """Return whether square·I − gram is positive (semi)definite: Bareiss's elimination."""
    n = gram.shape[-1]
    A = -gram
    A[:, range(n), range(n)] += square[:, None]
    holds, last = np.ones(len(A), bool), np.array([1] * len(A), object)
    for k in range(n):
        pivot = A[:, k, k]
        positive = pivot > 0
        empty = (A[:, k, k:] == 0).all(axis=1)
        holds &= positive if strictly else positive | empty
        # Without a pivot, the rest stays as it is.
        pivot = np.where(positive, pivot, last)
        rest, row, column = A[:, k + 1 :, k + 1 :], A[:, k, None, k + 1 :], A[:, k + 1 :, k, None]
        products = np.where(positive[:, None, None], column * row, 0)
        A[:, k + 1 :, k + 1 :] = (pivot[:, None, None] * rest - products) // last[:, None, None]
        last = pivot
    return holds


def squares(number: Number, stack: Stack, gram: Matrix) -> tuple[Matrix, Matrix]:
    """Return τ² and the Gram matrix in one unit: integers."""
    shift = 2 * (number.exponents - stack.exponent)
    up, down = np.maximum(shift, 0), np.maximum(-shift, 0)
    square = np.array(
        [int(d) ** 2 << int(s) for d, s in zip(number.digits, up, strict=True)], object
    )
    factor = np.array([1 << int(s) for s in down], object)
    return square, gram * factor[:, None, None]


def broken(lower: Number | None, upper: Number, stack: Stack, gram: Matrix) -> int:
    """Return how many cases have an upper bound below σ₁, or a lower bound above it."""
    found = int((~is_positive(*squares(upper, stack, gram), strictly=False)).sum())
    if lower is not None:
        above = is_positive(*squares(lower, stack, gram), strictly=True)
        found += int((above & (lower.digits > 0)).sum())
    return found


# The matrices


def wholes(rng: np.random.Generator, kind: str, m: int, n: int, bits: int) -> Matrix:
    """Return a stack of integer matrices whose elements have at most so many bits."""
    small = rng.integers(-9, 10, (STACK, m, n))
    turn = np.stack([np.eye(max(m, n))[rng.permutation(max(m, n))][:m, :n] for _ in small])
    turn = turn * rng.choice([-1, 1], (STACK, m, n))
    top = 2 ** (bits - 1)
    if kind == "rank one":
        u, v = rng.integers(-15, 16, (STACK, m, 1)), rng.integers(-15, 16, (STACK, 1, n))
        return u * v if bits >= 8 else small
    if kind == "equal":
        return turn * rng.integers(1, 99, (STACK, 1, 1))
    if kind == "near":  # the values differ in their last digits
        return turn * (top - 16) + rng.integers(-1, 2, (STACK, m, n))
    if kind == "zero rows":
        return small * (rng.random((STACK, m, 1)) < 0.5) * (rng.random((STACK, 1, n)) < 0.7)
    if kind == "graded":
        return small * 2 ** rng.integers(0, max(1, bits - 5), (STACK, m, 1))
    if kind == "long":
        return rng.integers(1 - top, top, (STACK, m, n))
    return small


KINDS = ("small", "rank one", "equal", "near", "zero rows", "graded", "long")


def stacks(backend: str, count: int) -> Iterator[Stack]:
    """Yield stacks of so many matrices in all, of every kind, dtype, shape and scale."""
    rng = np.random.default_rng(SEED)
    for i in range(-(-count // STACK)):
        name = OF_BACKEND[backend][i % len(OF_BACKEND[backend])]
        bits, least, most = DTYPES[name]
        kind = KINDS[i // len(OF_BACKEND[backend]) % len(KINDS)]
        is_complex = name.startswith("complex")
        m, n = rng.integers(1, 5 if is_complex else 9, 2)
        parts = [wholes(rng, kind, m, n, bits) for _ in range(1 + is_complex)]
        lowest = least + (bits if backend == "jax" else 0)  # XLA makes subnormal numbers zero
        highest = most - bits - 1  # so that no element overflows
        scales = [0, lowest, lowest + bits, least // 2, min(most // 2, highest), highest]
        exponent = int(rng.choice(scales))
        # Half of the range each: 2^exponent itself may be out of range.
        half = exponent // 2
        values = [np.ldexp(np.ldexp(part.astype(float), half), exponent - half) for part in parts]
        host = values[0] + 1j * values[1] if is_complex else values[0]
        whole = np.array(parts if is_complex else parts[0]).astype(int).astype(object)
        yield Stack(whole, exponent, converted(host, name, backend))


def converted(host: Matrix, name: str, backend: str) -> Any:
    """Return an array of the backend."""
    if backend == "numpy":
        return host.astype(name)
    if backend == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        return jax.numpy.asarray(host).astype(name)
    xp = import_module(backend)
    return xp.asarray(host, dtype=getattr(xp, name))


# The claims


class Claim(NamedTuple):
    """Bounds of one method for a stack, and the largest relative distance of the two."""

    name: str
    lower: Number | None
    upper: Number
    gap: float | None


def claims(W: Any, seldom: bool) -> Iterator[Claim]:
    """Yield what the library claims of a stack."""
    for method in ("factorization", "cheap"):
        lower, upper, _ = sc.bounds(W, layout="soi", method=method)
        yield Claim(f"bounds, {method}", exact(lower), exact(upper), distance(lower, upper))
    for n_iter in (1, 10):
        yield Claim(
            f"gram_bound, n_iter={n_iter}", None, exact(sc.gram_bound(W, n_iter=n_iter)), None
        )
    if seldom:
        result = sc.spectral_norm(W, layout="soi")
        sigma, error = exact(result.sigma), exact(result.error_bound)
        lower, upper = total(sigma, error, -1), total(sigma, error)
        yield Claim("spectral_norm ± error_bound", lower, upper, None)


def distance(lower: Matrix, upper: Matrix) -> float:
    """Return the largest relative distance, where neither is subnormal or infinite."""
    usable = (lower > 1e-290) & np.isfinite(upper)
    return float(((upper - lower)[usable] / lower[usable]).max(initial=0.0))


Rows = dict[str, dict[str, Any]]


def count_(
    rows: Rows,
    name: str,
    cases: int,
    failures: int,
    gap: float | None = None,
    met: tuple[bool, bool] | None = None,
) -> None:
    """Count cases, and how many bounds met the norm from below and from above."""
    row = rows.setdefault(name, {"cases": 0, "broken": 0, "gap": None})
    row["cases"] += cases
    if met is not None:
        before = row.get("met", (0, 0))
        row["met"] = [before[0] + met[0], before[1] + met[1]]
    row["broken"] += failures
    if gap is not None:
        row["gap"] = max(row["gap"] or 0.0, gap)


def matrices(backend: str, count: int, every: int = 5) -> Rows:
    """Return for each claim how many cases there were, and how many were broken."""
    rows: Rows = {}
    for i, stack in enumerate(stacks(backend, count)):
        gram = gram_of(stack)
        for claim in claims(stack.array, i % every == 0):
            failures = broken(claim.lower, claim.upper, stack, gram)
            count_(rows, claim.name, len(gram), failures, claim.gap)
    return rows


def is_proven(gram: Matrix, limit: float) -> bool:
    """Return True if float32 proves a limit, with the first eigenvector or without, or float64."""
    small, size = gram.astype(np.float32), float(np.linalg.norm(gram))
    v = np.linalg.eigh(gram)[1][:, -1]
    value, slack = float(v @ gram @ v), 1e-14 * size
    rest = float(np.linalg.norm(gram @ v - value * v))
    top = Top(value - slack, value + slack, rest + slack, v)
    if any(is_proven_narrow(small, 2.0**-23 * size, limit, one) for one in (None, top)):
        return True
    return is_proven_below(gram, limit)


def narrow(count: int) -> Rows:
    """Ask for proofs of limits just above and below the exact eigenvalue, in float32 first."""
    rng, rows = np.random.default_rng(SEED), {}
    for i in range(-(-count // STACK)):
        m, n = rng.integers(1, 9, 2)
        whole = wholes(rng, KINDS[i % len(KINDS)], m, n, 12).astype(int).astype(object)
        stack = Stack(whole, 0, None)
        gram = gram_of(stack)
        largest = np.linalg.eigvalsh(gram.astype(float))[:, -1]
        limits = largest * (1 + rng.choice([-1e-3, -1e-6, -1e-8, 0, 1e-8, 1e-6, 1e-5, 1e-3], STACK))
        proven = np.array(
            [is_proven(one.astype(float), float(x)) for one, x in zip(gram, limits, strict=True)]
        )
        # limit·I − gram in integers: the limits are floats.
        digits, exponents = exact(limits)
        down = np.maximum(-exponents, 0)
        units = np.array([1 << int(s) for s in down], object)
        squares_ = np.array(
            [int(d) << int(e) for d, e in zip(digits, exponents + down, strict=True)], object
        )
        holds = is_positive(squares_, gram * units[:, None, None], strictly=False)
        count_(rows, "factorization in float32, then float64: limits tried", len(gram), 0)
        count_(
            rows,
            "factorization in float32, then float64: limits proven",
            int(proven.sum()),
            int((proven & ~holds).sum()),
        )
    return rows


# Convolutions


def symbols(kernel: Matrix) -> Iterator[Matrix]:
    """Yield the symbol at multiples of π/2, real and imaginary parts, of a kernel (o, i, k, …)."""
    powers = np.array([[1, 0], [0, -1], [-1, 0], [0, 1]], object)  # of −i
    for turns in product(range(4), repeat=kernel.ndim - 2):
        found = np.zeros((2, *kernel.shape[:2]), object)
        for tap in product(*map(range, kernel.shape[2:])):
            phase = powers[int(np.dot(turns, tap)) % 4]
            found += phase[:, None, None] * kernel[(..., *tap)]
        yield found


def kernels(count: int) -> Rows:
    """Bound convolutions of integers: circular at size 4, where all is exact, and at every size."""
    rng, rows = np.random.default_rng(SEED), {}
    for i in range(count):
        n = 1 + i % 2
        shape = (*rng.integers(1, 4, 2), *rng.integers(1, 6, n))
        top = (3, 99, 2**20)[i % 3]
        whole, exponent = rng.integers(-top, top + 1, shape).astype(object), (0, -900, 900)[i % 3]
        array = np.ldexp(whole.astype(float), exponent)
        layout = "oi" + "kk"[:n]
        parts = np.stack([*symbols(whole)], axis=1)  # (2, frequencies, o, i)
        stack = Stack(parts, exponent, None)
        gram = gram_of(stack)
        for name, options in {
            "convolution_norm, circular": {"size": 4, "padding_mode": "circular"},
            "convolution_norm, every size": {},
        }.items():
            found = sc.convolution_norm(array, layout, tol=1e-9, **options)
            lower, upper = (exact([x] * len(gram)) for x in found[:2])
            failures = int((~is_positive(*squares(upper, stack, gram), strictly=False)).any())
            if options:  # the largest of these frequencies is the norm
                failures += bool(is_positive(*squares(lower, stack, gram), strictly=True).all())
            count_(rows, name, 1, failures, found.upper / found.lower - 1 if found.lower else 0.0)
    return rows


def layers(count: int) -> Rows:
    """Bound PyTorch's own layers, beside a dense SVD of what they make of an identity batch.

    Half of the cases are circular with a whole number of strides, where both bounds are the norm.
    For the others the lower bound is the norm, as far as an iteration gets, and the upper one is S.
    """
    import torch

    rng, rows = np.random.default_rng(SEED), {}
    while (done := sum(row["cases"] for row in rows.values())) < count:
        layer, size, options, layout = (whole_layer_of if done % 2 else layer_of)(rng)
        eye = torch.eye(layer.in_channels * int(np.prod(size)), dtype=torch.float64)
        try:
            with torch.no_grad():
                images = layer(eye.reshape(-1, layer.in_channels, *size))
        except (RuntimeError, ValueError):  # an image that is too small for this layer
            continue
        norm = float(torch.linalg.matrix_norm(images.reshape(len(eye), -1), 2))
        found = sc.convolution_norm(layer.weight, layout, size=size, tol=1e-11, **options)
        holds = found.lower <= norm * (1 + 1e-12) and norm <= found.upper * (1 + 1e-12)
        met = norm <= found.lower * (1 + CLOSE), found.upper <= norm * (1 + CLOSE)
        exact = options.get("padding_mode") == "circular" and is_whole(layer, size)
        if exact:
            holds &= all(met)
        share = found.upper / norm - 1 if norm else found.upper
        name = "circular, whole strides" if exact else options.get("padding_mode", "transposed")
        count_(rows, f"PyTorch's layers, {name}", 1, int(not holds), share, met)
    return rows


def is_whole(layer: Any, size: tuple[int, ...]) -> bool:
    """Return True if the layer has as many outputs as there are shifts by its stride."""
    each = zip(size, layer.kernel_size, layer.stride, layer.dilation, layer.padding, strict=True)
    return all(
        n % s == 0 and (n + 2 * p - d * (k - 1) - 1) // s + 1 == n // s for n, k, s, d, p in each
    )


Case = tuple[Any, tuple[int, ...], dict[str, Any], sc.Layout]


def whole_layer_of(rng: np.random.Generator) -> Case:
    """Return a random circular layer that has as many outputs as there are shifts by its stride."""
    while True:
        case = layer_of(rng, "circular")
        if is_whole(*case[:2]):
            return case


def layer_of(rng: np.random.Generator, mode: str | None = None) -> Case:
    """Return a random layer, the size of its image, and the options that describe it."""
    from torch import float64, manual_seed, nn

    manual_seed(int(rng.integers(2**31)))
    n, groups = rng.choice([1, 2, 2, 3]), int(rng.integers(1, 4))
    transposed = mode is None and rng.random() < 0.3

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(low, high, n))

    kernel, size = each(1, 4), each(2, (40, 7, 4)[n - 1])
    options: dict[str, Any] = {"stride": each(1, 3), "dilation": each(1, 3)}
    i, o = (groups * int(rng.integers(1, 3)) for _ in range(2))
    if transposed:
        options |= {"padding": each(0, 2)}
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        layer = kind(i, o, kernel, groups=groups, bias=False, dtype=float64, **options)
        options["transposed"] = True
    else:
        modes = ["zeros", "circular", "reflect", "replicate"]
        options["padding_mode"] = mode or str(rng.choice(modes))
        reach = [d * (k - 1) for d, k in zip(options["dilation"], kernel, strict=True)]
        options["padding"] = each(0, 3) if rng.random() < 0.5 else tuple(r // 2 for r in reach)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        layer = kind(i, o, kernel, groups=groups, bias=False, dtype=float64, **options)
    axes = "(gi)o" if transposed else "(go)i"
    return layer, size, options, sc.Layout(axes + "dhw"[3 - n :], groups=groups)


# The command

PARTS: dict[str, Callable[[int], Rows]] = {
    **{name: lambda count, name=name: matrices(name, count) for name in BACKENDS},
    "narrow": narrow,
    "kernels": kernels,
    "layers": layers,
}
COUNTS = {**dict.fromkeys(BACKENDS, 30_000), "narrow": 100_000, "kernels": 2_000, "layers": 8_000}


def page(folder: Path = RESULTS) -> str:
    """Return the table of the campaign."""
    result = read_json(folder / FILE)
    lines = []
    for part, found in result["parts"].items():
        for name, row in found["rows"].items():
            gap = "" if row["gap"] is None else f"{row['gap']:.1e}"
            about = f"{name}, {part}" if part in BACKENDS else name
            met = [f"{one:,}" for one in row.get("met", ())] or ["", ""]
            lines.append([about, f"{row['cases']:,}", f"{row['broken']:,}", gap, *met])
    header = ["bound", "cases", "violations", "largest relative gap"]
    header += ["lower bound within 1e-10 of the SVD", "upper bound within 1e-10"]
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certify", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--share", type=float, default=1.0, help="of the committed campaign's size")
    add_output(parser, "certify-output")
    options = parser.parse_args()
    path = output_of(options) / FILE
    result = read_json(path) if path.exists() else {"parts": {}}
    for part in options.parts:
        start = perf_counter()
        rows = PARTS[part](int(COUNTS[part] * options.share))
        seconds = perf_counter() - start
        result["parts"][part] = {"rows": rows, "seconds": seconds}
        result["machine"] = machine("cpu")
        write_json(path, result, 3)  # each part: what is stopped goes on with --parts
        cases, failures = (sum(row[key] for row in rows.values()) for key in ("cases", "broken"))
        print(f"{part}: {cases:,} cases, {failures} violations, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
