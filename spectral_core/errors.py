"""Errors about inputs: one class for each kind of mistake."""

from collections.abc import Iterable
from operator import index

_LISTED = 10  # names in a message
_SHOWN = 60  # characters of a value


class SpectralError(Exception):
    """Base of every error this library raises about its inputs."""


class ShapeError(SpectralError, ValueError):
    """A shape does not fit: the number of axes, their sizes, or an empty axis."""


class DTypeError(SpectralError, TypeError):
    """A dtype in which singular vectors cannot be iterated, or two dtypes that do not fit."""


class DeviceError(SpectralError, ValueError):
    """Arrays are on two devices where one is needed, or an array is not writeable."""


class NamesError(SpectralError, ValueError):
    """The names of weights, gradients, state or patterns do not fit each other."""


class ArgumentError(SpectralError, ValueError):
    """A number is out of its range: ``factor``, ``n_iter``, ``seed``, ``tol`` and the like."""


class SpectralWarning(UserWarning):
    """Something that is probably not meant: a guessed layout, a regularizer that never acts."""


def listed(names: Iterable[object]) -> str:
    """Return names for a message: at most ten, and how many more there are.

    >>> listed("abc")
    "['a', 'b', 'c']"
    >>> listed(range(12))
    '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … 2 more]'
    """
    names = list(names)
    more = len(names) - _LISTED
    shown = ", ".join(map(repr, names[:_LISTED]))
    return f"[{shown}, … {more} more]" if more > 0 else f"[{shown}]"


def shown(value: object) -> str:
    """Return a short form of a value for an error; the digits of an integer may be thousands."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}…"


def check_int(value: object, name: str, least: int = 1) -> int:
    """Return ``value`` as an int; raise `ArgumentError` unless it is an integer ≥ ``least``."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ArgumentError(f"{name} must be an integer ≥ {least}, not {shown(value)}")
    return number
