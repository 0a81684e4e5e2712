import dataclasses
import json

import pytest

from sara_core.training.run_folder import RunFolder
from sara_core.training.run_settings import COMFYUIS, PUT_OUT, SELECT_FROM, RunSettings

OF_VERSION_1 = {  # as 0.1.0 wrote it: the widgets of SaRA Train
    "batch_size": 8, "caption_dropout": 0.1, "exclude": "", "fraction": 0.1,
    "grad_accumulation_steps": 1, "gradient_checkpointing": False, "include": "attn",
    "keep_checkpoints": 4, "learning_rate": 0.0, "loss_function": "mse", "low_rank_weight": 0.0005,
    "lr_schedule": "cosine", "max_grad_norm": 1.0, "moments": "fp32", "offloading": False,
    "output_name": "fluent3d", "preview_every_steps": 100, "preview_strength": 1.0,
    "progressive": 0.5, "regularisation_weight": 1.0, "save_dtype": "fp16",
    "save_every_steps": 100, "seed": 5, "steps": 300, "threshold": 0.0059433,
    "training_dtype": "auto", "trigger_words": "sks", "validate_every_steps": 50,
    "validation_split": 0.25, "warmup_steps": 10, "weight_decay": 0.0, "zeros": "auto",
}  # fmt: skip


def test_a_run_of_an_earlier_version_is_read_with_its_own_settings(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(OF_VERSION_1))
    settings = RunFolder(tmp_path).settings
    for name, value in OF_VERSION_1.items():
        assert getattr(settings, name) == value
    assert settings.schedule_start == 0
    assert not settings.keep_state  # it was not offered then
    older = {k: v for k, v in OF_VERSION_1.items() if k not in ("offloading", "moments")}
    assert RunSettings.read(older) == RunSettings.read(OF_VERSION_1)


def test_saved_settings_are_read_back_and_those_of_a_later_version_refused(tmp_path):
    settings = RunSettings(steps=7, trigger_words="a", seed=2**64 - 1)
    folder = RunFolder.create(tmp_path, "style", settings)
    saved = json.loads((folder.path / "settings.json").read_text())
    assert RunSettings.read(saved) == settings
    with pytest.raises(ValueError, match=r"\['ema'\] that this version 2 does not know"):
        RunSettings.read({**saved, "ema": 0.99})
    with pytest.raises(ValueError, match="of version 3"):
        RunSettings.read({**saved, "version": 3})


def test_only_what_changes_nothing_that_is_learned_is_taken_over_on_resuming():
    own = RunSettings(steps=7, seed=3, fraction=0.2)
    node = RunSettings(
        steps=9, seed=4, fraction=0.3, keep_checkpoints=5, offloading=True, moments="8bit"
    )
    resumed = own.resumed_with(node)
    assert resumed == dataclasses.replace(own, keep_checkpoints=5, offloading=True, moments="8bit")
    assert RunSettings(moments="8bit").resumed_with(own).moments == "8bit"


def test_more_steps_have_a_rate_and_a_course_of_their_own():
    own = RunSettings(steps=300, learning_rate=1e-3, lr_schedule="cosine", progressive=0.5)
    node = RunSettings(learning_rate=2e-4, lr_schedule="constant", warmup_steps=5, seed=9)
    more = own.extended_by(200, node)
    assert (more.steps, more.schedule_start, more.learning_rate) == (500, 300, 2e-4)
    assert (more.lr_schedule, more.warmup_steps, more.seed) == ("constant", 5, own.seed)
    assert more.optimizer_options["progressive_step"] == 150  # where it was


def test_more_steps_after_an_early_end_go_on_from_there():
    own = RunSettings(steps=300, progressive=0.5, ended_at=120)
    assert own.last_step == 120
    more = own.extended_by(200, own)
    assert (more.steps, more.schedule_start, more.ended_at, more.last_step) == (320, 120, 0, 320)
    assert more.optimizer_options["progressive_step"] == 150  # where it was
    fewer = own.extended_by(20, own)
    assert fewer.optimizer_options["progressive_step"] == 0  # beyond the last step


def test_a_run_of_before_goes_on_at_the_guidance_it_had():
    saved = RunSettings().saved()
    assert RunSettings.read(saved).guidance == 1.0
    del saved["guidance"]
    assert RunSettings.read(saved).guidance == COMFYUIS == -1.0


def test_a_run_of_before_goes_on_with_the_smallest_of_the_whole_model():
    saved = RunSettings(fraction=0.2).saved()
    rule = {"fraction": 0.2, "by_parameter": True}
    assert RunSettings.read(saved).selection_rule == rule
    del saved["select_from"]
    assert RunSettings.read(saved).selection_rule == {**rule, "by_parameter": False}


def test_a_threshold_is_for_the_whole_model():
    for of in SELECT_FROM:
        settings = RunSettings(threshold=0.1, select_from=of)
        settings.refuse_contradictions()
        assert settings.selection_rule == {"threshold": 0.1}


def test_a_run_that_holds_nothing_out_is_not_resumed_by_what_is_held_out():
    own, node = RunSettings(), RunSettings(validation_split=0.2, patience=3, put_out=PUT_OUT[1])
    assert own.resumed_with(node).patience == 0
    assert own.resumed_with(node).put_out == PUT_OUT[0]
    other = RunSettings(validation_split=0.3).resumed_with(node)
    assert (other.validation_split, other.patience, other.put_out) == (0.3, 3, PUT_OUT[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"put_out": "best"}, "put_out is 'best'; expected one of last step, best validation"),
        ({"fraction": 1.5}, "fraction is 1.5; expected 0 to 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"zeros": "never"}, "zeros is 'never'; expected one of auto, skip, train"),
        ({"training_dtype": "fp8"}, "training_dtype is 'fp8'"),
        ({"schedule_start": 500}, "schedule_start is 500, after the last step"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 3}, "patience is 3, which goes by .* validation_split is 0"),
        ({"put_out": "best validation"}, "put_out is 'best validation', which goes by"),
    ],
)
def test_contradictions_are_refused_where_a_run_is_made_and_not_where_one_is_resumed(
    values, message
):
    node = RunSettings(**values)
    assert RunSettings(validation_split=0.1).resumed_with(node).patience == node.patience
    with pytest.raises(ValueError, match=message):
        node.refuse_contradictions()


def test_a_run_by_gradient_has_its_own_rate_and_one_stage():
    settings = RunSettings(select_by="gradient", fraction=0.04)
    options = settings.optimizer_options
    assert options["lr"] == pytest.approx(1e-4)
    assert options["progressive_step"] == 0
    assert RunSettings(select_by="gradient", learning_rate=3e-4).optimizer_options["lr"] == 3e-4
    assert RunSettings(select_by="gradient", optimizer="prodigy").optimizer_options["lr"] is None
    assert RunSettings().optimizer_options["lr"] is None
    with pytest.raises(ValueError, match="select_by is 'gradient', which takes a fraction of the"):
        RunSettings(select_by="gradient", threshold=0.01).refuse_contradictions()
    with pytest.raises(
        ValueError, match="select_by is 'size of it'; expected one of size, gradient"
    ):
        RunSettings(select_by="size of it")
    assert (
        RunSettings.read({"steps": 5, "version": 2}).select_by == "size"
    )  # there was no other way
