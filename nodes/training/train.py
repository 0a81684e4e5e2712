"""Train a model with SaRA."""

from comfy_api.latest import io

from ...sara_core import SparseDelta
from ...sara_core.optimizer import packages
from ...sara_core.optimizer.adam_moments import refuse_unusable
from ...sara_core.optimizer.packages import ADAMW
from ...sara_core.training import event_files
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import SELECT_BY, RunSettings
from .. import host, output_folder
from ..inputs import searched_as
from ..sockets import LossMap, SaraDelta, SaraSampling
from .epochs import with_steps
from .examples import gather_examples
from .folders import LAST_STEP, finished, is_finished, open_folder
from .live_chart import KIND
from .run import follow, run
from .unlearnable import refuse_unlearnable
from .widgets import NEW_RUN, training_inputs


class SaraTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaraTrain",
            display_name="SaRA Train",
            category="SaRA",
            description="Fine-tunes a model by training only its smallest weights, and saves what "
            "was learned as a small file. The loaded model itself stays as it is.",
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            **searched_as("fine-tune", "finetune", "train lora", "training", "dreambooth"),
            inputs=[
                io.Model.Input("model", tooltip="Model to train."),
                io.Latent.Input(
                    "latents", tooltip="The pictures, encoded by the VAE: a batch, or a list."
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The captions: one per picture, or one for all."
                ),
                io.Conditioning.Input(
                    "empty",
                    optional=True,
                    tooltip="The encoded empty caption (CLIP Text Encode without text), for caption "
                    "dropout.",
                ),
                *training_inputs(),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="What counts in the loss: one per picture, or one for all. Black is "
                    "ignored.",
                ),
                io.Latent.Input(
                    "regularisation_latents",
                    optional=True,
                    tooltip="Pictures of what the model is to keep as it is, such as other members "
                    "of the class; each step goes over a batch of them as well.",
                ),
                io.Conditioning.Input(
                    "regularisation_positive",
                    optional=True,
                    tooltip="Captions of the regularisation pictures.",
                ),
                SaraSampling.Input(
                    "preview",
                    optional=True,
                    tooltip="From SaRA Sampling: what to sample while it trains. The training goes "
                    "on exactly as it would without.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the delta applied."),
                SaraDelta.Output(display_name="delta", tooltip="What was learned."),
                LossMap.Output(display_name="loss_map", tooltip="Connect to Plot Loss Graph."),
                io.String.Output(display_name="file", tooltip="File it was saved to."),
            ],
        )

    @classmethod
    def validate_inputs(cls, resume, moments=("fp32",), lowest_noise=(0.0,), highest_noise=(1.0,),
                        validation_split=(0.0,), patience=(0,), put_out=(LAST_STEP,), optimizer=(ADAMW,),
                        layer_rates=("",), tensorboard=(False,), threshold=(0.0,),
                        select_by=(SELECT_BY[0],)):  # fmt: skip
        # A run that was chosen to be resumed leaves the list when it ends, and stays chosen.
        bounds = {"lowest_noise": lowest_noise[0], "highest_noise": highest_noise[0]}
        whole = {
            "validation_split": validation_split[0],
            "patience": patience[0],
            "put_out": put_out[0],
            "optimizer": optimizer[0],
            "layer_rates": layer_rates[0],
            "moments": moments[0],
        }
        selected = {"threshold": threshold[0] or 0.0, "select_by": select_by[0] or SELECT_BY[0]}
        try:  # what would else be refused after the pictures are encoded; None is linked
            if moments[0] is not None:
                refuse_unusable(moments[0])
            if resume[0] == NEW_RUN and optimizer[0] is not None:
                packages.refuse_unusable(optimizer[0])
            if tensorboard[0]:
                event_files.refuse_missing()
            if None not in bounds.values():
                RunSettings(**bounds)
            if resume[0] == NEW_RUN and None not in whole.values():
                RunSettings(**whole, **selected).refuse_contradictions()
            if resume[0] not in (NEW_RUN, None):
                if not isinstance(resume[0], str):
                    return f"resume is {resume[0]!r}; expected {NEW_RUN!r} or the name of a run"
                output_folder.run_path(resume[0])
        except (ValueError, ImportError) as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, latents, positive, empty=None, masks=None, regularisation_latents=None,
                regularisation_positive=None, preview=(), **widgets) -> io.NodeOutput:  # fmt: skip
        values = {name: given[0] for name, given in widgets.items()}
        resume, more_steps = values.pop("resume"), values.pop("more_steps", 0)
        examples = gather_examples(
            latents, positive, empty, masks, regularisation_latents, regularisation_positive
        )
        refuse_unlearnable(examples)
        node_id, processes = cls.hidden.unique_id, host.processes()
        settings = RunSettings(**values)
        if resume == NEW_RUN:
            settings = with_steps(settings, examples, processes.size)
        opened: list[RunFolder] = []

        job = host.job(node_id)
        is_restarted = any(processes.gather(host.is_restarted))

        def begin() -> tuple[RunSettings, bool, bool]:
            begun = output_folder.run_of_job(job) if job and is_restarted else None
            folder, is_new = open_folder(model[0], resume, settings, more_steps, begun)
            opened.append(folder)
            return folder.settings, is_new, not is_new and is_finished(folder)

        settings, is_new, is_done = processes.lead(begin)
        path, losses, shown = None, {}, {}
        if is_done:
            path, losses = finished(opened[0]) if opened else (None, {})
        elif opened:
            path, losses, chart = run(
                model[0], examples, opened[0], node_id, not is_new,
                host.workflow_id(cls.hidden.extra_pnginfo),
                [sampling for group in preview for sampling in group],
            )  # fmt: skip
            shown[KIND] = (chart,)
        else:
            follow(model[0], examples, settings, not is_new)
        file, losses, delta = processes.lead(  # what is sampled is what is loaded
            lambda: (output_folder.output_relative(path), losses, SparseDelta.load(path))
        )
        last = losses["loss"][-1:]  # the table may be gone
        return io.NodeOutput(
            host.apply_delta(model[0], delta, 1.0),
            delta,
            losses,
            file,
            ui={
                "text": (f"saved {file}" + "".join(f", loss {loss:.4f}" for loss in last),),
                **shown,
            },
        )
