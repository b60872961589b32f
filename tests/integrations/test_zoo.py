"""Which parameters of 75 architectures are weights, against the products that a forward pass makes.

The models are tiny and built from configurations: nothing is downloaded. A forward pass records
each product of a matrix. That list is independent of the library's: it knows no class and no name.
"""

import warnings
from copy import deepcopy
from math import prod

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import spectral_core as sc
from spectral_torch import SpectralNormRegularizer
from spectral_torch._select import choose_parameters

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
CAUSAL = {**TEXT, "num_key_value_heads": 1}
SWIN = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 20,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
SEQUENCES = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 20,
}
MODELS = {
    "bert": ("BertForMaskedLM", TEXT),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 20},
    ),
    "openai-gpt": (
        "OpenAIGPTLMHeadModel",
        {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 20},
    ),
    "llama": ("LlamaForCausalLM", CAUSAL),
    "mistral": ("MistralForCausalLM", CAUSAL),
    "mixtral": ("MixtralForCausalLM", {**CAUSAL, "num_local_experts": 3}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**CAUSAL, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **CAUSAL,
            "num_experts": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            **CAUSAL,
            "num_experts": 3,
            "moe_intermediate_size": 12,
            "num_experts_per_tok": 2,
            "head_dim": 8,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
    "bart": ("BartForConditionalGeneration", SEQUENCES),
    "vit": ("ViTForImageClassification", VISION),
    "swin": (
        "SwinForImageClassification",
        SWIN,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in SEQUENCES.items() if k != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 10,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForPreTraining",
        {**AUDIO, "codevector_dim": 8, "proj_codevector_dim": 8, "num_codevectors_per_group": 4},
    ),
    "hubert": ("HubertModel", AUDIO),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {
            "vocab_size": 40,
            "dim": 16,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 20,
        },
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**TEXT, "projection_dim": 8},
            "vision_config": {**VISION, "projection_dim": 8},
            "projection_dim": 8,
        },
    ),
    "siglip": ("SiglipModel", {"text_config": TEXT, "vision_config": VISION}),
    "deberta": ("DebertaModel", TEXT),
    "deberta-v2": ("DebertaV2Model", TEXT),
    "albert": ("AlbertForMaskedLM", {**TEXT, "embedding_size": 8}),
    "electra": ("ElectraForPreTraining", {**TEXT, "embedding_size": 8}),
    "roberta": ("RobertaForMaskedLM", TEXT),
    "xlm-roberta": ("XLMRobertaModel", TEXT),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "phi": ("PhiForCausalLM", TEXT),
    "phi3": ("Phi3ForCausalLM", {**CAUSAL, "pad_token_id": 0}),
    "gemma": ("GemmaForCausalLM", {**CAUSAL, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**CAUSAL, "head_dim": 8}),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 20,
            "word_embed_proj_dim": 8,
        },
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "gptj": (
        "GPTJForCausalLM",
        {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 20,
            "rotary_dim": 4,
        },
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 1,
            "attention_types": [[["global"], 1]],
            "num_heads": 2,
            "max_position_embeddings": 20,
        },
    ),
    "gpt_bigcode": (
        "GPTBigCodeForCausalLM",
        {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 20},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 12],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
        },
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", VISION),
    "beit": (
        "BeitForImageClassification",
        {**VISION, "use_relative_position_bias": True, "out_indices": [1], "vocab_size": 20},
    ),
    "dinov2": ("Dinov2Model", {**{k: v for k, v in VISION.items() if k != "intermediate_size"}}),
    "longformer": ("LongformerModel", {**TEXT, "attention_window": 4}),
    "reformer": (
        "ReformerModel",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attn_layers": ["local", "lsh"],
            "num_attention_heads": 2,
            "attention_head_size": 8,
            "feed_forward_size": 24,
            "axial_pos_shape": [4, 5],
            "axial_pos_embds_dim": [8, 8],
            "max_position_embeddings": 20,
            "num_buckets": 4,
            "is_decoder": False,
        },
    ),
    "big_bird": ("BigBirdModel", {**TEXT, "attention_type": "original_full"}),
    "funnel": (
        "FunnelModel",
        {
            "vocab_size": 40,
            "block_sizes": [1, 1],
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "num_decoder_layers": 1,
        },
    ),
    "convbert": ("ConvBertModel", {**TEXT, "num_groups": 2, "embedding_size": 8}),
    "squeezebert": (
        "SqueezeBertModel",
        {
            **TEXT,
            "embedding_size": 16,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
    ),
    "mobilebert": (
        "MobileBertModel",
        {**TEXT, "embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8},
    ),
    "sam": (
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "output_channels": 8,
                "mlp_dim": 24,
                "num_pos_feats": 4,
                "window_size": 2,
                "global_attn_indexes": [0],
            },
            "mask_decoder_config": {
                "hidden_size": 8,
                "mlp_dim": 12,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 8,
                "iou_head_depth": 2,
                "attention_downsample_rate": 1,
            },
            "prompt_encoder_config": {
                "hidden_size": 8,
                "image_size": 16,
                "patch_size": 8,
                "mask_input_channels": 4,
            },
        },
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 1,
            "max_seq_len": 20,
            "vocab_size": 40,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2},
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {**CAUSAL, "num_experts": 3, "num_experts_per_tok": 2}),
    "jetmoe": (
        "JetMoeForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "kv_channels": 4,
            "intermediate_size": 12,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "max_position_embeddings": 20,
        },
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {**CAUSAL, "num_local_experts": 3}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **CAUSAL,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 6,
            "kv_lora_rank": 6,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 0,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **CAUSAL,
            "num_local_experts": 3,
            "intermediate_size_mlp": 24,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 2,
            "num_experts": 3,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **CAUSAL,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {
            **CAUSAL,
            "num_hidden_layers": 3,
            "lru_width": 16,
            "attention_window_size": 8,
            "head_dim": 8,
        },
    ),
    "rwkv": (
        "RwkvForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "intermediate_size": 24,
            "context_length": 16,
        },
    ),
    "perceiver": (
        "PerceiverModel",
        {
            "num_latents": 4,
            "d_latents": 8,
            "d_model": 8,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
        },
    ),
    "blip-2": (
        "Blip2Model",
        {
            "vision_config": VISION,
            "qformer_config": {**TEXT, "encoder_hidden_size": 16},
            "text_config": {
                "model_type": "opt",
                "vocab_size": 40,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "ffn_dim": 24,
                "max_position_embeddings": 20,
                "word_embed_proj_dim": 16,
            },
            "num_query_tokens": 4,
            "image_token_index": 39,
        },
    ),
    "blip": ("BlipModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8}),
    "layoutlm": ("LayoutLMModel", {**TEXT, "max_2d_position_embeddings": 16}),
    "vits": (
        "VitsModel",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "flow_size": 8,
            "spectrogram_bins": 9,
            "prior_encoder_num_flows": 1,
            "prior_encoder_num_wavenet_layers": 1,
            "posterior_encoder_num_wavenet_layers": 1,
            "upsample_initial_channel": 16,
            "upsample_rates": [2],
            "upsample_kernel_sizes": [4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1]],
            "depth_separable_num_layers": 1,
            "duration_predictor_num_flows": 1,
            "duration_predictor_filter_channels": 8,
            "window_size": 2,
            "wavenet_kernel_size": 3,
        },
    ),
    "encodec": (
        "EncodecModel",
        {
            "num_filters": 4,
            "hidden_size": 8,
            "codebook_size": 8,
            "upsampling_ratios": [2, 2],
            "num_lstm_layers": 1,
        },
    ),
    "detr": (
        "DetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 12],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_queries": 4,
        },
    ),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": 40, "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 20},
    ),
    "codegen": (
        "CodeGenForCausalLM",
        {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 4,
            "n_positions": 20,
            "rotary_dim": 4,
        },
    ),
    "ctrl": (
        "CTRLLMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20, "dff": 24},
    ),
    "xlm": (
        "XLMModel",
        {
            "vocab_size": 40,
            "emb_dim": 16,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 20,
        },
    ),
    "marian": ("MarianMTModel", {**SEQUENCES, "pad_token_id": 0}),
    "m2m_100": ("M2M100ForConditionalGeneration", {**SEQUENCES, "pad_token_id": 0}),
    "efficientnet": (
        "EfficientNetModel",
        {
            "image_size": 16,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "hidden_dim": 320,
            "kernel_sizes": [3],
            "in_channels": [8],
            "out_channels": [8],
            "depthwise_padding": [],
            "strides": [1],
            "num_block_repeats": [1],
            "expand_ratios": [1],
        },
    ),
    "mobilevit": (
        "MobileViTModel",
        {
            "image_size": 32,
            "patch_size": 2,
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8],
            "num_attention_heads": 2,
        },
    ),
    "swinv2": (
        "Swinv2Model",
        SWIN,
    ),
    "videomae": (
        "VideoMAEForPreTraining",
        {
            **VISION,
            "num_frames": 4,
            "decoder_hidden_size": 8,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 12,
        },
    ),
    "vit_mae": (
        "ViTMAEForPreTraining",
        {
            **VISION,
            "decoder_hidden_size": 8,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 12,
        },
    ),
    "decision_transformer": (
        "DecisionTransformerModel",
        {
            "state_dim": 5,
            "act_dim": 3,
            "hidden_size": 16,
            "n_layer": 1,
            "n_head": 2,
            "max_ep_len": 12,
            "vocab_size": 1,
            "n_positions": 20,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **CAUSAL,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 8,
            "conv_L_cache": 3,
        },
    ),
    "imagegpt": (
        "ImageGPTModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20},
    ),
    "levit": (
        "LevitModel",
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [1, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "attention_ratio": [2, 2, 2],
            "mlp_ratio": [2, 2, 2],
        },
    ),
}
# Looked up or compared, and not weights, although a product reads them.
PRODUCTS_WITHOUT_A_WEIGHT = {
    "xlnet": ["seg_embed"],
    "funnel": ["seg_embed"],
    "sam": ["positional_embedding", "rel_pos_"],
    "vits": ["emb_rel_"],
    "deberta": ["rel_embeddings"],
    "deberta-v2": ["rel_embeddings"],
}

