"""Pictures made by the model in training, and tables of deltas and strengths."""

import base64
import io
import tempfile

import comfy.sd as comfy
import numpy as np
import pytest
import torch
from PIL import Image

from ..harness.environment import checkpoint
from .builders import assert_same_bits, bits, settings


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        model, clip, vae = comfy.load_checkpoint_guess_config(str(checkpoint()))[:3]
        encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
        captions = [encode(text) for text in ("a red apple", "a green frog", "")]
    return model, vae, captions


@pytest.fixture
def sampling(loaded, sara):
    _, vae, captions = loaded
    generator = torch.Generator().manual_seed(3)

    def make(**changes):
        options = {
            "vae": vae, "positive": captions[0], "negative": captions[2],
            "latent": {"samples": torch.zeros(2, 16, 8, 8)}, "seed": 7, "steps": 3, "cfg": 2.0,
            "sampler_name": "euler_ancestral", "scheduler": "normal",
        }  # fmt: skip
        return sara.host.Sampling(**options | changes)

    latents = [torch.randn(1, 16, 8, 8, generator=generator) for _ in range(4)]
    make.examples = sara.examples.Examples(latents, [caption[0] for caption in captions[:2]] * 2)
    return make


def train(sara, model, examples, samplings=(), resume=None, **changes):
    options = settings(sara, learning_rate=3e-3, preview_every_steps=2, **changes)
    folder = resume or sara.folder.RunFolder.create(tempfile.mkdtemp(), "run", options)
    path, losses, chart = sara.run.run(
        model, examples, folder, None, resume is not None, None, samplings
    )
    return sara.core.SparseDelta.load(path), losses["loss"], chart, folder


def picture(folder, step):
    return np.asarray(Image.open(folder.preview_path(step)))


