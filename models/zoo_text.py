"""Tiny transformers models that read text or sound."""

from __future__ import annotations

from typing import Any

import torch

from sparsefx.models.example import Example, Factory, tokens
from sparsefx.models.torchvision import usable_torchvision

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_T5: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def build(model: str, config: str, settings: dict[str, Any]) -> torch.nn.Module:
    """Return transformers' `model` of a `config` with these settings, randomly initialised."""
    usable_torchvision()
    import transformers

    made: torch.nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return made


def _decoder(prefix: str, *, config: str | None = None, **settings: Any) -> Factory:
    """A causal language model in the Llama manner, without a cache."""
    settings = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, **settings}
    return _causal(prefix, config=config, **settings)


def _causal(
    prefix: str, *, config: str | None = None, cached: bool = False, **settings: Any
) -> Factory:
    """A causal language model with exactly these settings."""

    def make() -> Example:
        model = build(f"{prefix}ForCausalLM", config or f"{prefix}Config", settings)
        return Example(model, (), {"input_ids": tokens(2, 16), "use_cache": cached})

    return make


def _encoder(model: str, config: str, **settings: Any) -> Factory:
    """A text encoder with an attention mask."""

    def make() -> Example:
        kwargs = {"input_ids": tokens(2, 16), "attention_mask": torch.ones(2, 16).long()}
        return Example(build(model, config, settings), (), kwargs)

    return make


def _translator(model: str, config: str, settings: dict[str, Any]) -> Factory:
    """An encoder and a decoder of text."""

    def make() -> Example:
        kwargs = {
            "input_ids": tokens(2, 16),
            "decoder_input_ids": tokens(2, 8),
            "use_cache": False,
        }
        return Example(build(model, config, settings), (), kwargs)

    return make


def _gpt2() -> Example:
    settings = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = build("GPT2LMHeadModel", "GPT2Config", settings)
    return Example(model, (), {"input_ids": tokens(2, 16), "use_cache": False})


def _distilbert() -> Example:
    settings = {"vocab_size": 128, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
    return Example(
        build("DistilBertModel", "DistilBertConfig", settings), (), {"input_ids": tokens(2, 16)}
    )


def _bigbird() -> Example:
    settings = {
        **SMALL,
        "block_size": 4,
        "num_random_blocks": 1,
        "max_position_embeddings": 128,
    }
    model = build("BigBirdModel", "BigBirdConfig", settings)
    return Example(model, (), {"input_ids": tokens(1, 64)})


def _whisper() -> Example:
    settings = {
        **_ENCODER_DECODER,
        "max_source_positions": 50,
        "num_mel_bins": 80,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    kwargs = {
        "input_features": torch.randn(1, 80, 100),
        "decoder_input_ids": tokens(1, 8),
        "use_cache": False,
    }
    return Example(build("WhisperForConditionalGeneration", "WhisperConfig", settings), (), kwargs)


def _speech(prefix: str, samples: int, **convolutions: tuple[int, ...]) -> Factory:
    """A speech encoder over raw samples."""

    def make() -> Example:
        settings = {
            **SMALL,
            "vocab_size": 32,
            "num_feat_extract_layers": len(convolutions["conv_dim"]),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            **convolutions,
        }
        model = build(f"{prefix}ForCTC", f"{prefix}Config", settings)
        return Example(model, (), {"input_values": torch.randn(1, samples)})

    return make


_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
_QWEN3_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
}
_GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 8,
}
_MAMBA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
}
_MAMBA2: dict[str, Any] = {
    **_MAMBA,
    "head_dim": 16,
    "num_heads": 8,
    "n_groups": 1,
    "chunk_size": 8,
}
_DEBERTA: dict[str, Any] = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
}
_LONGFORMER: dict[str, Any] = {
    **SMALL,
    "attention_window": [4, 4],
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_OPT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}
_BART: dict[str, Any] = {**_ENCODER_DECODER, "max_position_embeddings": 64}
_MARIAN: dict[str, Any] = {
    **_BART,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
_BLOOM: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}
_FALCON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SWITCH: dict[str, Any] = {**_T5, "num_decoder_layers": 2, "num_experts": 4}
_MODERNBERT: dict[str, Any] = {**SMALL, "pad_token_id": 0, "max_position_embeddings": 64}

EXAMPLES: dict[str, Factory] = {
    "llama": _decoder("Llama"),
    "llama_cached": _decoder("Llama", cached=True),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=16),
    "gemma3": _decoder("Gemma3", config="Gemma3TextConfig", head_dim=16),
    "phi3": _decoder("Phi3", pad_token_id=0),
    "mixtral": _decoder("Mixtral", num_local_experts=4),
    "qwen3_moe": _decoder("Qwen3Moe", **_QWEN3_MOE),
    "deepseek_v3": _decoder("DeepseekV3", **_DEEPSEEK),
    "gpt_oss": _decoder("GptOss", **_GPT_OSS),
    "gpt2": _gpt2,
    "gpt_neox": _causal("GPTNeoX", **SMALL, max_position_embeddings=64),
    "opt": _causal("OPT", **_OPT),
    "bloom": _causal("Bloom", **_BLOOM),
    "falcon": _causal("Falcon", **_FALCON),
    "mamba": _causal("Mamba", **_MAMBA),
    "mamba2": _causal("Mamba2", **_MAMBA2),
    "bert": _encoder("BertForMaskedLM", "BertConfig", **SMALL),
    "roberta": _encoder("RobertaForSequenceClassification", "RobertaConfig", **SMALL),
    "distilbert": _distilbert,
    "modernbert": _encoder("ModernBertForMaskedLM", "ModernBertConfig", **_MODERNBERT),
    "deberta_v2": _encoder("DebertaV2Model", "DebertaV2Config", **_DEBERTA),
    "bigbird": _bigbird,
    "longformer": _encoder("LongformerModel", "LongformerConfig", **_LONGFORMER),
    "t5": _translator("T5ForConditionalGeneration", "T5Config", _T5),
    "switch_transformers": _translator(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", _SWITCH
    ),
    "bart": _translator("BartForConditionalGeneration", "BartConfig", _BART),
    "marian": _translator("MarianMTModel", "MarianConfig", _MARIAN),
    "whisper": _whisper,
    "wav2vec2": _speech(
        "Wav2Vec2", 4000, conv_dim=(32,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3)
    ),
    "hubert": _speech("Hubert", 2000, conv_dim=(32,) * 2, conv_stride=(5, 2), conv_kernel=(10, 3)),
}
