"""Bound the Lipschitz constant of a network: what both adapters need that walk one.

A value in the network has a gain: how far it moves at most when the input moves by one. Gains
multiply along a path, add where paths meet in a sum, and add in squares where they are put side by
side. They are kept as logarithms to base 10, since a product of a hundred norms overflows, and
each operation rounds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log10
from types import MappingProxyType

import numpy as np

from ._certificate import Host
from ._chain import Inexact, Slopes, certified_chain, log10_up, rounded_up

LARGEST_DENSE = 2048
"""Most elements of a layer's input and output, of one sample, whose matrix a chain bound forms."""

SLOPES: Mapping[str, Slopes] = MappingProxyType(
    {
        "identity": (1.0, 1.0),
        "abs": (-1.0, 1.0),
        "atan": (0.0, 1.0),
        "celu": (0.0, 1.0),
        "clamp": (0.0, 1.0),
        "cos": (-1.0, 1.0),
        "elu": (0.0, 1.0),
        "erf": (0.0, 1.1283792),  # 2/√π
        "gelu": (-0.1289042, 1.1289042),  # at ±√2
        "gelu_tanh": (-0.1289931, 1.1289931),
        "hardsigmoid": (0.0, 0.1666667),
        "hardswish": (-0.5, 1.5),
        "hardtanh": (0.0, 1.0),
        "log_sigmoid": (0.0, 1.0),
        "mish": (-0.1125262, 1.0884982),
        "neg": (-1.0, -1.0),
        "relu": (0.0, 1.0),
        "relu6": (0.0, 1.0),
        "selu": (0.0, 1.7580994),  # scale times alpha, where x rises to zero
        "sigmoid": (0.0, 0.25),
        "silu": (-0.0998394, 1.0998394),
        "sin": (-1.0, 1.0),
        "softplus": (0.0, 1.0),
        "softshrink": (0.0, 1.0),
        "softsign": (0.0, 1.0),
        "tanh": (0.0, 1.0),
        "tanhshrink": (0.0, 1.0),
    }
)
"""Least and largest slope of each activation, rounded outward."""

Dense = Callable[[], Inexact]


@dataclass(frozen=True)
class LayerBound:
    """One layer of a network: bounds of its own norm."""

    name: str
    kind: str
    lower: float
    upper: float


