"""Every node through the real executor over HTTP, in a server process."""

import re
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from sara_core import SparseDelta

from ..harness.environment import checkpoint
from ..harness.server import PromptError

INPUTS = {  # public: saved workflows depend on every name
    "SaraImageFolder": "vae clip folder size max_buckets divisible_by crop crops max_upscale flip "
    "alpha background trigger default_caption repeats problems seed cache_gb model",
    "SaraAnalyze": "model threshold fraction count include exclude zeros",
    "SaraTrain": "model latents positive steps batch_size fraction learning_rate output_name seed "
    "save_every_steps preview_every_steps resume threshold include exclude zeros lr_schedule "
    "warmup_steps progressive low_rank_weight weight_decay max_grad_norm grad_accumulation_steps "
    "loss_function caption_dropout regularisation_weight gradient_checkpointing training_dtype "
    "validation_split validate_every_steps keep_checkpoints save_dtype trigger_words "
    "preview_strength empty more_steps allow_other_prediction offloading moments keep_state masks "
    "regularisation_latents regularisation_positive preview",
    "SaraSampling": "vae positive negative seed steps cfg sampler_name scheduler latent previous",
    "SaraLoadCheckpoints": "run",
    "SaraCompare": "model sampling deltas strengths deltas_2 deltas_3 deltas_4",
    "SaraLoadDelta": "delta_name",
    "SaraSaveDelta": "delta filename_prefix dtype",
    "SaraMergeDeltas": "delta_1 delta_2 strength_1 strength_2",
    "SaraApply": "model delta strength",
    "SaraBlockStrengths": "delta strengths others",
    "SaraCreateHook": "delta strength prev_hooks",
    "SaraExportDelta": "delta format rank dtype filename_prefix",
    "SaraImportCheckpoint": "model file",
}
OUTPUTS = {
    "SaraImageFolder": ["LATENT", "CONDITIONING", "MASK", "CONDITIONING", "IMAGE", "STRING"],
    "SaraAnalyze": ["MODEL", "FLOAT", "STRING", "IMAGE", "MODEL"],
    "SaraTrain": ["MODEL", "SARA_DELTA", "LOSS_MAP", "STRING"],
    "SaraSampling": ["SARA_SAMPLING"],
    "SaraLoadCheckpoints": ["SARA_DELTA", "STRING"],
    "SaraCompare": ["IMAGE", "IMAGE"],
    "SaraLoadDelta": ["SARA_DELTA", "STRING"],
    "SaraSaveDelta": [],
    "SaraMergeDeltas": ["SARA_DELTA"],
    "SaraApply": ["MODEL"],
    "SaraBlockStrengths": ["SARA_DELTA", "STRING"],
    "SaraCreateHook": ["HOOKS"],
    "SaraExportDelta": ["STRING", "FLOAT"],
    "SaraImportCheckpoint": ["SARA_DELTA"],
}


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


def test_all_nodes_are_there_with_their_public_names(server):
    info = server.get("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("Sara")}
    assert ours.keys() == INPUTS.keys()
    for name, node in ours.items():
        groups = {k: v for k, v in node["input"].items() if k != "hidden"}
        found = [key for group in ("required", "optional") for key in groups.get(group, {})]
        assert found == INPUTS[name].split(), name
        assert node["output"] == OUTPUTS[name]
        assert node["display_name"].replace("SaRA", "").strip() != node["display_name"]
        assert node["description"]
        for group in groups.values():
            for key, spec in group.items():
                assert dict(*spec[1:]).get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]), name
    assert "IMPORT FAILED: ComfyUI-SaRA" not in server.log_text()


@pytest.fixture(scope="module")
def trained(server):
    """Analyze, train 40 steps, and sample before, after and with the weights zeroed."""
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    analyze = graph("SaraAnalyze", model=model, fraction=0.1)
    graph("PreviewImage", images=analyze.out(3))
    data = dataset(graph, checkpoint)
    graph("ModelSave", model=checkpoint, filename_prefix="weights/before")
    train = graph(
        "SaraTrain", model=analyze, latents=data, positive=data.out(1), empty=empty,
        threshold=analyze.out(1), steps=40, batch_size=8, learning_rate=4e-4, output_name="shared",
    )  # fmt: skip
    graph("LossGraphNode", loss=train.out(2))
    sample(graph, checkpoint, empty, model, "base")
    sample(graph, checkpoint, empty, train, "trained")
    sample(graph, checkpoint, empty, analyze.out(4), "zeroed")
    outputs = graph.run()
    return {"outputs": outputs, "train": train, "analyze": analyze, "graph": graph}


