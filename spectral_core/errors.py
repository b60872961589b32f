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


def positive_int(value: object, name: str) -> int:
    """``value`` as an int, or `ArgumentError` if it is not an integer ≥ 1."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(f"{name} must be an integer ≥ 1, not {value!r}")
    return number
