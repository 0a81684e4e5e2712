"""Turn a folder of videos into a training set."""

from pathlib import Path

from comfy_api.latest import io, ui

from ...sara_core.pictures.encoding_cache import EncodingCache
from ...sara_core.pictures.picture_folder import describe_files
from .. import host
from ..inputs import advanced, chosen, refuse_unchosen, searched_as
from ..training.examples import NAME, PICTURE
from .clips import VIDEOS, ClipOptions, lengths
from .contact_sheet import contact_sheet
from .encoded_folder import encode_folder, refuse_missing
from .folder_inputs import SHOWN, folder_inputs, folder_options
from .image_folder import PATCH, conditioning_of, report

# Widgets of SaRA Image Folder that videos do not have.
OF_PICTURES = {"crops", "alpha", "more_sizes"}
PLAIN = {"crops": 1, "alpha": "background"}


def clip_inputs() -> list:
    """Widgets that say which stretches of the videos are taken."""
    return [
        io.Int.Input(
            "frames",
            default=33,
            min=1,
            max=1000,
            tooltip="Frames of a clip, at most; taken down to what the VAE encodes whole, such as 4n+1 for Wan and "
            "8n+1 for LTX-Video. Shorter videos are trained at half of it or a quarter.",
        ),
        io.Float.Input(
            "fps",
            default=16.0,
            min=0.0,
            max=240.0,
            step=0.001,
            tooltip="Frames a second that are taken: 16 for Wan, 24 for HunyuanVideo, 25 for LTX-Video. 0 takes every "
            "frame of the video.",
        ),
        io.Int.Input(
            "clips",
            default=1,
            min=1,
            max=100,
            tooltip="Stretches of time taken of each video, spread evenly over it; a single one is its middle.",
        ),
    ]


def video_inputs() -> list:
    """Widgets of SaRA Video Folder."""
    same = [entry for entry in folder_inputs() if entry.id not in OF_PICTURES]
    advanced([entry for entry in same if entry.id not in SHOWN])
    return [*clip_inputs(), *same]


class SaraVideoFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraVideoFolder",
            display_name="SaRA Video Folder",
            category="SaRA",
            description="Reads a folder of videos with captions, or of folders of frames, cuts clips out of them and "
            "encodes them for SaRA Train. What is encoded once is kept on disk.",
            hidden=[io.Hidden.unique_id],
            **searched_as("video dataset", "training clips", "wan training", "load videos folder"),
            inputs=[
                io.Vae.Input("vae", tooltip="VAE of the video model to train."),
                io.Clip.Input("clip", tooltip="CLIP of the model to train."),
                io.Combo.Input(
                    "folder",
                    options=chosen("folder", list(host.video_folders())),
                    tooltip="A folder in ComfyUI's input or datasets folder. Captions are .txt files beside the "
                    "videos, or tables; a folder of at least five pictures in it is a video of these frames. Press R "
                    "to refresh.",
                ),
                *video_inputs(),
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
                io.Conditioning.Output(
                    display_name="empty", tooltip="The empty caption, for caption dropout."
                ),
                io.Image.Output(
                    display_name="contact_sheet", tooltip="The middle frame of each entry."
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
            folder, "put a folder of videos into ComfyUI's input folder, and press R"
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_) -> list:
        path = host.video_folders().get(folder)
        return describe_files(Path(path)) if path else []

    @classmethod
    def execute(cls, vae, clip, folder, frames, fps, clips, model=None, **widgets) -> io.NodeOutput:
        refuse_missing(vae, clip)
        unit = host.compression(vae) * PATCH
        plain, limit = folder_options(unit, model, **PLAIN, **widgets)
        options = ClipOptions(**vars(plain), frames=lengths(vae, frames), fps=fps, clips=clips)
        cache = EncodingCache(host.cache_folder(), limit)
        path = Path(host.video_folder(folder))
        try:
            found = encode_folder(path, vae, clip, options, cache, cls.hidden.unique_id, VIDEOS)
        finally:
            cached = cache.trim()
        epoch = found.repeated(options.repeats)
        text = report(folder, found, epoch, cached, limit, "videos")
        sheet = contact_sheet(found, found.variants)
        positive = {name: conditioning_of(found, name) for name in found.texts}
        return io.NodeOutput(
            [
                {
                    "samples": found.encodings[v.key]["latent"][None],
                    PICTURE: v.digest,
                    NAME: v.file.name,
                }
                for v in epoch
            ],
            [positive[v.file.name] for v in epoch],
            found.captions[""],
            sheet,
            text,
            [found.texts[v.file.name] for v in epoch],
            ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()},
        )
