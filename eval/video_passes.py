"""Sparse video attention timed against the fastest dense one: kernels, whole calls, break-even, and steps of models.

No kernel and no call is timed before sampled rows of it equal exact ones in float32. The baseline is the fastest of
torch's back ends on the same tensors, without a mask; what a sparse call costs is everything from the queries to the
output, with clustering shared by the steps as the method shares it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vlm_budget
from vlm_budget import ops
from vlm_budget.errors import MissingExtraError
from vlm_budget.ops.block_sparse_attention import Backend
from vlm_budget.registry import VIDEO_METHODS
from vlm_budget.triton_kernels.block_sparse_attention import block_sparse_attention_triton, tile_of
from vlm_budget.triton_kernels.tile_list import tile_list_triton
from vlm_budget.video.dit.attend import attend, layout, pairs
from vlm_budget.video.dit.break_even import measure
from vlm_budget.video.dit.method import SparseAttention

from .device import Deadline, Stopwatch, drain, repetitions, spread
from .op_work import TOLERANCE, difference
from .steps import NotEnoughError, Record
from .video_calls import BACKENDS, STEPS, Run, amortised, only
from .video_configs import WAYS, launched
from .video_models import FAMILIES, LATENTS, Transformer, build, timed_forwards, unmasked
from .video_ops import DENSITY, attention, block_means_of
from .video_shapes import SHAPES, TILE, Kind, Shape, attended_rows, cut, cut_rows, exact_rows, planted, sampled

TILES = {"real": TILE, "tiny": 16}
CUTS: tuple[tuple[Kind, bool, bool], ...] = tuple(
    (kind, fixed, corrected)
    for fixed in (False, True)
    for corrected in (False, True)
    for kind in ("clustered", "random")
)
"""Maps, blocks of one size or of many, and whether dropped blocks count by their means."""
SHIPPED, FIXED = "as shipped", "fixed blocks"
CALLS: dict[str, dict[str, Any]] = {
    SHIPPED: {},
    "without correction": {"correction": False},
    FIXED: {"cut": "fixed"},
    "clusters anew in every step": {"reuse": 1},
    "clusters of an eighth of the tokens": {"sample": 0.125},
}
"""Options of SVG2 beside its density."""
LEAST = 3
"""Timed repetitions of what takes longest."""
LENGTHS = {"real": (4_096, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536), "tiny": (384, 768)}
FORWARD_SECONDS = 20.0
"""What forwards of one way to run a model may take together, the first and one round of clusterings apart."""


class VideoBench:
    """Measures sparse video attention, a step at a time.

    Args:
        size: ``"real"`` or ``"tiny"``.
        dtype: Of queries, keys and values.
        watch: The device.
        record: What to write to.
        deadline: When to stop.
    """

    def __init__(self, size: str, dtype: torch.dtype, watch: Stopwatch, record: Record, deadline: Deadline) -> None:
        self.size, self.dtype, self.watch, self.record, self.deadline = size, dtype, watch, record, deadline
        self.device = watch.device
        self.kernels: ops.Mode = "triton" if watch.cuda else "reference"
        self._held: tuple[Shape, tuple[torch.Tensor, ...]] | None = None
        self._model: Transformer | None = None

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Names and actions, the most important first."""
        shapes = SHAPES[self.size]
        for shape in shapes:
            yield f"dense, {shape.name}", partial(self.dense, shape, False)
            yield self._cut_name(shape, *CUTS[0]), partial(self.sparse, shape, *CUTS[0])
            yield f"call, {shape.name}: {SHIPPED}", partial(self.call, shape, SHIPPED)
        for shape in shapes:
            for entry in CUTS[1:]:
                yield self._cut_name(shape, *entry), partial(self.sparse, shape, *entry)
        yield "break-even", self.break_even
        for family in FAMILIES:
            for video in LATENTS[family]:
                name = f"{family}, {video}"
                yield f"{name}: dense", partial(self.forward, family, video, False)
                yield f"{name}: svg2", partial(self.forward, family, video, True)
        for way in WAYS:
            tma, rows, keys = way
            name = f"configurations, {shapes[0].name}: {rows} x {keys}{', descriptors' * tma}"
            yield name, partial(self.configurations, shapes[0], way)
        for shape in shapes:
            last = CUTS[-1]
            yield f"{self._cut_name(shape, *last)}, by FlashAttention-4", partial(self.sparse, shape, *last, "fa4")
        for shape in shapes:
            for what in CALLS:
                if what != SHIPPED:
                    yield f"call, {shape.name}: {what}", partial(self.call, shape, what)
        for shape in shapes:
            if shape.text:
                yield f"dense, {shape.name}, with a mask", partial(self.dense, shape, True)

    @staticmethod
    def _cut_name(shape: Shape, kind: Kind, fixed: bool, corrected: bool) -> str:
        size, means = "fixed" if fixed else "uneven", "corrected" if corrected else "plain"
        return f"kernel, {shape.name}: {kind} map, {size} blocks, {means}"

    def clear(self) -> None:
        """Forget tensors and models."""
        self._held = self._model = None

    # --- dense -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dense(self, shape: Shape, masked: bool) -> None:
        """Every back end of torch's attention, with a mask of padding that masks nothing or without."""
        tensors, rows = self._inputs(shape), sampled(shape.length, self.device)
        wanted = exact_rows(*tensors, rows, shape.scale)[0]
        mask = torch.ones(1, 1, 1, shape.length, dtype=torch.bool, device=self.device) if masked else None
        for name, backend in BACKENDS.items():
            row: dict[str, Any] = {"shape": shape.name, "backend": name, "masked": masked, "ms": None}
            try:
                with only(backend):
                    call = partial(scaled_dot_product_attention, *tensors, attn_mask=mask)
                    row["difference"] = difference(call()[0][:, rows].float(), wanted, TOLERANCE[self.dtype])
                    row["ms"] = self._timed(call)
            except torch.OutOfMemoryError:
                row["why"] = "out of memory"
            except RuntimeError as error:  # what torch raises of a back end that cannot run these tensors
                if type(error).__name__ == "AcceleratorError":  # torch 2.8 and later: nothing runs after it
                    raise
                row["why"] = str(error).split("\n")[0][:200]
            else:
                row["flops_per_second"] = shape.flops / row["ms"]["median"] * 1000
            self._add("dense", row, "shape", "backend", "masked")

    def best(self, shape: Shape, masked: bool = False) -> tuple[str, float]:
        """The fastest back end and its milliseconds.

        Raises:
            NotEnoughError: None was timed.
        """
        timed = [
            (row["ms"]["median"], row["backend"])
            for row in self.record.data["dense"]
            if row["shape"] == shape.name and row["masked"] == masked and row["ms"]
        ]
        if not timed:
            raise NotEnoughError(f"dense attention of {shape.name} was not measured")
        ms, name = min(timed)
        return name, ms

    # --- the kernel alone ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sparse(self, shape: Shape, kind: Kind, fixed: bool, corrected: bool, backend: Backend = "auto") -> None:
        """Block-sparse attention alone, on tokens that are in order already."""
        dense, dense_ms = self.best(shape)
        tensors, tile = self._inputs(shape), TILES[self.size] if fixed else None
        blocks = cut(shape, kind, tile, DENSITY, self.device)
        means = block_means_of(*tensors[1:], blocks) if corrected else None
        call = attention(*tensors, blocks, shape.scale, means, backend)
        rows = sampled(shape.length, self.device)
        with ops.use(self.kernels):
            try:
                result, workspace = self._workspace(call)
            except MissingExtraError as error:
                raise NotEnoughError(str(error).split(",")[0]) from None
            apart = self._apart(result, rows, cut_rows(tensors, blocks, means, rows, shape.scale))
            ms = self._timed(call)
        share = blocks.pairs(corrected)
        row = {
            "shape": shape.name,
            "map": kind,
            "tile": tile,
            "corrected": corrected,
            "backend": backend,
            "pairs": share,
            "difference": apart,
            "ms": ms,
            "dense": dense,
            "dense_ms": dense_ms,
            "share_of_ideal": share * dense_ms / ms["median"],
            "flops_per_second": share * shape.flops / ms["median"] * 1000,
            "workspace_bytes": workspace,
        }
        self._add("kernel", row, "shape", "map", "tile", "corrected", "backend")

    @torch.no_grad()
    def configurations(self, shape: Shape, way: tuple[bool, int, int]) -> None:
        """Ways to launch the kernel, on blocks and a map as they ship."""
        if self.kernels == "reference":
            raise NotEnoughError("references have no configurations")
        tensors, rows = self._inputs(shape), sampled(shape.length, self.device)
        blocks = cut(shape, "clustered", None, DENSITY, self.device)
        means = block_means_of(*tensors[1:], blocks)
        wanted = cut_rows(tensors, blocks, means, rows, shape.scale)
        given = (*tensors, blocks.query_sizes, blocks.key_sizes, blocks.kept, shape.scale, *means)

        def time(call: Callable[[], Any]) -> dict[str, Any]:
            return {"difference": self._apart(call(), rows, wanted), "ms": self._timed(call)}

        for row in launched(partial(block_sparse_attention_triton, *given), self.dtype, way, time):
            self._add("configurations", {"shape": shape.name, **row}, "shape", "tma", "rows", "keys", "warps", "stages")

    # --- whole calls -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def call(self, shape: Shape, what: str) -> None:
        """SVG2 from queries to output, over the steps of a run, and where its time goes.

        The overhead is all but the attention itself: clustering, maps, permutations, and the lists of tiles.
        """
        backend, dense_ms = self.best(shape)
        size = {"block_size": TILES[self.size]} if what == FIXED else {}
        tensors, method = self._inputs(shape), self._method(shape, {**CALLS[what], **size})
        run = Run(method, shape, tensors)
        with ops.use(self.kernels):
            judged = self._judged(run, shape)
            rounds = [run.timed() for _ in range(LEAST)]
            parts = run.parts()
        first, steps = (statistics.median(each[place] for each in rounds) for place in (0, 1))
        shared = partial(amortised, sparse_steps=STEPS - run.dense_steps)
        ms, kernel = shared(first, steps), shared(*parts["block_sparse_attention"])
        listing = self._listing(run)
        overhead = ms - kernel + (listing or 0.0)
        row = {
            "shape": shape.name,
            "what": what,
            "method": str(method),
            **judged,
            "first_ms": first,
            "step_ms": steps,
            "ms": ms,
            "dense": backend,
            "dense_ms": dense_ms,
            "speedup": dense_ms / ms,
            "speedup_of_a_step": dense_ms / steps,
            "kernel_ms": kernel,
            "tile_list_ms": listing,
            "overhead_ms": overhead,
            "overhead_of_dense": overhead / dense_ms,
            "parts_ms": {name: shared(*times) for name, times in parts.items()},
        }
        self._add("calls", row, "shape", "what")

    def _judged(self, run: Run, shape: Shape) -> dict[str, Any]:
        """Whether rows of a call are right, how far they are from dense ones, and what the call computes."""
        call = run.at(0, {})
        rows = sampled(shape.length, self.device)
        blocks = run.method.blocks(call)
        result, memory = self._workspace(lambda: attend(call, blocks))
        wanted = attended_rows(call, blocks, rows)
        apart = self._apart(result, rows, wanted)
        dense = exact_rows(*run.tensors, rows, shape.scale)[0]
        return {
            "difference": apart,
            "pairs": float(pairs(call, blocks)),
            "output_error": float((wanted[0] - dense).norm() / dense.norm()),
            "memory_bytes": memory,
        }

    def _listing(self, run: Run) -> float | None:
        """Milliseconds of the kernel's lists of tiles, which are a part of the attention operation."""
        if self.kernels == "reference":
            return None
        call = run.at(0, {})
        full = layout(call, run.method.blocks(call))
        keys = tile_of(self.dtype, run.shape.head_dim)[1]
        return self._timed(partial(tile_list_triton, full.key_sizes, full.kept, run.shape.length, keys))["median"]

    def _method(self, shape: Shape, options: dict[str, Any]) -> SparseAttention:
        make = VIDEO_METHODS.get("svg2")
        known = {field.name for field in fields(make)}
        if lacking := sorted(set(options) - known):
            raise NotEnoughError(f"svg2 has no option {', '.join(lacking)}")
        queries, keys = shape.clusters
        given = {"density": DENSITY, "query_clusters": queries, "key_clusters": keys, **options}
        return cast(SparseAttention, make(**given))

    # --- break-even, models ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def break_even(self) -> None:
        """From which length on a sparse call is faster than a dense one."""
        shape = SHAPES[self.size][0]
        with ops.use(self.kernels):
            found = measure(shape.heads, shape.head_dim, DENSITY, self.device, self.dtype, lengths=LENGTHS[self.size])
        timings = [{**vars(timing), "speedup": timing.speedup} for timing in found.timings]
        self.record.save(break_even={"tokens": found.tokens, "density": DENSITY, "timings": timings})

    @torch.no_grad()
    def forward(self, family: str, video: str, sparse: bool) -> None:
        """One step of a whole transformer: dense without its mask on the fastest back end, or patched."""
        model = self._transformer(family)
        kept = [backend for backend, _ in sorted(self._ranked().items(), key=lambda item: item[1])]
        order = [BACKENDS[name] for name in (*kept, *(name for name in BACKENDS if name not in kept))]
        forwards = partial(timed_forwards, model, video, self.watch, min(FORWARD_SECONDS, self.deadline.left))
        options: dict[str, Any] = {
            "density": DENSITY,
            "warmup": 0.0,
            "dense_layers": 0.0,
            "force": True,
            "timesteps": STEPS,
        }
        row: dict[str, Any] = {"family": family, "video": video, "tokens": model.tokens(video), **model.facts}
        if self.watch.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with ops.use(self.kernels), sdpa_kernel(order, set_priority=True):
            if sparse:
                handle: Any  # patch says of VLMs alone what it returns
                with vlm_budget.patch(model.model, "svg2", **options) as handle:
                    row |= forwards(getattr(handle.method, "reuse", 1))
                    row["density"] = handle.report().density
            else:
                with unmasked():
                    row |= forwards()
                row["backend"] = kept[0] if kept else None
        peak = torch.cuda.max_memory_allocated(self.device) - self.watch.own_bytes if self.watch.cuda else None
        self._add("models", {**row, "way": "svg2" if sparse else "dense", "peak_bytes": peak}, "family", "video", "way")

    def _ranked(self) -> dict[str, float]:
        """Milliseconds of the back ends on the first shape that was timed."""
        rows = [row for row in self.record.data["dense"] if row["ms"] and not row["masked"]]
        return {row["backend"]: row["ms"]["median"] for row in rows if row["shape"] == rows[0]["shape"]}

    def _transformer(self, family: str) -> Transformer:
        if self._model is None or self._model.family != family:
            self.clear()
            if self.watch.cuda:
                torch.cuda.empty_cache()
            try:
                self._model = build(family, self.size, self.device, self.dtype)
            except MissingExtraError as error:
                raise NotEnoughError(str(error).split(":")[0]) from None
        return self._model

    # --- tools -----------------------------------------------------------------------------------------------------

    def _inputs(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of the shape at hand are kept."""
        if self._held is None or self._held[0] != shape:
            self.clear()
            self._held = shape, planted(shape, self.device, self.dtype)
        query, key, value = self._held[1]
        return query, key, value

    def _apart(
        self,
        result: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
    ) -> float:
        """How far some rows of the first sample are from exact ones; raises where that is too far."""
        out, lse = result
        return difference((out[0][:, rows].float(), lse[0][:, rows]), wanted, TOLERANCE[self.dtype])

    def _timed(self, call: Callable[[], Any]) -> dict[str, float]:
        cost = self.watch.wall(call)[0]
        return spread(self.watch.cold([call], max(LEAST, repetitions(cost)), warmups=0))

    def _workspace(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """The result of a second call, and the most memory it took beyond what it gives."""
        call()
        drain(self.device)
        if not self.watch.cuda:
            return call(), None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        peak = torch.cuda.max_memory_allocated(self.device)
        return result, peak - before - sum(tensor.numel() * tensor.element_size() for tensor in result)

    def _add(self, kind: str, row: dict[str, Any], *key: str) -> None:
        """Write a row, in place of an earlier one of the same key."""
        others = [each for each in self.record.data[kind] if any(each[name] != row[name] for name in key)]
        self.record.save(**{kind: [*others, row]})


EMPTY: dict[str, Any] = {"dense": [], "kernel": [], "calls": [], "break_even": None, "models": [], "configurations": []}
"""What a record of these steps holds at first."""
