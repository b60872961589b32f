"""Norms of attention heads against dense products in float64."""

import json

import numpy as np
import pytest

import spectral_core as sc
from heads_by_hand import check, dense
from spectral_core._report import matrix as module
from spectral_core._report.command import main
from spectral_core.errors import ArgumentError

rng = np.random.default_rng(11)
D, H, SIZE = 12, 4, 3


def separate(keys=H, stem="model.layers.0.self_attn", names=("q_proj", "k_proj", "v_proj")):
    rows = (H, keys, keys)
    return {
        f"{stem}.{name}.weight": rng.standard_normal((n * SIZE, D))
        for name, n in zip(names, rows, strict=True)
    }


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_heads_that_share_keys(keys):
    weights = separate(keys)
    o = rng.standard_normal((D, H * SIZE))
    weights["model.layers.0.self_attn.o_proj.weight"] = o
    expected = dense(*list(weights.values())[:3], o, H)
    for options in ({"heads": H}, {"config": {"num_attention_heads": H}}):
        report = sc.report(weights, **options)
        check(report, expected, "model.layers.0.self_attn")
        assert not report.without_heads


def test_bounds_of_large_parts_are_proven(monkeypatch):
    monkeypatch.setattr(module, "MOST_PROVEN", 0)
    for row in sc.report(separate(), heads=H).heads:
        for lower, upper in zip(row.lower, row.upper, strict=True):
            assert upper <= lower * (1 + 1e-9), row.part


def test_fused_matrices():
    q, k, v, o = (rng.standard_normal((D, D)) for _ in range(4))
    weights = {
        "h.0.attn.c_attn.weight": np.concatenate([q, k, v]).T.copy(),  # of GPT-2: transposed
        "h.0.attn.c_proj.weight": o.T.copy(),
        "blocks.0.attn.qkv.weight": np.concatenate([q, k, v]),
        "blocks.0.attn.proj.weight": o,
        "mha.in_proj_weight": np.concatenate([q, k, v]),
        "mha.out_proj.weight": o,
        "neox.query_key_value.weight": np.stack(
            [x.reshape(H, SIZE, D) for x in (q, k, v)], 1
        ).reshape(-1, D),
        "neox.dense.weight": o,
        "phi.qkv_proj.weight": np.concatenate([q, k[: 2 * SIZE], v[: 2 * SIZE]]),
        "phi.o_proj.weight": o,
    }
    report = sc.report(weights, heads=H)
    expected = dense(q, k, v, o, H)
    for layer in ("h.0.attn", "blocks.0.attn", "mha", "neox"):
        check(report, expected, layer)
    check(report, dense(q, k[: 2 * SIZE], v[: 2 * SIZE], o, H), "phi")


@pytest.mark.parametrize(
    ("names", "out", "end"),
    [
        (("query_dense", "key_dense", "value_dense"), "output_dense", "/vars/0"),
        (("query", "key", "value"), "attention_output", "/kernel"),
    ],
)
def test_attention_of_keras(names, out, end, tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    q, k, v, o = (rng.standard_normal((D, D)) for _ in range(4))
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        for name, x in zip(names, (q, k, v), strict=True):
            file[f"layers/attention/{name}{end}"] = x.T.reshape(D, H, SIZE)
            file[f"layers/attention/{name}/vars/1"] = np.zeros((H, SIZE))
        file[f"layers/attention/{out}{end}"] = o.T.reshape(H, SIZE, D)
    report = sc.report(tmp_path / "m.weights.h5", heads=H)
    check(report, dense(q, k, v, o, H), "layers/attention")
    if end == "/vars/0":  # biases with a row a head are no matrices
        assert all(row.tensor.endswith("/vars/0") for row in report.values())


def test_without_an_output_its_products_are_left_out():
    weights = separate(names=("query", "key", "value"), stem="attention.self")
    parts = [row.part for row in sc.report(weights, heads=H).heads]
    assert parts == ["W_q", "W_k", "W_v", "W_qᵀW_k"]


@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
def test_an_empty_weight_is_said_and_ends_no_report(part):
    name = f"model.layers.0.self_attn.{part}.weight"
    weights = {**separate(), name: np.ones((0, D)), "w": np.eye(2)}
    report = sc.report(weights, heads=H)
    assert report.without_heads == {"model.layers.0.self_attn": f"{name} is empty"}
    assert report["w"].sigma == 1


def test_what_does_not_fit_is_said():
    report = sc.report(separate(), heads=5)
    assert report.heads == []
    (reason,) = report.without_heads.values()
    assert reason == "12 rows of queries and 12 of keys do not fit 5 heads"
    assert reason in report.table()
    weights = separate()
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = np.nan
    rows = {row.part: row for row in sc.report(weights, heads=H).heads}
    assert rows["W_q"].sigma[0] is None
    assert rows["W_qᵀW_k"].sigma[0] is None
    assert rows["W_q"].sigma[1] is not None
    json.loads(sc.report(weights, heads=H).to_json())


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": H},
        {"n_head": H},
        {"num_heads": H},
        {"text_config": {"num_attention_heads": H}, "vision_config": {"num_attention_heads": 5}},
        {"num_attention_heads": H, "num_key_value_heads": H, "head_dim": SIZE},
    ],
)
def test_configuration_beside_the_weights(tmp_path, capsys, config):
    path = tmp_path / "w.npz"
    np.savez(path, **separate())
    assert main([str(path), "--heads"]) == 2
    message = capsys.readouterr().err
    assert "there is no config.json beside the weights; give --heads N or --config PATH" in message
    (tmp_path / "config.json").write_text(json.dumps(config))
    for arguments in (["--heads"], ["--config", str(tmp_path)], [f"--heads={H}"]):
        assert main([str(path), "--json", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)["heads"]
        assert [len(row["sigma"]) for row in found] == [H] * 4
    assert main([str(path), "--heads"]) == 0
    assert "self_attn W_qᵀW_k, 4 heads: σ₁ from" in capsys.readouterr().out


def test_what_has_no_heads_is_an_error(tmp_path):
    with pytest.raises(sc.SpectralError, match="no layer of attention is known"):
        sc.report({"fc.weight": np.eye(4)}, heads=2)
    with pytest.raises(sc.SpectralError, match="leave one of them out"):
        sc.report(separate(), heads=H, config={"num_attention_heads": H})


def test_bad_configurations(tmp_path, capsys):
    path = tmp_path / "w.npz"
    np.savez(path, **separate())
    (tmp_path / "config.json").write_text('{"num_attention_heads": "many"}')
    assert main([str(path), "--heads"]) == 2
    assert "config.json has none of num_attention_heads" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main([str(path), "--heads"]) == 2
    assert "is no JSON" in capsys.readouterr().err
    assert main([str(path), "--config", str(tmp_path / "none.json")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--heads", str(path)])
    assert "put the path first" in capsys.readouterr().err
    for heads in (0, 2.5, "4"):
        with pytest.raises(ArgumentError, match="heads must be an integer ≥ 1"):
            sc.report(path, heads=heads)
    assert len(sc.report(separate(), heads=np.int64(H)).heads[0].sigma) == H
