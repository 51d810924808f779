"""The app that holds all verbs."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from .. import __version__
from .autotune import autotune
from .calibrate import calibrate
from .catalog import list_names
from .demo import demo
from .explain import explain
from .run import run
from .search import search
from .video import video

_EVAL = "vlm_budget.eval.cli"
_VIDEO_GEN = "vlm_budget.eval.video_gen.cli"

app = typer.Typer(
    name="vlm-budget",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.command("run")(run)
app.command("video")(video)
app.command("calibrate")(calibrate)
app.command("search")(search)
app.command("autotune")(autotune)
# By string, as methods are: the core never imports what lies on a higher floor.
app.add_typer(importlib.import_module(_EVAL).app)
app.add_typer(importlib.import_module(_VIDEO_GEN).app)
app.command("list")(list_names)
app.command("explain")(explain)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlm-budget {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Start here: [bold]vlm-budget demo[/bold]. Then: "
    "[bold]vlm-budget run photo.jpg --prompt 'What is this?' --model llava-hf/llava-v1.6-vicuna-7b-hf[/bold]"
)
def vlm_budget(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Spend the visual tokens of a vision-language model on purpose: prune to a budget, see what it costs and saves."""
