"""Run the kernels of the CuPy adapter on the CPU: the same text, compiled by g++.

Each CUDA thread of a block is a fiber. A warp runs until it waits for the block, then the next one:
in two opposite orders, so that a missing barrier shows. Shared memory, scratch and results start as
NaN, and arrays have guards before and after them.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import spectral_core as sc
from spectral_core.engine import Job, ReferenceEngine, Slope, Triplet, plan_of

ADAPTER = Path(__file__).parents[2] / "adapters" / "spectral_cupy"
SOURCE = ADAPTER / "kernels.cu"

# By its path: the package itself needs CuPy, and this part of it does not.
_spec = importlib.util.spec_from_file_location("spectral_cupy_engine", ADAPTER / "_engine.py")
cuda = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = cuda
_spec.loader.exec_module(cuda)

pytestmark = pytest.mark.thorough  # g++ compiles each pair of dtypes

SHIM = r"""
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE2__
#include <xmmintrin.h>
#endif
#ifdef SPECTRAL_HALF
typedef _Float16 __half;
static inline float __half2float(__half x) { return x; }
#endif
using std::sqrt;
struct Dim { unsigned x; };
static Dim threadIdx, blockIdx;
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define SPECTRAL_EMULATED
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))
extern "C" char __start_emulated_shared[], __stop_emulated_shared[];

struct Barrier { int arrived; long generation; };
struct Fiber { jmp_buf jump; ucontext_t start; bool started, done; const Barrier *at; long since; };
static const int kThreads = 512, kWarp = 32, kStack = 1 << 16;
static Fiber fibers[kThreads];
static std::vector<char> stacks(kThreads * kStack);
static Barrier of_block, of_warp[kThreads / kWarp], of_group[kThreads / kWarp];
static double slots[2][kThreads];
static jmp_buf scheduler;
static void (*body)();

static void leave() { if (!_setjmp(fibers[threadIdx.x].jump)) _longjmp(scheduler, 1); }
static void __attribute__((noinline)) resume(Fiber &fiber)
{
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}
static void live()  // over all blocks
{
    for (;;) { body(); fibers[threadIdx.x].done = true; leave(); }
}
static void arrive(Barrier &barrier, int expected)
{
    if (++barrier.arrived == expected) { barrier.arrived = 0; ++barrier.generation; return; }
    Fiber &me = fibers[threadIdx.x];
    me.at = &barrier;
    me.since = barrier.generation;
    leave();
    me.at = nullptr;
}
static void __syncthreads() { arrive(of_block, kThreads); }
static void __syncwarp() { arrive(of_warp[threadIdx.x / kWarp], kWarp); }
static void wait_for_group(int group, int threads) { arrive(of_group[group], threads); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int other)
{
    Barrier &warp = of_warp[threadIdx.x / kWarp];
    double *slot = slots[warp.generation % 2];  // two, as a neighbour may be one shuffle ahead
    slot[threadIdx.x] = value;
    arrive(warp, kWarp);
    return static_cast<T>(slot[threadIdx.x ^ other]);
}
static double __longlong_as_double(long long bits)
{
    double number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}
static void prepare()
{
    for (int i = 0; i < kThreads && !fibers[i].started; ++i) {
        ucontext_t &start = fibers[i].start;
        getcontext(&start);
        start.uc_stack.ss_sp = &stacks[i * kStack];
        start.uc_stack.ss_size = kStack;
        makecontext(&start, live, 0);
    }
}
// Subnormal numbers are zero, as CuPy compiles with -ftz=true.
struct FlushToZero {
#ifdef __SSE2__
    unsigned before = _mm_getcsr();
    FlushToZero() { _mm_setcsr(before | 0x8040); }
    ~FlushToZero() { _mm_setcsr(before); }
#endif
};
static bool run_block(bool backwards)
{
    FlushToZero mode;
    prepare();
    std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    for (Fiber &fiber : fibers) fiber.done = false;
    bool moved = false;
    for (int left = kThreads; left > 0;) {
        bool progress = false;
        for (int k = 0; k < kThreads; ++k) {
            const int i = backwards ? kThreads - 1 - k : k;
            Fiber &fiber = fibers[i];
            if (!fiber.done && !(fiber.at && fiber.at->generation == fiber.since)) {
                moved = true;
                threadIdx.x = i;
                resume(fiber);
                if (fiber.done) --left;
            }
            if (k % kWarp == kWarp - 1 && moved) {  // the same warp again, as far as it gets
                progress = true;
                moved = false;
                k -= kWarp;
            }
        }
        if (!progress) return false;  // a barrier that not all threads reach
    }
    return true;
}
"""

ENTRIES = r"""
static const Row *g_jobs; static const Matrix *g_matrices; static const Int *g_work;
static const char *g_came; static Real *g_out, *g_scratch; static Int g_flags;
#define ENTRY(name)                                                                             \
    extern "C" int emulate_##name(long long blocks, int backwards, const void *jobs,            \
        const void *matrices, const void *work, const void *came, void *out, void *scratch,     \
        long long flags)                                                                        \
    {                                                                                           \
        g_jobs = (const Row *)jobs; g_matrices = (const Matrix *)matrices;                   \
        g_work = (const Int *)work; g_came = (const char *)came; g_out = (Real *)out;           \
        g_scratch = (Real *)scratch; g_flags = flags;                                           \
        body = [] { name(g_jobs, g_matrices, g_work, g_came, g_out, g_scratch, g_flags); };    \
        for (long long k = 0; k < blocks; ++k) {                                                \
            blockIdx.x = backwards ? blocks - 1 - k : k;                                        \
            if (!run_block(backwards)) return 1;                                                \
        }                                                                                       \
        return 0;                                                                               \
    }
