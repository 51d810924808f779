"""The model card, made from the recorded results: ``python -m vlm_budget.eval.views.card RESULTS``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_budget.eval.views import folder

_STAGES = {
    "vision": "SigLIP tower alone: kind and colour of each patch, what the whole picture holds",
    "language": "tower frozen; projector, newline and Qwen2 on packed questions, rooms and clips in turn",
}
_TEMPLATE = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A `LlavaOnevisionForConditionalGeneration` of {parameters:,} parameters ({megabytes:.1f} MB, fp32): SigLIP tower on
48 x 48 pictures with patches of 8, Qwen2 decoder. Twelve views of a room are 12 x (36 + 1) = 444 tokens, a clip of 32
frames pooled by the model to 3 x 3 is 32 x 9 + 1 = 289 tokens. It serves to test budgets over many views and over video
where no weights can be downloaded, and nothing else.

```python
from vlm_budget.eval import views

model, processor = views.load()
```

## Data

*rooms* (`vlm_budget.eval.views.rooms`): twelve posed views of a generated room; colour of a thing, thing of a colour,
count of a colour, nearest thing. *haystack* (`vlm_budget.eval.views.clips`): 96 seconds with four or five short events
among empty frames, read at 32 frames; colour, thing, order. Training, validation and test scenes come from different
seeds.

## Recipe

Preset `{preset}`, seed {seed}, one CPU thread on a machine shared with other work, so the minutes are upper bounds. No
checkpoint was chosen on test scenes.

{recipe}
{note}
The tower learns from dense labels, which are richer than captions; its attention is never supervised. In half of the
language batches something is missing at random (`vlm_budget.eval.views.dropout`): tokens drawn by Gumbel noise with a
random tilt, or pictures at random resolutions, none and finer than the model's own among them; positions renumbered
or kept, newlines kept or dropped. No method's signal and no label enters.

The language model reads the tower's last layer but one, since transformers 4.57 hands out the last one normalised
and 5.x raw.

{versions}.

## Accuracy

{scenes} test scenes a task (seeds {rooms_test_seed} and {haystack_test_seed}) with six questions each; ± is one
standard error, clustered by scene. `prior` is the accuracy of giving each form's most frequent answer. Random: a
uniform draw of patch tokens, no newline, positions renumbered.

{accuracy}

## Limits

- Generated pictures of 48 x 48 pixels, {words} tokens of vocabulary, seven words a question, one word an answer.
- Things are brightly coloured solids in dull rooms: easy salience, which flatters content-based methods.
- Every thing of a scene is of another kind, so that counting needs no telling apart of equal things.
- Trained once; the spread between trainings was not measured.
- A ranking of methods here shows that the plumbing is right; it predicts no ranking on released VLMs.
"""


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are text and the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _accuracy(test: Mapping[str, Any]) -> str:
    """Accuracy per task and form: whole, then with less and less."""
    rows = []
    for task, budgets in test.items():
        for form, row in budgets["whole"].items():
            cells = [budgets[budget][form] for budget in budgets]
            figures = [f"{cell['accuracy']:.3f} ± {cell['se']:.3f}" for cell in cells]
            rows.append([task, form, str(row["questions"]), f"{row['prior']:.3f}", *figures])
    budgets = next(iter(test.values()))
    head = ["all tokens" if name == "whole" else f"random {float(name.split()[1]):.0%}" for name in budgets]
    return _table(["task", "questions about", "number", "prior", *head], rows, 2)


def _recipe(minutes: Mapping[str, float], preset: Mapping[str, Any]) -> str:
    rows = []
    for stage, spent in minutes.items():
        config = preset[stage]
        per_step = f"{config['batch']} " + ("pictures" if stage == "vision" else f"scenes x {config['questions']}")
        rows.append([stage, _STAGES[stage], str(config["steps"]), per_step, f"{config['lr']:g}", f"{spent:.1f}"])
    return _table(["stage", "what", "steps", "a step", "peak lr", "minutes"], rows, 2)


def render(record: Mapping[str, Any]) -> str:
    """The model card.

    Args:
        record: what `vlm_budget.eval.views.publish` recorded.
    """
    return _TEMPLATE.format(
        name=record["name"],
        parameters=record["parameters"],
        megabytes=record["bytes"] / 1e6,
        preset=record["preset"]["name"],
        seed=record["seed"],
        recipe=_recipe(record["minutes"], record["preset"]),
        note=f"\n{record['note']}\n" if record["note"] else "",
        versions=", ".join(f"{library} {version}" for library, version in record["versions"].items()),
        accuracy=_accuracy(record["test"]),
        **record["data"],
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: write the card of the shipped folder again."""
    parser = argparse.ArgumentParser(description="Write the model card from recorded results.")
    parser.add_argument("results", type=Path)
    record = json.loads(parser.parse_args(argv).results.read_text())
    (folder() / "README.md").write_text(render(record))


if __name__ == "__main__":
    main()
