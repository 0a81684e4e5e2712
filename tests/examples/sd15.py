"""Examples with Stable Diffusion 1.5, the checkpoint that ComfyUI's own templates begin with."""

from .parts import STYLE, node, note, prompt, sampled

SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
}


KEPT = "\n".join(
    f"{how} {what}"
    for how, what in (
        ("a photo of", "a dog in a park"), ("a portrait of", "an old man"), ("a photo of", "a city street at night"),
        ("a photo of", "a bowl of fruit"), ("an oil painting of", "a harbour"), ("a photo of", "a red car"),
        ("a portrait of", "a young woman"), ("a photo of", "mountains and a lake"), ("a drawing of", "a cat"),
        ("a photo of", "a kitchen"), ("a photo of", "a bird on a branch"), ("a watercolor of", "a garden"),
        ("a photo of", "a child with a ball"), ("a photo of", "an old castle"), ("an illustration of", "a robot"),
        ("a photo of", "a wooden chair"),
    )
)  # fmt: skip


def checkpoint(at=(0, 400)):
    """A loader, set to the checkpoint that ComfyUI's own templates begin with."""
    return node("CheckpointLoaderSimple", at, models=[SD15], ckpt_name=SD15["name"])


def training_nodes(name, **train):
    """Checkpoint, folder, sampling for previews, and SaRA Train."""
    return {
        "checkpoint": checkpoint(),
        "folder": node(
            "SaraImageFolder", (460, 0), None,
            {"vae": ("checkpoint", 2), "clip": ("checkpoint", 1), "model": ("checkpoint", 0)},
            trigger=name,
        ),
        "positive": prompt(f"{name}, a fox in a forest", (0, 580), "Prompt of the previews"),
        "sampling": node(
            "SaraSampling", (940, 0), None,
            {"vae": ("checkpoint", 2), "positive": ("positive", 0), "negative": ("folder", 3)},
            seed=1,
        ),
        "train": node(
            "SaraTrain", (1320, 0), None,
            {
                "model": ("checkpoint", 0), "latents": ("folder", 0), "positive": ("folder", 1),
                "masks": ("folder", 2), "empty": ("folder", 3), "preview": ("sampling", 0),
            },
            output_name=name, trigger_words=name, batch_size=2, **train,
        ),
    }  # fmt: skip


