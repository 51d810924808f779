"""Names to objects, loaded on first use.

A registry line is all that makes a method or a family known: listing, suggestions, the command line and the contract
tests read these tables. Targets are strings, so the core never imports a method (DESIGN: imports point down only).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import Any

from .errors import UnknownNameError


class Registry:
    """A table of lazily imported classes.

    Args:
        kind: What the entries are, for messages ("method", "family").
        base: ``"module:Class"`` that every entry must subclass; checked when an entry is first loaded.
        entries: Name to ``"module:Class"``.
    """

    def __init__(self, kind: str, base: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._base = base
        self._targets = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._targets)

    def register(self, name: str, target: str) -> None:
        """Add an entry, for third-party methods and families.

        Raises:
            ValueError: The name is taken by another target, or the target is not ``"module:Class"``.
        """
        module, _, attribute = target.partition(":")
        if not module or not attribute or ":" in attribute:
            raise ValueError(f"{self.kind} target must be 'module:Class', got {target!r}")
        if self._targets.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is already registered as {self._targets[name]!r}")
        self._targets[name] = target

    def target(self, name: str) -> str:
        """``"module:Class"`` of an entry, without loading it.

        Raises:
            UnknownNameError: No such name; the message suggests the nearest ones.
        """
        if name not in self._targets:
            near = difflib.get_close_matches(str(name).lower(), self._targets, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UnknownNameError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self.names())}.")
        return self._targets[name]

    def get(self, name: str) -> type[Any]:
        """The class behind a name.

        Raises:
            UnknownNameError: No such name; the message suggests the nearest ones.
            TypeError: The target is not a subclass of the registry's base.
        """
        target = self.target(name)
        found = _load(target)
        if not (isinstance(found, type) and issubclass(found, _load(self._base))):
            raise TypeError(f"{self.kind} {name!r} ({target}) is not a subclass of {self._base}")
        return found

    def name_of(self, cls: type) -> str | None:
        """The name a class is registered under, or None."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        return next((name for name, known in self._targets.items() if known == target), None)


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


PRUNERS = Registry(
    "method",
    "vlm_budget.pruner:Pruner",
    {
        "cdpruner": "vlm_budget.pruners.cdpruner:CDPruner",
        "cls_topk": "vlm_budget.pruners.cls_topk:ClsTopK",
        "dart": "vlm_budget.pruners.dart:DART",
        "divprune": "vlm_budget.pruners.divprune:DivPrune",
        "fastv": "vlm_budget.pruners.fastv:FastV",
        "gsearch": "vlm_budget.pruners.gsearch:GSearch",
        "hiprune": "vlm_budget.pruners.hiprune:HiPrune",
        "hired": "vlm_budget.pruners.hired:HiRED",
        "holov": "vlm_budget.pruners.holov:HoloV",
        "mmtok": "vlm_budget.pruners.mmtok:MMTok",
        "pool": "vlm_budget.pruners.pool:Pool",
        "prumerge": "vlm_budget.pruners.prumerge:PruMerge",
        "prumerge_plus": "vlm_budget.pruners.prumerge:PruMergePlus",
        "psigmoid": "vlm_budget.pruners.psigmoid:PSigmoid",
        "pyramiddrop": "vlm_budget.pruners.pyramiddrop:PyramidDrop",
        "quota": "vlm_budget.pruners.quota:QuoTA",
        "random": "vlm_budget.pruners.random:Random",
        "segpruner": "vlm_budget.pruners.segpruner:SeGPruner",
        "sparsevlm": "vlm_budget.pruners.sparsevlm:SparseVLM",
        "uniform": "vlm_budget.pruners.uniform:Uniform",
        "visionzip": "vlm_budget.pruners.visionzip:VisionZip",
        "vispruner": "vlm_budget.pruners.vispruner:VisPruner",
        "vtw": "vlm_budget.pruners.vtw:VTW",
    },
)

MERGES = Registry(
    "merge",
    "vlm_budget.pruner:Merge",
    {
        "token_transforming": "vlm_budget.pruners.token_transforming:TokenTransforming",
    },
)

VIT_METHODS = Registry(
    "vision transformer method",
    "vlm_budget.vit:VitMethod",
    {
        "token_transforming": "vlm_budget.pruners.vit_token_transforming:VitTokenTransforming",
        "tome": "vlm_budget.pruners.tome:ToMe",
    },
)

FAMILIES = Registry(
    "family",
    "vlm_budget.families.base:Family",
    {
        "gemma3": "vlm_budget.families.gemma3:Gemma3",
        "idefics3": "vlm_budget.families.idefics3:Idefics3",
        "internvl": "vlm_budget.families.internvl:InternVL",
        "llava": "vlm_budget.families.llava:Llava",
        "llava_next": "vlm_budget.families.llava_next:LlavaNext",
        "llava_next_video": "vlm_budget.families.llava_next_video:LlavaNextVideo",
        "llava_onevision": "vlm_budget.families.llava_onevision:LlavaOnevision",
        "paligemma": "vlm_budget.families.paligemma:PaliGemma",
        "qwen2_5_vl": "vlm_budget.families.qwen2_5_vl:Qwen25VL",
        "qwen2_vl": "vlm_budget.families.qwen2_vl:Qwen2VL",
        "qwen3_vl": "vlm_budget.families.qwen3_vl:Qwen3VL",
        "smolvlm": "vlm_budget.families.smolvlm:SmolVLM",
    },
)

VIDEO_METHODS = Registry(
    "video attention method",
    "vlm_budget.video.dit.method:SparseAttention",
    {
        "block_topk": "vlm_budget.video.dit.methods.block_topk:BlockTopK",
        "dense": "vlm_budget.video.dit.methods.dense:Dense",
        "oracle": "vlm_budget.video.dit.methods.oracle:Oracle",
        "radial": "vlm_budget.video.dit.methods.radial:Radial",
        "sliding_tile": "vlm_budget.video.dit.methods.sliding_tile:SlidingTile",
        "svg1": "vlm_budget.video.dit.methods.svg1:SVG1",
        "svg2": "vlm_budget.video.dit.methods.svg2:SVG2",
    },
)

VIDEO_MODELS = Registry(
    "video model",
    "vlm_budget.video.dit.models.base:VideoModel",
    {
        "cogvideox": "vlm_budget.video.dit.models.cogvideox:CogVideoX",
        "hunyuan_video": "vlm_budget.video.dit.models.hunyuan_video:HunyuanVideo",
        "hunyuan_video_15": "vlm_budget.video.dit.models.hunyuan_video_15:HunyuanVideo15",
        "ltx": "vlm_budget.video.dit.models.ltx:LTX",
        "mochi": "vlm_budget.video.dit.models.mochi:Mochi",
        "wan": "vlm_budget.video.dit.models.wan:Wan",
    },
)


def list_methods() -> list[str]:
    """Names of all pruning methods, for ``patch(model, name)``."""
    return PRUNERS.names()


def list_families() -> list[str]:
    """Names of all supported model families."""
    return FAMILIES.names()


def list_video_methods() -> list[str]:
    """Names of all sparse attention methods for video diffusion, for ``patch(pipe, name)``."""
    return VIDEO_METHODS.names()


def list_video_models() -> list[str]:
    """Names of all supported video diffusion transformers."""
    return VIDEO_MODELS.names()
