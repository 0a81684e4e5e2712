"""Train on several sets of pictures in one run."""

from comfy_api.latest import io

from ..inputs import searched_as
from ..training.examples import (
    NAME,
    PICTURE,
    WINDOW,
    flatten_conditioning,
    flatten_latents,
    flatten_masks,
    noise_masks,
    picture_labels,
    picture_names,
    picture_values,
)

Entries = tuple[list[dict], list[list], list]


def entries_of(latents, positive, masks, repeats: int) -> Entries:
    """Return latents, captions and masks of a set, one each per entry of an epoch.

    Raises:
        ValueError: Numbers of pictures, captions or masks that do not fit each other.
    """
    samples = flatten_latents(latents)
    captions = flatten_conditioning(positive, latents)
    given = flatten_masks(noise_masks(latents) if masks is None else masks, len(samples))
    names, labels = picture_names(latents), picture_labels(latents, "picture")
    windows = picture_values(latents, WINDOW)
    pictures = [
        {"samples": sample, PICTURE: name, NAME: label}
        | ({} if window is None else {WINDOW: window})
        for sample, name, label, window in zip(samples, names, labels, windows, strict=True)
    ]
    for picture, mask in zip(pictures, given or (), strict=False):
        picture["noise_mask"] = mask
    whole = [sample.new_ones((1, *sample.shape[-2:])) for sample in samples]
    return pictures * repeats, [[pair] for pair in captions] * repeats, (given or whole) * repeats


class SaraJoinPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraJoinPictures",
            display_name="SaRA Join Pictures",
            category="SaRA",
            description="Makes one training set of two, such as of two SaRA Image Folders with options of their "
            "own. Chain several for more.",
            is_input_list=True,
            **searched_as(
                "concat datasets", "multiple folders", "several concepts", "merge datasets"
            ),
            inputs=[
                io.Latent.Input("latents", tooltip="Pictures of the first set."),
                io.Conditioning.Input("positive", tooltip="Their captions."),
                io.Latent.Input("latents_2", tooltip="Pictures of the second set."),
                io.Conditioning.Input("positive_2", tooltip="Their captions."),
                _repeats("repeats", "first"),
                _repeats("repeats_2", "second"),
                io.Mask.Input("masks", optional=True, tooltip="Masks of the first set."),
                io.Mask.Input("masks_2", optional=True, tooltip="Masks of the second set."),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents", is_output_list=True, tooltip="One per entry."
                ),
                io.Conditioning.Output(
                    display_name="positive", is_output_list=True, tooltip="Caption of each entry."
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="What counts in the loss; everything of pictures without a mask.",
                ),
            ],
        )

    @classmethod
    def execute(cls, latents, positive, latents_2, positive_2, repeats, repeats_2, masks=None,
                masks_2=None) -> io.NodeOutput:  # fmt: skip
        one = entries_of(latents, positive, masks, repeats[0])
        two = entries_of(latents_2, positive_2, masks_2, repeats_2[0])
        return io.NodeOutput(*(first + second for first, second in zip(one, two, strict=True)))


def _repeats(name: str, which: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=1,
        min=1,
        max=1000,
        tooltip=f"Times each picture of the {which} set comes in an epoch, so that a small set counts as "
        "much as a large one.",
    )
