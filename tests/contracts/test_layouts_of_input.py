"""Padding on either side, text-only prompts, mixed batches, features encoded before the call."""

from __future__ import annotations

import pytest
import torch

import vlm_budget
from tiny_parts import FLOOR, IMAGE, TEXT_INPUTS, Tiny, row_inputs
from vlm_budget import LayoutError

from .conftest import BUDGET, METHOD, TOKENS, Case
from .patched import DECODED, SAMPLE, TOLERANCE, compacted, encode, forward, generate, unpatched_or_skip
from .reference import greedy, language_model, recorded, rows


def padded(tiny: Tiny, left: int, right: int) -> dict[str, torch.Tensor]:
    """The batch with its own padding moved, and more of it on both sides."""
    valid = tiny.inputs["attention_mask"].bool()
    longest = int(valid.sum(1).max())
    inputs = tiny.clone()
    for name in TEXT_INPUTS:
        if name not in inputs:
            continue
        moved = torch.zeros(len(valid), left + longest + right, dtype=inputs[name].dtype)
        for row, mask in enumerate(valid):
            part = inputs[name][row][mask]
            start = left if right else left + longest - len(part)
            moved[row, start : start + len(part)] = part
        inputs[name] = moved
    return inputs


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 9), (5, 0)], ids=["right", "far right", "far left"])
def test_padding_on_either_side(any_case: Case, left: int, right: int) -> None:
    tiny = any_case.tiny
    inputs = padded(tiny, left, right)
    full = rows(tiny.model, inputs)
    with any_case.patch() as handle:
        found = forward(handle, inputs, full)
    packed = not full[0].multi_axis
    for columns, logits, row in zip(found.columns, found.logits, compacted(found, packed), strict=True):
        torch.testing.assert_close(logits[columns], row.logits(), **TOLERANCE)
    assert found.columns == any_case.prefill.columns


def text_only(tiny: Tiny) -> dict[str, torch.Tensor]:
    """A batch of two ragged prompts without pictures."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return inputs | {
        name: torch.zeros_like(ids) for name in ("mm_token_type_ids", "token_type_ids") if name in tiny.inputs
    }


def test_a_text_only_prompt_runs_unpruned(generating_case: Case) -> None:
    tiny = generating_case.tiny
    with torch.no_grad():
        before = tiny.model(**text_only(tiny)).logits
    tokens = generate(tiny.model, text_only(tiny))
    with generating_case.patch() as handle, torch.no_grad():
        assert torch.equal(tiny.model(**text_only(tiny)).logits, before)
        assert generate(tiny.model, text_only(tiny)) == tokens
        report = handle.report()
        assert report.text_only
        assert report.visual_tokens == report.kept_tokens == 0
        assert handle.plan(**text_only(tiny)).items == ()
        # The next prompt with pictures is pruned again.
        assert generate(tiny.model, tiny.clone()) == generating_case.pruned
        assert not handle.report().text_only


@pytest.mark.parametrize("place", [0, 2])
def test_text_only_rows_in_a_batch(generating_case: Case, place: int) -> None:
    tiny = generating_case.tiny
    inputs = tiny.clone()
    if "pixel_attention_mask" in inputs:  # Idefics3 and SmolVLM: every row has tiles, black where it has no picture
        for name in ("pixel_values", "pixel_attention_mask"):
            black = torch.zeros_like(inputs[name][:1])
            inputs[name] = torch.cat([inputs[name][:place], black, inputs[name][place:]])
    for name in TEXT_INPUTS:
        if name in inputs:
            row = torch.zeros(1, inputs[name].shape[1], dtype=inputs[name].dtype)
            if name in ("input_ids", "attention_mask"):
                row[0, -3:] = torch.tensor([17, 18, 19]) if name == "input_ids" else 1
            inputs[name] = torch.cat([inputs[name][:place], row, inputs[name][place:]])
    unpatched_or_skip(lambda: generate(tiny.model, inputs), None, "a batch with a text-only row")
    full = rows(tiny.model, inputs)
    with generating_case.patch() as handle:
        found = forward(handle, inputs, full)
        assert found.columns[place] == [0, 1, 2]
        tokens = generate(tiny.model, inputs)
        assert [item.row for item in handle.report().plan.items] == [
            item.row + (item.row >= place) for item in handle.plan(**tiny.clone()).items
        ]
    packed = not full[0].multi_axis
    assert tokens == [greedy(row, TOKENS) for row in compacted(found, packed)]


def without_pixels(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Text inputs, and the grids that positions are computed from."""
    kept = (*TEXT_INPUTS, "image_grid_thw", "video_grid_thw")
    return {name: value.clone() for name, value in tiny.inputs.items() if name in kept}


@pytest.mark.parametrize(("beams", "chunk"), [(1, None), (2, 16)])
def test_features_encoded_before_the_call_keep_their_scores(
    generating_case: Case, beams: int, chunk: int | None
) -> None:
    tiny = generating_case.tiny
    options = {"num_beams": beams} | ({} if chunk is None else {"prefill_chunk_size": chunk})

    def run() -> list[list[int]]:
        features = encode(tiny.model, tiny.inputs)
        # Encoded later, so that the last features seen are other ones.
        encode(tiny.model, {name: -v if v.is_floating_point() else v for name, v in tiny.inputs.items()})
        return generate(tiny.model, without_pixels(tiny), mm_encoder_outputs=features, **options)

    unpatched_or_skip(run, None, "features encoded before the call")
    with generating_case.patch():
        expected = generate(tiny.model, tiny.clone(), **options)
        assert run() == expected


