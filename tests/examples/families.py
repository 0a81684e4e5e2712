"""Examples with other families, set to the files that ComfyUI's own templates load."""

from .parts import STYLE, node, note, prompt

HUB = "https://huggingface.co/"


def file(directory, place):
    """A model file: its name, where the frontend offers to download it from, and where it belongs."""
    return {"name": place.rpartition("/")[2], "url": HUB + place, "directory": directory}


KONTEXT = file(
    "diffusion_models",
    "Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
    "flux1-dev-kontext_fp8_scaled.safetensors",
)
CLIP_L = file("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors")
T5 = file(
    "text_encoders",
    "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp8_e4m3fn_scaled.safetensors",
)
FLUX_VAE = file(
    "vae", "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"
)
WAN_FILES = "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
WAN = file("diffusion_models", WAN_FILES + "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors")
UMT5 = file("text_encoders", WAN_FILES + "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
WAN_VAE = file("vae", WAN_FILES + "vae/wan_2.1_vae.safetensors")


def loaders(model, vae):
    """Loaders of a diffusion model and a VAE."""
    return {
        "model": node("UNETLoader", (0, 400), models=[model], unet_name=model["name"]),
        "vae": node("VAELoader", (0, 760), models=[vae], vae_name=vae["name"]),
    }


EDIT = f"make it a {STYLE} drawing"
FAMILY_SPECS = {
    "8 Train an edit": {
        "note": note(
            "## Train an edit (Flux Kontext)\n\nTwo folders of pictures with the same names: *before* and "
            "*after* the edit. Text files beside those after it say the instruction; without them it is "
            "**default_caption**.\n\n1. **SaRA Image Folder**: the pictures after the edit.\n2. **SaRA "
            "Reference Pictures**: the folder of those before it. It cuts each to the same window.\n3. "
            "**VAE Encode** and **ReferenceLatent** give every caption its picture, as they do for "
            "sampling.\n4. **Load Image**: a picture that is in neither folder, for the previews.\n\n**optimizer_moments** "
            "is *8bit*, which needs `pip install torchao` in ComfyUI's Python; without it choose *fp32*.\n\nFor "
            "Qwen-Image-Edit take TextEncodeQwenImageEdit in place of ReferenceLatent: its prompt is "
            "**captions** of the folder."
        ),
        **loaders(KONTEXT, FLUX_VAE),
        "clip": node("DualCLIPLoader", (0, 550), models=[CLIP_L, T5], clip_name1=CLIP_L["name"],
                     clip_name2=T5["name"], type="flux"),
        "folder": node(
            "SaraImageFolder", (420, 0), "After the edit",
            {"vae": ("vae", 0), "clip": ("clip", 0), "model": ("model", 0)}, default_caption=EDIT,
        ),
        "references": node(
            "SaraReferencePictures", (420, 740), "Before the edit", {"latents": ("folder", 0)}
        ),
        "encoded": node(
            "VAEEncode", (880, 1020), None, {"pixels": ("references", 0), "vae": ("vae", 0)}
        ),
        "positive": node(
            "ReferenceLatent", (880, 1140), None,
            {"conditioning": ("folder", 1), "latent": ("encoded", 0)},
        ),
        "image": node("LoadImage", (880, 0), "Picture of the previews", image="example.png"),
        "scaled": node("FluxKontextImageScale", (880, 450), None, {"image": ("image", 0)}),
        "encoded image": node(
            "VAEEncode", (880, 550), None, {"pixels": ("scaled", 0), "vae": ("vae", 0)}
        ),
        "prompt": prompt(EDIT, (880, 670), "Prompt of the previews", clip=("clip", 0)),
        "asked": node(
            "ReferenceLatent", (880, 880), None,
            {"conditioning": ("prompt", 0), "latent": ("encoded image", 0)},
        ),
        "sampling": node(
            "SaraSampling", (1320, 0), None,
            {"vae": ("vae", 0), "positive": ("asked", 0), "negative": ("folder", 3),
             "latent": ("encoded image", 0)},
            seed=1, cfg=1.0, scheduler="simple",
        ),
        "train": node(
            "SaraTrain", (1700, 0), None,
            {
                "model": ("model", 0), "latents": ("folder", 0), "positive": ("positive", 0),
                "empty": ("folder", 3), "preview": ("sampling", 0),
            },
            output_name=STYLE, batch_size=1, fraction=0.02, moments="8bit",
        ),
    },
    "9 Train on videos": {
        "note": note(
            "## Train on videos (Wan 2.1)\n\nVideos, or folders of frames, with text files of the same names "
            "as captions, in a folder below ComfyUI's *input*.\n\n1. **SaRA Video Folder** cuts clips out of "
            "them: how many frames, and how many a second (Wan is made for 16).\n2. **SaRA Image Folder**, "
            "if you have pictures as well: **SaRA Join Pictures** has each as often as you say. Without "
            "pictures remove both, and connect the video folder to SaRA Train.\n3. **EmptyHunyuanLatentVideo**: "
            "size and length of the previews, of which single frames are shown.\n\nMemory goes with width x "
            "height x frames: begin with short clips and size 480."
        ),
        **loaders(WAN, WAN_VAE),
        "clip": node("CLIPLoader", (0, 560), models=[UMT5], clip_name=UMT5["name"], type="wan"),
        "videos": node(
            "SaraVideoFolder", (420, 0), None,
            {"vae": ("vae", 0), "clip": ("clip", 0), "model": ("model", 0)},
            trigger=STYLE, size=480,
        ),
        "pictures": node(
            "SaraImageFolder", (880, 0), None,
            {"vae": ("vae", 0), "clip": ("clip", 0), "model": ("model", 0)},
            trigger=STYLE, size=480,
        ),
        "both": node(
            "SaraJoinPictures", (1340, 0), None,
            {"latents": ("videos", 0), "positive": ("videos", 1), "latents_2": ("pictures", 0),
             "positive_2": ("pictures", 1)},
            repeats=2,
        ),
        "prompt": prompt(
            f"{STYLE}, a fox runs through a forest", (1340, 460), "Prompt of the previews",
            clip=("clip", 0),
        ),
        "latent": node(
            "EmptyHunyuanLatentVideo", (1340, 660), None, width=480, height=480, length=17
        ),
        "sampling": node(
            "SaraSampling", (1780, 0), None,
            {"vae": ("vae", 0), "positive": ("prompt", 0), "negative": ("videos", 2),
             "latent": ("latent", 0)},
            seed=1, cfg=5.0, scheduler="simple",
        ),
        "train": node(
            "SaraTrain", (2160, 0), None,
            {
                "model": ("model", 0), "latents": ("both", 0), "positive": ("both", 1),
                "empty": ("videos", 2), "preview": ("sampling", 0),
            },
            output_name=STYLE, trigger_words=STYLE, batch_size=1, fraction=0.05,
        ),
    },
}  # fmt: skip
