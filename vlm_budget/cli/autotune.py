"""``vlm-budget autotune``: every method at every budget on one model, and what none of them beats."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..budget import Budget
from ..errors import MissingExtraError, OptionError
from .common import DebugOption, Device, DeviceOption, Dtype, DtypeOption, JsonOption, clean, out_console, print_json
from .search import (
    AnswerTokensOption,
    BatchOption,
    DataOption,
    JournalOption,
    MetricChoice,
    MetricOption,
    ModelArgument,
    SpreadOption,
    check_apart,
    check_judging,
    load_both,
    say_stopped,
)


@clean
def autotune(
    model: ModelArgument,
    data: DataOption,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Separated by commas, such as '10%,20%,40% flops'.")
    ] = "10%,20%,30%,50%",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", help="Separated by commas; '+' joins two, as in 'hired,fastv,hired+fastv'. Default: all."
        ),
    ] = None,
    metric: MetricOption = MetricChoice.agreement,
    answer_tokens: AnswerTokensOption = 1,
    timed: Annotated[int, typer.Option("--timed", min=1, help="Prompts that are timed.")] = 3,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds of each.")] = 3,
    max_spread: SpreadOption = 4.0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the front, its plans and its picture.")] = Path(
        "front"
    ),
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw front.png; needs matplotlib.")] = True,
    journal: JournalOption = None,
    batch: BatchOption = 8,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge and time methods at budgets, and write the plans on the Pareto front.

    Every point is kept in a journal: run the same command again to go on after Ctrl-C.

    Examples:

      vlm-budget autotune nano-robust --data calib.jsonl --metric accuracy

      vlm-budget autotune ./my-llava --data calib.jsonl --methods hired,fastv,hired+fastv --budgets 10%,20%
    """
    spends = [Budget.parse(text.strip()) for text in budgets.split(",") if text.strip()]
    if plot:
        _require_matplotlib()
    candidates = None if methods is None else [_candidate(text) for text in methods.split(",") if text.strip()]
    points = journal or out / "points.journal"
    check_apart(data, {"--journal": points})

    from ..search.autotune import autotune as tune
    from ..search.autotune import read_tries
    from ..search.front import earlier_files

    read_tries(candidates, spends)
    _make_folder(out, earlier_files)
    check_judging(metric, answer_tokens, points)
    loaded, prompts = load_both(model, data, device, dtype, debug, labelled=metric is MetricChoice.accuracy)
    try:
        front = tune(
            loaded.model,
            prompts,
            budgets=spends,
            methods=candidates,
            metric=metric.value,
            answer_tokens=answer_tokens,
            timed=timed,
            repeats=repeats,
            journal=points,
            tokenizer=loaded.processor.tokenizer,
            batch=batch,
            max_spread=max_spread,
        )
    except KeyboardInterrupt:
        say_stopped(points)
    files = front.save(out, picture=plot)
    if as_json:
        print_json({"command": "autotune", "model": loaded.facts(), "files": list(map(str, files)), **front.to_dict()})
        return
    console = out_console()
    console.print(front.table())
    for reason in front.reasons():
        console.print(Text(reason, "dim"))
    for file in files:
        console.print(Text.assemble("On the front: ", (str(file), "bold")))


def _candidate(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split("+")]
    return names[0] if len(names) == 1 else names


def _make_folder(out: Path, check: Callable[[Path], object]) -> None:
    """Before an hour of work, not after it.

    Raises:
        OptionError: No front can be written there.
    """
    try:
        check(out)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, OptionError) as error:
        raise OptionError(f"--out {str(out)!r}: {error}") from error


def _require_matplotlib() -> None:
    """Asked before an hour of work, not after it."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            "drawing the front needs matplotlib: pip install 'vlm-budget[search]', or pass --no-plot"
        )
