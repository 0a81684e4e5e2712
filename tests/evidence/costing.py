"""What a method costs: memory and time of its steps, and the file of what it learned."""

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from ..harness.memory import growth
from .methods import num_trained
from .one import concepts_of, optimizer_of, train

WARM_UP = 3  # steps


def run(base, plan):
    """Train for some steps; the peak is counted from the model at rest."""
    style = plan["style"]
    shown, _ = concepts_of(base, style, plan["pictures"], plan["seed"])
    base.latents(style, shown)

    def prepare(model):
        optimizer = optimizer_of(base, plan, style, shown, model)
        train(base, model, optimizer, style, shown, WARM_UP, plan["batch"], plan["seed"])
        made.append(optimizer)

    made = []
    prepare(base.load())  # loads what is loaded once, which is not to count
    made.clear()
    model = base.load()
    _, size = growth(lambda: prepare(model))
    (optimizer,) = made
    seconds = train(
        base, model, optimizer, style, shown, plan["steps"], plan["batch"], plan["seed"]
    )
    found = {
        "peak_bytes": size,
        "step_seconds": seconds,
        "file_bytes": file_bytes(model, optimizer),
    }
    return {**plan, "trained": num_trained(optimizer), "cost": found}


def file_bytes(model, optimizer):
    """Size of a delta as SaRA saves it, or of the weights that were trained in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "learned.safetensors"
        if hasattr(optimizer, "delta"):
            optimizer.delta().save(file)
        else:
            trained = {n: p.detach().half() for n, p in model.named_parameters() if p.requires_grad}
            save_file({name: p.contiguous() for name, p in trained.items()}, file)
        return file.stat().st_size
