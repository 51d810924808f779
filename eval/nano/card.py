"""Model cards, made from the recorded results: ``python -m vlm_budget.eval.nano.card RESULTS``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_budget.eval.nano import folder, names

_ABOUT = {
    "nano": "Trained like a released VLM: every visual token and every newline token always present.",
    "nano-robust": """\
`nano` continued with random token dropout, so that a language model used to missing tokens can be judged
beside one that is not. The dropout uses no pruning method's signal: Gumbel noise, a random linear functional
of the features drawn anew for each image, and a random offset per crop; no attention, no labels. Newlines
are kept or dropped, and positions kept or renumbered, half of the time each; a quarter of the batches is whole.""",
}
_STAGES = {
    "vision": "CLIP tower alone: digit, mark and colour of each patch; CLS multi-label on the last layer",
    "language": "tower frozen; projector, newline and Llama on packed questions, all tokens",
    "robust": "the same with random token dropout",
}
_TEMPLATE = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

{about}

A `LlavaNextForConditionalGeneration` of {parameters:,} parameters ({megabytes:.1f} MB, fp32): CLIP tower on
48 x 48 crops with patches of 8, Llama decoder, 180 patch tokens and 12 newline tokens per page. It serves to
test visual token pruning where no weights can be downloaded, and nothing else.

```python
from vlm_budget.eval import nano

model, processor = nano.load("{name}")
```

## Data

Generated pages (`vlm_budget.eval.nano.scene`) and questions (`vlm_budget.eval.nano.data`), images prepared by
the stock `LlavaNextImageProcessor`. A page is hard with probability {hard_share}: *distractor* (large
saturated marks never asked about), *faint* (asked digits in a third of the contrast), *texture*, *dense*;
the four alike often. Training, validation and test pages come from different seeds.

## Recipe

Preset `{preset}`; each run had one or two CPU threads on a machine shared with other work, so the minutes are
upper bounds. Shipped is seed {shipped} of {seeds} independent trainings (each with its own random start, vision
tower and pages), chosen on the validation pages (seed {validation_seed}), never on the test pages.

{recipe}

{versions}.

## Accuracy with all tokens

{images} test pages (seed {test_seed}) with {questions_per_image} questions each; ± is one standard error,
clustered by page. The rows named after a task are clean pages; the `hard` rows hold all tasks. `prior` is the
accuracy of giving each task's most frequent answer.

{accuracy}

## Limits

- Synthetic posters of 96 x 96 pixels, {words} tokens of vocabulary, four tasks: no photographs, no sentences.
- Digits are easy salience on clean pages, which flatters every content-based method; the hard pages are there
  to say so.
- The vision tower was taught with patch and CLS labels that are richer than CLIP's captions. The CLS of the
  last layer names digits and marks; that of the layer before, which the language model reads,
  is not supervised.
- One image and one question per prompt, one word per answer.
- `place` is read mostly from position ids: it suffers when kept tokens are renumbered, and it is the task that
  varies most between training seeds.
- A ranking of pruning methods here shows that the plumbing is right; it predicts no ranking on released VLMs.
"""


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are text and the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _accuracy(seeds: Mapping[str, Any], shipped: int) -> str:
    """Test accuracy of every seed by group, the shipped one first."""
    order = sorted(seeds, key=lambda seed: (int(seed) != shipped, int(seed)))
    rows = []
    for group, row in seeds[order[0]]["test"].items():
        cells = [seeds[seed]["test"][group] for seed in order]
        figures = [f"{cell['accuracy']:.3f} ± {cell['se']:.3f}" for cell in cells]
        rows.append([group, str(row["questions"]), f"{row['prior']:.3f}", *figures])
    columns = [f"seed {seed}" + (" (shipped)" if int(seed) == shipped else "") for seed in order]
    return _table(["group", "questions", "prior", *columns], rows, 1)


def _recipe(minutes: Mapping[str, float], preset: Mapping[str, Any]) -> str:
    rows = []
    for stage, spent in minutes.items():
        config = preset[stage]
        questions = "–" if stage == "vision" else str(config["questions"])
        numbers = [str(config["steps"]), str(config["batch"]), questions, f"{config['lr']:g}", f"{spent:.1f}"]
        rows.append([stage, _STAGES[stage], *numbers])
    return _table(["stage", "what", "steps", "pages/step", "questions/page", "peak lr", "minutes"], rows, 2)


def render(name: str, record: Mapping[str, Any]) -> str:
    """The model card of one checkpoint.

    Args:
        name: the checkpoint.
        record: what `vlm_budget.eval.nano.publish` recorded.
    """
    checkpoint, preset = record["checkpoints"][name], record["preset"]
    shipped, seeds = checkpoint["shipped_seed"], checkpoint["seeds"]
    return _TEMPLATE.format(
        name=name,
        about=_ABOUT[name],
        parameters=checkpoint["parameters"],
        megabytes=checkpoint["bytes"] / 1e6,
        preset=preset["name"],
        shipped=shipped,
        seeds=len(seeds),
        recipe=_recipe(seeds[str(shipped)]["minutes"], preset),
        versions=", ".join(f"{library} {version}" for library, version in record["versions"].items()),
        accuracy=_accuracy(seeds, shipped),
        **record["data"],
    )


def main(argv: list[str] | None = None) -> None:
    """Command line: write the card of each shipped folder again."""
    parser = argparse.ArgumentParser(description="Write the model cards from recorded results.")
    parser.add_argument("results", type=Path)
    record = json.loads(parser.parse_args(argv).results.read_text())
    for name in names():
        (folder(name) / "README.md").write_text(render(name, record))


if __name__ == "__main__":
    main()
