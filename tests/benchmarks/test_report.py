import numpy as np
import pytest

import spectral_core as sc
from benchmarks import report


def test_checkpoint_is_what_is_measured(tmp_path, monkeypatch):
    tensors = {"a.weight": (700, 20), "b.weight": (20, 30)}
    path = tmp_path / "model.safetensors"
    report.write_checkpoint(path, tensors)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # numbers are aligned
    found = report.of_report(str(path))
    assert found["matrices"] == 2
    assert found["largest_gap"] >= 0
    assert set(report.of_yardstick(str(path), tensors)) == {
        "read", "decode", "times", "adjoint_times", "cpu_seconds"
    }  # fmt: skip
    for row in sc.report(path).values():
        assert row.frobenius**2 == pytest.approx(row.rows, rel=0.2)


def test_shapes_have_the_size_that_is_asked_for():
    size = sum(2 * m * n for m, n in report.shapes(4.0).values())
    assert size == pytest.approx(4e9, rel=0.1)


def test_differences_are_relative():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    W = np.diag([2.0, 1.0])
    found = sc.report({"0.weight": W}, spectrum=True)
    line = {name: own(found["0.weight"]) for name, own in report.SAME.items()}
    line |= {"longname": "0", "norm": 4.0}
    differences = report.differences(found, pandas.DataFrame([line]))
    assert differences.pop("norm") == pytest.approx(0.25)
    assert max(differences.values()) < 1e-12