@pytest.fixture(scope="module")
def delta_name(trained):
    text = trained["outputs"][trained["train"]]["text"][0]
    return re.fullmatch(r"saved (\S+), loss [\d.]+", text)[1]


def test_analyze_reports_what_the_core_finds(server, trained):
    text = trained["outputs"][trained["analyze"]]["text"][0]
    assert "selects 1,051,4" in text
    assert "joint_blocks.3" in text
    weights = load_file(checkpoint())
    prefix = "model.diffusion_model."
    flat = torch.cat(
        [w.float().abs().flatten() for k, w in weights.items()
         if k.startswith(prefix) and w.dim() > 1 and "pos_embed" not in k]
    )  # fmt: skip
    threshold = float(re.match(r"threshold (\S+) selects", text)[1])
    count = round(0.1 * len(flat))
    assert threshold == pytest.approx(flat.sort().values[count].item(), rel=1e-5)


def test_training_writes_a_file_that_scripts_can_read(server, delta_name, trained):
    assert delta_name == "shared_00001/shared_40_steps.safetensors"
    delta = SparseDelta.load(server.base / "output" / "sara" / delta_name)
    assert 1_050_000 < delta.num_values < 1_052_000
    assert '"steps": 40' in delta.metadata["sara.settings"]
    assert delta.metadata["modelspec.architecture"] == "sd3/sara"
    assert delta.metadata["modelspec.prediction_type"] == "flow"
    values = torch.cat([e.values.float() for e in delta.entries.values()])
    assert (values != 0).float().mean() > 0.9
    size = (server.base / "output" / "sara" / delta_name).stat().st_size
    assert size < 3.2 * delta.num_values


def test_training_learns_the_pictures(server, delta_name):
    """The loss on all pictures at fixed noise falls; measured with a one-step run at zero effect."""
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    common = {
        "latents": data, "positive": data.out(1), "fraction": 0.01, "steps": 1, "batch_size": 40,
        "grad_accumulation_steps": 4, "learning_rate": 1e-7, "seed": 5,
    }  # fmt: skip
    base = graph("SaraTrain", model=model, output_name="probe_base", **common)
    tuned = graph("SaraApply", model=model, delta=delta)
    tuned = graph("SaraTrain", model=tuned, output_name="probe_tuned", **common)
    outputs = graph.run()
    before, after = (float(outputs[n]["text"][0].split()[-1]) for n in (base, tuned))
    assert after < 0.85 * before


def test_pictures_change_with_the_delta_and_hardly_with_zeroed_weights(server, trained):
    base, tuned, zeroed = (saved_latents(server, n) for n in ("base", "trained", "zeroed"))
    change = (tuned - base).norm()
    assert change > 0.1 * base.norm()
    assert (zeroed - base).norm() < 0.5 * change


def test_loading_and_applying_gives_the_trained_model_and_strength_zero_the_base(
    server, trained, delta_name
):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    applied = graph("SaraApply", model=model, delta=delta, strength=1.0)
    nothing = graph("SaraApply", model=applied, delta=delta, strength=0.0)
    off = graph("SaraApply", model=model, delta=delta, strength=0.0)
    opposite = graph("SaraApply", model=applied, delta=delta, strength=-1.0)
    for name, m in (("applied", applied), ("nothing", nothing), ("off", off), ("back", opposite)):
        sample(graph, checkpoint, empty, m, name)
    graph.run()
    assert torch.equal(saved_latents(server, "applied"), saved_latents(server, "trained"))
    assert torch.equal(saved_latents(server, "nothing"), saved_latents(server, "trained"))
    assert torch.equal(saved_latents(server, "off"), saved_latents(server, "base"))
    back, base = saved_latents(server, "back"), saved_latents(server, "base")
    assert torch.allclose(back, base, atol=1e-3)


