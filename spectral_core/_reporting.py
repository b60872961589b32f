"""The door to the report: what it needs is imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from ._layout import Layout

if TYPE_CHECKING:
    from ._report.drift import Comparison
    from ._report.result import Report


def report(
    source: str | PathLike[str] | Mapping[str, Any] | Any,
    *,
    layouts: Mapping[str, Layout | str | None] | None = None,
    proven: bool = False,
    convolutions: bool = True,
    spectrum: bool = False,
    heads: bool | int = False,
    config: str | PathLike[str] | Mapping[str, Any] | None = None,
    base: str | PathLike[str] | Mapping[str, Any] | Any = None,
    lora_scale: float | None = None,
) -> Report:
    """Measure the spectral norms of a checkpoint, or of a model.

    A file is read tensor by tensor, and no code in it runs.

    Parameters
    ----------
    source : path, mapping or model
        A file or folder: .safetensors, what ``torch.save`` and ``torch.distributed.checkpoint``
        write, .npz, .npy, .weights.h5, .h5, .keras, Flax's .msgpack, a folder of Orbax, or .gguf.
        Or a mapping of arrays, which may hold mappings, lists and tuples of arrays. Or a model of
        PyTorch, Keras, Equinox or Flax NNX, whose layers say their layouts.
    layouts : mapping of pattern to Layout, str or None, optional
        Axes of the tensors whose name fits a pattern, such as ``{"*.conv.weight": "oihw"}``. The
        first pattern that fits decides. None leaves a tensor out.
    proven : bool
        True to prove the bounds of large matrices too. Without it, the upper bound of a matrix of
        more than about 580 × 580 elements fails with a probability of at most 1e-9.
    convolutions : bool
        False to leave out the norms of convolutions as maps of images.
    spectrum : bool
        True for all singular values of each matrix, in ``spectrum`` of its row. A matrix of more
        than about 1,600 × 1,600 elements gets their density by `spectral_density` instead.
    heads : bool or int
        True for the norms of each head of attention and of the products WqᵀWk and WoWv, in
        ``heads`` of the report. The number of heads is read from the ``config.json`` beside the
        weights, or from the model. An integer gives it.
    config : path or mapping, optional
        A configuration with ``num_attention_heads``, instead of the one beside the weights.
    base : path, mapping or model, optional
        The weights that low-rank updates (LoRA) in ``source`` belong to. Each W + s·B·A gets a row.
    lora_scale : float, optional
        The factor s of all updates. Without it, ``adapter_config.json`` beside the file or the
        ``alpha`` in it decides, and B·A is measured without a factor where there is none.

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
        Also if ``heads`` or ``config`` is given but no layer has names of attention, or ``base`` or
        ``lora_scale`` but no update is there.
    ArgumentError
        If a layout does not fit a tensor whose name fits its pattern, ``heads`` is no bool and no
        integer above 0, or ``lora_scale`` is not finite.
    NamesError
        If a pattern of ``layouts`` fits no name.

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

    return report_of(
        _path(source),
        layouts=layouts,
        proven=proven,
        convolutions=convolutions,
        spectrum=spectrum,
        heads=heads,
        config=config,
        base=_path(base),
        lora_scale=lora_scale,
    )


def compare(
    before: str | PathLike[str] | Mapping[str, Any] | Any,
    after: str | PathLike[str] | Mapping[str, Any] | Any,
    *,
    layouts: Mapping[str, Layout | str | None] | None = None,
    proven: bool = False,
    n_vectors: int = 10,
    similarity: float = 0.5,
) -> Comparison:
    """Measure how far each matrix of a checkpoint moved from another, and in which directions.

    Tensors of the same name and shape are compared, such as those of a base and of a fine-tuned
    model. Two matrices at most are in memory at a time.

    Parameters
    ----------
    before, after : path, mapping or model
        As in `report`. ``before`` is the base: it decides how axes are read, and drift is relative
        to its norms.
    layouts : mapping of pattern to Layout, str or None, optional
        As in `report`.
    proven : bool
        True to prove the bounds of large matrices too, and to factorize them for their intruders.
    n_vectors : int
        Number of first singular vectors to compare. 0 leaves them out, which saves most of the
        time for large matrices.
    similarity : float
        A singular vector after is an intruder if its cosine with each singular vector before is
        below this.

    Returns
    -------
    Comparison
        A mapping of the name of each matrix to its row, with ``table()``, ``to_json()``,
        ``to_csv()``, ``to_pandas()`` and ``summary()``. ``only_before``, ``only_after``, ``shapes``
        and ``skipped`` have the tensors that are not compared.

    Raises
    ------
    SpectralError
        If one of the two cannot be read, or no tensor has the same name in both.
    ArgumentError
        If ``n_vectors`` is negative, ``similarity`` is not above 0 and at most 1, or a layout does
        not fit a tensor whose name fits its pattern.
    NamesError
        If a pattern of ``layouts`` fits no name.

    Notes
    -----
    Vectors of one singular value count as one span, and vectors of the value zero are like none.
    In a matrix of m·n² above 2·10⁸ with n the shorter side, only the first vectors are computed.
    Intruders are then found by bounds, and ``undecided`` counts the vectors that these leave open.

    References
    ----------
    Shuttleworth, Andreas, Torralba & Sharma, *LoRA vs Full Fine-tuning: An Illusion of
    Equivalence*, 2024 (intruder dimensions).

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> base = np.diag([4.0, 3.0, 2.0, 1.0])
    >>> found = sc.compare({"w": base}, {"w": base + 5.0}, n_vectors=1, similarity=0.6)
    >>> row = found["w"]
    >>> row.left_intruders, round(row.sigma, 10)
    (1, 20.0)
    """
    from ._report.compare import compared

    return compared(
        _path(before),
        _path(after),
        layouts=layouts,
        proven=proven,
        n_vectors=n_vectors,
        similarity=similarity,
    )


def _path(source: Any) -> Any:
    return str(source) if isinstance(source, PathLike) else source
