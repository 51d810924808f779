"""A cache whose layers differ in length goes on to serve: further turns, new pictures, copies, crops."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import vlm_budget
from tiny_parts import FLOOR, row_inputs
from vlm_budget import PatchError

from .layered import Drop, Layered, greedy, layered
from .patched import DECODED, SAMPLE, generate, unpatched_or_skip
from .reference import language_model, recorded
from .schedules import KINDS, TOKENS, Attended, Case, Scheduled, case, unpruned
from .test_second_turn import (
    QUESTION,
    chunk_of,
    conversation,
    expected_second_turn,
    first_turn,
    grown_row,
    prefilled,
    second_turn,
    stepwise,
    with_new_picture,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Case:
    """One set-up of every kind."""
    return case(request.param)


def after_question(kind: Case) -> list[list[int]]:
    """What the second turn must say."""
    pairs = zip(kind.prompts, kind.pruned, strict=True)
    return [greedy(prompt.then([*tokens, *QUESTION]), TOKENS) for prompt, tokens in pairs]


def test_full_ids_and_the_cache_of_the_first_turn(kind: Case) -> None:
    tiny = kind.tiny
    unpatched_or_skip(
        lambda: second_turn(tiny.model, tiny.clone(), first_turn(tiny.model, tiny.clone())),
        expected_second_turn(kind.full, unpruned(kind.name)),
        "a second turn on the same cache",
    )
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
        assert second_turn(tiny.model, tiny.clone(), first) == after_question(kind)


def test_new_ids_alone_and_the_cache_of_the_first_turn(kind: Case) -> None:
    tiny = kind.tiny

    def run() -> list[list[int]]:
        first = first_turn(tiny.model, tiny.clone())
        whole = conversation(tiny.inputs, first.sequences, QUESTION)
        past = first.past_key_values.get_seq_length()
        later = {name: part if name == "attention_mask" else part[:, past:] for name, part in whole.items()}
        return generate(tiny.model, later, past_key_values=first.past_key_values)

    unpatched_or_skip(run, expected_second_turn(kind.full, unpruned(kind.name)), "a turn of new ids alone")
    with kind.patch():
        assert run() == after_question(kind)


def test_a_cache_of_another_schedule_is_read_at_the_layers_where_it_was_shortened() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
    with vlm_budget.patch(tiny.model, Scheduled(shares=((5, 0.5),))) as handle:
        promised = handle.plan(**tiny.clone())
    with vlm_budget.patch(tiny.model, Scheduled(), plan=promised):
        assert second_turn(tiny.model, tiny.clone(), first) == after_question(kind)


def test_a_third_turn() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
        later = conversation(tiny.inputs, first.sequences, QUESTION)
        second = first_turn(tiny.model, later, past_key_values=first.past_key_values)
        last = conversation(tiny.inputs, second.sequences, [40, 41])
        found = generate(tiny.model, last, past_key_values=second.past_key_values)
    tokens = second.sequences[:, tiny.inputs["input_ids"].shape[1] :].tolist()
    pairs = zip(kind.prompts, tokens, strict=True)
    assert found == [greedy(prompt.then([*part, 40, 41]), TOKENS) for prompt, part in pairs]


def test_packed_positions_go_on_without_gaps_in_every_layer() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch(positions="packed") as handle:
        first = first_turn(tiny.model, tiny.clone())
        prompts = layered(kind.full, handle.kept(), vision_packed=False, packed=True)
        tokens = first.sequences[:, tiny.inputs["input_ids"].shape[1] :].tolist()
        assert tokens == [greedy(prompt, TOKENS) for prompt in prompts]
        found = second_turn(tiny.model, tiny.clone(), first)
    pairs = zip(prompts, tokens, strict=True)
    assert found == [greedy(prompt.then([*part, *QUESTION]), TOKENS) for prompt, part in pairs]


@pytest.mark.parametrize(
    "carry",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_cache_serves_like_the_first(carry: Any) -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
        spare = carry(first.past_key_values)
        assert second_turn(tiny.model, tiny.clone(), first) == after_question(kind)
        first.past_key_values = spare
        assert second_turn(tiny.model, tiny.clone(), first) == after_question(kind)


def test_a_saved_cache_serves_like_the_first() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
        buffer = io.BytesIO()
        torch.save(first.past_key_values, buffer)
        buffer.seek(0)
        first.past_key_values = torch.load(buffer, weights_only=False)
        assert second_turn(tiny.model, tiny.clone(), first) == after_question(kind)


def test_forwards_with_a_cache_decode_like_generate(kind: Case) -> None:
    tiny = kind.tiny
    unpatched_or_skip(lambda: stepwise(tiny.model, tiny.clone()), unpruned(kind.name), "decoding by forwards")
    with kind.patch():
        assert stepwise(tiny.model, tiny.clone()) == kind.pruned


def test_an_unpruned_cache_serves_a_patched_model() -> None:
    kind = case("llava")
    tiny = kind.tiny
    first = first_turn(tiny.model, tiny.clone())
    with kind.patch():
        found = second_turn(tiny.model, tiny.clone(), first)
    assert found == expected_second_turn(kind.full, unpruned("llava"))


def test_a_pruned_cache_is_refused_after_undo_and_under_a_method_that_acts_elsewhere() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
    length = first.past_key_values.get_seq_length()
    with pytest.raises(PatchError, match="filled by a patched model"):
        second_turn(tiny.model, tiny.clone(), first)
    with vlm_budget.patch(tiny.model, "uniform", 0.5), pytest.raises(PatchError, match="under another patch"):
        second_turn(tiny.model, tiny.clone(), first)
    assert first.past_key_values.get_seq_length() == length
    with kind.patch():
        assert second_turn(tiny.model, tiny.clone(), first) == after_question(kind)


def test_a_cache_is_cropped_and_reset_in_the_callers_coordinates() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        first = first_turn(tiny.model, tiny.clone())
        cache, prompt = first.past_key_values, tiny.inputs["input_ids"].shape[1]
        lengths = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
        assert lengths == [prompt + TOKENS - 1] * len(cache.layers)
        assert len({layer.keys.shape[2] for layer in cache.layers}) == 3
        cache.crop(-(TOKENS - 1))
        assert cache.get_seq_length() == prompt
        ids = first.sequences[:, : prompt + 1]
        mask = conversation(tiny.inputs, ids[:, :prompt], [1])["attention_mask"]
        again = generate(tiny.model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
        assert [part[: TOKENS - 1] for part in again] == [part[1:] for part in kind.pruned]
        if FLOOR:
            return  # `reset` of 4.x zeroes a dynamic cache and keeps its length
        cache.reset()
        assert cache.get_seq_length() == 0
        assert generate(tiny.model, tiny.clone(), past_key_values=cache) == kind.pruned


def test_cropping_into_tokens_dropped_at_a_layer_is_refused() -> None:
    kind = case("llava")
    tiny = kind.tiny
    with kind.patch():
        cache = first_turn(tiny.model, tiny.clone()).past_key_values
        length, shapes = cache.get_seq_length(), [layer.keys.shape for layer in cache.layers]
        with pytest.raises(PatchError, match="dropped visual tokens"):
            cache.crop(-(TOKENS + 10))
        assert (cache.get_seq_length(), [layer.keys.shape for layer in cache.layers]) == (length, shapes)


# --- a new picture on the cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [Scheduled(), Scheduled(shares=((3, 0.5),))], ids=["same layers", "other layers"])
@pytest.mark.parametrize("name", KINDS)
def test_a_new_picture_on_the_pruned_cache(name: str, later: Scheduled) -> None:
    kind = case(name)
    tiny, row = kind.tiny, 1
    inputs = row_inputs(tiny, row)

    def turn(first: Any) -> tuple[dict[str, Any], torch.Tensor]:
        whole, _ = with_new_picture(tiny, first, row)
        past = first.past_key_values.get_seq_length()
        with recorded(language_model(tiny.model)) as calls:
            output = prefilled(tiny.model, chunk_of(whole, past), past_key_values=first.past_key_values)
        return calls[0], output.logits[0]

    unpatched: dict[str, Any] = {}
    first = first_turn(tiny.model, inputs)
    unpatched_or_skip(
        lambda: unpatched.update(zip(("call", "logits"), turn(first), strict=True)), None, "pictures on a cache"
    )
    call, start = unpatched["call"], inputs["input_ids"].shape[1]
    tokens = first.sequences[0, start:].tolist()
    ids = with_new_picture(tiny, first, row)[0]["input_ids"][0, start + len(tokens) - 1 :]
    visual = torch.isin(ids, torch.tensor(SAMPLE["suppress_tokens"]))
    same = grown_row(kind.full[row], call, None, tokens, visual)
    unpatched_or_skip(
        lambda: torch.testing.assert_close(unpatched["logits"], same.logits()[-len(ids) :], **DECODED),
        None,
        "pictures on a cache",
    )
    with kind.patch():
        first = first_turn(tiny.model, row_inputs(tiny, row))
    with vlm_budget.patch(tiny.model, later) as handle:
        _, logits = turn(first)
        kept = handle.kept()
    tokens = first.sequences[0, start:].tolist()
    assert tokens == kind.pruned[row]
    embeds = call["inputs_embeds"].clone()
    embeds[0, 0] = tiny.model.get_input_embeddings()(torch.tensor(tokens[-1])).detach()
    whole = grown_row(kind.full[row], {**call, "inputs_embeds": embeds}, None, tokens, visual)
    want = Layered(whole, two_turns(kind.prompts[row].drops, kept, visual, whole.length))
    left = [column - whole.length + len(ids) for column in want.left if column >= whole.length - len(ids)]
    torch.testing.assert_close(logits[left], want.logits()[-len(left) :], **DECODED)


def two_turns(first: tuple[Drop, ...], kept: Any, visual: torch.Tensor, length: int) -> tuple[Drop, ...]:
    """The first turn's drops, and those of the chunk behind it, whose items ``kept`` tells about."""
    start = length - len(visual)
    everything = {"first": list(range(start)), "second": list(range(start, length))}
    drops: dict[int, dict[str, list[int]]] = {}
    for drop in first:
        answer = list(range(drop.columns[-1] + 1, start))
        drops.setdefault(drop.layer, {})["first"] = drop.columns + answer
    for step, (layer, _) in enumerate(kept[0].steps):
        columns, done = (~visual).nonzero().flatten().tolist(), 0
        for item in kept:
            columns += (visual.nonzero().flatten()[torch.tensor(item.steps[step][1], dtype=torch.long) + done]).tolist()
            done += item.item.size
        drops.setdefault(layer, {})["second"] = [start + column for column in sorted(columns)]
    found, here = [], everything
    for layer in sorted(drops):
        here = {**here, **drops[layer]}
        found.append(Drop(layer, here["first"] + here["second"]))
    return tuple(found)


def test_generate_with_a_new_picture_on_the_pruned_cache() -> None:
    kind = case("llava")
    tiny = kind.tiny

    def run() -> list[list[int]]:
        first = first_turn(tiny.model, row_inputs(tiny, 1))
        later, _ = with_new_picture(tiny, first, 1)
        return generate(tiny.model, later, past_key_values=first.past_key_values)

    def forwards() -> list[list[int]]:
        first = first_turn(tiny.model, row_inputs(tiny, 1))
        later, _ = with_new_picture(tiny, first, 1)
        past = first.past_key_values.get_seq_length()
        return stepwise(tiny.model, chunk_of(later, past) | {"past_key_values": first.past_key_values})

    unpatched_or_skip(run, forwards(), "generate with pictures on a cache")
    with vlm_budget.patch(tiny.model, Attended()):
        assert run() == forwards()