ENTRY(spectral_rows)
ENTRY(spectral_columns)
ENTRY(spectral_apply)
#if SPECTRAL_VECTORS > 1
ENTRY(spectral_start)
ENTRY(spectral_finish)
#endif
"""


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """``libraries(kernels)`` is the emulation for these dtypes."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here to compile the kernels for the CPU")
    folder = tmp_path_factory.mktemp("kernels")

    @cache
    def library(kernels):
        text = folder / f"{'_'.join(map(str, kernels))}.cpp"
        source = SOURCE.read_text().replace("#include <cuda_fp16.h>", "")
        text.write_text(SHIM + source + ENTRIES)
        built = text.with_suffix(".so")
        flags = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", *kernels.options)
        done = subprocess.run(
            [compiler, *flags, str(text), "-o", str(built)], capture_output=True, text=True
        )
        if "_Float16" in done.stderr:
            pytest.skip("this g++ has no _Float16")
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(built))

    return library


GUARD = 64


def guarded(x):
    """A copy of ``x`` with a guard before and after it, and a check that both are whole."""
    x = np.asarray(x)
    buffer = np.full(x.size + 2 * GUARD, 7, dtype=x.dtype)
    inner = buffer[GUARD : GUARD + x.size]
    inner[...] = x.ravel()

    def whole():
        return bool(np.all(buffer[:GUARD] == 7) and np.all(buffer[-GUARD:] == 7))

    return inner.reshape(x.shape), whole


class Emulation:
    """A runtime of `CudaEngine` for NumPy arrays, which counts launches and uploads."""

    def __init__(self, libraries, backwards=False):
        self.libraries = libraries
        self.backwards = backwards
        self.launches = []
        self.uploads = 0
        self.guards = []

    def owns(self, x):
        return isinstance(x, np.ndarray)

    def place(self, x):
        return "cpu"

    def at(self, place):
        return nullcontext()

    def address(self, x):
        return x.ctypes.data

    def upload(self, table):
        self.uploads += 1
        return table.copy()

    def empty(self, size, dtype):
        array, whole = guarded(np.full(size, np.nan, dtype))
        self.guards.append(whole)
        return array

    def view(self, x, start, shape):
        return x[start : start + int(np.prod(shape, dtype=int))].reshape(shape)

    def multiprocessors(self, place):
        return 132

    def launch(self, kernels, name, blocks, arguments):
        self.launches.append(name)
        pointers = [
            ctypes.c_void_p(x if isinstance(x, int) else x.ctypes.data) for x in arguments[:-1]
        ]
        emulate = getattr(self.libraries(kernels), f"emulate_{name}")
        stuck = emulate(
            ctypes.c_longlong(blocks),
            ctypes.c_int(self.backwards),
            *pointers,
            ctypes.c_longlong(arguments[-1]),
        )
        assert not stuck, f"not all threads of {name} reach a barrier"
        assert all(whole() for whole in self.guards)


SHAPES = {
    "row": (1, 700),
    "column": (900, 1),
    "one": (1, 1),
    "conv": (12, 12, 3, 3),
    "first": (64, 3, 3, 3),
    "dense": (300, 500),
    "wide": (2, 16500),
    "two loads": (7, 4100),
    "four loads": (5, 9000),
    "two loads, unaligned": (3, 4101),
    "grouped": (8, 5, 3),
    "depthwise": (6, 1, 9),
}
LAYOUTS = {"grouped": sc.Layout("(go)ik", 4), "depthwise": sc.Layout("(go)ik", 6)}
TOLERANCE = {"float16": 2e-3, "float32": 2e-5, "float64": 1e-11}


