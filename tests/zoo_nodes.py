"""Nodes for the family tests only: random examples, what a model puts out, and a look into a training.

Copied into a server's custom_nodes. The loss of a training's last step is worked out here by hand, in
the family's own terms, from the noise that was drawn and what the network itself put out.
"""

import importlib.util
import os
import sys

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from safetensors.torch import save_file

watched = {}


def zoo(path):
    spec = importlib.util.spec_from_file_location("sara_zoo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sara_zoo"] = module
    spec.loader.exec_module(module)
    return module


def pack(name):
    return next(m for key, m in list(sys.modules.items()) if key.endswith(f"sara_core.{name}"))


def output_of(model, latents, captions):
    """Estimates of the clean latents, at one noise level, one example after the other."""
    sigma = model.model_sampling.percent_to_sigma(0.6)
    outputs = []
    for number, (latent, caption) in enumerate(zip(latents, captions, strict=True)):
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(number))
        clean = model.process_latent_in(latent.clone())
        noisy = model.model_sampling.noise_scaling(torch.tensor([sigma]), noise, clean)
        conds = comfy.sampler_helpers.convert_cond([caption])
        conds = comfy.samplers.encode_model_conds(
            model.extra_conds, conds, noise, torch.device("cpu"), "positive", latent_image=latent,
            denoise_mask=None, seed=0,
        )[0]["model_conds"]  # fmt: skip
        inputs = {k: c.process_cond(batch_size=1, area=None).cond for k, c in conds.items()}
        inputs = {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in inputs.items()}
        options = {"cond_or_uncond": [0], "sigmas": torch.tensor([sigma])}
        outputs.append(
            model.apply_model(
                noisy, torch.tensor([sigma]), **inputs, transformer_options=options
            ).clone()
        )
    return torch.cat(outputs)


def loss_by_hand(model, clean, noise, sigma, put_out):
    """Mean squared error of what the network put out, against what its family is taught."""
    kind = model.model_type.name
    s = sigma.double().view(-1, *[1] * (clean.dim() - 1))
    clean, noise = clean.double(), noise.double()
    put_out = put_out.double()[:, : clean.shape[1]]
    if kind == "EPS":
        target = noise
    elif kind == "V_PREDICTION":
        target = noise / (1 + s**2).sqrt() - clean * s / (1 + s**2).sqrt()
    elif kind in ("FLOW", "FLUX"):
        target = noise - clean
    elif kind == "EDM":
        d = model.model_sampling.sigma_data
        noisy = clean + s * noise
        target = (clean - noisy * d**2 / (s**2 + d**2)) * (s**2 + d**2).sqrt() / (s * d)
    else:
        raise ValueError(kind)
    return (put_out - target).square().mean()


class TestExamples:
    RETURN_TYPES = ("LATENT", "CONDITIONING")
    OUTPUT_IS_LIST = (True, True)
    FUNCTION = "run"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {}), "family": ("STRING", {})}}

    def run(self, path, family):
        latents, captions = zoo(path).examples(family)
        return [{"samples": latent} for latent in latents], [[caption] for caption in captions]


class TestWatch:
    """Note what the coming training does to a model: its last output, and the last step's loss."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "testing"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "latents": ("LATENT",),
                "positive": ("CONDITIONING",),
                "file": ("STRING", {}),
            }
        }

    def run(self, model, latents, positive, file):
        watched.clear()
        watched.update(model=model[0].model, file=file[0])
        watched.update(latents=[latent["samples"] for latent in latents])
        watched.update(captions=[pair for conditioning in positive for pair in conditioning])
        optimizer, schedule = (
            pack("optimizer.sara_adamw").SaraAdamW,
            pack("training.objective").NoiseSchedule,
        )
        restore, add_noise = optimizer.restore, schedule.add_noise
        network = model[0].model.diffusion_model

        def look(module, inputs, output):
            watched["put_out"] = output.detach().float().clone()

        handle = network.register_forward_hook(look)

        def noted(self, clean, noise, sigma):
            watched["drawn"] = clean.clone(), noise.clone(), sigma.clone()
            return add_noise(self, clean, noise, sigma)

        def last_look(self):
            optimizer.restore, schedule.add_noise = restore, add_noise
            handle.remove()
            with torch.no_grad():
                loss = loss_by_hand(watched["model"], *watched["drawn"], watched["put_out"])
                out = output_of(watched["model"], watched["latents"], watched["captions"])
            os.makedirs(os.path.dirname(watched["file"]), exist_ok=True)
            save_file({"output": out, "loss": loss}, watched["file"])
            restore(self)

        optimizer.restore, schedule.add_noise = last_look, noted
        return (model[0],)


class TestOutput:
    """Save what a model puts out for the examples."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = "testing"
    INPUT_IS_LIST = True
    INPUT_TYPES = TestWatch.INPUT_TYPES

    def run(self, model, latents, positive, file):
        comfy.model_management.load_models_gpu([model[0]])
        captions = [pair for conditioning in positive for pair in conditioning]
        out = output_of(model[0].model, [latent["samples"] for latent in latents], captions)
        os.makedirs(os.path.dirname(file[0]), exist_ok=True)
        number = sum(p.numel() for p in model[0].model.diffusion_model.parameters())
        kind = model[0].model.model_type.name
        save_file(
            {"output": out},
            file[0],
            {"parameters": str(number), "kind": kind,
             "config": type(model[0].model.model_config).__name__},
        )  # fmt: skip
        return {}


NODE_CLASS_MAPPINGS = {
    "TestExamples": TestExamples,
    "TestWatch": TestWatch,
    "TestOutput": TestOutput,
}
