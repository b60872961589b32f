"""The door to the report: what it needs is imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from ._layout import Layout

if TYPE_CHECKING:
    from ._report.result import Report


def report(
    source: str | PathLike[str] | Mapping[str, Any] | Any,
    *,
    layouts: Mapping[str, Layout | str | None] | None = None,
    proven: bool = False,
    convolutions: bool = True,
) -> Report:
    """Measure the spectral norms of a checkpoint, or of a model.

    A file is read tensor by tensor, and no code in it runs.

    Parameters
    ----------
    source : path, mapping or model
        A file or folder: .safetensors, what ``torch.save`` and ``torch.distributed.checkpoint``
        write, .npz, .npy, .weights.h5, .h5, .keras, Flax's .msgpack, a folder of Orbax, or .gguf.
        Or a mapping of arrays, which may be nested; or a model of PyTorch or Keras.
    layouts : mapping of pattern to Layout, str or None, optional
        Axes of the tensors whose name fits a pattern, such as ``{"*.conv.weight": "oihw"}``. The
        first pattern that fits decides. None leaves a tensor out.
    proven : bool
        True to prove the bounds of large matrices too. Without it, the upper bound of a matrix of
        more than about 580 × 580 elements fails with a probability of at most 1e-9.
    convolutions : bool
        False to leave out the norms of convolutions as maps of images.

    Returns
    -------
    Report
        A mapping of the name of each matrix to its row, with ``table()``, ``to_json()``,
        ``to_csv()``, ``to_pandas()`` and ``summary()``. ``skipped`` has the reason why each other
        tensor is not measured.

    Raises
    ------
    SpectralError
        If the source cannot be read, is broken, or is not safe to read. The message is one line.
    ArgumentError
        If a layout does not fit a tensor whose name fits its pattern.

    Notes
    -----
    Files of HDF5 need h5py, and folders of Orbax need TensorStore. All other formats need NumPy
    alone.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> report = sc.report({"layer": {"weight": np.diag([3.0, 4.0])}})
    >>> report["layer/weight"].sigma, report["layer/weight"].ratio
    (4.0, 0.75)
    """
    from ._report.run import report_of

    path = str(source) if isinstance(source, PathLike) else source
    return report_of(path, layouts=layouts, proven=proven, convolutions=convolutions)
