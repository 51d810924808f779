"""Cosine similarities of tokens, for the operations that choose tokens one by one."""

from __future__ import annotations

from functools import cached_property

import torch

from vlm_budget.errors import KernelInputError

from ._launch import FLOATS, require_dtype, require_int32, require_rows, require_shape

WHOLE_UP_TO = 2**27
"""Similarities that are kept at once (512 MiB in float32, 11,585 tokens)."""


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Rows of length one, in float32 or wider; zeros stay zeros, and so do rows that hold no finite numbers."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1).nan_to_num(0.0)


class CosineRows:
    """The cosine similarities of n tokens, row by row: kept whole where they fit, else made when asked for.

    Args:
        features: [n, C].
        whole_up_to: The most similarities to keep.
    """

    def __init__(self, features: torch.Tensor, whole_up_to: int = WHOLE_UP_TO) -> None:
        self.features = features
        self.size = len(features)
        self.fits = self.size**2 <= whole_up_to
        self._chunk = max(1, whole_up_to // max(self.size, 1))

    @cached_property
    def unit(self) -> torch.Tensor:
        """[n, C] features of length one."""
        return unit_rows(self.features)

    @cached_property
    def whole(self) -> torch.Tensor | None:
        """[n, n] similarities where they fit."""
        return self.unit @ self.unit.T if self.fits else None

    def row(self, index: torch.Tensor) -> torch.Tensor:
        """[1, n] similarities of the token at ``index`` ([1] int64) to all."""
        if self.whole is not None:
            return self.whole.index_select(0, index)
        return self.unit.index_select(0, index) @ self.unit.T

    def nearest(self) -> torch.Tensor:
        """[n] distance ``1 - cos`` of every token to the nearest other one; infinite for an only token."""
        found = []
        for start in range(0, self.size, self._chunk):
            stop = min(start + self._chunk, self.size)
            rows = (self.unit[start:stop] @ self.unit.T if self.whole is None else self.whole[start:stop]).clone()
            rows.diagonal(start).fill_(float("-inf"))
            found.append(1 - rows.amax(1))
        return torch.cat(found)


def inner_products(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[G, n, n] float32 products of rows, and [G, n] what makes them cosines; None where they already are.

    Features of 16 bits are multiplied as they are: on tensor cores, their products are exact in float32 and are summed
    there. Group by group, so that a batch equals its groups.
    """
    if features.dtype == torch.float32:
        unit = unit_rows(features)
        return _stacked([each @ each.T for each in unit]), None
    if features.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8 and later
        found = _stacked([torch.mm(each, each.T, out_dtype=torch.float32) for each in features])
    else:
        found = _stacked([each @ each.T for each in features.float()])
    # The bound is that of torch's normalize; an infinite length makes 0 on its own.
    squared = found.diagonal(dim1=-2, dim2=-1).clamp_min(1e-24)
    return found, squared.rsqrt_().nan_to_num_(0.0)


def _stacked(tables: list[torch.Tensor]) -> torch.Tensor:
    return tables[0][None] if len(tables) == 1 else torch.stack(tables)


def require_groups(name: str, tensor: torch.Tensor) -> None:
    """Refuse what is not [G, n, C] of floating point, contiguous along the last dimension.

    Raises:
        KernelInputError: It is not.
    """
    require_dtype(FLOATS, **{name: tensor})
    require_rows(**{name: tensor})
    require_shape((None, None, None), **{name: tensor})


def require_choices(groups: int, n: int, k: int) -> None:
    """Refuse to choose more than there are, and sizes that 32 bits cannot hold.

    Raises:
        KernelInputError: They are such.
    """
    require_int32(groups=groups, tokens=groups * n, k=k)
    if k > n:
        raise KernelInputError(f"cannot choose {k} of {n} tokens")
