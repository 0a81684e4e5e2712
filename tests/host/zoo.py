"""Miniatures of model families, which ComfyUI's own detection recognises and its loaders load.

Sizes that detection takes from the weights are made small; those it fixes (Flux's 3072 channels, for
one) stay, with as few blocks as can be.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import save_file

STD = 0.02


@dataclass(frozen=True)
class Family:
    """How to build a miniature, and what it takes.

    Args:
        detected: Name of ComfyUI's model config for it.
        build: Makes the diffusion model, given dtype, device and operations.
        latent: Shape of one latent, batch first.
        text: Length and width of a caption's encoding.
        options: Further tensors of a caption's conditioning, by name: shape, or a plain value.
        large: Hundreds of millions of parameters at the least; kept in float16.
        extra: Tensors of the file that are no weights of the model, by which it is told: shapes.
    """

    detected: str
    build: object
    latent: tuple
    text: tuple
    options: dict = field(default_factory=dict)
    large: bool = False
    extra: dict = field(default_factory=dict)


def _unet(channels, context, linear, adm, mult, res, depth, depth_out, middle=1, heads=(-1, 64),
          **place):  # fmt: skip
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=channels, channel_mult=mult,
        num_res_blocks=res, transformer_depth=list(depth), transformer_depth_output=list(depth_out),
        transformer_depth_middle=middle, context_dim=context, num_heads=heads[0],
        num_head_channels=heads[1], use_spatial_transformer=True,
        use_linear_in_transformer=linear, adm_in_channels=adm,
        num_classes=None if adm is None else "sequential", legacy=False, **place,
    )  # fmt: skip


def _of(path, **options):
    """Build the class at a dotted path below comfy.ldm."""

    def build(**place):
        import importlib

        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(**options, **place)

    return build


def _known(params, options, **newer):
    """Options of a model, with those of newer versions that its class of parameters knows."""
    known = {f.name for f in dataclasses.fields(params)}
    return options | {key: value for key, value in newer.items() if key in known}


def _hunyuan_video(**place):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    options = _known(HunyuanVideoParams, HUNYUAN_VIDEO, meanflow_sum=False)  # since 0.33
    return HunyuanVideo(**options, **place)


def _flux(**options):
    def build(**place):
        from comfy.ldm.flux.model import Flux, FluxParams

        return Flux(**_known(FluxParams, FLUX | options, txt_ids_dims=[]), **place)  # since 0.33

    return build


FLUX = {
    "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0, "theta": 10000, "out_channels": 16,
    "qkv_bias": True, "in_channels": 16, "hidden_size": 3072, "context_in_dim": 64,
    "patch_size": 2, "vec_in_dim": 32, "depth": 1,
}  # fmt: skip
CHROMA = {key: value for key, value in FLUX.items() if key != "vec_in_dim"} | {
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120,
    "n_layers": 5, "depth_single_blocks": 0,
}  # fmt: skip
HUNYUAN_VIDEO = {
    "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 768,
    "axes_dim": [16, 56, 56], "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0,
    "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True,
    "byt5": False, "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow": False,
}  # fmt: skip
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 640, "block_config": "FA-CA-MLP",
    "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop", "block_x_format": "THWBD", "affline_emb_norm": True,
    "use_adaln_lora": True, "adaln_lora_dim": 256, "num_blocks": 36, "num_heads": 40,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
    "rope_h_extrapolation_ratio": 2.0, "rope_w_extrapolation_ratio": 2.0,
    "rope_t_extrapolation_ratio": 2.0, "extra_h_extrapolation_ratio": 2.0,
    "extra_w_extrapolation_ratio": 2.0, "extra_t_extrapolation_ratio": 2.0,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None,
    "adm_in_channels": 32, "context_embedder_config":
    {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None,
}  # fmt: skip
WAN = {
    "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256, "num_layers": 1, "freq_dim": 256,
    "patch_size": (1, 2, 2), "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True,
    "eps": 1e-6, "in_dim": 16, "model_type": "t2v",
}  # fmt: skip
SDXL_DEPTHS = {"linear": True, "adm": 2816, "mult": (1, 1, 1), "res": [2, 2, 2],
               "depth": (0, 0, 2, 2, 10, 10), "depth_out": (0,) * 9}  # fmt: skip
SDXL = partial(_unet, 320, 2048, **SDXL_DEPTHS)
SSD = partial(_unet, 320, 2048, **SDXL_DEPTHS | {"depth": (0, 0, 2, 2, 4, 4)})  # SDXL, distilled
PIXEL = (1, 4, 8, 8)
FAMILIES = {
    "SD1.5": Family(
        "SD15", partial(_unet, 320, 768, False, None, (1,), [1], (1,), (1, 1), heads=(8, -1)),
        PIXEL, (77, 768),
    ),
    "SD2.1 base": Family(
        "SD20", partial(_unet, 320, 1024, True, None, (1,), [1], (1,), (1, 1)), PIXEL, (77, 1024)
    ),
    "SD2.1 v": Family(
        "SD20",
        partial(_unet, 320, 1024, True, None, (1, 1, 1, 1), [2] * 4, (1,) + (0,) * 7,
                (1,) + (0,) * 11),
        PIXEL, (77, 1024),
    ),
    "SDXL": Family("SDXL", SDXL, PIXEL, (77, 2048), {"pooled_output": (1, 1280)}),
    "SDXL v": Family(
        "SSD1B", SSD, PIXEL, (77, 2048), {"pooled_output": (1, 1280)}, extra={"v_pred": (1,)}
    ),
    "SDXL EDM": Family(
        "SSD1B", SSD, PIXEL, (77, 2048), {"pooled_output": (1, 1280)},
        extra={"edm_mean": (1,), "edm_std": (1,)},
    ),
    "SDXL refiner": Family(
        "SDXLRefiner",
        partial(_unet, 384, 1280, True, 2560, (1, 1, 1, 1), [2] * 4, (0, 0, 4, 4, 4, 4, 0, 0),
                (0,) * 12),
        PIXEL, (77, 1280), {"pooled_output": (1, 1280)},
    ),
    "SD3": Family("SD3", _of("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", **SD3),
                  (1, 16, 8, 8), (20, 64), {"pooled_output": (1, 32)}),
    "SD3.5": Family(
        "SD3",
        _of("modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", **SD3, qk_norm="rms",
            x_block_self_attn_layers=[0]),
        (1, 16, 8, 8), (20, 64), {"pooled_output": (1, 32)},
    ),
    "Flux dev": Family(
        "Flux", _flux(guidance_embed=True, depth_single_blocks=1),
        (1, 16, 8, 8), (20, 64), {"pooled_output": (1, 32)}, large=True,
    ),
    "Flux schnell": Family(
        "FluxSchnell", _flux(guidance_embed=False, depth_single_blocks=0),
        (1, 16, 8, 8), (20, 64), {"pooled_output": (1, 32)}, large=True,
    ),
    "Chroma": Family(
        "Chroma", _of("chroma.model.Chroma", **CHROMA), (1, 16, 8, 8), (20, 64),
        {"pooled_output": (1, 32)}, large=True
    ),
    "AuraFlow": Family(
        "AuraFlow", _of("aura.mmdit.MMDiT", max_seq=64, n_double_layers=1, n_layers=2),
        PIXEL, (20, 2048), large=True,
    ),
    "PixArt Sigma": Family(
        "PixArtSigma",
        _of("pixart.pixartms.PixArtMS", num_heads=16, patch_size=2, hidden_size=1152, in_channels=4,
            depth=1, model_max_length=300, input_size=64, pe_interpolation=1,
            micro_condition=False),
        (1, 4, 40, 40), (20, 4096), extra={"pos_embed": (1, 1024, 1152)},
    ),
    "HunyuanDiT": Family(
        "HunyuanDiT", _of("hydit.models.HunYuanDiT", depth=2, hidden_size=512), PIXEL, (77, 1024),
        {"conditioning_mt5xl": (1, 256, 2048), "attention_mask": torch.ones(1, 77),
         "attention_mask_mt5xl": torch.ones(1, 256)},
    ),
    "HunyuanVideo": Family(
        "HunyuanVideo", _hunyuan_video,
        (1, 16, 2, 8, 8), (20, 64), {"pooled_output": (1, 768)},
    ),
    "Wan 2.1": Family("WAN21_T2V", _of("wan.model.WanModel", **WAN), (1, 16, 2, 8, 8), (20, 4096)),
    "LTX-Video": Family(
        "LTXV",
        _of("lightricks.model.LTXVModel", num_layers=1, attention_head_dim=16,
            cross_attention_dim=512),
        (1, 128, 2, 4, 4), (20, 4096), {"attention_mask": torch.ones(1, 20, dtype=torch.long)},
    ),
    "Lumina 2": Family(
        "Lumina2",
        _of("lumina.model.NextDiT", patch_size=2, in_channels=16, dim=2304, cap_feat_dim=64,
            n_layers=1, qk_norm=True, n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32],
            axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0),
        (1, 16, 8, 8), (20, 64), large=True,
    ),
    "Qwen-Image": Family(
        "QwenImage", _of("qwen_image.model.QwenImageTransformer2DModel", num_layers=1),
        (1, 16, 1, 8, 8), (20, 3584), large=True,
    ),
    "Cosmos": Family(
        "CosmosT2V", _of("cosmos.model.GeneralDIT", **COSMOS), (1, 16, 1, 8, 8), (20, 1024),
        large=True,
    ),
}  # fmt: skip


KONTEXT = Family(  # with emoji64's text encoders
    "Flux", _flux(guidance_embed=True, depth_single_blocks=0, context_in_dim=4096, vec_in_dim=2048),
    (1, 16, 8, 8), (77, 4096), {"pooled_output": (1, 2048)}, large=True,
)  # fmt: skip


def weights_of(family, seed=0):
    """Random weights of a miniature, a family or its name, by the names its file has."""
    import comfy.ops

    spec = family if isinstance(family, Family) else FAMILIES[family]
    dtype = torch.float16 if spec.large else torch.float32
    net = spec.build(dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in net.state_dict().items():
        if tensor.is_meta and tensor.dim() > 1:
            weight = torch.empty(tensor.shape).normal_(0, STD, generator=generator)
        else:
            is_scale = name.endswith(("weight", "scale"))
            weight = torch.ones(tensor.shape) if is_scale else torch.zeros(tensor.shape)
        state[name] = weight.to(dtype)
    if family == "SD2.1 v":  # by the spread of this bias ComfyUI tells v-prediction
        bias = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
        state[bias] = torch.empty(state[bias].shape).normal_(0, 0.2, generator=generator)
    return state | {key: torch.zeros(shape) for key, shape in spec.extra.items()}


def write(family, path, seed=0):
    """Write a miniature as a diffusion model file."""
    save_file({k: v.contiguous() for k, v in weights_of(family, seed).items()}, path)


def examples(family, count=2, seed=0):
    """Random latents and captions of the shapes a family takes."""
    spec, generator = FAMILIES[family], torch.Generator().manual_seed(seed)
    latents, captions = [], []
    for _ in range(count):
        latents.append(torch.randn(spec.latent, generator=generator))
        options = {
            name: torch.randn(value, generator=generator) if isinstance(value, tuple) else value
            for name, value in spec.options.items()
        }
        captions.append([torch.randn(1, *spec.text, generator=generator), options])
    return latents, captions
