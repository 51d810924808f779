"""``vlm-budget demo``: a poster, its questions, and the answers at 100 % and within the budget."""

from __future__ import annotations

import importlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import OptionError
from .common import (
    BudgetOption,
    DebugOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    FieldOption,
    JsonOption,
    MethodOption,
    ModelOption,
    OutOption,
    PlanOption,
    PositionsOption,
    check_out,
    clean,
    err_console,
    out_console,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from .compare import Comparison, Setting, Side
    from .loading import Loaded
    from .progress import Runs

_HONEST = (
    "nano is a small synthetic model: it shows that the machinery works, not how a released model ranks methods. Read "
    "times as ratios on this machine; on a picture of 192 tokens there is little to save. nano-robust was trained with "
    "random token dropout; --model nano was not, and loses more."
)
_BATCH = 24  # prompts that nano answers at once when only accuracy is wanted
_PAGES = 20


@dataclass(frozen=True)
class Asked:
    """One question with its truth and both answers.

    Attributes:
        question: As the model got it.
        truth: One word.
        comparison: Both answers and what they took.
        first_word: Only the first word of an answer counts.
    """

    question: str
    truth: str
    comparison: Comparison
    first_word: bool

    def judged(self, side: Side) -> tuple[str, bool]:
        """The answer that counts, and whether it is right."""
        return counted(side.answer, self.first_word), is_right(side.answer, self.truth, self.first_word)


@clean
def demo(
    model: ModelOption = "nano-robust",
    method: MethodOption = None,
    budget: BudgetOption = None,
    option: FieldOption = None,
    plan: PlanOption = None,
    positions: PositionsOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=999, help="Which of the held-out posters.")] = 22,
    pages: Annotated[
        int | None,
        typer.Option(
            "--pages", min=0, max=600, help="Posters for the accuracy line; by default 20 for nano, else none."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds per question.")] = 3,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 4,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    out: OutOption = Path("kept.png"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show on a poster what a budget does, with no download.

    nano, a small model that ships with the library, answers questions about a generated poster that it has not seen,
    with all visual tokens and within the budget. Wrong answers are shown as wrong. Its two checkpoints are judged by
    the first word they say, and with the original position ids, since some questions ask where a digit is.

    Examples:

      vlm-budget demo

      vlm-budget demo --budget 10% --method random --seed 3

      vlm-budget demo --model nano --option newline=keep_all

      vlm-budget demo --method hired+fastv --budget 50%

      vlm-budget demo --model llava-hf/llava-v1.6-vicuna-7b-hf
    """
    from .options import Wanted

    wanted = Wanted.read(method, option, budget, plan)
    check_out(out)

    from ..prompts import build_inputs
    from .compare import Setting, compare
    from .loading import NANO, load
    from .progress import runs, steps
    from .show import save_kept

    stderr = err_console()
    with steps(stderr, 6) as step:
        step("reading the method")
        methods = wanted.methods()
        spend = wanted.spend(methods)
        _check_model(model)
        loaded = load(model, device.value, dtype.value, step, debug)
        step("drawing posters")
        counted_pages = pages if pages is not None else _PAGES * loaded.shipped
        samples = importlib.import_module(f"{NANO}.data").test_set(max(seed + 1, counted_pages))
    place = positions.value if positions else "original" if loaded.shipped else None
    setting = Setting(methods, spend, place, max_new_tokens, repeats, wanted.recipe)
    sample, asked = samples[seed], []
    batches = make_batches(samples[:counted_pages], _BATCH if loaded.shipped else 1)
    with runs(stderr, setting.runs * len(sample.questions) + 2 * len(batches)) as bar:
        for question in sample.questions:
            inputs = build_inputs(loaded.processor, [question.prompt], [[sample.image]], loaded.model)
            comparison = compare(loaded, inputs, setting, bar)
            asked.append(Asked(question.prompt, question.answer, comparison, loaded.shipped))
        accuracy = {"posters": counted_pages, **held_out(loaded, batches, setting, bar)} if counted_pages else None
    kept = asked[0].comparison.kept
    save_kept(out, [sample.image], kept, setting.title, [f"poster {seed}"])
    if as_json:
        print_json(_facts(loaded, setting, seed, asked, accuracy, out))
    else:
        _show(out_console(), loaded, setting, seed, asked, accuracy, out)


def _check_model(name: str) -> None:
    """Refuse shipped models that know nothing of the posters.

    Raises:
        OptionError: It is one of them.
    """
    from .loading import NANO, shipped_models

    package = shipped_models().get(name)
    if package is not None and package.__name__ != NANO:
        raise OptionError(
            f"the demo asks about posters, and {name} answers about rooms and clips alone: try --model nano, or "
            f"'vlm-budget eval run --model {name} --tasks nano_views'"
        )


def counted(answer: str, first_word: bool) -> str:
    """The part of an answer that is judged."""
    return answer.split(maxsplit=1)[0] if first_word and answer else answer


def is_right(answer: str, truth: str, first_word: bool) -> bool:
    """The truth is among the words that count."""
    return truth.lower() in re.findall(r"\w+", counted(answer, first_word).lower())


def make_batches(samples: Sequence[Any], size: int) -> list[list[tuple[Any, Any]]]:
    """Pictures and questions of all posters, ``size`` at a time."""
    pairs = [(page.image, question) for page in samples for question in page.questions]
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def held_out(
    loaded: Loaded, batches: Sequence[Sequence[tuple[Any, Any]]], setting: Setting, runs: Runs
) -> dict[str, int]:
    """Right answers, unpruned and within the budget, and how many questions there were."""
    import torch

    from ..prompts import build_inputs
    from .compare import FULL

    found = {"questions": sum(map(len, batches)), "right_full": 0, "right_pruned": 0}
    for batch in batches:
        images, questions = zip(*batch, strict=True)
        prompts = [question.prompt for question in questions]
        inputs = build_inputs(loaded.processor, prompts, [[image] for image in images], loaded.model)
        for name, label, patch in (
            ("right_full", FULL, setting.patch_full),
            ("right_pruned", setting.name, setting.patch),
        ):
            runs.begin(f"more posters, {label}")
            with patch(loaded.model), torch.inference_mode():
                ids = loaded.model.generate(**inputs, max_new_tokens=setting.max_new_tokens, do_sample=False)
            runs.end()
            new = ids[:, inputs["input_ids"].shape[1] :]
            for text, question in zip(
                loaded.processor.tokenizer.batch_decode(new, skip_special_tokens=True), questions, strict=True
            ):
                found[name] += is_right(text.strip(), question.answer, loaded.shipped)
    return found


def mean_sides(asked: Sequence[Asked]) -> tuple[Side, Side]:
    """Means of all numbers over the questions, per column."""
    from .compare import Side

    def mean(sides: Sequence[Side]) -> Side:
        values: dict[str, Any] = {"answer": ""}
        for field in fields(Side)[1:]:
            known = [getattr(side, field.name) for side in sides if getattr(side, field.name) is not None]
            values[field.name] = statistics.fmean(known) if known else None
        return Side(**values)

    return mean([a.comparison.full for a in asked]), mean([a.comparison.pruned for a in asked])


def _facts(
    loaded: Loaded, setting: Setting, seed: int, asked: Sequence[Asked], accuracy: dict[str, Any] | None, out: Path
) -> dict[str, Any]:
    from .run import kept_facts

    return {
        "command": "demo",
        "model": loaded.facts(),
        "method": str(setting.methods),
        "budget": None if setting.budget is None else str(setting.budget),
        "seed": seed,
        "repeats": setting.repeats,
        "questions": [
            {
                "question": a.question,
                "truth": a.truth,
                "right_full": a.judged(a.comparison.full)[1],
                "right_pruned": a.judged(a.comparison.pruned)[1],
                **a.comparison.to_dict(),
            }
            for a in asked
        ],
        "mean": {name: asdict(side) for name, side in zip(("full", "pruned"), mean_sides(asked), strict=True)},
        "accuracy": accuracy,
        "kept": kept_facts(asked[0].comparison.kept),
        "kept_picture": str(out),
    }


def _show(
    console: Console,
    loaded: Loaded,
    setting: Setting,
    seed: int,
    asked: Sequence[Asked],
    accuracy: dict[str, Any] | None,
    out: Path,
) -> None:
    from .compare import FULL
    from .show import times_table

    full, pruned = mean_sides(asked)
    size = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    kind, where = type(loaded.model).__name__, f"{loaded.device}, {loaded.dtype}"
    method = f"{setting.title}, {asked[0].comparison.positions} positions"
    console.print(Text.assemble((loaded.name, "bold"), f": {kind}, {size:.3g} M parameters, {where}"))
    console.print(Text.assemble((method, "bold"), "\n"))
    table = Table(title=f"Poster {seed}, unseen in training", title_justify="left", header_style="bold")
    inside = " a layer" * (pruned.mean_tokens != pruned.visual_tokens)
    columns = ((FULL, full), (setting.name, pruned))
    tokens = [f"{name}: {side.mean_tokens:.0f} tokens{inside}" for name, side in columns]
    for name in ("question", "truth", *tokens):
        table.add_column(name, overflow="fold")
    for a in asked:
        answers = [_marked(*a.judged(side)) for side in (a.comparison.full, a.comparison.pruned)]
        table.add_row(Text(a.question), Text(a.truth), *answers)
    console.print(table)
    console.print()
    console.print(times_table(full, pruned, f"Means over the {len(asked)} questions", setting.name))
    console.print()
    if accuracy:
        count = accuracy["questions"]
        shares = [f"[bold]{accuracy[name] / count:.0%}[/bold]" for name in ("right_full", "right_pruned")]
        console.print(
            f"Over {accuracy['posters']} unseen posters with {count} questions: {shares[0]} right with all tokens, "
            f"{shares[1]} {'pruned' if setting.budget is None else f'at {setting.budget}'}."
        )
    console.print(Text.assemble("What was kept: ", (str(out), "bold"), "\n"))
    if loaded.shipped:
        console.print(_HONEST, style="dim")
    console.print(
        "Your own: [bold]vlm-budget run photo.jpg --prompt '...' --model FOLDER_OR_HUB_ID --budget 20%[/bold]"
    )


def _marked(answer: str, right: bool) -> Text:
    return Text(answer or "(nothing)", "green") if right else Text(f"{answer or '(nothing)'}  (wrong)", "red")
