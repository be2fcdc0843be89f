"""Vision models of torchvision (every family that it has) and of timm (one per module), with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .zoo import Built, Subject

# ---------------------------------------------------------------- torchvision


def torchvision_model(
    path: str, *shapes: tuple[int, ...], call: dict[str, Any] | None = None, **config: Any
) -> Callable[[], Built]:
    """Builds ``torchvision.models.<path>(**config)`` in eval mode, to be called with normal noise."""

    def build() -> Built:
        module, _, name = f"torchvision.models.{path}".rpartition(".")
        model: nn.Module = getattr(importlib.import_module(module), name)(**config)
        return model.eval(), tuple(torch.randn(*shape) for shape in shapes), dict(call or {})

    return build


def image(size: int, batch: int = 2) -> tuple[int, ...]:
    """Shape of a batch of square colour images."""
    return (batch, 3, size, size)


def video(frames: int, size: int, batch: int = 2) -> tuple[int, ...]:
    """Shape of a batch of square colour videos."""
    return (batch, 3, frames, size, size)


def _torchvision() -> list[Subject]:
    few, no_init = {"num_classes": 10}, {"num_classes": 10, "init_weights": False}
    segmentation = {"num_classes": 5, "weights_backbone": None, "aux_loss": False}
    maxvit = {
        "input_size": (64, 64),
        "stem_channels": 16,
        "block_channels": [16, 32],
        "block_layers": [2, 3],
        "head_dim": 16,
        "stochastic_depth_prob": 0.0,
        "partition_size": 4,
    }
    # name, pattern of its blocks, how many, path, input, configuration
    rows: list[tuple[str, str, int | None, str, tuple[int, ...], dict[str, Any]]] = [
        ("alexnet", "Conv2d|Linear", 8, "alexnet", image(64), few),
        ("vgg11_bn", "Conv2d|Linear", 11, "vgg11_bn", image(32), no_init),
        ("resnet18", r"layer\d\.\d", 8, "resnet18", image(32), few),
        ("resnet50", r"layer\d\.\d", 16, "resnet50", image(32), few),
        ("resnext50_32x4d", r"layer\d\.\d", 16, "resnext50_32x4d", image(32), few),
        ("densenet121", "_DenseBlock", 4, "densenet121", image(32), few),
        ("googlenet", r"inception\d\w", 9, "googlenet", image(32), no_init | {"aux_logits": False}),
        ("inception_v3", "Inception[A-E]", 11, "inception_v3", image(75), no_init | {"aux_logits": False}),
        ("mobilenet_v2", "InvertedResidual", 17, "mobilenet_v2", image(32), few),
        ("mobilenet_v3_small", "InvertedResidual", 11, "mobilenet_v3_small", image(32), few),
        ("shufflenet_v2_x0_5", "InvertedResidual", 16, "shufflenet_v2_x0_5", image(32), few),
        ("squeezenet1_1", "Fire", 8, "squeezenet1_1", image(32), few),
        ("mnasnet0_5", "_InvertedResidual", 16, "mnasnet0_5", image(32), few),
        ("efficientnet_b0", "MBConv", 16, "efficientnet_b0", image(32), few),
        ("efficientnet_v2_s", "(Fused)?MBConv", 40, "efficientnet_v2_s", image(32), few),
        ("regnet_x_400mf", "ResBottleneckBlock", 22, "regnet_x_400mf", image(32), few),
        ("regnet_y_400mf", "ResBottleneckBlock", 16, "regnet_y_400mf", image(32), few),
        ("convnext_tiny", "CNBlock", 18, "convnext_tiny", image(32), few),
        ("vit_b_16", "EncoderBlock", 12, "vit_b_16", image(32), few | {"image_size": 32}),
        ("swin_t", "SwinTransformerBlock", 12, "swin_t", image(32), few),
        ("swin_v2_t", "SwinTransformerBlockV2", 12, "swin_v2_t", image(32), few),
        ("maxvit", "MaxVitLayer", 5, "maxvit.MaxVit", image(64), few | maxvit),
        ("fcn_resnet50", "Bottleneck", 16, "segmentation.fcn_resnet50", image(32), segmentation),
        (
            "deeplabv3_mobilenet_v3",
            "InvertedResidual",
            15,
            "segmentation.deeplabv3_mobilenet_v3_large",
            image(32),
            segmentation,
        ),
        (
            "lraspp_mobilenet_v3",
            "InvertedResidual",
            15,
            "segmentation.lraspp_mobilenet_v3_large",
            image(32),
            {"num_classes": 5, "weights_backbone": None},
        ),
        ("r3d_18", "BasicBlock", 8, "video.r3d_18", video(4, 16), few),
        ("r2plus1d_18", "BasicBlock", 8, "video.r2plus1d_18", video(4, 16), few),
        ("swin3d_t", "SwinTransformerBlock", 12, "video.swin3d_t", video(4, 32), few),
    ]
    fast = {"resnet18", "mobilenet_v3_small", "squeezenet1_1"}
    subjects = [
        Subject(
            name,
            torchvision_model(path, shape, weights=None, **config)
            if name != "maxvit"
            else torchvision_model(path, shape, **config),
            steps=steps,
            blocks=pattern,
            family="torchvision",
            fast=name in fast,
        )
        for name, pattern, steps, path, shape, config in rows
    ]
    raft = torchvision_model(
        "optical_flow.raft_small", image(128, 1), image(128, 1), call={"num_flow_updates": 4}, weights=None
    )
    subjects += [
        Subject(
            "densenet121 by layers",
            torchvision_model("densenet121", image(32), weights=None, **few),
            steps=58,
            blocks="_DenseLayer",
            options={"depth": ["*denselayer*"]},
            family="torchvision",
        ),
        Subject(
            "raft_small",
            raft,
            steps=4,
            blocks="update_block",
            dtype=None,
            tolerance=1e-4,
            target=lambda flows: flows[-1],
            family="torchvision",
            note="its coordinate grids are float32 whatever the model",
        ),
    ]
    return subjects


# ---------------------------------------------------------------- timm


def timm_model(name: str, size: int, **config: Any) -> Callable[[], Built]:
    """Builds ``timm.create_model(name)`` in eval mode, to be called with normal noise."""

    def build() -> Built:
        import timm

        default = timm.models.get_pretrained_cfg(name)
        if default is not None and default.fixed_input_size and default.input_size[1] != size:
            config["img_size"] = size
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **config)
        return model.eval(), (torch.randn(*image(size)),), {}

    return build


# name, input size, pattern of its blocks, how many
_TIMM: list[tuple[str, int, str, int | None]] = [
    ("beit_base_patch16_224", 32, "Block", 4),
    ("eca_halonext26ts", 256, r"stages\.\d\.\d", 8),
    ("test_byobnet", 64, r"stages\.\d\.\d", 4),
    ("cait_xxs24_224", 32, "LayerScaleBlock(ClassAttn)?", 26),
    ("coat_tiny", 32, "(Serial|Parallel)Block", 14),
    ("coat_lite_tiny", 32, "SerialBlock", 8),
    ("convit_tiny", 32, "Block", 12),
    ("convmixer_768_32", 32, r"blocks\.\d+", 32),
    ("test_convnext", 64, "ConvNeXtBlock", 9),
    ("cpubone_nano", 64, "", None),
    ("crossvit_tiny_240", 240, "MultiScaleBlock", 3),
    ("csatv2", 128, "", None),
    ("cs3darknet_focus_s", 64, "CrossStage3", 4),
    ("cspnext_tiny", 64, "CspNextLayer", 4),
    ("davit_tiny", 64, "(Spatial|Channel)Block", 12),
    ("deepseek_vit_412m", 56, "DeepseekVitBlock", 4),
    ("deit_tiny_distilled_patch16_224", 32, "Block", 12),
    ("densenet121", 32, "DenseBlock", 4),
    ("dla46x_c", 64, "", None),
    ("dpn48b", 32, "DualPathBlock", 16),
    ("edgenext_xx_small", 64, "ConvBlock|SplitTransposeBlock", 12),
    ("efficientformer_l1", 224, r"MetaBlock\dd", 15),
    ("efficientformerv2_s0", 64, "EfficientFormerV2Block", 14),
    ("test_efficientnet", 64, r"blocks\.\d\.\d", 5),
    ("efficientvim_m1", 64, "EfficientViMBlock", 6),
    ("efficientvit_b0", 64, r"stages\.\d\.blocks\.\d|stem\.res\d", 11),
    ("efficientvit_m0", 64, "EfficientVitBlock", 6),
    ("vit_tiny_patch16_dinov3_qkvb", 32, "EvaBlock", 12),
    ("eva02_tiny_patch14_224", 28, "EvaBlock", 12),
    ("fasternet_t0", 64, "MLPBlock", 13),
    ("fastvit_t8", 64, "RepMixerBlock", 10),
    ("focalnet_tiny_srf", 64, "FocalNetBlock", 12),
    ("gcvit_xxtiny", 64, "GlobalContextVitBlock", 12),
    ("gemma4_vit_167m", 96, "Gemma4Block", 4),
    ("ghostnet_050", 64, "GhostBottleneck", 16),
    ("ghostnetv3_050", 64, "GhostBottleneckV3", 16),
    ("hardcorenas_a", 64, "InvertedResidual|DepthwiseSeparableConv", 11),
    ("hgnetv2_b0", 64, "HighPerfGpuBlock", 5),
    ("hiera_tiny_224", 64, "HieraBlock", 12),
    ("hieradet_small", 64, "MultiScaleBlock", 16),
    ("hrnet_w18_small", 64, "", None),
    ("iformer_t", 64, "", None),
    ("inception_next_atto", 64, "MetaNeXtBlock", 12),
    ("inception_resnet_v2", 96, r"Block\d+", 40),
    ("inception_v3", 75, "Inception[A-E]", 11),
    ("inception_v4", 96, "Inception[ABC]", 14),
    ("lcnetv2_small", 64, "RepDepthwiseSeparable", 11),
    ("levit_128s", 64, "LevitBlock", 9),
    ("lowformer_b0", 64, "", None),
    ("test_mambaout", 64, "GatedConvBlock", 6),
    ("test_coatnet", 64, "MbConvBlock|TransformerBlock2d", 5),
    ("test_maxvit", 64, "MaxxVit(Block|Stage)", 4),
    ("poolformer_s12", 64, "MetaFormerBlock", 12),
    ("gmlp_ti16_224", 32, "SpatialGatingBlock", 30),
    ("resmlp_12_224", 32, "ResBlock", 12),
    ("mobilenetv3_small_050", 64, "InvertedResidual|DepthwiseSeparableConv", 11),
    ("mobilenetv5_base", 64, r"blocks\.\d\.\d+", 39),
    ("mobilevit_xxs", 64, r"stages\.\d\.\d", 10),
    ("mvitv2_tiny", 64, "MultiScaleBlock", 10),
    ("naflexvit_base_patch16_gap", 32, "Block", 4),
    ("nasnetalarge", 64, r"\w*Cell\w*", 22),
    ("nest_tiny", 64, "TransformerLayer", 12),
    ("nextvit_small", 64, "Next(Conv|Transformer)Block", 20),
    ("test_nfnet", 64, "NormFreeBlock", 4),
    ("pit_ti_224", 64, "Block", 12),
    ("pnasnet5large", 64, "Cell", 13),
    ("pvt_v2_b0", 64, "Block", 8),
    ("qwen3_vit_88m", 64, "EvaBlock", 4),
    ("rdnet_tiny", 64, "DenseStage", 7),
    ("regnetx_002", 64, "Bottleneck", 13),
    ("repghostnet_050", 64, "RepGhostBottleneck", 16),
    ("repvit_m0_9", 64, r"stages\.\d\.blocks\.\d+", 20),
    ("res2net50_14w_8s", 32, "Bottle2neck", 16),
    ("resnest14d", 64, "ResNestBottleneck", 4),
    ("test_resnet", 64, "BasicBlock|Bottleneck", 4),
    ("resnetv2_18", 32, "PreActBasic", 8),
    ("rexnet_100", 64, "LinearBottleneck", 16),
    ("selecsls42", 64, "SelecSlsBlock", 6),
    ("legacy_seresnet18", 32, "SEResNetBlock", 8),
    ("sequencer2d_s", 64, "Sequencer2dBlock", 18),
    ("shvit_s1", 64, r"stages\.\d\.blocks\.\d+", 11),
    ("skresnet18", 32, "SelectiveKernelBasic", 8),
    ("starnet_s050", 64, "Block", 6),
    ("swiftformer_xs", 64, r"stages\.\d\.blocks\.\d+", 16),
    ("swin_tiny_patch4_window7_224", 56, "SwinTransformerBlock", 12),
    ("swinv2_tiny_window8_256", 64, "SwinTransformerV2Block", 12),
    ("swinv2_cr_tiny_ns_224", 64, "SwinTransformerV2CrBlock", 12),
    ("tiny_vit_5m_224", 64, r"stages\.\d\.blocks\.\d+", 12),
    ("tnt_s_patch16_224", 32, "Block", 12),
    ("tresnet_m", 64, "BasicBlock|Bottleneck", 21),
    ("twins_svt_small", 64, "Block", 18),
    ("visformer_tiny", 64, "Block", 15),
    ("test_vit", 32, "Block", 6),
    ("vit_tiny_r_s16_p8_224", 64, "Block", 12),
    ("test_vit_relpos", 32, "RelPosBlock", 9),
    ("samvit_base_patch16_224", 64, "Block", 4),
    ("vitamin_small_224", 64, "Block|MbConvLNBlock", 20),
    ("volo_d1_224", 64, "Outlooker|Transformer|ClassBlock", 20),
    ("ese_vovnet19b_slim_dw", 64, "Osa(Block|Stage)", 4),
    ("legacy_xception", 64, "Block", 12),
    ("xception41p", 64, "PreXceptionModule", 13),
    ("xcit_nano_12_p16_224", 32, "XCABlock|ClassAttentionBlock", 14),
]
_SMALLER = {"embed_dim": 48, "depth": 4, "num_heads": 3}
_TIMM_CONFIG: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _SMALLER,
    "deepseek_vit_412m": _SMALLER,
    "gemma4_vit_167m": _SMALLER,
    "naflexvit_base_patch16_gap": _SMALLER,
    "qwen3_vit_88m": _SMALLER,
    "samvit_base_patch16_224": _SMALLER,
}


def _timm() -> list[Subject]:
    fast = {"test_vit", "test_convnext", "test_efficientnet"}
    return [
        Subject(
            name,
            timm_model(name, size, **_TIMM_CONFIG.get(name, {})),
            steps=steps,
            blocks=pattern,
            family="timm",
            fast=name in fast,
        )
        for name, size, pattern, steps in _TIMM
    ]


SUBJECTS: list[Subject] = [*_torchvision(), *_timm()]