IMAGES = {
    **dict.fromkeys(["vit", "swin", "convnext", "deit", "beit", "dinov2", "resnet"], 16),
    **dict.fromkeys(["segformer", "efficientnet", "swinv2", "vit_mae", "detr", "sam"], 16),
    **dict.fromkeys(["mobilevit", "levit"], 32),
}
WITH_DECODER = ["t5", "bart", "marian", "m2m_100", "switch_transformers"]


def inputs(kind, model):
    """Return what a forward pass takes."""
    text = torch.arange(3, 11)[None]
    if kind in WITH_DECODER:
        return {"input_ids": text, "decoder_input_ids": text}
    if kind in IMAGES:
        return {"pixel_values": torch.randn(1, 3, IMAGES[kind], IMAGES[kind])}
    if kind == "blip-2":  # a token for each query
        text[0, :4] = model.config.image_token_index
    if kind in ("clip", "siglip", "blip", "blip-2"):
        return {"input_ids": text, "pixel_values": torch.randn(1, 3, 16, 16)}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(1, 64)}
    if kind == "encodec":
        return {"input_values": torch.randn(1, 1, 64)}
    if kind == "whisper":
        return {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": text}
    if kind == "videomae":
        mask = torch.tensor([[True, False] * 4])
        return {"pixel_values": torch.randn(1, 4, 3, 16, 16), "bool_masked_pos": mask}
    if kind == "perceiver":
        return {"inputs": torch.randn(1, 5, 8)}
    if kind == "reformer":
        return {"input_ids": torch.arange(20)[None]}
    if kind == "decision_transformer":
        states, actions = torch.randn(1, 4, 5), torch.randn(1, 4, 3)
        returns, steps = torch.randn(1, 4, 1), torch.arange(4)[None]
        return {
            "states": states,
            "actions": actions,
            "rewards": returns,
            "returns_to_go": returns,
            "timesteps": steps,
            "attention_mask": torch.ones(1, 4),
        }
    return {"input_ids": text}


class Products(TorchFunctionMode):
    """Record the singular values of the matrices that each parameter is multiplied as."""

    def __init__(self, model):
        super().__init__()
        self.seen, self.looked_up, self.sigmas = set(), set(), {}
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}

    def name_of(self, x):
        return self._names.get(x.untyped_storage().data_ptr())

    def record(self, x, matrices):
        name = self.name_of(x)
        if name is not None and x.ndim > 1:
            matrices = matrices.reshape(-1, *matrices.shape[-2:]).detach().double().numpy()
            found = np.linalg.svd(matrices, compute_uv=False)[:, 0]
            self.sigmas.setdefault(name, []).extend(found)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in [*args, *kwargs.values()]:
            for y in x if isinstance(x, list | tuple) else [x]:
                if isinstance(y, torch.Tensor) and y.layout == torch.strided:
                    self.seen.add(self.name_of(y))
        kind = func.__name__
        if kind == "linear":
            self.record(args[1], args[1])
        elif kind in ("embedding", "embedding_bag"):
            self.looked_up.add(self.name_of(args[1]))
        elif kind in ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm"):
            for x in args[:2]:
                self.record(x, x)
        elif kind in ("addmm", "baddbmm"):
            for x in [*args[1:3], *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs)]:
                self.record(x, x)
        elif kind.startswith("conv"):
            self._record_convolution(kind, *args, **kwargs)
        elif kind == "einsum":
            self._record_einsum(*args)
        elif kind == "lstm":
            for x in args[2]:
                self.record(x, x)
        elif kind == "multi_head_attention_forward":
            for x in (args[5], args[11]):
                self.record(x, x)
        return func(*args, **kwargs)

    def _record_convolution(self, kind, x, weight, *args, **kwargs):
        transposed = "transpose" in kind
        groups = kwargs.get("groups", args[4] if len(args) > 4 else 1)
        w = weight.reshape(groups, -1, *weight.shape[1:])  # a group's inputs, if transposed
        if transposed:
            w = w.transpose(1, 2)
        self.record(weight, w.reshape(*w.shape[:2], -1))

    def _record_einsum(self, equation, *operands):
        inputs, output = equation.replace(" ", "").split("->")
        first, second = inputs.split(",")
        operands = operands[0] if isinstance(operands[0], list | tuple) else operands
        for own, other, x in ((first, second, operands[0]), (second, first, operands[1])):
            rows = [at for at, a in enumerate(own) if a in output and a not in other]
            columns = [at for at, a in enumerate(own) if a not in output]
            stack = [at for at, a in enumerate(own) if a in output and a in other]
            if rows and columns:
                sizes = [prod(x.shape[at] for at in part) for part in (rows, columns)]
                self.record(x, x.permute(*stack, *rows, *columns).reshape(-1, *sizes))


