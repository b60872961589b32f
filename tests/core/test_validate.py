"""Every mistake is named before anything changes."""

import pickle
import re
from decimal import Decimal
from fractions import Fraction

import array_api_compat
import numpy as np
import pytest

import spectral_core as sc
from backends import on
from models import LAYOUTS, assert_equal, model
from spectral_core import Layout, _validate, add_gradient, add_gradient_, init, iterate
from spectral_core._validate import Checks, Fitting, check_factor, check_factors, check_power
from spectral_core.errors import check_int


def mistaken(**changes):
    """Return the arguments of a step over two matrices, with changes to the second."""
    weights = {"first": np.eye(2), "w": np.ones((3, 2))}
    grads = {"first": np.zeros((2, 2)), "w": np.zeros((3, 2))}
    state = init(weights)
    if "weight" in changes:
        weights["w"] = changes.pop("weight")
    if "grad" in changes:
        grads["w"] = changes.pop("grad")
    if "v" in changes:
        state.v["w"] = changes.pop("v")
    if "missing" in changes:
        del {"weights": weights, "grads": grads}[changes.pop("missing")]["w"]
    if "unexpected" in changes:
        weights["bias"] = changes.pop("unexpected")
    return (weights, grads, state), changes


MISTAKES = [
    ({"weight": np.ones(6)}, sc.ShapeError, "'w'.*(6,)"),
    ({"weight": np.ones((2, 3))}, sc.ShapeError, "'w'.*(2, 3)"),
    ({"weight": np.ones((3, 2), dtype=int)}, sc.DTypeError, "int64|float64.*int64"),
    ({"weight": np.ones((3, 2), dtype=bool)}, sc.DTypeError, "bool"),
    ({"weight": np.ones((3, 2)) * 1j}, sc.DTypeError, "'w' has dtype float64.*complex128"),
    ({"grad": np.ones((2, 3))}, sc.ShapeError, "gradient of 'w' has shape (2, 3).*(3, 2)"),
    ({"grad": np.ones((3, 2), dtype=int)}, sc.DTypeError, "gradient of 'w' has dtype int64"),
    (
        {"grad": np.ones((3, 2)) * 1j},
        sc.DTypeError,
        "gradient of 'w' has dtype complex128.*float64",
    ),
    ({"v": np.ones(3)}, sc.ShapeError, "weight 'w' of shape (3, 2).*(k, 2).*(3,)"),
    ({"v": np.ones((1, 2), dtype=int)}, sc.DTypeError, "v has dtype int64"),
    ({"v": np.ones((1, 2)) * 1j}, sc.DTypeError, "v has dtype complex128"),
    ({"missing": "weights"}, sc.NamesError, "missing ['w']"),
    ({"missing": "grads"}, sc.NamesError, "grads has no entry for ['w']"),
    ({"unexpected": np.ones(3)}, sc.NamesError, "unexpected ['bias']"),
    ({"factor": -0.1}, sc.ArgumentError, "factor must be a finite number ≥ 0.*-0.1"),
    ({"factor": np.nan}, sc.ArgumentError, "factor must be.*nan"),
    ({"factor": np.inf}, sc.ArgumentError, "factor must be.*inf"),
    ({"factor": True}, sc.ArgumentError, "factor must be.*True"),
    ({"factor": "0.1"}, sc.ArgumentError, "factor must be.*'0.1'"),
    ({"factor": None}, sc.ArgumentError, "factor must be.*None"),
    ({"factor": np.array(-0.1)}, sc.ArgumentError, "factor must be.*-0.1"),
    ({"factor": np.array(1j)}, sc.ArgumentError, "factor must be.*1j"),
    ({"factor": np.ones(1)}, sc.ArgumentError, "factor must be.*array"),
    ({"factor": {"first": 0.1, "w": -1}}, sc.ArgumentError, "factor['w'] must be.*-1"),
    ({"factor": {"first": 0.1}}, sc.NamesError, "factor has no entry for ['w']"),
    ({"factor": {"*": 0.1, "v*": 0.1}}, sc.NamesError, "factor: 'v*' matches none.*'w'"),
    ({"n_iter": -1}, sc.ArgumentError, "n_iter must be an integer ≥ 0, not -1"),
    ({"n_iter": 1.5}, sc.ArgumentError, "n_iter must be an integer ≥ 0, not 1.5"),
]