def model(dtype="float32", grad=None, shapes=SHAPES, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    weights = {n: (scale * rng.standard_normal(s)).astype(dtype) for n, s in shapes.items()}
    grads = {n: rng.standard_normal(s).astype(grad or dtype) for n, s in shapes.items()}
    layouts = {name: layout for name, layout in LAYOUTS.items() if name in shapes}
    return weights, grads, sc.init(weights, layouts=layouts)


def copied(grads):
    return {name: grad.copy() for name, grad in grads.items()}


class Never:
    """An engine that no job should reach."""

    in_place = True

    def accepts(self, job):
        raise AssertionError(f"{job.name} should go through the kernels")


def assert_close(found, expected, tolerance, name):
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=0)
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * scale, err_msg=name
    )


def check(libraries, weights, grads, state, tolerance, steps=2, **options):
    """The emulated kernels give what the core gives, over a few steps."""
    runtime = Emulation(libraries)
    engines = [cuda.CudaEngine(runtime), Never()]
    expected, found = copied(grads), {}
    for name, grad in grads.items():
        found[name], whole = guarded(grad)
        runtime.guards.append(whole)
    plain = mine = state
    before = {name: v.copy() for name, v in state.v.items()}
    with np.errstate(all="ignore"):
        for _ in range(steps):
            plain = sc.add_gradient_(weights, expected, plain, engines=(), **options)
            mine = sc.add_gradient_(weights, found, mine, engines=engines, **options)
    for name in weights:
        assert_close(found[name], expected[name], tolerance, f"gradient of {name}")
        for part in ("sigma", "u", "v"):
            pair = (getattr(s, part)[name] for s in (mine, plain))
            assert_close(*map(np.asarray, pair), tolerance, f"{part} of {name}")
        np.testing.assert_array_equal(state.v[name], before[name])
    return runtime, found, mine


PAIRS = [
    ("float32", "float32"),
    ("float64", "float64"),
    ("float16", "float16"),
    ("float32", "float16"),
    ("float16", "float32"),
    ("float32", "float64"),
]
FACTOR = {"dense": 0.5, "conv": np.array(0.25), "*": 0.1}
ONCE = ["spectral_rows", "spectral_columns", "spectral_apply"]


def tolerance_of(dtype, grad):
    return max(TOLERANCE[grad], TOLERANCE["float64" if dtype == "float64" else "float32"])


@pytest.mark.parametrize(("dtype", "grad"), PAIRS)
def test_equals_the_core(libraries, dtype, grad):
    shapes = SHAPES if dtype == grad else {name: SHAPES[name] for name in ("row", "conv")}
    weights, grads, state = model(dtype, grad, shapes)
    tolerance = tolerance_of(dtype, grad)
    runtime, _, _ = check(
        libraries, weights, grads, state, tolerance, factor=FACTOR if dtype == grad else 0.1
    )
    assert runtime.launches == 2 * ONCE


@pytest.mark.parametrize("n_iter", [0, 3])
@pytest.mark.parametrize(("dtype", "grad"), PAIRS)
def test_equals_the_core_without_an_iteration_and_with_several(libraries, dtype, grad, n_iter):
    shapes = {name: SHAPES[name] for name in ("row", "conv", "grouped")}
    weights, grads, state = model(dtype, grad, shapes)
    tolerance = tolerance_of(dtype, grad)
    runtime, _, _ = check(libraries, weights, grads, state, tolerance, factor=0.1, n_iter=n_iter)
    assert runtime.launches == 2 * (ONCE * n_iter or ONCE[-1:])


@pytest.mark.parametrize(("sigma", "tolerance"), [(1e-17, 1e-2), (1e-15, 1e-4), (1e19, 1e-4)])
def test_where_the_square_of_sigma_is_out_of_range(libraries, sigma, tolerance):
    weights, grads, _ = model(shapes={name: SHAPES[name] for name in ("conv", "first", "dense")})
    for name, weight in weights.items():
        matrix = weight.reshape(len(weight), -1)
        weights[name] = np.float32(sigma) * (weight / np.linalg.norm(matrix, 2))
        grads[name] *= np.float32(sigma)
    check(libraries, weights, grads, sc.init(weights), tolerance, factor=0.1)


def test_zero_nan_inf_and_overflow_stay_with_their_weight(libraries):
    shapes = dict.fromkeys(("zero", "nan", "inf", "huge", "tiny", "sound"), (40, 300))
    weights, grads, state = model(shapes=shapes)
    weights["zero"][...] = 0
    weights["nan"][3, 5] = np.nan
    weights["inf"][39, 299] = np.inf
    weights["huge"][...] = 3e38
    weights["tiny"][...] = 1e-38
    _, found, mine = check(libraries, weights, grads, state, 2e-5, factor=0.1)
    assert mine.sigma["zero"] == 0
    assert np.isfinite(found["zero"]).all()
    assert np.isfinite(found["sound"]).all()
    assert not any(np.isfinite(mine.sigma[name]) for name in ("nan", "inf", "huge"))
    for name in ("zero", "nan", "inf", "huge"):
        np.testing.assert_array_equal(mine.v[name], state.v[name])


