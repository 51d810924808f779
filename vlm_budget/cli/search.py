"""``vlm-budget search``: a schedule for one model, found on calibration prompts, as a plan file."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..budget import Budget
from ..errors import OptionError
from .common import DebugOption, Device, DeviceOption, Dtype, DtypeOption, JsonOption, clean, err_console, out_console
from .common import print_json as write_json

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..search.metrics import Metric

STOPPED = 130  # what shells give a program that Ctrl-C ended


class Schedule(str, Enum):
    """What can be searched."""

    gsearch = "gsearch"
    psigmoid = "psigmoid"


class MetricChoice(str, Enum):
    """How a schedule is judged."""

    accuracy = "accuracy"
    agreement = "agreement"
    kl = "kl"


class How(str, Enum):
    """How G-Search finds a layer's rate."""

    bisection = "bisection"
    bayes = "bayes"


class SamplerChoice(str, Enum):
    """Samplers of optuna."""

    tpe = "tpe"
    gp = "gp"


class QueriesChoice(str, Enum):
    """Whose attention ranks the tokens."""

    instruction = "instruction"
    last = "last"


_WHAT, _HOW, _WHERE = "What to search", "How to judge and search", "Where and how to run"
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="nano, nano-robust, nano-views (shipped), a folder, or a hub id.")
]
DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        help='JSON lines: {"image": "a.png", "prompt": "…", "answer": "…"}; paths relative to the file, answers for '
        "--metric accuracy only.",
        rich_help_panel=_WHAT,
    ),
]
MetricOption = Annotated[
    MetricChoice,
    typer.Option("--metric", help="accuracy: labels. agreement, kl: against the unpruned model.", rich_help_panel=_HOW),
]
AnswerTokensOption = Annotated[
    int, typer.Option("--answer-tokens", min=1, help="Answer tokens that must agree.", rich_help_panel=_HOW)
]
SpreadOption = Annotated[
    float,
    typer.Option("--max-spread", min=1, help="Largest over smallest prompt, in visual tokens.", rich_help_panel=_HOW),
]
BatchOption = Annotated[
    int, typer.Option("--batch", min=1, help="Prompts of equal shape that run at once.", rich_help_panel=_WHERE)
]
JournalOption = Annotated[
    Path | None,
    typer.Option("--journal", help="Where evaluated points are kept; by default beside --out.", rich_help_panel=_WHERE),
]


BudgetChoice = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help="What a prompt may spend, such as 0.3 (mean share of the tokens over the layers) or '40% flops'. psigmoid "
        "needs one; gsearch then raises its tolerance until it fits.",
        rich_help_panel=_WHAT,
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        help="gsearch: share of the unpruned quality that may be lost, below 1; nats for kl. Default 0.01, kl 0.02.",
        rich_help_panel=_WHAT,
    ),
]
TrialsOption = Annotated[
    int | None,
    typer.Option("--trials", min=1, help="psigmoid: 40 in all; gsearch by bayes: 12 per layer.", rich_help_panel=_HOW),
]


