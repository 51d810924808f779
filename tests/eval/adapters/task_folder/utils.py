"""Functions of the nano tasks for lmms-eval."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


def visual(doc: Mapping[str, Any]) -> list[Any]:
    with Image.open(io.BytesIO(doc["image"]["bytes"])) as image:
        return [image.convert("RGB")]


def text(doc: Mapping[str, Any]) -> str:
    return str(doc["question"])


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    return {"accuracy": float(answers[0].strip() == doc["answer"])}
