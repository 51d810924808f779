"""``vlm-budget video``: a question about a video, answered within a budget of visual tokens."""

from __future__ import annotations

import importlib
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import OptionError
from .common import (
    DebugOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    FieldOption,
    JsonOption,
    ModelOption,
    check_out,
    clean,
    err_console,
    out_console,
    print_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

# By string, as methods are: the core never imports what lies on a higher floor.
_FRAMES = "vlm_budget.video.frames"
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_ROWS = 8


class How(str, Enum):
    """How tokens are shared out over time."""

    quota = "quota"
    tstar = "tstar"
    uniform = "uniform"


class Decouple(str, Enum):
    """Into what the question is taken apart."""

    entities = "entities"
    events = "events"
    off = "off"


_HOW, _WHERE, _LOOK = "What to do", "Where and how to run", "What to look for"
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A video file.")]
HowOption = Annotated[
    How,
    typer.Option(
        "--method",
        "-m",
        help="quota: tokens per frame by relevance; tstar: search a few frames; uniform: all frames the same.",
        rich_help_panel=_HOW,
    ),
]
SpendOption = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        help="Share of the tokens that all frames (of tstar, the kept ones) have at the model's own resolution, "
        "such as 50%, or a number of tokens.",
        rich_help_panel=_HOW,
    ),
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        "--frames",
        min=1,
        help="Frames that are looked at; of tstar, frames that are kept.",
        show_default="96 and 64 more per hour; of tstar 8",
        rich_help_panel=_HOW,
    ),
]
TimesOption = Annotated[
    bool, typer.Option("--times/--no-times", help="Tell the model when frames are shown.", rich_help_panel=_HOW)
]
ScorerOption = Annotated[
    str | None,
    typer.Option(
        "--scorer",
        help="What scores frames: clip:FOLDER, clip:ARCHITECTURE/PRETRAINED, or vlm:FOLDER_OR_HUB_ID.",
        rich_help_panel=_LOOK,
    ),
]
DecoupleOption = Annotated[
    Decouple, typer.Option("--decouple", help="Have the model itself say what to look for.", rich_help_panel=_LOOK)
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", help="A thing to look for, repeatable; the model is not asked.", rich_help_panel=_LOOK),
]
CueOption = Annotated[
    list[str] | None,
    typer.Option("--cue", help="A thing that stands near what is looked for, repeatable.", rich_help_panel=_LOOK),
]
TimelineOption = Annotated[
    Path, typer.Option("--timeline", help="Where to draw the timeline.", dir_okay=True, rich_help_panel=_WHERE)
]


