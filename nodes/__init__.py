"""The pack's nodes."""

from comfy_api.latest import ComfyExtension

from . import host, shown
from .analyze import SaraAnalyze
from .delta_nodes import SaraApply, SaraLoadDelta, SaraMergeDeltas, SaraSaveDelta
from .delta_tools import (
    SaraBlockStrengths,
    SaraCreateHook,
    SaraExportDelta,
    SaraImportCheckpoint,
)
from .image_folder import SaraImageFolder
from .sampling import SaraCompare, SaraLoadCheckpoints, SaraSamplingSettings
from .train import SaraTrain

NODES = [
    SaraImageFolder,
    SaraAnalyze,
    SaraSamplingSettings,
    SaraTrain,
    SaraLoadDelta,
    SaraSaveDelta,
    SaraMergeDeltas,
    SaraApply,
    SaraLoadCheckpoints,
    SaraCompare,
    SaraBlockStrengths,
    SaraCreateHook,
    SaraExportDelta,
    SaraImportCheckpoint,
]


class SaraExtension(ComfyExtension):
    """What ComfyUI loads."""

    async def get_node_list(self):
        host.register_folders()  # here, as 0.3.75 does not call on_load
        host.add_route(shown.PATH, shown.everything)
        return NODES