@pytest.mark.parametrize("n_iter", [1, 2])
def test_the_order_of_threads_and_blocks_does_not_matter(libraries, n_iter):
    results = []
    shapes = {name: SHAPES[name] for name in ("row", "column", "conv", "dense", "depthwise")}
    for backwards in (False, True):
        weights, grads, state = model(shapes=shapes)
        engines = [cuda.CudaEngine(Emulation(libraries, backwards)), Never()]
        state = sc.add_gradient_(weights, grads, state, factor=0.1, n_iter=n_iter, engines=engines)
        results.append({**grads, **{f"v of {name}": v for name, v in state.v.items()}})
    for name, first in results[0].items():
        np.testing.assert_array_equal(first, results[1][name], err_msg=name)


def test_a_start_vector_of_any_length(libraries):
    shapes = {name: SHAPES[name] for name in ("dense", "grouped")}
    weights, grads, state = model(shapes=shapes)
    for name in shapes:
        state.v[name][...] *= 1e8
    check(libraries, weights, grads, state, 2e-5, factor=0.1)


def one_job(weights, grads, state, **changes):
    """Return the job of the weight "dense"."""
    weight = weights["dense"]
    V, plan = state.v["dense"], plan_of(state.layouts["dense"], weight.shape, "dense")
    last = Triplet(state.sigma["dense"], state.u["dense"], V)
    job = Job("dense", weight, grads["dense"], V, 0.0, None, plan, np, last)
    return replace(job, **changes)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_factors_and_targets_on_the_device_are_read_there(libraries, dtype):
    weights, grads, state = model(shapes={"dense": (20, 30)})
    expected = copied(grads)
    sc.add_gradient_(weights, expected, state, factor=0.3, target=2.0)
    slope = Slope(np.array(2.0, dtype), 2)
    job = one_job(weights, grads, state, factor=np.array(0.3, dtype), rule=slope)
    engine = cuda.CudaEngine(Emulation(libraries))
    assert engine.accepts(job)
    engine.run([job], 1)
    assert_close(grads["dense"], expected["dense"], 2e-5, dtype)


@pytest.mark.parametrize("n_iter", [0, 1])
def test_jobs_without_gradients_are_only_iterated(libraries, n_iter):
    weights, grads, state = model(shapes={"dense": (20, 30)})
    job, engine = one_job(weights, grads, state, grad=None), cuda.CudaEngine(Emulation(libraries))
    assert engine.accepts(job)
    other = one_job(weights, grads, state, factor=0.1)
    (grad, _), triplets = engine.run([job, other], n_iter)
    assert grad is None
    wanted = ReferenceEngine().run([job], n_iter).triplets[0]
    for x, y, name in zip(triplets[0], wanted, Triplet._fields, strict=True):
        assert_close(np.asarray(x), np.asarray(y), 2e-5, name)


SLOPES = {
    "acting": {"target": 2.0},
    "not acting": {"target": 1e6},
    "linear": {"target": 2.0, "power": 1},
    "linear from zero": {"power": 1},
    "linear, not acting": {"target": 1e6, "power": 1},
    "each its own": {"target": {"dense": 5.0, "conv": 1e6, "grouped": 2.0, "*": 0.0}},
}


