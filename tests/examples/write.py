"""Write the example workflows from what they consist of; needs ComfyUI, for the slots of its nodes.

usage: python dev.py examples
"""

import json
import sys
import tempfile
from pathlib import Path

from ..harness.environment import ROOT
from ..harness.server import Server, make_base
from .families import FAMILY_SPECS
from .sd15 import SD15_SPECS

EXAMPLES = ROOT / "example_workflows"
VIEW = {"scale": 0.8, "offset": [110, 160]}  # readable, the note clear of the bars
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SIZES = {
    "MarkdownNote": (400, 330), "CheckpointLoaderSimple": (340, 120), "CLIPTextEncode": (400, 140),
    "EmptyLatentImage": (320, 140), "KSampler": (320, 320), "VAEDecode": (220, 70),
    "SaveImage": (360, 400), "SaraImageFolder": (420, 640), "SaraSampling": (320, 300),
    "SaraTrain": (480, 820), "SaraCompare": (460, 560), "SaraLoadDelta": (360, 260),
    "SaraApply": (300, 110), "SaraLoadCheckpoints": (400, 290), "SaraAnalyze": (480, 620),
    "SaraMergeDeltas": (300, 150), "SaraSaveDelta": (320, 130), "LoraLoader": (320, 150),
    "LoadImage": (320, 360), "ControlNetLoader": (340, 80), "ControlNetApplyAdvanced": (320, 220),
    "UNETLoader": (340, 90), "DualCLIPLoader": (340, 140), "CLIPLoader": (340, 120), "VAELoader": (340, 70),
    "SaraReferencePictures": (420, 150), "VAEEncode": (220, 60), "ReferenceLatent": (220, 60),
    "FluxKontextImageScale": (220, 40), "SaraVideoFolder": (420, 640), "SaraJoinPictures": (400, 420), "SaraPrompts": (400, 260),
    "EmptyHunyuanLatentVideo": (320, 150),
}  # fmt: skip


def widgets_of(info):
    """Names and defaults of a node's widgets in order; None marks the value beside a core seed."""
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            is_list = isinstance(kind, list)
            if not (is_list or kind in WIDGETS) or options.get("forceInput"):
                continue
            choices = kind if is_list else options.get("options", [])
            yield name, options.get("default", choices[0] if choices else "")
            if options.get("control_after_generate", name in ("seed", "noise_seed")):
                yield None, "fixed"
            if options.get("image_upload"):
                yield None, "image"


def written(nodes, infos):
    """An example as the frontend saves it."""
    numbers = {key: i for i, key in enumerate(nodes, 1)}
    links, saved = [], []
    for key, spec in nodes.items():
        kind = spec["kind"]
        entry = {
            "id": numbers[key], "type": kind, "pos": list(spec["at"]), "size": list(SIZES[kind]),
            "flags": {}, "order": numbers[key] - 1, "mode": 0, "inputs": [], "outputs": [],
            "properties": {}, "widgets_values": [],
        }  # fmt: skip
        if spec["title"]:
            entry["title"] = spec["title"]
        saved.append(entry)
        if kind == "MarkdownNote":
            entry["widgets_values"] = [spec["widgets"]["text"]]
            continue
        info = infos[kind]
        ours = kind.startswith("Sara")
        entry["properties"] = {
            "Node name for S&R": kind,
            "cnr_id": "sara-finetune" if ours else "comfy-core",
            "ver": "0.2.0" if ours else "0.3.75",
        }
        if spec["models"]:
            entry["properties"]["models"] = spec["models"]
        widgets = list(widgets_of(info))
        unknown = spec["widgets"].keys() - {widget for widget, _ in widgets}
        assert not unknown, f"{kind} has no {unknown}"
        entry["widgets_values"] = [spec["widgets"].get(widget, value) for widget, value in widgets]
        if ours:
            entry["properties"]["sara_widgets"] = [widget for widget, _ in widgets]
        slots = {
            slot: value[0]
            for group in ("required", "optional")
            for slot, value in info["input"].get(group, {}).items()
            if slot not in dict(widgets)
        }
        assert not spec["links"].keys() - slots.keys(), f"{kind} has no {spec['links'].keys()}"
        for index, (slot, type_) in enumerate(slots.items()):
            number = None
            if slot in spec["links"]:
                source, output = spec["links"][slot]
                number = len(links) + 1
                links.append([number, numbers[source], output, numbers[key], index, type_])
            optional = {"shape": 7} if slot in info["input"].get("optional", {}) else {}
            entry["inputs"].append({"name": slot, "type": type_, **optional, "link": number})
        entry["outputs"] = [
            {"name": output, "type": type_, "links": []}
            for output, type_ in zip(info["output_name"], info["output"], strict=True)
        ]
    for number, source, output, *_ in links:
        saved[source - 1]["outputs"][output]["links"].append(number)
    return {
        "revision": 0, "last_node_id": len(saved),
        "last_link_id": len(links), "nodes": saved, "links": links, "groups": [], "config": {},
        "extra": {"ds": VIEW}, "version": 0.4,
    }  # fmt: skip


def main():
    """Write them all."""
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        for name in ("lora", "controlnet"):
            (Path(base) / "models" / name).mkdir(exist_ok=True)
        with Server(base) as server:
            infos = server.get("/object_info")
    for name, nodes in (SD15_SPECS | FAMILY_SPECS).items():
        text = json.dumps(written(nodes, infos), indent=1, ensure_ascii=False) + "\n"
        (EXAMPLES / f"{name}.json").write_text(text, encoding="utf-8")
        sys.stdout.write(f"{name}: {len(nodes)} nodes\n")


if __name__ == "__main__":
    main()
