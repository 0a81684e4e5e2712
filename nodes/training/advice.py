"""What is likely wrong with a training, said before it begins."""

import torch

from ...sara_core.optimizer.packages import PRODIGY
from ...sara_core.training.run_settings import RunSettings
from .. import host
from .epochs import epochs_of
from .examples import Examples
from .unlearnable import listed, unmasked

MANY_EPOCHS = 300
SMALL_FACTOR = 0.1


def likely_mistakes(
    patcher, settings: RunSettings, examples: Examples, batch_size: int
) -> list[str]:
    """Say what is probably not meant, a line each; `batch_size` is that of all processes together."""
    captions = [pair[0] for pair in examples.captions[: examples.num_to_learn]]
    count, rounds = examples.num_to_learn, epochs_of(settings, examples, batch_size)
    found = []
    is_same = all(_equal(caption, captions[0]) for caption in captions)
    if is_same and examples.empty is not None and _equal(captions[0], examples.empty[0]):
        found.append(
            "no picture has a caption: what is learned will show in everything the model makes; "
            "put text files beside the pictures, or set a trigger word in SaRA Image Folder"
        )
    elif is_same and count > 1:
        found.append(
            "all pictures have the same caption: prompts will hardly tell what they show apart"
        )
    if empty := unmasked(examples):
        found.append(f"the masks keep nothing of {listed(empty)}, so nothing is learned of them")
    if batch_size > count:
        found.append(
            f"batch_size is {batch_size}, but there are {count} pictures: each step goes "
            "over all of them at once"
        )
    if rounds > MANY_EPOCHS:
        found.append(
            f"{settings.steps} steps go {rounds:.0f} times over the pictures, which is likely to "
            "memorise them; hold some out with validation_split to see when"
        )
    if settings.optimizer == PRODIGY and 0 < settings.learning_rate < SMALL_FACTOR:
        found.append(
            f"prodigy finds its learning rate by itself and multiplies it by learning_rate, which is "
            f"{settings.learning_rate:g}: hardly anything is learned; 0 takes 1"
        )
    if examples.empty is None and settings.caption_dropout:
        found.append(
            "caption_dropout has no effect, as nothing is connected to empty; connect empty of SaRA "
            "Image Folder, or set it to 0"
        )
    if host.is_guidance_distilled(patcher):
        found.append(
            "the model was distilled to need no guidance: train it gently, for few steps, or the "
            "distillation is lost"
        )
    return found


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one is two or one.shape == two.shape and torch.equal(one, two)
