import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest

import spectral_core as sc
from spectral_core import errors
from spectral_core._report.command import main

rng = np.random.default_rng(0)


@pytest.fixture
def path(tmp_path):
    weights = {"a": np.diag([3.0, 1.0]), "conv": rng.standard_normal((4, 3, 3, 3)), "b": np.ones(2)}
    np.savez(tmp_path / "w.npz", **weights)
    return tmp_path / "w.npz"


def test_report_is_a_mapping(path):
    report = sc.report(path)
    assert list(report) == ["a", "conv"]
    assert report.sigma["a"] == pytest.approx(3)
    assert report["a"].stable_rank == pytest.approx(10 / 9)
    assert report["a"].relative == pytest.approx(3)
    assert report.log10_product == pytest.approx(sum(np.log10(x) for x in report.sigma.values()))
    assert report.skipped == {"b": "not a matrix: fewer than two axes"}
    assert "1 tensors are skipped" in repr(report)
    assert "<table>" in report._repr_html_()


def test_norm_of_a_convolution(path):
    report = sc.report(path)
    kernel = np.load(path)["conv"]
    expected = sc.convolution_norm(kernel, "oihw")
    row = report["conv"]
    assert row.convolution_lower <= expected.upper
    assert expected.lower <= row.convolution_upper <= expected.upper * 1.011
    assert sc.report(path, convolutions=False)["conv"].convolution_upper is None


def test_outputs_agree(path, capsys):
    report = sc.report(path)
    assert main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["largest"] == report.largest
    assert [row["sigma"] for row in found["matrices"]] == list(report.sigma.values())
    assert main([str(path), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["sigma"]) for row in rows] == list(report.sigma.values())
    assert main([str(path), "--top", "1"]) == 0
    assert "conv" in capsys.readouterr().out
    assert len(report.table(top=1).splitlines()) == len(report.table().splitlines()) - 1


def test_to_pandas(path):
    pytest.importorskip("pandas", reason="pandas is not installed")
    report = sc.report(path)
    assert report.to_pandas()["sigma"].to_dict() == report.sigma


@pytest.mark.parametrize(("bound", "code"), [("2.9", 1), ("1e3", 0)])
def test_exit_code_by_a_bound(path, bound, code, capsys):
    assert main([str(path), "--fail-above", bound]) == code
    assert ("above 2.9" in capsys.readouterr().err) == bool(code)


def test_what_is_not_finite_is_above_each_bound(tmp_path, capsys):
    np.savez(tmp_path / "w.npz", a=np.array([[np.nan, 1.0]]))
    assert main([str(tmp_path / "w.npz"), "--fail-above", "1e9"]) == 1
    assert main([str(tmp_path / "w.npz"), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :])["summary"]["nonfinite"] == ["a"]


