"""The model card, made from the recorded figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEMPLATE = """\
---
license: apache-2.0
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---

# views-scorer

A CLIP of {parameters:,} parameters ({megabytes:.1f} MB, fp16 on disk) that knows the eight kinds and seven colours of
`vlm_budget.eval.views`. It serves to test frame scoring where no weights can be downloaded, and nothing else.

```python
import open_clip
from vlm_budget.eval.views import scorer

name = f"local-dir:{{scorer.folder()}}"
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
```

or `scorer.load().score(frames, ["cone", "red thing"])`, or `"clip:FOLDER"` wherever a frame scorer is named.

## Recipe

Pictures of 48 x 48 (views of rooms and frames of clips, {shards} shards of {scenes} rooms and {scenes} clips; seed
{seed}) against texts, each pair a yes-or-no of its own (SigLIP's loss with every text of a step against every picture):
kinds, colours, pairs, "thing", unknown words, either of two things, in several wordings, and questions labelled by the
thing they name, never by their answer. True is what covers 25 pixels. Throw-away heads are taught what each patch
shows. {steps} steps of {batch} pictures, {minutes:.0f} minutes on a part of one CPU core. One run, one seed. Test clips
and rooms come from seeds of their own. A first run of 900 steps had been measured on some of them before; this one was
made longer because its training loss still fell, and one wrong caption was set right.

{versions}.

## Single texts

Over all {frames:,} frames of {clips} test clips (positive: the frames of an event of which the text is true) and all
{views:,} views of {rooms} test rooms. "worst" is the worst text of the group; the calibration error is over ten bins.

{texts}

## Questions within their clip

What the asked events' frames get against all others of the same clip. `raw`: the question itself as the text;
`decoupled`: the best of the things it names ("cone"; "red thing"), as a reader without fault takes it apart. `recall`:
share of the asked frames among as many best ones. `found`: of 32 frames spread evenly, the best two (`order`: four)
show every asked event. ± is one standard error, clustered by clip.

{questions}

## Limits

- {words} words are known, one token each; any other word is the same unknown token, and what is named by unknown words
  alone is taken for absent.
- Raw questions score well because questions of these forms were taught. The gap between raw and decoupled here says
  nothing about models that were taught captions.
- Synthetic pictures, things of 25 pixels and more, at most a few at a time. Scores are probabilities on pictures like
  these alone.
"""


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are text and the rest numbers."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _texts(test: Mapping[str, Any]) -> str:
    figures = ("auc", "worst_auc", "score_where_true", "score_elsewhere", "recall_at_half", "false_alarms_at_half")
    rows = []
    for place in ("clips", "rooms"):
        for group, found in test[place]["texts"].items():
            rows.append([place, group, *(f"{found[name]:.3f}" for name in (*figures, "calibration_error"))])
    head = ["in", "texts", "AUC", "worst AUC", "score where true", "elsewhere", "recall at 0.5", "false at 0.5"]
    return _table([*head, "calibration error"], rows, 2)


def _questions(test: Mapping[str, Any]) -> str:
    rows = []
    for way, tasks in test["clips"]["questions"].items():
        for task, found in tasks.items():
            cells = [f"{found[name]:.3f} ± {found[f'{name}_se']:.3f}" for name in ("auc", "recall", "found")]
            rows.append([way, task, str(found["questions"]), *cells])
    return _table(["text", "task", "questions", "AUC", "recall", "found"], rows, 2)


def render(record: Mapping[str, Any]) -> str:
    """The model card.

    Args:
        record: what `vlm_budget.eval.views.scorer.publish` recorded.
    """
    test = record["test"]
    return _TEMPLATE.format(
        parameters=record["parameters"],
        megabytes=record["bytes"] / 1e6,
        words=record["words"],
        minutes=record["training"]["minutes"],
        seed=record["training"]["seed"],
        versions=", ".join(f"{library} {version}" for library, version in record["versions"].items()),
        clips=test["clips"]["clips"],
        frames=test["clips"]["frames"],
        rooms=test["rooms"]["rooms"],
        views=test["rooms"]["views"],
        texts=_texts(test),
        questions=_questions(test),
        **{name: record["config"][name] for name in ("shards", "scenes", "steps", "batch")},
    )
