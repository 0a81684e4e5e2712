"""Example workflows in the form the server takes, and watching one run. Standard library only."""

import json

from .environment import ROOT


def api_form(workflow, object_info):
    """Turn a workflow as the frontend saves it into the form the server takes."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        info = object_info[node["type"]]
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
        values, inputs = iter(node.get("widgets_values", [])), {}
        for group in ("required", "optional"):
            for name, spec in info["input"].get(group, {}).items():
                kind, options = spec[0], spec[1] if len(spec) > 1 else {}
                is_widget = isinstance(kind, list) or kind in (
                    "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # fmt: skip
                if is_widget and not options.get("forceInput"):
                    inputs[name] = next(values)
                    if options.get("control_after_generate", name in ("seed", "noise_seed")):
                        next(values)
        title = node.get("title") or info["display_name"]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs | linked,
            "_meta": {"title": title},
        }
    return prompt


TRAIN = "1 Train on your pictures"
USE = "2 Use what was learned"
SMALL = {  # what the small model and its pictures need, by class of node
    "CheckpointLoaderSimple": {"ckpt_name": "emoji64.safetensors"},
    "SaraImageFolder": {"folder": "input/fluent3d", "size": 64, "trigger": ""},
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 4},
    "SaraSampling": {"steps": 20, "cfg": 2.0, "scheduler": "simple"},
    "KSampler": {"steps": 20, "cfg": 2.0, "scheduler": "simple"},
    "SaraTrain": {
        "steps": 300, "batch_size": 8, "output_name": "fluent3d", "trigger_words": "",
        "gradient_checkpointing": False, "learning_rate": 3e-4,  # as tests make few steps
    },
}  # fmt: skip
PROMPT = "3d style, strawberry"


def load_workflow(server, name):
    """Read an example workflow, set it for the small model, and return it in API form."""
    path = ROOT / "example_workflows" / f"{name}.json"
    prompt = api_form(json.loads(path.read_text(encoding="utf-8")), server.get("/object_info"))
    for node in list(prompt.values()):
        inputs = node["inputs"]
        inputs.update(SMALL.get(node["class_type"], {}))
        if "fox" in str(inputs.get("text")):
            inputs["text"] = PROMPT
        if node["class_type"] == "SaraSampling":
            small = SMALL["EmptyLatentImage"]
            prompt["small"] = {"class_type": "EmptyLatentImage", "inputs": dict(small)}
            inputs["latent"] = ["small", 0]
    return prompt


def node_titled(prompt, title):
    """Id of the node with a title, which is its display name if it was not given another one."""
    titles = {key: node["_meta"]["title"] for key, node in prompt.items() if "_meta" in node}
    found = [key for key, own in titles.items() if own == title]
    if len(found) != 1:
        raise LookupError(
            f"{len(found)} nodes are titled {title!r} among {sorted(titles.values())}"
        )
    return found[0]


def watch(server, prompt):
    """Run a workflow, show how far it is, and return its outputs."""
    shown, told = None, set()
    events = server.events()  # before the workflow is queued, so that nothing is missed
    prompt_id = server.submit(prompt)
    for event in events:
        data = event.get("data", {})
        if data.get("prompt_id") not in (None, prompt_id):
            continue
        if event["type"] == "executing" and data.get("node"):
            kind = prompt[data["node"]]["class_type"]
            if kind not in told:
                told.add(kind)
                print(f"  {kind}", flush=True)
        elif event["type"] == "progress" and data["max"] >= 50:
            percent = 10 * (10 * data["value"] // data["max"])
            if percent != shown:
                shown = percent
                print(f"    step {data['value']} of {data['max']}", flush=True)
        elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            break
    return server.wait(prompt_id)
