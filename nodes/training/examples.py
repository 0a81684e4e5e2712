"""What SaRA Train is given: latents, captions and masks as ComfyUI's nodes emit them."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Keys in a LATENT: by which windows of one picture are known as such, its name, and which window it is.
PICTURE, NAME, WINDOW = "sara_picture", "sara_name", "sara_window"
CAPTIONS = "sara_captions"  # in a conditioning's options: pairs to draw from when it is learned

# Options of a conditioning that hold latents and masks which models are given beside the noise.
REFERENCES, GIVEN = "reference_latents", ("concat_latent_image", "concat_mask")

# What text encoders put into the options, of the text itself: comfy/text_encoders
OF_TEXT = frozenset(
    "pooled_output minimax_token_tags sam3_multi_cond unprocessed_ltxav_embeds visual_pos_masks "
    "deepstack_embeds text_input_ids t5xxl_ids t5xxl_weights lyrics_strength".split()
)
OF_TEXT_BEGIN = ("attention_mask", "conditioning_")


def flatten_latents(latents: list[dict]) -> list[Tensor]:
    """Split LATENT inputs, single or batched, into latents of shape `(1, C, ...)`."""
    return [sample[None] for latent in latents for sample in latent["samples"]]


def noise_masks(latents: list[dict]) -> list[Tensor] | None:
    """Return the masks that latents carry, one per sample, all or none; None if there are none."""
    if not any(latent.get("noise_mask") is not None for latent in latents):
        return None
    masks = []
    for latent in latents:
        samples, given = latent["samples"], latent.get("noise_mask")
        if given is None:
            masks.append(torch.ones(len(samples), *samples.shape[-2:]))
        else:
            flat = given.reshape(-1, *given.shape[-2:])
            masks.append(flat.repeat(-(-len(samples) // len(flat)), 1, 1)[: len(samples)])
    return masks


def flatten_masks(masks: list[Tensor] | None, count: int) -> list[Tensor] | None:
    """Split MASK inputs, single or batched, into `count` masks of shape `(1, H, W)`.

    Raises:
        ValueError: Neither one mask in all nor one per picture.
    """
    if masks is None:
        return None
    flat = [mask[None] for entry in masks for mask in entry.reshape(-1, *entry.shape[-2:])]
    if len(flat) == 1:
        flat = flat * count
    if len(flat) != count:
        raise ValueError(
            f"{count} pictures but {len(flat)} masks are connected; SaRA Train needs one mask for "
            "each picture, or a single one for all"
        )
    return flat


def picture_names(latents: list[dict]) -> list[Hashable]:
    """Name the picture each latent is of; unnamed latents that share memory are of one."""
    names: list[Hashable] = []
    for latent in latents:
        for sample in latent["samples"]:
            names.append(latent.get(PICTURE, sample.data_ptr()))
    return names


def picture_values(latents: list[dict], key: str) -> list:
    """Return what each latent says under a key; None where it says nothing."""
    return [latent.get(key) for latent in latents for _ in latent["samples"]]


def picture_labels(latents: list[dict], kind: str) -> list[str]:
    """Name each latent for people: by its file, or by its number."""
    names = [latent.get(NAME, "") for latent in latents for _ in latent["samples"]]
    return [name or f"{kind} {number}" for number, name in enumerate(names, 1)]


def flatten_conditioning(conditioning: list[list], latents: list[dict]) -> list[list]:
    """Give each picture its conditioning: one `[cross_attention, options]` pair.

    Args:
        conditioning: A pair for each picture, for each batch of several, or for all.
        latents: The pictures, single or in batches.

    Raises:
        ValueError: Of another number.
    """
    pairs = [pair for entry in conditioning for pair in entry]
    sizes = [len(latent["samples"]) for latent in latents]
    if len(pairs) == 1:
        return pairs * sum(sizes)
    if len(pairs) == sum(sizes):
        return pairs
    if len(pairs) == len(conditioning) == len(sizes):
        return [pair for pair, size in zip(pairs, sizes, strict=True) for _ in range(size)]
    batches = "" if len(sizes) in (1, sum(sizes)) else f" in {len(sizes)} batches"
    raise ValueError(
        f"{sum(sizes)} pictures{batches} but {len(pairs)} captions are connected; SaRA Train needs one "
        "caption for each picture, for each batch, or a single one for all"
    )


def split_captions(pairs: list[list]) -> tuple[list[list], list[list[list]]]:
    """Part what pictures are measured with from what is drawn from when they are learned.

    Returns:
        Pairs without what `CAPTIONS` held, and what it held, a list for each; pairs that were shared
        still are. What nodes have added to the options since, such as FluxGuidance, counts for all of them.
    """
    parted: dict[tuple[int, int], tuple[list, list]] = {}
    for pair in pairs:
        cross_attention, options = pair
        which = id(cross_attention), id(options)
        if which not in parted:
            plain = {key: value for key, value in options.items() if key != CAPTIONS}
            several = [with_options(other, plain) for other in options.get(CAPTIONS, [])]
            parted[which] = ([cross_attention, plain] if several else pair, several)
    found = [parted[id(embedding), id(options)] for embedding, options in pairs]
    return [pair for pair, _ in found], [several for _, several in found]


def with_options(pair: list, options: dict) -> list:
    """Add options to a pair that it does not have: what nodes have given a caption beside its text."""
    cross_attention, own = pair
    added = {
        key: value
        for key, value in options.items()
        if key not in own and key not in OF_TEXT and not key.startswith(OF_TEXT_BEGIN)
    }
    return [cross_attention, {**added, **own}] if added else pair


@dataclass(frozen=True)
class Examples:
    """What a run is given: the pictures to learn first, then the regularisation pictures.

    Args:
        latents: One per picture, shape `(1, C, ...)`, as the VAE encoded them.
        captions: One conditioning pair per picture.
        empty: Conditioning pair that replaces dropped captions, or None.
        masks: What counts in the loss, one per picture to learn, shape `(1, H, W)`, or None.
        names: Picture that each entry to learn is a window of; each its own if None.
        num_regularisation: Number of regularisation pictures at the end.
        labels: Name of each picture for people; its number if there are none.
        drawn: Conditioning pairs of each picture to draw from when it is learned, in place of its
            caption; may be empty.
    """

    latents: list[Tensor]
    captions: list[list]
    empty: list | None = None
    masks: list[Tensor] | None = None
    names: list[Hashable] | None = None
    num_regularisation: int = 0
    labels: list[str] = field(default_factory=list)
    drawn: list[list[list]] = field(default_factory=list)

    def __post_init__(self):
        if not self.drawn:
            object.__setattr__(self, "drawn", [[] for _ in self.latents])
        if not self.labels:
            numbers = range(1, len(self.latents) + 1)
            object.__setattr__(self, "labels", [f"picture {number}" for number in numbers])

    @property
    def different_drawn(self) -> list[list]:
        """The pairs in `drawn`, each once, however many pictures share it."""
        every = (pair for pairs in self.drawn for pair in pairs)
        return list({(id(pair[0]), id(pair[1])): pair for pair in every}.values())

    @property
    def num_to_learn(self) -> int:
        """Number of entries to learn or hold out."""
        return len(self.latents) - self.num_regularisation


def split_validation(examples: Examples, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide entries into those to train on and those held out, all of a picture on one side.

    Args:
        examples: The entries; one that is repeated is held out once.
        share: Of the pictures, in `[0, 1)`; at least one is held out if above 0, and one trained on.
        seed: Of the choice.

    Raises:
        ValueError: Fewer than two pictures to divide.
    """
    names = examples.names or list(range(examples.num_to_learn))
    pictures = list(dict.fromkeys(names))
    if share <= 0:
        return list(range(len(names))), []
    if len(pictures) < 2:
        raise ValueError(
            "validation_split needs at least two pictures, one of them to hold out; connect more or "
            "set it to 0"
        )
    count = min(max(1, round(share * len(pictures))), len(pictures) - 1)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {pictures[i] for i in order[:count]}
    training = [i for i, name in enumerate(names) if name not in held_out]
    once = {examples.latents[i].data_ptr(): i for i, name in enumerate(names) if name in held_out}
    return training, sorted(once.values())


