"""Compare the numbers in TensorBoard's files with singular values by SVD."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import spectral_core as sc
from backends import svd_norm

FACTOR = 0.02
N_ITER = 150  # a step, so that σ is that of an SVD


def digits(n=256):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    return images[:n].reshape(n, 8, 8) / 16, labels[:n]


def logged(folder):
    """The scalars of all event files: {name: {step: value}}."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def numbers_of(sigma):
    """Return the numbers to log, from all singular values of each weight's stack."""
    every = np.concatenate([np.atleast_1d(value) for value in sigma.values()])
    return {
        **{f"spectral/sigma/{name}": np.max(value) for name, value in sigma.items()},
        "spectral/log10_sigma_product": np.sum(np.log10(every)),
        "spectral/penalty": FACTOR / 2 * np.sum(every**2),
    }


def assert_logged(found, by_step, rtol=1e-5):
    names = set().union(*by_step.values())
    assert found.keys() == names
    for name in names:
        assert list(found[name]) == list(by_step)
        expected = [values[name] for values in by_step.values()]
        np.testing.assert_allclose(list(found[name].values()), expected, rtol=rtol, atol=1e-6)


# PyTorch


def torch_net(torch):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.Conv2d(4, 8, 3, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 4 * 4, 10),
    ).double()


def torch_sigma(model):
    """σ by SVD: of the grouped convolution two."""
    return {
        "0.weight": svd_norm(model[0].weight.detach().reshape(4, -1).numpy()),
        "1.weight": svd_norm(model[1].weight.detach().reshape(2, 4, -1).numpy()),
        "3.weight": svd_norm(model[3].weight.detach().numpy()),
    }


def torch_batches(torch, n_steps):
    images, labels = digits()
    for step in range(n_steps):
        those = slice(step * 32 % 256, step * 32 % 256 + 32)
        yield torch.tensor(images[those, None]), torch.tensor(labels[those])


def train(torch, model, optimizer, n_steps):
    """Train, and say what σ the weights of each step's loss had."""
    sigma = []
    for x, labels in torch_batches(torch, n_steps):
        sigma.append(torch_sigma(model))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return sigma


