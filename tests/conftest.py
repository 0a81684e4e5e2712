"""Make the pack importable: `sara_core` as scripts see it, `sara_pack` as ComfyUI does.

The folder name is the user's choice and may hold a hyphen, so tests cannot import it by name.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.append(str(ROOT))  # last, so that our nodes/ never hides ComfyUI's nodes.py
pack = types.ModuleType("sara_pack")
pack.__path__ = [str(ROOT)]
sys.modules["sara_pack"] = pack
