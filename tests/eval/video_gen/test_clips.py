"""The procedural clips: what their words say is what they show."""

import pytest
import torch

from vlm_budget.errors import OptionError
from vlm_budget.eval.video_gen.clips import (
    CELL,
    COLOURS,
    DIRECTIONS,
    VOCABULARY,
    WORDS,
    Size,
    draw_clips,
    draw_words,
    embed,
    prompt_of,
    read_prompt,
)


def drawn(words: list[int], seed: int = 0) -> torch.Tensor:
    return draw_clips(torch.tensor([words]), Size(), torch.Generator().manual_seed(seed))[0]


def test_clips_depend_on_words_and_seed_alone() -> None:
    words = draw_words(3, torch.Generator().manual_seed(1))
    first, again, other = (draw_clips(words, Size(), torch.Generator().manual_seed(seed)) for seed in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 3, 12, 40, 40)
    assert first.abs().max() <= 1


def test_the_ground_stands_still_and_is_random_from_cell_to_cell() -> None:
    clip = drawn([0, 0, 0, 0, 0, 0, 5])
    still = (clip == clip[:, :1]).all(0).all(0)  # pixels that no shape crosses
    assert still.float().mean() > 0.2
    cells = clip[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    flat = still.unfold(0, CELL, CELL).unfold(1, CELL, CELL).all(-1).all(-1)
    inside = cells[:, flat]
    assert (inside == inside[..., :1, :1]).all()  # one colour per cell
    assert inside[..., 0, 0].std(1).min() > 0.1


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_a_shape_has_its_colour(colour: int) -> None:
    others = {
        drawn([0, each, 0, 0, each, 0, 0], 4)[:, 0].mean((1, 2)) for each in range(len(COLOURS)) if each != colour
    }
    own = drawn([0, colour, 0, 0, colour, 0, 0], 4)[:, 0].mean((1, 2))
    assert all(not torch.allclose(own, other, atol=1e-3) for other in others)


@pytest.mark.parametrize("direction", range(len(DIRECTIONS)))
def test_a_shape_moves_where_its_word_says_until_it_meets_a_wall(direction: int) -> None:
    right = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        clip = draw_clips(torch.tensor([[0, 0, direction, 0, 0, direction, 5]]), Size(2), generator)[0]
        moved = (clip[:, 1] - clip[:, 0]).abs().sum(0)
        assert moved.max() > 0.1
        red = (clip[0] - clip[1] > 1.0).float()
        pixel = torch.arange(40.0)
        centre = [(frame.sum(0) @ pixel / frame.sum(), frame.sum(1) @ pixel / frame.sum()) for frame in red]
        dx, dy = (float(b - a) for a, b in zip(*centre, strict=True))
        name = DIRECTIONS[direction]
        signs = (("right" in name) - ("left" in name), ("down" in name) - ("up" in name))
        right += all(sign == 0 or sign * step > 0 for sign, step in zip(signs, (dx, dy), strict=True))
    assert right >= 5  # the others bounced


def test_prompts_are_read_back() -> None:
    words = draw_words(50, torch.Generator().manual_seed(0))
    assert all(torch.equal(read_prompt(prompt_of(each)), each) for each in words)
    assert torch.equal(
        read_prompt("A red disc moving up, the blue square moving left on a grey background"),
        read_prompt("a red disc moving up and a blue square moving left on grey"),
    )


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "a red disc moving up", "a disc red moving up and a blue square moving left on grey"]
)
def test_other_prompts_are_refused_with_what_is_known(prompt: str) -> None:
    with pytest.raises(OptionError, match="triangle.*magenta"):
        read_prompt(prompt)


def test_text_tokens_are_one_hot_and_apart_by_place() -> None:
    words = torch.tensor([[0] * 7])
    text = embed(words)
    assert text.shape == (1, 7, VOCABULARY)
    assert sum(map(len, WORDS)) == VOCABULARY
    assert text.argmax(-1).unique().numel() == 7
    assert ((text != 0).sum(-1) == 1).all()
