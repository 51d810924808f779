import numpy as np
import pytest
import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from vlm_budget.eval.nano import data, packing
from vlm_budget.eval.nano.dropout import TiltedDropout
from vlm_budget.eval.nano.labels import BACKGROUND, MARK_KIND, NO_COLOR, SUMMARY, scene_labels
from vlm_budget.eval.nano.modeling import VISUAL_TOKENS, VOCAB, build_model, build_processor
from vlm_budget.eval.nano.scene import make_scene
from vlm_budget.eval.statistics import clustered

Pair = tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    return build_model().eval(), build_processor()


@pytest.fixture(scope="module")
def samples() -> list[data.Sample]:
    return data.test_set(3, 77)


def visual_tokens(pair: Pair, samples: list[data.Sample]) -> torch.Tensor:
    pixels = packing.partitions([sample.scene for sample in samples])
    return packing.project(pair[0], packing.vision_features(pair[0], pixels))


def chat(processor: LlavaNextProcessor, sample: data.Sample, prompt: str) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "image": sample.image}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_chat_template_gives_the_prompt_of_training(pair: Pair, samples: list[data.Sample]) -> None:
    ids = chat(pair[1], samples[0], "what color is digit 7")["input_ids"][0]
    words = [VOCAB[i] for i in ids]
    assert words == ["<s>", *["<image>"] * VISUAL_TOKENS, "what", "color", "is", "digit", "7"]


@torch.no_grad()
def test_packed_logits_equal_the_stock_forward(pair: Pair, samples: list[data.Sample]) -> None:
    model, processor = pair
    tokens = packing.encode([sample.questions for sample in samples])
    slots = packing.ALL_SLOTS.expand(len(samples), -1)
    packed = packing.answer_logits(model, visual_tokens(pair, samples), slots, tokens)
    for row, sample in enumerate(samples):
        for column, question in enumerate(sample.questions):
            inputs = chat(processor, sample, question.prompt)
            alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(packed[row, column, 0], alone, atol=1e-4, rtol=0)
            answer = tokens[row, column, -1:][None]
            ids = torch.cat([inputs.pop("input_ids"), answer], 1)
            end = model(input_ids=ids, **inputs | {"attention_mask": torch.ones_like(ids)}).logits[0, -1]
            torch.testing.assert_close(packed[row, column, 1], end, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("renumber", [False, True])
def test_packed_logits_of_kept_tokens_equal_a_hand_made_sequence(
    pair: Pair, samples: list[data.Sample], renumber: bool
) -> None:
    model, _ = pair
    visual, tokens = visual_tokens(pair, samples)[:1], packing.encode([samples[0].questions])
    slots = torch.tensor([[0, 5, 37, 48, 100, 191]])
    kept = visual[:, slots[0]]
    packed = packing.answer_logits(model, kept, slots, tokens, renumber)
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(torch.tensor([[1]])), kept, embed(tokens[:, 2, :-1])], 1)
    places = torch.arange(6)[None] if renumber else slots
    first = 7 if renumber else 193
    positions = torch.cat([torch.zeros(1, 1, dtype=torch.long), places + 1, torch.arange(first, first + 5)[None]], 1)
    hidden = model.model.language_model(inputs_embeds=inputs, position_ids=positions).last_hidden_state
    torch.testing.assert_close(packed[0, 2, 0], model.lm_head(hidden)[0, -1], atol=1e-4, rtol=0)


def test_slots_cover_the_visual_tokens_once() -> None:
    both = torch.cat([packing.PATCH_SLOTS, packing.NEWLINE_SLOTS])
    assert both.sort().values.tolist() == list(range(VISUAL_TOKENS))


def test_partitions_are_the_processors_pixel_values(pair: Pair, samples: list[data.Sample]) -> None:
    expected = pair[1].image_processor(images=samples[0].image, return_tensors="pt")["pixel_values"]
    pixels = packing.normalise(packing.partitions([samples[0].scene]))
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_dropout_repeats_with_its_generator_and_keeps_order() -> None:
    features = torch.randn(3, 180, 16)
    seen_full = seen_newlines = False
    for seed in range(30):
        slots, renumber = TiltedDropout().draw(features, torch.Generator().manual_seed(seed))
        again = TiltedDropout().draw(features, torch.Generator().manual_seed(seed))
        assert torch.equal(slots, again[0]) and renumber == again[1]
        assert (slots.diff(dim=1) > 0).all()
        kept = slots.shape[1]
        seen_full |= kept == VISUAL_TOKENS
        if kept < VISUAL_TOKENS:
            newlines = torch.isin(slots, packing.NEWLINE_SLOTS).sum(1)
            assert newlines.tolist() in ([0] * 3, [12] * 3)
            seen_newlines |= newlines[0].item() == 12
    assert seen_full and seen_newlines


def test_patch_labels_say_what_lies_on_the_patch() -> None:
    scene = make_scene(np.random.default_rng(1), "distractor")
    kind, color, summary = scene_labels(scene)
    assert summary.shape == (5, SUMMARY)
    assert ((kind == BACKGROUND) == (color == NO_COLOR)).all()
    assert (kind == MARK_KIND).any()
    for item in scene.items:
        column, row = item.x // 16, item.y // 16
        near = kind[0].reshape(6, 6)[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        assert item.digit in near
        assert summary[0, item.digit] == summary[0, 10 + item.color] == 1


def test_standard_error_is_clustered_by_image() -> None:
    right = np.array([[True, True], [False, False]] * 50)
    row = clustered(right, np.ones_like(right))
    assert row["mean"] == 0.5
    assert row["se"] == pytest.approx(0.5 / 99**0.5, abs=1e-3)
