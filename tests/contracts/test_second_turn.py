"""A cache that a patched model filled goes on to serve: further turns, new pictures, copies, crops, and the end."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import vlm_budget
from tiny_parts import FLOOR, TEXT_INPUTS, VOCABULARY, Tiny, row_inputs
from vlm_budget import PatchError

from .conftest import BUDGET, GENERATING, METHOD, TOKENS, Case, case
from .patched import DECODED, SAMPLE, encode, generate, kept_per_row, unpatched_or_skip
from .reference import Row, greedy, kept_columns, language_model, recorded

QUESTION = [30, 31, 32]


def first_turn(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """A turn whose cache is kept."""
    with torch.no_grad():
        return model.generate(**inputs, **SAMPLE, **options, return_dict_in_generate=True)


def conversation(inputs: dict[str, Any], sequences: torch.Tensor, question: list[int]) -> dict[str, Any]:
    """Text inputs of the whole conversation: the first prompt, what was generated, and a question."""
    ids = torch.cat([sequences, torch.tensor([question] * len(sequences))], 1)
    grown = {"input_ids": ids}
    for name in TEXT_INPUTS[1:]:
        if name in inputs:
            extra = ids.shape[1] - inputs[name].shape[1]
            fill = 1 if name == "attention_mask" else 0
            grown[name] = torch.nn.functional.pad(inputs[name], (0, extra), value=fill)
    return grown


def second_turn(model: Any, inputs: dict[str, Any], first: Any, **options: Any) -> list[list[int]]:
    """The full ids again, with the first turn's cache."""
    later = conversation(inputs, first.sequences, QUESTION)
    return generate(model, later, past_key_values=first.past_key_values, **options)


def expected_second_turn(rows: list[Row], first: list[list[int]]) -> list[list[int]]:
    return [greedy(row.then([*tokens, *QUESTION]), TOKENS) for row, tokens in zip(rows, first, strict=True)]


def test_full_ids_and_the_cache_of_the_first_turn(generating_case: Case) -> None:
    tiny = generating_case.tiny
    unpatched_or_skip(
        lambda: second_turn(tiny.model, tiny.clone(), first_turn(tiny.model, tiny.clone())),
        expected_second_turn(generating_case.full, generating_case.unpruned),
        "a second turn on the same cache",
    )
    with generating_case.patch():
        first = first_turn(tiny.model, tiny.clone())
        found = second_turn(tiny.model, tiny.clone(), first)
    assert found == expected_second_turn(generating_case.compact, generating_case.pruned)


def test_a_third_turn(llava_case: Case) -> None:
    tiny = llava_case.tiny
    with llava_case.patch(), torch.no_grad():
        first = first_turn(tiny.model, tiny.clone())
        later = conversation(tiny.inputs, first.sequences, QUESTION)
        second = first_turn(tiny.model, later, past_key_values=first.past_key_values)
        last = conversation(tiny.inputs, second.sequences, [40, 41])
        found = generate(tiny.model, last, past_key_values=second.past_key_values)
    tokens = second.sequences[:, tiny.inputs["input_ids"].shape[1] :].tolist()
    assert found == [
        greedy(row.then([*part, 40, 41]), TOKENS) for row, part in zip(llava_case.compact, tokens, strict=True)
    ]


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copied_cache_serves_like_the_first(llava_case: Case, carry: Any) -> None:
    tiny = llava_case.tiny
    want = expected_second_turn(llava_case.compact, llava_case.pruned)
    with llava_case.patch():
        first = first_turn(tiny.model, tiny.clone())
        spare = carry(first.past_key_values)
        assert second_turn(tiny.model, tiny.clone(), first) == want
        first.past_key_values = spare
        assert second_turn(tiny.model, tiny.clone(), first) == want


def test_a_static_cache_serves_a_second_turn(generating_case: Case) -> None:
    tiny = generating_case.tiny
    length = tiny.inputs["input_ids"].shape[1] + 2 * TOKENS + len(QUESTION)

    def run() -> list[list[int]]:
        config = tiny.model.config.get_text_config()
        static = transformers.StaticCache(config=config, max_cache_len=length)
        return second_turn(tiny.model, tiny.clone(), first_turn(tiny.model, tiny.clone(), past_key_values=static))

    want = expected_second_turn(generating_case.full, generating_case.unpruned)
    unpatched_or_skip(run, want, "a second turn on a static cache")
    with generating_case.patch():
        assert run() == expected_second_turn(generating_case.compact, generating_case.pruned)


