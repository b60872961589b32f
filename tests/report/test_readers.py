"""Each format gives back the numbers that were written."""

from importlib.util import find_spec

import numpy as np
import pytest

import spectral_core as sc
from checkpoints import FORMATS, WEIGHTS, bfloat16, channels_last, safetensors
from spectral_core._report.folders import opened
from spectral_core._report.numbers import stored_dtype, widened


def needing(package):
    skip = package is not None and find_spec(package) is None
    return pytest.mark.skipif(skip, reason=f"{package} is not installed")


EACH = [
    pytest.param((name, write), marks=needing(package), id=name)
    for name, (write, package) in FORMATS.items()
]


@pytest.fixture(params=EACH)
def written(request, tmp_path):
    name, write = request.param
    write(tmp_path / name)
    return tmp_path / name


def test_numbers_come_back(written):
    found = opened(written)
    expected = WEIGHTS
    if found.kind in ("flax", "keras"):
        expected = channels_last("_" if written.is_dir() else "/")
    if written.name == "a.npy":
        expected = {"a": WEIGHTS["out.weight"]}
    read = {x.name: widened(x.load(), x.dtype) for x in found.entries if not x.skip}
    assert set(read) & set(expected) == set(expected) & set(read) != set()
    assert not set(expected) - set(read) - {"conv.weight", "out.bias"}
    for name in set(read) & set(expected):
        wanted = expected[name]
        if written.name == "b.safetensors":
            wanted = (bfloat16(wanted).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(read[name], wanted)


def test_report_has_the_norms(written):
    for row in sc.report(written).values():
        assert row.lower <= row.sigma <= row.upper
        if "out" in row.name and written.name != "b.safetensors":
            exact = np.linalg.norm(WEIGHTS["out.weight"].astype(float), 2)
            assert row.lower <= exact * (1 + 1e-14)
            assert exact * (1 - 1e-14) <= row.upper
            assert (row.rows, row.columns) == (5, 6)
        if "conv" in row.name:
            assert (row.rows, row.columns) == (4, 18)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "bfloat16"])
def test_narrow_floats_are_those_of_ml_dtypes(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    stored = np.arange(2 ** (8 * stored_dtype(dtype).itemsize), dtype=stored_dtype(dtype))
    expected = stored.view(getattr(ml_dtypes, dtype)).astype(np.float64)
    np.testing.assert_array_equal(widened(stored, dtype), expected)


def test_views_and_shared_tensors_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = torch.arange(12.0).reshape(3, 4)
    saved = {"x": x, "turned": x.T, "part": x[1:, ::2], "tied": x, "c": x.to(torch.complex64)}
    torch.save({"model": saved, "step": 3, "q": x.to(torch.float8_e4m3fn)}, tmp_path / "a.pt")
    found = {x.name: x for x in opened(tmp_path / "a.pt").entries}
    assert found["model.tied"].skip == "the same tensor as model.x"
    for name in ("x", "turned", "part", "c"):
        entry = found[f"model.{name}"]
        np.testing.assert_array_equal(widened(entry.load(), entry.dtype), saved[name].numpy())
    np.testing.assert_array_equal(widened(found["q"].load(), "float8_e4m3fn"), x.numpy())


def test_shards_and_folders(tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    parts = {}
    for i, (name, x) in enumerate(WEIGHTS.items()):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        (hub / file).write_bytes(safetensors({name: ("F32", x)}))
        parts[name] = file
    assert {x.name for x in opened(hub).entries} == set(WEIGHTS)
    (hub / "model.safetensors.index.json").write_text(str({"weight_map": parts}).replace("'", '"'))
    assert {x.name for x in opened(hub).entries} == set(WEIGHTS)
    assert {x.name for x in opened(tmp_path).entries} == set(WEIGHTS)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(safetensors({"w": ("F32", np.eye(2))}))


def test_chunks_of_flax(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization", reason="Flax is not installed")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 32)
    x = np.arange(30.0).reshape(5, 6)
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes({"kernel": x}))
    (entry,) = opened(tmp_path / "a.msgpack").entries
    np.testing.assert_array_equal(entry.load(), x)


def test_what_is_not_measured_has_a_reason(tmp_path):
    tensors = {
        "ids": ("I64", np.zeros((2, 2), np.int64)),
        "four": ("F4", np.zeros((2, 2), np.uint8)),
        "bias": ("F32", np.array([1, np.nan], np.float32)),
        "empty": ("F32", np.zeros((0, 3), np.float32)),
    }
    (tmp_path / "a.safetensors").write_bytes(safetensors(tensors))
    report = sc.report(tmp_path / "a.safetensors")
    assert len(report) == 0
    assert "not floating-point" in report.skipped["ids"]
    assert "not a dtype that is read" in report.skipped["four"]
    assert report.skipped["empty"] == "empty"
    assert report.nonfinite == {"bias": 1}


def test_quantized_tensors_of_gguf_are_named(tmp_path):
    FORMATS["a.gguf"][0](tmp_path / "a.gguf")
    assert sc.report(tmp_path / "a.gguf").skipped == {"q.weight": "Q4_0: quantized in blocks"}
