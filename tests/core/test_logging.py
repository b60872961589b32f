"""`Watch` logs the numbers of the right step at the right time."""

import json
import logging
import math

import numpy as np
import pytest

import spectral_core as sc
from backends import svd_norm
from spectral_core._logging import copy_to_host

SHAPES = {"dense": (6, 5), "grouped": (4, 3, 2, 2)}
LAYOUTS = {"grouped": sc.Layout("(go)ihw", groups=2)}
FACTOR = {"dense": 0.5, "*": 0.1}


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def converged(weights):
    return sc.iterate(weights, sc.init(weights, layouts=LAYOUTS), n_iter=2000)


def expected(weights, prefix="spectral/"):
    """Return the numbers to log, from the singular values that LAPACK finds."""
    dense = svd_norm(weights["dense"])
    grouped = svd_norm(weights["grouped"].reshape(2, 2, 12))
    return {
        f"{prefix}sigma/dense": dense,
        f"{prefix}sigma/grouped": max(grouped),
        f"{prefix}log10_sigma_product": math.log10(dense * grouped[0] * grouped[1]),
        f"{prefix}penalty": 0.25 * dense**2 + 0.05 * (grouped[0] ** 2 + grouped[1] ** 2),
    }


class Log(list):
    def __call__(self, values, step):
        self.append((step, values))

    def assert_is(self, numbers):
        assert [step for step, _ in self] == list(numbers)
        for (_, found), values in zip(self, numbers.values(), strict=True):
            assert found.keys() == values.keys()
            assert all(type(value) is float for value in found.values())
            np.testing.assert_allclose(list(found.values()), list(values.values()), rtol=1e-10)


class Late:
    """A device whose copies complete when the test says so, and a `Copy` from it."""

    def __init__(self):
        self.sent, self.arrived, self.waited_for = 0, 0, []

    def __call__(self, arrays):
        copy = LateCopy(self, self.sent, copy_to_host(arrays))
        self.sent += 1
        return copy


class LateCopy:
    def __init__(self, device, number, copy):
        self.device, self.number, self.copy = device, number, copy

    def ready(self):
        return self.number < self.device.arrived

    def values(self):
        if not self.ready():
            self.device.waited_for.append(self.number)
        return self.copy.values()


def test_logged_numbers_are_those_of_an_svd(weights, backend):
    log = Log()
    state = sc.iterate(
        backend.tree(weights), sc.init(backend.tree(weights), layouts=LAYOUTS), n_iter=2000
    )
    sc.Watch(log, factor=FACTOR, prefix="")(state, 0)
    log.assert_is({0: expected(weights, "")})


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_due_steps_are_logged_with_their_own_weights(weights, every_n_steps):
    log, numbers = Log(), {}
    watch = sc.Watch(log, factor=FACTOR, every_n_steps=every_n_steps)
    for step in range(7):
        scaled = {name: weight * (1 + step) for name, weight in weights.items()}
        watch(converged(scaled))
        if step % every_n_steps == 0:
            numbers[step] = expected(scaled)
        log.assert_is(numbers)  # a host array is logged at once
    assert list(numbers) == list(range(0, 7, every_n_steps))


def test_late_copies_are_logged_once_in_order_with_their_own_step(weights):
    device, log, numbers = Late(), Log(), {}
    watch = sc.Watch(log, factor=FACTOR, every_n_steps=2, copy=device)
    arrivals = [0, 0, 0, 1, 1, 3, 3, 3, 4, 5]  # number of complete copies at each step
    for step, arrived in enumerate(arrivals):
        scaled = {name: weight * (1 + step) for name, weight in weights.items()}
        state = converged(scaled)
        device.arrived = arrived
        watch(state, 100 + step)
        for vector in (*state.v.values(), *state.sigma.values()):
            vector[...] = np.nan  # as a step in place does
        if step % 2 == 0:
            numbers[100 + step] = expected(scaled)
        log.assert_is(dict(list(numbers.items())[:arrived]))
    assert device.waited_for == []
    watch.flush()
    log.assert_is(numbers)
    watch.flush()
    watch.close()
    log.assert_is(numbers)


def test_end_of_the_block_waits_for_pending_copies(weights):
    device, log = Late(), Log()
    with sc.Watch(log, factor=FACTOR, every_n_steps=2, copy=device) as watch:
        for _ in range(5):
            watch(converged(weights))
        assert log == []
    log.assert_is(dict.fromkeys((0, 2, 4), expected(weights)))
    assert device.waited_for == [0, 1, 2]


