"""The model and its processor: stock HuggingFace classes, small sizes.

`LlavaOnevisionForConditionalGeneration` with a SigLIP vision tower and a Qwen2 decoder. A picture of 48 x 48
becomes 6 x 6 tokens and one newline when several stand in a prompt; a frame of a video is pooled to 3 x 3
tokens by the model itself, and one newline ends the video.

The language model reads the tower's last layer but one: transformers 4.57 hands out the last one normalised
and 5.x raw, so that no checkpoint reading it could give the same logits in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_budget.eval.nano.modeling import word_tokenizer
from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.world import SIZE

if TYPE_CHECKING:
    from transformers import (
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID, IMAGE_ID, VIDEO_ID = range(len(SPECIAL))
VOCAB = (*SPECIAL, *dict.fromkeys((*rooms.vocabulary(), *clips.vocabulary())))
PATCH = 8
SIDE = SIZE // PATCH
PATCHES = SIDE * SIDE
VIEW_TOKENS = PATCHES + 1
POOLED_SIDE = -(-SIDE // 2)
FRAME_TOKENS = POOLED_SIDE**2
LAYER = -2
MEAN, STD = 0.5, 0.25
MAX_POSITIONS = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}<video>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class ViewsConfig:
    """Sizes of the two transformers; the defaults are the published model."""

    vision_width: int = 96
    vision_layers: int = 5
    vision_heads: int = 4
    vision_ratio: float = 8 / 3
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_ratio: float = 2.0


def build_model(config: ViewsConfig = ViewsConfig()) -> LlavaOnevisionForConditionalGeneration:
    """A randomly initialised model (torch's global generator), fp32."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=int(config.vision_width * config.vision_ratio),
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(VOCAB),
        hidden_size=config.text_width,
        intermediate_size=int(config.text_width * config.text_ratio),
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        num_key_value_heads=config.text_heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.04,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_grid_pinpoints=[[SIZE, SIZE]],
            vision_feature_layer=LAYER,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `VOCAB`."""
    return word_tokenizer(VOCAB, {"image_token": "<image>", "video_token": "<video>"}, MAX_POSITIONS)


def build_image_processor() -> LlavaOnevisionImageProcessor:
    """The stock image processor, values scaled to [-2, 2]; a 48 x 48 picture among several is not resampled."""
    from transformers import LlavaOnevisionImageProcessor

    return LlavaOnevisionImageProcessor(
        size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[[SIZE, SIZE]],
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )


def build_video_processor() -> LlavaOnevisionVideoProcessor:
    """The stock video processor with the same scaling; it samples no frames."""
    from transformers import LlavaOnevisionVideoProcessor

    return LlavaOnevisionVideoProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


def build_processor() -> LlavaOnevisionProcessor:
    """The stock processor; its chat template gives the very prompt of training: ``<s>``, pictures, question."""
    from transformers import LlavaOnevisionProcessor

    return LlavaOnevisionProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        video_processor=build_video_processor(),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