def prefilled(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """A forward that starts or continues a cache."""
    with torch.no_grad():
        return model(**inputs, **options, use_cache=True)


def stepwise(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """Greedy decoding by hand: forwards with a cache, 2-D masks, and nothing else."""
    output = prefilled(model, inputs)
    mask, tokens = inputs["attention_mask"], []
    for _ in range(TOKENS):
        logits = output.logits[:, -1].clone()
        logits[:, SAMPLE["suppress_tokens"]] = -torch.inf
        tokens.append(logits.argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = {"input_ids": tokens[-1][:, None], "attention_mask": mask, "past_key_values": output.past_key_values}
        output = prefilled(model, step)
    return torch.stack(tokens, 1).tolist()


def test_forwards_with_a_cache_decode_like_generate(generating_case: Case) -> None:
    tiny = generating_case.tiny
    unpatched_or_skip(lambda: stepwise(tiny.model, tiny.clone()), generating_case.unpruned, "decoding by forwards")
    with generating_case.patch():
        assert stepwise(tiny.model, tiny.clone()) == generating_case.pruned


# --- a new picture on the pruned cache -------------------------------------------------------------------------------


def with_new_picture(tiny: Tiny, first: Any, row: int) -> tuple[dict[str, Any], int]:
    """A second turn whose question is the set-up's other prompt, pictures included; and that prompt's length."""
    other = row_inputs(tiny, 1 - row)
    ids = torch.cat([first.sequences, other["input_ids"]], 1)
    inputs = {name: value for name, value in other.items() if name not in TEXT_INPUTS}
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = row_inputs(tiny, row)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in tiny.inputs:
            middle = ids.shape[1] - start[name].shape[1] - other[name].shape[1]
            inputs[name] = torch.cat([torch.nn.functional.pad(start[name], (0, middle)), other[name]], 1)
    return inputs, other["input_ids"].shape[1]


def chunk_of(inputs: dict[str, Any], past: int) -> dict[str, Any]:
    """What a forward needs of a conversation whose first columns are in the cache."""
    chunk = {
        name: value[:, past:] if name in ("input_ids", "token_type_ids", "mm_token_type_ids") else value
        for name, value in inputs.items()
    }
    if "mm_token_type_ids" in chunk or "image_grid_thw" in chunk or "video_grid_thw" in chunk:
        chunk.pop("attention_mask")  # 5.x makes M-RoPE positions as long as the mask, which is too long for a chunk
    return chunk


def grown_row(
    before: Row, call: dict[str, Any], columns: list[int] | None, tokens: list[int], visual: torch.Tensor
) -> Row:
    """The first turn's row, the generated tokens, and the columns kept of the chunk in a recorded, unpruned call."""
    row = before.then(tokens[:-1])
    embeds = call["inputs_embeds"][0]
    index = torch.arange(len(embeds)) if columns is None else torch.tensor(columns)
    given = call.get("position_ids")
    positions = row.following + torch.arange(len(embeds))
    if row.multi_axis:
        positions = given[-3:, 0]
    masks = row.masks
    if masks is not None:
        masks = {kind: chunk_mask(mask, _square(call, kind)[:, -len(embeds) :], index) for kind, mask in masks.items()}
    deepstack = row.deepstack
    if call.get("deepstack_visual_embeds") is not None:
        kept = (visual.cumsum(0) - 1)[index[visual[index]]]
        new = call["deepstack_visual_embeds"]
        deepstack = tuple(torch.cat([old, level[kept]]) for old, level in zip(row.deepstack, new, strict=True))
    return replace(
        row,
        embeds=torch.cat([row.embeds, embeds[index]]),
        positions=torch.cat([row.positions, positions[..., index]], -1),
        following=int(positions.max()) + 1,
        visual=torch.cat([row.visual, visual[index]]),
        masks=masks,
        deepstack=deepstack,
    )


def _square(call: dict[str, Any], kind: str) -> torch.Tensor:
    mask = call["attention_mask"]
    square = mask[kind] if isinstance(mask, dict) else mask
    flags = square if square.dtype == torch.bool else square == 0
    return flags[0, 0]


def chunk_mask(past: torch.Tensor, chunk: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[p + k, p + k]: the chunk sees all of the past, and itself as recorded."""
    old, new = len(past), len(index)
    grown = torch.zeros(old + new, old + new, dtype=torch.bool)
    grown[:old, :old] = past
    grown[old:, :old] = True
    grown[old:, old:] = chunk[index][:, index]
    return grown


def repacked(row: Row, before: Row, tokens: int) -> Row:
    """The chunk renumbered without gaps, behind a first turn that was already packed."""
    following = before.following + tokens
    new = row.length - before.length - tokens
    positions = torch.cat([row.positions[: before.length + tokens], following + torch.arange(new)])
    return replace(row, positions=positions, following=following + new)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", GENERATING)
def test_a_new_picture_on_the_pruned_cache(name: str, row: int) -> None:
    known = case(name)
    tiny = known.tiny
    inputs = row_inputs(tiny, row)

    def turn() -> tuple[Any, dict[str, Any], torch.Tensor]:
        first = first_turn(tiny.model, row_inputs(tiny, row))
        later, _ = with_new_picture(tiny, first, row)
        past = first.past_key_values.get_seq_length()
        with recorded(language_model(tiny.model)) as calls:
            output = prefilled(tiny.model, chunk_of(later, past), past_key_values=first.past_key_values)
        return first, calls[0], output.logits[0]

    unpatched: dict[str, Any] = {}
    unpatched_or_skip(
        lambda: unpatched.update(zip(("first", "call", "logits"), turn(), strict=True)), None, "pictures on a cache"
    )
    first, call = unpatched["first"], unpatched["call"]
    start = inputs["input_ids"].shape[1]
    tokens = first.sequences[0, start:].tolist()
    ids = with_new_picture(tiny, first, row)[0]["input_ids"][0, start + len(tokens) - 1 :]
    visual = torch.isin(ids, torch.tensor(SAMPLE["suppress_tokens"]))
    whole = grown_row(known.full[row], call, None, tokens, visual)

    def same_as_reference() -> None:
        torch.testing.assert_close(unpatched["logits"], whole.logits()[-len(ids) :], **DECODED)

    unpatched_or_skip(same_as_reference, None, "pictures on a cache")

    with known.patch() as handle:
        first, pruned_call, logits = turn()
        kept = kept_per_row(handle, 1)[0]
    tokens = first.sequences[0, start:].tolist()
    assert tokens == known.pruned[row]
    chunk = replace(whole, embeds=call["inputs_embeds"][0].clone())
    chunk.embeds[0] = tiny.model.get_input_embeddings()(torch.tensor(tokens[-1])).detach()
    assert pruned_call["inputs_embeds"].shape[1] == len(ids) - int(visual.sum()) + kept
    columns = kept_columns(chunk, pruned_call["inputs_embeds"][0])
    call = {**call, "inputs_embeds": chunk.embeds[None]}
    want = grown_row(known.compact[row], call, columns, tokens, visual)
    if not want.multi_axis:
        want = repacked(want, known.compact[row], len(tokens) - 1)
    torch.testing.assert_close(logits[columns], want.logits()[-len(columns) :], **DECODED)


def test_generate_with_a_new_picture_on_the_pruned_cache(generating_case: Case) -> None:
    tiny = generating_case.tiny

    def run(cached: bool) -> list[list[int]]:
        first = first_turn(tiny.model, row_inputs(tiny, 1))
        later, _ = with_new_picture(tiny, first, 1)
        both = row_inputs(tiny, 1)
        pixels = {k: torch.cat([both[k], v]) for k, v in later.items() if k not in TEXT_INPUTS and k in both}
        if not cached:
            return generate(tiny.model, {**later, **pixels})
        grids = {k: v for k, v in pixels.items() if k.endswith("grid_thw")}
        if grids:  # M-RoPE counts positions over all pictures, so the new ones are encoded beforehand
            later = {k: v for k, v in later.items() if k in TEXT_INPUTS} | grids
            later["mm_encoder_outputs"] = encode(tiny.model, row_inputs(tiny, 0))
        return generate(tiny.model, later, past_key_values=first.past_key_values)

    unpatched_or_skip(lambda: run(True), run(False), "generate with pictures on a cache")
    with generating_case.patch() as handle:
        found = run(True)
        assert handle.report().visual_tokens == int(
            torch.isin(row_inputs(tiny, 0)["input_ids"], torch.tensor(SAMPLE["suppress_tokens"])).sum()
        )
        if "mm_encoder_outputs" not in inspect.signature(tiny.model.forward).parameters:
            return
        assert found == run(True)
        if not generating_case.full[0].multi_axis:
            assert found == forwards_with_new_picture(tiny)


def forwards_with_new_picture(tiny: Tiny) -> list[list[int]]:
    """The same two turns by plain forwards."""
    first = first_turn(tiny.model, row_inputs(tiny, 1))
    later, _ = with_new_picture(tiny, first, 1)
    past = first.past_key_values.get_seq_length()
    return stepwise(tiny.model, chunk_of(later, past) | {"past_key_values": first.past_key_values})


# --- the end of a patch ----------------------------------------------------------------------------------------------


def test_a_pruned_cache_is_refused_after_undo(generating_case: Case) -> None:
    tiny = generating_case.tiny
    with generating_case.patch():
        first = first_turn(tiny.model, tiny.clone())
    with pytest.raises(PatchError, match="filled by a patched model"):
        second_turn(tiny.model, tiny.clone(), first)
    with generating_case.patch():
        second_turn(tiny.model, tiny.clone(), first)


def test_an_unpruned_cache_serves_a_patched_model(llava_case: Case) -> None:
    tiny = llava_case.tiny
    first = first_turn(tiny.model, tiny.clone())
    with llava_case.patch():
        found = second_turn(tiny.model, tiny.clone(), first)
    assert found == expected_second_turn(llava_case.full, llava_case.unpruned)


def test_a_cache_is_cropped_and_reset_in_the_callers_coordinates(llava_case: Case) -> None:
    tiny = llava_case.tiny
    with llava_case.patch():
        first = first_turn(tiny.model, tiny.clone())
        cache, prompt = first.past_key_values, tiny.inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == prompt + TOKENS - 1
        cache.crop(-(TOKENS - 1))
        assert cache.get_seq_length() == prompt
        ids = first.sequences[:, : prompt + 1]
        mask = conversation(tiny.inputs, ids[:, :prompt], [1])["attention_mask"]
        again = generate(tiny.model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
        assert [part[: TOKENS - 1] for part in again] == [part[1:] for part in llava_case.pruned]
        if FLOOR:
            return  # `reset` of 4.x zeroes a dynamic cache and keeps its length
        cache.reset()
        assert cache.get_seq_length() == 0
        assert generate(tiny.model, tiny.clone(), past_key_values=cache) == llava_case.pruned


def test_cropping_into_dropped_tokens_is_refused(llava_case: Case) -> None:
    tiny = llava_case.tiny
    with llava_case.patch():
        cache = first_turn(tiny.model, tiny.clone()).past_key_values
        length = cache.get_seq_length()
        with pytest.raises(PatchError, match="dropped visual tokens"):
            cache.crop(-(TOKENS + 10))
        assert cache.get_seq_length() == length


# --- assisted decoding -----------------------------------------------------------------------------------------------


def predictable(decoder: Any) -> None:
    """Make the next token depend mostly on the last one, so that a drafter is right now and then."""
    for layer in decoder.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data.mul_(0.02)


@pytest.mark.parametrize("drafter", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("name", GENERATING)
def test_assisted_decoding_equals_greedy(name: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case(name).tiny
    predictable(language_model(tiny.model))
    long = {"max_new_tokens": 28}
    if drafter == "assistant":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        helper = transformers.LlamaForCausalLM(config).eval()
        helper.generation_config.eos_token_id = helper.generation_config.pad_token_id = None
        predictable(helper.model)
        helper.model.embed_tokens.weight = tiny.model.get_input_embeddings().weight
        helper.lm_head.weight = tiny.model.lm_head.weight
        assisted = long | {"assistant_model": helper}
    else:
        assisted = long | {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    inputs = row_inputs(tiny, 1)
    plain = generate(tiny.model, inputs, **long)
    unpatched_or_skip(lambda: generate(tiny.model, row_inputs(tiny, 1), **assisted), plain, drafter)
    with vlm_budget.patch(tiny.model, METHOD, BUDGET), recorded(language_model(tiny.model)) as calls:
        want = generate(tiny.model, row_inputs(tiny, 1), **long)
        alone = len(calls)
        assert generate(tiny.model, row_inputs(tiny, 1), **assisted) == want
    assert len(calls) - alone < alone, "no draft was ever accepted: the test shows nothing"


def test_the_cache_of_a_patched_model_can_be_saved(llava_case: Case) -> None:
    tiny = llava_case.tiny
    with llava_case.patch():
        first = first_turn(tiny.model, tiny.clone())
        buffer = io.BytesIO()
        torch.save(first.past_key_values, buffer)
        buffer.seek(0)
        first.past_key_values = torch.load(buffer, weights_only=False)
        want = expected_second_turn(llava_case.compact, llava_case.pruned)
        assert second_turn(tiny.model, tiny.clone(), first) == want