@clean
def video(
    file: FileArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")] = "What happens in the video?",
    model: ModelOption = "nano-views",
    method: HowOption = How.quota,
    budget: SpendOption = "50%",
    scorer: ScorerOption = None,
    frames: FramesOption = None,
    decouple: DecoupleOption = Decouple.entities,
    target: TargetOption = None,
    cue: CueOption = None,
    option: FieldOption = None,
    times: TimesOption = True,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the search.")] = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    timeline: TimelineOption = Path("timeline.png"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a model about a video, within a budget of visual tokens.

    Prints the answer, and a timeline of scores and tokens per frame, which is drawn as well. Options of --option are
    those of the method quota.

    Examples:

      vlm-budget video film.mp4 -p "Who opens the door?" --model llava-hf/llava-onevision-qwen2-7b-ov-hf
      --scorer clip:ViT-B-16-SigLIP/webli --budget 50%

      vlm-budget video film.mp4 -p "What is on the sign?" --method tstar --target sign --cue street --frames 8
      --scorer clip:./my-clip --model ./my-qwen2.5-vl
    """
    check_out(timeline, "--timeline")
    watching: Any = importlib.import_module(f"{_FRAMES}.watch")
    query = _query(prompt, target or (), cue or ())
    watching.check_request(query, method.value, budget, scorer, frames)
    importlib.import_module(f"{_FRAMES}.reader").Video.open(file).close()

    from .loading import load
    from .options import build_methods
    from .progress import stages, steps

    stderr = err_console()
    quota = build_methods("quota", option or ()).vision
    with steps(stderr, 4) as step:
        loaded = load(model, device.value, dtype.value, step, debug)
    with stages(stderr) as told:
        watched = watching.watch(
            file,
            query,
            loaded.model,
            loaded.processor,
            method=method.value,
            budget=budget,
            scorer=scorer,
            decoupled=None if decouple is Decouple.off or target or cue else decouple.value,
            frames=frames,
            tell_times=times,
            max_new_tokens=max_new_tokens,
            quota=quota,
            search_settings=importlib.import_module(f"{_FRAMES}.tstar").TStar(seed=seed),
            progress=told,
        )
    _save(timeline, watched)
    if as_json:
        facts = {"command": "video", "file": str(file), "model": loaded.facts(), "scorer": scorer}
        print_json({**facts, **watched.to_dict(), "timeline": str(timeline)})
        return
    console = out_console()
    _print(console, watched)
    console.print(Text(f"{model} on {loaded.device}, {loaded.dtype}", "dim"))
    console.print(Text.assemble("Timeline: ", (str(timeline), "bold")))


def _query(prompt: str, targets: Sequence[str], cues: Sequence[str]) -> Any:
    """The question; with what to look for, where the user says it."""
    queries: Any = importlib.import_module(f"{_FRAMES}.queries")
    if not targets and not cues:
        return queries.check_question(prompt)
    return queries.Query(queries.check_question(prompt), queries.given_clues(targets), queries.given_clues(cues))


def _save(path: Path, watched: Any) -> None:
    """Draw the timeline.

    Raises:
        OptionError: The file cannot be written.
    """
    try:
        importlib.import_module(f"{_FRAMES}.timeline").draw_timeline(watched).save(path)
    except OSError as error:
        raise OptionError(f"--timeline {str(path)!r} cannot be written: {error.strerror or error}") from error


def _print(console: Console, watched: Any) -> None:
    drawing: Any = importlib.import_module(f"{_FRAMES}.timeline")
    # What a model says steers no terminal.
    answer = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in watched.answer)
    console.print(Text(answer or "(no answer)", "bold"))
    console.print(Text(drawing.summary(watched)))
    clues = watched.query.targets + watched.query.cues + watched.query.events
    if clues:
        console.print(Text(f"looked for: {', '.join(clues)}"))
    if watched.query.note:
        told = "taking the question apart" if clues else "the question was not taken apart"
        console.print(Text(f"{told}: {watched.query.note}", "yellow"))
    width = max(10, min(len(watched.times), console.width - 10))
    if watched.scores is not None:
        console.print(Text.assemble(("score  ", "dim"), strip(watched.scores, width)))
    console.print(Text.assemble(("tokens ", "dim"), (strip(watched.tokens, width), "yellow")))
    first, last = (drawing.clock_time(moment) for moment in (watched.times[0], watched.times[-1]))
    console.print(Text(f"       {first}{last.rjust(max(width, len(watched.tokens[:width])) - len(first))}", "dim"))
    console.print(Text("frames with the most tokens"))  # as a title it would be folded to the table's width
    console.print(_table(watched, drawing.clock_time))
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in watched.seconds.items())
    console.print(Text(f"took: {took}", "dim"))


def strip(values: Sequence[float], width: int) -> str:
    """Values as a line of blocks; of several that share a place the highest is shown."""
    highest, count = max(values, default=0), len(values)
    places = min(width, count)
    cells = [max(values[place * count // places : (place + 1) * count // places]) for place in range(places)]
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[max(1, round(top * cell / highest)) if cell > 0 else 0] for cell in cells)


def _table(watched: Any, clock_time: Any) -> Table:
    """The frames with the most tokens, in order of time."""
    order = sorted(range(len(watched.tokens)), key=lambda index: -watched.tokens[index])
    best = sorted(index for index in order[:_MOST_ROWS] if watched.tokens[index])
    table = Table(header_style="bold")
    for name in ("time", *(["score"] if watched.scores is not None else []), "tokens"):
        table.add_column(name, justify="right")
    for index in best:
        score = [] if watched.scores is None else [f"{watched.scores[index]:.3f}"]
        table.add_row(clock_time(watched.times[index]), *score, f"{watched.tokens[index]:,}")
    return table
