"""What the vision tower is taught in its first stage: what each patch shows, and what each picture holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_budget.eval.views.world import COLOR_NAMES, KINDS, Picture, Thing

PATCH = 8
NO_KIND, NO_COLOR = len(KINDS), len(COLOR_NAMES)
"""Labels of a patch that shows the bare room: the index after the last kind, after the last colour."""
SUMMARY = len(KINDS) + len(COLOR_NAMES) + len(KINDS) * len(COLOR_NAMES)
"""Kinds, colours, and (kind, colour) pairs, kind-major."""
_MIN_COVER, _MIN_PIXELS = 0.15, 25


def picture_labels(picture: Picture, things: Sequence[Thing]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of one picture of side S; a patch's label is the thing that covers most of it, and 15 % at least.

    Args:
        picture: the picture; its owners index ``things``.
        things: the room's things.

    Returns:
        kind int64 ``[(S / 8)^2]``, colour int64 ``[(S / 8)^2]``, and what the picture shows on 25 pixels or more,
        float32 ``[SUMMARY]``.
    """
    kinds = np.array([*(thing.kind for thing in things), NO_KIND], np.int64)
    colors = np.array([*(thing.color for thing in things), NO_COLOR], np.int64)
    cells = len(picture.owner) // PATCH
    mask = picture.owner[None] == np.arange(len(things) + 1)[:, None, None]
    cover = mask.reshape(-1, cells, PATCH, cells, PATCH).mean((2, 4), dtype=np.float32).reshape(len(mask), -1)
    best = np.where(cover.max(0) >= _MIN_COVER, cover.argmax(0), len(things))
    summary = np.zeros(SUMMARY, np.float32)
    for index in np.flatnonzero(mask.sum((1, 2)) >= _MIN_PIXELS):
        kind, color = kinds[index], colors[index]
        pair = len(KINDS) + len(COLOR_NAMES) + kind * len(COLOR_NAMES) + color
        summary[[kind, len(KINDS) + color, pair]] = 1
    return kinds[best], colors[best], summary


def batch_labels(
    pictures: Sequence[Picture], things: Sequence[Sequence[Thing]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`picture_labels` of many pictures, each with its own room's things, stacked."""
    kinds, colors, summaries = zip(*map(picture_labels, pictures, things), strict=True)
    return np.stack(kinds), np.stack(colors), np.stack(summaries)
