"""Reports: the same account as text, as a table and as plain data."""

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from vlm_budget import Plan, Report
from vlm_budget.payoff import Forecast, Promise
from vlm_budget.plan import ItemPlan

REPORT = Report(
    method="HiRED(alpha=0.3)",
    budget="20%",
    positions="packed",
    plan=Plan("HiRED(alpha=0.3)", "20%", (ItemPlan(0, "image", 577, 63), ItemPlan(1, "video", 111, 7)), 2),
    encode_ms=12.345,
    probe_ms=1.5,
    select_ms=0.5,
    compact_ms=0.25,
    prefill_ms=100.0,
    drop_ms=2.5,
    decode_steps=31,
    decode_ms_per_token=7.125,
    kv_bytes=1_234_567,
    kv_bytes_unpruned=7_654_321,
    forecast=Forecast(
        prefill_flops=1_234_000_000,
        prefill_flops_unpruned=5 * 10**12,
        encoder_flops=3 * 10**9,
        prefill_ms_unpruned=400.0,
        overhead_ms=4.75,
        saved_ms=-12.345,
        saved_share=-0.031,
        calibrated=True,
        promise=Promise("ms", 100.0, 98.765, 97.5),
    ),
    warnings=("predicted not to pay", "decode-bound [at most]"),
)
TEXT_ONLY = replace(
    REPORT,
    plan=Plan("m", "20%", (), 1),
    forecast=None,
    warnings=(),
    encode_ms=0.0,
    decode_steps=0,
    decode_ms_per_token=None,
    kv_bytes=REPORT.kv_bytes_unpruned,
)

FACTS = [
    "HiRED(alpha=0.3) at 20%",
    "prompt 0, image",
    "63 of 577 tokens",
    "prompt 1, video",
    "7 of 111 tokens",
    "packed",
    "12.35 ms, of it probes 1.50 ms",
    "0.50 ms",
    "0.25 ms",
    "100.00 ms, of it drops 2.50 ms",
    "7.12 ms per token (31 steps)",
    "1,234,567 of 7,654,321 bytes",
    "1.234 GFLOPs of 5 TFLOPs, and 3 GFLOPs of the encoder",
    "-12.35 ms, -3.1% of the unpruned call, by calibrated times",
    "100 ms allowed, 98.77 ms planned, took 97.5 ms",
    "predicted not to pay",
    "decode-bound [at most]",
]


def rendered(report: Report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


@pytest.mark.parametrize("show", [str, rendered])
@pytest.mark.parametrize("fact", FACTS)
def test_text_and_table_tell_every_fact(show: Callable[[Report], str], fact: str) -> None:
    assert fact in show(REPORT)


def test_text_and_table_tell_the_same_facts_in_the_same_order() -> None:
    rows = [line.strip().partition(": ") for line in str(REPORT).splitlines()[1:]]
    lines = rendered(REPORT).splitlines()
    places = [next(i for i, line in enumerate(lines) if name in line and value in line) for name, _, value in rows]
    assert places == sorted(places) and len(set(places)) == len(rows) == 14


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((), "63 of 577 tokens"),
        (((2, 40), (8, 7)), "63 of 577 tokens, 40 from layer 2 on, 7 from layer 8 on"),
        (((1, 50), (2, 40), (3, 30), (4, 0)), "63 of 577 tokens, 0 after 4 drops inside the language model"),
    ],
)
def test_drops_inside_the_language_model_are_told(steps: tuple[tuple[int, int], ...], words: str) -> None:
    report = replace(REPORT, plan=Plan("m", "20%", (ItemPlan(0, "image", 577, 63, steps),), 1))
    assert f"prompt 0, image: {words}\n" in str(report)


@pytest.mark.parametrize(
    ("made_for", "budget", "title"),
    [
        ("Uniform()", "30%", "HiRED(alpha=0.3) with the counts of Uniform() at 30%"),
        ("FastV(r=0.5)", "fields", "HiRED(alpha=0.3) with the counts of FastV(r=0.5)"),
        ("HiRED(alpha=0.3)", "20%", "HiRED(alpha=0.3) at 20%"),
    ],
)
def test_a_plan_made_for_another_method_is_named_in_the_title(made_for: str, budget: str, title: str) -> None:
    report = replace(REPORT, budget=budget, plan=replace(REPORT.plan, method=made_for, budget=budget))
    assert str(report).splitlines()[0] == title and title in rendered(report)


def test_a_report_counts_its_tokens() -> None:
    assert (REPORT.visual_tokens, REPORT.kept_tokens, REPORT.text_only) == (688, 70, False)


@pytest.mark.parametrize("show", [str, rendered])
def test_a_text_only_prompt_says_that_nothing_was_pruned(show: Callable[[Report], str]) -> None:
    assert (TEXT_ONLY.visual_tokens, TEXT_ONLY.kept_tokens, TEXT_ONLY.text_only) == (0, 0, True)
    text = show(TEXT_ONLY)
    assert "none: text-only prompt, ran unpruned" in text and "- (0 steps)" in text and "None" not in text
    later = show(replace(TEXT_ONLY, kv_bytes=1))
    assert "ran unpruned" not in later and "pruned cache" in later


def test_plain_data_survives_json_and_holds_every_field() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data == {
        "method": "HiRED(alpha=0.3)",
        "budget": "20%",
        "positions": "packed",
        "plan": {
            **{k: v for k, v in json.loads(REPORT.plan.to_json()).items() if k not in ("version", "checksum")},
            "joint": False,
        },
        "encode_ms": 12.345,
        "probe_ms": 1.5,
        "select_ms": 0.5,
        "compact_ms": 0.25,
        "prefill_ms": 100.0,
        "drop_ms": 2.5,
        "decode_steps": 31,
        "decode_ms_per_token": 7.125,
        "kv_bytes": 1_234_567,
        "kv_bytes_unpruned": 7_654_321,
        "forecast": {
            "prefill_flops": 1_234_000_000,
            "prefill_flops_unpruned": 5 * 10**12,
            "encoder_flops": 3 * 10**9,
            "prefill_ms_unpruned": 400.0,
            "overhead_ms": 4.75,
            "saved_ms": -12.345,
            "saved_share": -0.031,
            "calibrated": True,
            "promise": {"unit": "ms", "allowed": 100.0, "planned": 98.765, "achieved": 97.5},
        },
        "warnings": ["predicted not to pay", "decode-bound [at most]"],
        "visual_tokens": 688,
        "kept_tokens": 70,
        "text_only": False,
    }


def test_square_brackets_in_a_method_are_text_and_not_markup() -> None:
    assert "Own(layers=[1, 2])" in rendered(replace(REPORT, method="Own(layers=[1, 2])"))
    assert "Own(mode=[bold])" in rendered(replace(REPORT, method="Own(mode=[bold])"))
