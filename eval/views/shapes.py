"""Solids that rays are cast at, and the eight kinds of things built from them.

Lengths are metres in the thing's own frame: the origin lies on the floor under its middle, z points up. Every
kind looks much the same from all sides, so that its outline tells it from the others in any view.

A caster takes the rays' common origin ``[3]`` and their directions ``[n, 3]`` (of any length) and returns the
ray parameter of the first hit, ``[n]`` (inf where the ray passes by), with the outward normals, ``[n, 3]``. An
origin inside a solid is not provided for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Hit = tuple[np.ndarray, np.ndarray]
_TINY = 1e-12


def _safe(value: np.ndarray) -> np.ndarray:
    """``value`` with zeros moved away from zero, as a divisor."""
    return np.where(np.abs(value) < _TINY, _TINY, value)


@dataclass(frozen=True)
class Ball:
    """Sphere of ``radius`` about ``(0, 0, height)``."""

    height: float
    radius: float

    def cast(self, origin: np.ndarray, rays: np.ndarray) -> Hit:
        """First hits and their normals."""
        start = origin - (0, 0, self.height)
        a, b = np.einsum("nd,nd->n", rays, rays), rays @ start
        disc = b * b - a * (start @ start - self.radius**2)
        t = (-b - np.sqrt(np.maximum(disc, 0))) / a
        t = np.where((disc > 0) & (t > 0), t, np.inf)
        at = start + np.where(np.isfinite(t), t, 0)[:, None] * rays
        return t, at / self.radius


@dataclass(frozen=True)
class Box:
    """Box with sides along the axes, between the corners ``low`` and ``high``."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def cast(self, origin: np.ndarray, rays: np.ndarray) -> Hit:
        """First hits and their normals."""
        inverse = 1 / _safe(rays)
        one, two = (self.low - origin) * inverse, (self.high - origin) * inverse
        enter = np.minimum(one, two)
        axis = enter.argmax(1)
        near, far = enter.max(1), np.maximum(one, two).min(1)
        t = np.where((near < far) & (near > 0), near, np.inf)
        rows = np.arange(len(rays))
        normal = np.zeros_like(rays)
        normal[rows, axis] = -np.sign(rays[rows, axis])
        return t, normal


@dataclass(frozen=True)
class Drum:
    """Upright cylinder of ``radius`` between the heights ``low`` and ``high``."""

    low: float
    high: float
    radius: float

    def cast(self, origin: np.ndarray, rays: np.ndarray) -> Hit:
        """First hits and their normals."""
        a = _safe(rays[:, 0] ** 2 + rays[:, 1] ** 2)
        b = rays[:, :2] @ origin[:2]
        disc = b * b - a * (origin[:2] @ origin[:2] - self.radius**2)
        root = np.sqrt(np.maximum(disc, 0))
        inverse = 1 / _safe(rays[:, 2])
        one, two = (self.low - origin[2]) * inverse, (self.high - origin[2]) * inverse
        side, cap = (-b - root) / a, np.minimum(one, two)
        near, far = np.maximum(side, cap), np.minimum((-b + root) / a, np.maximum(one, two))
        t = np.where((disc > 0) & (near < far) & (near > 0), near, np.inf)
        at = origin + np.where(np.isfinite(t), t, 0)[:, None] * rays
        normal = at / self.radius
        normal[:, 2] = 0
        flat = cap > side
        normal[flat] = 0
        normal[flat, 2] = -np.sign(rays[flat, 2])
        return t, normal


@dataclass(frozen=True)
class Cone:
    """Upright cone: base of ``radius`` at height 0, tip at ``height``."""

    height: float
    radius: float

    def cast(self, origin: np.ndarray, rays: np.ndarray) -> Hit:
        """First hits and their normals."""
        slope = self.radius / self.height
        scale = np.array([1, 1, -(slope**2)])
        start = origin - (0, 0, self.height)
        a, b, c = _safe((rays * rays) @ scale), rays @ (scale * start), (start * start) @ scale
        disc = b * b - a * c
        root = np.sqrt(np.maximum(disc, 0))
        roots = np.stack([(-b - root) / a, (-b + root) / a])
        heights = origin[2] + roots * rays[:, 2]
        inside = (disc > 0) & (heights > 0) & (heights < self.height) & (roots > 0)
        side = np.where(inside, roots, np.inf).min(0)
        base = -origin[2] / _safe(rays[:, 2])
        at = origin[:2] + base[:, None] * rays[:, :2]
        base = np.where(((at * at).sum(1) < self.radius**2) & (base > 0), base, np.inf)
        t = np.minimum(side, base)
        normal = (start + np.where(np.isfinite(t), t, 0)[:, None] * rays) * scale
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), _TINY)
        normal[base < side] = (0, 0, -1)
        return t, normal


Solid = Ball | Box | Drum | Cone


def _upright(half: float, low: float, high: float) -> Box:
    return Box((-half, -half, low), (half, half, high))


def _table() -> tuple[Solid, ...]:
    at, half, under = 0.2, 0.045, 0.42
    legs = (Box((x - half, y - half, 0), (x + half, y + half, under)) for x in (-at, at) for y in (-at, at))
    return (_upright(0.28, under, 0.54), *legs)


def _cross() -> tuple[Solid, ...]:
    low, high, arm = 0.25, 0.43, 0.33
    return (
        _upright(0.09, 0, 0.7),
        Box((-arm, -0.09, low), (arm, 0.09, high)),
        Box((-0.09, -arm, low), (0.09, arm, high)),
    )


SHAPES: dict[str, tuple[Solid, ...]] = {
    "ball": (Ball(0.27, 0.27),),
    "cube": (_upright(0.23, 0, 0.46),),
    "cone": (Cone(0.62, 0.3),),
    "pole": (Drum(0, 0.9, 0.085),),
    "plate": (Drum(0, 0.1, 0.36),),
    "cross": _cross(),
    "table": _table(),
    "lamp": (Drum(0, 0.5, 0.05), Ball(0.6, 0.2)),
}
"""The solids of every kind at size 1."""

MEASURES = {
    "ball": (0.54, 0.27),
    "cube": (0.46, 0.326),
    "cone": (0.62, 0.3),
    "pole": (0.9, 0.085),
    "plate": (0.1, 0.36),
    "cross": (0.7, 0.343),
    "table": (0.54, 0.396),
    "lamp": (0.8, 0.2),
}
"""Height, and radius about the upright axis, of every kind at size 1: what bounds its solids."""