def test_failing_log_does_not_receive_the_same_step_again(weights):
    device, steps = Late(), []

    def log(values, step):
        steps.append(step)
        if step == 0:
            raise OSError("the disk is full")

    watch = sc.Watch(log, every_n_steps=1, copy=device)
    watch(converged(weights))
    device.arrived = 2
    with pytest.raises(OSError, match="disk"):
        watch(converged(weights))
    watch.flush()
    assert steps == [0, 1]


def test_factor_belongs_to_the_step(weights):
    device, log = Late(), Log()
    watch = sc.Watch(log, factor=0.2, every_n_steps=1, copy=device)
    state = converged(weights)
    squares = sum(np.sum(sigma**2) for sigma in state.sigma.values())
    watch(state)
    watch.factor = {"dense": np.array(0.4), "grouped": np.float32(0.25)}
    watch(state)
    watch.factor = 0.0
    watch.flush()
    penalties = [values["spectral/penalty"] for _, values in log]
    dense = float(state.sigma["dense"]) ** 2
    assert penalties == pytest.approx([0.1 * squares, 0.2 * dense + 0.125 * (squares - dense)])


def test_factor_array_is_copied_together_with_sigma(weights, backend):
    sizes = []

    def copy(arrays):
        sizes.append(len(arrays))
        return copy_to_host(arrays)

    log, on_device = Log(), backend.tree(weights)
    factor = backend.asarray(np.array(0.3))
    watch = sc.Watch(log, factor=factor, copy=copy)
    state = sc.init(on_device)
    watch(state)
    squares = sum(float(sigma) ** 2 for sigma in backend.tree_to_numpy(state.sigma).values())
    assert log[0][1]["spectral/penalty"] == pytest.approx(0.15 * squares)
    assert sizes == [2 if backend.module == "numpy" else 3]  # a NumPy array is a number


def test_numbers_out_of_range_are_logged_unchanged():
    log = Log()
    many = {f"w{i}": np.full((2, 2), 1e10) for i in range(40)}
    zero = {"w": np.zeros((2, 2)), "one": np.eye(2)}
    bad = {"w": np.full((2, 2), np.nan), "one": np.eye(2)}
    for weights in (many, zero, bad):
        sc.Watch(log, factor=1.0)(sc.init(weights))
    large, none, nan = (values for _, values in log)
    assert large["spectral/log10_sigma_product"] == pytest.approx(40 * math.log10(2e10))
    assert none["spectral/sigma/w"] == 0
    assert none["spectral/log10_sigma_product"] == -math.inf
    assert none["spectral/penalty"] == pytest.approx(0.5)
    assert math.isnan(nan["spectral/sigma/w"])
    assert math.isnan(nan["spectral/penalty"])
    assert nan["spectral/sigma/one"] == pytest.approx(1)


def test_writer_receives_scalars(weights):
    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

    writer, log = Writer(), Log()
    for to in (writer, log):
        sc.Watch(to, factor=FACTOR)(converged(weights), 200)
    assert writer.scalars == [(name, value, 200) for name, value in log[0][1].items()]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_path_receives_a_line_a_step(weights, tmp_path, kind):
    path, log, state = tmp_path / "runs/new/spectral.jsonl", Log(), converged(weights)
    with sc.Watch(kind(path), factor=FACTOR, every_n_steps=2) as watch:
        assert path.read_text() == ""  # an error about the path would come before the training
        for step in range(5):
            watch(state)
            assert len(lines_of(path)) == step // 2 + 1  # nothing waits in a buffer
    sc.Watch(log, factor=FACTOR)(state, 0)
    assert lines_of(path) == [{"step": step, **log[0][1]} for step in (0, 2, 4)]


def test_resumed_run_replaces_what_it_repeats(weights, tmp_path):
    path, state = tmp_path / "spectral.ndjson", sc.init(weights, layouts=LAYOUTS)

    def run(steps):
        watch = sc.Watch(path, every_n_steps=2)
        for step in steps:
            watch(state, step)

    run(range(9))
    with path.open("a") as file:
        file.write('{"step": 10, "spectral/pen')  # killed while it wrote
    run(range(5, 13))
    assert [line["step"] for line in lines_of(path)] == [0, 2, 4, 6, 8, 10, 12]
    run(range(3))  # a run of its own
    run(range(2, 5))
    steps = [line["step"] for line in lines_of(path)]
    assert steps == [0, 2, 4, 6, 8, 10, 12, 0, 2, 4]
    path.write_text("a note of the user\n")
    run(range(6, 7))
    assert path.read_text().startswith('a note of the user\n{"step": 6, ')


