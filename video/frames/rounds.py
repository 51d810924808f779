"""The rounds of a temporal search: what is drawn, what is made of what was seen, and when it ends.

What is the paper's and what is ours stands in :mod:`~vlm_budget.video.frames.tstar`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .scorers import check_scores
from .suppression import peaks, spaced

if TYPE_CHECKING:
    from .tstar import TStar

Look = Callable[[Sequence[int]], torch.Tensor]

_SHOULDER = 0.5  # what a frame counts with a better one close by
_GRID_OF_ROUND = 0.875  # share of a round that goes over the grid until it is covered; the rest is drawn
_GRID_OF_BUDGET = 0.75  # the most of the budget that goes over the grid


class Rounds:
    """State of one search: N candidates, of which some have been visited."""

    def __init__(self, how: TStar, times: np.ndarray, targets: int, cues: int, keep: int, budget: int) -> None:
        count = len(times)
        self.how, self.times, self.keep, self.budget = how, times, keep, budget
        self.weights = np.array([how.target_weight] * targets + [how.cue_weight] * cues)
        self.threshold = float(np.float32(how.threshold))  # confidences are float32
        self.random = np.random.default_rng(how.seed)
        self.seen = np.zeros(count, dtype=bool)
        self.score, self.raised, self.expected = np.zeros(count), np.zeros(count), np.zeros(count)
        self.top = [0] * targets
        self.certain = np.full(targets, -1.0)
        self.kept: list[int] = []
        self.shown: frozenset[int] = frozenset()
        self.rounds = self.verified = self.unchanged = 0
        self.grid = self._grid()

    def _grid(self) -> list[int]:
        """Frames of the covering pass, coarse to fine; of the paper's sampler the first round alone."""
        how, count = self.how, len(self.times)
        first = min(how.batch, self.budget)
        cells = first
        if how.explore == "cover":
            stride = 2 * how.spread if how.stride is None else how.stride
            wanted = (self.times[-1] - self.times[0]) / stride if stride else count
            cells = min(
                max(math.ceil(min(wanted, count)), first), max(math.floor(_GRID_OF_BUDGET * self.budget), first)
            )
        middles = self.times[0] + (np.arange(cells) + 0.5) * (self.times[-1] - self.times[0]) / cells
        after = np.searchsorted(self.times, middles).clip(1, max(count - 1, 1))
        nearest = np.minimum(after, count - 1)
        closer = middles - self.times[after - 1] <= self.times[nearest] - middles
        nearest = np.where(closer, after - 1, nearest)
        if how.explore == "percentile":
            return list(dict.fromkeys(nearest.tolist()))
        bits = max(cells - 1, 1).bit_length()
        order = sorted(range(cells), key=lambda cell: int(f"{cell:0{bits}b}"[::-1], 2))
        return list(dict.fromkeys(nearest[order].tolist()))

    def round(self, look: Look, verify: Look | None) -> None:
        """Draw, look, update."""
        frames = self._draw()
        targets = len(self.top)
        confidences = self._asked(look, frames, len(self.weights))
        best = self.best()
        wanted = [target for target in range(targets) if verify is None or best[target] is None]
        hopeful = (confidences[:, wanted] >= self.threshold).any(1)
        if verify is not None and hopeful.any():
            confidences[hopeful, :targets] = self._asked(verify, frames[hopeful], targets)
            self.verified += int(hopeful.sum())
        for target in wanted:
            top = int(confidences[:, target].argmax())
            value, frame = float(confidences[top, target]), int(frames[top])
            if (value, -frame) > (self.certain[target], -self.top[target]):
                self.top[target], self.certain[target] = frame, value
        self.seen[frames] = True
        self.score[frames] = (confidences * self.weights).max(1)
        self._estimate(frames)
        self.rounds += 1
        kept = self._choose()
        strong = frozenset(frame for frame in kept if self.score[frame] >= self.threshold)
        shown = strong or frozenset(kept)
        self.unchanged = self.unchanged + 1 if shown == self.shown and not self.grid else 0
        self.kept, self.shown = kept, shown

    def _asked(self, look: Look, frames: np.ndarray, clues: int) -> np.ndarray:
        """[frames, clues] float64 confidences."""
        found = look(frames.tolist())
        return check_scores(found, (len(frames), clues), "a look").double().numpy()

    def reason_to_stop(self) -> str | None:
        """Why nothing more is to be done, or None."""
        if self.how.stop == "verified" and None not in self.best():
            return "verified"
        if self.seen.sum() >= self.budget:
            return "budget"
        return "settled" if self.unchanged >= self.how.patience and not self._around() else None

    def best(self) -> list[int | None]:
        """Per target the frame that shows it best, where one reaches the threshold."""
        return [frame if value >= self.threshold else None for frame, value in zip(self.top, self.certain, strict=True)]

    def _draw(self) -> np.ndarray:
        """Numbers of the next frames to visit, ascending."""
        room = min(self.how.batch, self.budget - int(self.seen.sum()))
        share = room if not self.rounds else math.ceil(_GRID_OF_ROUND * room)
        self.grid = [frame for frame in self.grid if not self.seen[frame]]
        drawn, self.grid = self.grid[:share], self.grid[share:]
        if not self.grid and self.rounds:
            drawn += [frame for frame in self._around() if frame not in drawn][: room - len(drawn)]
        if len(drawn) < room:
            drawn += self._likely(room - len(drawn), drawn)
        return np.sort(np.array(drawn))

    def _around(self) -> list[int]:
        """The middles of the gaps on both sides of the kept frames and of every target's best, strongest first."""
        if self.how.explore == "percentile":
            return []
        bounds = np.concatenate([[-1], np.flatnonzero(self.seen), [len(self.times)]])
        middles: list[int] = []
        for frame in sorted({*self.kept, *self.top}, key=lambda frame: (-self.score[frame], frame)):
            place = int(np.searchsorted(bounds, frame))
            if bounds[place] == frame:
                neighbours = bounds[place - 1].item(), bounds[place + 1].item()
                middles += [(near + frame) // 2 for near in neighbours if abs(near - frame) > 1]
        return list(dict.fromkeys(middles))

    def _likely(self, wanted: int, taken: list[int]) -> list[int]:
        """Frames drawn without replacement by their chances, of those at or above the percentile."""
        free = ~self.seen
        free[taken] = False
        frames = np.flatnonzero(free)
        logits = self.expected / self.how.temperature
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        if self.how.explore == "percentile":
            chances += self.how.batch / len(chances)
        chances = chances[frames]
        upper = chances >= np.percentile(chances, self.how.percentile)
        if upper.sum() >= wanted:
            frames, chances = frames[upper], chances[upper]
        # The largest keys of log chance + Gumbel noise are a draw without replacement.
        keys = np.log(np.maximum(chances, 1e-300)) + self.random.gumbel(size=len(frames))
        return frames[np.argsort(-keys, kind="stable")[:wanted]].tolist()

    def _estimate(self, frames: np.ndarray) -> None:
        """Spread the upper quarter of the batch, and interpolate between all visited frames."""
        scores = self.score[frames]
        for frame in frames[scores >= np.percentile(scores, self.how.percentile)]:
            away = np.abs(self.times - self.times[frame])
            reached = away <= self.how.spread
            self.raised[reached] = np.maximum(self.raised[reached], self.score[frame] / (away[reached] + 1))
        visited = np.flatnonzero(self.seen)
        between = np.interp(self.times, self.times[visited], self.score[visited])
        self.expected = np.where(self.seen, self.score, np.maximum(between, self.raised))

    def _choose(self) -> list[int]:
        """The frames to keep of those visited: all candidates where no more are wanted."""
        if self.keep >= len(self.times):
            return list(range(len(self.times)))
        visited = np.flatnonzero(self.seen)
        times, scores = self.times[visited], self.score[visited]
        if scores.min() == scores.max():  # nothing tells them apart: frames from all over the video
            count = min(self.keep, len(visited))
            return visited[(2 * np.arange(count) + 1) * len(visited) // (2 * count)].tolist()
        values = scores * np.where(peaks(times, scores, self.how.spread), 1.0, _SHOULDER)
        sure = [frame for frame in self.best() if frame is not None]
        values[np.searchsorted(visited, sure)] += 1  # the best frame of every target before all others
        order = np.argsort(-values, kind="stable")
        return sorted(visited[spaced(times, order, self.keep, self.how.apart)].tolist())
