"""The small parts of the engine: taps, per-thread state, clocks and the account they fill."""

import copy
import inspect
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import synthetic_items as make
from vlm_budget import VisualLayout
from vlm_budget.engine.account import STAGES, Account, column_bytes
from vlm_budget.engine.cache import CacheState, LayerGroup, set_cache_state
from vlm_budget.engine.clock import Interval, total_ms
from vlm_budget.engine.local import CallLocal
from vlm_budget.engine.taps import Tap
from vlm_budget.report import Report

CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Something with a method to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, pixels: torch.Tensor, *, sizes: Any = None, **more: Any) -> torch.Tensor:
        return self.scale * pixels


class Notebook:
    """A watcher that writes calls down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    def watch(self, call: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return call(*args, **kwargs)


def tapped() -> tuple[Encoder, Notebook, Tap]:
    encoder, notebook = Encoder(), Notebook()
    tap = Tap(encoder, "encode", notebook.watch)
    tap.attach()
    return encoder, notebook, tap


def test_a_tap_sees_every_call_and_changes_none() -> None:
    encoder, notebook, _ = tapped()
    pixels = torch.ones(3)
    assert torch.equal(encoder.encode(pixels, sizes=7), 2 * pixels)
    assert notebook.calls == [((pixels,), {"sizes": 7})]


def test_a_tap_shows_the_parameters_of_the_original() -> None:
    encoder, _, _ = tapped()
    assert inspect.signature(encoder.encode) == inspect.signature(Encoder().encode)


def test_a_tap_taken_away_leaves_the_instance_as_it_was() -> None:
    plain = Encoder()
    before = dict(vars(plain))
    tap = Tap(plain, "encode", Notebook().watch)
    tap.attach()
    tap.detach()
    assert vars(plain).keys() == before.keys() and all(vars(plain)[name] is before[name] for name in before)
    assert plain.encode.__func__ is Encoder.encode


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_runs_on_its_own_weights_under_its_own_watcher(duplicate: Any) -> None:
    encoder, notebook, _ = tapped()
    other = duplicate(encoder)
    with torch.no_grad():
        other.scale.fill_(5.0)
    assert other.encode(torch.ones(())) == 5 and encoder.encode(torch.ones(())) == 2
    its = vars(other)["encode"].watch.__self__
    assert its is not notebook and len(its.calls) == len(notebook.calls) == 1


def test_state_of_a_call_is_the_threads_own_and_copies_start_empty() -> None:
    local = CallLocal()
    local.rows = "mine"
    seen: list[Any] = []

    def look() -> None:
        seen.append(getattr(local, "rows", None))
        local.rows = "its"

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [None] and local.rows == "mine"
    for other in (copy.deepcopy(local), copy.copy(local), pickle.loads(pickle.dumps(local))):
        assert type(other) is CallLocal and not hasattr(other, "rows")


def test_an_interval_lasts_from_start_to_stop() -> None:
    began = time.perf_counter()
    first = Interval(CPU)
    time.sleep(0.02)
    first.stop()
    most = (time.perf_counter() - began) * 1000
    time.sleep(0.01)  # time after the stop does not count
    assert 20 <= first.ms <= most and first.ms == first.ms
    second = Interval(CPU).stop()
    assert total_ms([first, second]) == first.ms + second.ms and total_ms([]) == 0


def filled_cache(rows: int = 3, columns: int = 7, dtype: torch.dtype = torch.float32) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(
            torch.zeros(rows, 2, columns, 5, dtype=dtype), torch.zeros(rows, 2, columns, 5, dtype=dtype), layer
        )
    return cache


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_a_column_takes_keys_and_values_of_all_layers_rows_and_heads(dtype: torch.dtype, size: int) -> None:
    assert column_bytes(filled_cache(dtype=dtype)) == [2 * 3 * 2 * 5 * size] * 2
    assert column_bytes(None) == column_bytes(DynamicCache()) == []


def told(account: Account) -> Report:
    """The account as a report; without a plan nothing is priced."""
    return account.report("m", "20%", "packed", cost=None)  # type: ignore[arg-type]


def test_an_account_tells_what_the_prompt_holds_and_would_hold() -> None:
    cache = filled_cache()
    set_cache_state(
        cache, CacheState(4, torch.ones(3, 7, dtype=torch.bool), torch.zeros(3, 7), torch.zeros(3), torch.tensor(2))
    )
    account = Account()
    account.note_cache(cache, virtual=11)
    report = told(account)
    assert (report.kv_bytes, report.kv_bytes_unpruned) == (7 * sum(column_bytes(cache)), 11 * sum(column_bytes(cache)))


def test_layers_that_lost_more_are_counted_each_by_its_own_length() -> None:
    cache, valid = filled_cache(), torch.ones(3, 7, dtype=torch.bool)
    group = LayerGroup(1, valid[:, :5], torch.arange(5).expand(3, -1), torch.zeros(3), True)
    set_cache_state(cache, CacheState(4, valid, torch.zeros(3, 7), torch.zeros(3), torch.tensor(2), groups=(group,)))
    account = Account()
    account.note_cache(cache, virtual=11)
    first, second = column_bytes(cache)
    report = told(account)
    assert (report.kv_bytes, report.kv_bytes_unpruned) == (7 * first + 5 * second, 11 * (first + second))


def test_a_cache_that_lost_nothing_is_counted_whole() -> None:
    account = Account()
    account.note_cache(filled_cache(), virtual=7)
    report = told(account)
    assert report.kv_bytes == report.kv_bytes_unpruned == 7 * sum(column_bytes(filled_cache()))


def test_an_account_adds_stages_up_and_averages_decoding() -> None:
    account = Account()
    intervals = {stage: [Interval(CPU).stop() for _ in range(3)] for stage in STAGES}
    for stage, members in intervals.items():
        account.stages[stage] += members
    report = told(account)
    assert report.encode_ms == total_ms(intervals["encode"]) and report.prefill_ms == total_ms(intervals["prefill"])
    decoding = total_ms(intervals["decode"]) + total_ms(intervals["translate"])
    assert report.decode_steps == 3 and report.decode_ms_per_token == decoding / 3
    assert told(Account()).decode_ms_per_token is None


def test_an_account_tells_which_tokens_of_each_item_stayed() -> None:
    photo, clip, icon = make.single(1, 3), make.frames(2, 1, 2), make.single(2)
    layout = VisualLayout(((photo, clip, icon), (), (icon,)))
    keep = {
        "image": torch.tensor([[0, 1, 1, 1, 0, 0, 1], [0] * 7, [0, 1, 0, 1, 0, 0, 0]]).bool(),
        "video": torch.tensor([[1, 0, 0, 1], [0] * 4, [0] * 4]).bool(),
    }
    kept = Account(layout=layout, keep=keep).kept()  # type: ignore[arg-type]
    assert [(each.row, each.item, each.positions) for each in kept] == [
        (0, photo, (1, 2)),
        (0, clip, (0, 3)),
        (0, icon, (0, 3)),
        (2, icon, (1, 3)),
    ]
    assert Account().kept() == ()


def test_an_account_without_a_plan_is_of_a_text_only_prompt() -> None:
    report = told(Account())
    assert report.text_only and report.kv_bytes == report.kv_bytes_unpruned == 0


@pytest.mark.gpu
def test_an_interval_on_the_gpu_waits_for_the_work_and_not_before_it_is_read() -> None:
    device = torch.device("cuda")
    big = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    host = time.perf_counter()
    interval = Interval(device)
    for _ in range(50):
        big @ big
    interval.stop()
    launched = (time.perf_counter() - host) * 1000
    waited = interval.ms
    assert waited > launched
