"""Weights that are copied to, or divided among, processes: as on one."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if not torch.distributed.is_available():
    pytest.skip("PyTorch is built without torch.distributed", allow_module_level=True)

from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy  # noqa: E402

import ranks  # noqa: E402
from processes import Processes  # noqa: E402


@pytest.fixture(scope="module")
def four():
    processes = Processes(4)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.close()


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("name", ranks.PLACEMENTS)
@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (torch.float32, {}, 2e-5),
        (torch.float32, {"kernels": True}, 2e-5),
        (torch.bfloat16, {"kernels": True}, 2e-2),
        (torch.bfloat16, {}, 2e-2),
        (torch.float64, {}, 1e-12),
        (torch.float64, {"n_vectors": 2}, 1e-9),
        (torch.float64, {"every_n_steps": 2, "n_iter": 2}, 1e-12),
        (torch.float64, {"target": 2.0}, 1e-12),
        (torch.float64, {"target": 1.0, "power": 1}, 1e-12),
        (torch.complex128, {}, 1e-12),
    ],
    ids=str,
)
def test_a_divided_weight_is_as_a_whole_one(four, name, dtype, options, tolerance):
    for sharded, expected in four.run(ranks.placed, name, dtype, options):
        for what, values in expected.items():
            assert_close(sharded[what], values, tolerance)


def test_kernels_run_what_a_process_holds(four):
    pytest.importorskip("numba", reason="Numba is not installed")
    shapes = ("a", (16, 48)), ("b", (8, 16))
    for added, scaled in four.run(ranks.run_by_kernels):
        assert added == [(n_iter, *each) for n_iter in (1, 0) for each in shapes]
        assert scaled == added


def test_zeros_and_what_is_not_finite_are_as_in_a_whole_weight(four):
    answers = four.run(ranks.zeros_and_nan)
    weights, _ = answers[0]
    for kernels in (True, False):
        for _, found in answers:
            sigmas, before, after = found[kernels]
            for name, W in weights.items():
                v = f"{name}.v"
                if name in ("all zero", "a NaN", "infinite"):
                    assert torch.equal(before[v], after[v])
                    assert sigmas[name] == 0 if name == "all zero" else sigmas[name].isnan()
                else:
                    exact = torch.linalg.matrix_norm(W.double(), 2)
                    assert abs(sigmas[name] / exact - 1) < 1e-6
                assert torch.equal(after[v], answers[0][1][kernels][2][v])  # on every process


def test_the_shards_of_a_step_are_those_of_the_step_before(four):
    for made, held, grads in four.run(ranks.sets_of_shards, 3):
        assert made == 2  # to iterate and to add
        assert not any(x is not None for x in held)
        # The last step has the last factor: σ = √48 and uvᵀ is W/√48.
        for grad in grads.values():
            assert (grad - 0.3).abs().max() < 1e-6


@pytest.mark.parametrize("name", ranks.PLACEMENTS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_a_divided_weight_is_bounded_as_a_whole_one(four, name, dtype, tolerance, normalize):
    for sharded, expected in four.run(ranks.bounded, name, dtype, normalize):
        for what, values in expected.items():
            assert_close(sharded[what], values, tolerance)


def test_vectors_are_all_that_is_sent(four):
    for elements, messages, of_all_kinds, of_penalty in four.run(ranks.traffic):
        assert elements == 64 + 48 + 32 + 16
        assert messages == of_all_kinds == 1  # for all weights together
        assert of_penalty == 1


def test_a_gradient_whose_sum_is_not_taken_yet_gets_the_term_once(four):
    for sums, expected, message, untouched in four.run(ranks.partial_and_wrong_gradients):
        for found in sums:
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert "'b'" in message
        assert untouched  # an error changes no gradient


def test_copies_agree_without_a_word(four):
    expected, expected_sigma = ranks.alone()
    outcomes = four.run(ranks.ddp)
    for weights, sigma, state, messages in outcomes:
        assert messages == 0
        assert_close(weights, expected)
        assert_close(sigma, expected_sigma)
        for key, value in outcomes[0][2].items():
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["sharded", "hybrid"])
def test_fully_sharded_training_is_as_on_one(four, mesh):
    expected, expected_sigma = ranks.alone()
    for weights, sigma in four.run(ranks.fsdp, mesh):
        assert_close(weights, expected)
        assert_close(sigma, expected_sigma)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, 1e-5),
        (
            {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
            0.1,
        ),  # 0.2 without the term
    ],
    ids=["float32", "offloaded", "bfloat16"],
)
def test_fully_sharded_steps_that_a_scaler_skips(two, options, tolerance, fused):
    expected, expected_sigma, moved, scale = ranks.with_scaler(ranks.net(), overflow_at=3)
    assert moved == [True, True, True, False, True, True]
    for weights, sigma, also_moved, same_scale in two.run(ranks.scaled, 3, fused, options):
        assert also_moved == moved
        assert same_scale == scale
        assert_close(weights, expected, tolerance)  # without the term it would be 0.2
        assert_close(sigma, expected_sigma, tolerance)


@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["tensor", "tensor and data"])
def test_tensor_parallel_training_is_as_on_one(four, mesh):
    for (weights, sigma), (expected, expected_sigma) in four.run(ranks.tensor_parallel, mesh):
        assert_close(weights, expected)
        assert_close(sigma, expected_sigma)


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_four_save_and_two_resume(four, two, tmp_path, every_n_steps):
    expected, expected_sigma = four.run(ranks.save, str(tmp_path), every_n_steps)[0]
    for weights, sigma in two.run(ranks.resume, str(tmp_path), every_n_steps):
        assert_close(weights, expected)
        assert_close(sigma, expected_sigma)