def test_line_is_valid_json_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "spectral.jsonl"
    zero = {"w": np.zeros((2, 2)), "bad": np.full((2, 2), np.nan)}
    sc.Watch(path)(sc.init(zero), 300)
    (line,) = path.read_text().splitlines()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(line, parse_constant=refuse)
    assert found["spectral/sigma/w"] == 0
    assert found["spectral/sigma/bad"] is None
    assert found["step"] == 300


class Metrics:
    """An object with ``log_metrics``, as MLflow and Lightning's loggers have."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, *, step=None):
        self.calls.append((step, metrics))


def test_object_with_log_metrics_receives_them(weights):
    metrics, log = Metrics(), Log()
    for to in (metrics, log):
        sc.Watch(to, factor=FACTOR)(converged(weights), 100)
    assert metrics.calls == list(log)


def test_many_metrics_go_in_parts_and_by_allowed_names():
    metrics = Metrics()
    weights = {f"layers[{i}].weight": np.eye(2) for i in range(1500)}
    sc.Watch(metrics)(sc.init(weights), 0)
    assert [len(part) for _, part in metrics.calls] == [1000, 502]
    assert "spectral/sigma/layers_3_.weight" in metrics.calls[0][1]


class Run:
    """A run of Weights & Biases."""

    def __init__(self):
        self.axes, self.rows = {}, []

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step=None):
        assert step is None  # late values of an older step would be dropped
        self.rows.append(values)


@pytest.mark.parametrize("prefix", ["spectral/", ""])
def test_run_receives_the_step_as_a_number(weights, prefix):
    run, log = Run(), Log()
    for to in (run, log):
        sc.Watch(to, factor=FACTOR, prefix=prefix)(converged(weights), 200)
    assert run.rows == [{**log[0][1], f"{prefix}step": 200}]
    assert run.axes == {
        f"{prefix}{name}": f"{prefix}step" for name in ("sigma/*", "log10_sigma_product", "penalty")
    }


def test_resumed_run_continues_to_count(weights):
    log, state = Log(), converged(weights)
    watch = sc.Watch(log, every_n_steps=4)
    watch.step = 6
    for _ in range(4):
        watch(state)
    watch(state, 16)
    for _ in range(4):
        watch(state)
    assert [step for step, _ in log] == [8, 16, 20]


def test_wrong_arguments_raise(weights, tmp_path):
    with pytest.raises(sc.ArgumentError, match="every_n_steps must be an integer ≥ 1, not 0"):
        sc.Watch(print, every_n_steps=0)
    for wrong in (3, None, ["spectral.jsonl"], logging.getLogger(), np):
        with pytest.raises(sc.ArgumentError, match=r"log must be a callable log\(values, step\)"):
            sc.Watch(wrong)
    for path in ("runs/1", "spectral.json", tmp_path):
        with pytest.raises(sc.ArgumentError, match=r"ends in \.jsonl.*SummaryWriter\(path\)"):
            sc.Watch(path)
    unready = Run()
    unready.run = None
    with pytest.raises(sc.ArgumentError, match=r"wandb\.init\(\) first"):
        sc.Watch(unready)
    with pytest.raises(sc.ArgumentError, match=r"must be a SpectralState.*its adapter"):
        sc.Watch(print)({"w": weights["dense"]})
    with pytest.raises(sc.NamesError, match="matches none"):
        sc.Watch(print, factor={"other": 0.1})(converged(weights))
    with pytest.raises(sc.NamesError, match=r"no entry for \['grouped'\]"):
        sc.Watch(print, factor={"dense": 0.1})(converged(weights))


def test_logged_penalty_is_the_added_one(weights):
    log = Log()
    targets = {"dense": np.array(3.0), "*": 1.0}
    with sc.Watch(log, factor=FACTOR, every_n_steps=1, target=targets, power=1) as watch:
        watch(converged(weights), 0)
    values = expected(weights)
    grouped = svd_norm(weights["grouped"].reshape(2, 2, 12))
    dense = values["spectral/sigma/dense"]
    assert dense > 3.0
    values["spectral/penalty"] = 0.5 * (dense - 3.0) + 0.1 * np.maximum(grouped - 1.0, 0).sum()
    log.assert_is({0: values})
    with pytest.raises(sc.ArgumentError, match="power must be 1 or 2"):
        sc.Watch(log, power=3)
