"""Each kind of array works in each public function, or raises an error of this library."""

import re
import warnings
from fractions import Fraction
from functools import partial
from tempfile import TemporaryFile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import get, svd_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR|torch.quantize:UserWarning"),
]
A = np.random.default_rng(0).standard_normal((5, 4))
ZERO = np.zeros((5, 4))


class Subclass(np.ndarray):
    """A subclass with rules of its own, which must not reach the computation."""

    def __mul__(self, other):
        raise AssertionError("the subclass multiplies")

    __rmul__ = __imul__ = __matmul__ = __rmatmul__ = __add__ = __iadd__ = __mul__


class WithUnit(np.ndarray):
    def __array_ufunc__(self, *arguments, **options):
        raise AssertionError("the subclass computes")


def readonly(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def memory_map(x):
    with TemporaryFile() as file:  # the map keeps the file open
        found = np.memmap(file, x.dtype, "w+", shape=x.shape)
    found[...] = x
    return found


def big_endian(x):
    return x.astype(x.dtype.newbyteorder(">"))


# Kinds that are matrices: the result must be right.
ARRAYS = {
    "float64": np.asarray,
    "float16": lambda x: x.astype("float16"),
    "longdouble": lambda x: x.astype(np.longdouble),
    "clongdouble": lambda x: x.astype(np.clongdouble),
    "complex64": lambda x: x.astype("complex64"),
    "big-endian float32": lambda x: big_endian(x.astype("float32")),
    "big-endian float64": big_endian,
    "read-only": readonly,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "unaligned": lambda x: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "np.matrix": np.matrix,
    "subclass": lambda x: x.view(Subclass),
    "subclass of ufuncs": lambda x: x.view(WithUnit),
    "memory map": memory_map,
}


def sparse(x):
    return pytest.importorskip("scipy.sparse").csr_array(x)


# Kinds that are none: an error of this library, in each function.
REFUSED = {
    "masked": lambda x: np.ma.masked_array(x, x > 1),
    "masked without a mask": np.ma.masked_array,
    "object": lambda x: x.astype(object),
    "structured": lambda x: np.zeros(x.shape, [("a", "f8"), ("b", "f4")]),
    "record array": lambda x: np.rec.array(np.zeros(x.shape, [("a", "f8")])),
    "strings": lambda x: x.astype(str),
    "dates": lambda x: x.astype("datetime64[s]"),
    "int": lambda x: x.astype(int),
    "bool": lambda x: x > 0,
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(map(tuple, x.tolist())),
    "list of arrays": list,
    "float": lambda x: 1.5,
    "integer": lambda x: 3,
    "complex": lambda x: 1j,
    "np.float64": lambda x: np.float64(2),
    "0-d": lambda x: np.asarray(2.0),
    "1-d": lambda x: x[0],
    "empty": lambda x: x[:0],
    "None": lambda x: None,
    "str": lambda x: "W",
    "dict": lambda x: {"w": x},
    "fraction": lambda x: Fraction(1, 2),
    "sparse": sparse,
}

# Functions of a weight W. Each returns (sigma or None, other arrays).


def steps(step, W, G=None):
    weights = {"w": W, "other": np.eye(3)}
    state = sc.init(weights)
    G = np.zeros(np.shape(W), np.asarray(W).dtype) if G is None else G
    state = sc.iterate(weights, state, n_iter=200)
    return step(weights, {"w": G, "other": np.zeros((3, 3))}, state)


def gradient(W):
    grads, state = steps(partial(sc.add_gradient, factor=1.0), W)
    return state.sigma["w"], list(grads.values())


def gradient_(W):
    kept = {}

    def step(weights, grads, state):
        kept.update(grads)
        return sc.add_gradient_(weights, grads, state, factor=1.0)

    state = steps(step, W)
    return state.sigma["w"], list(kept.values())


def bounded(W):
    weights, state = steps(lambda w, _, state: sc.constrain(w, state, bound=1e6), W)
    return state.sigma["w"], list(weights.values())


def power(W):
    v = np.random.default_rng(1).standard_normal(np.shape(W)[-1:])
    found = sc.power_iteration(W, v, n_iter=200)
    return found.sigma, found[1:]


def block(W):
    V = np.random.default_rng(1).standard_normal((2, *np.shape(W)[-1:]))
    found = sc.block_iteration(W, V, n_iter=100)
    return found.sigma, found[1:]


def converged(W):
    found = sc.spectral_norm(W)
    return found.sigma, found[1:4]


def viewed(W):
    matrix = sc.as_matrix(W, "oi")
    return None, [matrix, sc.from_matrix(matrix, "oi", (5, 4))]


def price(W):
    u = np.zeros(np.shape(W)[0])
    u[0] = 1
    return None, [sc.penalty_at(W, u)]


FUNCTIONS = {
    f.__name__: f for f in (gradient, gradient_, bounded, power, block, converged, viewed, price)
}
# Functions that take more kinds than the others do.
TAKEN = {("converged", kind) for kind in ("list", "tuple", "list of arrays", "int", "bool")}
TAKEN |= {("viewed", kind) for kind in ("object", "structured", "strings", "dates", "int", "bool")}
TAKEN |= {("viewed", "record array")}


@given(
    st.sampled_from(list(ARRAYS)),
    st.sampled_from(list(FUNCTIONS)),
    st.sampled_from([0.0, 1.0, 1e-3, 1e3]),
)
def test_kinds_of_matrices_have_the_right_result(kind, function, scale):
    assert_right(kind, function, scale)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_each_kind_works_in_each_function(kind, function):
    assert_right(kind, function, 1.0)
    assert_right(kind, function, 0.0)


def assert_right(kind, function, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        W = ARRAYS[kind](A * scale)
    if kind == "float16" and scale == 1e-3:
        return  # too many of its elements are subnormal to compare
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigma, arrays = FUNCTIONS[function](W)
    for array in arrays:
        assert isinstance(array, (np.ndarray, np.generic))
        assert not isinstance(array, (np.matrix, Subclass, WithUnit))
        assert np.isfinite(np.asarray(array, complex)).all()
    if sigma is not None:
        expected = svd_norm(np.asarray(W).astype("complex128"))
        if function in ("gradient", "gradient_", "bounded"):
            assert isinstance(sigma, np.ndarray)  # a scalar has no address to write into
        np.testing.assert_allclose(np.asarray(sigma, float), expected, rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_in_each_function(kind, function):
    W = REFUSED[kind](A)
    if (function, kind) in TAKEN:
        FUNCTIONS[function](W)
        return
    if kind in ("empty", "0-d", "np.float64", "1-d") and function == "viewed":
        with pytest.raises(sc.ShapeError):
            FUNCTIONS[function](W)
        return
    with pytest.raises(sc.SpectralError) as error:
        call(function, W)
    assert len(str(error.value)) < 400


def call(function, W):
    """Call the function of a kind that has no shape to make other arguments of."""
    if function in ("gradient", "gradient_", "bounded"):
        return sc.init({"w": W})
    if function == "power":
        return sc.power_iteration(W, np.ones(4))
    if function == "block":
        return sc.block_iteration(W, np.ones((2, 4)))
    if function == "price":
        return sc.penalty_at(W, np.ones(5))
    return FUNCTIONS[function](W)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("step", [sc.add_gradient, sc.add_gradient_])
def test_gradient_of_other_kinds_is_refused(kind, step):
    weights = {"first": np.eye(2), "w": A.copy()}
    grads = {"first": np.zeros((2, 2)), "w": REFUSED[kind](A)}
    state = sc.init(weights)
    if kind == "None":  # left out of the step
        step(weights, grads, state)
        return
    with pytest.raises(sc.SpectralError, match="'w'"):
        step(weights, grads, state)
    assert not grads["first"].any()


@pytest.mark.parametrize("kind", ARRAYS)
def test_gradient_of_each_kind_gets_its_term(kind):
    if kind.startswith(("complex", "clong")):
        pytest.skip("a complex gradient does not fit a real weight")
    grad = ARRAYS[kind](ZERO.copy())
    writeable = grad.flags.writeable
    weights = {"w": A}
    state = sc.iterate(weights, sc.init(weights), n_iter=300)
    found, after = sc.add_gradient(weights, {"w": grad}, state, factor=1.0)
    expected = np.outer(after.u["w"], after.v["w"]) * after.sigma["w"]
    np.testing.assert_allclose(np.asarray(found["w"], float), expected, atol=2e-3)
    assert not np.asarray(grad, float).any()
    if writeable:
        sc.add_gradient_(weights, {"w": grad}, state, factor=1.0)
        np.testing.assert_allclose(np.asarray(grad, float), expected, atol=2e-3)
    else:
        with pytest.raises(sc.DeviceError, match="gradient of 'w' cannot be written"):
            sc.add_gradient_(weights, {"w": grad}, state)


@pytest.mark.parametrize("kind", ARRAYS)
def test_weight_of_each_kind_is_scaled_in_place(kind):
    W = ARRAYS[kind](A.copy())
    state = sc.iterate({"w": W}, sc.init({"w": W}), n_iter=300)
    if W.flags.writeable:
        sc.constrain_({"w": W}, state, bound=0.5)
        assert svd_norm(np.asarray(W).astype("complex128")) == pytest.approx(0.5, rel=2e-3)
    else:
        with pytest.raises(sc.DeviceError, match="weight 'w' cannot be written"):
            sc.constrain_({"w": W}, state)


@pytest.mark.parametrize("kind", ["masked", "list", "object", "sparse", "float", "str", "None"])
def test_vectors_and_sigma_of_other_kinds_are_refused(kind):
    bad = REFUSED[kind](A)
    for call in (
        lambda: sc.power_iteration(A, bad),
        lambda: sc.block_iteration(A, bad),
        lambda: sc.rank_one(bad, np.ones(5), np.ones(4)),
        lambda: sc.rank_one(np.asarray(1.0), bad, np.ones(4)),
        lambda: sc.rank_one(np.asarray(1.0), np.ones(5), bad),
        lambda: sc.penalty(bad),
        lambda: sc.penalty({"w": bad}),
        lambda: sc.penalty_at(A, bad),
        lambda: sc.slope(bad),
        lambda: sc.from_matrix(bad, "oi", (5, 4)) if kind != "object" else sc.slope(bad),
        lambda: sc.start_vector((3,), bad),
    ):
        with pytest.raises(sc.SpectralError):
            call()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (REFUSED["masked"], "np.ma.filled(W, 0)"),
        (REFUSED["list"], "numpy.asarray"),
        (REFUSED["sparse"], "toarray()"),
    ],
)
def test_error_names_the_weight_and_the_remedy(make, words):
    with pytest.raises(sc.DTypeError, match=re.escape(words)) as error:
        sc.init({"layer": make(A)})
    assert "weight 'layer'" in str(error.value)


def test_masked_rows_of_a_list_are_refused():
    with pytest.raises(sc.DTypeError, match=r"np\.ma\.filled"):
        sc.spectral_norm([np.ma.masked_array([1.0, 2.0], [True, False])])


def test_sparse_and_other_tensors_of_pytorch_are_refused():
    get("torch-cpu")
    import torch

    W = torch.eye(3, 4)
    kinds = [W.to_sparse(), W.to_sparse_csr(), W.to_sparse_csc(), W.to_mkldnn()]
    kinds += [torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), W.int(), W.bool()]
    for bad in kinds:
        for call in (
            lambda W: sc.init({"layer": W}),
            lambda W: sc.power_iteration(W, torch.ones(4)),
            lambda W: sc.block_iteration(W, torch.ones(2, 4)),
            lambda W: sc.penalty_at(W, torch.ones(3)),
        ):
            with pytest.raises(sc.DTypeError):
                call(bad)
    for bad in kinds[:4]:
        with pytest.raises(sc.DTypeError, match=r"to_dense\(\)"):
            sc.spectral_norm(bad)
    with pytest.raises(sc.DTypeError):
        sc.spectral_norm(kinds[4])
    with pytest.raises(sc.DeviceError, match="has no values"):
        sc.spectral_norm(W.to("meta"))
