"""How a MODEL is noised."""

import comfy.model_base
import comfy.model_sampling as sampling
import torch

from ...sara_core.training.objective import NoiseSchedule


def noise_schedule(patcher) -> NoiseSchedule:
    """Describe how a MODEL is noised, with the sampling patches it carries (shift, v-prediction).

    Raises:
        ValueError: A kind of prediction that cannot be trained.
    """
    model_sampling = patcher.get_model_object("model_sampling")
    prediction = _prediction(model_sampling)
    if prediction is None:
        names = [cls.__name__ for cls in type(model_sampling).__mro__[1:4]]
        raise ValueError(f"a model with the sampling {'/'.join(names)} cannot be trained with SaRA")
    if prediction == "cosmos_flow":
        sigma_max = float(model_sampling.sigma_max)
        return NoiseSchedule(
            prediction, "logit_normal", lambda t: (t / (1 - t)).clamp(max=sigma_max)
        )
    if prediction == "flow":
        scale = getattr(model_sampling, "multiplier", 1.0)
        smallest = float(model_sampling.sigma_min)
        return NoiseSchedule(
            prediction,
            "logit_normal",
            lambda t: model_sampling.sigma(t.clamp(min=1e-6) * scale).clamp(min=smallest),
        )
    continuous = isinstance(model_sampling, sampling.ModelSamplingContinuousEDM)
    table = model_sampling.sigmas.float().cpu().clone()
    return NoiseSchedule(
        prediction,
        "log_normal" if continuous and prediction == "edm" else "uniform",
        lambda t: table[(t * len(table)).long().clamp(max=len(table) - 1)],
        float(getattr(model_sampling, "sigma_data", 1.0)),
    )


def foreign_prediction(patcher) -> tuple[str, str] | None:
    """Return what a MODEL's sampling patch makes of it, and what it is by itself; None if the same."""
    model = patcher.model
    own = comfy.model_base.model_sampling(model.model_config, model.model_type)
    found = _prediction(patcher.get_model_object("model_sampling")), _prediction(own)
    return found if found[0] != found[1] else None


def _prediction(model_sampling) -> str | None:
    kinds = (  # subclasses before their bases
        (sampling.IMG_TO_IMG, None),
        (getattr(sampling, "IMG_TO_IMG_FLOW", sampling.IMG_TO_IMG), None),  # since 0.33
        (sampling.X0, "x0"),
        (sampling.EDM, "edm"),
        (sampling.V_PREDICTION, "v"),
        (sampling.COSMOS_RFLOW, "cosmos_flow"),
        (sampling.CONST, "flow"),
        (sampling.EPS, "epsilon"),
    )
    return next((kind for cls, kind in kinds if isinstance(model_sampling, cls)), None)


def sampling_summary(patcher) -> list:
    """Summarise a MODEL's noise schedule, to notice another one: prediction, sigma half way."""
    schedule = noise_schedule(patcher)
    return [schedule.prediction, schedule.to_sigma(torch.tensor([0.5])).item()]
