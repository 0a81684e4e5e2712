"""The parameters of diffusers' UNet2DConditionModel in their order, written down from its layout.

Checked against diffusers 0.35.1 for SD1.5.
"""

SAMPLERS = {"down": "downsamplers.0.conv", "up": "upsamplers.0.conv"}
SD15 = (  # for each level: number of attentions, which resnets have a shortcut, whether it resamples
    ((2, (0, 0), True), (2, (1, 0), True), (2, (1, 0), True), (0, (0, 0), False)),
    ((0, (1, 1, 1), True), (3, (1, 1, 1), True), (3, (1, 1, 1), True), (3, (1, 1, 1), False)),
)


def _both(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def _attention(name):
    return [f"{name}.to_{x}.weight" for x in "qkv"] + _both(f"{name}.to_out.0")


def _resnet(shortcut):
    names = _both("norm1", "conv1", "time_emb_proj", "norm2", "conv2")
    return names + (_both("conv_shortcut") if shortcut else [])


def _transformer():
    block = [*_both("norm1"), *_attention("attn1"), *_both("norm2"), *_attention("attn2"),
             *_both("norm3", "ff.net.0.proj", "ff.net.2")]  # fmt: skip
    inner = [f"transformer_blocks.0.{name}" for name in block]
    return [*_both("norm", "proj_in"), *inner, *_both("proj_out")]


def _level(path, attentions, shortcuts):
    names = [f"{path}.attentions.{i}.{n}" for i in range(attentions) for n in _transformer()]
    return names + [f"{path}.resnets.{i}.{n}" for i, s in enumerate(shortcuts) for n in _resnet(s)]


def parameter_names(down, up):
    """List the names of a UNet with these levels."""
    names = _both("conv_in", "time_embedding.linear_1", "time_embedding.linear_2")
    for way, levels in (("down", down), ("up", up)):
        for number, (attentions, shortcuts, resamples) in enumerate(levels):
            path = f"{way}_blocks.{number}"
            names += _level(path, attentions, shortcuts)
            names += _both(f"{path}.{SAMPLERS[way]}") if resamples else []
    return [*names, *_level("mid_block", 1, (0, 0)), *_both("conv_norm_out", "conv_out")]
