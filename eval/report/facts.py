"""What was run, and what to beware of when reading its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_budget.eval.cells import Cell
from vlm_budget.eval.report import words
from vlm_budget.eval.summary import Result, Summary
from vlm_budget.eval.task import Task

FEW, SMALL_SHARE = 100, 0.25


@dataclass(frozen=True)
class Progress:
    """How much of a run is there.

    Attributes:
        answers: Answers, failed ones too.
        expected: How many there will be; None where the run does not say.
        errors: Answers that failed.
    """

    answers: int
    expected: int | None
    errors: int

    @property
    def finished(self) -> bool:
        """Everything has been asked."""
        return self.expected is not None and self.answers >= self.expected

    @property
    def word(self) -> str:
        """Its state in a word."""
        return "finished" if self.finished else "not finished"

    def __str__(self) -> str:
        """For people."""
        if self.expected is None:
            return f"{self.answers:,} answers"
        return f"{self.word}: {self.answers:,} of {self.expected:,} answers"


@dataclass(frozen=True)
class Footgun:
    """Something to beware of.

    Attributes:
        title: What it is about.
        text: What it means.
        cases: Where it holds.
        grave: The figures mislead whoever does not know it.
    """

    title: str
    text: str
    cases: Sequence[str] = ()
    grave: bool = True


def progress(summary: Summary) -> Progress:
    """How much of the run is there."""
    samples = _mapping(summary.run.manifest, "samples")
    numbers = [samples.get(task.name) for task in summary.tasks]
    known = [number for number in numbers if isinstance(number, int)]
    expected = sum(known) * len(summary.cells) if known and len(known) == len(numbers) else None
    found = summary.run.answers
    return Progress(len(found), expected, sum(one.error is not None for one in found))


def model_name(summary: Summary) -> str:
    """What the run calls its model."""
    return str(_mapping(summary.run.manifest, "model").get("name") or "a model")


def facts(summary: Summary, times: bool) -> list[tuple[str, str]]:
    """What was run, as names and values; without dates where times are left out."""
    manifest = summary.run.manifest
    model, machine = _mapping(manifest, "model"), _mapping(manifest, "environment")
    found: list[tuple[str, object]] = [
        ("model", model.get("name")),
        ("class", " / ".join(str(model[name]) for name in ("class", "family") if model.get(name))),
        ("parameters", _amount(model.get("parameters"))),
        ("precision", ", ".join(str(model[name]) for name in ("dtype", "attention") if model.get(name))),
        ("device", _device(model, machine)),
        ("git", machine.get("git")),
        ("versions", _pairs(_mapping(machine, "versions"), " ")),
        ("options", _pairs(_mapping(manifest, "options"), " = ")),
        ("started", (manifest.get("created") or machine.get("date")) if times else None),
        ("state", progress(summary)),
    ]
    samples, data = _mapping(manifest, "samples"), _mapping(manifest, "data")
    for task in summary.tasks:
        size = f"{samples[task.name]} samples" if task.name in samples else ""
        text = [f"version {task.version}", size, str(data.get(task.name) or "")]
        found.append((f"task {task.name}", ", ".join(filter(None, [task.title, *text]))))
    found.append(("methods", _methods(summary.cells)))
    return [(name, words.clean(value, 1500)) for name, value in found if value not in (None, "")]


def _methods(cells: Sequence[Cell]) -> str:
    """Methods by the budgets they were given."""
    spent: dict[str, list[str]] = {}
    for cell in cells:
        spent.setdefault(cell.methods, []).extend([] if cell.unpatched else [words.budget(cell)])
    alike: dict[str, list[str]] = {}
    for name, budgets in spent.items():
        alike.setdefault(", ".join(budgets), []).append(name)
    return "; ".join(", ".join(names) + (f" at {budgets}" if budgets else "") for budgets, names in alike.items())


def footguns(summary: Summary, times: bool) -> list[Footgun]:
    """The footguns of this run: what applies first, then what always does."""
    found = [*_unfinished(summary), *_sessions(summary), *_reading(summary), *_losing(summary)]
    found += _slow(summary) if times else []
    found += [*_few(summary), *_failed(summary), *_baselines(summary), *_code(summary)]
    found.append(
        Footgun(
            "Overlapping intervals are no finding",
            "Two methods whose intervals overlap have not been told apart, and two whose standard errors do not "
            "overlap may differ by chance where many are compared. Use the paired differences; of the many pairs "
            "here, one in twenty leaves its 95 % interval by chance alone.",
            grave=False,
        )
    )
    if times:
        found.append(
            Footgun(
                "Times hold side by side, on this machine",
                "Milliseconds of this run may be compared with each other. Another device, batch size, library version "
                "or a busy machine gives others; compare shares, not milliseconds, across machines.",
                grave=False,
            )
        )
    return found


def _sessions(summary: Summary) -> Iterator[Footgun]:
    """Answers of different code in one run."""
    codes: dict[str, None] = {}
    for one in summary.run.sessions:
        codes[", ".join(filter(None, [str(one.get("git") or ""), _pairs(_mapping(one, "versions"), " ")]))] = None
    if len(codes) > 1:
        text = "It was interrupted and continued after code or libraries had changed; its answers are of both."
        yield Footgun("The run was continued with other code", text, [words.clean(code, 300) for code in codes])


def _unfinished(summary: Summary) -> Iterator[Footgun]:
    now = progress(summary)
    if now.expected is not None and not now.finished:
        text = f"{now.expected - now.answers:,} of {now.expected:,} answers are missing. Methods may have been asked "
        yield Footgun("The run is not finished", text + "different samples; continue it with 'vlm-budget eval resume'.")


def _reading(summary: Summary) -> Iterator[Footgun]:
    for task in summary.tasks:
        cases = []
        for one in _of(summary, task) if task.reads_text else ():
            share, worse = one.share.get("mean_kept"), one.minus_unpatched
            clearly = worse is not None and worse.high < 0
            if not one.cell.unpatched and (clearly or (share is not None and share <= SMALL_SHARE)):
                said = f", {words.signed(worse.difference)} to unpatched" if worse is not None else ""
                cases.append(f"{one.cell}: {words.percent(share) if share is not None else words.NONE} of tokens{said}")
        if cases:
            yield Footgun(
                f"{task.name} reads small print",
                "Letters need their tokens. Where a method keeps a quarter of them or less, or loses clearly, do not "
                "use it for documents, receipts, charts or screens.",
                cases,
            )


def _losing(summary: Summary) -> Iterator[Footgun]:
    cases = [
        f"{one.cell} on {one.task}: {words.interval(one.minus_random)}"
        for one in summary.results
        if one.minus_random is not None and one.minus_random.high < 0
    ]
    if cases:
        yield Footgun("Worse than random tokens", "Here the choice of tokens does harm.", cases)


def _slow(summary: Summary) -> Iterator[Footgun]:
    cases = [
        f"{one.cell} on {one.task}: not faster, {one.share['prefill_ms']:.2f} x the unpatched prefill"
        for one in summary.results
        if not one.cell.unpatched and one.share.get("prefill_ms", 0) >= 1
    ]
    if cases:
        yield Footgun(
            "Not faster",
            "Fewer tokens, but the measured prefill with choosing takes as long as the whole one, or longer.",
            cases,
        )


def _few(summary: Summary) -> Iterator[Footgun]:
    cases = []
    for task in summary.tasks:
        sizes = [one.main.n for one in _of(summary, task)]
        if sizes and min(sizes) < FEW:
            cases.append(
                f"{task.name}: {min(sizes)} samples" + ("" if min(sizes) == max(sizes) else f" to {max(sizes)}")
            )
    if cases:
        text = f"Below {FEW} samples a difference of a few hundredths is noise; intervals and p are rough, too."
        yield Footgun("Few samples", text, cases)


def _failed(summary: Summary) -> Iterator[Footgun]:
    cases = []
    for task in summary.tasks:
        counts = [sum(one.errors.values()) for one in _of(summary, task)]
        if any(counts):
            cases.append(f"{task.name}: {sum(counts)} answers")
    if cases:
        text = "They count neither as right nor as wrong. Differences are on samples that both sides answered."
        yield Footgun("Answers are missing", text, cases, grave=False)


def _baselines(summary: Summary) -> Iterator[Footgun]:
    there = {cell.methods for cell in summary.cells}
    cases = [name for name in ("unpatched", "random", "uniform") if name not in there]
    if cases:
        yield Footgun("Baselines were refused", "Without them, nothing here says what a method is worth.", cases)


def _code(summary: Summary) -> Iterator[Footgun]:
    if "+changes" in str(_mapping(summary.run.manifest, "environment").get("git")):
        text = "The working tree differed from its commit when this ran: the commit alone does not give these figures."
        yield Footgun("The code had changes that are not committed", text)


def _of(summary: Summary, task: Task) -> list[Result]:
    return [one for one in summary.results if one.task == task.name]


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = data.get(name)
    return found if isinstance(found, Mapping) else {}


def _amount(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _pairs(data: Mapping[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in data.items() if value is not None)


def _device(model: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    names = dict.fromkeys(str(one) for one in (machine.get("device"), model.get("device")) if one)
    threads = machine.get("threads")
    return ", ".join([*names, *([f"{threads} threads"] if threads else [])])


def losing(summary: Summary) -> list[Cell]:
    """Cells that lose to random on some task."""
    found = [one.cell for one in summary.results if one.minus_random is not None and one.minus_random.high < 0]
    return list(dict.fromkeys(found))


def slow(summary: Summary) -> list[Cell]:
    """Cells that are not faster than the unpatched model on some task."""
    found = [one.cell for one in summary.results if not one.cell.unpatched and one.share.get("prefill_ms", 0) >= 1]
    return list(dict.fromkeys(found))
