"""Nodes for the fault suite only: make the server process fail at a chosen moment, and look at a model.

Copied into a server's custom_nodes by `tests/faults.py`. They reach into nothing of ours: a fault
comes from where it would come from outside, the model's own layers or the operating system.
"""

import hashlib
import os
import resource

import torch
from torch.nn.modules import module as hooks

FAULTS = ("none", "oom forward", "oom backward", "oom always", "nan once", "nan always", "crash",
          "disk full", "disk full for a while", "read-only", "read-only for a while")  # fmt: skip
FOR_A_WHILE = 5  # forward passes
NO_LIMIT = resource.RLIM_INFINITY
installed = []


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Fault:
    """Counts a diffusion model's forward passes with gradients, and fails at one of them.

    Previews are sampled without.
    """

    def __init__(self, kind, at, target, folder):
        self.kind, self.at, self.target, self.folder, self.count = kind, at, target, folder, 0

    def is_meant(self, module):
        return module is self.target and torch.is_grad_enabled()

    def before(self, module, inputs):
        if not self.is_meant(module):
            return
        self.count += 1
        kind, due = self.kind, self.count == self.at
        if kind == "oom forward" and due or kind == "oom always" and self.count >= self.at:
            out_of_memory()
        if kind == "crash" and due:
            raise RuntimeError("an error from somewhere")
        broken = kind.startswith(("disk full", "read-only"))
        if broken and due:
            self.set_writable(False)
        if broken and kind.endswith("while") and self.count == self.at + FOR_A_WHILE:
            self.set_writable(True)

    def after(self, module, inputs, output):
        if not self.is_meant(module) or self.count < self.at:
            return None
        if self.kind == "oom backward" and self.count == self.at:
            output.register_hook(lambda gradient: out_of_memory())
        if self.kind == "nan always" or self.kind == "nan once" and self.count == self.at:
            return output * float("nan")
        return None

    def set_writable(self, writable):
        if self.kind.startswith("disk full"):
            limit = NO_LIMIT if writable else 1_000_000  # enough for the server's own log
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, NO_LIMIT))
        else:
            for folder in [self.folder, *(p for p in os.scandir(self.folder) if p.is_dir())]:
                os.chmod(folder, 0o755 if writable else 0o555)


def clear():
    for fault, handles in installed:
        for handle in handles:
            handle.remove()
        if fault.kind.startswith(("disk full", "read-only")):
            fault.set_writable(True)
    installed.clear()


class TestFault:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "kind": (FAULTS,),
                "at": ("INT", {"default": 1}),
                "folder": ("STRING", {"default": ""}),
                "nonce": ("STRING", {"default": ""}),
            }
        }

    def run(self, model, kind, at, folder, nonce):
        clear()
        fault = Fault(kind, at, model.model.diffusion_model, folder)
        rank = os.environ.get("RANK")
        if kind != "none" and rank == os.environ.get("FAULT_RANK", rank):
            handles = [
                hooks.register_module_forward_pre_hook(fault.before),
                hooks.register_module_forward_hook(fault.after),
            ]
            installed.append((fault, handles))
        return (model,)


class TestLookAtModel:
    """Show a digest of all that a training must leave as it was."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "nonce": ("STRING", {"default": ""})}}

    def run(self, model, nonce):
        clear()
        digest, facts = hashlib.sha256(), []
        # The sampling beside it is an object that ComfyUI exchanges while a patched clone is loaded.
        diffusion_model = model.model.diffusion_model
        for name, tensor in diffusion_model.state_dict().items():
            digest.update(name.encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
        for name, module in diffusion_model.named_modules():
            own = [
                len(getattr(module, kind))
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ]
            facts.append((name, module.training, own, "forward" in vars(module)))
        facts += [
            (n, p.requires_grad, p.grad is None) for n, p in diffusion_model.named_parameters()
        ]
        digest.update(repr(facts).encode())
        return {"ui": {"text": (digest.hexdigest(), str(id(diffusion_model)))}}


NODE_CLASS_MAPPINGS = {"TestFault": TestFault, "TestLookAtModel": TestLookAtModel}