def test_deltas_are_found_in_models_output_and_extra_folders(server, delta_name):
    source = server.base / "output" / "sara" / delta_name
    folders = ("models/sara", "elsewhere/deltas")
    for folder in folders:
        (server.base / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, server.base / folder / f"from_{folder[:6]}.safetensors")
        (server.base / folder / "other.txt").write_text("no delta")
    listed = server.get("/object_info")["SaraLoadDelta"]["input"]["required"]["delta_name"][1]
    assert {delta_name, "from_models.safetensors", "from_elsewh.safetensors"} <= set(
        listed["options"]
    )
    assert "other.txt" not in listed["options"]


def test_merge_and_save_write_what_the_core_computes(server, delta_name):
    graph = Graph(server)
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    merged = graph("SaraMergeDeltas", delta_1=delta, delta_2=delta, strength_1=0.6, strength_2=-0.1)
    for dtype in ("fp32", "fp16"):
        graph("SaraSaveDelta", delta=merged, filename_prefix=f"sara/merged_{dtype}", dtype=dtype)
    graph.run()
    graph("SaraSaveDelta", delta=merged, filename_prefix="sara/merged_fp32", dtype="bf16")
    graph.run()  # a second file of the same name gets the next number
    folder = server.base / "output" / "sara"
    one = SparseDelta.load(folder / delta_name)
    expected = 0.6 * one + -0.1 * one
    files = {
        "merged_fp32_00001_": torch.float32,
        "merged_fp16_00001_": torch.float16,
        "merged_fp32_00002_": torch.bfloat16,
    }
    for file, dtype in files.items():
        found = SparseDelta.load(folder / f"{file}.safetensors")
        for name, entry in expected.entries.items():
            assert torch.equal(found.entries[name].index, entry.index)
            assert torch.equal(found.entries[name].values, entry.values.to(dtype))


def test_same_seed_gives_the_same_delta_and_the_base_is_untouched(server, trained):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    for name, seed in (("once", 3), ("twice", 3), ("other", 4)):
        graph(
            "SaraTrain", model=model, latents=data, positive=data.out(1), empty=empty, steps=2,
            batch_size=4, seed=seed, output_name=name, save_dtype="fp32",
        )  # fmt: skip
    graph.run()
    graph = Graph(server)
    checkpoint, _, _ = emoji64(graph)
    graph("ModelSave", model=checkpoint, filename_prefix="weights/after_success")
    graph.run()
    folder = server.base / "output" / "sara"
    once, twice, other = (
        SparseDelta.load(folder / f"{name}_00001" / f"{name}_2_steps.safetensors")
        for name in ("once", "twice", "other")
    )
    for name, entry in once.entries.items():
        assert torch.equal(entry.values, twice.entries[name].values)
    assert any(not torch.equal(e.values, other.entries[n].values) for n, e in once.entries.items())
    assert_same_weights(saved_weights(server, "before"), saved_weights(server, "after_success"))


def test_cancel_and_errors_bring_the_base_back_and_the_server_goes_on(server, trained):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=5000, batch_size=8,
        learning_rate=1e-2, output_name="cancelled",
    )  # fmt: skip
    seen = threading.Event()

    events = server.events()

    def cancel():
        for event in events:
            if event["type"] == "progress" and event["data"]["max"] == 5000:
                if event["data"]["value"] >= 3:
                    server.post("/interrupt", {})
                    seen.set()
                    return

    watcher = threading.Thread(target=cancel, daemon=True)
    watcher.start()
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    assert seen.is_set()

    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=5, threshold=0.2,
        output_name="failed",
    )  # fmt: skip
    with pytest.raises(PromptError, match="learning-rate rule"):
        graph.run()

    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    graph("ModelSave", model=checkpoint, filename_prefix="weights/after_cancel")
    sample(graph, checkpoint, empty, model, "after_cancel")
    graph.run()
    assert_same_weights(saved_weights(server, "before"), saved_weights(server, "after_cancel"))
    assert torch.equal(saved_latents(server, "after_cancel"), saved_latents(server, "base"))


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


