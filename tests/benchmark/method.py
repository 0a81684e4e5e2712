"""One training method on one model, in a process of its own, one step at a time on request.

Started by `tests/benchmark/run.py`. Each line on standard input is a command: `step` makes a step and
answers with its times in seconds; `end` answers with the peak of the process's resident memory.
"""

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import utils.extra_config  # noqa: E402, F401  (before another `utils` is found)
from comfy.cli_args import args  # noqa: E402

args.cpu = True
sys.path.append(str(ROOT))

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from torch import Tensor  # noqa: E402

SIZES = {  # model_channels, channel_mult: SD1.5's own, and the same network made small
    "full": (320, (1, 2, 4, 4)),
    "quick": (64, (1, 2, 4, 4)),
}
STD = 0.02  # of the random weights
STEP_OF_8_BITS = torch.tensor(5 * STD / 448)  # the largest float8_e4m3fn is 448
ON_THE_WAY = contextlib.ExitStack()  # what stays on for the whole process


def make_unet(size, dtype=torch.float32, offloaded=False):
    """SD1.5's UNet as ComfyUI builds it, with random weights.

    In half precision and in eight bits it computes in float32, as ComfyUI does where the processor is slow
    in halves: each layer casts its weight when it is used. Offloaded, each layer copies its weight when it is used,
    as from main memory to a graphics card.
    """
    operations = comfy.ops.disable_weight_init
    if dtype != torch.float32 or offloaded:
        operations = comfy.ops.manual_cast
    if offloaded:
        cast_to = comfy.model_management.cast_to
        comfy.model_management.cast_to = lambda *args, **kwargs: cast_to(
            *args, **{**kwargs, "copy": True}
        )
    channels, multipliers = SIZES[size]
    net = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=channels,
        channel_mult=multipliers, num_res_blocks=[2, 2, 2, 2],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1, context_dim=768, num_heads=8, num_head_channels=-1,
        use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False,
        dtype=dtype, device="cpu", operations=operations,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1 and dtype.itemsize > 1:
                parameter.normal_(0, STD, generator=generator)
            elif parameter.dim() > 1:
                numbers = torch.empty(parameter.shape).normal_(0, STD, generator=generator)
                parameter.copy_(numbers / STEP_OF_8_BITS)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return net


class Nothing:
    """An 'optimizer' for the floors."""

    def step(self):
        pass

    def zero_grad(self):
        pass


def floor_frozen(net, options):
    """Forward and backward to the input alone: no gradient of any weight."""
    net.requires_grad_(False)
    return Nothing(), 0


def floor_dense_backward(net, options):
    """Every gradient of the matrices SaRA chooses from, dropped as soon as it is made."""
    trained = 0
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
        if parameter.requires_grad:
            trained += parameter.numel()
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return Nothing(), trained


def sara(net, options):
    from sara_core import SaraAdamW
    from sara_core.training import weight_casts
    from sara_core.training.gradient_checkpointing import checkpointed
    from sara_core.weights.quantised import numbers_on_use

    ON_THE_WAY.enter_context(weight_casts.recomputed())  # as the trainer does
    if net.dtype.itemsize < 4:
        matrices = [n for n, p in net.named_parameters() if p.dim() > 1 and p.dtype.itemsize == 1]
        net.dtype = torch.float32  # what ComfyUI casts the time embedding to
        converters = {name: Tensor.detach for name, _ in net.named_parameters()}
        scales = dict.fromkeys(matrices, STEP_OF_8_BITS)
        ON_THE_WAY.enter_context(numbers_on_use(net, converters, torch.float32, scales))
        net.requires_grad_(True)
    optimizer = SaraAdamW(
        net, fraction=options["fraction"], lr=1e-4, low_rank_weight=options.get("low_rank", 5e-4),
        moments=options.get("moments", "fp32"), zeros=options.get("zeros", "auto"),
    )  # fmt: skip
    if options.get("checkpointing"):
        ON_THE_WAY.enter_context(checkpointed(net, True))
    return optimizer, optimizer.num_trainable


def adamw_full(net, options):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    return optimizer, sum(p.numel() for p in net.parameters())


