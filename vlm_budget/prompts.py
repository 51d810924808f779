"""A question and its pictures as a model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


def image_token(processor: Any, kind: str = "image") -> str:
    """The text that stands for one picture (or one ``"video"``) in a prompt."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, f"{kind}_token", None)
        if token is not None:
            return str(token)
    return f"<{kind}>"


def prompt_text(processor: Any, question: str, images: int, kind: str = "image") -> str:
    """The prompt as the model was trained to see it.

    A question that holds the image token already is taken as the whole prompt. Otherwise the processor's chat template
    is used; where there is none, one image token per picture goes in front.

    Args:
        processor: The model's processor.
        question: The question.
        images: Number of pictures, or of videos.
        kind: ``"image"`` or ``"video"``.
    """
    token = image_token(processor, kind)
    if token in question:
        return question
    if getattr(processor, "chat_template", None):
        content = [{"type": kind}] * images + [{"type": "text", "text": question}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    return token * images + question


def build_inputs(
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    model: Any,
    videos: bool = False,
) -> Any:
    """Model inputs for a batch of questions, each about its pictures.

    Args:
        processor: The model's processor.
        questions: One per prompt.
        images: Per prompt, its pictures.
        model: The model, for device and number format.
        videos: Each prompt's pictures are the frames of one video.

    Returns:
        The processor's tensors, padded on the left, on the model's device and in its number format.
    """
    kind = "video" if videos else "image"
    counts = [1 if videos else len(own) for own in images]
    texts = [prompt_text(processor, question, n, kind) for question, n in zip(questions, counts, strict=True)]
    return encode_prompts(processor, texts, images, model, videos)


def encode_prompts(
    processor: Any, texts: Sequence[str], images: Sequence[Any], model: Any, videos: bool = False
) -> Any:
    """Model inputs for whole prompts, as the model was trained to see them.

    Args:
        processor: The model's processor.
        texts: One per prompt, image tokens included.
        images: Per prompt, its pictures; of a video its frames, one by one or as one array.
        model: The model, for device and number format.
        videos: Each prompt's pictures are the frames of one video.

    Returns:
        The processor's tensors, padded on the left, on the model's device and in its number format.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    # A template that writes the start token itself must not get a second one.
    start = getattr(tokenizer, "bos_token", None)
    twice = start is not None and all(text.startswith(start) for text in texts)
    options: dict[str, Any] = {"padding": True} if len(texts) > 1 else {}
    if twice:
        options["add_special_tokens"] = False
    if videos:
        options["videos"] = list(images)
    elif any(images):
        options["images"] = [list(own) for own in images]
    return processor(text=texts, return_tensors="pt", **options).to(model.device, model.dtype)