def test_a_run_goes_on_with_moments_in_eight_bits_if_asked_to(server):
    """As one has to that ran out of memory; the run's own moments stay where it is not asked for."""
    folder = server.base / "output" / "sara"
    cancel_at(server, 4)
    graph, _ = train_graph(server, "small")
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    values = {}
    for name, options in (
        ("again", {}),
        ("eight", {"moments": "8bit"}),
        ("fp32", {"moments": "fp32"}),
    ):
        shutil.copytree(folder / "small_00001", folder / f"{name}_00001")
        server.get("/object_info/SaraTrain")
        graph, train = train_graph(server, "ignored", resume=f"{name}_00001", **options)
        file = graph.run()[train]["text"][0].removeprefix("saved ").split(",")[0]
        entries = SparseDelta.load(folder / file).entries
        values[name] = torch.cat([entry.values for entry in entries.values()])
    assert torch.equal(values["again"], values["fp32"])
    off = (values["eight"] - values["fp32"]).norm() / values["fp32"].norm()
    assert 0 < off.item() < 0.1


def test_a_cancelled_run_is_saved_and_resumed_exactly(server):
    folder = server.base / "output" / "sara"
    graph, _ = train_graph(server, "straight")
    graph.run()
    cancel_at(server, 4)
    graph, _ = train_graph(server, "stopped")
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    assert (folder / "stopped_00001" / "state.safetensors").is_file()
    (checkpoint,) = (folder / "stopped_00001").glob("checkpoint*")
    assert SparseDelta.load(checkpoint).num_values > 0
    assert "cancelled; all" in server.log_text()
    options = server.get("/object_info")["SaraTrain"]["input"]["required"]["resume"][1]["options"]
    assert options[:1] == ["new run"]
    assert "stopped_00001" in options
    assert "straight_00001" in options  # it has finished, and can be given more steps

    shutil.copytree(folder / "stopped_00001", folder / "broken_00001")
    state = folder / "broken_00001" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-5] ^= 4
    state.write_bytes(data)
    server.get("/object_info/SaraTrain")
    graph, _ = train_graph(server, "ignored", resume="broken_00001")
    with pytest.raises(PromptError, match="do not fit its checksum, the file is damaged"):
        graph.run()
    assert bytes(data) == state.read_bytes()

    graph, train = train_graph(server, "ignored", resume="stopped_00001", steps=3, seed=1)
    text = graph.run()[train]["text"][0]
    assert text.startswith("saved stopped_00001/stopped_14_steps.safetensors")
    one = SparseDelta.load(folder / "straight_00001" / "straight_14_steps.safetensors")
    two = SparseDelta.load(folder / "stopped_00001" / "stopped_14_steps.safetensors")
    for name, entry in one.entries.items():
        assert torch.equal(entry.values, two.entries[name].values), name
    losses = [(folder / n / "loss.csv").read_text() for n in ("straight_00001", "stopped_00001")]
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 15

    # The run is still chosen, but has left the list: queued once more, it gives what it gave.
    graph, train = train_graph(server, "ignored", resume="stopped_00001", steps=2, seed=2)
    assert graph.run()[train]["text"][0] == text
    assert not list(folder.glob("ignored*"))
    assert (folder / "stopped_00001" / "loss.csv").read_text() == losses[0]
    for name in ("never_00001", "../sara", "", "stopped_00001/previews"):
        graph, _ = train_graph(server, "ignored", resume=name)
        with pytest.raises(PromptError, match="there is no run"):
            graph.run()


def test_what_widgets_showed_is_told_to_a_page_that_is_opened_later(server):
    graph, train = train_graph(server, "shown", steps=2)
    graph.run()
    (state,) = [s for s in server.get("/sara/shown")["sara_training"] if s["run"] == "shown_00001"]
    assert (state["node"], state["step"], state["status"]) == (train, 2, "finished")
    assert [step for step, _ in state["losses"]] == [1, 2]
    cancel_at(server, 1)
    graph, train = train_graph(server, "halted", steps=400)
    with pytest.raises(PromptError, match="execution_interrupted"):
        graph.run()
    shown = server.get("/sara/shown")["sara_training"]
    assert [s["run"] for s in shown].count("shown_00001") == 0  # the same node's, so replaced
    (state,) = [s for s in shown if s["run"] == "halted_00001"]
    assert state["status"] == "cancelled"
    assert "choose halted_00001 under resume" in state["marks"][-1][2]


