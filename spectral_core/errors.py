"""What can be wrong with an input, one class a kind of mistake."""

from operator import index


class SpectralError(Exception):
    """Base of every error this library raises about its inputs."""


class ShapeError(SpectralError, ValueError):
    """A shape does not fit: the number of axes, their sizes, or an empty axis."""


class DTypeError(SpectralError, TypeError):
    """A data type that singular vectors cannot be iterated in, or two that do not fit."""


class DeviceError(SpectralError, ValueError):
    """Arrays that must lie on one device lie on two, or are not writeable where they must be."""


class NamesError(SpectralError, ValueError):
    """The names of weights, gradients, state or patterns do not fit each other."""


class ArgumentError(SpectralError, ValueError):
    """A number out of its range: ``factor``, ``n_iter``, ``seed``, ``tol`` and the like."""


def checked_int(value: object, name: str, least: int = 1) -> int:
    """``value`` as an int, or `ArgumentError` if it is not an integer ≥ ``least``."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ArgumentError(f"{name} must be an integer ≥ {least}, not {value!r}")
    return number
