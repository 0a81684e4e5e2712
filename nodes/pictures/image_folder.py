"""Turn a folder of pictures into a training set."""

from collections import Counter
from pathlib import Path

from comfy_api.latest import io, ui

from ...sara_core.pictures.encoding_cache import EncodingCache
from ...sara_core.pictures.picture_folder import describe_files
from .. import host
from ..inputs import chosen, refuse_unchosen, searched_as
from ..training.examples import CAPTIONS, NAME, PICTURE, WINDOW
from .contact_sheet import contact_sheet
from .encoded_folder import encode_folder, mask_of, refuse_missing
from .folder_inputs import folder_inputs, folder_options
from .folder_plan import EncodedFolder, Variant

PATCH = 2  # latent values a transformer's patch spans per side; U-Nets take it as well
BATCH_SIZES = (1, 2, 4, 8)
MAX_NAMES = 20


def report(
    name: str,
    folder: EncodedFolder,
    epoch: list[Variant],
    cached: tuple[int, int],
    limit: int,
    word: str = "pictures",
) -> str:
    """Tell what a folder holds, what was made of it and what was left out."""
    files = {v.file.name: v.file for v in folder.variants}
    sources = Counter(file.source or "none" for file in files.values())
    sizes = Counter(v.shape for v in epoch)
    lines = [
        f"{name}: {len(files)} {word}, {len(epoch)} entries in an epoch",
        "captions: " + ", ".join(f"{count} from {source}" for source, count in sources.items()),
        "",
        *(f"  {'x'.join(map(str, shape))}: {n} entries" for shape, n in sizes.most_common()),
        "",
        "steps in an epoch: "
        + ", ".join(
            f"{sum(-(-count // size) for count in sizes.values())} at batch size {size}"
            for size in BATCH_SIZES
        ),
        f"cache: {folder.read} of {len(folder.variants)} encodings were in it; it holds {cached[0]} "
        f"files, {cached[1] / 1e6:.1f} MB of at most {limit / 1e6:.0f} MB",
    ]
    if folder.drawn:
        count = sum(len(set(folder.drawn[name])) for name in files if name in folder.drawn)
        several = sum(name in folder.drawn for name in files)
        lines.append(f"captions to draw from: {count}, of {several} {word}")
    repeated = {f.repeats for f in files.values()} - {1}
    if repeated:
        lines.append(f"repeats by folder name: {', '.join(map(str, sorted(repeated)))}")
    for title, names in (
        ("without a caption of their own", [n for n in folder.missing if n in files]),
        ("at a smaller size, as they would have to be enlarged too much", folder.reduced),
        ("left out or incomplete", [str(p) for p in folder.problems if not p.is_note]),
        ("to be known of", [str(p) for p in folder.problems if p.is_note]),
    ):
        if names:
            lines += ["", f"{len(names)} {title}:", *(f"  {n}" for n in names[:MAX_NAMES])]
            lines += [f"  and {len(names) - MAX_NAMES} more"] * (len(names) > MAX_NAMES)
    return "\n".join(lines)


def conditioning_of(folder: EncodedFolder, name: str) -> list:
    """Return the CONDITIONING of a file, which carries the captions to draw from if it has several."""
    conditioning = folder.captions[folder.texts[name]]
    drawn = [pair for text in folder.drawn.get(name, ()) for pair in folder.captions[text]]
    if not drawn:
        return conditioning
    return [[embedding, {**options, CAPTIONS: drawn}] for embedding, options in conditioning]


class SaraImageFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraImageFolder",
            display_name="SaRA Image Folder",
            category="SaRA",
            description="Reads a folder of pictures with captions, turns them upright, crops them to "
            "a few sizes and encodes them for SaRA Train. What is encoded once is kept on disk.",
            hidden=[io.Hidden.unique_id],
            **searched_as(
                "dataset",
                "training images",
                "captions",
                "load images folder",
                "aspect ratio buckets",
            ),
            inputs=[
                io.Vae.Input("vae", tooltip="VAE of the model to train."),
                io.Clip.Input("clip", tooltip="CLIP of the model to train."),
                io.Combo.Input(
                    "folder",
                    options=chosen("folder", list(host.picture_folders())),
                    tooltip="A folder in ComfyUI's input or datasets folder. Captions are .txt or "
                    ".caption files beside the pictures, or tables such as metadata.jsonl; folders "
                    "in it such as 10_name repeat their pictures ten times. Press R to refresh.",
                ),
                *folder_inputs(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Model to train, for a size of 0: what it was trained at.",
                ),
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
                    tooltip="What counts in the loss, at the latents' resolution.",
                ),
                io.Conditioning.Output(
                    display_name="empty", tooltip="The empty caption, for caption dropout."
                ),
                io.Image.Output(
                    display_name="contact_sheet", tooltip="The entries with size and caption."
                ),
                io.String.Output(display_name="report", tooltip="Counts, and what was left out."),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="Text of each entry's caption, for nodes that encode it in their own way.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder):
        return refuse_unchosen(
            folder, "put a folder of pictures into ComfyUI's input folder, and press R"
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_) -> list:
        path = host.picture_folders().get(folder)
        return describe_files(Path(path)) if path else []

    @classmethod
    def execute(cls, vae, clip, folder, model=None, **widgets) -> io.NodeOutput:
        refuse_missing(vae, clip)
        unit = host.compression(vae) * PATCH
        options, limit = folder_options(unit, model, **widgets)
        cache = EncodingCache(host.cache_folder(), limit)
        path = Path(host.picture_folder(folder))
        try:
            found = encode_folder(path, vae, clip, options, cache, cls.hidden.unique_id)
        finally:
            cached = cache.trim()
        epoch = found.repeated(options.repeats)
        text = report(folder, found, epoch, cached, limit)
        sheet = contact_sheet(found, found.variants)
        encodings = [found.encodings[v.key] for v in epoch]
        positive = {name: conditioning_of(found, name) for name in found.texts}
        return io.NodeOutput(
            [
                {
                    "samples": encoding["latent"][None],
                    PICTURE: v.digest,
                    NAME: v.file.name,
                    WINDOW: v.place,
                }
                for v, encoding in zip(epoch, encodings, strict=True)
            ],
            [positive[v.file.name] for v in epoch],
            [mask_of(encoding, options.use_alpha) for encoding in encodings],
            found.captions[""],
            sheet,
            text,
            [found.texts[v.file.name] for v in epoch],
            ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()},
        )