@clean
def search(
    model: ModelArgument,
    data: DataOption,
    method: Annotated[
        Schedule, typer.Option("--method", "-m", help="Which schedule.", rich_help_panel=_WHAT)
    ] = Schedule.gsearch,
    budget: BudgetChoice = None,
    tolerance: ToleranceOption = None,
    metric: MetricOption = MetricChoice.agreement,
    answer_tokens: AnswerTokensOption = 1,
    how: Annotated[
        How | None,
        typer.Option("--search", help="gsearch: how a layer's rate is found. Default bisection.", rich_help_panel=_HOW),
    ] = None,
    trials: TrialsOption = None,
    sampler: Annotated[
        SamplerChoice | None, typer.Option("--sampler", help="Of optuna. Default tpe.", rich_help_panel=_HOW)
    ] = None,
    queries: Annotated[
        QueriesChoice, typer.Option("--queries", help="Whose attention ranks the tokens.", rich_help_panel=_HOW)
    ] = QueriesChoice.instruction,
    max_spread: SpreadOption = 4.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of optuna. Default 0.", rich_help_panel=_HOW)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.", rich_help_panel=_WHERE)] = Path(
        "plan.json"
    ),
    journal: JournalOption = None,
    batch: BatchOption = 8,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search a keep rate per decoder layer, and write it as a plan for patch(model, plan=...).

    gsearch finds the lowest rates that cost at most a tolerance in quality; psigmoid finds the curve over depth that
    costs least quality within a budget. Every evaluated point is kept in a journal: run the same command again to go on
    after Ctrl-C.

    Examples:

      vlm-budget search nano-robust --data calib.jsonl --metric accuracy --tolerance 0.02

      vlm-budget search ./my-qwen2.5-vl --data calib.jsonl --method psigmoid --budget 0.3 --out plan.json
    """
    spend = None if budget is None else Budget.parse(budget)
    check_file(out)
    points = journal or out.with_name(out.name + ".journal")
    check_apart(data, {"--out": out, "--journal": points})
    given = {"--search": how, "--tolerance": tolerance, "--trials": trials, "--sampler": sampler, "--seed": seed}
    _check_method(method, spend, {name: value for name, value in given.items() if value is not None})

    from ..search.gsearch import gsearch, smallest_by
    from ..search.psigmoid import psigmoid

    check_judging(metric, answer_tokens, points).allowed(tolerance)
    optuna: dict[str, Any] = {"sampler": None if sampler is None else sampler.value, "seed": seed}
    find: Any = gsearch
    own: dict[str, Any] = {"search": (how or How.bisection).value, "evaluations": trials, "tolerance": tolerance}
    if method is Schedule.psigmoid:
        find, own = psigmoid, {"trials": trials}
    smallest_by(own.get("search", "bayes"), evaluations=trials, **optuna)  # what is not installed is said here
    passed = {name: value for name, value in {**own, **optuna}.items() if value is not None}  # else their defaults

    loaded, prompts = load_both(model, data, device, dtype, debug, labelled=metric is MetricChoice.accuracy)
    common: dict[str, Any] = {
        "metric": metric.value,
        "answer_tokens": answer_tokens,
        "queries": queries.value,
        "journal": points,
        "tokenizer": loaded.processor.tokenizer,
        "batch": batch,
        "max_spread": max_spread,
        **passed,
    }
    try:
        recipe = find(loaded.model, prompts, budget=spend, **common)
    except KeyboardInterrupt:
        say_stopped(points)
    recipe.save(out)
    if as_json:
        write_json({"command": "search", "model": loaded.facts(), "out": str(out), "recipe": _plain(recipe)})
        return
    _show(recipe, out)


def _check_method(method: Schedule, budget: Budget | None, given: Mapping[str, Any]) -> None:
    """Refuse options that the chosen search would ignore.

    Raises:
        OptionError: An option of another search, or psigmoid without a budget.
    """
    if method is Schedule.psigmoid:
        if budget is None:
            raise OptionError("--method psigmoid places its curve by a budget: pass --budget, such as --budget 0.3")
        if "--tolerance" in given:
            raise OptionError("--tolerance is for gsearch; psigmoid keeps to its budget and loses what it must")
        if "--search" in given:
            raise OptionError("--search is for gsearch; psigmoid always searches by optuna")
        return
    if given.get("--search") is How.bayes:
        return
    for name in ("--trials", "--sampler", "--seed"):
        if name in given:
            raise OptionError(f"{name} is for --search bayes or --method psigmoid; bisection tries what it must")


def check_judging(metric: MetricChoice, answer_tokens: int, journal: Path) -> Metric:
    """How to judge, checked before a model loads.

    Raises:
        OptionError: Values that mean nothing, alone or together.
        JournalError: No journal can be kept there.
    """
    from ..search.journal import check_place
    from ..search.metrics import Metric

    check_place(journal)
    return Metric(metric.value, answer_tokens)


def load_both(
    model: str, data: Path, device: Device, dtype: Dtype, debug: bool, labelled: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """The model, and the calibration prompts as its inputs; the data's faults are said before the model loads."""
    from ..search.data import load_jsonl, read_lines, require_answers
    from .loading import load
    from .progress import steps

    with steps(err_console(), 6) as step:
        step("reading the calibration file")
        rows = read_lines(data)
        if labelled:
            require_answers([answer for *_, answer in rows])
        loaded = load(model, device.value, dtype.value, step, debug)
        step("reading the pictures")
        return loaded, load_jsonl(data, loaded.processor, loaded.model)


def check_file(path: Path) -> None:
    """Refuse, before any work is done, a place where no file can be written.

    Raises:
        OptionError: It is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise OptionError(f"--out {str(path)!r} is a directory; name a file in it, such as plan.json")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--out {str(path)!r}: there is no folder {str(path.parent)!r}")


def check_apart(data: Path, written: Mapping[str, Path]) -> None:
    """Refuse to write over the calibration file, or two things into one file.

    Raises:
        OptionError: Two of the paths are the same file.
    """
    taken = {data.absolute().resolve(): "--data"}
    for option, path in written.items():
        other = taken.setdefault(path.absolute().resolve(), option)
        if other != option:
            raise OptionError(f"{option} {str(path)!r} is the file of {other}; name another")


def say_stopped(journal: Path) -> None:
    """Tell how to go on after Ctrl-C, and leave.

    Raises:
        Exit: Always.
    """
    console = err_console()
    console.print(
        f"Stopped. What was evaluated is kept in {journal}: run the same command again to go on from there.",
        markup=False,
        soft_wrap=True,
    )
    raise typer.Exit(STOPPED)


def _plain(recipe: Recipe) -> dict[str, Any]:
    import json

    plain: dict[str, Any] = json.loads(recipe.to_json())
    return plain


def _show(recipe: Recipe, out: Path) -> None:
    console, judged = out_console(), recipe.calibration
    assert judged is not None
    (name, options), *_ = recipe.spec
    table = Table(title=f"{name} for {recipe.model.name}", title_justify="left", show_header=False)
    if "rates" in options:
        table.add_row(Text("rates"), Text(", ".join(f"{rate:.3g}" for rate in options["rates"])))
    else:
        table.add_row(
            Text("curve"), Text(", ".join(f"{key} {value:.3g}" for key, value in _numbers(options)) or "default")
        )
    table.add_row(Text("tokens per layer"), Text(f"{recipe.cost['share']:.1%} of {_tokens(recipe)} on average"))
    table.add_row(Text("FLOPs, predicted"), Text(f"{recipe.cost['flops'] / recipe.cost['flops_full']:.1%} of unpruned"))
    quality = f"{judged.quality:.4g} on {judged.size} prompts, {judged.full_quality:.4g} unpruned"
    table.add_row(Text(judged.metric), Text(quality))
    console.print(table)
    console.print(
        Text.assemble("Written: ", (str(out), "bold"), f". Use it: vlm_budget.patch(model, plan={str(out)!r})")
    )


def _numbers(options: Any) -> list[tuple[str, float]]:
    return [(key, value) for key, value in options.items() if isinstance(value, float)]


def _tokens(recipe: Recipe) -> str:
    least, most = recipe.model.tokens
    return str(least) if least == most else f"{least} to {most}"
