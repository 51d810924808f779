"""Measures how long a model's language model takes for prompts of several lengths, and fits a model of it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .engine.clock import Interval
from .errors import LatencyError, PatchError
from .latency import Latency, Setting, prepared

_SHORTEST = 16
_STEPS = 5


def calibrate(
    model: Any, *, longest: int = 4096, repeats: int = 3, progress: Callable[[int, int], None] | None = None
) -> Latency:
    """Measure the language model on its own device, number format and attention backend, and keep the result.

    Prompts of random embeddings, of ``longest`` tokens and halves thereof, run ``repeats`` times in turn after a
    warm-up round. The model is left as it was: training mode, random state, hooks and weights. Takes about ten times as
    long as one prompt of ``longest`` tokens.

    Args:
        model: What :func:`vlm_budget.patch` takes, not patched.
        longest: Longest prompt in tokens, text and visual; at most what the language model has positions for.
        repeats: Measured rounds.
        progress: Told how many of how many runs are done.

    Returns:
        The fitted model; ``patch(model, method, "80 ms")`` finds it on this machine from now on.

    Raises:
        UnsupportedModelError: No family knows the model.
        PatchError: The model is patched.
        LatencyError: ``longest`` or ``repeats`` cannot be used, a prompt does not fit into memory, or the result
            cannot be kept.
    """
    from .models import find_family
    from .patching import _HANDLE

    for name, value, least in (("longest", longest, 4 * _SHORTEST), ("repeats", repeats, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LatencyError(f"{name} must be a whole number of at least {least}, got {value!r}")
    _, base, family = find_family(model)
    if _HANDLE in base.__dict__:
        raise PatchError("calibrate() measures the unpatched model, and this one is patched. Call handle.undo() first.")
    setting = Setting.of(base, family)
    prepared(setting.file)  # before the work, not after
    decoder = family.language_model(base)
    lengths = _lengths(min(longest, _positions(decoder)))
    with _undisturbed(decoder):
        prefill, step = _measure(decoder, lengths, repeats, progress or (lambda done, total: None))
    latency = fit(prefill, step, len(decoder.layers))  # type: ignore[arg-type]
    latency.save(setting)
    return latency


def _positions(decoder: Any) -> int:
    return int(getattr(decoder.config, "max_position_embeddings", None) or 2**31)


def _lengths(longest: int) -> list[int]:
    """``longest`` and its halves, ascending."""
    found = [longest]
    while found[-1] >= 2 * _SHORTEST:
        found.append(found[-1] // 2)
    return found[::-1]


@contextmanager
def _undisturbed(decoder: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and everything as it was afterwards."""
    modes = {module: module.training for module in decoder.modules()}
    device = next(decoder.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        decoder.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _measure(
    decoder: Any, lengths: Sequence[int], repeats: int, progress: Callable[[int, int], None]
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Medians of prompts and of decoding steps, as ``(tokens, ms)``."""
    width, device = decoder.config.hidden_size, next(decoder.parameters()).device
    noise = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, lengths[-1], width, generator=noise).to(device, decoder.dtype)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    steps: dict[int, list[float]] = {lengths[0]: [], lengths[-1]: []}
    total, done = (repeats + 1) * len(lengths), itertools.count(1)
    # Round by round: a machine that gets slower for a while then slows all lengths alike.
    for turn in range(repeats + 1):
        for length in lengths:
            ms, cache = _run(decoder, embeds[:, :length], None)
            if turn:  # the first round warms up
                times[length].append(ms)
            if turn == repeats and length in steps:
                for _ in range(1 + _STEPS):
                    ms, cache = _run(decoder, embeds[:, :1], cache)
                    steps[length].append(ms)
                steps[length].pop(0)
            progress(next(done), total)
    return _medians(times), _medians(steps)


def _medians(times: dict[int, list[float]]) -> list[tuple[int, float]]:
    return [(length, statistics.median(values)) for length, values in times.items()]


def _run(decoder: Any, embeds: torch.Tensor, cache: Any) -> tuple[float, Any]:
    """Milliseconds of one call, and the cache it leaves."""
    new, past = embeds.shape[1], 0 if cache is None else int(cache.get_seq_length())
    mask = torch.ones(1, past + new, dtype=torch.long, device=embeds.device)
    places = torch.arange(past, past + new, device=embeds.device)[None]
    if embeds.device.type == "cuda":
        torch.cuda.synchronize(embeds.device)
    try:
        interval = Interval(embeds.device)
        output = decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        )
        return interval.stop().ms, output.past_key_values
    except torch.OutOfMemoryError as error:
        raise LatencyError(
            f"a prompt of {past + new} tokens does not fit into the memory of {embeds.device}: {error}. Pass a smaller "
            "longest=."
        ) from error


def fit(prefill: Sequence[tuple[int, float]], step: Sequence[tuple[int, float]], layers: int) -> Latency:
    """The best non-negative model of measured times, by relative error.

    Non-negative coefficients make the model grow with every token, so that a budget has one answer. All subsets of the
    terms are solved, which for so few is exact non-negative least squares.

    Args:
        prefill: ``(tokens, ms)`` of prompts, lengths ascending.
        step: ``(cached tokens, ms)`` of decoding steps at a short and a long cache.
        layers: Decoder layers, among which the prompt's time is shared.
    """
    lengths = torch.tensor([n for n, _ in prefill], dtype=torch.double)
    times = torch.tensor([ms for _, ms in prefill], dtype=torch.double)
    best: tuple[float, list[float], int] | None = None
    for bend in (0, *(n for n, _ in prefill[1:-1])):
        terms = torch.stack([lengths**0, lengths, lengths**2, (lengths - bend).clamp_min(0)], 1)
        allowed = range(3) if bend == 0 else range(4)  # without a bend the last term is the second again
        for size in range(1, len(allowed) + 1):
            for chosen in itertools.combinations(allowed, size):
                weights = _solve(terms[:, list(chosen)] / times[:, None])
                if weights is None:
                    continue
                error = float((terms[:, list(chosen)] @ weights / times - 1).square().sum())
                if best is None or error < best[0] * (1 - 1e-9):
                    full = [0.0] * 4
                    for place, weight in zip(chosen, weights.tolist(), strict=True):
                        full[place] = weight
                    best = error, full, bend
    assert best is not None, "a constant always fits somehow"
    (fixed, token, pair, knee), bend = best[1], best[2]
    (short, short_ms), (long, long_ms) = step[0], step[-1]
    slope = max(0.0, (long_ms - short_ms) / (long - short))
    found = Latency(
        fixed_ms=fixed,
        token_ms=token / layers,
        pair_ms=pair / layers,
        knee_ms=knee / layers,
        bend=bend,
        step_ms=max(0.0, short_ms - slope * short),
        step_token_ms=slope,
        longest=prefill[-1][0],
        worst=0.0,
        samples=tuple(prefill),
    )
    worst = max(abs(found.prefill_ms([n] * layers) / ms - 1) for n, ms in prefill)
    return Latency(**{**found.__dict__, "worst": worst})


def _solve(terms: torch.Tensor) -> torch.Tensor | None:
    """Least squares against ones; None where a weight is negative."""
    scale = terms.norm(dim=0)
    weights: torch.Tensor = torch.linalg.lstsq(terms / scale, torch.ones(len(terms), 1, dtype=terms.dtype)).solution
    weights = weights.flatten() / scale
    return weights if bool((weights >= 0).all()) else None
