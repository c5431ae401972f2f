"""Tiny random models of every text architecture that the installed transformers has: one line per exception."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 64
LARGEST = 10_000_000  # parameters
FIRST_ID = 8  # smaller ids are special tokens

# The sizes of a tiny model, by the names that configurations have for them. A list has one place per layer.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size", "entity_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 56),
    **dict.fromkeys(("hidden_dim", "ffn_hidden_size", "feed_forward_size", "d_inner", "dim_ff", "dff"), 56),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 56),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"), 2),
    **dict.fromkeys(("decoder_num_hidden_layers", "speech_decoder_prenet_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "d_head", "dim_head", "attention_head_size", "kv_channels", "swa_head_dim"), 8
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_token",), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("query_pre_attn_scalar", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk", "sliding_window", "local_attention", "attention_window_size"), 8),
    **dict.fromkeys(("sliding_window_size", "window_size", "attention_chunk_size", "attention_window"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_headdim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_head_dim",), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}

HYBRID = ["linear_attention", "full_attention"]
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": HYBRID}

# What single architectures need besides, by model type; of a part of a configuration in a mapping of its own. Layers of
# both kinds are wanted where an architecture has two.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID, "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 16,
        "patcher_config": {"num_key_value_heads": 4},
        "encoder_config": {"hidden_size_global": 32, "num_key_value_heads": 4},
        "decoder_config": {"hidden_size_global": 32, "num_key_value_heads": 4},
        "global_config": {"num_key_value_heads": 4},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "deepseek_v4": {"o_groups": 4, "o_lora_rank": 8},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64, "layer_types": ...},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16}},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA2,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": HYBRID},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": ...},
    "moshi": {"audio_vocab_size": 32, "num_codebooks": 2},
    "musicgen": {"audio_channels": 1, "num_codebooks": 1},
    "musicgen_melody": {"audio_channels": 1, "num_codebooks": 1},
    "nemotron_h": {"mamba_num_heads": 8, "layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "neomme": {"head_dim": 16, "embedding_rank": 16},
    "olmo_hybrid": {"layer_types": HYBRID},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "d_model": 32},
    "qwen3_5": {"layer_types": HYBRID},
    "qwen3_5_moe": {"layer_types": HYBRID},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen4_exp": {
        "layer_types": HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "kyutai_speech_to_text": {"audio_pad_token_id": 0},
    "rwkv": {"rescale_every": 0},  # others are refused
    "seamless_m4t": {"speech_encoder_intermediate_size": 56},
    "seamless_m4t_v2": {"speech_encoder_intermediate_size": 56},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "canary": {"encoder_config": {"num_mel_bins": 8}},
    "cohere_asr": {"encoder_config": {"num_mel_bins": 8}},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 12, "begin_suppress_tokens": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

# What an encoder reads instead of token ids, by model type: the argument's name and the shape of one row.
FEATURES: dict[str, tuple[str, tuple[int, ...]]] = {
    "canary": ("input_features", (32, 8)),
    "cohere_asr": ("input_features", (32, 8)),
    "moonshine": ("input_values", (3200,)),
    "moonshine_streaming": ("input_values", (3200,)),
    "pop2piano": ("input_features", (12, 32)),
    "speech/seamless_m4t": ("input_features", (24, 160)),
    "speech/seamless_m4t_v2": ("input_features", (24, 160)),
    "speech-encoder-decoder": ("input_values", (3200,)),
    "speech_to_text": ("input_features", (24, 8)),
    "speecht5": ("input_values", (3200,)),
    "whisper": ("input_features", (8, 24)),
}

# A kind is a mapping of transformers from model types to classes.
KINDS = {
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A class of transformers' models as one of its model types has it."""

    kind: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.model_type}"

    @property
    def features(self) -> tuple[str, tuple[int, ...]] | None:
        return FEATURES.get(self.name) or FEATURES.get(self.model_type)


def architectures() -> list[Architecture]:
    """All of them; a class that several model types share, or several kinds, is there once."""
    known: dict[str, Architecture] = {}
    for kind, classes in KINDS.items():
        for model_type, class_name in classes.items():
            its_name = class_name.lower().startswith(model_type.replace("-", "").replace("_", ""))
            if class_name not in known or (its_name and known[class_name].kind == kind):
                known[class_name] = Architecture(kind, model_type, class_name)
    order = ("causal", "masked", "encoder-decoder", "speech")
    return sorted(known.values(), key=lambda one: (order.index(one.kind), one.model_type))


def tiny_config(architecture: Architecture) -> PreTrainedConfig:
    """The configuration of a tiny model."""
    cls = getattr(transformers, architecture.class_name).config_class
    settings = SETTINGS.get(architecture.model_type, {}) | SETTINGS.get(architecture.name, {})
    if architecture.kind == "causal" and "is_decoder" in _fields(cls):
        settings = {"is_decoder": True} | settings
    return cls(**_settings(cls, settings))


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _parts(cls: type) -> dict[str, type]:
    """The classes of a configuration's parts; those that may be any have a default."""
    parts = {}
    for name, part in {
        **(getattr(cls, "sub_configs", None) or {}),
        **(getattr(cls, "sub_configs_defaults", None) or {}),
    }.items():
        if not isinstance(part, type):
            part = CONFIG_MAPPING[part.model_type] if part.model_type else part.config_class
        if dataclasses.is_dataclass(part):
            parts[name] = part
    return parts


def _settings(cls: type, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration's class: what SIZES has of its fields and of its parts' fields, and changes."""
    known = _fields(cls)
    settings = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has keys and values for each head
        settings |= {name: 4 for name in ("num_key_value_heads",) if name in known}
    for name, part in _parts(cls).items():
        if name in known:
            settings[name] = {"model_type": part.model_type} | _settings(part, changes.get(name, {}))
    merged = settings | {
        name: value for name, value in changes.items() if not isinstance(value, dict) or name not in settings
    }
    return {name: value for name, value in merged.items() if value is not ...}


def tiny_model(architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """A float32 model of random weights, large enough that attention and gates are not all the same."""
    config = tiny_config(architecture)
    cls = getattr(transformers, architecture.class_name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its configuration cannot be made smaller than {size / 1e6:.0f} million parameters here")
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(std=0.8 * parameter.shape[-1] ** -0.5 if "embed" not in name else 0.5)
    if model.config.is_encoder_decoder and model.generation_config is not None:
        model.generation_config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    return model
