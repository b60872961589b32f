"""Low-rank updates: their scale, and the weights that they change, as PEFT and kohya name them."""

import json

import numpy as np
import pytest

import spectral_core as sc
from checkpoints import bfloat16, safetensors
from spectral_core._report import matrix as module
from spectral_core._report import tiling
from spectral_core._report.command import main

rng = np.random.default_rng(13)
RANK, M, N = 4, 30, 20
W, A, B = (rng.standard_normal(shape) for shape in ((M, N), (RANK, N), (M, RANK)))
Q = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTER = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
BASE = {"model.layers.0.self_attn.q_proj.weight": W, "model.norm.weight": np.ones(3)}


def save(path, weights):
    path.parent.mkdir(exist_ok=True)
    tensors = {name: ("F64", np.ascontiguousarray(x)) for name, x in weights.items()}
    path.write_bytes(safetensors(tensors))
    return path


def assert_holds(row, exact):
    s = np.linalg.svd(exact, compute_uv=False)
    assert row.lower <= s[0] * (1 + 1e-14)
    assert s[0] * (1 - 1e-14) <= row.upper
    assert row.sigma == pytest.approx(s[0], rel=1e-6)
    assert row.frobenius == pytest.approx(np.linalg.norm(exact))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_weight_with_its_update(monkeypatch, large, wide):
    if large:
        monkeypatch.setattr(module, "MOST_PROVEN", 0)
        for name, value in (("_KEPT", 0), ("_TILE", 64), ("SERIAL", 0)):
            monkeypatch.setattr(tiling, name, value)
    weight, up, down = (W.T, A.T, B.T) if wide else (W, B, A)
    adapter = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    base = {"model.layers.0.self_attn.q_proj.weight": weight}
    report = sc.report(adapter, base=base, lora_scale=0.5)
    row = report[f"{Q} (W + s·B·A)"]
    assert_holds(row, weight + 0.5 * up @ down)
    assert row.upper <= row.lower * (1.1 if large else 1 + 1e-9)
    assert (row.method == "proven") != large
    assert "s = 0.5, rank 4; σ₁ of W alone is" in row.note
    assert_holds(report[f"{Q} (s·B·A)"], 0.5 * up @ down)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"self_attn.q_proj": 2, "q_proj": 1}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 2, "k_proj": 2}}, 2.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"q_proj": 4}}, 2.0),
    ],
)
def test_scale_of_peft(tmp_path, config, scale):
    path = save(tmp_path / "adapter" / "adapter_model.safetensors", ADAPTER)
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    base = save(tmp_path / "base" / "model.safetensors", BASE)
    for source in (path, path.parent):
        report = sc.report(source, base=base)
        assert_holds(report[f"{Q} (s·B·A)"], scale * B @ A)
        assert f"with s = {scale:g}" in report[f"{Q} (s·B·A)"].note
        assert_holds(report[f"{Q} (W + s·B·A)"], W + scale * B @ A)


