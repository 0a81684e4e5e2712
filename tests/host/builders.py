"""Random latents and captions, settings and runs for tests in this process."""

import tempfile

import torch

LOOKS = (
    3  # passes before the first step: for changes in place, memory of one picture, and of a batch
)


def pairs(count, channels=4, size=8, width=768, pooled=None, length=77, seed=0):
    """Random latents and captions, made in inference mode as nodes do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        latents = [torch.randn(1, channels, size, size, generator=generator) for _ in range(count)]
        options = (
            {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
        )
        captions = [
            [torch.randn(1, length, width, generator=generator), dict(options)]
            for _ in range(count)
        ]
    return latents, captions


def settings(sara, **changes):
    options = {
        "steps": 4,
        "batch_size": 2,
        "fraction": 0.05,
        "save_dtype": "fp32",
        "gradient_checkpointing": False,
        **changes,
    }
    return sara.settings.RunSettings(**options)


def train(sara, patcher, latents, captions, settings, resume=None, new=None):
    """Run a training in a folder of its own; returns the delta and the losses."""
    examples = sara.examples.Examples(latents, captions)
    parent = tempfile.mkdtemp()
    folder = resume or new or sara.folder.RunFolder.create(parent, "run", settings)
    path, losses, _ = sara.run.run(patcher, examples, folder, None, resume is not None)
    return sara.core.SparseDelta.load(path), losses["loss"]


def bits(patcher):
    return {n: t.detach().clone() for n, t in patcher.model.diffusion_model.state_dict().items()}


def assert_same_bits(before, patcher):
    after = patcher.model.diffusion_model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def raw_output(model, call):
    """Return what the diffusion model itself put out during `call`."""
    seen = []
    hook = model.register_forward_hook(lambda m, i, o: seen.append(o.detach().float()))
    result = call()
    hook.remove()
    return result, seen[0]


def fail_at(call):
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt

    return fail
