"""Socket types of the pack."""

from comfy_api.latest import io

SaraDelta = io.Custom("SARA_DELTA")  # carries a sara_core.SparseDelta
LossMap = io.Custom("LOSS_MAP")  # core's: {"loss": [float, ...]}
SaraSampling = io.Custom("SARA_SAMPLING")  # carries a list of host.Sampling
