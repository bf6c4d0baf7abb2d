"""CMR runs GGUF language models offline, and every optimization is a plugin.

The names below are the library; each is imported when it is first used, so that `import cmr` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmr.ages import Tier
    from cmr.discovery import plugin
    from cmr.diskcache import DiskCache
    from cmr.diskspace import DiskError, DiskSpace
    from cmr.errors import CMRError, FileError, ModelError, PluginError, RequestError
    from cmr.eval.depth import DepthProbe
    from cmr.evidence import Notes
    from cmr.folders import cache_folder
    from cmr.hookspecs import hookimpl
    from cmr.kvcache import AttnRule, LayerCache
    from cmr.model import open_model
    from cmr.ops.records import Pages, Segment
    from cmr.sampling import SamplerSettings
    from cmr.sequence import Request
    from cmr.session import Session
    from cmr.tiers import TieredCache
    from cmr.tokenizer import open_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "AttnRule": "kvcache",
    "CMRError": "errors",
    "DepthProbe": "eval.depth",
    "DiskCache": "diskcache",
    "DiskError": "diskspace",
    "DiskSpace": "diskspace",
    "FileError": "errors",
    "LayerCache": "kvcache",
    "ModelError": "errors",
    "Notes": "evidence",
    "Pages": "ops.records",
    "PluginError": "errors",
    "Request": "sequence",
    "RequestError": "errors",
    "SamplerSettings": "sampling",
    "Segment": "ops.records",
    "Tier": "ages",
    "TieredCache": "tiers",
    "Session": "session",
    "cache_folder": "folders",
    "hookimpl": "hookspecs",
    "open_model": "model",
    "open_tokenizer": "tokenizer",
    "plugin": "discovery",
}

__all__ = [
    "AttnRule", "CMRError", "DepthProbe", "DiskCache", "DiskError", "DiskSpace", "FileError", "LayerCache",
    "ModelError", "Notes", "Pages", "PluginError", "Request", "RequestError", "SamplerSettings", "Segment", "Session",
    "Tier", "TieredCache", "cache_folder", "hookimpl", "open_model", "open_tokenizer", "plugin",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cmr' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cmr.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
