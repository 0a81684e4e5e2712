"""Workflows in API form, a node at a time, and what they leave on disk."""

import threading

import torch
from safetensors.torch import load_file


class Graph:
    """A workflow in API form, written a node at a time; widgets left out take their defaults."""

    def __init__(self, server):
        self.server, self.info, self.prompt = server, server.get("/object_info"), {}

    def __call__(self, class_type, **inputs):
        key = str(len(self.prompt) + 1)
        spec = self.info[class_type]["input"]
        for group in ("required", "optional"):
            for name, (kind, *options) in spec.get(group, {}).items():
                if name not in inputs and options and "default" in options[0]:
                    inputs[name] = options[0]["default"]
                if name not in inputs and isinstance(kind, list):
                    inputs[name] = kind[0]
        linked = {k: [v, 0] if isinstance(v, Node) else v for k, v in inputs.items()}
        self.prompt[key] = {"class_type": class_type, "inputs": linked}
        return Node(key)

    def run(self):
        return self.server.run(self.prompt)


class Node(str):
    """Id of a node; stands for its first output."""

    def out(self, slot):
        return [str(self), slot]


def emoji64(graph):
    checkpoint = graph("CheckpointLoaderSimple", ckpt_name="emoji64.safetensors")
    model = graph("ModelSamplingSD3", model=checkpoint, shift=1.0)
    empty = graph("CLIPTextEncode", clip=checkpoint.out(1), text="")
    return checkpoint, model, empty


def dataset(graph, checkpoint, folder="fluent3d"):
    pictures = graph("LoadImageTextDataSetFromFolder", folder=folder)
    return graph(
        "MakeTrainingDataset", images=pictures, texts=pictures.out(1),
        vae=checkpoint.out(2), clip=checkpoint.out(1),
    )  # fmt: skip


def sample(graph, checkpoint, empty, model, name, steps=4):
    """Sample two latents and save them; `saved_latents` reads them."""
    text = graph("CLIPTextEncode", clip=checkpoint.out(1), text="3d style, strawberry")
    latent = graph("EmptySD3LatentImage", width=64, height=64, batch_size=2)
    found = graph(
        "KSampler", model=model, positive=text, negative=empty, latent_image=latent, seed=1,
        steps=steps, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph("SaveLatent", samples=found, filename_prefix=f"latents/{name}")
    return found


def saved_latents(server, name):
    (path,) = (server.base / "output" / "latents").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


def saved_weights(server, name):
    (path,) = (server.base / "output" / "weights").glob(f"{name}_*.safetensors")
    return load_file(path)


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for key, weight in one.items():
        assert torch.equal(weight, two[key]), key


def train_graph(server, name, resume="new run", **changes):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    options = {"steps": 14, "batch_size": 8, "save_dtype": "fp32", "seed": 21, **changes}
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), empty=empty,
        output_name=name, resume=resume, **options,
    )  # fmt: skip
    return graph, train


def cancel_at(server, step):
    """Press Cancel when a training has made so many steps. Returns the thread that waits for it."""
    events = server.events()

    def wait():
        for event in events:
            if event["type"] == "progress" and event["data"]["value"] >= step:
                server.post("/interrupt", {})
                return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
