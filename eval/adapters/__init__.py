"""This library inside other evaluation harnesses.

A harness that looks for plug-ins finds its adapter here; nothing of a harness is imported before it asks.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval should know; the entry point of its group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlm_budget", simple_class_path="vlm_budget.eval.adapters.lmms_eval.VLMBudget")
