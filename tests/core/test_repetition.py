"""A step that repeats the one before equals a step that checks everything anew."""

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import spectral_core as sc
from models import LAYOUTS, model
from spectral_core import _algorithm
from spectral_core._host import HostEngine
from spectral_core._validate import Checks
from spectral_core.engine import ReferenceEngine

ENGINES = {"reference": (), "host": (HostEngine(),)}


@pytest.fixture
def built(monkeypatch):
    """Count the steps that make new jobs."""
    calls, make = [], _algorithm.make_jobs

    def counted(*args, **options):
        calls.append(args)
        return make(*args, **options)

    monkeypatch.setattr(_algorithm, "make_jobs", counted)
    return calls


def forget(state):
    return dataclasses.replace(state, checks=Checks())


def step_both(weights, grads, state, **options):
    """Step with what is kept and without; return the state after the step."""
    mine, theirs = (
        {k: g if g is None else g.copy("K") for k, g in grads.items()} for _ in range(2)
    )
    expected = sc.add_gradient_(weights, theirs, forget(state), **options)
    found = sc.add_gradient_(weights, mine, state, **options)
    for name in weights:
        if mine[name] is not None:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
        for field in ("v", "sigma", "u"):
            pair = (getattr(s, field)[name] for s in (found, expected))
            np.testing.assert_array_equal(*pair, err_msg=f"{field} of {name}")
    return found


def start(seed=0):
    weights, grads = model("float32", seed=seed)
    return weights, grads, sc.init(weights, layouts=LAYOUTS)


@pytest.mark.parametrize("engines", ENGINES)
def test_repeated_steps_equal_checked_ones(engines, built):
    weights, grads, state = start()
    options = {"engines": ENGINES[engines], "factor": 0.3}
    for _ in range(3):
        state = step_both(weights, grads, state, **options)
        weights = {name: w * np.float32(0.9) for name, w in weights.items()}  # new arrays
    # One for the state, one for the first of the kept steps, and one for each without.
    assert len(built) == 1 + 1 + 3


def other_order(arrays):
    return {**arrays, "conv": np.asfortranarray(arrays["conv"])}


class Subclass(np.ndarray):
    """An array of another type."""


CHANGES = {
    "strides of a weight": lambda w, g: (other_order(w), g, {}),
    "strides of a gradient": lambda w, g: (w, other_order(g), {}),
    "a gradient is None": lambda w, g: (w, {**g, "conv": None}, {}),
    "dtype of a gradient": lambda w, g: (w, {**g, "conv": g["conv"].astype("f8")}, {}),
    "a subclass": lambda w, g: ({**w, "dense": w["dense"].view(Subclass)}, g, {}),
    "a kind of rule": lambda w, g: (w, g, {"target": 0.5}),
    "other engines": lambda w, g: (w, g, {"engines": (HostEngine(),)}),
}
SAME = {
    "another factor": {"factor": 0.7},
    "a mapping": {"factor": {"*": 0.2, "conv": 0.1}},
    "no iteration": {"n_iter": 0},
    "more iterations": {"n_iter": 3},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_checked_anew(change, built):
    weights, grads, state = start()
    state = step_both(weights, grads, state, engines=())
    before = len(built)
    weights, grads, options = CHANGES[change](weights, grads)
    step_both(weights, grads, state, **{"engines": (), **options})
    assert len(built) == before + 2


@pytest.mark.parametrize("options", SAME)
def test_other_numbers_need_no_check(options, built):
    weights, grads, state = start()
    state = step_both(weights, grads, state, engines=())
    before = len(built)
    state = step_both(weights, grads, state, engines=(), **SAME[options])
    step_both(weights, grads, state, engines=())
    assert len(built) == before + 2


def test_another_target_of_the_same_kind_needs_no_check(built):
    weights, grads, state = start()
    state = step_both(weights, grads, state, engines=(), target=0.1)
    state = step_both(weights, grads, state, engines=(), target=0.3)
    assert len(built) == 1 + 3


def test_an_older_state_is_checked_anew(built):
    weights, grads, first = start()
    second = step_both(weights, grads, first, engines=())
    step_both(weights, grads, second, engines=())
    before = len(built)
    step_both(weights, grads, first, engines=())
    assert len(built) == before + 2


def test_vectors_of_another_dtype_are_checked_anew(built):
    weights, grads, state = start()
    wide = {name: V.astype("float64") for name, V in state.v.items()}
    state = dataclasses.replace(state, v=wide)
    for _ in range(2):
        state = sc.add_gradient_(weights, grads, state, engines=())
    assert len(built) == 1 + 2
    assert {V.dtype.name for V in state.v.values()} == {"float32"}


def test_another_layout_is_checked_anew():
    weights, grads = {"w": np.eye(3, 3, 1)}, {"w": np.zeros((3, 3))}
    state = sc.add_gradient_(weights, grads, sc.init(weights), engines=())
    turned = dataclasses.replace(state, layouts={"w": sc.Layout("io")})
    step_both(weights, grads, turned, engines=())


def test_wrong_weights_still_raise():
    weights, grads, state = start()
    state = sc.add_gradient_(weights, grads, state)
    with pytest.raises(sc.NamesError, match="missing"):
        sc.add_gradient_({"conv": weights["conv"]}, grads, state)
    state = sc.add_gradient_(weights, grads, state)
    with pytest.raises(sc.ArgumentError, match="factor"):
        sc.add_gradient_(weights, grads, state, factor=-1.0)
    state = sc.add_gradient_(weights, grads, state)
    grads["conv"].flags.writeable = False
    with pytest.raises(sc.DeviceError, match="conv"):
        sc.add_gradient_(weights, grads, state)


def test_arguments_of_another_kind_raise_as_in_the_first_step():
    weights = {"a": np.ones((2, 3)), "b": np.ones((2, 2))}
    grads = {"a": np.zeros((2, 3)), "b": None}
    state = sc.iterate(weights, sc.init(weights))
    for case in (
        ({"a": weights["a"], "c": weights["b"]}, grads),  # another name, of a weight left out
        (list(weights.values()), grads),
        (weights, list(grads.values())),
        (weights, None),
    ):
        for _ in range(2):
            state = sc.add_gradient_(weights, grads, state, factor=0.1)
        with pytest.raises(sc.NamesError):
            sc.add_gradient_(*case, state, factor=0.1)


def test_no_array_of_the_caller_is_kept_alive():
    weights, grads, state = start()
    for _ in range(2):
        state = sc.add_gradient_(weights, grads, state)
    alive = [weakref.ref(x) for x in (*weights.values(), *grads.values())]
    del weights, grads
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []


def test_in_place_and_pure_steps_take_turns():
    weights, grads, state = start()
    reference = [ReferenceEngine(in_place=True)]
    for _ in range(2):
        pure, one = sc.add_gradient(weights, grads, state)
        mine = {name: g.copy() for name, g in grads.items()}
        other = sc.add_gradient_(weights, mine, state, engines=reference)
        for name in weights:
            np.testing.assert_allclose(pure[name], mine[name], rtol=1e-5, atol=1e-6)
        state = one if one.u else other


def test_threads_may_share_a_state():
    weights, grads, state = start()
    state = sc.add_gradient_(weights, {k: g.copy() for k, g in grads.items()}, state)

    def run(_):
        mine = {name: g.copy() for name, g in grads.items()}
        return mine, sc.add_gradient_(weights, mine, state, engines=())

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(40)))
    for mine, after in results[1:]:
        for name in weights:
            np.testing.assert_array_equal(mine[name], results[0][0][name])
            np.testing.assert_array_equal(after.v[name], results[0][1].v[name])
