"""Questions about arrays have one answer on every backend."""

import numpy as np
import pytest

import spectral_core as sc
from backends import get, on
from spectral_core._arrays import (
    address_of,
    array_namespace,
    cast,
    check_same_device,
    conj,
    constant,
    is_complex,
    norm,
    squared,
    to_host,
    traits,
    traits_of,
)

DTYPES = ("float32", "float64", "complex64", "complex128")


@pytest.mark.parametrize("dtype", DTYPES)
def test_traits_are_those_of_the_dtype(backend, dtype):
    x = backend.asarray(np.ones(2), dtype)
    found, info = traits(x, array_namespace(x), "x"), np.finfo(dtype)
    assert found.complex == dtype.startswith("complex")
    assert str(found.iteration_dtype).endswith(dtype)
    assert found.tiny == pytest.approx(float(info.smallest_normal))
    assert found.eps == pytest.approx(float(info.eps))
    assert found.guard == found.tiny


@on(dtype="bfloat16")
def test_half_precision_iterates_in_float32(backend):
    for half in ("float16", "bfloat16"):
        x = backend.asarray(np.ones(2), half)
        xp = array_namespace(x)
        assert traits(x, xp, "x").iteration_dtype == xp.float32


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_dtype_that_is_not_floating_raises(dtype):
    x = np.ones(2, dtype)
    assert traits_of(x.dtype, array_namespace(x)) is None
    with pytest.raises(sc.DTypeError, match=f"the factor has dtype {dtype}"):
        traits(x, array_namespace(x), "the factor")


@on("array-api-strict", "torch-cpu")
def test_arrays_of_two_libraries_raise(backend):
    with pytest.raises(sc.DTypeError, match="u and v: expected arrays of one library"):
        array_namespace(np.ones(2), backend.asarray(np.ones(2)), name="u and v")
    with pytest.raises(sc.DTypeError, match=r"builtins\.list"):
        array_namespace([1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_conjugate_square_and_norm_are_those_of_numpy(backend, dtype):
    phase = 1 + 1j if dtype.startswith("complex") else 1
    values = (phase * np.array([[3.0, 4.0], [0.0, 2.0]])).astype(dtype)
    x = backend.asarray(values)
    xp = array_namespace(x)
    assert is_complex(x, xp) == dtype.startswith("complex")
    np.testing.assert_array_equal(backend.to_numpy(conj(x, xp)), values.conj())
    np.testing.assert_allclose(backend.to_numpy(squared(x, xp)), abs(values) ** 2, rtol=1e-6)
    expected = np.linalg.norm(values, axis=-1)
    np.testing.assert_allclose(backend.to_numpy(norm(x, xp)), expected, rtol=1e-6)
    np.testing.assert_array_equal(to_host(x[0, :]), values[0])


def test_nothing_is_copied_without_need(backend):
    x = backend.asarray(np.ones(2))
    xp = array_namespace(x)
    assert cast(x, x.dtype, xp) is x
    assert conj(x, xp) is x
    assert backend.dtype_name(cast(x, xp.float32, xp)) == "float32"


@on(module="torch")
def test_constant_has_no_graph(backend):
    x = backend.asarray(np.ones(2)).requires_grad_()
    assert not constant(x).requires_grad
    assert constant(x).data_ptr() == x.data_ptr()
    assert x.requires_grad


@on("numpy", "torch-cpu", "cupy", "torch-cuda")
def test_address_is_that_of_the_first_element(backend):
    x = backend.asarray(np.ones((4, 3)))
    assert address_of(x[1:]) == address_of(x) + 3 * 8
    assert address_of(backend.asarray(np.ones(2))) != address_of(x)


def test_library_without_addresses_has_none():
    strict = get("array-api-strict")
    pytest.importorskip("array_api_strict")
    assert address_of(strict.asarray(np.ones(2))) is None


@on("torch-cpu")
def test_arrays_on_two_devices_raise(backend):
    x = backend.asarray(np.ones(2))
    with pytest.raises(sc.DeviceError, match="x is on cpu but y is on meta: move one"):
        check_same_device(x, x.to("meta"), array_namespace(x), "x", "y")