def build(kind):
    name, options = MODELS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class(**options)
    config._experts_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # no zeros, and no two equal singular values
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return request.param, build(request.param)


def test_chosen_are_the_matrices_of_products(case):
    kind, model = case
    with warnings.catch_warnings():
        warnings.simplefilter("error", sc.SpectralWarning)
        chosen = choose_parameters(model, None, None, None)
    products = Products(model)
    with torch.no_grad(), products:
        model(**inputs(kind, model))
    candidates = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert chosen.parameters.keys() | chosen.left_out.keys() == candidates
    excepted = PRODUCTS_WITHOUT_A_WEIGHT.get(kind, [])
    weights = {
        name
        for name in products.sigmas.keys() - products.looked_up
        if not any(part in name for part in excepted)
    }
    assert weights <= chosen.parameters.keys()
    others = {name for name in chosen.parameters if "parametrizations" not in name} - weights
    assert others & products.seen == set()  # this pass has no use for them
    assert weights  # the pass was seen
    for name in weights:
        matrix = sc.as_matrix(model.get_parameter(name).detach().double(), chosen.layouts[name])
        own = np.linalg.svd(matrix.numpy(), compute_uv=False)[..., 0].ravel()
        for sigma in products.sigmas[name]:  # of the experts that had a token, and so on
            assert np.isclose(own, sigma, rtol=1e-4).any(), (name, own, sigma)


