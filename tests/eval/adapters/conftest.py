"""Questions about a few posters, and what a patched model says to each of them on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import vlm_budget
from vlm_budget.eval.nano import load
from vlm_budget.eval.nano.data import TEST_SEED, Question, test_set
from vlm_budget.prompts import build_inputs

Asked = Sequence[tuple[Any, Question]]


@pytest.fixture(scope="session")
def asked() -> Asked:
    return [(poster.image, question) for poster in test_set(8, TEST_SEED) for question in poster.questions]


def spoken(asked: Asked, method: str | None, budget: float | None, new: int = 1) -> list[str]:
    """Answers of the model as a user would patch and ask it, one question at a time."""
    model, processor = load("nano")
    if method is not None:
        vlm_budget.patch(model, method, budget)
    texts = []
    for image, question in asked:
        inputs = build_inputs(processor, [question.prompt], [[image]], model)
        with torch.inference_mode():
            said = model.generate(**inputs, max_new_tokens=new, do_sample=False, num_beams=1)
        texts.append(processor.tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return [text.strip() for text in texts]


@pytest.fixture(scope="session")
def direct(asked: Asked) -> dict[str, list[str]]:
    return {"hired": spoken(asked, "hired", 0.4), "unpatched": spoken(asked, None, None)}
