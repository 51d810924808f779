"""CDPruner: a determinantal point process over relevance and similarity; relevance by the language model or by CLIP."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Context
from vlm_budget.pruners.cdpruner import CDPruner, ClipRelevance

WORDS = ["<s>", "</s>", "<pad>", *(f"w{number}" for number in range(60))]
WIDTH, LENGTH = 16, 12
ITEMS = [make.single(1), make.single(3, 5), make.anyres(1, 2, side=2, pad=(0, 1)), make.frames(2, 2, 3)]


def words(*order: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(order)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "bos_token_id": 61, "eos_token_id": 62}
    config = CLIPConfig(
        text_config={**tower, **text, "hidden_size": 8},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    model = CLIPModel(config).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight, 1.0, 0.5)
    return model


# In the two vocabularies, the same word has another number: ids must go through the text.
LANGUAGE, CLIPS = words(*WORDS), words(*reversed(WORDS))


def asked(item: VisualItem, *ids: int) -> Context:
    return replace(make.context(item, width=WIDTH), text_ids=torch.tensor(ids or (5, 9, 30)))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def slowly(ctx: Context, relevance: list[float], k: int, theta: float | None = None) -> list[int]:
    """Scaled relevance, the kernel, and every determinant anew."""
    tokens = ctx.item.candidates.tolist()
    low, high = min(relevance), max(relevance)
    scaled = [(value - low) / (high - low) if high > low else 1.0 for value in relevance]
    if theta is not None:
        scaled = [math.exp(theta / (2 * (1 - theta)) * value) for value in scaled]
    similar = [[cosine(ctx.features[a], ctx.features[b]) for b in tokens] for a in tokens]
    kernel = (
        torch.tensor(scaled).double().diag() @ torch.tensor(similar).double() @ torch.tensor(scaled).double().diag()
    )
    chosen: list[int] = []
    while len(chosen) < k:
        left = [place for place in range(len(tokens)) if place not in chosen]
        among = [torch.tensor([*chosen, place]) for place in left]
        found = [float(torch.linalg.det(kernel[each][:, each])) for each in among]
        chosen.append(left[found.index(max(found))])
    return sorted(tokens[place] for place in chosen)


def by_language_model(ctx: Context) -> list[float]:
    assert ctx.text is not None
    tokens = ctx.item.candidates.tolist()
    return [sum(cosine(ctx.features[token], word) for word in ctx.text) / len(ctx.text) for token in tokens]


def by_clip(ctx: Context, model: CLIPModel, chunks: list[list[int]]) -> list[float]:
    """Minus the mean cosine of the projected patch to the chunks' text embeddings, one token at a time."""
    assert ctx.hidden is not None
    texts = []
    for chunk in chunks:
        ids = torch.tensor([[CLIPS.bos_token_id, *chunk, CLIPS.eos_token_id]])
        pooled = model.text_model(input_ids=ids).pooler_output
        texts.append(model.text_projection(pooled)[0])
    result = []
    for token in ctx.item.candidates.tolist():
        patch = model.visual_projection(model.vision_model.post_layernorm(ctx.hidden[token]))
        result.append(-sum(cosine(patch, text) for text in texts) / len(texts))
    return result


