"""The pack's nodes."""

from comfy_api.latest import ComfyExtension

from . import host, page_state
from .analysis.analyze import SaraAnalyze
from .delta.blocks_and_schedules import SaraBlockStrengths, SaraCreateHook
from .delta.export_import import SaraExportDelta, SaraImportCheckpoint
from .delta.load_save_apply import SaraApply, SaraLoadDelta, SaraMergeDeltas, SaraSaveDelta
from .pictures import folder_look, thumbnail
from .pictures.image_folder import SaraImageFolder
from .pictures.join import SaraJoinPictures
from .pictures.references import SaraReferencePictures
from .pictures.video_folder import SaraVideoFolder
from .sampling import checkpoint_strip
from .sampling.prompts import SaraPrompts
from .sampling.sampling_nodes import SaraCompare, SaraLoadCheckpoints, SaraSamplingSettings
from .training import wishes
from .training.compare_runs import SaraCompareRuns
from .training.train import SaraTrain

NODES = [
    SaraImageFolder,
    SaraVideoFolder,
    SaraJoinPictures,
    SaraReferencePictures,
    SaraAnalyze,
    SaraPrompts,
    SaraSamplingSettings,
    SaraTrain,
    SaraCompareRuns,
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
        host.add_route(page_state.PATH, page_state.everything)
        host.add_route(folder_look.PATH, folder_look.look)
        host.add_picture_route(thumbnail.PATH, thumbnail.thumbnail)
        host.add_route(checkpoint_strip.PATH, checkpoint_strip.look)
        host.add_route(wishes.PATH, wishes.ask, changes_something=True)
        return NODES
