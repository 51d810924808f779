"""Every way of generating gives what the reference gives on hand-compacted prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from tiny_parts import IMAGE, Tiny, row_inputs

from .conftest import TOKENS, Case
from .patched import DECODED, generate, unpatched_or_skip
from .reference import Row, greedy, step_logits


def check_same_tokens(case: Case, what: str, **options: Any) -> None:
    """A mode that must not change the tokens does not change them."""
    model = case.tiny.model
    unpatched_or_skip(lambda: generate(model, case.tiny.clone(), **options), case.unpruned, what)
    with case.patch() as handle:
        assert generate(model, case.tiny.clone(), **options) == case.pruned
        assert handle.report().plan == handle.plan(**case.tiny.clone())


def test_the_reference_is_right_about_the_unpatched_model(generating_case: Case) -> None:
    assert generate(generating_case.tiny.model, generating_case.tiny.clone()) == generating_case.unpruned
    assert generating_case.unpruned != generating_case.pruned


def test_greedy(generating_case: Case) -> None:
    check_same_tokens(generating_case, "greedy")


def test_without_a_cache(generating_case: Case) -> None:
    check_same_tokens(generating_case, "use_cache=False", use_cache=False)


def test_static_cache(generating_case: Case) -> None:
    check_same_tokens(generating_case, "static cache", cache_implementation="static")


@pytest.mark.parametrize("chunk", [7, 63])
def test_chunked_prefill(generating_case: Case, chunk: int) -> None:
    check_same_tokens(generating_case, f"prefill in chunks of {chunk}", prefill_chunk_size=chunk)


def test_dict_output_and_last_logits_only(generating_case: Case) -> None:
    check_same_tokens(generating_case, "dict output", return_dict_in_generate=True, output_logits=True)


def test_repetition_penalty(generating_case: Case) -> None:
    tiny = generating_case.tiny
    ids = tiny.inputs["input_ids"].tolist()
    with generating_case.patch():
        tokens = generate(tiny.model, tiny.clone(), repetition_penalty=1.5)
    assert tokens == [greedy(row, TOKENS, 1.5, seen) for row, seen in zip(generating_case.compact, ids, strict=True)]


def beams(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[list[list[int]], torch.Tensor]:
    """Sequences (three beams per prompt, best first) and their scores."""
    with torch.no_grad():
        output = model.generate(
            **inputs,
            **{"max_new_tokens": TOKENS, "do_sample": False, "num_beams": 3, "num_return_sequences": 3},
            **options,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output.sequences_scores


def score(row: Row, tokens: list[int]) -> float:
    """Mean log-probability of a continuation: what beam search ranks by."""
    chosen = step_logits(row, tokens).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
    return float(chosen.mean())


def check_beams(rows: list[Row], found: tuple[list[list[int]], torch.Tensor]) -> None:
    sequences, scores = found
    want = [score(rows[index // 3], tokens) for index, tokens in enumerate(sequences)]
    torch.testing.assert_close(scores, torch.tensor(want), **DECODED)
    assert len({tuple(tokens) for tokens in sequences}) == len(sequences)


@pytest.mark.parametrize("chunk", [None, 16])
def test_beam_search_scores_are_those_of_the_reference(generating_case: Case, chunk: int | None) -> None:
    tiny = generating_case.tiny
    options = {} if chunk is None else {"prefill_chunk_size": chunk}

    def unpatched() -> None:
        check_beams(generating_case.full, beams(tiny.model, tiny.clone(), **options))

    unpatched_or_skip(unpatched, None, "beam search over prompts of several images")
    with generating_case.patch() as handle:
        check_beams(generating_case.compact, beams(tiny.model, tiny.clone(), **options))
        assert handle.report().plan == handle.plan(**tiny.clone())


def test_beam_search_over_one_image(generating_case: Case) -> None:
    tiny, inputs = generating_case.tiny, row_inputs(generating_case.tiny, 1)
    unpatched_or_skip(lambda: check_beams(generating_case.full[1:], beams(tiny.model, inputs)), None, "beam search")
    with generating_case.patch() as handle:
        check_beams(generating_case.compact[1:], beams(tiny.model, row_inputs(tiny, 1)))
        assert handle.report().plan == handle.plan(**row_inputs(tiny, 1))


def samples(model: Any, inputs: dict[str, Any]) -> tuple[list[list[int]], torch.Tensor]:
    """Two sampled sequences per prompt, with the [N, tokens, V] logits they were drawn from."""
    torch.manual_seed(7)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            num_return_sequences=2,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(output.logits, 1)


def check_samples(rows: list[Row], found: tuple[list[list[int]], torch.Tensor]) -> None:
    sequences, logits = found
    for index, tokens in enumerate(sequences):
        torch.testing.assert_close(logits[index], step_logits(rows[index // 2], tokens), **DECODED)
    assert sequences[0] != sequences[1]


def test_sampling_of_several_sequences(generating_case: Case) -> None:
    tiny = generating_case.tiny
    unpatched_or_skip(
        lambda: check_samples(generating_case.full, samples(tiny.model, tiny.clone())),
        None,
        "several sequences per prompt of several images",
    )
    with generating_case.patch():
        check_samples(generating_case.compact, samples(tiny.model, tiny.clone()))


def test_sampling_is_reproducible_by_seed(generating_case: Case) -> None:
    tiny = generating_case.tiny
    unpatched_or_skip(lambda: samples(tiny.model, row_inputs(tiny, 1)), None, "several sequences per prompt")
    with generating_case.patch():
        first, second = (samples(tiny.model, row_inputs(tiny, 1)) for _ in range(2))
    assert first[0] == second[0]
    check_samples(generating_case.compact[1:], first)


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.parts.append([])


def test_streaming(generating_case: Case) -> None:
    inputs, streamer = row_inputs(generating_case.tiny, 0), Collector()
    with generating_case.patch():
        generate(generating_case.tiny.model, inputs, streamer=streamer)
    prompt, *tokens, end = streamer.parts
    assert prompt == inputs["input_ids"][0].tolist()
    assert [token for (token,) in tokens] == generating_case.pruned[0]
    assert end == []


def test_generated_placeholders_are_plain_tokens(generating_case: Case) -> None:
    # A model may sample the placeholder's id; it brings no picture, and nothing may be dropped for it.
    tiny = generating_case.tiny
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False}

    def logits() -> torch.Tensor:
        with torch.no_grad():
            output = tiny.model.generate(**tiny.clone(), **options, prefix_allowed_tokens_fn=lambda *_: [IMAGE])
        assert output.sequences[:, -4:].eq(IMAGE).all()
        return torch.stack(output.logits, 1)

    unpatched_or_skip(logits, None, "a generated placeholder")
    with generating_case.patch():
        found = logits()
    for row, part in zip(generating_case.compact, found, strict=True):
        torch.testing.assert_close(part, step_logits(row, [IMAGE] * 4), **DECODED)


def embedded(tiny: Tiny, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with text embeddings, placeholders included, in place of token ids."""
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = tiny.model.get_input_embeddings()(ids)
    return {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": embeds}


def test_inputs_embeds_instead_of_input_ids(generating_case: Case) -> None:
    tiny = generating_case.tiny
    unpatched_or_skip(
        lambda: generate(tiny.model, embedded(tiny, tiny.clone())), generating_case.unpruned, "inputs_embeds"
    )
    with generating_case.patch() as handle:
        assert generate(tiny.model, embedded(tiny, tiny.clone())) == generating_case.pruned
        assert handle.report().plan == handle.plan(**tiny.clone())
