"""The model card of ``nano-video``, made from the record: ``python -m vlm_budget.eval.video_gen.card RECORD``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_budget.eval.markdown import table

from . import folder

_TEMPLATE = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# nano-video

A `WanTransformer3DModel` of {parameters:,} parameters ({megabytes:.1f} MB, float16 on disk): four layers of three
heads of 64. It makes clips of 12 x 40 x 40 pixels from seven words, with no VAE: a token is a patch of 1 x 4 x 4
pixels, 1,200 to a clip. It serves to see what sparse attention does to a clip where no weights can be downloaded, and
nothing else.

```python
import torch
from vlm_budget.eval import video_gen

pipe = video_gen.load()
prompt = "a red disc moving right and a blue square moving down on grey"
frames = pipe(prompt, generator=torch.Generator().manual_seed(0)).frames  # [1, 12, 40, 40, 3] in [0, 1]
```

## Data

Drawn on the fly (`vlm_budget.eval.video_gen.clips`): two shapes of three kinds, six colours and eight directions bounce
over a mosaic of random cells that stands still. A cell is a token, so that a token of one frame can only be told from
the same place in other frames, and a shape takes its shading along: attention has to look at few tokens far away.
No clip is drawn twice; held-out words and noise come from other seeds.

## Recipe

Flow matching, `python -m vlm_budget.eval.video_gen.train`: {steps:,} steps, {clips:,} clips, {minutes:.0f} minutes of
one CPU thread on a machine shared with other work. Muon for the matrices of the blocks, AdamW for the rest, averaged
weights; a tenth of the clips without their words, for guidance. Clips grow:

{stages}
{note}
## What came out

Self-attention needs {needed:.1%} of the keys for 0.9 of its mass, mean over rows, heads, layers and noise levels
({more:.1%} for 0.95); the gate was 25 %. Mean squared error of the velocity on held-out clips, by noise level:

{losses}

## Limits

- Two shapes, generated; shapes are blurred, and may vanish, merge or multiply. It is no demonstration of quality.
- Text is one-hot words and reaches the video by cross-attention only: self-attention has video tokens alone.
- Four layers: one of them left dense is a quarter of the model. No VAE, which would spread errors over pixels.
- Trained once; the spread between trainings was not measured. A ranking of masks here predicts none on released models.
"""


def render(record: Mapping[str, Any]) -> str:
    """The model card.

    Args:
        record: What :mod:`vlm_budget.eval.video_gen.publish` recorded.
    """
    stages = table(
        ["until", "frames", "pixels", "clips a step"],
        [
            [f"{one['until']:.0%} of the time", str(one["frames"]), f"{one['side']} x {one['side']}", str(one["batch"])]
            for one in record["stages"]
        ],
    )
    losses = record["held_out_loss"]
    return _TEMPLATE.format(
        parameters=record["parameters"],
        megabytes=record["bytes"] / 1e6,
        steps=record["progress"]["steps"],
        clips=record["progress"]["clips"],
        minutes=record["progress"]["seconds"] / 60,
        stages=stages,
        note=f"\n{record['note']}\n" if record["note"] else "",
        needed=record["keys_needed"]["0.9"],
        more=record["keys_needed"]["0.95"],
        losses=table(["noise", *losses], [["error", *(f"{value:.4f}" for value in losses.values())]]),
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: write the card of the shipped folder again."""
    parser = argparse.ArgumentParser(description="Write the model card from the recorded result.")
    parser.add_argument("record", type=Path)
    record = json.loads(parser.parse_args(argv).record.read_text(encoding="utf-8"))
    (folder() / "README.md").write_text(render(record), encoding="utf-8")


if __name__ == "__main__":
    main()