def words_to_pattern(words):
    return "|".join(
        ".*".join(re.escape(part) for part in choice.split(".*")) for choice in words.split("|")
    )


@pytest.mark.parametrize("step", [add_gradient, add_gradient_])
@pytest.mark.parametrize(("changes", "error", "words"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistake_is_named_before_any_gradient_changes(step, changes, error, words):
    arguments, changes = mistaken(**changes)
    with pytest.raises(error, match=words_to_pattern(words)):
        step(*arguments, **changes)
    assert not np.any(arguments[1]["first"])


@pytest.mark.parametrize(
    ("weights", "arguments", "error", "words"),
    [
        ({}, {}, sc.NamesError, "at least one"),
        ([np.eye(2)], {}, sc.NamesError, "weights must be a mapping"),
        ({"w": [[1.0]]}, {}, sc.DTypeError, "weight 'w'.*builtins.list"),
        ({"w": np.array(1.0)}, {}, sc.ShapeError, "weight 'w' has 0 axes"),
        ({"w": np.ones(3)}, {}, sc.ShapeError, "weight 'w' has 1 axes"),
        ({"w": np.ones((3, 0))}, {}, sc.ShapeError, "weight 'w' of shape (3, 0).*empty"),
        ({"w": np.ones((3, 2), dtype=int)}, {}, sc.DTypeError, "weight 'w' has dtype int64"),
        ({"w": np.ones((3, 2), dtype=bool)}, {}, sc.DTypeError, "weight 'w' has dtype bool"),
        ({"w": np.eye(2)}, {"seed": -1}, sc.ArgumentError, "seed must be an integer ≥ 0, not -1"),
        ({"w": np.eye(2)}, {"seed": "x"}, sc.ArgumentError, "seed must be an integer ≥ 0, not 'x'"),
        (
            {"w": np.eye(2)},
            {"layouts": {"v.*": "oi"}},
            sc.NamesError,
            "layouts: 'v.*' matches none",
        ),
        (
            {"w": np.eye(2)},
            {"layouts": "oihw"},
            sc.ShapeError,
            "weight 'w' of shape (2, 2).*4 axes",
        ),
        ({"w": np.eye(2)}, {"layouts": "xy"}, sc.ArgumentError, "cannot read layout 'xy'"),
    ],
)
def test_mistake_is_named_by_init(weights, arguments, error, words):
    with pytest.raises(error, match=".*".join(re.escape(part) for part in words.split(".*"))):
        init(weights, **arguments)


def test_mistake_is_named_by_iterate():
    (weights, _, state), _ = mistaken(missing="weights")
    with pytest.raises(sc.NamesError, match=r"missing \['w'\]"):
        iterate(weights, state)
    (weights, _, state), _ = mistaken()
    with pytest.raises(sc.ArgumentError, match="n_iter"):
        iterate(weights, state, n_iter=0)


def test_error_names_every_weight_whose_shape_does_not_fit(backend):
    weights = backend.tree(dict.fromkeys("abc", np.ones((4, 3))))
    state = init(weights)
    others = {**weights, **backend.tree({"a": np.ones((4, 5)), "c": np.ones((3, 3, 1))})}
    grads = dict.fromkeys("abc")
    grads.update({"a": others["a"], "c": weights["c"]})
    message = r"'a' of shape \(4, 5\) needs a v of shape \(k, 5\)(.|\n)*'c'"
    with pytest.raises(sc.ShapeError, match=message) as error:
        add_gradient(others, grads, state)
    assert "'b'" not in str(error.value)
    with pytest.raises(sc.ShapeError, match=message):
        iterate(others, state)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_wrong_number_of_vectors_raises(wrong):
    with pytest.raises(sc.ArgumentError, match="n_vectors must be an integer ≥ 1"):
        init(model()[0], n_vectors=wrong)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w, g, s: init({3: w["w"]}), sc.NamesError, "must be a string, not 3"),
        (lambda w, g, s: add_gradient([w], g, s), sc.NamesError, "weights must be a mapping"),
        (lambda w, g, s: add_gradient(w, None, s), sc.NamesError, "grads must be a mapping"),
        (lambda w, g, s: add_gradient_(w, None, s), sc.NamesError, "grads must be a mapping"),
        (lambda w, g, s: add_gradient(w, g, s, factor=np.True_), sc.ArgumentError, "factor"),
        (lambda w, g, s: sc.spectral_norm(w["w"], tol="x"), sc.ArgumentError, "tol"),
        (lambda w, g, s: sc.Layout(5), sc.ArgumentError, "string of axes"),
        (lambda w, g, s: sc.as_matrix(w["w"], None), sc.ArgumentError, "string of axes"),
    ],
)
def test_arguments_of_a_wrong_kind_raise(call, error, words):
    weights, grads = {"w": np.ones((3, 2))}, {"w": np.zeros((3, 2))}
    with pytest.raises(error, match=words):
        call(weights, grads, init(weights))


