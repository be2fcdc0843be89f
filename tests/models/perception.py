"""Models of the transformers library that see, hear or read numbers, and those of several modalities."""

from __future__ import annotations

import torch

from .transformers_family import (
    FAST,
    GPT2,
    GROUPED,
    LAYERS,
    SEQ2SEQ,
    TINY,
    VIT,
    VOCABULARY,
    Family,
    pixels,
    tokens,
    wave,
)
from .zoo import Subject

_WAV = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": VOCABULARY,
}
_CLIP_TEXT = {k: v for k, v in TINY.items() if k != "num_hidden_layers"} | {"num_hidden_layers": 3, "eos_token_id": 1}
_CLIP = {"text_config": _CLIP_TEXT, "vision_config": VIT, "projection_dim": 16}
VISION = [
    Family("vit", "ViTModel", VIT, "ViTLayer", inputs=pixels, extra=FAST),
    Family("deit", "DeiTModel", VIT, "DeiTLayer", inputs=pixels),
    Family("dinov2", "Dinov2Model", VIT, "Dinov2Layer", inputs=pixels),
    Family("beit", "BeitModel", VIT | {"use_relative_position_bias": True}, "BeitLayer", inputs=pixels),
    Family("siglip vision", "SiglipVisionModel", VIT, "SiglipEncoderLayer", inputs=pixels),
    Family(
        "convnextv2",
        "ConvNextV2Model",
        {"hidden_sizes": [16, 32], "depths": [2, 3], "num_stages": 2},
        "ConvNextV2Layer",
        5,
        inputs=pixels,
    ),
    Family(
        "segformer",
        "SegformerModel",
        {
            "hidden_sizes": [16, 32],
            "depths": [2, 2],
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "num_attention_heads": [2, 4],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        "SegformerLayer",
        inputs=pixels,
    ),
    Family(
        "swinv2",
        "Swinv2Model",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4},
        "Swinv2Layer",
        inputs=pixels,
    ),
    Family(
        "mobilevit",
        "MobileViTModel",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "image_size": 64,
            "num_attention_heads": 2,
        },
        "MobileViT(InvertedResidual|Layer)",
        7,
        inputs=lambda: pixels(64),
    ),
    Family(
        "poolformer",
        "PoolFormerModel",
        {
            "hidden_sizes": [16, 32],
            "depths": [2, 2],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        "PoolFormerLayer",
        inputs=pixels,
    ),
    Family("imagegpt", "ImageGPTModel", GPT2, "ImageGPTBlock"),
    Family(
        "videomae",
        "VideoMAEModel",
        VIT | {"num_frames": 4, "tubelet_size": 2},
        "VideoMAELayer",
        inputs=lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    ),
    Family(
        "levit",
        "LevitModel",
        {
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [2, 2, 2],
            "key_dim": [4, 4, 4],
            "image_size": 64,
        },
        "LevitResidualLayer",
        14,
        inputs=lambda: pixels(64),
    ),
]

AUDIO = [
    Family("wav2vec2", "Wav2Vec2Model", _WAV, "Wav2Vec2EncoderLayer", inputs=wave, extra=FAST),
    Family("hubert", "HubertModel", _WAV, "HubertEncoderLayer", inputs=wave),
    Family("wavlm", "WavLMModel", _WAV, "WavLMEncoderLayer", inputs=wave),
    Family(
        "audio_spectrogram",
        "ASTModel",
        VIT | {"max_length": 32, "num_mel_bins": 16},
        "ASTLayer",
        inputs=lambda: {"input_values": torch.randn(2, 32, 16)},
    ),
    Family(
        "whisper",
        "WhisperModel",
        SEQ2SEQ
        | {
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
        },
        "Whisper(Encoder|Decoder)Layer",
        7,
        inputs=lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens(6)["input_ids"]},
    ),
    Family(
        "speech_to_text",
        "Speech2TextModel",
        SEQ2SEQ
        | {
            "max_source_positions": 40,
            "max_target_positions": 16,
            "input_feat_per_channel": 8,
            "conv_channels": 16,
            "num_conv_layers": 2,
        },
        "Speech2Text(Encoder|Decoder)Layer",
        7,
        inputs=lambda: {"input_features": torch.randn(2, 24, 8), "decoder_input_ids": tokens(6)["input_ids"]},
    ),
]

SEVERAL_MODALITIES = [
    Family(
        "clip",
        "CLIPModel",
        _CLIP,
        "CLIPEncoderLayer",
        LAYERS,
        inputs=lambda: tokens() | pixels(),
        extra={"target": "image_embeds"},
    ),
    Family("clip text", "CLIPTextModel", _CLIP_TEXT, "CLIPEncoderLayer", 3),
    Family("vilt", "ViltModel", VIT | TINY, "ViltLayer", inputs=lambda: tokens() | pixels()),
    Family(
        "decision_transformer",
        "DecisionTransformerModel",
        {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "state_dim": 5, "act_dim": 2},
        "DecisionTransformerGPT2Block",
        inputs=lambda: {
            "states": torch.randn(2, 3, 5),
            "actions": torch.randn(2, 3, 2),
            "rewards": torch.randn(2, 3, 1),
            "returns_to_go": torch.randn(2, 3, 1),
            "timesteps": torch.arange(3).repeat(2, 1),
            "attention_mask": torch.ones(2, 3),
        },
    ),
    Family(
        "patchtst",
        "PatchTSTModel",
        {
            "d_model": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "num_input_channels": 3,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
        },
        "PatchTSTEncoderLayer",
        inputs=lambda: {"past_values": torch.randn(2, 16, 3)},
    ),
    Family(
        "perceiver",
        "PerceiverModel",
        {
            "num_latents": 6,
            "d_latents": 32,
            "d_model": 24,
            "num_blocks": 1,
            "num_self_attends_per_block": LAYERS,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        r"encoder\.self_attends\.\d",
        inputs=lambda: {"inputs": torch.randn(2, 10, 24)},
    ),
    Family(
        "llava",
        "LlavaModel",
        {
            "text_config": GROUPED | {"model_type": "llama"},
            "vision_config": VIT | {"model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_id": 99,
            "image_seq_length": 16,
        },
        "LlamaDecoderLayer|CLIPEncoderLayer",
        7,
        inputs=lambda: {"input_ids": torch.cat([torch.full((2, 16), 99), torch.randint(3, 90, (2, 4))], 1)} | pixels(),
    ),
]

SUBJECTS: list[Subject] = [family.subject() for group in (VISION, AUDIO, SEVERAL_MODALITIES) for family in group]
