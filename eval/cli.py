"""``vlm-budget eval run | resume | report | compare | ls | validate``: methods, budgets and models on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vlm_budget.cli.common import (
    DebugOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    clean,
    out_console,
    print_json,
)
from vlm_budget.eval.shown import (
    data_places,
    method_words,
    plain,
    read_config,
    read_summary,
    run_all,
    shared_tasks,
    words,
    write_pages,
)

app = typer.Typer(
    name="eval",
    help="Measure methods and budgets on benchmarks: what accuracy they cost, and what they save.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: [bold]vlm-budget eval run --model nano --tasks nano --methods hired,divprune --limit 50 --out "
    "results[/bold]",
)

_WHAT, _DATA, _HOW = "What is compared", "On which questions", "How it runs"
TaskFolders = Annotated[
    list[str] | None,
    typer.Option("--task-folder", help="A folder with tasks of your own; repeatable.", rich_help_panel=_DATA),
]
RunFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run.", show_default=False)]
TimesOption = Annotated[
    bool,
    typer.Option("--times/--no-times", help="With measured times; without them equal runs give equal files."),
]


ModelName = Annotated[
    str | None, typer.Option("--model", help="nano, nano-robust, a folder, or a hub id.", rich_help_panel=_WHAT)
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        help="Separated by commas; '+' joins two, options in brackets: 'hired,hired+fastv,hired(alpha=0.3)'. 'all' is "
        "every registered method. Baselines run in any case.",
        rich_help_panel=_WHAT,
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option("--budgets", help="Separated by commas: 1.0,0.4,0.2 or '40% flops'.", rich_help_panel=_WHAT),
]
Without = Annotated[
    str | None,
    typer.Option("--without", help="Baselines that are refused: unpatched, random, uniform.", rich_help_panel=_WHAT),
]
Tasks = Annotated[
    str | None, typer.Option("--tasks", help="Separated by commas; see [bold]eval ls[/bold].", rich_help_panel=_DATA)
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="TASK=FOLDER",
        help="Where a task's dataset lies; TASK=hub or TASK=hub:NAME loads it with datasets. Repeatable.",
        rich_help_panel=_DATA,
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Samples per task at most.", rich_help_panel=_DATA)]
Seed = Annotated[int | None, typer.Option("--seed", help="Of tasks that draw samples.", rich_help_panel=_DATA)]
BatchSize = Annotated[
    int | None, typer.Option("--batch", min=1, help="Samples at once; 8 by default.", rich_help_panel=_HOW)
]
Sharing = Annotated[
    bool | None,
    typer.Option(
        "--share-encoding/--no-share-encoding",
        help="Encode pictures once per batch for all methods, the default.",
        rich_help_panel=_HOW,
    ),
]
Pictures = Annotated[
    int | None,
    typer.Option("--pictures", min=0, help="Worst regressions drawn per method and task.", rich_help_panel=_HOW),
]
ScorerName = Annotated[
    str | None,
    typer.Option(
        "--scorer",
        help="What scores frames for methods that read scores, such as quota: clip:FOLDER_OR_NAME or vlm:FOLDER.",
        rich_help_panel=_HOW,
    ),
]


@app.command("run")
@clean
def run(
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file with any of these options; those given here win.")
    ] = None,
    model: ModelName = None,
    methods: Methods = None,
    budgets: Budgets = None,
    without: Without = None,
    tasks: Tasks = None,
    data: Data = None,
    task_folder: TaskFolders = None,
    limit: Limit = None,
    seed: Seed = None,
    batch: BatchSize = None,
    share_encoding: Sharing = None,
    pictures: Pictures = None,
    scorer: ScorerName = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    out: Annotated[Path, typer.Option("--out", help="Folder of the results.", rich_help_panel=_HOW)] = Path("results"),
    debug: DebugOption = False,
) -> None:
    """Ask a model every sample of some tasks, unpatched and under methods at budgets.

    The unpatched model, random and uniform tokens are always measured beside the methods. Every answer is on the disk
    when its batch is done; [bold]eval resume[/bold] goes on after an interruption. On several processes:
    [bold]accelerate launch -m vlm_budget.eval run …[/bold].

    Examples:

      vlm-budget eval run --model nano-robust --tasks nano --methods hired,divprune --budgets 0.4,0.2 --out results

      vlm-budget eval run --model ./llava --tasks textvqa --data textvqa=./TextVQA --methods hired+fastv --out results

      vlm-budget eval run --config sweep.yaml --limit 100
    """
    from vlm_budget.eval.config import EvalConfig

    given: dict[str, Any] = {
        "model": model,
        "tasks": words(tasks),
        "methods": method_words(methods),
        "budgets": words(budgets),
        "without": words(without),
        "data": data_places(data) if data else None,
        "task_folders": task_folder,
        "limit": limit,
        "seed": seed,
        "batch": batch,
        "share_encoding": share_encoding,
        "pictures": pictures,
        "scorer": scorer,
        "device": None if device is Device.auto else device.value,
        "dtype": None if dtype is Dtype.auto else dtype.value,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    wanted = EvalConfig.of({}, "the command line", **changes) if config is None else EvalConfig.read(config, **changes)
    run_all(wanted, out)


@app.command("resume")
@clean
def resume(folder: RunFolder, debug: DebugOption = False) -> None:
    """Go on with a run that was interrupted; nothing is asked twice.

    Examples:

      vlm-budget eval resume results
    """
    from vlm_budget.eval.config import EvalConfig

    run_all(EvalConfig.of(read_config(folder), f"the manifest of {str(folder)!r}"), folder)


@app.command("report")
@clean
def report(
    folder: RunFolder,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the pages; the run's by default.")] = None,
    formats: Annotated[str, typer.Option("--formats", help="html, md and csv, separated by commas.")] = "html,md,csv",
    task_folder: TaskFolders = None,
    times: TimesOption = True,
    debug: DebugOption = False,
) -> None:
    """Write a run's pages: one HTML file that needs no network, Markdown, and CSV.

    Examples:

      vlm-budget eval report results

      vlm-budget eval report results --no-times --formats csv
    """
    for file in write_pages(read_summary(folder, task_folder, times), out or folder, words(formats) or [], times):
        out_console().print(Text.assemble("Written: ", (str(file), "bold")))


@app.command("compare")
@clean
def compare(
    folder: RunFolder,
    first: Annotated[str, typer.Argument(help="A method, as 'hired at 20%' or 'unpatched'.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    task_folder: TaskFolders = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two methods on the samples both answered: a paired bootstrap, task by task.

    Examples:

      vlm-budget eval compare results 'hired at 20%' 'random at 20%'
    """
    from vlm_budget.errors import RunError, UnknownNameError
    from vlm_budget.eval.summary import compare as paired

    summary = read_summary(folder, task_folder, times=False)
    cells = {str(cell): cell for cell in summary.cells}
    for name in (first, second):
        if name not in cells:
            raise UnknownNameError(f"the run has no {name!r}; it has {', '.join(map(repr, cells))}")
    shared = shared_tasks(summary, cells[first], cells[second])
    if not shared:
        raise RunError(f"{first} and {second} share no answered sample of any task")
    found = {task.name: paired(summary.run, task.name, task.metric, cells[first], cells[second]) for task in shared}
    if as_json:
        # JSON knows no NaN, which an interval over a single cluster is.
        told = {
            name: {key: None if value != value else value for key, value in vars(one).items()}
            for name, one in found.items()
        }
        print_json({"first": first, "second": second, "tasks": told})
        return
    table = Table(title=Text(f"{first} minus {second}"))
    for name in ("task", "difference", "95 % interval", "p", "samples"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, one in found.items():
        interval, p = (f"{one.low:+.4f} … {one.high:+.4f}", f"{one.p:.3f}") if one.p == one.p else ("–", "–")
        table.add_row(Text(name), f"{one.difference:+.4f}", interval, p, str(one.n))
    out_console().print(table)


@app.command("ls")
@clean
def list_tasks(
    task: Annotated[str | None, typer.Argument(help="Show one task: its data, prompt and metric.")] = None,
    task_folder: TaskFolders = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the tasks, or show one.

    Examples:

      vlm-budget eval ls

      vlm-budget eval ls textvqa
    """
    from dataclasses import asdict

    from vlm_budget.eval.report.words import clean as clean_text
    from vlm_budget.eval.task import add_folder, read_task, task_names

    for folder in task_folder or []:
        add_folder(folder)
    if task is not None:
        facts = asdict(read_task(task))
        if as_json:
            print_json(facts)
            return
        shown = Table(show_header=False)
        for name, value in facts.items():
            shown.add_row(name, Text(plain(value)))
        out_console().print(shown)
        return
    tasks = [read_task(name) for name in task_names()]
    if as_json:
        print_json({"tasks": [asdict(one) for one in tasks]})
        return
    table = Table()
    for name in ("task", "version", "kind", "metric", "data", "what"):
        table.add_column(name)
    for one in tasks:
        needed = "yours: --data" if one.needs_data else "made on the spot"
        table.add_row(
            Text(one.name), str(one.version), one.modality, Text(one.metric), needed, Text(clean_text(one.title))
        )
    out_console().print(table)


@app.command("validate")
@clean
def validate(
    tasks: Annotated[str, typer.Option("--tasks", help="Separated by commas.")],
    data: Data = None,
    task_folder: TaskFolders = None,
    limit: Limit = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Open every picture, too.")] = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read whole datasets without any model: every record, every picture. Exit code 1 where something is wrong.

    Examples:

      vlm-budget eval validate --tasks textvqa --data textvqa=./TextVQA
    """
    from vlm_budget.eval.config import EvalConfig
    from vlm_budget.eval.report.words import clean as clean_text
    from vlm_budget.eval.validate import look_through

    config = EvalConfig.of(
        {}, model="none", tasks=words(tasks), data=data_places(data), task_folders=task_folder or [], limit=limit
    )
    found = look_through(config, pictures)
    if as_json:
        print_json({"tasks": found})
    else:
        for name, facts in found.items():
            colour = "red" if facts["faults"] else "green"
            out_console().print(
                Text.assemble((name, "bold"), f": {facts['samples']} samples, ", (f"{facts['broken']} faulty", colour))
            )
            for fault in facts["faults"]:
                out_console().print(Text(f"  {clean_text(fault)}"))  # of unknown origin: it may move the cursor
    if any(facts["broken"] for facts in found.values()):
        raise typer.Exit(1)
