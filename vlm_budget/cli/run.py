"""``vlm-budget run``: one prompt, unpruned and within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

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
    from PIL import Image

    from ..report import KeptItem


@clean
def run(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Picture files.")] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The question. Text with image tokens is taken as the whole prompt.")
    ] = "Describe the picture.",
    model: ModelOption = "nano",
    method: MethodOption = None,
    budget: BudgetOption = None,
    option: FieldOption = None,
    plan: PlanOption = None,
    positions: PositionsOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured rounds.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Seed of torch, for methods that draw.")] = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    out: OutOption = Path("kept.png"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a model about pictures, unpruned and within a budget, and compare.

    Prints both answers with tokens, times and cache, and draws which patches were kept. Decoding is greedy. Times are
    medians; read them as ratios of the two columns on this machine.

    Examples:

      vlm-budget run photo.jpg --prompt "What is on the sign?" --model llava-hf/llava-v1.6-vicuna-7b-hf

      vlm-budget run a.png b.png -p "What changed?" --model ./my-qwen2.5-vl --budget "256 tokens" --out changed.png

      vlm-budget run photo.jpg --method hired+fastv --option alpha=0.3 --option k=3 --json > result.json

      vlm-budget run photo.jpg --model ./my-llava --plan plan.json
    """
    from ..images import load_image
    from .options import Wanted

    wanted = Wanted.read(method, option, budget, plan)
    check_out(out)
    files = images or []
    pictures = [load_image(file) for file in files]

    from ..prompts import build_inputs
    from .compare import Setting, compare
    from .loading import load
    from .progress import runs, steps
    from .show import print_comparison, save_kept

    stderr = err_console()
    with steps(stderr, 5) as step:
        step("reading the method")
        methods = wanted.methods()
        spend = wanted.spend(methods)
        loaded = load(model, device.value, dtype.value, step, debug)

    import torch

    torch.manual_seed(seed)
    setting = Setting(methods, spend, positions and positions.value, max_new_tokens, repeats, wanted.recipe)
    inputs = build_inputs(loaded.processor, [prompt], [pictures], loaded.model)
    with runs(stderr, setting.runs) as bar:
        comparison = compare(loaded, inputs, setting, bar)
    drawn = not comparison.text_only
    if drawn:
        names = [Path(file).name for file in files]
        save_kept(out, pictures, comparison.kept, setting.title, names)
    if as_json:
        print_json(
            {
                "command": "run",
                "model": loaded.facts(),
                "method": str(methods),
                "budget": None if spend is None else str(spend),
                "plan": None if plan is None else str(plan),
                "prompt": prompt,
                "images": [_picture_facts(*pair) for pair in zip(files, pictures, strict=True)],
                "repeats": repeats,
                **comparison.to_dict(),
                "kept": kept_facts(comparison.kept),
                "kept_picture": str(out) if drawn else None,
            }
        )
        return
    console = out_console()
    print_comparison(console, comparison, setting)
    where = f"{model} on {loaded.device}, {loaded.dtype}; {comparison.positions} positions"
    console.print(Text(where, "dim"))
    if drawn:
        console.print(Text.assemble("What was kept: ", (str(out), "bold")))


def _picture_facts(file: str, picture: Image.Image) -> dict[str, Any]:
    return {"file": file, "width": picture.width, "height": picture.height}


def kept_facts(kept: Sequence[KeptItem]) -> list[dict[str, Any]]:
    """Kept positions per image, and counts per partition, as plain data."""
    facts = []
    for entry in kept:
        item = entry.item
        stays = [item.partition[position] for position in entry.positions]
        facts.append(
            {
                "row": entry.row,
                "modality": item.modality,
                "tokens": item.size,
                "kept": len(entry.positions),
                "steps": [{"layer": layer, "kept": len(left)} for layer, left in entry.steps],
                "partitions": [
                    {
                        "kind": grid.kind,
                        "rows": grid.rows,
                        "cols": grid.cols,
                        "box": list(grid.box),
                        "tokens": int((item.partition == index).sum()),
                        "kept": sum(int(part) == index for part in stays),
                    }
                    for index, grid in enumerate(item.partitions)
                ],
                "positions": list(entry.positions),
            }
        )
    return facts