def gather_examples(
    latents: list[dict],
    positive: list[list],
    empty: list[list] | None,
    masks: list[Tensor] | None,
    regularisation_latents: list[dict] | None,
    regularisation_positive: list[list] | None,
) -> Examples:
    """Bring the inputs of SaRA Train, lists or batches, into one set.

    Raises:
        ValueError: Numbers of pictures, captions or masks that do not fit each other.
    """
    pictures = flatten_latents(latents)
    captions = flatten_conditioning(positive, latents)
    if (regularisation_latents is None) != (regularisation_positive is None):
        raise ValueError(
            "regularisation pictures need their captions: connect both regularisation_latents and "
            "regularisation_positive, or neither"
        )
    prior = flatten_latents(regularisation_latents or [])
    prior_captions = (
        flatten_conditioning(regularisation_positive, regularisation_latents) if prior else []
    )
    measured, drawn = split_captions(captions + prior_captions)
    return Examples(
        pictures + prior,
        measured,
        empty[0][0] if empty else None,
        flatten_masks(noise_masks(latents) if masks is None else masks, len(pictures)),
        picture_names(latents),
        len(prior),
        picture_labels(latents, "picture")
        + picture_labels(regularisation_latents or [], "regularisation picture"),
        drawn,
    )


def describe_examples(examples: Examples) -> dict:
    """Summarise pictures and captions, to recognise them when a run is resumed.

    Mean and deviation of each tensor: encoding again on a GPU does not give the same bits.
    """
    captions = []
    for pair in (*examples.captions, *examples.different_drawn, examples.empty):
        cross_attention, options = pair or (None, {})
        captions += [t for t in (cross_attention, options.get("pooled_output")) if t is not None]
    masks = examples.masks or ()
    return {
        "examples": [_moments(tensor) for tensor in (*examples.latents, *captions, *masks)],
        "regularisation pictures": examples.num_regularisation,
        "masks": len(masks),
        "given": [_moments(tensor) for pair in examples.captions for tensor in _given(pair[1])],
    }


