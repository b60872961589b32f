"""Heads of models of transformers, built from small configurations."""

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
import torch
import transformers

import spectral_core as sc
from heads_by_hand import check, dense

SMALL = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 20}
MODELS = {
    "Llama": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 20},
    "Qwen2": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 20},
    "Gemma": {**SMALL, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 20},
    "GPT2": {"n_embd": 16, "n_head": 4, "n_layer": 1, "vocab_size": 20},
    "Bert": {**SMALL, "intermediate_size": 20},
    "ViT": {**SMALL, "intermediate_size": 20, "image_size": 8, "patch_size": 4},
    "GPTNeoX": {**SMALL, "intermediate_size": 20},
    "DistilBert": {"dim": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 20, "hidden_dim": 20},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name):
    """Each family keeps its heads in its own way: compare with dense products by hand."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}Model")(config).double()
    report = sc.report(model, heads=True)
    assert not report.without_heads
    assert {row.part for row in report.heads} == {
        "W_q", "W_k", "W_v", "W_o", "W_qᵀW_k", "W_oW_v"
    }  # fmt: skip
    q, k, v, o = by_hand(name, dict(model.named_parameters()))
    (layer,) = {row.layer for row in report.heads}
    check(report, dense(q, k, v, o, 4), layer)


def by_hand(name, parameters):
    """Return the matrices of the layer, each as its family's code has them."""
    found = {key: x.detach().numpy() for key, x in parameters.items() if x.ndim == 2}

    def one(end):
        (key,) = (key for key in found if key.endswith(end))
        return found[key]

    if name == "GPT2":
        return *np.split(one("c_attn.weight").T, 3), one("attn.c_proj.weight").T
    if name == "GPTNeoX":
        fused = one("query_key_value.weight").reshape(4, 3, 4, 16)
        return *(fused[:, i].reshape(16, 16) for i in range(3)), one("attention.dense.weight")
    ends = {
        "Bert": ("self.query", "self.key", "self.value", "attention.output.dense"),
        "ViT": [
            next((e for e in ends if any(key.endswith(f"{e}.weight") for key in found)), "")
            for ends in (  # of transformers 5, and before
                ("q_proj", "query"),
                ("k_proj", "key"),
                ("v_proj", "value"),
                ("o_proj", "attention.output.dense"),
            )
        ],
        "DistilBert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    }.get(name, ("q_proj", "k_proj", "v_proj", "o_proj"))
    return tuple(one(f"{end}.weight") for end in ends)