def as_bytes(pictures):
    return [(p.clamp(0, 1) * 255).round().to(torch.uint8).numpy() for p in pictures]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, entry in one.items():
        assert torch.equal(entry.index, other[name].index)
        assert torch.equal(entry.values, other[name].values), name


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_training_goes_on_exactly_as_without_previews(loaded, sara, sampling, strength):
    model = loaded[0]
    before = bits(model)
    plain, losses, _, _ = train(sara, model, sampling.examples)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    delta, seen, chart, folder = train(
        sara, model, sampling.examples, [sampling(), sampling(seed=8)], preview_strength=strength
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == losses
    assert_same(delta.entries, plain.entries)
    assert_same_bits(before, model)
    assert chart["previews"] == [[s, f"preview_{s:07}_steps.png"] for s in (0, 2, 4)]
    assert picture(folder, 0).shape == (64 + 4 + 64, 64 + 4 + 64, 3)
    assert not np.array_equal(picture(folder, 0), picture(folder, 4))


def test_little_free_memory_moves_no_weight_in_training(loaded, sara, sampling, monkeypatch):
    """What ComfyUI does on a full graphics card when it is asked for a model it has loaded."""
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    model = loaded[0]
    plain, losses, _, _ = train(sara, model, sampling.examples)
    asked, real = [], ModelPatcher.partially_load

    def make_room(self, device, *args, **kwargs):
        if self.model is model.model and self.model.model_loaded_weight_memory > 0:
            asked.append(self)
            self.partially_unload(self.offload_device, 10**12)
            return 0
        return real(self, device, *args, **kwargs)

    def preview(calls, one):
        with monkeypatch.context() as patched:
            patched.setattr(ModelPatcher, "partially_load", make_room)
            made = sample(calls, one)
        names = {type(entry.model.model).__name__ for entry in management.current_loaded_models}
        assert names == {type(model.model).__name__}  # no VAE is left
        return made

    management, sample = comfy.model_management, sara.host.sample_in_training
    monkeypatch.setattr(sara.host, "sample_in_training", preview)
    delta, seen, chart, _ = train(sara, model, sampling.examples, [sampling()])
    assert not asked
    assert [step for step, _ in chart["previews"]] == [0, 2, 4]
    assert seen == losses
    assert_same(delta.entries, plain.entries)


def test_a_preview_is_what_the_applied_delta_makes(loaded, sara, sampling):
    model = loaded[0]
    one = sampling()
    half = train(sara, model, sampling.examples, [one], preview_strength=0.5)[3]
    delta, _, _, folder = train(sara, model, sampling.examples, [one])
    for strength, found in (
        (0.0, picture(folder, 0)),
        (1.0, picture(folder, 4)),
        (0.5, picture(half, 4)),
    ):
        with torch.inference_mode():
            made = as_bytes(sara.host.sample(sara.host.apply_delta(model, delta, strength), one))
        shown = [found[:, :64], found[:, 68:]]
        for expected, cell in zip(made, shown, strict=True):
            assert np.abs(expected.astype(int) - cell).max() <= 1  # of 255
    assert not np.array_equal(picture(folder, 0), picture(folder, 4))
    embedded = delta.metadata["modelspec.thumbnail"]
    assert embedded.startswith("data:image/jpeg;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(embedded.partition(",")[2])))
    assert small.size == (64, 64)
    difference = np.abs(np.asarray(small).astype(int) - picture(folder, 4)[:, :64])
    assert difference.mean() < 8


def test_sampling_is_what_ksampler_and_vae_decode_make(loaded, sara, sampling):
    import nodes as core

    model, vae, captions = loaded
    one = sampling()
    with torch.inference_mode():
        found = sara.host.sample(model, one)
        latent = core.common_ksampler(
            model, 7, 3, 2.0, "euler_ancestral", "normal", captions[0], captions[2], one.latent
        )[0]
        expected = core.VAEDecode().decode(vae, latent)[0]
    assert torch.equal(found, expected)


def test_loading_the_vae_does_not_move_the_model_in_training(loaded, sara, sampling, monkeypatch):
    """On a small GPU ComfyUI unloads whatever it sees to make room for the VAE."""
    import comfy.model_management as management

    model, vae, _ = loaded
    plain = train(sara, model, sampling.examples)[0]
    decode, seen = type(vae).decode, []

    def make_room(self, latent):
        in_training = [p.data_ptr() for p in model.model.diffusion_model.parameters()]
        management.unload_all_models()
        seen.append([p.data_ptr() for p in model.model.diffusion_model.parameters()] == in_training)
        seen.append(
            all(entry.real_model() is not model.model for entry in management.current_loaded_models)
        )
        return decode(self, latent)

    monkeypatch.setattr(type(vae), "decode", make_room)
    delta = train(sara, model, sampling.examples, [sampling()])[0]
    assert seen == [True] * 6
    assert_same(delta.entries, plain.entries)


def fail_at(call, error):
    count = [0]

    def decode(self, *_):
        count[0] += 1
        if count[0] == call:
            raise error
        return torch.zeros(2, 64, 64, 3)

    return decode


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (2, KeyError("later")),
        (1, KeyError("at once")),
        (1, torch.cuda.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_a_preview_that_fails_is_reported_and_the_training_goes_on(
    loaded, sara, sampling, monkeypatch, call, error
):  # fmt: skip
    model, vae, _ = loaded
    plain = train(sara, model, sampling.examples, preview_strength=0.5)[0]
    monkeypatch.setattr(type(vae), "decode", fail_at(call, error))
    delta, _, chart, folder = train(
        sara, model, sampling.examples, [sampling()], preview_strength=0.5
    )
    assert_same(delta.entries, plain.entries)
    assert len(chart["previews"]) == call - 1
    (warning,) = [line for line in chart["warnings"] if "no more previews" in line]
    assert str(error).strip("'") in warning
    assert "no more previews" in (folder.path / "log.txt").read_text()


def test_cancel_in_a_preview_saves_and_the_resumed_run_shows_what_it_should(
    loaded, sara, sampling, monkeypatch
):  # fmt: skip
    import comfy.model_management as management

    model, vae, _ = loaded
    before = bits(model)
    plain = train(sara, model, sampling.examples)[0]
    with monkeypatch.context() as patch:
        error = management.InterruptProcessingException()
        patch.setattr(type(vae), "decode", fail_at(2, error))
        options = settings(sara, learning_rate=3e-3, preview_every_steps=2)
        folder = sara.folder.RunFolder.create(tempfile.mkdtemp(), "run", options)
        with pytest.raises(management.InterruptProcessingException):
            sara.run.run(model, sampling.examples, folder, None, samplings=[sampling()])
    assert_same_bits(before, model)
    again = sara.folder.RunFolder(folder.path)
    again.preview_path(3).write_bytes(b"of a step that will be made again")
    delta, _, chart, _ = train(sara, model, sampling.examples, [sampling()], resume=again)
    assert_same(delta.entries, plain.entries)
    assert [step for step, _ in chart["previews"]] == [0, 2, 4]
    assert not again.preview_path(3).exists()


def test_hooks_or_another_vae_in_a_preview_are_said_and_the_training_goes_on(
    loaded, sara, sampling, monkeypatch
):  # fmt: skip
    model, vae, captions = loaded
    delta = train(sara, model, sampling.examples)[0]
    hooks = sara.host.create_hook(delta, 1.0, None)
    positive = [[captions[0][0][0], {**captions[0][0][1], "hooks": hooks}]]
    found, _, chart, _ = train(sara, model, sampling.examples, [sampling(positive=positive)])
    assert "carries hooks" in chart["warnings"][-1]
    assert_same(found.entries, delta.entries)
    monkeypatch.setattr(vae, "latent_channels", 4)
    found, _, chart, _ = train(sara, model, sampling.examples, [sampling()])
    assert "latents of 4 channels, but this model makes 16" in chart["warnings"][-1]
    assert_same(found.entries, delta.entries)


def test_without_a_first_preview_a_cancelled_run_leaves_no_folder(
    loaded, sara, sampling, monkeypatch
):
    import comfy.model_management as management

    model = loaded[0]
    folder = sara.folder.RunFolder.create(
        tempfile.mkdtemp(), "run", settings(sara, preview_every_steps=2)
    )

    def cancel(*_, **__):
        raise management.InterruptProcessingException()

    monkeypatch.setattr(sara.run.TrainingRun, "_make_step", cancel)
    with pytest.raises(management.InterruptProcessingException):
        sara.run.run(model, sampling.examples, folder, None, samplings=[sampling()])
    assert not folder.path.exists()


def test_the_table_holds_each_delta_at_each_strength(loaded, sara, sampling, monkeypatch):
    from sara_pack.nodes.sampling import comparison

    model = loaded[0]
    before = {n: w.clone() for n, w in sara.host.base_weights(model).items()}
    one = train(sara, model, sampling.examples)[0]
    other = train(sara, model, sampling.examples, steps=2, seed=5)[0]
    rows = [sampling(), sampling(seed=9, latent={"samples": torch.zeros(1, 16, 8, 8)})]
    calls, sample = [], sara.host.sample
    monkeypatch.setattr(comparison.host, "sample", lambda *a: calls.append(a) or sample(*a))
    with torch.inference_mode():
        sheet, pictures = comparison.compare(model, [one, other], [0.0, 1.0], rows, None)
        assert len(calls) == 2 * 3  # the model itself once, then each delta
        assert len(pictures) == 2 * 2 * 2
        for number, (delta, strength) in enumerate(
            (d, s) for d in (one, other) for s in (0.0, 1.0)
        ):
            applied = sara.host.apply_delta(model, delta, strength)
            for which, row in enumerate(rows):
                assert torch.equal(pictures[2 * number + which], sample(applied, row))
    cell = as_bytes(pictures[2])[0]  # the first delta at strength 1
    drawn = as_bytes(sheet)[0]
    found = [
        (y, x)
        for y in range(0, drawn.shape[0] - 64)
        for x in range(0, drawn.shape[1] - 64)
        if np.array_equal(drawn[y, x : x + 64], cell[0])
        and np.array_equal(drawn[y : y + 64, x : x + 64], cell)
    ]
    assert len(found) == 1
    assert not torch.equal(pictures[2], pictures[6])
    after = sara.host.base_weights(model)  # below the patches of the last clone that was loaded
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("text", ["", " , ", "0, much", "1, nan", "inf"])
def test_strengths_that_are_none_are_refused(text, sara):
    from sara_pack.nodes.sampling.comparison import parse_strengths

    with pytest.raises(ValueError, match="expected numbers"):
        parse_strengths(text)
    assert parse_strengths("0, .5\n-1,") == [0.0, 0.5, -1.0]


def test_a_delta_that_does_not_fit_is_refused_before_anything_is_sampled(loaded, sara, sampling):
    from sara_pack.nodes.sampling.comparison import compare

    delta = train(sara, loaded[0], sampling.examples)[0]
    entry = sara.core.DeltaEntry(torch.tensor([0]), torch.tensor([1.0]), (2, 2))
    foreign = sara.core.SparseDelta({"nowhere.weight": entry})
    broken = sampling(vae=None)
    with pytest.raises(ValueError, match="does not fit"):
        compare(loaded[0], [delta, foreign], [1.0], [broken], None)
