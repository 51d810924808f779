import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from vlm_budget.errors import UnknownNameError
from vlm_budget.eval import nano
from vlm_budget.eval.nano import card, data
from vlm_budget.eval.nano.export import WEIGHTS
from vlm_budget.eval.nano.held_out import score, summarise

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "nano_training.json"
FRESH_SEED = 31_337  # neither training, validation nor test
OVERALL_BAR, TASK_BAR = 0.90, 0.80
MAX_BYTES = 16_000_000

Loaded = tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]


@pytest.fixture(scope="module", params=nano.names())
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return nano.load(request.param)


@pytest.fixture(scope="module")
def samples() -> list[data.Sample]:
    return data.test_set(100, FRESH_SEED)


def test_fresh_pages_are_answered_as_well_as_promised(loaded: Loaded, samples: list[data.Sample]) -> None:
    rows = summarise(samples, score(loaded[0], samples))
    bars = {"all": OVERALL_BAR} | dict.fromkeys(data.TASKS, TASK_BAR)
    for group, bar in bars.items():
        assert rows[group]["accuracy"] >= bar - 3 * rows[group]["se"], (group, rows[group])


@torch.no_grad()
def test_generate_answers_with_one_word_and_stops(loaded: Loaded, samples: list[data.Sample]) -> None:
    model, processor = loaded
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": q.prompt}]}]
        for s in samples[:4]
        for q in s.questions[:2]
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    known = set(data.vocabulary())
    for row in output:
        assert row[1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(row[:1]).strip() in known


def test_unknown_words_become_unk(loaded: Loaded) -> None:
    tokenizer = loaded[1].tokenizer
    assert tokenizer("what elephant")["input_ids"][-1] == tokenizer.unk_token_id
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("name", nano.names())
def test_weights_are_small_and_the_card_is_the_recorded_one(name: str) -> None:
    record = json.loads(RESULTS.read_text())
    assert (nano.folder(name) / WEIGHTS).stat().st_size == record["checkpoints"][name]["bytes"] <= MAX_BYTES
    assert (nano.folder(name) / "README.md").read_text() == card.render(name, record)


def test_unknown_checkpoint_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="nano-robust"):
        nano.load("nano-robst")
