"""What a sink takes besides head-averaged rows: the joint class row, keys, and references to queries and keys."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny_models import Tiny, build
from vlm_budget.engine.probes import AttachedProbe, AttentionSink, ProbeStop, QueryKey, RowKind, attach


def recorded(kind: RowKind, query: torch.Tensor, key: torch.Tensor, mask: Any = None, packed: Any = None) -> Any:
    sink = AttentionSink((kind,))
    sink.start()
    sink.record(query, key, mask, 0.5, packed, False)
    (found,) = sink.stop()[kind]
    return found


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("length", [1, 7, 63])
def test_the_joint_row_is_that_of_one_wide_head(heads: tuple[int, int], length: int) -> None:
    query, key = torch.randn(2, heads[0], length, 8), torch.randn(2, heads[1], length, 8)
    found = recorded("joint_cls", query, key)
    assert found.dtype == torch.float32
    for row in range(2):
        logits = torch.zeros(length)
        for head in range(heads[0]):
            for place in range(length):
                logits[place] += query[row, head, 0] @ key[row, head * heads[1] // heads[0], place]
        torch.testing.assert_close(found[row], (logits / math.sqrt(heads[0] * 8)).softmax(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_joint_row_leaves_masked_keys_out(per_head: bool) -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    mask = torch.ones(2, 4 if per_head else 1, 5, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    found = recorded("joint_cls", query, key, mask)
    assert (found[1, 3:] == 0).all()
    torch.testing.assert_close(found[1:, :3], recorded("joint_cls", query[1:], key[1:, :, :3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_stand_side_by_side_and_grouped_ones_as_they_are(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 7, 8).to(dtype), torch.randn(2, 2, 7, 8).to(dtype)
    keys, mean = recorded("keys", query, key), recorded("mean_keys", query, key)
    assert keys.dtype == mean.dtype == torch.float32
    assert keys.shape == (2, 7, 16) and mean.shape == (2, 7, 8)
    for place in range(7):
        assert torch.equal(keys[:, place], torch.cat([key[:, 0, place], key[:, 1, place]], -1).float())
    torch.testing.assert_close(mean, (keys[..., :8] + keys[..., 8:]) / 2)


def test_keys_of_packed_sequences_are_the_same_in_one_row() -> None:
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    parts = [recorded("keys", q, k) for q, k in zip(query.split([2, 7], 2), key.split([2, 7], 2), strict=True)]
    assert torch.equal(recorded("keys", query, key, packed=torch.tensor([0, 2, 9])), torch.cat(parts, 1))


def test_a_reference_shares_the_models_memory_and_holds_no_graph() -> None:
    query, key = torch.randn(2, 4, 3, 8, requires_grad=True) * 1, torch.randn(2, 2, 3, 8)
    found = recorded("qk", query, key)
    assert found.query.data_ptr() == query.data_ptr() and found.key.data_ptr() == key.data_ptr()
    assert not found.query.requires_grad and found.scaling == 0.5 and found.mask is None and not found.causal


def masks(seen: torch.Tensor) -> dict[str, tuple[Any, bool]]:
    """Forms that say what [B, L, L] ``seen`` says, as (mask, causal); the first two only what they can."""
    square = seen[:, None]
    additive = torch.zeros(square.shape).masked_fill(~square, -torch.inf)
    return {
        "padding": (seen[:, -1].long(), True),
        "bool": (square, True),
        "static": (torch.nn.functional.pad(square, (0, 4)), True),
        "additive": (additive, True),
    }


@pytest.mark.parametrize("form", ["padding", "bool", "static", "additive"])
@pytest.mark.parametrize("rows", [(0, 1), (2, 5), (0, 7)])
def test_visible_rows_say_what_the_mask_says_in_any_form(form: str, rows: tuple[int, int]) -> None:
    seen = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    seen[1, :, :3] = False
    mask, causal = masks(seen)[form]
    found, end = QueryKey(torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), mask, 0.5, causal).seen(*rows)
    assert found is not None
    flags = found if found.dtype == torch.bool else found == 0
    assert (end is None) == (form != "padding"), "the other forms say themselves what is later"
    if end is not None:
        flags = flags & (torch.arange(7) < end[..., None])
    assert torch.equal(flags.expand(2, 1, rows[1] - rows[0], 7)[:, 0], seen[:, rows[0] : rows[1]])


def test_without_a_mask_only_causality_limits() -> None:
    query, key = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 5, 8)
    assert QueryKey(query, key, None, 0.5, False).seen(0, 2) == (None, None)
    mask, end = QueryKey(query, key, None, 0.5, True).seen(0, 2)
    assert mask is None and end is not None and end.tolist() == [[4, 5]]


# --- leaving a module early ------------------------------------------------------------------------------------------


@pytest.fixture()
def llava() -> Tiny:
    return build("llava")


def probed(tiny: Tiny) -> tuple[Any, AttentionSink, AttachedProbe]:
    """Attention of the second decoder layer, with a sink for references."""
    module = tiny.model.model.language_model.layers[1].self_attn
    sink = AttentionSink(("qk",))
    return module, sink, attach(module, sink)


@torch.no_grad()
def test_a_stopped_module_shows_the_same_queries_and_keys_and_does_not_attend(
    llava: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sink, probe = probed(llava)
    sink.start()
    wanted = llava.model(**llava.clone()).logits
    (full,) = sink.stop()["qk"]
    ran: list[Any] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping,
        "sdpa",
        lambda module, *args, **kwargs: ran.append(module) or sdpa(module, *args, **kwargs),
    )
    layers = llava.model.model.language_model.layers
    sink.start(stop=True)
    with pytest.raises(ProbeStop):
        llava.model(**llava.clone())
    (stopped,) = sink.stop()["qk"]
    assert layers[0].self_attn in ran and layers[1].self_attn not in ran and layers[2].self_attn not in ran
    assert torch.equal(stopped.query, full.query) and torch.equal(stopped.key, full.key)
    assert torch.equal(llava.model(**llava.clone()).logits, wanted), "the next call runs through"
    probe.detach()


@torch.no_grad()
def test_only_the_thread_that_asked_is_stopped(llava: Tiny) -> None:
    _, sink, probe = probed(llava)
    others: list[torch.Tensor] = []
    wanted = llava.model(**llava.clone()).logits
    sink.start(stop=True)

    def pass_by() -> None:
        with torch.no_grad():
            others.append(llava.model(**llava.clone()).logits)

    thread = threading.Thread(target=pass_by)
    thread.start()
    thread.join()
    assert len(others) == 1 and torch.equal(others[0], wanted)
    with pytest.raises(ProbeStop):
        llava.model(**llava.clone())
    sink.stop()
    sink.start()
    assert torch.equal(llava.model(**llava.clone()).logits, wanted), "a later start does not stop"
    probe.detach()


def test_a_model_that_catches_exceptions_cannot_swallow_the_stop(llava: Tiny) -> None:
    module, sink, _ = probed(llava)
    forward = module.forward

    def careful(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            raise RuntimeError("attention failed") from error

    module.forward = careful
    sink.start(stop=True)
    with pytest.raises(ProbeStop), torch.no_grad():
        llava.model(**llava.clone())
