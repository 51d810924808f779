"""What the verbs share: their options, their consoles, and how they fail."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..errors import OptionError, VLMBudgetError


class Device(str, Enum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(str, Enum):
    """Number format of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Positions(str, Enum):
    """Position ids of the kept tokens."""

    packed = "packed"
    original = "original"


_HOW, _WHERE = "What to do", "Where and how to run"
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="Pruning method, see [bold]vlm-budget list methods[/bold]; '+' joins one before the language model and "
        "one inside it, as in hired+fastv.",
        show_default="hired",
        rich_help_panel=_HOW,
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help="What to keep of each prompt's visual tokens: a share (0.2, 20%) or a number (128, '128 tokens'); or what "
        "a prompt may cost the language model: '40% flops', '80 ms', '50% ms', '200 MB kv'. None where the method's "
        "options alone say what stays.",
        show_default="20%",
        rich_help_panel=_HOW,
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Instead of method, budget and options: a recipe that [bold]vlm-budget search[/bold] or autotune wrote.",
        rich_help_panel=_HOW,
    ),
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="A field of the method, repeatable; see [bold]vlm-budget explain METHOD[/bold]. Where both of two methods "
        "have it, say whose: fastv.positions=packed.",
        rich_help_panel=_HOW,
    ),
]
PositionsOption = Annotated[
    Positions | None,
    typer.Option("--positions", help="Override the method's position ids for kept tokens.", rich_help_panel=_HOW),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="nano, nano-robust, nano-views (shipped), a folder, or a hub id.", rich_help_panel=_WHERE
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run.", rich_help_panel=_WHERE)]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Number format; auto is float32 on the CPU and the checkpoint's own elsewhere.",
        rich_help_panel=_WHERE,
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Where to draw what was kept.", dir_okay=True, rich_help_panel=_WHERE)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel=_WHERE)
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks and the libraries' own messages.", rich_help_panel=_WHERE),
]


def out_console() -> Console:
    """A console on stdout, made anew so that a redirected stdout is seen."""
    return Console(highlight=False)


def err_console() -> Console:
    """A console on stderr, for progress and complaints."""
    return Console(stderr=True, highlight=False)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=True) + "\n")


def clean(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn a verb's errors into one line on stderr and exit code 1; with ``--debug`` they rise as they are."""

    @functools.wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("debug"):
            return verb(*args, **kwargs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except VLMBudgetError as error:
            _fail(" ".join(str(error).split()))
        except Exception as error:
            first = " ".join(str(error).split())[:300]
            _fail(f"unexpected {type(error).__name__}: {first} (run again with --debug for the traceback)")

    return wrapped


def _fail(message: str) -> NoReturn:
    console = err_console()
    message = "".join(letter if letter.isprintable() else " " for letter in message)  # foreign text steers no terminal
    console.print("[bold red]error:[/bold red]", end=" ")
    console.print(message, markup=False, soft_wrap=True)
    raise typer.Exit(1)


def check_out(path: Path, option: str = "--out") -> None:
    """Refuse, before any work is done, a place where no picture can be written.

    Raises:
        OptionError: The folder is missing, the place is a folder, or the ending is no picture format.
    """
    from PIL import Image

    if path.is_dir():
        raise OptionError(f"{option} {str(path)!r} is a directory; name a file in it, such as kept.png")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{option} {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.suffix.lower() not in Image.registered_extensions():
        raise OptionError(
            f"{option} {str(path)!r}: Pillow writes no {path.suffix or 'files without an ending'}; try .png"
        )