def test_layout_option(path, capsys):
    assert main([str(path), "--layout", "conv=hwio", "--layout", "a=skip", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["matrices"]
    assert (row["rows"], row["columns"], row["guessed"]) == (3, 36, False)
    assert main([str(path), "--layout", "conv=oi"]) == 2
    assert main([str(path), "--layout", "nonsense"]) == 2


def test_a_pattern_that_fits_nothing_is_an_error(path, capsys):
    assert main([str(path), "--layout", "cnov=hwio"]) == 2
    said = capsys.readouterr().err
    assert "'cnov'" in said
    assert "such as" in said
    weights = {"w": np.eye(2), "b": np.zeros(2)}
    for measured in (sc.report, lambda x, **how: sc.compare(x, x, **how)):
        with pytest.raises(errors.NamesError, match="none of the 2 names"):
            measured(weights, layouts={"*.weight": "oi"})
        measured(weights, layouts={"b": None})  # a vector has a name, too


def test_a_name_with_brackets_is_its_own_pattern():
    (row,) = sc.report({"w[0]": np.ones((2, 3))}, layouts={"w[0]": "io"}).values()
    assert (row.rows, row.columns) == (3, 2)


def test_outliers_and_dead_layers():
    weights = {f"w{i}": rng.standard_normal((8, 8)) for i in range(10)}
    report = sc.report({**weights, "far": 100 * weights["w0"], "zero": np.zeros((3, 3))})
    assert report.outliers == ["far"]
    assert report.summary()["dead"] == ["zero"]
    assert sc.report(dict(list(weights.items())[:3])).outliers == []
    equal = {f"w{i}": np.eye(3) for i in range(9)}
    assert sc.report({**equal, "a": 1.9 * np.eye(3), "b": 3 * np.eye(3)}).outliers == ["b"]


def test_lora_pairs():
    A, B = rng.standard_normal((2, 6)), rng.standard_normal((5, 2))
    report = sc.report({"q.lora_A.weight": A, "q.lora_B.weight": B})
    row = report["q (B·A)"]
    exact = np.linalg.norm(B @ A, 2)
    assert row.lower <= exact <= row.upper
    assert row.frobenius == pytest.approx(np.linalg.norm(B @ A))
    assert row.upper - row.lower < 1e-8


def test_stacks_have_a_row_a_matrix():
    x = rng.standard_normal((12, 4))
    report = sc.report({"x": x}, layouts={"x": sc.Layout("(go)i", 3)})
    assert list(report) == ["x[0]", "x[1]", "x[2]"]
    assert report["x[1]"].sigma == pytest.approx(np.linalg.norm(x[4:8], 2))


def test_live_models():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Conv2d(2, 4, 3)).bfloat16()
    report = sc.report(model)
    assert list(report) == ["0.weight", "1.weight"]
    exact = np.linalg.norm(model[0].weight.detach().double().numpy(), 2)
    assert report["0.weight"].sigma == pytest.approx(exact)
    with pytest.raises(sc.SpectralError, match="not a int"):
        sc.report(3)


def test_mappings_may_hold_lists_and_tuples():
    source = {"layers": [{"w": np.eye(2)}, (np.eye(3), "relu")], "step": 7}
    assert list(sc.report(source)) == ["layers/0/w", "layers/1/0"]
    source["layers"].append(source["layers"])
    with pytest.raises(sc.SpectralError, match="holds itself"):
        sc.report(source)


def test_bytes_may_be_in_another_order():
    x = rng.standard_normal((3, 4)).astype(">f4")
    assert sc.report({"w": x})["w"].sigma == sc.report({"w": x.astype("<f4")})["w"].sigma


def test_numbers_that_float64_does_not_hold_are_skipped():
    x = np.ones((2, 2), np.longdouble)
    if x.itemsize == 8:
        pytest.skip("longdouble is float64 here")
    report = sc.report({"w": x, "z": x + 0j})
    assert not report
    assert "not a dtype that is read" in report.skipped["w"]
    assert "not a dtype that is read" in report.skipped["z"]


def test_what_stores_not_all_of_its_elements_is_skipped():
    masked = np.ma.masked_array(np.ones((2, 2)), [[0, 1], [0, 0]])
    report = sc.report({"w": masked, "v": np.eye(2)})
    assert list(report) == ["v"]
    assert "masked" in report.skipped["w"]


def test_module_runs_as_a_command(path):
    found = subprocess.run(
        [sys.executable, "-m", "spectral_core", "report", str(path), "--csv"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("name,tensor,shape")
    bad = subprocess.run([sys.executable, "-m", "spectral_core"], capture_output=True, text=True)
    assert bad.returncode == 2


def test_import_of_the_core_does_not_import_the_report():
    code = "import sys, spectral_core; print([x for x in sys.modules if '_report.' in x])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_bounds_are_printed_outward():
    x = rng.standard_normal((9, 7))
    report = sc.report({f"w{i}": x * 1.1**i for i in range(20)})
    for row, cells in zip(report.values(), report.cells(), strict=True):
        lower, upper = map(float, cells[4].strip("[]").split(", "))
        assert lower <= row.lower <= row.upper <= upper


def test_subnormal_numbers():
    row = sc.report({"w": np.full((3, 3), 5e-324)})["w"]
    assert row.lower <= 15e-324 <= row.upper