@on("array-api-strict", "torch-cpu", "jax-cpu")
def test_weight_and_gradient_of_two_libraries_raise(backend):
    arguments, _ = mistaken(grad=backend.asarray(np.zeros((3, 2))))
    with pytest.raises(sc.DTypeError, match=r"weight 'w'.* its gradient.*numpy\.ndarray"):
        add_gradient(*arguments)


@on("array-api-strict", "torch-cpu", "jax-cpu")
def test_weight_and_v_of_two_libraries_raise(backend):
    weights = {"w": backend.asarray(np.eye(2))}
    with pytest.raises(sc.DTypeError, match=r"weight 'w'.*numpy\.ndarray"):
        iterate(weights, init({"w": np.eye(2)}))


@pytest.mark.parametrize("what", ["weight", "grad"])
def test_list_in_place_of_an_array_raises(what):
    arguments, _ = mistaken(**{what: [[1.0, 2.0]] * 3})
    with pytest.raises(sc.DTypeError, match=r"'w'.*builtins\.list"):
        add_gradient(*arguments)
    assert not np.any(arguments[1]["first"])


@on("torch-cpu", "array-api-strict")
def test_factor_of_another_library_changes_no_gradient(backend):
    (weights, grads, state), _ = mistaken()
    factor = {"first": 0.1, "w": backend.asarray(np.array(0.1))}
    with pytest.raises(sc.DTypeError, match=r"weight 'w'.*factor.*one library"):
        add_gradient_(weights, grads, state, factor=factor)
    assert not np.any(grads["first"])


@on("torch-cpu", "jax-cpu", "array-api-strict")
def test_complex_factor_changes_no_gradient(backend):
    weights = backend.tree({"a": np.ones((3, 2)), "b": np.ones((2, 2))})
    grads = backend.tree({"a": np.zeros((3, 2)), "b": np.zeros((2, 2))})
    factor = {"a": 0.1, "b": backend.asarray(np.array(1j))}
    step = add_gradient_ if backend.in_place else add_gradient
    with pytest.raises(sc.DTypeError, match=r"factor of 'b' has dtype .*complex128"):
        step(weights, grads, init(weights), factor=factor)
    assert not backend.to_numpy(grads["a"]).any()


@on(in_place=False)
def test_immutable_gradients_raise_in_place(backend):
    weights, grads = model()
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS)
    with pytest.raises(sc.DeviceError, match="gradient of 'conv' cannot be written in place"):
        add_gradient_(mine, my_grads, state)
    assert_equal(backend.tree_to_numpy(my_grads), grads)


def test_read_only_gradient_leaves_the_others_unchanged():
    (weights, grads, state), _ = mistaken()
    grads["w"].flags.writeable = False
    with pytest.raises(sc.DeviceError, match="gradient of 'w' cannot be written"):
        add_gradient_(weights, grads, state)
    assert not np.any(grads["first"])


def elsewhere(backend, x):
    """Return the array on a second device, which both libraries have for such tests."""
    if backend.module == "torch":
        return x.to("meta")
    xp = array_api_compat.array_namespace(x)
    return xp.asarray(x, device=xp.Device("device1"))


@on("torch-cpu", "array-api-strict")
def test_arrays_on_two_devices_raise(backend):
    x = backend.asarray(np.eye(2))
    y = elsewhere(backend, x)
    state = init({"w": x})
    with pytest.raises(sc.DeviceError, match=r"weight 'w' is on .* but its gradient is on"):
        add_gradient({"w": x}, {"w": y}, state)
    with pytest.raises(sc.DeviceError, match=r"weight 'w' is on .* but its v is on"):
        add_gradient({"w": y}, {"w": y}, state)