def in_clip(*ids: int) -> list[int]:
    return [len(WORDS) - 1 - number for number in ids]


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [None, 0, 0.5, 0.9])
@pytest.mark.parametrize("item", ITEMS, ids=["1", "15", "8 and separators", "2 x 6"])
def test_the_choice_is_the_formulas_with_the_language_models_relevance(item: VisualItem, theta: float | None) -> None:
    ctx = asked(item)
    candidates = len(item.candidates)
    for k in {1, candidates // 3 or 1, candidates - 1 or 1, candidates}:
        kept = CDPruner(theta=theta).select(ctx, k).keep.tolist()
        assert kept == slowly(ctx, by_language_model(ctx), k, theta)


@pytest.mark.parametrize("item", ITEMS, ids=["1", "15", "8 and separators", "2 x 6"])
def test_the_choice_is_the_formulas_with_clips_relevance(item: VisualItem) -> None:
    model = clip()
    ctx, pruner = asked(item, 5, 9, 30), CDPruner(relevance=ClipRelevance(model, CLIPS, LANGUAGE))
    with torch.no_grad():
        relevance = by_clip(ctx, model, [in_clip(5, 9, 30)])
    candidates = len(item.candidates)
    for k in {1, candidates // 3 or 1, candidates - 1 or 1, candidates}:
        assert pruner.select(ctx, k).keep.tolist() == slowly(ctx, relevance, k)


def test_what_the_instruction_names_is_chosen_first() -> None:
    ctx = asked(make.single(4))
    for wanted in (3, 11):
        named = replace(ctx, text=ctx.features[wanted : wanted + 1].clone())
        assert CDPruner().pick(named, 1).tolist() == [wanted]


def test_the_less_a_patch_resembles_clips_text_the_more_relevant_it_is() -> None:
    ctx, model = asked(make.single(4)), clip()
    with torch.no_grad():
        relevance = by_clip(ctx, model, [in_clip(5, 9, 30)])
    first = CDPruner(relevance=ClipRelevance(model, CLIPS, LANGUAGE)).pick(ctx, 1).tolist()
    assert first == [relevance.index(max(relevance))]


def test_at_theta_zero_only_diversity_counts_and_near_one_relevance() -> None:
    ctx = asked(make.single(5))
    other = replace(ctx, text=-ctx.text)  # type: ignore[operator]
    assert torch.equal(CDPruner(theta=0).pick(ctx, 9), CDPruner(theta=0).pick(other, 9))
    relevance = by_language_model(ctx)
    best = sorted(range(25), key=lambda token: -relevance[token])[:9]
    assert CDPruner(theta=0.9999).select(ctx, 9).keep.tolist() == sorted(best)


def test_equal_relevance_leaves_diversity() -> None:
    ctx = asked(make.single(4))
    alike = replace(ctx, text=torch.zeros(3, WIDTH))
    assert torch.equal(CDPruner().pick(alike, 6), CDPruner(theta=0).pick(ctx, 6))


# --- CLIP -----------------------------------------------------------------------------------------------------------


def test_text_longer_than_clip_reads_is_cut_into_chunks() -> None:
    model = clip()
    ids = list(range(3, 28))  # 25 words; 10 fit beside the two marks
    ctx, relevance = asked(make.single(4), *ids), ClipRelevance(model, CLIPS, LANGUAGE)
    with torch.no_grad():
        chunks = [in_clip(*ids[:10]), in_clip(*ids[10:20]), in_clip(*ids[20:])]
        expected = by_clip(ctx, model, chunks)
    found = relevance(ctx, ctx.item.candidates)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad


def test_special_tokens_of_the_prompt_are_not_read() -> None:
    relevance = ClipRelevance(clip(), CLIPS, LANGUAGE)
    item = make.single(3)
    bare, marked = asked(item, 5, 9), asked(item, 0, 5, 9, 1)
    assert torch.equal(relevance(bare, item.candidates), relevance(marked, item.candidates))
    nothing = relevance(asked(item, 0, 1), item.candidates)
    assert nothing.shape == (9,) and nothing.isfinite().all()


def test_clip_in_another_precision_is_fed_in_its_own() -> None:
    item = make.single(3)
    ctx, model = asked(item), clip()
    exact = ClipRelevance(model, CLIPS, LANGUAGE)(ctx, item.candidates)
    rough = ClipRelevance(copy.deepcopy(model).bfloat16(), CLIPS, LANGUAGE)(ctx, item.candidates)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.03, rtol=0)


def test_only_clips_relevance_reads_the_features_before_the_projector() -> None:
    published = CDPruner(relevance=ClipRelevance(clip(), CLIPS, LANGUAGE))
    assert published.wants_hidden and published.reads_text
    assert not CDPruner().wants_hidden and CDPruner().reads_text
    assert CDPruner().needs(make.CLIP) == published.needs(make.CLIP) == ()


def test_the_text_of_a_method_names_its_clip() -> None:
    model = clip()
    assert str(CDPruner(relevance=ClipRelevance(model, CLIPS, LANGUAGE))) == (
        "CDPruner(relevance=ClipRelevance('CLIPModel'))"
    )
    model.config._name_or_path = "openai/clip-vit-large-patch14-336"
    pruner = CDPruner(relevance=ClipRelevance(model, CLIPS, LANGUAGE), theta=0.5)
    assert str(pruner) == "CDPruner(relevance=ClipRelevance('openai/clip-vit-large-patch14-336'), theta=0.5)"
    assert pruner == copy.copy(pruner) and hash(pruner) == hash(copy.copy(pruner))
    assert pruner != CDPruner(relevance=ClipRelevance(clip(), CLIPS, LANGUAGE), theta=0.5)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relevance": "clip"}, "relevance must be 'llm' or a ClipRelevance, got 'clip'"),
        ({"relevance": None}, "relevance must be 'llm' or a ClipRelevance, got None"),
        ({"theta": 1}, r"theta must lie in \[0, 1\), got 1"),
        ({"theta": -0.1}, r"theta must lie in \[0, 1\), got -0.1"),
        ({"theta": math.nan}, r"theta must lie in \[0, 1\), got nan"),
        ({"theta": "half"}, r"theta must be a number in \[0, 1\) or None, got 'half'"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CDPruner(**options)


def test_something_that_is_no_clip_is_refused() -> None:
    with pytest.raises(OptionError, match="clip must be a CLIPModel; Linear has no visual_projection"):
        ClipRelevance(torch.nn.Linear(2, 2), CLIPS, LANGUAGE)


def test_a_clip_of_another_width_than_the_tower_is_refused() -> None:
    ctx = replace(asked(make.single(3)), hidden=torch.randn(9, 20))
    with pytest.raises(OptionError, match="are 20 wide, those of the CLIP of ClipRelevance 16.*taken from"):
        CDPruner(relevance=ClipRelevance(clip(), CLIPS, LANGUAGE)).select(ctx, 3)