def test_features_of_another_model_are_refused(generating_case: Case) -> None:
    tiny = generating_case.tiny
    unpatched_or_skip(lambda: encode(tiny.model, tiny.inputs), None, "features encoded before the call")
    features = encode(tiny.model, tiny.inputs)
    unpatched_or_skip(
        lambda: generate(tiny.model, without_pixels(tiny), mm_encoder_outputs=features),
        generating_case.unpruned,
        "features encoded before the call",
    )
    features = encode(tiny.model, tiny.inputs)
    with generating_case.patch(), pytest.raises(LayoutError, match="not encoded by this patched model"):
        generate(tiny.model, without_pixels(tiny), mm_encoder_outputs=features)


def test_hidden_states_come_back_in_the_callers_columns(any_case: Case) -> None:
    tiny = any_case.tiny
    if FLOOR and tiny.family == "qwen3_vl":
        pytest.skip("4.x records Qwen3-VL's hidden states outside of every hook, around the outermost forward")
    with torch.no_grad():
        before = tiny.model(**tiny.clone(), output_hidden_states=True).hidden_states
        with any_case.patch():
            output = tiny.model(**tiny.clone(), output_hidden_states=True)
    assert [h.shape for h in output.hidden_states] == [h.shape for h in before]
    valid = tiny.inputs["attention_mask"].bool()
    for index, row in enumerate(any_case.compact):
        last = output.hidden_states[-1][index][valid[index]][any_case.prefill.columns[index]]
        torch.testing.assert_close(last, row.hidden(), **DECODED)


def test_attention_maps_stay_compact(any_case: Case) -> None:
    tiny = any_case.tiny
    tiny.model.set_attn_implementation("eager")
    with any_case.patch(), recorded(language_model(tiny.model)) as calls, torch.no_grad():
        output = tiny.model(**tiny.clone(), output_attentions=True)
    length = calls[0]["inputs_embeds"].shape[1]
    assert length < tiny.inputs["input_ids"].shape[1]
    assert {tuple(map.shape[2:]) for map in output.attentions} == {(length, length)}


def test_tuple_output(any_case: Case) -> None:
    tiny = any_case.tiny
    with any_case.patch(), torch.no_grad():
        want = tiny.model(**tiny.clone()).logits
        assert torch.equal(tiny.model(**tiny.clone(), return_dict=False)[0], want)


def test_the_last_logits_alone(any_case: Case) -> None:
    tiny = any_case.tiny
    with torch.no_grad():
        shape = tiny.model(**tiny.clone(), logits_to_keep=1).logits.shape  # Qwen2-VL in 4.x gives them all
        with any_case.patch():
            want = tiny.model(**tiny.clone()).logits[:, -shape[1] :]
            torch.testing.assert_close(tiny.model(**tiny.clone(), logits_to_keep=1).logits, want, **TOLERANCE)


def test_the_inner_model_can_be_patched_alone(any_case: Case) -> None:
    tiny = any_case.tiny
    with vlm_budget.patch(tiny.model.model, METHOD, BUDGET), torch.no_grad():
        logits = tiny.model(**tiny.clone()).logits
        if all(int(mask[-1]) for mask in tiny.inputs["attention_mask"]):
            assert generate(tiny.model, tiny.clone()) == any_case.pruned
    valid = tiny.inputs["attention_mask"].bool()
    for part, mask, want in zip(logits, valid, any_case.prefill.logits, strict=True):
        assert torch.equal(part[mask], want)


def test_positional_input_ids(llava_case: Case) -> None:
    tiny = llava_case.tiny
    inputs = tiny.clone()
    ids = inputs.pop("input_ids")
    with llava_case.patch(), torch.no_grad():
        sequences = tiny.model.generate(ids, **inputs, **SAMPLE)
        named = tiny.model.generate(inputs=ids, **inputs, **SAMPLE, prefill_chunk_size=None)
    assert sequences[:, ids.shape[1] :].tolist() == named[:, ids.shape[1] :].tolist() == llava_case.pruned


def test_a_prompt_without_an_attention_mask(generating_case: Case) -> None:
    tiny = generating_case.tiny
    inputs = row_inputs(tiny, 0)
    inputs.pop("attention_mask")
    unpatched_or_skip(lambda: generate(tiny.model, inputs)[0], generating_case.unpruned[0], "no attention mask")
    with generating_case.patch(), torch.no_grad():
        logits = tiny.model(**inputs).logits[0]
        assert generate(tiny.model, inputs)[0] == generating_case.pruned[0]
    columns = generating_case.prefill.columns[0]
    torch.testing.assert_close(logits[columns], generating_case.compact[0].logits(), **TOLERANCE)
    assert IMAGE in inputs["input_ids"] or "pixel_values_videos" in inputs
