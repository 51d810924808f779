"""Token Transforming: Y = W X behind any selector, with pruning and classic merging as its special cases."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot

import synthetic_items as make
from vlm_budget import PatchError, Pruner, list_methods
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.ops import assign
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.cls_topk import ClsTopK
from vlm_budget.pruners.hired import HiRED
from vlm_budget.pruners.token_transforming import TokenTransforming, project_mix, transform_matrix
from vlm_budget.registry import MERGES, PRUNERS

KEYS = Attention(22, "keys")


def keys_and_anchors(tokens: int, anchors: int, seed: int = 0, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, width, generator=generator)
    return keys, torch.randperm(tokens, generator=generator)[:anchors].sort().values


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def naive_matrix(keys: torch.Tensor, anchors: torch.Tensor, tau: float, top: int | None, own: float) -> torch.Tensor:
    rows = []
    for anchor in anchors.tolist():
        similar = [cosine(keys[anchor].tolist(), key) for key in keys.tolist()]
        allowed = sorted(range(len(similar)), key=lambda j: -similar[j])[:top]
        total = sum(math.exp(similar[j] / tau) for j in allowed)
        row = [(1 - own) * math.exp(s / tau) / total if j in allowed else 0.0 for j, s in enumerate(similar)]
        row[anchor] += own
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(("tokens", "anchors"), [(1, 1), (7, 1), (7, 6), (63, 7), (111, 111)])
@pytest.mark.parametrize("top", [None, 1, 3, 16, 500])
@pytest.mark.parametrize("own", [0.0, 0.3])
def test_the_matrix_is_the_formula(tokens: int, anchors: int, top: int | None, own: float) -> None:
    keys, chosen = keys_and_anchors(tokens, anchors)
    found = transform_matrix(keys, chosen, temperature=0.2, top=top, self_weight=own)
    torch.testing.assert_close(found, naive_matrix(keys, chosen, 0.2, top, own), atol=1e-5, rtol=1e-4)


def test_a_batch_is_its_rows() -> None:
    parts = [keys_and_anchors(31, 8, seed) for seed in range(3)]
    keys, anchors = (torch.stack(part) for part in zip(*parts, strict=True))
    for options in ({}, {"exclusive": True}, {"top": None}):
        batch = transform_matrix(keys, anchors, **options)  # type: ignore[arg-type]
        alone = torch.stack([transform_matrix(*part, **options) for part in parts])  # type: ignore[arg-type]
        torch.testing.assert_close(batch, alone)


@given(
    st.integers(1, 20),
    st.data(),
    st.floats(0.01, 5),
    st.sampled_from([None, 1, 4]),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_rows_sum_to_one_even_where_keys_are_zero_or_alike(
    tokens: int, data: st.DataObject, tau: float, top: int | None, own: float, exclusive: bool, few: bool
) -> None:
    keys, anchors = keys_and_anchors(tokens, data.draw(st.integers(1, tokens)), width=2)
    keys = keys.round() if few else keys
    found = transform_matrix(keys, anchors, temperature=tau, top=top, self_weight=own, exclusive=exclusive)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(len(anchors)))


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-4, "top": None}, {"temperature": 1e-6}, {"self_weight": 1.0}, {"top": 1}], ids=str
)
def test_at_its_ends_it_is_pruning(options: dict[str, Any]) -> None:
    keys, anchors = keys_and_anchors(63, 11)
    onehot = torch.eye(63)[anchors]
    torch.testing.assert_close(transform_matrix(keys, anchors, **options), onehot)


def test_a_token_may_feed_several_anchors_unless_exclusive() -> None:
    keys, anchors = keys_and_anchors(63, 11)
    assert ((transform_matrix(keys, anchors) > 0).sum(0) > 1).any()
    assert ((transform_matrix(keys, anchors, exclusive=True) > 0).sum(0) == 1).all()


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (7, 1), (7, 6), (63, 11), (20, 20)])
def test_exclusive_is_classic_merging(tokens: int, count: int) -> None:
    keys, anchors = keys_and_anchors(tokens, count)
    groups: dict[int, list[int]] = {anchor: [anchor] for anchor in anchors.tolist()}
    for token in set(range(tokens)) - set(groups):
        groups[max(groups, key=lambda anchor: cosine(keys[anchor].tolist(), keys[token].tolist()))].append(token)
    want = torch.zeros(count, tokens)
    for row, group in enumerate(groups.values()):
        want[row, group] = 1 / len(group)
    found = transform_matrix(keys, anchors, exclusive=True)
    torch.testing.assert_close(found, want)
    # What is built without the matrix has the same members; VisionZip's contextual tokens sum them, and not average.
    assert torch.equal(found > 0, one_hot(assign(keys, anchors), count).T > 0)


def test_an_anchor_keeps_itself_when_another_has_the_same_key() -> None:
    keys = torch.ones(4, 3)
    found = transform_matrix(keys, torch.tensor([1, 2]), exclusive=True)
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3], [0, 0, 1, 0]]))


# --- behind a selector ----------------------------------------------------------------------------------------------


def merging_context(pruner: Pruner, item: VisualItem, seed: int = 0) -> Context:
    return make.context(item, make.random_attention(pruner, item, seed))


VISION = [name for name in list_methods() if PRUNERS.get(name).stage == "vision"]


@pytest.mark.parametrize("method", [name for name in VISION if not PRUNERS.get(name).merges])
@pytest.mark.parametrize("newline", ["drop", "keep_all", "keep_used_rows"])
def test_any_selector_keeps_the_tokens_it_kept_and_separators_their_features(method: str, newline: Any) -> None:
    item_by_item = {"segpruner": {"scope": "view"}}  # the others are never asked about several
    pruner = PRUNERS.get(method)(newline=newline, merge=TokenTransforming(), **item_by_item.get(method, {}))
    item = make.anyres(2, 2, side=5, pad=(2, 0))
    ctx = merging_context(pruner, item)
    for k in (7, 33, item.size - 1):
        selection = pruner.select(ctx, k)
        assert selection.values is not None and selection.values.shape == (k, ctx.features.shape[1])
        assert torch.equal(selection.keep, replace(pruner, merge=None).select(ctx, k).keep)
        separator = item.partition[selection.keep] < 0
        assert torch.equal(selection.values[separator], ctx.features[selection.keep[separator]])


@pytest.mark.parametrize("method", [name for name in VISION if PRUNERS.get(name).merges])
def test_a_method_that_merges_refuses_a_second_merge(method: str) -> None:
    with pytest.raises(OptionError, match="merges on its own"):
        PRUNERS.get(method)(merge=TokenTransforming())


def test_tokens_are_mixed_before_the_projector() -> None:
    pruner = ClsTopK(merge=TokenTransforming(temperature=0.5, top=5, self_weight=0.2))
    item = make.anyres(1, 2, side=3)
    ctx = merging_context(pruner, item)
    selection = pruner.select(ctx, 9)
    candidates, keys = item.candidates, ctx.in_token_order(KEYS)
    anchors = torch.tensor([candidates.tolist().index(position) for position in selection.keep.tolist()])
    weights = naive_matrix(keys[candidates], anchors, 0.5, 5, 0.2)
    assert ctx.hidden is not None and selection.values is not None
    want = make.signed_square(weights @ ctx.hidden[candidates])
    torch.testing.assert_close(selection.values, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top": 1},
        {"top": 2, "self_weight": 0.4},
        {"top": 500},
        {"top": 80},
        {"top": None, "self_weight": 0.3},
        {"exclusive": True},
        {"exclusive": True, "self_weight": 0.3},
    ],
    ids=str,
)
def test_what_is_mixed_without_the_matrix_is_what_the_matrix_mixes(options: dict[str, Any]) -> None:
    merge = TokenTransforming(temperature=0.2, **options)
    ctx = merging_context(ClsTopK(merge=merge), make.anyres(1, 2, side=7, pad=(0, 2)))
    candidates, keys = ctx.item.candidates, ctx.in_token_order(KEYS)
    for count in (1, 33, len(candidates)):
        places = torch.randperm(len(candidates))[:count].sort().values
        matrix = transform_matrix(keys[candidates], places, temperature=0.2, **options)
        assert ctx.hidden is not None
        want = make.signed_square(matrix @ ctx.hidden[candidates])
        torch.testing.assert_close(merge.merge(ctx, candidates[places]), want, atol=1e-6, rtol=1e-5)


def test_two_that_tie_for_the_last_place_both_stay() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.0, 1.0]])
    ctx = make.context(make.single(2), {Attention(22, "cls"): [torch.arange(4.0)], KEYS: [keys]})
    assert ctx.hidden is not None
    merged = TokenTransforming(temperature=0.5, top=2).merge(ctx, torch.tensor([0]))
    matrix = transform_matrix(keys, torch.tensor([0]), temperature=0.5, top=2)
    assert (matrix > 0).tolist() == [[True, True, True, False]]
    torch.testing.assert_close(merged, make.signed_square(matrix @ ctx.hidden))


def test_partitions_share_one_matrix() -> None:
    item = make.frames(2, 1, 2)
    attention = {
        Attention(22, "cls"): [torch.tensor([9.0, 1.0]), torch.tensor([8.0, 2.0])],
        KEYS: [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])],
    }
    ctx = make.context(item, attention)
    values = ClsTopK(merge=TokenTransforming(top=2)).select(ctx, 2).values
    # The first token's key recurs in the second frame only.
    assert ctx.hidden is not None and values is not None
    torch.testing.assert_close(values[0], make.signed_square((ctx.hidden[0] + ctx.hidden[3]) / 2))


@given(make.items(), st.data())
def test_what_all_tokens_say_is_said_still(item: VisualItem, data: st.DataObject) -> None:
    top, exclusive = data.draw(st.sampled_from([None, 2])), data.draw(st.booleans())
    merge = TokenTransforming(temperature=0.3, top=top, exclusive=exclusive)
    ctx = merging_context(ClsTopK(merge=merge), item)
    constant = torch.full_like(ctx.features, 0.7)
    keep = item.candidates[: data.draw(st.integers(1, len(item.candidates)))]
    merged = merge.merge(replace(ctx, hidden=constant), keep)
    torch.testing.assert_close(merged, make.signed_square(constant[keep]))


def test_pruning_by_the_stage_gives_back_the_features() -> None:
    pruner = HiRED(merge=TokenTransforming(self_weight=1.0))
    ctx = merging_context(pruner, make.anyres(2, 2, side=5))
    selection = pruner.select(ctx, 33)
    torch.testing.assert_close(selection.values, ctx.features[selection.keep])


def test_values_have_the_dtype_of_the_features() -> None:
    pruner = ClsTopK(merge=TokenTransforming())
    ctx = merging_context(pruner, make.single(5))
    assert ctx.hidden is not None
    half = replace(ctx, features=ctx.features.bfloat16(), hidden=ctx.hidden.bfloat16())
    values = pruner.select(half, 7).values
    assert values is not None and values.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), pruner.select(ctx, 7).values, atol=0.05, rtol=0.05)


def test_keys_come_from_the_layer_the_language_model_reads() -> None:
    assert TokenTransforming().needs(make.CLIP) == (KEYS,)
    assert TokenTransforming(layer=3).needs(make.SIGLIP) == (Attention(3, "keys"),)
    assert ClsTopK(merge=TokenTransforming()).all_needs(make.CLIP) == (Attention(22, "cls"), KEYS)


def test_without_the_projectors_inputs_it_says_so() -> None:
    ctx = replace(make.context(make.single(3)), hidden=None)
    with pytest.raises(PatchError, match="Context.hidden"):
        project_mix(ctx, lambda hidden: hidden)


def test_it_is_registered_and_its_text_builds_an_equal_one() -> None:
    assert MERGES.get("token_transforming") is TokenTransforming
    pruner = ClsTopK(merge=TokenTransforming(top=4))
    assert eval(str(pruner), {"ClsTopK": ClsTopK, "TokenTransforming": TokenTransforming}) == pruner


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0}, "temperature must be at least 1e-6 and finite, got 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "cold"}, "temperature must be a number, got 'cold'"),
        ({"top": 0}, "top must be at least 1"),
        ({"top": 2.5}, "top must be an int or None, got 2.5"),
        ({"self_weight": 1.1}, r"self_weight must lie in \[0, 1\], got 1.1"),
        ({"self_weight": True}, "self_weight must be a number, got True"),
        ({"exclusive": 1}, "exclusive must be True or False, got 1"),
        ({"layer": "last"}, "layer must be an int or None, got 'last'"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TokenTransforming(**fields)


@pytest.mark.gpu
def test_the_gpu_merges_as_the_cpu_does() -> None:
    pruner = HiRED(merge=TokenTransforming())
    item = make.anyres(2, 2, side=12, pad=(3, 0))
    attention = make.random_attention(pruner, item)
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    want = pruner.select(make.context(item, attention), 111)
    found = pruner.select(make.context(item, on_gpu, device="cuda"), 111)
    assert found.values is not None and torch.equal(found.keep.cpu(), want.keep)
    torch.testing.assert_close(found.values.cpu(), want.values, atol=1e-4, rtol=1e-4)