def regularized(torch, spectral_torch, **options):
    model = torch_net(torch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reg = spectral_torch.SpectralNormRegularizer(model, factor=FACTOR, **options).attach(optimizer)
    return model, optimizer, reg


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def test_a_torch_run_in_tensorboard(torch, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    import spectral_torch

    model, optimizer, reg = regularized(torch, spectral_torch, n_iter=N_ITER)
    with (
        SummaryWriter(tmp_path) as writer,
        spectral_torch.Watch(writer, every_n_steps=4).attach(reg, optimizer) as watch,
    ):
        sigma = train(torch, model, optimizer, 10)
    assert_logged(logged(tmp_path), {step: numbers_of(sigma[step]) for step in (0, 4, 8)})
    assert sigma[0]["3.weight"] != pytest.approx(sigma[8]["3.weight"], rel=1e-3)

    train(torch, model, optimizer, 5)  # detached, it counts and logs no more
    assert watch.step == 10
    assert set(logged(tmp_path)["spectral/penalty"]) == {0, 4, 8}


def test_a_schedule_and_factors_by_name_are_logged_as_they_were(torch):
    import spectral_torch

    log = []
    model, optimizer, reg = regularized(torch, spectral_torch, n_iter=N_ITER)
    watch = spectral_torch.Watch(lambda *args: log.append(args), every_n_steps=1)
    watch.attach(reg, optimizer)
    reg.factor = {"0.weight": torch.tensor(0.5), "*": 0.1}
    sigma = train(torch, model, optimizer, 1)
    reg.factor = 0.3
    sigma += train(torch, model, optimizer, 1)
    squares = [{name: np.sum(value**2) for name, value in found.items()} for found in sigma]
    first = squares[0]["0.weight"]
    expected = [0.25 * first + 0.05 * (sum(squares[0].values()) - first)]
    expected.append(0.15 * sum(squares[1].values()))
    assert [values["spectral/penalty"] for values, _ in log] == pytest.approx(expected)


def test_watching_adds_two_operations_to_a_due_step_and_none_to_others(torch):
    from torch.utils._python_dispatch import TorchDispatchMode

    import spectral_torch

    class Recorded(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
            made_there = func.overloadpacket is torch.ops.aten.arange  # of the fresh direction
            if kwargs.get("device") is not None and not made_there:
                assert kwargs.get("non_blocking"), f"{func} waits for the device"
            if not func.is_view and func.namespace == "aten":
                self.names.append(func.overloadpacket.__name__)
            return func(*args, **kwargs)

    with pytest.raises(AssertionError, match="waits"), Recorded():
        torch.ones(1).item()

    found, log = {}, []
    for watched in (True, False):
        model, optimizer, reg = regularized(torch, spectral_torch, kernels=False)
        if watched:
            watch = spectral_torch.Watch(lambda *args: log.append(args), every_n_steps=2)
            watch.attach(reg, optimizer)
        batches = list(torch_batches(torch, 4))
        for step, (x, labels) in enumerate(batches):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            with Recorded() as recorded:
                optimizer.step()
            found[watched, step] = recorded.names
    for step in (1, 3):
        assert found[True, step] == found[False, step]
    for step in (0, 2):
        assert found[True, step] == [*found[False, step], "cat", "cat"]  # to send, to take apart
    assert [step for _, step in log] == [0, 2]


def test_a_compiled_step_is_watched(torch):
    import spectral_torch

    torch.compiler.reset()
    outcomes = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        log = []
        model, optimizer, reg = regularized(torch, spectral_torch)
        watch = spectral_torch.Watch(lambda *args, log=log: log.append(args), every_n_steps=2)
        watch.attach(reg, optimizer)
        step = wrap(optimizer.step)
        for x, labels in torch_batches(torch, 5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            step()
        outcomes.append(log)
    assert [step for _, step in outcomes[0]] == [0, 2, 4]
    assert [step for _, step in outcomes[1]] == [0, 2, 4]
    for (plain, _), (compiled, _) in zip(*outcomes, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-6)


def test_a_watch_counts_the_steps_of_one_optimizer(torch):
    import spectral_torch

    model, optimizer, reg = regularized(torch, spectral_torch)
    watch = spectral_torch.Watch(print).attach(reg, optimizer)
    with pytest.raises(sc.ArgumentError, match="attached already"):
        watch.attach(reg, optimizer)
    watch.close()
    watch.attach(reg, optimizer)

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    twice = Twice(model.parameters())
    for other, match in ((object(), "give it the optimizer"), (twice, "hooks in both")):
        with pytest.raises(sc.ArgumentError, match=match):
            spectral_torch.Watch(print).attach(reg, other)


@pytest.mark.parametrize("how", ["logger.log_metrics", "self.log_dict"])
def test_a_lightning_run(torch, tmp_path, how):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger

    import spectral_torch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.sigma = torch_net(torch), []

        def training_step(self, batch, _):
            self.sigma.append(torch_sigma(self.model))
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            reg = spectral_torch.SpectralNormRegularizer(self.model, factor=FACTOR, n_iter=N_ITER)
            reg.attach(optimizer)
            log = {
                "logger.log_metrics": logger.log_metrics,
                "self.log_dict": lambda values, step: self.log_dict(values),
            }[how]
            spectral_torch.Watch(log, every_n_steps=3).attach(reg, optimizer)
            return optimizer

    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(torch_batches(torch, 7)), batch_size=None))
    found = logged(tmp_path)
    found.pop("epoch", None)  # Lightning's own
    # `self.log_dict` is for what each step has: Lightning logs the last numbers until there are new
    latest = {0: 0, 3: 3, 6: 6}
    if how == "self.log_dict":
        latest = {step: step // 3 * 3 for step in range(7)}
    assert_logged(found, {step: numbers_of(module.sigma[i]) for step, i in latest.items()})


def test_frozen_weights_count_in_nothing(torch):
    import spectral_torch

    log = []
    model, optimizer, reg = regularized(torch, spectral_torch, n_iter=N_ITER)
    reg.factor = {"0.weight": 0.5, "*": FACTOR}
    watch = spectral_torch.Watch(lambda *args: log.append(args), every_n_steps=1)
    watch.attach(reg, optimizer)
    model[0].requires_grad_(False)
    (sigma,) = train(torch, model, optimizer, 1)
    model[0].requires_grad_(True)
    model[1].requires_grad_(False)
    model[3].requires_grad_(False)
    (first,) = train(torch, model, optimizer, 1)
    model[0].requires_grad_(False)
    optimizer.step()  # no weight takes part: nothing is logged
    del sigma["0.weight"]
    assert log[0] == (pytest.approx(numbers_of(sigma)), 0)
    expected = numbers_of({"0.weight": first["0.weight"]})
    expected["spectral/penalty"] *= 0.5 / FACTOR
    assert log[1] == (pytest.approx(expected), 1)
    assert len(log) == 2


# Weights & Biases, MLflow and JSON lines, each by its own package, without a network


def watched(torch, log, **options):
    """Train with a watch, and return the numbers that it had to log, by step."""
    import spectral_torch

    model, optimizer, reg = regularized(torch, spectral_torch, n_iter=N_ITER)
    with spectral_torch.Watch(log, every_n_steps=4, **options).attach(reg, optimizer):
        sigma = train(torch, model, optimizer, 10)
    return {step: numbers_of(sigma[step]) for step in (0, 4, 8)}


def test_a_run_in_json_lines(torch, tmp_path):
    path = tmp_path / "spectral.jsonl"
    by_step = watched(torch, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("step") for row in rows] == list(by_step)
    for row, expected in zip(rows, by_step.values(), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["run", "module"])
def test_a_run_in_weights_and_biases(torch, tmp_path, monkeypatch, how):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        run.log({"loss": 1.0}, step=50)  # the newest step: older ones would be dropped
        by_step = watched(torch, run if how == "run" else wandb)
    wandb.teardown()  # its own process writes the file: wait for it
    rows = [row for row in history_of(tmp_path) if "spectral/step" in row]
    assert [row["spectral/step"] for row in rows] == list(by_step)
    for row, expected in zip(rows, by_step.values(), strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def history_of(folder):
    """Yield the rows in the file of a run of Weights & Biases that was offline.

    The file has blocks of 32 KiB. A record is in one or several parts, each with a head of seven
    bytes: a checksum, the length, and 1 for a whole record, 2, 3 and 4 for its parts.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    content, at, data = path.read_bytes(), 7, b""
    while at + 7 < len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data = (b"" if kind in (1, 2) else data) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = record.history.item
            yield {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items}


def test_wandb_without_a_run_is_told(torch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.raises(sc.ArgumentError, match=r"wandb\.init\(\) first"):
        sc.Watch(wandb)


def test_a_run_in_mlflow(torch, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("spectral")
    try:
        with mlflow.start_run() as run:
            by_step = watched(torch, mlflow)
        client = mlflow.MlflowClient()
        found = {
            name: {x.step: x.value for x in client.get_metric_history(run.info.run_id, name)}
            for name in client.get_run(run.info.run_id).data.metrics
        }
    finally:
        mlflow.set_tracking_uri(before)
    assert_logged(found, by_step)


def test_names_of_an_equinox_tree_in_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("spectral")
    try:
        with mlflow.start_run() as run, sc.Watch(mlflow) as watch:
            watch(sc.init({"layers[0].weight": np.zeros((2, 2))}), 700)
        found = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    finally:
        mlflow.set_tracking_uri(before)
    assert found["spectral/sigma/layers_0_.weight"] == 0


# JAX


def test_a_jax_run_in_tensorboard(tmp_path):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="PyTorch is not installed")
    import jax.numpy as jnp

    import spectral_jax

    rng = np.random.default_rng(0)
    shapes = {"hidden": (64, 16), "out": (16, 10)}
    params = {  # of which a few iterations find σ: its entries have a mean
        name: {"kernel": jnp.asarray(0.1 + 0.1 * rng.standard_normal(shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    images, labels = digits()
    x, y = jnp.asarray(images.reshape(256, 64), jnp.float32), jnp.asarray(labels)
    tx = optax.chain(
        spectral_jax.add_spectral_norm_regularization(factor=FACTOR, n_iter=12),
        optax.sgd(0.5, momentum=0.9),
    )

    def loss(params):
        logits = jnp.tanh(x @ params["hidden"]["kernel"]) @ params["out"]["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    state, by_step = tx.init(params), {}
    with (
        tensorboard.SummaryWriter(tmp_path) as writer,
        spectral_jax.Watch(writer, factor=FACTOR, every_n_steps=4) as watch,
    ):
        for number in range(10):
            if number % 4 == 0:
                kernels = {name: np.array(layer["kernel"]) for name, layer in params.items()}
                by_step[number] = numbers_of(
                    {f"{name}/kernel": svd_norm(kernel) for name, kernel in kernels.items()}
                )
            params, state = step(params, state)
            watch(state, number)
    assert_logged(logged(tmp_path), by_step, rtol=2e-5)
    assert len({values["spectral/penalty"] for values in by_step.values()}) == 3


def test_logarithms_are_finite_where_a_product_would_not_be(torch, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    weights = {f"layer{i}": np.full((2, 2), 1e5 * (i + 1)) for i in range(80)}
    with SummaryWriter(tmp_path) as writer, sc.Watch(writer, factor=FACTOR) as watch:
        watch(sc.init(weights), 700)
    expected = sum(math.log10(2e5 * (i + 1)) for i in range(80))
    assert expected > 308  # the largest power of ten of a double
    assert logged(tmp_path)["spectral/log10_sigma_product"] == {700: pytest.approx(expected)}


# Examples


def test_the_example_with_tensorboard(torch, tmp_path):
    digits()  # or a skip
    import with_tensorboard

    outcome = with_tensorboard.main(str(tmp_path), epochs=1, every_n_steps=7)
    found = logged(tmp_path)
    for name in ("0.weight", "2.weight", "4.weight"):
        values = found[f"spectral/sigma/{name}"]
        assert list(values) == [0, 7, 14, 21]
        assert values[21] == pytest.approx(outcome[f"sigma of {name}"])  # of the 22nd, the last
    assert outcome["test accuracy"] > 0.3  # of ten classes


def test_the_live_plot(torch, tmp_path):
    digits()
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    pyplot.switch_backend("agg")
    import live_plot

    numbers = live_plot.main(save=str(tmp_path / "out.png"), epochs=1)
    sigma = np.array([values for name, values in numbers.items() if "sigma/" in name])
    assert sigma.shape == (4, 3)
    assert numbers["step"] == [0, 5, 10]
    np.testing.assert_allclose(numbers["penalty"], 0.005 * np.sum(sigma**2, axis=0))
    above, below = pyplot.gcf().axes
    drawn = [line.get_ydata() for line in (*above.lines, *below.lines)]
    np.testing.assert_array_equal(drawn, [*sigma, numbers["penalty"]])
    assert pyplot.imread(tmp_path / "out.png").std() > 0.05
    pyplot.close("all")