def _peft(net, config):
    from peft import inject_adapter_in_model

    net.requires_grad_(False)
    inject_adapter_in_model(config, net)
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4), sum(p.numel() for p in trained)


def _names(net, kinds):
    return [name for name, module in net.named_modules() if isinstance(module, kinds)]


def peft_lora(net, options):
    from peft import LoraConfig

    names = _names(net, (torch.nn.Linear, torch.nn.Conv2d))
    return _peft(net, LoraConfig(r=8, target_modules=names))


def peft_shira(net, options):
    from peft import ShiraConfig

    return _peft(net, ShiraConfig(r=8, target_modules=_names(net, torch.nn.Linear)))


def peft_supertuning(net, options):
    from peft import SupertuningConfig

    config = SupertuningConfig(
        sparsity=1 - options["fraction"], select_top=False,
        target_modules=_names(net, torch.nn.Linear),
    )  # fmt: skip
    return _peft(net, config)


def _threshold(fraction):
    return STD * 2**0.5 * torch.erfinv(torch.tensor(fraction, dtype=torch.float64)).item()


def pytorch_optimizer_sara(net, options):
    from pytorch_optimizer import SaRA

    chosen = [p for p in net.parameters() if p.dim() > 1]
    net.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    threshold = _threshold(options["fraction"])
    optimizer = SaRA(
        chosen, lr=1e-4, threshold=threshold, lambda_rank=options.get("low_rank", 5e-4)
    )
    return optimizer, sum(int((p.abs() < threshold).sum()) for p in chosen)


def official_sara(net, options):
    """The authors' optimizer, from a checkout of theirs."""
    sys.path.insert(0, os.environ["SARA_OFFICIAL"])
    from optim.adamw import AdamW

    threshold = _threshold(options["fraction"])
    # It fails where it re-selects, so never; its low-rank loss, off by default, has no effect.
    optimizer = AdamW(net, lr=1e-4, threshold=threshold, progressive_iter=10**9)
    return optimizer, sum(p.numel() for group in optimizer.param_groups for p in group["params"])


METHODS = {
    "floor-frozen": floor_frozen,
    "floor-dense-backward": floor_dense_backward,
    "sara": sara,
    "adamw-full": adamw_full,
    "peft-lora": peft_lora,
    "peft-shira": peft_shira,
    "peft-supertuning": peft_supertuning,
    "pytorch-optimizer-sara": pytorch_optimizer_sara,
    "official-sara": official_sara,
}


def peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("the peak of the resident memory is not in /proc/self/status")


def timed_step(net, optimizer, batch):
    """Make a step and return its parts in seconds."""
    low_rank = getattr(optimizer, "add_low_rank_gradient_", lambda: None)
    marks = [time.perf_counter()]
    latents, times, context, target = batch
    loss = (net(latents.requires_grad_(True), times, context) - target).square().mean()
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    low_rank()
    marks.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad()
    latents.grad = None
    marks.append(time.perf_counter())
    names = ("forward_seconds", "backward_seconds", "low_rank_seconds", "optimizer_seconds")
    parts = {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}
    return {**parts, "step_seconds": marks[-1] - marks[0], "loss": loss.item()}


def main():
    method, size, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.manual_seed(0)
    dtype = getattr(torch, options.get("dtype", "float32"))
    net = make_unet(size, dtype, options.get("offloaded", False))
    total = sum(p.numel() for p in net.parameters())
    count = options.get("batch_size", 1)
    batch = (torch.randn(count, 4, 32, 32), torch.full((count,), 500.0),
             torch.randn(count, 77, 768), torch.randn(count, 4, 32, 32))  # fmt: skip
    gc.collect()
    started = time.perf_counter()
    optimizer, trained = METHODS[method](net, options)
    answer = {"trained": trained, "trained_fraction": trained / total, "parameters": total,
              "setup_seconds": time.perf_counter() - started}  # fmt: skip
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps({"peak_bytes": peak_bytes()}), flush=True)
            return
        print(json.dumps(timed_step(net, optimizer, batch)), flush=True)


if __name__ == "__main__":
    main()