def test_sigma_is_that_of_svd(case):
    _, model = case
    model = deepcopy(model).double()
    reg = SpectralNormRegularizer(model, warmup_iters=100)
    layouts = choose_parameters(model, None, None, None).layouts
    assert list(reg.sigmas()) == list(layouts)
    for name, sigma in reg.sigmas().items():
        matrix = sc.as_matrix(model.get_parameter(name).detach(), layouts[name])
        expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[..., 0]
        np.testing.assert_allclose(sigma, expected, rtol=1e-2, err_msg=name)


def lora(kind, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build(kind), peft.LoraConfig(r=2, **options))


@pytest.mark.parametrize(
    ("kind", "options", "targets"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, 1),
        ("bert", {"target_modules": ["query", "value"]}, 2),
        ("llama", {"target_modules": "all-linear"}, 7),
        ("bert", {"target_modules": ["query"], "use_dora": True}, 1),
        ("resnet", {"target_modules": ["classifier.1"]}, 1),
    ],
)
def test_low_rank_factors_are_weights_and_their_bases_are_not(kind, options, targets):
    model = lora(kind, **options)
    chosen = choose_parameters(model, None, None, None)
    assert {name.split(".")[-3] for name in chosen.parameters} == {"lora_A", "lora_B"}
    assert len(chosen.parameters) == 2 * targets
    frozen = [name for name, reason in chosen.left_out.items() if reason == "frozen"]
    assert all(not model.get_parameter(name).requires_grad for name in frozen)
    assert len(frozen) >= targets


def test_low_rank_factors_of_an_embedding():
    model = lora("gpt2", target_modules=["wte"])
    chosen = choose_parameters(model, None, None, None)
    (name,) = chosen.parameters
    assert "lora_embedding_B" in name
    assert "an embedding" in {chosen.left_out[name.replace("_B", "_A")]}


def test_target_modules_are_chosen_as_peft_does():
    chosen = choose_parameters(lora("bert", target_modules=["query", "value"]), "query", None, None)
    assert len(chosen.parameters) == 2
    assert all(".query.lora_" in name for name in chosen.parameters)


def test_a_compiled_model_has_the_names_of_the_plain_one():
    model = build("bert")
    plain = choose_parameters(model, None, None, None)
    whole = choose_parameters(torch.compile(model), None, None, None)
    assert list(whole.layouts.items()) == list(plain.layouts.items())
    assert whole.left_out == plain.left_out


def test_classes_of_layers_choose_what_they_hold():
    model = build("bert")
    kind = type(model.bert.encoder.layer[0].attention)
    chosen = choose_parameters(model, kind, None, None).parameters
    assert list(chosen) == [
        name for name, p in model.named_parameters() if ".attention." in name and p.ndim == 2
    ]