@on("array-api-strict")
def test_everything_stays_on_the_device_of_the_weight(backend):
    weights, grads = model()
    there = {name: elsewhere(backend, backend.asarray(x)) for name, x in weights.items()}
    my_grads = {name: elsewhere(backend, backend.asarray(x)) for name, x in grads.items()}
    found, state = add_gradient(there, my_grads, init(there, layouts=LAYOUTS))
    for arrays in (found, state.v, state.sigma):
        assert {str(x.device) for x in arrays.values()} == {"array_api_strict.Device('device1')"}
    add_gradient_(there, my_grads, state)


# Checks are skipped while nothing has changed


def fitting(**changes):
    parts = {"V": np.ones((1, 2)), "grad": np.ones((3, 2)), "factor": 0.1, "sigma": None, "u": None}
    return Fitting(**{**parts, **changes})


def test_same_kinds_are_checked_once(monkeypatch):
    checks, weight, layout = Checks(), np.ones((3, 2)), Layout("oi")
    plan, xp = checks.fit("w", weight, layout, fitting())
    counted = []
    original = _validate._check_fit
    monkeypatch.setattr(_validate, "_check_fit", lambda *a: counted.append(a) or original(*a))
    for _ in range(3):  # other arrays of the same kinds
        assert checks.fit("w", weight.copy(), layout, fitting(factor=0.2)) == (plan, xp)
    assert counted == []
    checks.fit("other", weight, layout, fitting())
    checks.fit("w", weight.astype("float32"), layout, fitting())
    checks.fit("w", weight, layout, fitting(grad=None))
    checks.fit("w", weight, layout, fitting(factor=np.asarray(0.1)))
    checks.fit("w", weight, layout, fitting(u=np.ones(3), sigma=np.asarray(1.0)))
    assert len(counted) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"V": np.ones((1, 3))},
        {"V": np.ones(2)},
        {"V": np.ones((0, 2))},
        {"V": np.ones((1, 2), dtype=int)},
        {"V": np.ones((1, 2)) * 1j},
        {"grad": np.ones((2, 3))},
        {"grad": [[1.0]]},
        {"factor": np.asarray(1j)},
        {"sigma": np.ones(2)},
        {"u": np.ones(2)},
    ],
    ids=str,
)
def test_change_after_a_check_is_checked(changes):
    checks, weight, layout = Checks(), np.ones((3, 2)), Layout("oi")
    checks.fit("w", weight, layout, fitting())
    for _ in range(2):  # an array that does not fit is not remembered
        with pytest.raises(sc.SpectralError, match="'w'"):
            checks.fit("w", weight, layout, fitting(**changes))
    checks.fit("w", weight, layout, fitting())


def test_several_vectors_fit():
    plan, _ = Checks().fit("w", np.ones((3, 2)), Layout("oi"), fitting(V=np.ones((4, 2))))
    assert plan.matrix == (3, 2)


def test_copied_checks_start_anew():
    checks = Checks()
    checks.fit("w", np.ones((3, 2)), Layout("oi"), fitting())
    assert pickle.loads(pickle.dumps(checks))._checked == {}


# Each kind of argument has one check


@pytest.mark.parametrize("value", [0, 2, 0.5, np.float32(0.5), np.array(0.5), Fraction(1, 2)])
def test_number_is_returned_as_a_float(value):
    found = check_factor(value)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Decimal("0.25"), 0.25),
        (np.float16(0.25), 0.25),
        (np.longdouble(0.25), 0.25),
        (np.array(3), 3.0),
        (np.uint8(3), 3.0),
        (Fraction(10**400, 10**400 * 4), 0.25),
        (-0.0, 0.0),
        (5e-324, 5e-324),
    ],
    ids=str,
)
def test_numbers_of_any_type_are_taken(value, expected):
    assert check_factor(value) == check_factor(value, "bound") == expected
    assert np.isfinite(sc.penalty(np.ones(2), factor=value, target=value))