def test_without_a_scale(tmp_path, capsys):
    path = save(tmp_path / "a" / "adapter.safetensors", ADAPTER)
    base = save(tmp_path / "b" / "model.safetensors", BASE)
    assert main([str(path)]) == 0
    assert "without its scale" in capsys.readouterr().out
    assert main([str(path), "--base", str(base)]) == 2
    message = capsys.readouterr().err
    assert "needs the scale s" in message
    assert "give --lora-scale S" in message
    assert main([str(path), "--base", str(base), "--lora-scale", "1", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["matrices"]}
    assert rows[f"{Q} (W + s·B·A)"]["sigma"] == pytest.approx(np.linalg.norm(W + B @ A, 2))
    assert main([str(path), "--lora-scale", "nan"]) == 2
    assert "it must be a finite number" in capsys.readouterr().err
    for bad in ("2", 10**400):
        with pytest.raises(sc.SpectralError, match="lora_scale is '"):
            sc.report(path, lora_scale=bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora_alpha": "x"}', "is no number"),
        ('{"lora_alpha": 1e999}', "is no number"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "is no number"),
        ('{"alpha_pattern": {"q_proj": 1' + "0" * 400 + "}}", "is no number"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+": 1}}', "is a regular expression"),
        ('{"lora_alpha": 1, "alpha_pattern": 3}', "no object"),
        ("[", "is no JSON"),
    ],
)
def test_bad_configurations(tmp_path, text, message):
    path = save(tmp_path / "a" / "adapter.safetensors", ADAPTER)
    (path.parent / "adapter_config.json").write_text(text)
    with pytest.raises(sc.SpectralError, match=message):
        sc.report(path)


@pytest.mark.parametrize("kind", ["I64", "F16"])
def test_scale_of_the_file_may_be_an_integer(tmp_path, kind):
    factors = {"q.lora_down.weight": ("F64", A), "q.lora_up.weight": ("F64", B)}
    alpha = np.array(8, "i8" if kind == "I64" else "f2")
    (tmp_path / "a.safetensors").write_bytes(safetensors({**factors, "q.alpha": (kind, alpha)}))
    live = {**{name: x for name, (_, x) in factors.items()}, "q.alpha": alpha}
    for source in (tmp_path / "a.safetensors", live):
        assert_holds(sc.report(source)["q (s·B·A)"], 2 * B @ A)


def test_a_third_factor_is_said():
    kernels = {"q.lora_down.weight": A[..., None, None], "q.lora_up.weight": B[..., None, None]}
    middle = {"q.lora_mid.weight": rng.standard_normal((RANK, RANK, 3, 3))}
    report = sc.report({**kernels, **middle})
    assert [name for name in report if "B·A" in name] == []
    assert report.skipped["q (s·B·A)"] == "a factor lora_mid is between B and A"


def test_several_adapters_of_a_module_have_rows_of_their_own():
    C = rng.standard_normal((M, RANK))
    adapter = {
        f"{Q}.lora_A.default.weight": A,
        f"{Q}.lora_B.default.weight": B,
        f"{Q}.lora_A.other.weight": A,
        f"{Q}.lora_B.other.weight": C,
    }
    report = sc.report(adapter, base=BASE, lora_scale=0.5)
    for name, up in (("default", B), ("other", C)):
        assert_holds(report[f"{Q} (s·B·A of {name})"], 0.5 * up @ A)
        assert_holds(report[f"{Q} (W + s·B·A of {name})"], W + 0.5 * up @ A)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"base": BASE}, "--base"),
        ({"lora_scale": 1.0}, "--lora-scale"),
        ({"base": BASE, "lora_scale": 1.0}, "--base and --lora-scale"),
    ],
)
def test_a_base_without_an_update_is_an_error(options, flags):
    with pytest.raises(sc.SpectralError, match=f"no factors of LoRA: leave {flags} out"):
        sc.report(BASE, **options)


def test_options_reach_weights_with_updates(monkeypatch):
    monkeypatch.setattr(module, "MOST_PROVEN", 0)
    for name in ("_KEPT", "SERIAL"):
        monkeypatch.setattr(tiling, name, 0)
    found = sc.report(ADAPTER, base=BASE, lora_scale=2.0, proven=True, spectrum=True)
    row = found[f"{Q} (W + s·B·A)"]
    assert row.method == "proven"
    assert_holds(row, W + 2 * B @ A)
    exact = np.linalg.svd(W + 2 * B @ A, compute_uv=False)
    assert row.spectrum == pytest.approx(exact)


def test_names_of_kohya():
    stem = "lora_unet_down_blocks_0_to_q"
    adapter = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": 8.0}
    adapter[f"{stem}.alpha"] = np.array(8.0)
    report = sc.report(adapter, base={"down_blocks.0.to_q.weight": W})
    assert_holds(report[f"{stem} (W + s·B·A)"], W + 2 * B @ A)


@pytest.mark.parametrize(
    ("base", "stem"),
    [
        ("layers.0.self_attn.q_proj.weight", "base_model.model.layers.0.self_attn.q_proj"),
        ("model.layers.0.q_proj.weight", "base_model.model.layers.0.q_proj"),
        ("layers.0.q_proj.weight", "base_model.model.model.layers.0.q_proj"),
    ],
)
@pytest.mark.parametrize("end", [".weight", ".default.weight"])
def test_prefixes_of_names(base, stem, end):
    adapter = {f"{stem}.lora_A{end}": A, f"{stem}.lora_B{end}": B}
    report = sc.report(adapter, base={base: W}, lora_scale=1.0)
    assert_holds(report[f"{stem} (W + s·B·A)"], W + B @ A)


