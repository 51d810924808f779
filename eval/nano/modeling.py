"""The model and its processor: stock HuggingFace classes, small sizes.

`LlavaNextForConditionalGeneration` with a CLIP vision tower and a Llama decoder; a 96 x 96 page becomes a 48
x 48 thumbnail and four 48 x 48 crops, that is 180 patch tokens and 12 newline tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_budget.eval.nano.data import vocabulary
from vlm_budget.eval.nano.scene import CANVAS

if TYPE_CHECKING:
    from transformers import (
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        PreTrainedTokenizerFast,
    )

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID, IMAGE_ID = range(len(SPECIAL))
VOCAB = (*SPECIAL, *vocabulary())
CROP, PATCH = CANVAS // 2, 8
SIDE = CROP // PATCH
PARTITIONS, PATCHES = 5, SIDE * SIDE
PATCH_TOKENS = PARTITIONS * PATCHES
NEWLINES = 2 * SIDE
VISUAL_TOKENS = PATCH_TOKENS + NEWLINES
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class NanoConfig:
    """Sizes of the two transformers; the defaults are the published model."""

    vision_width: int = 96
    vision_layers: int = 5
    vision_heads: int = 4
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    ratio: float = 2.0
    vision_ratio: float = 8 / 3


def build_model(config: NanoConfig = NanoConfig()) -> LlavaNextForConditionalGeneration:
    """A randomly initialised model (torch's global generator), fp32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=int(config.vision_width * config.vision_ratio),
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=CROP,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=config.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=config.text_width,
        intermediate_size=int(config.text_width * config.ratio),
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        num_key_value_heads=config.text_heads,
        max_position_embeddings=512,
        initializer_range=0.04,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=[[CANVAS, CANVAS]],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `VOCAB`."""
    return word_tokenizer(VOCAB, {"image_token": "<image>"}, 512)


def word_tokenizer(words: Sequence[str], pictures: Mapping[str, str], longest: int) -> PreTrainedTokenizerFast:
    """One token per whitespace-separated word, ``<s>`` put first, unknown words ``<unk>``.

    Args:
        words: the vocabulary in the order of its ids; it begins with ``<pad>``, ``<s>``, ``</s>``, ``<unk>``.
        pictures: names and words of the tokens that stand for pictures.
        longest: longest prompt.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(pictures),
        padding_side="left",
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> LlavaNextImageProcessor:
    """The stock image processor: bicubic thumbnail, four crops, values scaled to about [-2, 2]."""
    from transformers import LlavaNextImageProcessor

    return LlavaNextImageProcessor(
        size={"shortest_edge": CROP},
        crop_size={"height": CROP, "width": CROP},
        image_grid_pinpoints=[[CANVAS, CANVAS]],
        resample=3,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )


def build_processor() -> LlavaNextProcessor:
    """The stock processor.

    Its chat template gives the very prompt of training: ``<s> <image> what color is digit 7``.
    """
    from transformers import LlavaNextProcessor

    return LlavaNextProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
