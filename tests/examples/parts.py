"""Nodes as examples are written down.

Each node: what it is, where, its widgets by name where they differ from the defaults, and its links as
(node, output). All widgets of a node are written down in the order it has them.
"""

STYLE = "mystyle"


def node(kind, at, title=None, links=None, models=(), **widgets):
    """One node of an example."""
    return {
        "kind": kind, "at": at, "title": title, "links": links or {}, "models": list(models),
        "widgets": widgets,
    }  # fmt: skip


def note(text):
    """The note that an example begins with."""
    return node("MarkdownNote", (0, 0), text=text)


def prompt(text, at, title="Prompt", clip=("checkpoint", 1)):
    """An encoded prompt."""
    return node("CLIPTextEncode", at, title, {"clip": clip}, text=text)


def sampled(model, x, y=0, title="Picture", prefix="sara/picture", **sampler):
    """A KSampler with what follows it, named `sampler`, `decode` and `save`, by title."""
    links = {
        "model": model, "positive": ("positive", 0), "negative": ("negative", 0),
        "latent_image": ("latent", 0),
    }  # fmt: skip
    settings = {"seed": 1, "steps": 25, "cfg": 7.0, "sampler_name": "euler", **sampler}
    return {
        f"sampler {title}": node("KSampler", (x, y), None, links, **settings),
        f"decode {title}": node(
            "VAEDecode", (x, y + 380), None,
            {"samples": (f"sampler {title}", 0), "vae": ("checkpoint", 2)},
        ),
        f"save {title}": node(
            "SaveImage", (x + 370, y), title, {"images": (f"decode {title}", 0)},
            filename_prefix=prefix,
        ),
    }  # fmt: skip
