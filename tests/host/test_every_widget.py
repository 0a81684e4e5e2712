"""Every widget of SaRA Train, set to something else in a server, is what the run was set to and its file says."""

import json

from safetensors import safe_open

from .graphs import Graph, dataset, emoji64

NOT_SETTINGS = {"resume", "more_steps"}
CHANGED = {  # others than the defaults that fit together and a small run
    "steps": 3, "batch_size": 3, "fraction": 0.07, "learning_rate": 2e-4, "output_name": "widgets",
    "seed": 7, "save_every_steps": 2, "preview_every_steps": 2, "threshold": 0.0, "include": "joint_blocks",
    "exclude": "adaLN", "zeros": "train", "lr_schedule": "cosine_restarts", "warmup_steps": 1,
    "progressive": 0.6, "low_rank_weight": 1e-3, "weight_decay": 0.1, "max_grad_norm": 2.0,
    "grad_accumulation_steps": 2, "loss_function": "huber", "caption_dropout": 0.2,
    "regularisation_weight": 0.5, "gradient_checkpointing": False, "training_dtype": "fp32",
    "validation_split": 0.2, "validate_every_steps": 1, "keep_checkpoints": 3, "save_dtype": "fp32",
    "trigger_words": "sks", "preview_strength": 0.9, "allow_other_prediction": True, "offloading": True,
    "moments": "8bit", "keep_state": False, "lora_file": "LoRA of rank 16", "loss_weighting": "min_snr", "snr_gamma": 4.0,
    "timestep_distribution": "logit_normal", "logit_mean": 0.5, "logit_std": 0.9, "lowest_noise": 0.1,
    "highest_noise": 0.9, "noise_offset": 0.05, "weights_on_device": 0.5, "trained_in": "main memory",
    "epochs": 0, "patience": 2, "put_out": "best validation", "flow_shift": 2.0, "guidance": 2.0,
    "lr_cycles": 2, "select_from": "each layer", "select_by": "gradient", "ema_decay": 0.9, "optimizer": "adamw",
    "layer_rates": "mlp=0.5", "tensorboard": True,
}  # fmt: skip
ELSEWHERE = {
    "threshold": 0.004,
    "epochs": 1,
    "optimizer": "schedule_free",
    "select_from": "model",
}  # what does not fit the others


def train(server, **widgets):
    graph = Graph(server)
    checkpoint, model, _ = emoji64(graph)
    data = dataset(graph, checkpoint)
    empty = graph("CLIPTextEncode", clip=checkpoint.out(1), text="")
    node = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), empty=empty, **widgets
    )
    outputs = graph.run()[node]
    (chart,) = outputs["sara_training"]
    folder = server.base / "output" / "sara" / chart["run"]
    return chart, folder, json.loads((folder / "settings.json").read_text())


def test_all_widgets_reach_the_run_and_its_file(server):
    groups = server.get("/object_info/SaraTrain")["SaraTrain"]["input"]
    defaults = {
        name: entry[1]["default"]
        for kind in ("required", "optional")
        for name, entry in groups[kind].items()
        if "default" in entry[1]
    }
    assert defaults.keys() - NOT_SETTINGS == CHANGED.keys()
    same = {name for name, value in CHANGED.items() if value == defaults[name]}
    assert same == ELSEWHERE.keys()
    chart, folder, settings = train(server, **CHANGED)
    assert chart["status"] == "finished"
    assert {name: settings[name] for name in CHANGED} == CHANGED
    files = {file.name for file in folder.iterdir()}
    assert {"tensorboard", "validation.csv"} <= files
    assert "state.safetensors" not in files
    (final,) = folder.glob("widgets_*_steps.safetensors")
    with safe_open(final, "pt") as file:
        told = json.loads(file.metadata()["sara.settings"])
    assert {name: told[name] for name in CHANGED} == CHANGED


def test_those_that_do_not_fit_the_others_do_so_too(server):
    chart, folder, settings = train(
        server, **ELSEWHERE, batch_size=16, output_name="widgets_elsewhere", validation_split=0.0
    )
    assert chart["status"] == "finished"
    assert chart["steps"] == settings["steps"] == 3  # 40 pictures
    assert settings["optimizer"] == "schedule_free"
    assert settings["threshold"] == 0.004
    with safe_open(next(folder.glob("*_3_steps.safetensors")), "pt") as file:
        assert file.metadata()["sara.threshold"] == "0.004"
