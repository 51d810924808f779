import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from vlm_budget.errors import UnknownNameError
from vlm_budget.eval import views
from vlm_budget.eval.nano.export import WEIGHTS
from vlm_budget.eval.views import card
from vlm_budget.eval.views.held_out import SETS, Sample, pictures, prepare, score, summarise
from vlm_budget.eval.views.modeling import VOCAB

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "views_training.json"
FRESH_SEED = 31_337  # neither training, validation nor test
BAR = 0.85
MAX_BYTES = 16_000_000

Loaded = tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return views.load()


@pytest.fixture(scope="module", params=SETS)
def samples(request: pytest.FixtureRequest) -> tuple[str, Sequence[Sample]]:
    return request.param, SETS[request.param].test_set(40, FRESH_SEED)


def test_fresh_scenes_are_answered_as_well_as_recorded(loaded: Loaded, samples: tuple[str, Sequence[Sample]]) -> None:
    task, scenes = samples
    row = summarise(scenes, score(loaded[0], prepare(loaded[0], scenes)))["all"]
    recorded = json.loads(RESULTS.read_text())["test"][task]["whole"]["all"]["accuracy"]
    assert recorded >= BAR
    assert row["accuracy"] >= recorded - 3 * row["se"], (task, row)


@torch.no_grad()
def test_generate_answers_with_one_word_and_stops(loaded: Loaded, samples: tuple[str, Sequence[Sample]]) -> None:
    model, processor = loaded
    task, scenes = samples
    expected = score(model, prepare(model, scenes[:2]))
    for sample, rights in zip(scenes[:2], expected, strict=True):
        shown = [Image.fromarray(picture) for picture in pictures(sample)]
        for question, right in zip(sample.questions[:3], rights, strict=False):
            if task == "rooms":
                text = "<image>" * len(shown) + " " + question.prompt
                inputs = processor(text=text, images=[shown], return_tensors="pt")
            else:
                inputs = processor(text="<video> " + question.prompt, videos=[shown], return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert output[1] == processor.tokenizer.eos_token_id
            word = processor.tokenizer.decode(output[:1]).strip()
            assert word in VOCAB and (word == question.answer) == right


def test_unknown_words_become_unk(loaded: Loaded) -> None:
    tokenizer = loaded[1].tokenizer
    assert tokenizer("what elephant")["input_ids"][-1] == tokenizer.unk_token_id
    assert tokenizer.padding_side == "left"


def test_weights_are_small_and_the_card_is_the_recorded_one() -> None:
    record = json.loads(RESULTS.read_text())
    assert (views.folder() / WEIGHTS).stat().st_size == record["bytes"] <= MAX_BYTES
    assert (views.folder() / "README.md").read_text() == card.render(record)


def test_unknown_checkpoint_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="nano-views"):
        views.load("nano-view")
