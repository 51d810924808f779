"""Prompts name exactly the frames that are shown."""

import pytest

from tiny_processors import onevision_processor, qwen_processor
from vlm_budget.errors import OptionError
from vlm_budget.video.frames.prompting import frames_text, stamp, time_instruction, video_text


def test_the_instruction_counts_the_frames_and_tells_their_times() -> None:
    told = time_instruction([0.0, 1.504, 12.25], 60.0)
    assert told == "The video lasts 60.00 seconds. 3 frames of it are given in order, shown at 0.00s, 1.50s, 12.25s."
    assert time_instruction([3.0]) == "1 frame of it is given, shown at 3.00s."


def test_a_video_prompt_holds_one_video_and_the_question_last() -> None:
    text = video_text(onevision_processor(), "what is it?", [1.0, 2.0], 4.0)
    assert text.count("<video>") == 1
    assert text.startswith("<video>The video lasts 4.00 seconds. 2 frames") and text.endswith("\nwhat is it?")
    assert video_text(onevision_processor(), "what is it?") == "<video>what is it?"


@pytest.mark.parametrize("template", [True, False])
def test_every_picture_stands_behind_its_time(template: bool) -> None:
    processor = qwen_processor()
    if not template:
        processor.chat_template = None
    text = frames_text(processor, "what?", 2, [0.5, 61.25])
    first, second = text.index("<0.5 seconds>"), text.index(stamp(61.25))
    pads = [place for place in range(len(text)) if text.startswith("<|image_pad|>", place)]
    assert len(pads) == 2 and first < pads[0] < second < pads[1]
    assert text.endswith("what?")


def test_without_times_nothing_is_said_of_them() -> None:
    text = frames_text(qwen_processor(), "what?", 3)
    assert text.count("<|image_pad|>") == 3 and "seconds" not in text
    assert "seconds" not in frames_text(qwen_processor("Qwen3VL"), "what?", 1, [1.0], "video", stamps=False)


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
def test_questions_with_picture_tokens_are_refused(mark: str) -> None:
    for make in (lambda: frames_text(qwen_processor(), f"a {mark}", 1), lambda: video_text(qwen_processor(), mark)):
        with pytest.raises(OptionError, match="stands for a picture"):
            make()
