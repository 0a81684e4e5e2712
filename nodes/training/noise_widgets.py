"""Widgets of SaRA Train about noise levels and guidance; folded away, and late, as workflows go by their place."""

from comfy_api.latest import io

from ...sara_core.training.noise_levels import BY_SIZE, DISTRIBUTIONS
from ...sara_core.training.objective import WEIGHTINGS
from ...sara_core.training.run_settings import COMFYUIS
from .folded_widgets import SETTINGS


def weighting_inputs() -> list:
    """What the noise levels count."""
    return [
        io.Combo.Input(
            "loss_weighting",
            options=list(WEIGHTINGS),
            default=SETTINGS.loss_weighting,
            optional=True,  # workflows in API form from before it was there
            tooltip="What the noise levels count. none counts all as the family does; min_snr counts low "
            "noise less, so that detail disturbs coarse shapes less; debiased counts high noise more. Both "
            "are for epsilon and v models above all. cosmap is for flow models: it counts middle noise more, and goes with "
            "timestep_distribution uniform. Validation is not weighted.",
        ),
        io.Float.Input(
            "snr_gamma",
            default=SETTINGS.snr_gamma,
            min=0.001,
            max=1000.0,
            step=0.001,
            optional=True,
            tooltip="Of min_snr: the ratio of signal to noise above which a noise level counts less. "
            "Smaller values have more effect; 5 is usual.",
        ),
    ]


def noise_inputs() -> list:
    """Which noise levels are trained."""
    return [
        io.Combo.Input(
            "timestep_distribution",
            options=list(DISTRIBUTIONS),
            default=SETTINGS.timestep_distribution,
            optional=True,
            tooltip="How noise levels are drawn. family is how the model was trained; uniform draws all timesteps "
            "alike; logit_normal draws around logit_mean. The shift of the model, or of a node such as "
            "ModelSamplingSD3, applies to all three. Validation keeps to family.",
        ),
        io.Float.Input(
            "logit_mean",
            default=SETTINGS.logit_mean,
            min=-10.0,
            max=10.0,
            step=0.01,
            optional=True,
            tooltip="Of logit_normal: above 0 trains more at high noise (composition, shapes), below 0 more at low "
            "noise (detail, texture). 1 and -1 are strong.",
        ),
        io.Float.Input(
            "logit_std",
            default=SETTINGS.logit_std,
            min=0.01,
            max=10.0,
            step=0.01,
            optional=True,
            tooltip="Of logit_normal: how widely noise levels spread around the mean.",
        ),
        io.Float.Input(
            "lowest_noise",
            default=SETTINGS.lowest_noise,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip="Least noise that is trained and validated at, as a share: the place among the timesteps, or "
            "sigma of a flow model. For an expert of high noise (such as Wan 2.2's) take where it begins.",
        ),
        io.Float.Input(
            "highest_noise",
            default=SETTINGS.highest_noise,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip="Most noise that is trained and validated at, as a share. For an expert of low noise take where "
            "it ends.",
        ),
        io.Float.Input(
            "noise_offset",
            default=SETTINGS.noise_offset,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip="Adds noise that is the same in a whole channel, so that very bright and very dark pictures are "
            "learned better; for epsilon models. 0.05 to 0.1 are usual, 0 is off.",
        ),
    ]


def shift_and_guidance_inputs() -> list:
    """What flow models, and those distilled with guidance, are trained at."""
    return [
        io.Float.Input(
            "flow_shift",
            default=SETTINGS.flow_shift,
            min=BY_SIZE,
            max=100.0,
            step=0.01,
            optional=True,
            tooltip="Of flow models: how far noise levels are moved up, in place of the model's own shift, which 0 "
            "leaves. -1 goes by the size of the pictures, as Flux is sampled: more for larger ones. Validation "
            "keeps to the model's own.",
        ),
        io.Float.Input(
            "guidance",
            default=SETTINGS.guidance,
            min=COMFYUIS,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="Of models that take a guidance value, such as Flux dev and Hunyuan Video: the one they are "
            "trained at. 1 is what real pictures look like; at a higher one the model unlearns its guidance. "
            "Captions that carry one (FluxGuidance) keep it. -1 is ComfyUI's own.",
        ),
        io.Int.Input(
            "lr_cycles",
            default=SETTINGS.lr_cycles,
            min=1,
            max=1000,
            optional=True,
            tooltip="Of lr_schedule cosine_restarts: how often the learning rate starts anew.",
        ),
    ]
