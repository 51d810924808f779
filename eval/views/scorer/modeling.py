"""The model and its tokenizer: open_clip's own classes, small sizes, and a folder that open_clip loads by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_budget.eval.views.scorer.captions import WORDS
from vlm_budget.eval.views.world import SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS = "open_clip_model.safetensors"
MEAN = STD = 0.5
SPECIAL = ("<pad>", "<unk>", "<start>")
PAD_ID, UNK_ID, START_ID = range(len(SPECIAL))
# open_clip reads a text at its largest token id: the end comes last.
VOCAB = (*SPECIAL, *WORDS, "<end>")
END_ID = len(VOCAB) - 1
MODEL: dict[str, Any] = {
    "embed_dim": 96,
    "init_logit_scale": 2.3,
    "init_logit_bias": -3.0,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": 8,
        "layers": 4,
        "width": 96,
        "head_width": 24,
        "mlp_ratio": 3.0,
        "pool_type": "tok",
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": len(VOCAB),
        "hf_tokenizer_name": "tokenizer",  # any name: a local folder's own tokenizer is read
        "width": 64,
        "heads": 4,
        "layers": 2,
        "pad_id": PAD_ID,
        "pool_type": "argmax",
    },
}


def build_model() -> Any:
    """A randomly initialised ``open_clip.CLIP`` (torch's global generator), fp32."""
    from open_clip.model import CLIP

    return CLIP(**MODEL)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per known word, whatever its case and the punctuation about it; other words are ``<unk>``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\W_]+"), "removed")
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START_ID), ("<end>", END_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=MODEL["text_cfg"]["context_length"],
        model_input_names=["input_ids"],
        clean_up_tokenization_spaces=False,
    )


def tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Token ids as open_clip's tokenizer of the saved folder gives them: int64 ``[T, 16]``."""
    length = MODEL["text_cfg"]["context_length"]
    return tokenizer(texts, return_tensors="pt", max_length=length, padding="max_length", truncation=True).input_ids


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, S, S, 3]`` as the model reads them: float32 ``[B, 3, S, S]``."""
    return (pictures.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def save(model: Any, folder: Path) -> None:
    """Write configuration, weights (fp16; open_clip loads them as fp32) and tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": MODEL,
        "preprocess_cfg": {
            "size": SIZE,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    build_tokenizer().save_pretrained(folder)
    # transformers 5 writes a class name of its own; this one both 4.57 and 5 know.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
