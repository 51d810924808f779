"""``vlm-budget calibrate``: measure a model on this machine, so that budgets may be in milliseconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .common import (
    DebugOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    clean,
    err_console,
    out_console,
    print_json,
)

if TYPE_CHECKING:
    from ..latency import Latency


@clean
def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="nano, nano-robust, nano-views (shipped), a folder, or a hub id.")
    ],
    longest: Annotated[int, typer.Option("--longest", help="Longest prompt in tokens, text and visual.")] = 4096,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured rounds.")] = 3,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how long a model's language model takes here, and keep it for budgets in milliseconds.

    Only prompts and decoding steps of the language model are timed, on the device, number format and attention backend
    it is loaded with. Let the machine be idle meanwhile.

    Examples:

      vlm-budget calibrate nano

      vlm-budget calibrate llava-hf/llava-v1.6-vicuna-7b-hf --longest 3000

      vlm-budget run photo.jpg --model llava-hf/llava-v1.6-vicuna-7b-hf --budget "50% ms"
    """
    from .loading import load
    from .progress import runs, steps

    stderr = err_console()
    with steps(stderr, 4) as step:
        loaded = load(model, device.value, dtype.value, step, debug)

    from ..calibration import calibrate as measure
    from ..latency import Setting
    from ..models import find_family

    with runs(stderr, 1) as bar:
        latency = measure(loaded.model, longest=longest, repeats=repeats, progress=bar.count)
    _, base, family = find_family(loaded.model)
    setting = Setting.of(base, family)
    if as_json:
        facts = {"setting": asdict(setting), "latency": asdict(latency), "file": str(setting.file)}
        print_json({"command": "calibrate", "model": loaded.facts(), **facts})
        return
    console = out_console()
    console.print(_table(latency, len(family.language_model(base).layers)))  # type: ignore[arg-type]
    decode = latency.decode_ms(latency.longest)
    console.print(f"Worst error {latency.worst:.1%}; a decoding step behind the longest prompt takes {decode:.2f} ms.")
    console.print(Text(str(setting), "dim"), soft_wrap=True)
    console.print(Text.assemble("Kept in ", (str(setting.file), "bold")), soft_wrap=True)


def _table(latency: Latency, layers: int) -> Table:
    table = Table(title="Language model over a prompt", title_justify="left", header_style="bold")
    for column in ("tokens", "measured", "predicted"):
        table.add_column(column, justify="right")
    for tokens, ms in latency.samples:
        table.add_row(f"{tokens:,}", f"{ms:.2f} ms", f"{latency.prefill_ms([tokens] * layers):.2f} ms")
    return table
