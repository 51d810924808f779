"""Every way of generating, while tokens are dropped inside the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import vlm_budget
from tiny_parts import FLOOR, VOCABULARY, row_inputs
from vlm_budget import PatchError
from vlm_budget.registry import PRUNERS

from .layered import Layered, greedy, layered, step_logits
from .patched import DECODED, SAMPLE, generate, unpatched_or_skip
from .reference import language_model, recorded
from .schedules import GENERATING, KINDS, TOKENS, Attended, Case, Scheduled, case, unpruned


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Case:
    """One set-up of every kind."""
    return case(request.param)


@pytest.mark.parametrize("name", GENERATING)
def test_greedy(name: str) -> None:
    known = case(name)
    with known.patch() as handle:
        assert generate(known.tiny.model, known.tiny.clone()) == known.pruned
        assert handle.report().plan == handle.plan(**known.tiny.clone())
    assert known.pruned != unpruned(name)


def test_without_a_cache(kind: Case) -> None:
    unpatched_or_skip(lambda: kind.run(use_cache=False), unpruned(kind.name), "use_cache=False")
    with kind.patch():
        assert kind.run(use_cache=False) == kind.pruned


def test_what_is_picked_does_not_change_as_an_answer_grows(kind: Case) -> None:
    # Without a cache every step sees prompt and answer; a method that ranks by the prompt's last token must not see it.
    unpatched_or_skip(lambda: kind.run(use_cache=False), unpruned(kind.name), "use_cache=False")
    with vlm_budget.patch(kind.tiny.model, Attended()) as handle:
        with_cache = kind.run()
        first = [item.steps for item in handle.kept()]
        assert kind.run(use_cache=False) == with_cache
        assert [item.steps for item in handle.kept()] == first


def check_scores(prompts: list[Layered], sequences: list[list[int]], scores: torch.Tensor) -> None:
    """Beam search ranks by the mean log-probability of a continuation."""
    for index, tokens in enumerate(sequences):
        chosen = step_logits(prompts[index // 3], tokens).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
        torch.testing.assert_close(scores[index], chosen.mean(), **DECODED)
    assert len({tuple(tokens) for tokens in sequences}) == len(sequences)


def test_beam_search_over_one_prompt_scores_like_the_reference(kind: Case) -> None:
    tiny = kind.tiny
    options = {"max_new_tokens": TOKENS, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}

    def beams() -> tuple[list[list[int]], torch.Tensor]:
        inputs = row_inputs(tiny, 1)
        with torch.no_grad():
            output = tiny.model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output.sequences_scores

    unpatched_or_skip(beams, None, "beam search")
    with kind.patch() as handle:
        check_scores(kind.prompts[1:], *beams())
        assert handle.report().plan == handle.plan(**row_inputs(tiny, 1))


def test_beam_search_over_a_batch_equals_that_over_its_prompts(kind: Case) -> None:
    tiny = kind.tiny
    options = {"num_beams": 2}
    unpatched_or_skip(lambda: generate(tiny.model, tiny.clone(), **options), None, "beams over several images")
    with vlm_budget.patch(tiny.model, Attended()):
        batch = generate(tiny.model, tiny.clone(), **options)
        assert batch == [generate(tiny.model, row_inputs(tiny, row), **options)[0] for row in range(len(batch))]


def test_sampling_of_several_sequences(kind: Case) -> None:
    tiny = kind.tiny

    def samples() -> tuple[list[list[int]], torch.Tensor]:
        torch.manual_seed(7)
        inputs = row_inputs(tiny, 1)
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "max_new_tokens": TOKENS}
        with torch.no_grad():
            output = tiny.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(output.logits, 1)

    unpatched_or_skip(samples, None, "several sequences per prompt")
    with kind.patch():
        sequences, logits = samples()
    for tokens, found in zip(sequences, logits, strict=True):
        torch.testing.assert_close(found, step_logits(kind.prompts[1], tokens), **DECODED)
    assert sequences[0] != sequences[1]


def predictable(decoder: Any) -> None:
    """Make the next token depend mostly on the last one, so that a drafter is right now and then."""
    for layer in decoder.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data.mul_(0.02)


@pytest.mark.parametrize("drafter", ["prompt lookup", "assistant"])
def test_assisted_decoding_equals_greedy(kind: Case, drafter: str) -> None:
    tiny = kind.tiny
    predictable(language_model(tiny.model))
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if drafter == "assistant":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        helper = transformers.LlamaForCausalLM(config).eval()
        helper.generation_config.eos_token_id = helper.generation_config.pad_token_id = None
        predictable(helper.model)
        helper.model.embed_tokens.weight = tiny.model.get_input_embeddings().weight
        helper.lm_head.weight = tiny.model.lm_head.weight
        options = {"assistant_model": helper}

    def run(**more: Any) -> list[list[int]]:
        return generate(tiny.model, row_inputs(tiny, 1), max_new_tokens=28, **more)

    unpatched_or_skip(lambda: run(**options), run(), drafter)
    with vlm_budget.patch(tiny.model, Attended()) as handle, recorded(language_model(tiny.model)) as calls:
        want = run()
        alone, steps = len(calls), [item.steps for item in handle.kept()]
        assert run(**options) == want
        assert [item.steps for item in handle.kept()] == steps, "drafts behind the prompt were seen"
    assert len(calls) - alone < alone, "no draft was ever accepted: the test shows nothing"


def test_inputs_embeds_instead_of_input_ids(kind: Case) -> None:
    tiny = kind.tiny
    inputs = tiny.clone()
    with torch.no_grad():
        inputs["inputs_embeds"] = tiny.model.get_input_embeddings()(inputs.pop("input_ids"))
    unpatched_or_skip(lambda: generate(tiny.model, inputs), unpruned(kind.name), "inputs_embeds")
    with kind.patch():
        assert generate(tiny.model, inputs) == kind.pruned


@pytest.mark.parametrize("place", [0, 2])
def test_text_only_rows_in_a_batch(place: int) -> None:
    known = case("llava")
    tiny, inputs = known.tiny, known.tiny.clone()
    for name in ("input_ids", "attention_mask"):
        row = torch.zeros(1, inputs[name].shape[1], dtype=torch.long)
        row[0, -3:] = torch.tensor([17, 18, 19]) if name == "input_ids" else 1
        inputs[name] = torch.cat([inputs[name][:place], row, inputs[name][place:]])
    alone = generate(
        tiny.model, {name: inputs[name][place : place + 1, -3:] for name in ("input_ids", "attention_mask")}
    )
    with known.patch() as handle:
        tokens = generate(tiny.model, inputs)
        assert {item.row for item in handle.kept()} == {0, 1, 2} - {place}
    assert tokens.pop(place) == alone[0]
    assert tokens == known.pruned


# --- composition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATING)
def test_a_method_before_the_language_model_and_one_inside(name: str) -> None:
    known = case(name)
    tiny, mrope = known.tiny, known.full[0].multi_axis
    for positions in [None] if mrope else [None, "packed", "original"]:
        options = {} if positions is None else {"positions": positions}
        methods = [PRUNERS.get("hired")(), Scheduled()]
        with vlm_budget.patch(tiny.model, methods, 0.3, **options) as handle, torch.no_grad():
            promised = handle.plan(**tiny.clone())
            output = tiny.model.generate(**tiny.clone(), **SAMPLE, return_dict_in_generate=True)
            assert handle.report().plan == promised
            kept = handle.kept()
        assert promised.keep < promised.total
        assert promised.drop_layers == [2, 4]
        assert all(len(item.positions) == plan.keep for item, plan in zip(kept, promised.items, strict=True))
        prompts = layered(known.full, kept, not mrope and positions != "original", packed=positions == "packed")
        tokens = output.sequences[:, tiny.inputs["input_ids"].shape[1] :].tolist()
        assert tokens == [greedy(prompt, TOKENS) for prompt in prompts]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_static_cache_is_refused_before_it_holds_anything(kind: Case) -> None:
    tiny = kind.tiny
    cache = transformers.StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=200)
    with kind.patch(), pytest.raises(PatchError, match="StaticCache gives all layers the same length.*dynamic cache"):
        generate(tiny.model, tiny.clone(), past_key_values=cache)
    assert int(cache.get_seq_length()) == 0
    with kind.patch():
        assert generate(tiny.model, tiny.clone()) == kind.pruned


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_a_prompt_in_chunks_is_refused(kind: Case, chunk: int) -> None:
    unpatched_or_skip(lambda: kind.run(prefill_chunk_size=chunk), None, "prefill in chunks")
    with kind.patch(), pytest.raises(PatchError, match="needs the whole prompt at once. Pass prefill_chunk_size=None"):
        kind.run(prefill_chunk_size=chunk)
    with kind.patch():
        assert kind.run() == kind.pruned


def test_a_chunk_that_holds_the_whole_prompt_is_none(kind: Case) -> None:
    unpatched_or_skip(lambda: kind.run(prefill_chunk_size=1000), None, "prefill in chunks")
    with kind.patch():
        if FLOOR:  # there a chunk never holds the last token
            with pytest.raises(PatchError, match="needs the whole prompt at once"):
                kind.run(prefill_chunk_size=1000)
        else:
            assert kind.run(prefill_chunk_size=1000) == kind.pruned