def _given(options: dict) -> list[Tensor]:
    """Return latents and masks that a model is given beside the noise."""
    given = [options.get(key) for key in GIVEN]
    return [t for t in (*given, *(options.get(REFERENCES) or [])) if t is not None]


def _moments(tensor: Tensor) -> list:
    values = tensor.nan_to_num().float()
    return [list(tensor.shape), values.mean().item(), values.std(correction=0).item()]


def differences(saved: dict, now: dict, other: str = "the run") -> list[str]:
    """Tell what the model and examples of a saved run, or another process, differ in from those at hand."""
    wrong = []
    if saved["model"] != now["model"]:
        wrong.append(f"the model is of the family {now['model']}, {other}'s {saved['model']}")
    for kind in ("regularisation pictures", "masks"):
        if saved[kind] != now[kind]:
            wrong.append(f"there are {now[kind]} {kind}, {other} had {saved[kind]}")
    if saved.get("patches", now["patches"]) != now["patches"]:
        wrong.append(
            f"the LoRAs on the model's 8-bit weights would be {now['patches']}, {other}'s were "
            f"{saved['patches']}: set offloading as it was"
        )
    if saved["held out"] != now["held out"]:
        wrong.append("other pictures would be held out for validation")
    if saved["sampling"] != now["sampling"]:
        wrong.append(f"the sampling is {now['sampling']}, {other}'s {saved['sampling']}")
    given = saved.get("given", now["given"])  # which runs of before did not tell
    if len(given) != len(now["given"]) or not all(map(_alike, given, now["given"])):
        wrong.append("other reference latents or masks are given beside the captions")
    old, new = saved["examples"], now["examples"]
    if len(old) != len(new):
        wrong.append(f"there are {len(new)} latents, embeddings and masks, {other} had {len(old)}")
    else:
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if not _alike(a, b)]
        if changed:
            wrong.append(f"{len(changed)} of {len(new)} latents, embeddings and masks have changed")
    return wrong


def _alike(one: list, two: list) -> bool:
    (shape, *numbers), (shape2, *numbers2) = one, two
    scale = max(abs(numbers[1]), 1e-6)
    near = all(abs(a - b) <= 0.01 * scale for a, b in zip(numbers, numbers2, strict=True))
    return list(shape) == list(shape2) and near
