"""From finished trainings to the shipped folder: ``python -m vlm_budget.eval.vit.publish RUN [RUN ...]``.

Ships the training that is best on the validation pages, and only then scores every one on the test pages. The model
card is written from the recorded results.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlm_budget.eval import vit
from vlm_budget.eval.markdown import table
from vlm_budget.eval.vit.modeling import CONFIG, WEIGHTS, load_from, predict
from vlm_budget.eval.vit.pages import TEST_SEED, VALIDATION_SEED, images, labels, pages

_CARD = """\
---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---

# The small vision transformer of vlm-budget

A `timm.models.vision_transformer.VisionTransformer` of {parameters:,} parameters ({megabytes:.1f} MB, stored in
float16): {depth} blocks of width {embed_dim}, 96 x 96 pixels in patches of 8, 144 patch tokens and a class token. It
serves to measure methods that shorten the token sequence inside a vision transformer, and nothing else.

```python
from vlm_budget.eval import vit

model = vit.load()
```

## Data

Generated pages (`vlm_budget.eval.vit.pages`): a disc, the key, three to six digits in distinct colours, on most pages
letters that do not matter. Ten classes: the digit in the colour of the key. Training, validation and test pages come
from different seeds.

## Recipe

{steps} steps of {batch} pages, every page seen {epochs} times, AdamW at {lr:g} with warm-up and cosine decay, bfloat16
autocast, one CPU thread of a machine shared with other work: {minutes:.1f} minutes of CPU time. Two throw-away heads on
patch tokens (what a patch shows; whether it is the digit asked for) help the class token along; they are not shipped.
{versions}.

## Accuracy with all tokens

± is one standard error. Chance is 0.1; one of the page's digits at random is right on {guess:.3f} of the test pages.

{accuracy}

## Limits

- Synthetic pages of 96 x 96 pixels, ten classes: no photographs.
- Small bright glyphs on a background that does not matter: a method may drop or merge the background freely. That
  flatters every method that looks at content.
- A figure measured here predicts none on ImageNet.
"""


def score(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Accuracy of a saved model on fresh pages, and its standard error."""
    drawn = pages(count, seed)
    right = (predict(load_from(folder), images(drawn)) == labels(drawn)).double()
    return {"pages": count, "accuracy": float(right.mean()), "se": float(right.std() / count**0.5)}


def render(record: Mapping[str, Any]) -> str:
    """The model card, from what :func:`publish` recorded."""
    runs, shipped = record["runs"], str(record["shipped_seed"])
    recipe = runs[shipped]["recipe"]
    order = sorted(runs, key=lambda seed: (seed != shipped, int(seed)))
    rows = [
        [
            f"{seed} (shipped)" if seed == shipped else seed,
            *(f"{runs[seed][part]['accuracy']:.3f} ± {runs[seed][part]['se']:.3f}" for part in ("validation", "test")),
        ]
        for seed in order
    ]
    return _CARD.format(
        **{name: recipe[name] for name in ("steps", "batch", "epochs", "lr")},
        **{name: recipe["model"][name] for name in ("depth", "embed_dim")},
        parameters=record["parameters"],
        megabytes=record["bytes"] / 1e6,
        minutes=runs[shipped]["cpu_minutes"],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        guess=record["a_digit_of_the_page"],
        accuracy=table(["seed", "validation", "test"], rows),
    )


def publish(folders: Sequence[Path], results: Path, count: int) -> None:
    """Ship the best training, write ``results`` and the model card."""
    runs = {}
    for folder in folders:
        told = json.loads((folder / "run.json").read_text())
        told["validation"] = score(folder / "model", count, VALIDATION_SEED)
        runs[str(told.pop("seed"))] = (folder, told)
    shipped = max(runs, key=lambda seed: runs[seed][1]["validation"]["accuracy"])
    for folder, told in runs.values():
        told["test"] = score(folder / "model", count, TEST_SEED)
    target = vit.folder()
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(runs[shipped][0] / "model" / name, target / name)
    record = {
        "shipped_seed": int(shipped),
        "parameters": sum(weight.numel() for weight in load_from(target).parameters()),
        "bytes": (target / WEIGHTS).stat().st_size,
        "a_digit_of_the_page": float(torch.tensor([1 / page.digits for page in pages(count, TEST_SEED)]).mean()),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
        "runs": {seed: told for seed, (_, told) in runs.items()},
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n")
    (target / "README.md").write_text(render(record))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders written by vlm_budget.eval.vit.train")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/vit_training.json"))
    parser.add_argument("--pages", type=int, default=2000)
    arguments = parser.parse_args(argv)
    publish(arguments.runs, arguments.results, arguments.pages)


if __name__ == "__main__":
    main()
