"""float8 weights with scales beside them, and quantized ones that are named and skipped."""

import numpy as np
import pytest

import spectral_core as sc
from checkpoints import safetensors
from spectral_core._report import tiling as module
from spectral_core._report.numbers import widened

rng = np.random.default_rng(7)
DTYPE = "float8_e4m3fn"


def written(tmp_path, shape, scale, name="q.weight_scale_inv", weight="q.weight"):
    codes = rng.integers(0, 0x7E, shape).astype(np.uint8) | (rng.integers(0, 2, shape) << 7).astype(
        np.uint8
    )
    tensors = {weight: ("F8_E4M3", codes), name: ("F32", np.asarray(scale, np.float32))}
    (tmp_path / "w.safetensors").write_bytes(safetensors(tensors))
    return tmp_path / "w.safetensors", widened(codes, DTYPE)


def scales(*shape):
    return rng.uniform(0.001, 0.1, shape).astype(np.float32)


def blocked(scale, size):
    rows, columns = (np.arange(n) // b for n, b in zip(size, (128, 128), strict=True))
    return scale[rows][:, columns]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tile", [2**17, 1000])
def test_blocks_of_128(tmp_path, monkeypatch, tile, turned):
    monkeypatch.setattr(module, "_TILE", tile)
    monkeypatch.setattr(module, "_KEPT", 0)
    shape = (150, 300) if turned else (300, 150)
    scale = scales(*(-(-n // 128) for n in shape))
    path, numbers = written(tmp_path, shape, scale)
    row = sc.report(path)["q.weight"]
    W = numbers * blocked(scale.astype(float), shape)
    assert row.lower <= np.linalg.norm(W, 2) <= row.upper
    assert row.frobenius == pytest.approx(np.linalg.norm(W), rel=1e-12)
    assert row.note == "times its scales, each of 128×128 elements"


@pytest.mark.parametrize(
    ("shape", "spread"),
    [((), (1, 1)), ((1,), (1, 1)), ((1, 1), (1, 1)), ((40,), (40, 1)), ((40, 1), (40, 1))],
)
@pytest.mark.parametrize("name", ["q.weight_scale", "q.scale_weight"])
def test_one_scale_or_one_a_channel(tmp_path, shape, spread, name):
    scale = scales(*shape)
    path, numbers = written(tmp_path, (40, 24), scale, name)
    row = sc.report(path)["q.weight"]
    assert row.lower <= np.linalg.norm(numbers * scale.reshape(spread), 2) <= row.upper
    assert "times its scale" in row.note


def test_groups_of_columns_and_stacks(tmp_path):
    scale = scales(40, 4)
    path, numbers = written(tmp_path, (40, 24), scale)
    W = numbers * np.repeat(scale, 6, axis=1)
    assert sc.report(path)["q.weight"].sigma == pytest.approx(np.linalg.norm(W, 2))
    scale = scales(3, 1, 2)
    path, numbers = written(tmp_path, (3, 20, 200), scale, "experts.up_scale", "experts.up")
    report = sc.report(path)
    W = numbers * scale.repeat(128, axis=2)[:, :, :200]
    for e in range(3):
        assert report[f"experts.up[{e}]"].sigma == pytest.approx(np.linalg.norm(W[e], 2))


def test_layouts_that_reorder(tmp_path):
    scale = scales(24)
    path, numbers = written(tmp_path, (24, 8), scale, "in_proj_weight_scale", "in_proj_weight")
    report = sc.report(path)
    W = (numbers * scale[:, None]).reshape(3, 8, 8)
    for i in range(3):
        assert report[f"in_proj_weight[{i}]"].sigma == pytest.approx(np.linalg.norm(W[i], 2))


def test_live_arrays_have_scales_too():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    codes, scale = rng.integers(0, 0x7E, (40, 24)).astype(np.uint8), scales(40, 1)
    weights = {"q.weight": codes.view(ml_dtypes.float8_e4m3fn), "q.weight_scale": scale}
    row = sc.report(weights)["q.weight"]
    exact = np.linalg.norm(widened(codes, DTYPE) * scale, 2)
    assert row.lower <= exact <= row.upper
    assert row.dtype == DTYPE
    assert "times its scale" in row.note


def test_tensors_of_pytorch_have_scales_too():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    codes = torch.from_numpy(rng.integers(0, 0x7E, (40, 24)).astype(np.uint8))
    weights = {"w": codes.view(torch.float8_e4m3fn).T, "w_scale": torch.tensor([8.0])}
    row = sc.report(weights)["w"]
    assert row.sigma == pytest.approx(8 * np.linalg.norm(widened(codes.numpy(), DTYPE), 2))
    assert row.dtype == DTYPE


def test_a_scale_that_does_not_fit_is_said(tmp_path):
    path, numbers = written(tmp_path, (40, 24), scales(7, 5))
    row = sc.report(path)["q.weight"]
    assert row.sigma == pytest.approx(np.linalg.norm(numbers, 2))
    assert row.note == "without its scale: its shape (7, 5) does not fit"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("x.qweight", "x.qzeros", "x.scales"), "GPTQ or AWQ"),
        (("x.weight", "x.weight.absmax", "x.weight.quant_map"), "bitsandbytes"),
        (("x.weight", "x.SCB"), "bitsandbytes"),
        (("x.weight", "x.weight_scale"), "integers with a scale"),
    ],
)
def test_quantized_integers_are_named(tmp_path, names, reason):
    tensors = {name: ("F32", np.ones((2, 2), np.float32)) for name in names[1:]}
    tensors[names[0]] = ("I32", np.ones((2, 2), np.int32))
    (tmp_path / "w.safetensors").write_bytes(safetensors(tensors))
    assert reason in sc.report(tmp_path / "w.safetensors").skipped[names[0]]