SD15_SPECS = {
    "1 Train on your pictures": {
        "note": note(
            "## Train on your pictures\n\nSet three things:\n\n1. **Load Checkpoint**: the model to "
            "train.\n2. **SaRA Image Folder**: a folder with 10 to 400 pictures. Put it into ComfyUI's "
            "*input* folder and press R. Text files of the same names are their captions.\n3. A "
            f"**name**: *{STYLE}* is the word that will call up what was learned. Replace it in **trigger_word**, "
            "**output_name**, the prompt, and **trigger_words** among all settings of SaRA Train.\n\nThen queue. SaRA Train shows the loss and previews as it "
            "goes; Cancel whenever you like, nothing is lost. Below at the right the same picture before "
            "(0) and after (1)."
        ),
        **training_nodes(STYLE),
        "compare": node(
            "SaraCompare", (1860, 0), "Before and after",
            {"model": ("checkpoint", 0), "sampling": ("sampling", 0), "deltas": ("train", 1)},
            strengths="0, 1",
        ),
    },
    "2 Use what was learned": {
        "note": note(
            "## Use what was learned\n\n1. **Load Checkpoint**: the model you trained.\n2. **Load SaRA "
            "Delta**: what you trained; the card shows what the file says about itself. Press R after a "
            "training to see the new file.\n3. Put the trigger word into the prompt.\n\n**Apply SaRA**: "
            "strength 1 is as trained, 0 not at all, 0.6 to 1.2 is usual. Several deltas can follow each "
            "other, and LoRAs may come before or after. For SDXL and newer, make the empty latent 1024 by "
            "1024."
        ),
        "checkpoint": checkpoint(),
        "positive": prompt(f"{STYLE}, a fox in a forest", (0, 580)),
        "negative": prompt("", (0, 780), "Negative prompt"),
        "delta": node("SaraLoadDelta", (460, 0)),
        "apply": node("SaraApply", (460, 330), None,
                      {"model": ("checkpoint", 0), "delta": ("delta", 0)}),
        "latent": node("EmptyLatentImage", (460, 520), width=512, height=512),
        **sampled(("apply", 0), 880, prefix="sara/applied"),
    },
    "3 Stop and go on": {
        "note": note(
            "## Stop and go on\n\n- **Cancel** whenever you like: all steps made so far are saved in "
            "*output/sara*.\n- Press **R**, choose the run under **resume** in SaRA Train and queue: it "
            "goes on exactly where it stopped, with the settings it was begun with.\n- A run that has "
            "**finished** goes on as well: choose it under resume, say how many **more_steps**, and which "
            "learning rate they are to have.\n- After a power cut, resume finds the last save, made every "
            "**save_every_steps**."
        ),
        **training_nodes(STYLE, steps=1000, save_every_steps=50),
    },
    "4 Compare checkpoints and strengths": {
        "note": note(
            "## Which checkpoint, how strong?\n\n**Load SaRA Checkpoints** loads all that a run has kept "
            "(**keep_checkpoints** in SaRA Train says how many). **SaRA Compare** makes the same picture "
            "with each, at each strength: checkpoints by row, strengths by column. Take the weakest that "
            "shows your style; where pictures all look alike or break, it was trained too long."
        ),
        "checkpoint": checkpoint(),
        "positive": prompt(f"{STYLE}, a fox in a forest", (0, 580)),
        "negative": prompt("", (0, 780), "Negative prompt"),
        "checkpoints": node("SaraLoadCheckpoints", (460, 0)),
        "sampling": node(
            "SaraSampling", (460, 340), None,
            {"vae": ("checkpoint", 2), "positive": ("positive", 0), "negative": ("negative", 0)},
            seed=1,
        ),
        "compare": node(
            "SaraCompare", (920, 0), None,
            {"model": ("checkpoint", 0), "sampling": ("sampling", 0), "deltas": ("checkpoints", 0)},
            strengths="0, 0.5, 1, 1.5",
        ),
    },
    "5 Look at the small weights": {
        "note": note(
            "## What do the small weights do?\n\n**SaRA Analyze** shows how large the model's weights are; "
            "the blue ones would train with this threshold. Drag in the histogram to try others. Its output **zeroed** is "
            "the model with exactly those weights at zero: the two pictures hardly differ, which is why "
            "there is room in them to learn something."
        ),
        "checkpoint": checkpoint(),
        "positive": prompt("a fox in a forest", (0, 580)),
        "negative": prompt("", (0, 780), "Negative prompt"),
        "analyze": node("SaraAnalyze", (460, 0), None, {"model": ("checkpoint", 0)}),
        "latent": node("EmptyLatentImage", (460, 700), width=512, height=512),
        **sampled(("checkpoint", 0), 1000, 0, "The model", "sara/whole"),
        **sampled(("analyze", 4), 1000, 520, "Small weights at zero", "sara/zeroed"),
    },
    "6 Two styles in one": {
        "note": note(
            "## Two styles in one\n\nChoose two deltas of the same model. **Merge SaRA Deltas** adds them, "
            "each times its strength; the paper merges styles with 0.6 and 0.6. **Save SaRA Delta** keeps "
            "the result as a file of its own."
        ),
        "checkpoint": checkpoint(),
        "positive": prompt(f"{STYLE}, a fox in a forest", (0, 580)),
        "negative": prompt("", (0, 780), "Negative prompt"),
        "first": node("SaraLoadDelta", (460, 0), "First delta"),
        "second": node("SaraLoadDelta", (460, 340), "Second delta"),
        "latent": node("EmptyLatentImage", (460, 680), width=512, height=512),
        "merge": node(
            "SaraMergeDeltas", (880, 0), None, {"delta_1": ("first", 0), "delta_2": ("second", 0)},
            strength_1=0.6, strength_2=0.6,
        ),
        "save": node("SaraSaveDelta", (880, 220), None, {"delta": ("merge", 0)},
                     filename_prefix="sara/merged"),
        "apply": node("SaraApply", (880, 420), None,
                      {"model": ("checkpoint", 0), "delta": ("merge", 0)}),
        **sampled(("apply", 0), 1260, 0, "Merged", "sara/both"),
    },
    "7 With a LoRA and a ControlNet": {
        "note": note(
            "## Beside a LoRA and a ControlNet\n\nA delta is a patch like a LoRA: **Apply SaRA** and "
            "**Load LoRA** can follow each other in any order, each with a strength of its own, and a "
            "ControlNet works on the result. Choose files of yours in the loaders."
        ),
        "checkpoint": checkpoint(),
        "positive": prompt("a portrait of a fox, highly detailed", (0, 580)),
        "negative": prompt("blurry, low quality", (0, 780), "Negative prompt"),
        "lora": node(
            "LoraLoader", (460, 0), None, {"model": ("checkpoint", 0), "clip": ("checkpoint", 1)},
            lora_name="your_lora.safetensors", strength_model=0.8, strength_clip=0.8,
        ),
        "delta": node("SaraLoadDelta", (460, 220)),
        "apply": node("SaraApply", (460, 540), None,
                      {"model": ("lora", 0), "delta": ("delta", 0)}, strength=0.8),
        "latent": node("EmptyLatentImage", (460, 720), width=512, height=512),
        "image": node("LoadImage", (880, 0), image="example.png"),
        "control": node(
            "ControlNetLoader", (880, 420), control_net_name="control_v11p_sd15_scribble_fp16.safetensors"
        ),
        "controlled": node(
            "ControlNetApplyAdvanced", (880, 570), None,
            {"positive": ("positive", 0), "negative": ("negative", 0), "control_net": ("control", 0),
             "image": ("image", 0)},
            strength=0.7,
        ),
        **sampled(("apply", 0), 1280, 0, "Picture", "sara/styled"),
    },
    "10 Keep what the model knows": {
        "note": note(
            "## Keep what the model knows\n\nLike *1 Train on your pictures*, with two things more. The model "
            "first makes a picture of each line in **What to keep**: write there what it makes well and "
            "is to go on making, without your word. SaRA Train then trains the weights that learn most from your "
            "pictures for what they would lose of these (**select_by** *gradient*), not the "
            "smallest ones, and each step goes over these as well.\n\nWith **regularisation_weight** 0 they only say what "
            "trains, and a step takes half as long."
        ),
        **training_nodes(STYLE, select_by="gradient"),
        "kept": node(
            "SaraPrompts", (0, 1000), "What to keep", {"clip": ("checkpoint", 1)}, prompts=KEPT,
        ),
        "size": node("EmptyLatentImage", (0, 1300), width=512, height=512),
        "made": node(
            "KSampler", (460, 1000), "Pictures the model makes",
            {"model": ("checkpoint", 0), "positive": ("kept", 0), "negative": ("folder", 3),
             "latent_image": ("size", 0)},
            seed=1, steps=20, cfg=7.0, sampler_name="euler",
        ),
        "compare": node(
            "SaraCompare", (1860, 0), "Before and after",
            {"model": ("checkpoint", 0), "sampling": ("sampling", 0), "deltas": ("train", 1)},
            strengths="0, 1",
        ),
    },
}  # fmt: skip
for link, source in (("regularisation_latents", "made"), ("regularisation_positive", "kept")):
    SD15_SPECS["10 Keep what the model knows"]["train"]["links"][link] = (source, 0)


def use_lora_clip(nodes):
    """Have the prompts pass the LoRA, and the pictures the ControlNet."""
    for key in ("positive", "negative"):
        nodes[key]["links"]["clip"] = ("lora", 1)
    nodes["sampler Picture"]["links"].update(positive=("controlled", 0), negative=("controlled", 1))


use_lora_clip(SD15_SPECS["7 With a LoRA and a ControlNet"])
