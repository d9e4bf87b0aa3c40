"""Tiny models that look at images, from transformers and timm."""

from __future__ import annotations

from typing import Any

import torch

from sparsefx.models.example import Example, Factory, tokens
from sparsefx.models.torchvision import usable_torchvision
from sparsefx.models.zoo_text import SMALL, build

_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_DINOV2: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 10,
}
_RESNET: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
}
_SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1] * 4,
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 3,
}


def _classifier(model: str, config: str, size: int, **settings: Any) -> Factory:
    """A transformers model of one square image."""

    def make() -> Example:
        kwargs = {"pixel_values": torch.randn(1, 3, size, size)}
        return Example(build(model, config, settings), (), kwargs)

    return make


def _timm(name: str, size: int = 64, **settings: Any) -> Factory:
    """A timm model of one square image."""

    def make() -> Example:
        usable_torchvision()
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10, **settings)
        return Example(model, (torch.randn(1, 3, size, size),))

    return make


def _clip() -> Example:
    text = {
        **SMALL,
        "max_position_embeddings": 32,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    settings = {"text_config": text, "vision_config": _VIT, "projection_dim": 32}
    kwargs = {
        "input_ids": tokens(2, 16),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "attention_mask": torch.ones(2, 16).long(),
    }
    return Example(build("CLIPModel", "CLIPConfig", settings), (), kwargs)


def _llava() -> Example:
    usable_torchvision()
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = {**_VIT, "hidden_size": 32, "intermediate_size": 64}
    settings = {
        "vision_config": CLIPVisionConfig(**vision),
        "text_config": LlamaConfig(**SMALL, num_key_value_heads=2),
        "image_token_index": 5,
        "vision_feature_layer": -1,
    }
    kwargs = {
        "input_ids": torch.tensor([[1] + [5] * 16 + [7, 8, 9]]),
        "pixel_values": torch.randn(1, 3, 32, 32),
        "use_cache": False,
    }
    return Example(build("LlavaForConditionalGeneration", "LlavaConfig", settings), (), kwargs)


def _detr() -> Example:
    usable_torchvision()
    from transformers import ResNetConfig

    settings = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_queries": 5,
        "num_labels": 3,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": ResNetConfig(**_RESNET, out_features=["stage2"]),
    }
    kwargs = {"pixel_values": torch.randn(1, 3, 64, 64)}
    return Example(build("DetrForObjectDetection", "DetrConfig", settings), (), kwargs)


EXAMPLES: dict[str, Factory] = {
    "vit": _classifier("ViTForImageClassification", "ViTConfig", 32, **_VIT, num_labels=10),
    "swin": _classifier("SwinForImageClassification", "SwinConfig", 64, **_SWIN),
    "dinov2": _classifier("Dinov2Model", "Dinov2Config", 28, **_DINOV2),
    "resnet": _classifier("ResNetForImageClassification", "ResNetConfig", 32, **_RESNET),
    "segformer": _classifier(
        "SegformerForSemanticSegmentation", "SegformerConfig", 64, **_SEGFORMER
    ),
    "clip": _clip,
    "llava": _llava,
    "detr": _detr,
    "timm_vit": _timm("vit_tiny_patch16_224", img_size=64, depth=2),
    "timm_deit3": _timm("deit3_small_patch16_224", img_size=64, depth=2),
    "timm_mixer": _timm("mixer_s32_224", img_size=64),
    "timm_convnext": _timm("convnext_atto"),
    "timm_resnet18": _timm("resnet18"),
    "timm_mobilenetv3": _timm("mobilenetv3_small_050"),
    "timm_efficientnet_lite0": _timm("efficientnet_lite0"),
    "timm_swin": _timm("swin_tiny_patch4_window7_224", 224, depths=(1, 1, 1, 1)),
    "timm_eva02": _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
}
