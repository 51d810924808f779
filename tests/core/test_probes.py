"""Attention scores beside the user's backend: the rows equal eager maps, and nothing else changes.

The flash kernels need a GPU. A stand-in with their contract (a 2-D padding mask or none, causality asked of the
module, causal from the end) takes their name in transformers' table for the length of a test.
"""

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_budget import PatchError
from vlm_budget.engine.probes import AttentionSink, ProbeConfig, RowKind, attach
from vlm_budget.ops import attention_rows

KINDS: tuple[RowKind, ...] = ("cls", "last", "received")
BACKENDS = ["sdpa", "eager", "flash_attention_2", "flex_attention"]
PROBE = "vlm_budget_probe|"


def flash_stand_in(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert module.config._attn_implementation == "flash_attention_2"  # the kernels read it again
    assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2])
    groups = query.shape[1] // key.shape[1]
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril(key.shape[2] - query.shape[2])
    seen = seen[None, None] if attention_mask is None else seen & attention_mask.bool()[:, None, None, :]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output.nan_to_num().transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Put the stand-in into transformers' table, and leave the tables as they were."""
    before = [dict(table) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash_stand_in
    yield
    del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    added = [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith(PROBE) and name not in before[0]]
    for name in added:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping[name]
    assert [dict(table) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)] == before


def vision(kind: str) -> tuple[Any, dict[str, Any]]:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**sizes)), {"pixel_values": torch.randn(3, 3, 28, 28)}
    return SiglipVisionModel(SiglipVisionConfig(**sizes)), {"pixel_values": torch.randn(3, 3, 28, 28)}


def llama(kind: str) -> tuple[Any, dict[str, Any]]:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=50,
    )
    mask = torch.ones(3, 11, dtype=torch.long)
    if kind == "llama-left":
        mask[1, :3] = mask[2, :7] = 0
    if kind == "llama-right":
        mask[1, -3:] = mask[2, -7:] = 0
    return LlamaModel(config), {"input_ids": torch.randint(50, (3, 11)), "attention_mask": mask, "use_cache": False}


