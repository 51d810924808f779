import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from vlm_budget.eval.views import clips, dropout, packing, rooms, shards
from vlm_budget.eval.views.modeling import FRAME_TOKENS, VIEW_TOKENS, VOCAB, ViewsConfig, build_model, build_processor
from vlm_budget.eval.views.questions import Question

Pair = tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]
SMALL = ViewsConfig(vision_width=32, vision_layers=3, vision_heads=2, text_width=32, text_layers=2, text_heads=2)
FRAMES = 6


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    return build_model(SMALL).eval(), build_processor()


@pytest.fixture(scope="module")
def room() -> rooms.RoomSample:
    return rooms.test_set(1, 77, 3)[0]


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, tuple[Question, ...]]:
    sample = clips.test_set(1, 78, 3)[0]
    return np.stack([sample.scene.frame(i).pixels for i in clips.evenly(FRAMES)]), sample.questions


def features(pair: Pair, pictures: np.ndarray) -> torch.Tensor:
    return packing.tower_features(pair[0], torch.from_numpy(pictures))[None]


def pictures_of(room: rooms.RoomSample) -> np.ndarray:
    return np.stack([picture.pixels for picture in room.scene.pictures])


def chat(processor: LlavaOnevisionProcessor, content: list[dict], prompt: str) -> dict[str, torch.Tensor]:
    message = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def room_chat(processor: LlavaOnevisionProcessor, room: rooms.RoomSample, prompt: str) -> dict[str, torch.Tensor]:
    views = [{"type": "image", "image": Image.fromarray(view)} for view in pictures_of(room)]
    return chat(processor, views, prompt)


def clip_chat(processor: LlavaOnevisionProcessor, frames: np.ndarray, prompt: str) -> dict[str, torch.Tensor]:
    return processor(text=f"<video> {prompt}", videos=[[*frames]], return_tensors="pt")


def test_chat_template_gives_the_prompt_of_training(pair: Pair, room: rooms.RoomSample) -> None:
    words = [VOCAB[i] for i in room_chat(pair[1], room, "what is the color of the cone")["input_ids"][0]]
    assert words == ["<s>", *["<image>"] * (12 * VIEW_TOKENS), *["what", "is", "the", "color", "of", "the", "cone"]]


def test_a_video_is_pooled_frames_and_one_newline(pair: Pair, clip: tuple[np.ndarray, tuple[Question, ...]]) -> None:
    words = [VOCAB[i] for i in clip_chat(pair[1], clip[0], "which thing comes first cone or ball")["input_ids"][0]]
    assert words[:-7] == ["<s>", *["<video>"] * (FRAMES * FRAME_TOKENS + 1)]


