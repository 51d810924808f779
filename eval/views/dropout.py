"""Random budgets in training, which use no signal that a pruning method uses.

Half of the batches are whole. In the others something is missing, in no particular direction:

* ``dropped``: kept tokens are a weighted sample without replacement (Gumbel top-k). The weights are tilted by a
  random linear functional of the tokens, drawn anew for every scene, and by a random offset per picture: what is
  dropped is correlated with content, as it is after pruning.
* ``resized``: the 6 x 6 map of every picture comes at a random resolution, none included, which for clips may be
  finer than the model's own 3 x 3; or all pictures at the same lower one.

Neither attention nor labels enter. What is left is renumbered, or keeps its places, half of the time each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_budget.eval.views.modeling import PATCHES, POOLED_SIDE, SIDE, VIEW_TOKENS
from vlm_budget.eval.views.packing import NATIVE, PREFIX, Prefix, whole

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

SIZES = ((0, 0), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (4, 4), (6, 6))
"""Rows and columns that a picture may be resized to."""
_MODES = ("bilinear", "area", "nearest-exact")


class Drawn(NamedTuple):
    """A prefix and the kind of its budget: ``whole``, ``dropped`` or ``resized``."""

    prefix: Prefix
    kind: str


@dataclass(frozen=True)
class RandomBudget:
    """Settings of the dropout.

    Attributes:
        full: probability that a batch loses nothing.
        resized: probability that a batch of clips, or of rooms, which loses something is resized instead of dropped.
        min_keep: smallest share of tokens kept when dropped; the share is log-uniform up to 1.
        separators: probability that the newlines are kept.
        renumber: probability that kept tokens are numbered 0..k-1 instead of keeping their places.
        tilted: probability that a scene's weights are tilted by its tokens.
        strength: largest tilt, in standard deviations of the functional.
        offset: largest standard deviation of the offset per picture.
        even: probability that a resized batch has the same resolution in all pictures.
        most: most visual tokens of a resized scene; a draw above it is drawn again.
    """

    full: float = 0.5
    resized: tuple[float, float] = (0.6, 0.25)
    min_keep: float = 0.08
    separators: float = 0.5
    renumber: float = 0.5
    tilted: float = 0.7
    strength: float = 3.0
    offset: float = 2.0
    even: float = 0.3
    most: int = 448

    def draw(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        task: str,
        features: Tensor,
        generator: torch.Generator,
    ) -> Drawn:
        """The visual tokens of one batch.

        Args:
            model: the model.
            task: ``"rooms"`` or ``"haystack"``.
            features: features of the tower, ``[B, P, 36, Dv]``.
            generator: a CPU generator; its state decides everything.
        """
        full, resized, separators, renumber = torch.rand(4, generator=generator).tolist()
        if full < self.full:
            return Drawn(PREFIX[task](model, features), "whole")
        keeps, renumbers = separators < self.separators, renumber < self.renumber
        if resized < self.resized[task == "rooms"]:
            sizes = self._sizes(task, features.shape[:2], generator)
            mode = _MODES[int(torch.randint(len(_MODES), (), generator=generator))]
            return Drawn(resize(model, task, features, sizes, mode, keeps, renumbers), "resized")
        prefix = PREFIX[task](model, features)
        return Drawn(prefix.keep(self._slots(task, prefix, features.shape[1], keeps, generator), renumbers), "dropped")

    def _slots(self, task: str, prefix: Prefix, pictures: int, separators: bool, generator: torch.Generator) -> Tensor:
        """Kept slots of a whole prefix, ``[B, k]``, increasing."""
        patch, newline = slots_of(task, pictures)
        share = self.min_keep ** torch.rand((), generator=generator).item()
        scores = self._scores(prefix.visual.detach()[:, patch].float().cpu(), pictures, generator)
        slots = patch[scores.topk(max(1, round(len(patch) * share)), 1).indices]
        if separators:
            slots = torch.cat([slots, newline.expand(len(slots), -1)], 1)
        return slots.sort(1).values.to(prefix.visual.device)

    def _scores(self, tokens: Tensor, pictures: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise plus the tilts for tokens ``[B, n, D]``: ``[B, n]``."""
        batch, count, width = tokens.shape
        centred = (tokens - tokens.mean((0, 1))) / (tokens.std((0, 1)) + 1e-4)
        functional = torch.einsum("bnd,bd->bn", centred, torch.randn(batch, width, generator=generator))
        functional = (functional - functional.mean(1, keepdim=True)) / (functional.std(1, keepdim=True) + 1e-4)
        amount, tilted, spread = torch.rand(3, batch, 1, generator=generator)
        strength = self.strength * amount * (tilted < self.tilted)
        offset = torch.randn(batch, pictures, generator=generator) * spread * self.offset
        uniform = torch.rand(batch, count, generator=generator).clamp(1e-6, 1 - 1e-6)
        noise = -(-uniform.log()).log()
        return strength * functional + offset.repeat_interleave(count // pictures, 1) + noise

    def _sizes(self, task: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Indices into `SIZES`, ``[B, P]``: the same resolutions in every scene, in another order each."""
        batch, pictures = shape
        cells = torch.tensor([rows * cols for rows, cols in SIZES])
        while True:
            if torch.rand((), generator=generator) < self.even:
                sizes = torch.randint(1, len(SIZES), (1,), generator=generator).expand(pictures)
            else:
                # Exponentials to a power: now one resolution, now a mixture of all.
                weights = torch.empty(len(SIZES)).exponential_(generator=generator) ** 2 + 1e-3
                sizes = torch.multinomial(weights, pictures, replacement=True, generator=generator)
            if 0 < cells[sizes].sum() <= self.most:
                order = torch.rand(batch, pictures, generator=generator).argsort(1)
                return sizes[order]


def slots_of(task: str, pictures: int) -> tuple[Tensor, Tensor]:
    """Slots of the patch tokens and of the newlines in a whole prefix."""
    if task == "haystack":
        patches = pictures * NATIVE[task]
        return torch.arange(patches), torch.tensor([patches])
    grid = torch.arange(pictures * VIEW_TOKENS).view(pictures, VIEW_TOKENS)
    return grid[:, :PATCHES].flatten(), grid[:, PATCHES]


def resize(
    model: LlavaOnevisionForConditionalGeneration,
    task: str,
    features: Tensor,
    sizes: Tensor,
    mode: str = "bilinear",
    separators: bool = True,
    renumber: bool = True,
) -> Prefix:
    """Visual tokens with every picture at a resolution of its own, resampled behind the projector.

    Args:
        model: the model.
        task: ``"rooms"`` or ``"haystack"``.
        features: features of the tower, ``[B, P, 36, Dv]``.
        sizes: indices into `SIZES`, ``[B, P]``, every row with the same number of cells.
        mode: how `torch.nn.functional.interpolate` resamples.
        separators: keep the newline behind every picture that has tokens (rooms), the one at the end (clips).
        renumber: number the tokens 0..k-1; else a token stands at the place of the full budget's token nearest to it.
            Scenes with a picture finer than at full budget are renumbered always.
    """
    projected = model.model.multi_modal_projector(features)
    maps = projected.unflatten(2, (SIDE, SIDE)).movedim(-1, 2)
    pieces, homes, places = [model.model.image_newline.to(projected)[None]], [torch.zeros(1)], [torch.zeros(1)]
    native = SIDE if task == "rooms" else POOLED_SIDE
    stride = native * native + (task == "rooms")
    batch, pictures = sizes.shape
    for index, (rows, cols) in enumerate(SIZES):
        scene, picture = (sizes == index).nonzero(as_tuple=True)
        if not len(scene) or not rows:
            continue
        options = {"align_corners": False} if mode == "bilinear" else {}
        pieces.append(
            F.interpolate(maps[scene, picture].float(), size=(rows, cols), mode=mode, **options)
            .to(projected.dtype)
            .flatten(2)
            .transpose(1, 2)
            .flatten(0, 1)
        )
        order = torch.arange(rows * cols) / (rows * cols)
        homes.append(((scene * (pictures + 1) + picture)[:, None] + order).flatten())
        near = ((torch.arange(rows) + 0.5) * native / rows).long()[:, None] * native
        near = (near + ((torch.arange(cols) + 0.5) * native / cols).long()).flatten()
        places.append((picture[:, None] * stride + near).flatten())
    # Every token has a home (scene and picture, then its order) by which the pieces are put in sequence.
    home, place = torch.cat(homes[1:]), torch.cat(places[1:])
    token = torch.arange(1, len(home) + 1)
    if separators:
        ends = _newlines(task, sizes)
        home, token = torch.cat([home, ends[0]]), torch.cat([token, torch.zeros(len(ends[0]), dtype=torch.long)])
        place = torch.cat([place, ends[1] if task == "rooms" else torch.full((batch,), pictures * stride)])
    order = home.argsort(stable=True)
    gathered = torch.cat(pieces)[token[order].to(projected.device)]
    visual = gathered.view(batch, -1, gathered.shape[-1])
    finer = any(rows * cols > native * native for rows, cols in (SIZES[i] for i in sizes.unique().tolist()))
    if renumber or finer:
        return whole(visual)
    length = pictures * stride + (task == "haystack")
    return Prefix(visual, place[order].long().view(batch, -1).to(visual.device), length)


def _newlines(task: str, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Homes and places of the newlines that are kept."""
    batch, pictures = sizes.shape
    if task == "haystack":
        return torch.arange(batch) * (pictures + 1.0) + pictures, torch.zeros(0)
    scene, picture = (sizes != 0).nonzero(as_tuple=True)
    return scene * (pictures + 1) + picture + 0.999, picture * VIEW_TOKENS + PATCHES
