"""Calibration data: prompts with pictures, and their answers where they are labelled.

Whatever is wrong with the data is said before a model runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibrationError, VLMBudgetError
from ..layout import VisualLayout
from ..models import find_family, layout_of

_NAMED = 3  # faulty examples that a message names


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt.

    Attributes:
        inputs: What the processor returned for it: a batch of one, without padding.
        answer: [k] token ids of its label; empty without one.
        layout: Where its visual tokens are.
    """

    inputs: Mapping[str, torch.Tensor]
    answer: tuple[int, ...]
    layout: VisualLayout

    @property
    def visual(self) -> int:
        """Visual tokens of the prompt."""
        return sum(self.layout.row_sizes()[0])

    @property
    def text(self) -> int:
        """All other tokens of the prompt."""
        return int(self.inputs["input_ids"].numel()) - self.visual


@dataclass(frozen=True, eq=False)
class Calibration:
    """The prompts that schedules are judged on."""

    examples: tuple[Example, ...]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all inputs and answers; order counts."""
        digest = hashlib.sha256()
        for example in self.examples:
            for name in sorted(example.inputs):
                value = example.inputs[name].detach().cpu().contiguous()
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
            digest.update(f"answer {list(example.answer)}".encode())
        return digest.hexdigest()

    @property
    def tokens(self) -> list[int]:
        """Visual tokens of every prompt."""
        return [example.visual for example in self.examples]


def prepare(
    model: Any,
    data: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    labelled: bool = False,
    max_spread: float = 4.0,
) -> Calibration:
    """Check calibration data against a model, without running it.

    Args:
        model: The model that will be judged.
        data: One mapping per prompt: the processor's tensors (a batch of one, without padding), and ``"answer"`` as
            text or token ids where there is a label.
        tokenizer: Reads answers given as text.
        labelled: The metric needs an answer for every prompt.
        max_spread: How many times more visual tokens the largest prompt may have than the smallest.

    Raises:
        CalibrationError: No data, a prompt without an image or a label, pixels that do not fit their prompt or are not
            finite, tokens that the model has not, or prompts of too different sizes.
    """
    prompts = _prompts(data)
    _, base, family = find_family(model)
    config: Any = base.config
    words, visual = int(config.get_text_config().vocab_size), list(family.token_ids(config).values())
    examples = []
    for index, one in enumerate(prompts):
        if not isinstance(one, Mapping):
            raise CalibrationError(f"calibration prompt {index} is {_a(one)}, expected a mapping of inputs")
        inputs = {name: value for name, value in one.items() if isinstance(value, torch.Tensor) and name != "answer"}
        ids = inputs.get("input_ids")
        if ids is None or ids.ndim != 2 or len(ids) != 1:
            shape = "missing" if ids is None else f"of shape {list(ids.shape)}"
            raise CalibrationError(f"calibration prompt {index}: input_ids must be [1, L], they are {shape}")
        if ids.is_floating_point():
            raise CalibrationError(f"calibration prompt {index}: input_ids must be whole numbers, they are {ids.dtype}")
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise CalibrationError(f"calibration prompt {index} is padded; pass every prompt on its own")
        try:
            layout = layout_of(base, family, dict(inputs))
        except VLMBudgetError as error:
            raise CalibrationError(f"calibration prompt {index} does not fit the model: {error}") from error
        if not layout.rows[0]:
            raise CalibrationError(f"calibration prompt {index} has no image or video, so nothing could be pruned")
        answer = _answer(one.get("answer"), tokenizer, index)
        _check_numbers(inputs, answer, words, visual, index)
        examples.append(Example(inputs, answer, layout))
    found = Calibration(tuple(examples))
    _check(found, labelled, max_spread)
    return found


def load_jsonl(path: str | Path, processor: Any, model: Any) -> list[dict[str, Any]]:
    """Read calibration prompts from a file of JSON lines.

    Every line has ``"prompt"``, ``"image"`` (or ``"images"``, a list; paths are relative to the file), and ``"answer"``
    where there is a label.

    Args:
        path: The file.
        processor: The model's processor.
        model: The model, for device and number format.

    Returns:
        Data for :func:`prepare`.

    Raises:
        CalibrationError: The file is missing or empty, a line is no such object, or pictures are missing.
        ImageError: A picture cannot be read.
    """
    from ..images import load_image
    from ..prompts import build_inputs

    rows = read_lines(Path(path))
    data = []
    for prompt, images, answer in rows:
        inputs = build_inputs(processor, [prompt], [[load_image(str(image)) for image in images]], model)
        on_host = {name: value.cpu() for name, value in inputs.items()}  # a whole set may not fit beside the model
        data.append({**on_host, "answer": answer})
    return data


def read_lines(path: Path) -> list[tuple[str, list[Path], Any]]:
    """Prompt, pictures and answer of every line; every picture is there.

    Raises:
        CalibrationError: See :func:`load_jsonl`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read calibration file {str(path)!r}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"it is {_a(row)}, not an object with prompt and image")
            images = row["images"] if "images" in row else [row["image"]]
            prompt, answer = row["prompt"], row.get("answer")
            if not isinstance(prompt, str) or not isinstance(images, list) or not images:
                raise TypeError("prompt is text, images is a list with at least one path")
            if not isinstance(answer, str | list | None):
                raise TypeError(f"an answer is text or a list of token ids, got {answer!r}")
            rows.append((prompt, [path.parent / str(image) for image in images], answer))
        except KeyError as error:
            raise CalibrationError(
                f"{path.name} line {number} has no {error}; every line needs prompt and image"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise CalibrationError(f"{path.name} line {number} is no calibration prompt: {error}") from error
    if not rows:
        raise CalibrationError(f"calibration file {str(path)!r} holds no prompts")
    missing = [str(image) for _, images, _ in rows for image in images if not image.is_file()]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise CalibrationError(f"pictures of {path.name} are missing: {', '.join(missing[:_NAMED])}{more}")
    return rows


def _answer(answer: Any, tokenizer: Any, index: int) -> tuple[int, ...]:
    if answer is None:
        return ()
    if isinstance(answer, str):
        if tokenizer is None:
            raise CalibrationError(
                f"calibration prompt {index} has its answer as text: pass the tokenizer, or token ids"
            )
        return tuple(tokenizer(answer.strip(), add_special_tokens=False)["input_ids"])
    several = isinstance(answer, Iterable) and not isinstance(answer, Mapping | bytes)
    ids = answer.flatten().tolist() if isinstance(answer, torch.Tensor) else list(answer) if several else [answer]
    if not several or any(not isinstance(token, Integral) or isinstance(token, bool) for token in ids):
        raise CalibrationError(
            f"calibration prompt {index}: an answer is text or token ids, such as 'red' or [3, 4], got {answer!r}"
        )
    return tuple(int(token) for token in ids)


def _prompts(data: Any) -> list[Any]:
    """All prompts, also of a generator."""
    if isinstance(data, Mapping | str | bytes) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration data is a list of prompts, each a mapping of the processor's tensors; got {_a(data)}"
        )
    prompts = list(data)
    if not prompts:
        raise CalibrationError("the calibration set is empty: nothing could be judged. Pass at least one prompt.")
    return prompts


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _check_numbers(
    inputs: Mapping[str, torch.Tensor], answer: Sequence[int], words: int, visual: Sequence[int], index: int
) -> None:
    """Tokens are in the vocabulary (or stand for a picture), and pixels are finite."""
    ids = inputs["input_ids"]
    strange = [token for token in ids.flatten().tolist() if not 0 <= token < words and token not in visual]
    for what, tokens in (
        ("its prompt", strange),
        ("its answer", [token for token in answer if not 0 <= token < words]),
    ):
        if tokens:
            raise CalibrationError(
                f"calibration prompt {index}: {what} has token {tokens[0]}, but the model's vocabulary ends at "
                f"{words - 1}. Is it another model's tokenizer?"
            )
    for name, value in inputs.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(f"calibration prompt {index}: {name} holds numbers that are not finite (NaN or inf)")


def require_answers(answers: Sequence[Any]) -> None:
    """Refuse prompts without a label.

    Args:
        answers: Of every prompt; empty or None where there is none.

    Raises:
        CalibrationError: Some prompt has none; the message names the first.
    """
    bare = [index for index, answer in enumerate(answers) if not answer]
    if bare:
        raise CalibrationError(
            f"{len(bare)} of {len(answers)} calibration prompts have no answer, prompt {bare[0]} the first. "
            "Label them, or use metric='agreement' or 'kl', which compare with the full model."
        )


def _check(found: Calibration, labelled: bool, max_spread: float) -> None:
    if labelled:
        require_answers([example.answer for example in found.examples])
    least, most = min(found.tokens), max(found.tokens)
    if most > max_spread * least:
        raise CalibrationError(
            f"calibration prompts have between {least} and {most} visual tokens, more than {max_spread:g} times apart: "
            "one schedule would fit neither end. Search for each size, or raise max_spread."
        )
