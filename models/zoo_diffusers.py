"""Tiny image and video generators from diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsefx.models.example import Example, Factory
from sparsefx.models.torchvision import usable_torchvision


def _generator(
    model: str, inputs: Callable[[], dict[str, Tensor | dict[str, None]]], **settings: Any
) -> Factory:
    """A diffusers model that answers with a tuple."""

    def make() -> Example:
        usable_torchvision()
        import diffusers

        made: torch.nn.Module = getattr(diffusers, model)(**settings)
        return Example(made, (), {**inputs(), "return_dict": False})

    return make


def _flux_inputs() -> dict[str, Tensor | dict[str, None]]:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def _sd3_inputs() -> dict[str, Tensor | dict[str, None]]:
    return {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([1.0]),
    }


def _pixart_inputs() -> dict[str, Tensor | dict[str, None]]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "timestep": torch.tensor([1]),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def _dit_inputs() -> dict[str, Tensor | dict[str, None]]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([1]),
        "class_labels": torch.tensor([1]),
    }


def _unet_inputs() -> dict[str, Tensor | dict[str, None]]:
    return {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }


def _wan_inputs() -> dict[str, Tensor | dict[str, None]]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }


EXAMPLES: dict[str, Factory] = {
    "flux": _generator(
        "FluxTransformer2DModel",
        _flux_inputs,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ),
    "sd3": _generator(
        "SD3Transformer2DModel",
        _sd3_inputs,
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ),
    "pixart": _generator(
        "PixArtTransformer2DModel",
        _pixart_inputs,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        caption_channels=32,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ),
    "dit": _generator(
        "DiTTransformer2DModel",
        _dit_inputs,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ),
    "sd_unet": _generator(
        "UNet2DConditionModel",
        _unet_inputs,
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ),
    "autoencoder_kl": _generator(
        "AutoencoderKL",
        lambda: {"sample": torch.randn(1, 3, 16, 16)},
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    ),
    "wan": _generator(
        "WanTransformer3DModel",
        _wan_inputs,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ),
}