BAD_NUMBERS = {
    "10**400": 10**400,
    "-10**400": -(10**400),
    "10**5000": 10**5000,  # more digits than Python prints
    "fraction": Fraction(10**400),
    "decimal": Decimal("1e400"),
    "decimal NaN": Decimal("NaN"),
    "signaling NaN": Decimal("sNaN"),
    "longdouble": np.longdouble("1e400"),
    "nan": float("nan"),
    "inf": float("inf"),
    "negative": -1e-300,
    "complex": 1 + 0j,
    "np.complex64": np.complex64(1),
    "bool": True,
    "False": False,
    "np.bool": np.True_,
    "0-d bool": np.array(True),
    "0-d object": np.array(None),
    "str": "0.1",
    "bytes": b"1",
    "None": None,
    "list": [0.1],
    "array": np.ones(1000),
    "masked": np.ma.masked_array(0.1, True),
    "date": np.datetime64("2020-01-01"),
    "duration": np.timedelta64(1, "s"),
}


@pytest.mark.parametrize("kind", BAD_NUMBERS)
def test_what_is_no_number_is_refused_everywhere(kind):
    weights, grads = {"w": np.eye(2)}, {"w": np.zeros((2, 2))}
    state, bad = init(weights), BAD_NUMBERS[kind]
    for call in (
        lambda: add_gradient(weights, grads, state, factor=bad),
        lambda: add_gradient_(weights, grads, state, factor={"w": bad}),
        lambda: add_gradient_(weights, grads, state, target=bad),
        lambda: sc.constrain(weights, state, bound=bad),
        lambda: sc.constrain_(weights, state, bound={"*": bad}),
        lambda: sc.penalty(np.ones(2), factor=bad),
        lambda: sc.penalty(np.ones(2), target=bad),
        lambda: sc.penalty_at(np.eye(2), np.ones(2), factor=bad),
        lambda: sc.rank_one(np.asarray(1.0), np.ones(2), np.ones(2), factor=bad),
        lambda: sc.slope(np.ones(2), target=bad),
        lambda: sc.spectral_norm(np.eye(2), tol=bad if bad is not None else "x"),
    ):
        with pytest.raises(sc.SpectralError) as error:
            call()
        assert len(str(error.value)) < 300
    assert not grads["w"].any()


@on("torch-cpu", "jax-cpu", "array-api-strict")
def test_array_is_returned_unread(backend):
    array = backend.asarray(np.array(-1.0))
    assert check_factor(array) is array


def test_factors_are_checked_for_each_name():
    assert check_factors(2, "ab") == {"a": 2.0, "b": 2.0}
    assert check_factors({"a": 1, "*": 3}, "ab") == {"a": 1.0, "b": 3.0}
    with pytest.raises(sc.ArgumentError, match=r"bound\['a'\] must be a finite number ≥ 0"):
        check_factors({"a": -1, "*": 3}, "ab", "bound")


@pytest.mark.parametrize("power", [0, 3, 1.5, True, None, "2"])
def test_power_other_than_1_and_2_raises(power):
    assert (check_power(1), check_power(2)) == (1, 2)
    with pytest.raises(sc.ArgumentError, match=re.escape(f"power must be 1 or 2, not {power!r}")):
        check_power(power)


@pytest.mark.parametrize("value", [1, np.int64(1), True])
def test_integer_is_returned_as_an_int(value):
    assert check_int(value, "n") == 1
    with pytest.raises(sc.ArgumentError, match="n must be an integer ≥ 2"):
        check_int(value, "n", least=2)


def test_factor_and_bound_may_be_given_by_position_and_no_other_option():
    weights, grads = {"w": np.eye(2)}, {"w": np.zeros((2, 2))}
    state = init(weights)
    u = np.ones(2)
    for function, arguments, option in (
        (add_gradient, (weights, grads, state), "factor"),
        (add_gradient_, (weights, grads, state), "factor"),
        (sc.constrain, (weights, state), "bound"),
        (sc.constrain_, (weights, state), "bound"),
        (sc.penalty, (u,), "factor"),
        (sc.penalty_at, (np.eye(2), u), "factor"),
        (sc.rank_one, (np.asarray(1.0), u, u), "factor"),
    ):
        with pytest.raises(sc.ArgumentError, match=f"{option} must be"):
            function(*arguments, -1.0)
        with pytest.raises(TypeError, match="positional"):
            function(*arguments, 1.0, 0.0)