@pytest.mark.parametrize("n_iter", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("penalty", SLOPES)
def test_hinges_and_power_one_equal_the_core(libraries, penalty, dtype, n_iter):
    shapes = {name: SHAPES[name] for name in ("row", "conv", "grouped", "dense")}
    weights, grads, state = model(dtype, shapes=shapes)
    _, found, _ = check(
        *(libraries, weights, grads, state, tolerance_of(dtype, dtype)),
        factor=FACTOR,
        n_iter=n_iter,
        **SLOPES[penalty],
    )
    unchanged = {name for name in shapes if np.array_equal(found[name], grads[name])}
    if penalty.endswith("not acting"):
        assert unchanged == shapes.keys()
    else:
        assert unchanged == ({"conv"} if penalty == "each its own" else set())


@pytest.mark.parametrize("options", [{"target": 1e6}, {"power": 1}, {"target": 1e6, "power": 1}])
def test_a_nan_is_not_below_the_target(libraries, options):
    weights, grads, state = model(shapes={"nan": (40, 30), "zero": (40, 30)})
    weights["nan"][3, 5] = np.nan
    weights["zero"][...] = 0
    _, found, _ = check(libraries, weights, grads, state, 2e-5, factor=0.1, **options)
    assert np.isnan(found["nan"]).all()
    np.testing.assert_array_equal(found["zero"], grads["zero"])


@pytest.mark.parametrize("n_iter", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_bounds_equal_the_core(libraries, dtype, normalize, n_iter):
    """One bound acts, one does not, and one is on the device; a zero and a NaN stay."""
    shapes = {name: SHAPES[name] for name in ("row", "conv", "grouped", "dense")}
    weights, _, state = model(dtype, shapes={**shapes, "zero": (40, 30), "nan": (40, 30)})
    weights["zero"][...] = 0
    weights["nan"][3, 5] = np.nan
    bound = {"row": 0.5, "conv": np.array(0.25), "grouped": 1e3, "*": 0.1}
    options = {"bound": bound, "normalize": normalize, "n_iter": n_iter}
    runtime = Emulation(libraries)
    found, expected = {}, copied(weights)
    for name, weight in weights.items():
        found[name], whole = guarded(weight)
        runtime.guards.append(whole)
    with np.errstate(all="ignore"):
        engines = [cuda.CudaEngine(runtime), Never()]
        mine = sc.constrain_(found, state, engines=engines, **options)
        plain = sc.constrain_(expected, state, engines=(), **options)
    tolerance = tolerance_of(dtype, dtype)
    for name in weights:
        assert_close(found[name], expected[name], tolerance, name)
        for part in ("sigma", "u", "v"):
            pair = (getattr(s, part)[name] for s in (mine, plain))
            assert_close(*map(np.asarray, pair), tolerance, f"{part} of {name}")
    still = {name for name in weights if np.array_equal(found[name], weights[name], equal_nan=True)}
    assert still == ({"zero", "nan"} if normalize else {"zero", "nan", "grouped"})


def test_a_state_of_version_0_1_0_goes_on_in_the_kernels(libraries):
    rng = np.random.default_rng(0)  # the model that the file was saved with
    shapes = {"conv": ((6, 3, 2, 2), "float32"), "grouped": ((4, 2, 3), "float32")}
    shapes["out"] = ((5, 4), "float64")
    weights = {n: rng.standard_normal(shape).astype(dtype) for n, (shape, dtype) in shapes.items()}
    grads = {name: np.zeros_like(weight) for name, weight in weights.items()}
    start = sc.init(weights, layouts={"grouped": sc.Layout("(go)ik", 2)})
    with np.load(Path(__file__).parents[1] / "data" / "state-0.1.0-numpy.npz") as saved:
        state = sc.load_state_dict(start, saved)
    runtime, _, _ = check(libraries, weights, grads, state, 2e-5, factor=0.1)
    assert len(runtime.launches) == 2 * 2 * len(ONCE)  # two steps, two dtypes


def test_launches_do_not_depend_on_the_number_of_weights(libraries):
    counts = []
    for n in (1, 40):
        weights, grads, state = model(shapes={f"layer {i}": (12, 20 + i) for i in range(n)})
        runtime = Emulation(libraries)
        engines = [cuda.CudaEngine(runtime), Never()]
        sc.add_gradient_(weights, grads, state, engines=engines)
        counts.append(len(runtime.launches))
    assert counts == [3, 3]


def test_tables_are_sent_again_only_when_they_change(libraries):
    weights, grads, state = model(shapes={"a": (12, 20), "b": (5, 7)})
    runtime = Emulation(libraries)
    engines, uploads = [cuda.CudaEngine(runtime), Never()], []

    def advance(state, grads=grads, **options):
        state = sc.add_gradient_(weights, grads, state, engines=engines, **options)
        uploads.append(runtime.uploads)
        return state

    # The first vectors are in arrays of their own, those of a step in one array.
    state = advance(advance(advance(advance(state))))
    assert uploads == [2, 3, 3, 3]
    state = advance(state, factor=0.5)  # the table of jobs alone
    assert uploads[-1] == 4
    other = {"a": grads["a"].copy(), "b": grads["b"]}
    advance(state, grads={**other, "b": None})  # both
    assert uploads[-1] == 6
    expected = copied(other)
    sc.add_gradient_(weights, expected, state)
    advance(state, grads=other)
    assert_close(other["a"], expected["a"], 2e-5, "a")


def test_weights_that_the_kernels_do_not_accept_go_to_the_reference(libraries):
    rng = np.random.default_rng(0)
    shapes = {"accepted": (6, 5), "hwio": (3, 3, 4, 8), "strided": (6, 5), "complex": (4, 3)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    weights["strided"] = np.asfortranarray(weights["strided"])
    weights["complex"] = weights["complex"] + 1j
    weights["tied"] = weights["accepted"] + 1
    grads = {name: np.zeros_like(weight) for name, weight in weights.items()}
    grads["tied"] = grads["accepted"]  # one after the other, or one of two sums is lost
    state = sc.init(weights, layouts={"hwio": "hwio"})
    expected = copied(grads)
    expected["tied"] = expected["accepted"]
    rest = []

    class Rest(ReferenceEngine):
        def run(self, jobs, n_iter):
            rest.extend(job.name for job in jobs)
            return super().run(jobs, n_iter)

    engines = [cuda.CudaEngine(Emulation(libraries)), Rest(in_place=True)]
    found = sc.add_gradient_(weights, grads, state, factor=0.1, engines=engines)
    wanted = sc.add_gradient_(weights, expected, state, factor=0.1)
    assert set(rest) == {"hwio", "strided", "complex", "tied"}
    for name in weights:
        assert_close(grads[name], expected[name], 1e-11, name)
        assert_close(found.v[name], wanted.v[name], 1e-11, name)


def test_without_an_iteration_and_without_u_is_an_error(libraries):
    weights, grads, state = model(shapes={"a": (4, 3), "b": (4, 3)})
    before = copied(grads)
    state.u.pop("b")
    engines = [cuda.CudaEngine(Emulation(libraries))]
    with pytest.raises(sc.ArgumentError, match="'b'"):
        sc.add_gradient_(weights, grads, state, n_iter=0, engines=engines)
    np.testing.assert_array_equal(grads["a"], before["a"])


def test_no_jobs_need_no_launch(libraries):
    runtime = Emulation(libraries)
    assert cuda.CudaEngine(runtime).run([], 1) == ([], [])
    assert runtime.launches == []


GPT_2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12
TINY = [(12, 12 * 9 * i) for i in range(1, 40)]
MODELS = {
    **{f"{n}²": [(n, n)] for n in (1024, 2048, 4096, 8192, 16384)},
    "GPT-2": GPT_2,
    "one large": [(8192, 8192), *TINY],
    "small": TINY,
    "experts": [(512, 512)] * 400,
}


def of_matrices(shapes):
    return [plan_of(sc.Layout("oi"), shape, "weight") for shape in shapes]


@pytest.mark.parametrize("processors", [16, 84, 108, 132])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_run_all_at_once_or_are_many_small_ones(model, processors):
    shapes = MODELS[model]
    found = cuda.geometry(of_matrices(shapes), cuda.Kernels("float32", "float32"), processors)
    matrices = np.split(found.table[: len(shapes) * len(cuda.Matrix._fields)], len(shapes))
    matrices = [cuda.Matrix(*map(int, row)) for row in matrices]
    elements = sum(m * n for m, n in shapes)
    kinds = [
        (found.row_blocks, processors, max(M.block_rows * M.columns for M in matrices)),
        (found.apply_blocks, 2 * processors, max(M.apply_rows * M.columns for M in matrices)),
    ]
    for blocks, slots, largest in kinds:
        if blocks <= slots:
            assert largest <= max(16384, 2.1 * elements / slots)
        else:
            # No block is more than a fourth of a multiprocessor's share, or it is a small matrix.
            assert largest <= max(16384, elements / slots / 4, 512 * 512)


@pytest.mark.parametrize("size", [2048, 4096, 8192, 16384])
def test_the_sums_of_blocks_are_a_small_part_of_a_large_matrix(size):
    found = cuda.geometry(of_matrices([(size, size)]), cuda.Kernels("float32", "float32"), 132)
    assert 2 * found.row_blocks * size <= size * size / 7


def test_tables_of_old_streams_are_dropped(libraries, monkeypatch):
    monkeypatch.setattr(cuda, "_GROUPS", 3)
    runtime = Emulation(libraries)
    engine, places = cuda.CudaEngine(runtime), iter(range(100))
    weights, grads, state = model(shapes={"dense": (20, 30)})
    for _ in range(5):
        place = next(places)
        monkeypatch.setattr(runtime, "place", lambda x, place=place: place)
        engine.run([one_job(weights, grads, state)], 1)
    assert [group.place for group in engine._tables] == [2, 3, 4]


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 500, 4096, 4097, 8192, 16384, 25088, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("vectors", range(1, 9))
def test_threads_hold_a_row_or_any_number_of_columns(vectors, dtype, n):
    found = cuda.span(n, cuda.Kernels(dtype, dtype, vectors))
    assert found.warps in {1, 2, 4, 8, 16}
    if found.columns == 0:
        assert found.warps * cuda.WARP == cuda.THREADS
        assert vectors * n > 4096 * 4 / np.dtype(dtype).itemsize or vectors in (3, 5, 6, 7)
    else:
        assert found.warps == 1 or n > found.columns * found.warps // 2 * cuda.WARP
        assert n <= found.columns * found.warps * cuda.WARP
        assert found.columns * vectors * (8 if dtype == "float64" else 4) <= 128


def test_the_tables_are_those_of_the_source():
    source = SOURCE.read_text()
    for name, expected in (("Matrix", cuda.Matrix._fields), ("Row", cuda.Row._fields)):
        body = re.search(rf"struct {name} {{(.*?)}};", source, re.DOTALL)[1]
        body = re.sub(r"//.*|\bInt\b|\s", "", body).replace(";", ",")
        fields = tuple(body.strip(",").split(","))
        assert fields == expected
    names = ["THREADS", "WARP", "ROWS_BLOCKS", "APPLY_BLOCKS", "FIRST", "ITERATED", "ADD", "AGAIN"]
    for name in names:
        assert int(re.search(rf"#define {name} (\d+)", source)[1]) == getattr(cuda, name)


@pytest.mark.parametrize(
    ("dtype", "vectors"), [("float32", 1), ("float64", 1), ("float16", 1), ("float32", 4)]
)
def test_it_compiles_for_hopper_with_all_sums_in_registers(dtype, vectors, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here to compile the kernels for a GPU")
    options = ("-arch=sm_90", "-cubin", "-ftz=true", "-std=c++17", "-Xptxas", "-v")
    files = ("-o", str(tmp_path / "kernels.cubin"), str(SOURCE))
    done = subprocess.run(
        [nvcc, *options, *cuda.Kernels(dtype, dtype, vectors).options, *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    # The widest instance of `read` keeps some of v in memory, which it reads before its loop.
    assert all(int(spilled) <= 128 for spilled in re.findall(r"(\d+) bytes spill", report)), report
    # Blocks of 512 threads on a multiprocessor with 65536 registers: one of `rows`, two of others.
    found = re.findall(r"spectral_(\w+)' for.*?Used (\d+) registers", report, re.DOTALL)
    assert all(int(used) <= (128 if name in ("rows", "finish") else 64) for name, used in found), (
        report
    )


SEVERAL = {
    "conv": (12, 12, 3, 3),
    "unaligned": (40, 301),
    "stack": (2, 9, 20),
    "long": (9, 9000),
    "long, unaligned": (9, 4101),
}


def with_vectors(k, shapes=SEVERAL, dtype="float32"):
    weights, grads, _ = model(dtype, shapes=shapes)
    layouts = {"stack": "soi"} if "stack" in shapes else {}
    return weights, grads, sc.init(weights, layouts=layouts, n_vectors=k)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_several_vectors_equal_the_core(libraries, k):
    weights, grads, state = with_vectors(k)
    runtime, _, _ = check(libraries, weights, grads, state, 1e-4, factor=0.1)
    once = ["spectral_rows", "spectral_columns", "spectral_finish"]
    assert runtime.launches == 2 * ["spectral_start", *once, *once, "spectral_apply"]


@pytest.mark.parametrize("n_iter", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_several_vectors_of_each_dtype_equal_the_core(libraries, dtype, n_iter):
    shapes = {name: SEVERAL[name] for name in ("conv", "unaligned", "stack")}
    weights, grads, state = with_vectors(4, shapes, dtype)
    tolerance = {"float64": 1e-8}.get(dtype, 3e-3 if dtype == "float16" else 1e-3)
    options = {"factor": 0.1, "target": 2.0, "n_iter": n_iter}
    check(libraries, weights, grads, state, tolerance, **options)


def test_several_vectors_bound_a_weight_as_the_core(libraries):
    weights, _, state = with_vectors(4, {"conv": (12, 12, 3, 3), "idle": (40, 301)})
    found, expected = copied(weights), copied(weights)
    options = {"bound": {"conv": 0.5, "idle": 1e3}}
    engines = [cuda.CudaEngine(Emulation(libraries)), Never()]
    mine = sc.constrain_(found, state, engines=engines, **options)
    plain = sc.constrain_(expected, state, engines=(), **options)
    for name in weights:
        assert_close(found[name], expected[name], 2e-5, name)
        assert_close(np.asarray(mine.sigma[name]), np.asarray(plain.sigma[name]), 2e-5, name)
    np.testing.assert_array_equal(found["idle"], weights["idle"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [2, 4])
def test_several_vectors_of_low_rank_keep_the_properties_of_the_core(libraries, k, dtype):
    """Beside v, nothing but noise is left: rows of V are zero, or unit vectors orthogonal to v."""
    rng = np.random.default_rng(0)
    weights = {
        "rank one": np.outer(rng.standard_normal(30), rng.standard_normal(21)),
        "row": rng.standard_normal((1, 70)),
        "column": rng.standard_normal((90, 1)),
        "repeated": np.eye(20, 24),
        "small": 1e-17 * rng.standard_normal((8, 12)),
        "zero": np.zeros((5, 6)),
        "nan": np.full((5, 6), np.nan),
        "inf": np.full((5, 6), np.inf),
    }
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    start = state = sc.init(weights, n_vectors=k)
    engines = [cuda.CudaEngine(Emulation(libraries)), Never()]
    close = {"float32": 1e-5, "float64": 1e-9}[dtype]
    for n_iter in (1, 1, 20):
        state = sc.iterate(weights, state, n_iter=n_iter, engines=engines)
        for name in ("rank one", "row", "column", "repeated", "small"):
            sigma, V, u = state.sigma[name], state.v[name], state.u[name]
            W = weights[name]
            np.testing.assert_allclose(u @ W, sigma * V[0], atol=close * sigma, err_msg=name)
            lengths = np.linalg.norm(V, axis=1)
            assert np.all((abs(lengths - 1) < close) | (lengths == 0)), name
            np.testing.assert_allclose(V[1:] @ V[0], 0, atol=close, err_msg=name)
            bound = np.linalg.svd(W.astype("float64"), compute_uv=False)[0]
            assert sigma <= bound * (1 + close)
        for name in ("zero", "nan", "inf"):
            np.testing.assert_array_equal(state.v[name], start.v[name])
        assert state.sigma["zero"] == 0
        assert not np.any(state.u["zero"])
        assert not np.isfinite(state.sigma["nan"])
        assert not np.isfinite(state.sigma["inf"])
    for name in ("rank one", "row", "column", "repeated", "small"):
        exact = np.linalg.svd(weights[name].astype("float64"), compute_uv=False)[0]
        np.testing.assert_allclose(state.sigma[name], exact, rtol=1e-2, err_msg=name)


def test_more_vectors_than_the_kernels_have_room_for_go_to_the_reference(libraries):
    weights, grads, state = with_vectors(9, {"conv": (12, 12, 3, 3)})
    runtime = Emulation(libraries)
    engines = [cuda.CudaEngine(runtime), ReferenceEngine(in_place=True)]
    sc.add_gradient_(weights, grads, state, engines=engines)
    assert runtime.launches == []


@pytest.mark.parametrize("n_iter", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_channels_last_convolutions_equal_the_core(libraries, k, n_iter):
    """Only v is permuted. A zero keeps its v, in the same order."""
    shapes = {"ohwi": (12, 3, 3, 8), "odd": (9, 3, 2, 5), "sohwi": (2, 5, 2, 2, 4)}
    weights, grads, _ = model(shapes={**shapes, "zero": (4, 3, 3, 4)})
    weights["zero"][...] = 0
    layouts = {name: name if name in ("ohwi", "sohwi") else "ohwi" for name in weights}
    state = sc.init(weights, layouts=layouts, n_vectors=k)
    _, _, mine = check(
        *(libraries, weights, grads, state, 1e-4), steps=3, factor=0.1, n_iter=n_iter
    )
    if n_iter:
        np.testing.assert_array_equal(mine.v["zero"], state.v["zero"])


@pytest.mark.parametrize(
    "layout", ["ohwi", "sohwi", "(go)ki", "ohiw", "hwio", "iohw", "ohii", "io"]
)
def test_only_channels_last_columns_are_permuted(libraries, layout):
    """Other orders go to the reference, and its result is right."""
    tokens = layout.replace("(go)", "o")
    weights, grads, _ = model(shapes={"w": (4, 6, 2, 3, 2)[: len(tokens)]})
    state = sc.init(weights, layouts={"w": sc.Layout(layout, 2) if "g" in layout else layout})
    runtime, expected = Emulation(libraries), copied(grads)
    engines = [cuda.CudaEngine(runtime), ReferenceEngine(in_place=True)]
    sc.add_gradient_(weights, grads, state, factor=0.1, engines=engines)
    sc.add_gradient_(weights, expected, state, factor=0.1, engines=())
    assert_close(grads["w"], expected["w"], 2e-5, layout)
    assert bool(runtime.launches) == (layout in ("ohwi", "sohwi", "(go)ki", "ohii"))


def test_no_function_of_the_source_is_one_of_the_host():
    """CuPy's compiler, NVRTC, refuses those, and nvcc does not: each says where it runs."""
    source = re.sub(r"//.*", "", SOURCE.read_text())
    heads = re.findall(r"^([^\n#]*)\b\w+\([^;{}()]*\)(?: const)?\s*{", source, re.MULTILINE)
    heads = [
        head for head in heads if not re.match(r"\s*(if|for|while|return|switch|else|})", head)
    ]
    functions = [head for head in heads if head.strip()]
    assert len(functions) > 30
    assert all("__device__" in head or "__global__" in head for head in functions), functions