def build(kind: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = llama(kind) if kind.startswith("llama") else vision(kind)
    for parameter in model.parameters():  # tiny random weights attend evenly: sharpen them
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model.eval(), inputs


def attention_of(model: Any, layer: int) -> nn.Module:
    if isinstance(model, LlamaModel):
        return model.layers[layer].self_attn
    return getattr(model, "vision_model", model).encoder.layers[layer].self_attn


def use(model: Any, backend: str) -> Any:
    """Choose the backend; returns what to run the model in."""
    model.config._attn_implementation_internal = backend
    # Flex attention as it is, without the half minute of compiling it for the CPU.
    return torch.compiler.set_stance("force_eager") if backend == "flex_attention" else nullcontext()


def probed(model: Any, sink: AttentionSink, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[RowKind, torch.Tensor]]:
    sink.start()
    with torch.no_grad():
        output = model(**inputs).last_hidden_state
    return output, {kind: torch.cat(rows) for kind, rows in sink.stop().items()}


def eager_maps(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Per layer [B, L, L] head-mean attention of an unprobed copy."""
    plain = copy.deepcopy(model)
    use(plain, "eager")
    with torch.no_grad():
        return [each.float().mean(1) for each in plain(**inputs, output_attentions=True).attentions]


def rows_of(maps: torch.Tensor) -> dict[RowKind, torch.Tensor]:
    return {"cls": maps[:, 0], "last": maps[:, -1], "received": maps.mean(1)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["clip", "siglip", "llama", "llama-left", "llama-right"])
def test_rows_equal_the_eager_maps_and_the_output_keeps_its_bits(kind: str, layer: int, backend: str) -> None:
    model, inputs = build(kind)
    wanted = rows_of(eager_maps(model, inputs)[layer])
    with use(model, backend), torch.no_grad():
        plain = model(**inputs).last_hidden_state
        sink = AttentionSink(KINDS, chunk=4)
        probe = attach(attention_of(model, layer), sink)
        output, rows = probed(model, sink, inputs)
        probe.detach()
    assert torch.equal(output, plain)
    # Rows of queries that are padding themselves mean nothing, and backends fill them differently.
    compared = ("last",) if kind == "llama-left" else KINDS
    for name in compared:
        assert rows[name].dtype == torch.float32
        torch.testing.assert_close(rows[name], wanted[name], atol=2e-6, rtol=1e-5)
        assert wanted[name].std() > 1e-3  # an even map would make any comparison pass


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_chunk_is_scored_over_the_cache_too(backend: str) -> None:
    model, inputs = build("llama")

    def second_half(model: Any, **kwargs: Any) -> Any:
        cache = DynamicCache()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        model(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache, use_cache=True)
        return model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)

    plain = copy.deepcopy(model)
    use(plain, "eager")
    with torch.no_grad():
        maps = second_half(plain, output_attentions=True).attentions[1].mean(1)
    assert maps.shape == (3, 5, 11)
    sink = AttentionSink(KINDS, chunk=2)
    with use(model, backend), torch.no_grad():
        attach(attention_of(model, 1), sink)
        sink.start()
        second_half(model)
    rows = sink.stop()
    for name, wanted in rows_of(maps).items():
        first, second = rows[name]  # one entry per call of the module
        assert first.shape == (3, 6)
        torch.testing.assert_close(second, wanted, atol=2e-6, rtol=1e-5)


def test_only_the_probed_module_is_routed_and_only_while_rows_are_wanted() -> None:
    model, inputs = build("clip")
    sink = AttentionSink(("cls",))
    attach(attention_of(model, 1), sink)
    assert not isinstance(attention_of(model, 0).config, ProbeConfig)
    assert not isinstance(model.config, ProbeConfig) and model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        model(**inputs)
    assert sink.stop() == {"cls": []}
    sink.start()
    with torch.no_grad():
        model(**inputs), model(**inputs)
    assert [tuple(row.shape) for row in sink.stop()["cls"]] == [(3, 17), (3, 17)]
    assert sink.stop() == {"cls": []}


def test_detaching_restores_the_very_same_config_object() -> None:
    model, _ = build("clip")
    module = attention_of(model, 1)
    before = dict(vars(module))
    probe = attach(module, AttentionSink(("cls",)))
    assert module.config is not before["config"]
    probe.detach()
    assert module.config is before["config"] is model.config
    assert vars(module).keys() == before.keys() and all(vars(module)[name] is before[name] for name in before)


def test_a_probed_config_answers_and_obeys_like_the_real_one() -> None:
    model, _ = build("clip")
    module = attention_of(model, 1)
    attach(module, AttentionSink(("cls",)))
    assert module.config.hidden_size == 32
    module.config.attention_dropout = 0.5
    assert model.config.attention_dropout == 0.5
    with pytest.raises(AttributeError, match="no_such_field"):
        module.config.no_such_field  # noqa: B018


def test_a_backend_chosen_later_is_followed() -> None:
    model, inputs = build("clip")
    sink = AttentionSink(KINDS)
    attach(attention_of(model, 1), sink)
    plain = copy.deepcopy(model)
    for backend in ("eager", "flash_attention_2", "sdpa"):
        use(model, backend)
        assert attention_of(model, 1).config._attn_implementation == PROBE + backend
        use(plain, backend)
        output, rows = probed(model, sink, inputs)
        with torch.no_grad():
            assert torch.equal(output, plain(**inputs).last_hidden_state)
        torch.testing.assert_close(rows["cls"].sum(-1), torch.ones(3))


def test_a_backend_that_fails_leaves_the_probe_in_working_order() -> None:
    model, inputs = build("clip")
    sink = AttentionSink(("cls",))
    attach(attention_of(model, 1), sink)
    _, good = probed(model, sink, inputs)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = broken
    use(model, "flash_attention_2")
    with pytest.raises(RuntimeError, match="out of memory"):
        probed(model, sink, inputs)
    use(model, "sdpa")
    _, again = probed(model, sink, inputs)
    assert torch.equal(good["cls"], again["cls"])


def test_a_module_is_probed_once_and_must_choose_its_attention_by_config() -> None:
    model, _ = build("clip")
    attach(attention_of(model, 1), AttentionSink(("cls",)))
    with pytest.raises(PatchError, match="CLIPAttention is probed already"):
        attach(attention_of(model, 1), AttentionSink(("cls",)))
    with pytest.raises(PatchError, match="MultiheadAttention does not look its attention function up by config"):
        attach(nn.MultiheadAttention(8, 2), AttentionSink(("cls",)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_is_probed_by_its_own_sink(duplicate: Any) -> None:
    model, inputs = build("clip")
    sink = AttentionSink(KINDS)
    probe = attach(attention_of(model, 1), sink)
    other = duplicate(model)
    module = attention_of(other, 1)
    assert isinstance(module.config, ProbeConfig) and module.config._real is other.config is not model.config
    its: AttentionSink = module._vlm_budget_sink  # type: ignore[assignment]
    assert its is not sink and its.kinds == KINDS
    _, rows = probed(model, sink, inputs)
    its.start()
    probed(model, sink, inputs)
    assert its.stop() == {kind: [] for kind in KINDS}
    probe.detach()
    _, copied = probed(other, its, inputs)
    assert all(torch.equal(rows[kind], copied[kind]) for kind in KINDS)


def test_threads_see_their_own_rows_only() -> None:
    model, _ = build("clip")
    sink = AttentionSink(KINDS)
    attach(attention_of(model, 1), sink)
    batches = [{"pixel_values": torch.randn(size, 3, 28, 28)} for size in (1, 2, 3)]
    alone = [probed(model, sink, batch)[1] for batch in batches]
    start = threading.Barrier(len(batches) + 1)
    results: list[list[dict[RowKind, torch.Tensor]]] = [[] for _ in batches]
    bystander: list[Any] = []

    def work(index: int) -> None:
        start.wait()
        results[index] = [probed(model, sink, batches[index])[1] for _ in range(15)]

    def pass_by() -> None:
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                model(**batches[0])
        bystander.append(sink.stop())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    threads.append(threading.Thread(target=pass_by))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bystander == [{kind: [] for kind in KINDS}]
    for got, wanted in zip(results, alone, strict=True):
        assert len(got) == 15
        for rows in got:
            assert all(torch.equal(rows[kind], wanted[kind]) for kind in KINDS)


def recorded(kinds: tuple[RowKind, ...], chunk: int, *args: Any) -> dict[RowKind, torch.Tensor]:
    sink = AttentionSink(kinds, chunk)
    sink.start()
    sink.record(*args)
    return {kind: rows[0] for kind, rows in sink.stop().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_as_exact_as_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    query, key = (4 * torch.randn(2, heads, 63, 8).to(dtype) for heads in (4, 2))
    rows = recorded(KINDS, 16, query, key, None, 0.5, None, False)
    logits = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    for name, wanted in rows_of(logits.softmax(-1).mean(1)).items():
        assert rows[name].dtype == torch.float32
        torch.testing.assert_close(rows[name], wanted.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 7, 63, 111, 577])
@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_received_attention_does_not_depend_on_the_chunk(length: int, chunk: int) -> None:
    if length == 577 and chunk == 1:
        chunk = 5  # 577 chunks say nothing that 116 do not
    query, key = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    rows = recorded(("received",), chunk, query, key, None, 0.5, None, False)["received"]
    wanted = attention_rows(query, key, 0.5).mean(1)
    torch.testing.assert_close(rows, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_scored_apart(causal: bool) -> None:
    lengths = [1, 7, 63]
    query, key = torch.randn(1, 4, sum(lengths), 8), torch.randn(1, 4, sum(lengths), 8)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    rows = recorded(("received",), 16, query, key, None, 0.5, ends, causal)["received"]
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), strict=True)
    wanted = [recorded(("received",), 16, q, k, None, 0.5, None, causal)["received"] for q, k in pieces]
    torch.testing.assert_close(rows, torch.cat(wanted, -1))
    torch.testing.assert_close(rows.sum(), torch.tensor(3.0))  # each sequence hands out one


def test_every_form_of_the_same_mask_gives_the_same_rows() -> None:
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    flat = torch.ones(2, 9, dtype=torch.long)
    flat[1, :4] = 0
    one_row = flat.bool()[:, None, None, :]
    square = one_row.expand(-1, 1, 9, -1)
    additive = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    forms = [flat, flat.bool(), one_row, square, additive, torch.nn.functional.pad(square, (0, 5), value=True)]
    first, *others = [recorded(KINDS, 4, query, key, form, 0.5, None, False) for form in forms]
    assert (first["received"][1, :4] == 0).all() and (first["received"][0] > 0).all()
    for rows in others:
        for kind in KINDS:
            torch.testing.assert_close(rows[kind], first[kind])


def test_a_query_that_may_see_nothing_gives_a_row_of_zeros() -> None:
    mask = torch.tensor([[[[True, False, True]]], [[[False, False, False]]]])
    rows = attention_rows(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 3, 8), 0.5, mask=mask, reduce="none")
    assert (rows[1] == 0).all() and rows[0, :, :, 1].eq(0).all()
    torch.testing.assert_close(rows[0].sum(-1), torch.ones(4, 1))
