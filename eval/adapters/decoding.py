"""How answers are written: where they end, and how the next token is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WINDOW = 16  # tokens from the end in which a stop string is looked for, beside one per letter


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Attributes:
        max_new_tokens: Longest answer.
        until: Texts that end it; they are not part of it.
        sampling: Arguments of ``generate`` for anything but greedy decoding.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()


def sampling(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What ``generate`` is told for a harness's decoding arguments; nothing for greedy decoding.

    Args:
        arguments: ``do_sample``, ``temperature``, ``top_p``, ``top_k``, ``num_beams``, ``repetition_penalty``. A
            temperature of 0 is greedy decoding, as harnesses have it.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    heat = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
    draws = heat > 0 and bool(given.get("do_sample", True))
    found = {name: given[name] for name in ("num_beams", "repetition_penalty") if given.get(name, 1) != 1}
    if draws:
        found |= {"do_sample": True, "temperature": heat}
        found |= {name: given[name] for name in ("top_p", "top_k") if name in given}
    return tuple(sorted(found.items()))


class Until:
    """Stops a row once its text holds one of some strings.

    Args:
        tokenizer: Turns tokens into text.
        until: The strings.
        start: Length of the prompt.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, tuple(until), start
        self.window = _WINDOW + max(map(len, until))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows of tokens ``[B, L]`` are done, ``[B]``."""
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class Force:
    """Makes every row write its own tokens, and a filler behind them.

    Args:
        tokens: Per row.
        start: Length of the prompt.
        filler: A token.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], start: int, filler: int) -> None:
        self.tokens, self.start, self.filler = tokens, start, filler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, V]`` that leave one token per row of tokens ``[B, L]``."""
        step = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.tokens):
            forced[row, tokens[step] if step < len(tokens) else self.filler] = 0.0
        return forced


def criteria(one: Any) -> Any:
    """A stopping criterion as ``generate`` takes it."""
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([one])


def processors(one: Any) -> Any:
    """A logits processor as ``generate`` takes it."""
    from transformers import LogitsProcessorList

    return LogitsProcessorList([one])


def filler(tokenizer: Any) -> int:
    """A token for the place behind an answer."""
    found = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    return int(found)


def cut(text: str, until: Sequence[str]) -> str:
    """Text up to the first stop string."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


def written(new: torch.Tensor, config: Any, tokenizer: Any) -> int:
    """How many tokens ``[B, L]`` were written: each row's to its end token, without what fills it up."""
    end = config.eos_token_id
    ends = torch.tensor([end] if isinstance(end, int) else list(end or []), device=new.device, dtype=new.dtype)
    ended = torch.isin(new, ends).long()
    counts = ended.cumsum(1) == ended
    if tokenizer.pad_token_id is not None:
        counts &= (new != tokenizer.pad_token_id) | ended.bool()
    return int(counts.sum())
