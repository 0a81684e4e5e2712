"""Miniature models that ComfyUI's own detection recognises."""

import torch
from safetensors.torch import save_file


def sd15_unet():
    """ComfyUI's UNet as small as SD1.5's detection allows: 320 channels, one level."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, channel_mult=(1,),
        num_res_blocks=[1], transformer_depth=[1], transformer_depth_output=[1, 1],
        transformer_depth_middle=1, context_dim=768, num_heads=8, num_head_channels=-1,
        use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def write_mini_sd15(path, seed=0, scale=0.02):
    """Write a UNet with Gaussian weights as a diffusion model file."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in sd15_unet().state_dict().items():
        if tensor.dim() > 1:
            state[name] = torch.randn(tensor.shape, generator=generator) * scale
        else:
            is_scale = name.endswith("weight")
            state[name] = torch.ones(tensor.shape) if is_scale else torch.zeros(tensor.shape)
    save_file(state, path)
    return state


def write_mini_checkpoint(path, seed=0):
    """Write a whole SD1.5 checkpoint of miniature parts, none of them trained, as people have one."""
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import load_file

    from ..assets.emoji64.assemble import clip_l

    write_mini_sd15(path, seed)
    state = {f"model.diffusion_model.{k}": v for k, v in load_file(path).items()}
    torch.manual_seed(seed)
    vae = TAESD(latent_channels=4)
    for name, parameter in vae.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, 0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    state |= {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}
    state |= {f"cond_stage_model.transformer.{k}": v for k, v in clip_l().items()}
    save_file({k: v.detach().contiguous() for k, v in state.items()}, path)


def wan_vae_weights():
    """Wan 2.1's VAE with few channels and random weights."""
    import comfy.ldm.wan.vae

    model = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def weight(name, shape):
        if "gamma" in name:
            return torch.ones(shape)
        random = torch.randn(shape, generator=generator) * 0.05
        return random if len(shape) > 1 else torch.zeros(shape)

    return {name: weight(name, tensor.shape) for name, tensor in model.state_dict().items()}