def test_layers_that_are_transposed_and_kernels():
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    a, b = rng.standard_normal((2, 8)), rng.standard_normal((24, 2))
    w = rng.standard_normal((8, 24))  # of GPT-2: inputs first
    table, ea, eb = (rng.standard_normal(shape) for shape in ((50, 8), (2, 50), (8, 2)))
    kernel, ka, kb = (
        rng.standard_normal(shape) for shape in ((6, 5, 3, 3), (2, 5, 3, 3), (6, 2, 1, 1))
    )
    adapter = {
        f"{stem}.lora_A.weight": a,
        f"{stem}.lora_B.weight": b,
        "wte.lora_embedding_A": ea,
        "wte.lora_embedding_B": eb,
        "conv.lora_A.weight": ka,
        "conv.lora_B.weight": kb,
    }
    base = {"transformer.h.0.attn.c_attn.weight": w, "wte.weight": table, "conv.weight": kernel}
    report = sc.report(adapter, base=base, lora_scale=3.0)
    assert_holds(report[f"{stem} (W + s·B·A)"], w.T + 3 * b @ a)
    assert_holds(report["wte (W + s·B·A)"], table.T + 3 * eb @ ea)
    update = 3 * kb.reshape(6, 2) @ ka.reshape(2, 45)
    assert_holds(report["conv (s·B·A)"], update)
    assert_holds(report["conv (W + s·B·A)"], kernel.reshape(6, 45) + update)


def test_what_fits_no_weight_is_said():
    other = {"model.layers.0.self_attn.k_proj.weight": W}
    name = f"{Q} (W + s·B·A)"
    assert sc.report(ADAPTER, base=other, lora_scale=1).skipped[name] == (
        "the base has no such weight"
    )
    other = {"model.layers.0.self_attn.q_proj.weight": W[:7]}
    assert "not (30, 20)" in sc.report(ADAPTER, base=other, lora_scale=1).skipped[name]
    empty = {"model.layers.0.self_attn.q_proj.weight": W[:0]}
    assert "is empty" in sc.report(ADAPTER, base=empty, lora_scale=1).skipped[name]
    magnitude = {f"{Q}.lora_magnitude_vector": np.ones(M)}
    row = sc.report({**ADAPTER, **magnitude}, base=BASE, lora_scale=1)[name]
    assert "DoRA: without its magnitudes" in row.note


def test_base_in_bfloat16(tmp_path):
    stored = bfloat16(W.astype(np.float32))
    (tmp_path / "b.safetensors").write_bytes(safetensors({"q.weight": ("BF16", stored)}))
    adapter = {"q.lora_A.weight": A, "q.lora_B.weight": B}
    report = sc.report(adapter, base=tmp_path / "b.safetensors", lora_scale=1)
    exact = (stored.astype(np.uint32) << 16).view(np.float32) + B @ A
    assert_holds(report["q (W + s·B·A)"], exact)


def test_what_is_not_finite():
    adapter = {**ADAPTER, f"{Q}.lora_A.weight": np.full((RANK, N), np.nan)}
    report = sc.report(adapter, base=BASE, lora_scale=1)
    for name in (f"{Q} (s·B·A)", f"{Q} (W + s·B·A)"):
        assert report[name].sigma is None
        assert report[name].nonfinite > 0
    json.loads(report.to_json())


@pytest.mark.filterwarnings("error")
def test_an_error_that_is_not_finite_leaves_no_bound():
    factors = {"q.lora_A": np.full((1, 3), 1.7e308), "q.lora_B": np.zeros((2, 1))}
    report = sc.report(factors, base={"q": np.ones((2, 3))}, lora_scale=1.0)
    row = report["q (W + s·B·A)"]
    assert row.sigma == pytest.approx(6**0.5)
    assert (row.lower, row.upper) == (0, None)
    assert "q (W + s·B·A)" in report.above(1e300)
    json.loads(report.to_json())