def test_pixels_are_those_of_the_processors(
    pair: Pair, room: rooms.RoomSample, clip: tuple[np.ndarray, tuple[Question, ...]]
) -> None:
    given = room_chat(pair[1], room, "what")["pixel_values"][:, 0]
    torch.testing.assert_close(packing.normalise(torch.from_numpy(pictures_of(room))), given, atol=1e-5, rtol=0)
    given = clip_chat(pair[1], clip[0], "what")["pixel_values_videos"][0]
    torch.testing.assert_close(packing.normalise(torch.from_numpy(clip[0])), given, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("task", shards.TASKS)
def test_packed_logits_equal_the_stock_forward(
    pair: Pair, room: rooms.RoomSample, clip: tuple[np.ndarray, tuple[Question, ...]], task: str
) -> None:
    model, processor = pair
    pictures, questions = (pictures_of(room), room.questions) if task == "rooms" else clip
    tokens = torch.tensor([[shards.encode(question) for question in questions]])
    packed = packing.answer_logits(model, packing.PREFIX[task](model, features(pair, pictures)), tokens)
    for column, question in enumerate(questions):
        if task == "rooms":
            inputs = room_chat(processor, room, question.prompt)
        else:
            inputs = clip_chat(processor, pictures, question.prompt)
        torch.testing.assert_close(packed[0, column, 0], model(**inputs).logits[0, -1], atol=1e-4, rtol=0)
        ids = torch.cat([inputs.pop("input_ids"), tokens[:, column, -1:]], 1)
        end = model(input_ids=ids, **inputs | {"attention_mask": torch.ones_like(ids)}).logits[0, -1]
        torch.testing.assert_close(packed[0, column, 1], end, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("renumber", [False, True])
def test_packed_logits_of_kept_tokens_equal_a_hand_made_sequence(
    pair: Pair, room: rooms.RoomSample, renumber: bool
) -> None:
    model, _ = pair
    full = packing.room_prefix(model, features(pair, pictures_of(room)))
    slots = torch.tensor([[0, 5, 36, 37, 200, 443]])
    tokens = torch.tensor([[shards.encode(question) for question in room.questions]])
    packed = packing.answer_logits(model, full.keep(slots, renumber), tokens)
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(torch.tensor([[1]])), full.visual[:, slots[0]], embed(tokens[:, 2, :-1])], 1)
    places = torch.arange(6)[None] if renumber else slots
    first = 7 if renumber else 445
    positions = torch.cat([torch.zeros(1, 1, dtype=torch.long), places + 1, torch.arange(first, first + 7)[None]], 1)
    hidden = model.model.language_model(inputs_embeds=inputs, position_ids=positions).last_hidden_state
    torch.testing.assert_close(packed[0, 2, 0], model.lm_head(hidden)[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("task", shards.TASKS)
def test_resizing_to_the_models_own_resolution_changes_nothing(
    pair: Pair, room: rooms.RoomSample, clip: tuple[np.ndarray, tuple[Question, ...]], task: str
) -> None:
    seen = features(pair, pictures_of(room) if task == "rooms" else clip[0])
    full = packing.PREFIX[task](pair[0], seen)
    size = dropout.SIZES.index((6, 6) if task == "rooms" else (3, 3))
    sizes = torch.full(seen.shape[:2], size)
    for renumber in (False, True):
        again = dropout.resize(pair[0], task, seen, sizes, renumber=renumber)
        torch.testing.assert_close(again.visual, full.visual, atol=1e-5, rtol=0)
        assert torch.equal(again.places, full.places) and again.length == full.length


@torch.no_grad()
def test_a_resized_room_has_its_tokens_in_order_and_in_place(pair: Pair, room: rooms.RoomSample) -> None:
    seen = features(pair, pictures_of(room))
    sizes = torch.zeros(1, 12, dtype=torch.long)
    sizes[0, 3], sizes[0, 5] = dropout.SIZES.index((1, 2)), dropout.SIZES.index((2, 2))
    prefix = dropout.resize(pair[0], "rooms", seen, sizes, renumber=False)
    assert prefix.places.tolist() == [[3 * 37 + i for i in (19, 22, 36)] + [5 * 37 + i for i in (7, 10, 25, 28, 36)]]
    assert prefix.length == 444
    projected = pair[0].model.multi_modal_projector(seen)[0, 5].view(6, 6, -1)
    middle = projected[1:2, 1:2].mean((0, 1))  # bilinear, no antialias: the pixel under the cell's centre
    torch.testing.assert_close(prefix.visual[0, 3], middle, atol=1e-5, rtol=0)
    newline = pair[0].model.image_newline
    assert torch.equal(prefix.visual[0, 2], newline) and torch.equal(prefix.visual[0, 7], newline)
    bare = dropout.resize(pair[0], "rooms", seen, sizes, separators=False)
    assert bare.visual.shape[1] == 6 and bare.length == 6


@torch.no_grad()
@pytest.mark.parametrize("task", shards.TASKS)
def test_budgets_repeat_with_their_generator_and_keep_order(pair: Pair, task: str) -> None:
    seen = torch.randn(2, 12 if task == "rooms" else 16, 36, SMALL.vision_width)
    budget, kinds = dropout.RandomBudget(), set()
    for seed in range(40):
        drawn = budget.draw(pair[0], task, seen, torch.Generator().manual_seed(seed))
        again = budget.draw(pair[0], task, seen, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn.prefix.visual, again.prefix.visual)
        assert torch.equal(drawn.prefix.places, again.prefix.places)
        steps = drawn.prefix.places.diff(dim=1)
        assert (steps >= 0 if drawn.kind == "resized" else steps > 0).all()
        assert 0 < drawn.prefix.places.shape[1] <= 460
        assert (drawn.prefix.places < drawn.prefix.length).all()
        kinds.add(drawn.kind)
    assert kinds == {"whole", "dropped", "resized"}
