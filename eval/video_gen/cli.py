"""``vlm-budget video-gen demo | list``: sparse attention in video generation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vlm_budget.cli.common import DebugOption, JsonOption, clean, err_console, out_console, print_json

if TYPE_CHECKING:
    from vlm_budget.video.dit.quality import Quality
    from vlm_budget.video.dit.report import VideoReport

app = typer.Typer(
    name="video-gen",
    help="Sparse attention in video generation: what it computes, and what it does to a clip.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: [bold]vlm-budget video-gen demo[/bold]",
)

PROMPT = "a red disc moving right and a blue square moving down on grey"
_HONEST = (
    "nano-video is a small synthetic model of 1,200 tokens: it shows what a mask does to a clip, not how a released "
    "model would take it. Times are of the reference code on a CPU; sparse attention is for tens of thousands of "
    "tokens on a GPU."
)
_DENSITY = 0.25
_WHAT, _HOW = "What to make", "How it runs"
_Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        "-d",
        help="Share of all pairs of tokens that a sparse call computes; 0.25 unless the method's options say.",
        rich_help_panel=_WHAT,
    ),
]
_Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="A field of the method, repeatable: correction=true, top_p=0.9.",
        rich_help_panel=_WHAT,
    ),
]


@app.command("demo")
@clean
def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Two shapes and a ground.", rich_help_panel=_WHAT)] = (
        PROMPT
    ),
    method: Annotated[
        str, typer.Option("--method", "-m", help="See [bold]video-gen list[/bold].", rich_help_panel=_WHAT)
    ] = "svg2",
    density: _Density = None,
    option: _Fields = None,
    warmup: Annotated[
        float, typer.Option("--warmup", help="Share of the first steps that stay dense.", rich_help_panel=_WHAT)
    ] = 0.1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.", rich_help_panel=_HOW)] = 20,
    guidance: Annotated[
        float, typer.Option("--guidance", min=1.0, help="Above 1, every step runs twice.", rich_help_panel=_HOW)
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.", rich_help_panel=_HOW)] = 0,
    model: Annotated[
        str, typer.Option("--model", help="nano-video, or a folder that training wrote.", rich_help_panel=_HOW)
    ] = "nano-video",
    out: Annotated[
        Path, typer.Option("--out", help="A .gif, .png or .mp4 of both clips.", rich_help_panel=_HOW)
    ] = Path("clip.gif"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a clip with all of attention and with a part of it, from the same noise, and put them side by side.

    The model ships with the library; nothing is downloaded, and no GPU is needed.

    Examples:

      vlm-budget video-gen demo

      vlm-budget video-gen demo --method block_topk --density 0.3 --out clip.mp4

      vlm-budget video-gen demo --prompt "a green triangle moving up and a red disc moving left on light" -o top_p=0.9
    """
    from vlm_budget.cli.progress import steps as bar
    from vlm_budget.eval.video_gen.pictures import check_out, save, side_by_side

    check_out(out)
    fields = {"warmup": warmup, **read_fields(method, option or [], density)}
    from vlm_budget.eval.video_gen.trial import Trial

    with bar(err_console(), 4) as step:
        step("loading the model")
        trial = Trial.of(model, prompt, steps, guidance, seed)
        step("all of attention")
        trial.run_dense()
        step("a part of it")
        trial.run_sparse(method, fields)
        step("drawing")
        report, quality = trial.report, trial.quality
        titles = ("dense", f"{method}, {report.density:.0%} of the pairs")
        save(out, side_by_side(trial.dense[0], trial.sparse[0], titles))
    if as_json:
        print_json(
            {
                "command": "video-gen demo",
                "model": model,
                "seed": seed,
                **trial.facts(),
                "picture": str(out),
            }
        )
        return
    console = out_console()
    console.print(Text.assemble((model, "bold"), f": {prompt}"))
    console.print(_table(report, quality, trial.relative_seconds))
    for warning in report.warnings:
        console.print(Text(warning, "yellow"))
    console.print(Text.assemble("Side by side: ", (str(out), "bold"), "\n"))
    console.print(_HONEST, style="dim")


@app.command("list")
@clean
def list_names(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the methods, and the video transformers that they work in.

    Examples:

      vlm-budget video-gen list

      vlm-budget video-gen list --json
    """
    from vlm_budget.registry import VIDEO_METHODS, VIDEO_MODELS

    methods = []
    for name in VIDEO_METHODS:
        cls = VIDEO_METHODS.get(name)
        methods.append({"name": name, "what": cls.title, "paper": cls.paper or "none: a baseline"})
    models = []
    for name in VIDEO_MODELS:
        cls = VIDEO_MODELS.get(name)
        about = (cls.__doc__ or "").split("\n")[0].replace("`", "").removeprefix(cls.transformer).strip(",.;: ")
        models.append({"name": name, "transformer": cls.transformer, "what": about})
    if as_json:
        print_json({"methods": methods, "models": models})
        return
    for title, rows in (("methods", methods), ("models", models)):
        table = Table(title=f"{len(rows)} {title}", title_justify="left", header_style="bold")
        for column in rows[0]:
            table.add_column(column, overflow="fold", style="bold cyan" * (column == "name"))
        for row in rows:
            table.add_row(*map(Text, row.values()))
        out_console().print(table)


def read_fields(method: str, options: list[str], density: float | None) -> dict[str, Any]:
    """Fields of a method from ``KEY=VALUE`` texts, with a density where they do not say how much is computed.

    Raises:
        UnknownNameError: No such method.
        OptionError: No such field, a text that is none, or a value that the method refuses.
    """
    from dataclasses import fields as fields_of

    import yaml

    from vlm_budget.errors import OptionError
    from vlm_budget.registry import VIDEO_METHODS

    known = sorted(field.name for field in fields_of(VIDEO_METHODS.get(method)))
    found: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise OptionError(f"--option {text!r}: expected KEY=VALUE with a KEY of {method}: {', '.join(known)}")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"--option {text!r}: cannot read the value {value!r}") from error
        found[name] = tuple(read) if isinstance(read, list) else read
    if density is not None:
        found["density"] = density
    if not VIDEO_METHODS.get(method)(**found).settled:  # which also refuses values before anything is computed
        found["density"] = _DENSITY
    return found


def _table(report: VideoReport, quality: Quality, relative: float) -> Table:
    table = Table(title=Text(report.method), title_justify="left", header_style="bold")
    for name in ("", "dense", "sparse"):
        table.add_column(name, justify="right" if name else "left")
    sparse = "-" if report.sparse_density is None else f"{report.sparse_density:.1%}"
    table.add_row("density of the run", "100.0%", f"{report.density:.1%}")
    table.add_row("density of its sparse calls", "", f"{sparse} ({report.sparse_calls} of {report.calls})")
    table.add_row("PSNR against dense", "", f"{quality.mean_psnr:.2f} dB")
    if quality.mean_ssim is not None:
        table.add_row("SSIM against dense", "", f"{quality.mean_ssim:.4f}")
    if report.error is not None and report.recall is not None:
        table.add_row("output error of a call", "", f"{report.error:.3f}")
        table.add_row("  its attention recall", "", f"{report.recall:.1%}")
    table.add_row("seconds, as a ratio", "1.00x", f"{relative:.2f}x")
    return table