def test_pictures_of_mixed_sizes_train(server):
    from PIL import Image

    folder = server.base / "input" / "mixed"
    folder.mkdir()
    for i, size in enumerate([(64, 64), (96, 64), (64, 96), (64, 64), (96, 64)]):
        Image.new("RGB", size, (40 * i, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour {i}")
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint, "mixed")
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), empty=empty, steps=4,
        batch_size=2, grad_accumulation_steps=2, output_name="mixed", gradient_checkpointing=True,
    )  # fmt: skip
    assert "saved mixed_00001/mixed_4_steps" in graph.run()[train]["text"][0]


def test_a_miniature_sd15_trains_on_a_batched_latent_with_one_caption(server, delta_name):
    begun = len(server.log_text())
    graph = Graph(server)
    model = graph("UNETLoader", unet_name="mini_sd15.safetensors", weight_dtype="default")
    clip = graph("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion")
    text = graph("CLIPTextEncode", clip=clip, text="a picture")
    latent = graph("EmptyLatentImage", width=64, height=64, batch_size=4)
    noise = graph(
        "KSampler", model=model, positive=text, negative=text, latent_image=latent, seed=1, steps=1,
        cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    common = {"latents": noise, "positive": text, "batch_size": 4, "fraction": 0.2}
    train = graph(
        "SaraTrain", model=model, empty=text, steps=30, learning_rate=3e-3, output_name="mini",
        **common,
    )  # fmt: skip
    probe = {"steps": 1, "grad_accumulation_steps": 8, "learning_rate": 1e-7, "seed": 9}
    base = graph("SaraTrain", model=model, output_name="probe_mini", **common, **probe)
    tuned = graph("SaraTrain", model=train, output_name="probe_tuned_mini", **common, **probe)
    outputs = graph.run()
    before, after = (float(outputs[n]["text"][0].split()[-1]) for n in (base, tuned))
    assert after < 0.97 * before
    delta = SparseDelta.load(
        server.base / "output" / "sara" / "mini_00001" / "mini_30_steps.safetensors"
    )
    assert delta.metadata["modelspec.prediction_type"] == "epsilon"

    wrong = Graph(server)
    model = wrong("UNETLoader", unet_name="mini_sd15.safetensors", weight_dtype="default")
    loaded = wrong("SaraLoadDelta", delta_name=delta_name)
    applied = wrong("SaraApply", model=model, delta=loaded)
    wrong("ModelSave", model=applied, filename_prefix="weights/never")
    with pytest.raises(PromptError, match=r"does not fit the SD15 model.*is not in the model"):
        wrong.run()

    other = Graph(server)
    model = other("UNETLoader", unet_name="other_sd15.safetensors", weight_dtype="default")
    loaded = other("SaraLoadDelta", delta_name="mini_00001/mini_30_steps.safetensors")
    applied = other("SaraApply", model=model, delta=loaded)
    other("ModelSave", model=applied, filename_prefix="weights/other_base")
    assert "trained on another base" not in server.log_text()[begun:]
    other.run()
    assert "trained on another base" in server.log_text()[begun:]
    assert saved_weights(server, "other_base")


def test_files_outside_the_folders_cannot_be_reached(server):
    for name in ("../../server.log", "/etc/passwd", "missing.safetensors"):
        graph = Graph(server)
        delta = graph("SaraLoadDelta", delta_name=name)
        graph("SaraSaveDelta", delta=delta)
        with pytest.raises(PromptError, match="not in list|there is no delta"):
            graph.run()
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=1,
        output_name="../../escaped",
    )  # fmt: skip
    with pytest.raises(PromptError, match="output folder"):
        graph.run()
    assert train
    assert not list(server.base.parent.glob("**/escaped*"))