@dataclass(frozen=True)
class NetworkBound:
    """Result of ``lipschitz_bound``: printed, it is a table of the layers.

    Attributes
    ----------
    log10_upper : float
        Logarithm to base 10 of the bound of the network. inf if something in it has none.
    log10_product : float
        That of the product of the norms in the table. For a chain of layers it is a bound too.
    log10_eclipse : float or None
        That of the bound by quadratic forms (see `chain_bound`). None where the network is no chain
        of linear maps and activations, or too large: ``notes`` says so.
    lower : float or None
        Largest singular value of the Jacobian at the given example: a lower bound of the network's
        constant, up to rounding in the dtype of the network.
    layers : tuple of LayerBound
        In the order of their use.
    unbounded : mapping of name to str
        Why a part of the network has no bound.
    notes : tuple of str
    """

    log10_upper: float
    log10_product: float
    log10_eclipse: float | None
    lower: float | None
    layers: tuple[LayerBound, ...]
    unbounded: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def upper(self) -> float:
        """The bound as a number: inf above the largest float64."""
        return power_of_ten(self.log10_upper)

    @property
    def eclipse(self) -> float | None:
        """The bound by quadratic forms as a number."""
        return None if self.log10_eclipse is None else power_of_ten(self.log10_eclipse)

    def __str__(self) -> str:
        rows = [("layer", "kind", "lower", "upper")]
        rows += [(r.name, r.kind, f"{r.lower:.6g}", f"{r.upper:.6g}") for r in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"unbounded: {name}: {why}" for name, why in self.unbounded.items()]
        if self.unbounded:
            lines.append("upper bound      none")
        else:
            lines.append(f"upper bound      10^{self.log10_upper:.4f} = {self.upper:.6g}")
            lines.append(f"product of norms 10^{self.log10_product:.4f}")
        if self.log10_eclipse is not None:
            lines.append(f"ECLipsE-Fast     10^{self.log10_eclipse:.4f} = {self.eclipse:.6g}")
        if self.lower is not None:
            lines.append(f"Jacobian, below  {self.lower:.6g}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Stage:
    """One step of a chain: slopes of an activation, or a function that forms a linear map."""

    sizes: tuple[int, int]  # elements of one sample: before, after
    slopes: Slopes | None = None
    dense: Dense | None = None


@dataclass
class Value:
    """A value in the network: its gain, and how it was made if that can be part of a chain.

    Attributes
    ----------
    gain : float
        Logarithm to base 10. −inf for a constant.
    parent : Value or None
        The one value that it was made from, if it can be part of a chain.
    stages : tuple of Stage
        What made it of its parent. Without any, it is the parent in another shape.
    """

    gain: float
    parent: Value | None = None
    stages: tuple[Stage, ...] = ()
    is_input: bool = False


@dataclass
class Ledger:
    """What a walk through a network has found so far."""

    layers: list[LayerBound] = field(default_factory=list)
    unbounded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def layer(self, name: str, kind: str, lower: float, upper: float) -> float:
        """Write a row; return the logarithm of the upper bound."""
        name = self._free(name)
        self.layers.append(LayerBound(name, kind, lower, upper))
        if not isfinite(upper):
            self.unbounded[name] = "its norm is not finite"
            return inf
        return log10_up(upper)

    def refuse(self, name: str, reason: str) -> Value:
        """Write down that a part has no bound; return the value that it gives."""
        if self.unbounded.get(name) != reason:
            taken = name in self.unbounded
            self.unbounded[self._free(name) if taken else name] = reason
        return Value(inf)

    def _free(self, name: str) -> str:
        """Return the name, with a number behind it if a row has it already."""
        names = {row.name for row in self.layers} | set(self.unbounded)
        numbered = (f"{name} ({i})" for i in range(2, len(names) + 3))
        return name if name not in names else next(n for n in numbered if n not in names)

    def result(
        self, outputs: Sequence[Value], *, lower: float | None, eclipse: bool = True
    ) -> NetworkBound:
        """Return what the walk has found about the network with these outputs."""
        upper = inf if self.unbounded else side_by_side([value.gain for value in outputs])
        logs = [log10_up(row.upper) for row in self.layers]
        product = in_series(logs) if not self.unbounded else inf
        chain = None
        if eclipse and not self.unbounded:
            chain = self._eclipse(outputs)
        return NetworkBound(
            upper if chain is None else min(upper, chain),
            product,
            chain,
            lower,
            tuple(self.layers),
            MappingProxyType(dict(self.unbounded)),
            tuple(self.notes),
        )

    def _eclipse(self, outputs: Sequence[Value]) -> float | None:
        stages = chain_of(outputs[0]) if len(outputs) == 1 else None
        if stages is None:
            self.notes.append(
                "ECLipsE-Fast left out: the network is no chain of activations and of linear maps "
                "whose matrices are formed here."
            )
            return None
        largest = max((max(s.sizes) for s in stages if s.dense is not None), default=0)
        if largest > LARGEST_DENSE:
            self.notes.append(
                f"ECLipsE-Fast left out: a layer has {largest} elements of a sample, more than "
                f"{LARGEST_DENSE}."
            )
            return None
        return bound_of_stages(stages)


def chain_of(value: Value) -> list[Stage] | None:
    """Return the stages from the input to a value, or None if they are no chain."""
    found: list[Stage] = []
    current: Value | None = value
    while current is not None and not current.is_input:
        found += reversed(current.stages)
        current = current.parent
    return None if current is None else found[::-1]


def bound_of_stages(stages: Sequence[Stage]) -> float:
    """Return the logarithm of the bound of a chain, by quadratic forms."""
    maps: list[Inexact] = []
    between: list[Slopes] = []
    ends = 0.0  # activations before the first map and behind the last
    pending: list[Slopes] = []
    for stage in stages:
        if stage.dense is None:
            pending.append((1.0, 1.0) if stage.slopes is None else stage.slopes)
            continue
        if maps:
            between.append(_joined(pending))
        else:
            ends += log10_up(_steepest(pending))
        pending = []
        maps.append(stage.dense())
    ends += log10_up(_steepest(pending))
    if not maps:
        return ends
    return rounded_up(certified_chain(maps, between).log10_upper + ends, 4)


def _joined(slopes: Sequence[Slopes]) -> Slopes:
    """Return the slopes of activations one behind the other, rounded outward."""
    low = high = 1.0
    for alpha, beta in slopes:
        corners = [a * b for a in (low, high) for b in (alpha, beta)]
        exact = {alpha, beta} <= {0.0, 1.0, -1.0}
        slack = 0.0 if exact else 2.0**-50 * max(map(abs, corners))
        low, high = min(corners) - slack, max(corners) + slack
    return low, high


def _steepest(slopes: Sequence[Slopes]) -> float:
    return max(map(abs, _joined(slopes)))


def in_series(gains: Sequence[float]) -> float:
    """Return the logarithm of a product; a constant stays one whatever follows."""
    if -inf in gains:
        return -inf
    total = sum(gains)
    return rounded_up(total, len(gains)) if isfinite(total) else total


def in_parallel(gains: Sequence[float]) -> float:
    """Return the logarithm of a sum."""
    return _combined(gains, 1)


def side_by_side(gains: Sequence[float]) -> float:
    """Return the logarithm of the root of a sum of squares."""
    return _combined(gains, 2)


def _combined(gains: Sequence[float], power: int) -> float:
    largest = max(gains, default=-inf)
    if not isfinite(largest) or sum(gain > -inf for gain in gains) == 1:
        return largest
    total = sum(10 ** (power * (gain - largest)) for gain in gains)
    return rounded_up(largest + log10(total) / power, 4 * len(gains))


def power_of_ten(logarithm: float) -> float:
    """Return a number above 10 to the logarithm."""
    if logarithm == -inf:
        return 0.0
    try:
        return float(10.0**logarithm) * (1 + 2.0**-46 * (1 + abs(logarithm)))
    except OverflowError:
        return inf


def largest_scale(*factors: Host) -> float:
    """Return the largest magnitude of the product of scales that broadcast, rounded up."""
    product: Host = np.ones(())
    for factor in factors:
        product = product * np.asarray(factor, np.float64)
    largest = float(np.max(np.abs(product)))
    return largest if len(factors) < 2 else largest * (1 + 2.0**-50 * len(factors))


def widened(lower: float, upper: float, W: Host, roundings: int) -> tuple[float, float]:
    """Return bounds of the norm of a map whose kernel was computed with so many roundings.

    The error is at most that many u·|W| in each element. Its norm is at most √taps of its
    Frobenius norm, which is less than √elements of the norm of the map.
    """
    share = roundings * 2.0**-53 * W.size**0.5 * 1.01
    return max(0.0, lower - share * upper), upper * (1 + share)
