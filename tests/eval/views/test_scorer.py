from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_budget.eval.views import clips, rooms, scorer
from vlm_budget.eval.views.labels import SUMMARY, picture_labels
from vlm_budget.eval.views.scorer import captions, modeling
from vlm_budget.eval.views.scorer.held_out import auc, calibration_error
from vlm_budget.eval.views.scorer.train import Config, Run, pool
from vlm_budget.eval.views.world import COLOR_NAMES, KINDS
from vlm_budget.video.frames.scorers import load_scorer

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
FOLDER = scorer.folder()
DEV_SEED = 9_300_001  # of neither training, validation nor test


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def clip() -> clips.ClipScene:
    return clips.random_clip(np.random.default_rng(DEV_SEED))


@pytest.fixture(scope="module")
def frames(clip: clips.ClipScene) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in clip.frames]


def during(event: clips.Event) -> np.ndarray:
    at = np.arange(clips.FRAMES)
    return (event.start <= at) & (at < event.stop)


# --- the shipped model -----------------------------------------------------------------------------------------------


def test_the_shipped_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_open_clip_loads_a_copy_by_itself(tmp_path: Path, frames: list[Image.Image]) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / "elsewhere")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{copy}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{copy}")
    with torch.no_grad():
        pictures = model.eval().encode_image(torch.stack([preprocess(frame) for frame in frames[:8]]), normalize=True)
        words = model.encode_text(tokenizer(["cone", "a red thing"]), normalize=True)
        expected = (model.logit_scale.exp() * pictures @ words.T + model.logit_bias).sigmoid()
    found = load_scorer(f"clip:{copy}").score(frames[:8], ["cone", "a red thing"])
    assert torch.allclose(found, expected, atol=1e-6)


def test_what_happens_scores_above_everything_else(clip: clips.ClipScene, frames: list[Image.Image]) -> None:
    texts = [text for event in clip.events for text in (KINDS[event.kind], f"{COLOR_NAMES[event.color]} thing")]
    scores = scorer.load().score(frames, texts).numpy()
    for index, event in enumerate(clip.events):
        alike = np.logical_or.reduce([during(other) for other in clip.events if other.color == event.color])
        for column, there in ((2 * index, during(event)), (2 * index + 1, alike)):
            assert auc(scores[:, column], there) > 0.9, texts[column]
            assert scores[there, column].mean() > 5 * scores[~there, column].mean(), texts[column]


def test_a_thing_in_another_color_is_not_meant(clip: clips.ClipScene, frames: list[Image.Image]) -> None:
    event = clip.events[0]
    mine, other = COLOR_NAMES[event.color], COLOR_NAMES[event.color - 1]
    kind = KINDS[event.kind]
    scores = scorer.load().score(frames[event.start : event.stop], [f"a {mine} {kind}", f"a {other} {kind}"])
    assert (scores[:, 0] > scores[:, 1]).all()


def test_unknown_words_are_seen_nowhere(frames: list[Image.Image]) -> None:
    assert scorer.load().score(frames, ["a walrus"]).mean() < 0.1


def test_the_card_tells_what_was_recorded() -> None:
    record = json.loads((FOLDER / "results.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert f"{record['parameters']:,}" in card
    assert f"{record['test']['clips']['texts']['kinds']['auc']:.3f}" in card
    assert record["bytes"] == (FOLDER / modeling.WEIGHTS).stat().st_size
    assert record["words"] == len(captions.WORDS)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_tokenizer_reads_its_own_words_and_no_others() -> None:
    tokenizer = open_clip.get_tokenizer(f"local-dir:{FOLDER}")
    texts = [" ".join(captions.WORDS[i : i + 12]) for i in range(0, len(captions.WORDS), 12)]
    assert [tokenizer.tokenizer.decode(row, skip_special_tokens=True) for row in tokenizer(texts)] == texts
    plain, dressed = tokenizer(["what color is the cone", "  What COLOR, is the cone?"])
    assert torch.equal(plain, dressed)
    assert tokenizer(["walrus"])[0, 1] == modeling.UNK_ID
    long = tokenizer(["red " * 40])[0]
    assert long[-1] == modeling.END_ID and (long == modeling.END_ID).sum() == 1


def test_the_word_for_unknown_words_is_unknown() -> None:
    tokenizer = modeling.build_tokenizer()
    assert modeling.tokens(tokenizer, [captions.UNKNOWN])[0, :3].tolist() == [
        modeling.START_ID,
        modeling.UNK_ID,
        modeling.END_ID,
    ]


def test_every_word_taught_is_known() -> None:
    known = {*captions.WORDS, captions.UNKNOWN}
    for seed in range(20):
        for text in captions.draw(np.random.default_rng(seed)):
            assert known.issuperset(text.words.split()), text.words


def test_concepts_are_the_labels(clip: clips.ClipScene) -> None:
    event = clip.events[1]
    seen = picture_labels(clip.frame(event.start + 1), clip.room.things)[2]
    assert len(seen) == SUMMARY == captions.ANYTHING
    concepts = {
        captions.kind_concept(event.kind),
        captions.color_concept(event.color),
        captions.pair_concept(event.kind, event.color),
    }
    assert set(np.flatnonzero(seen)) == concepts


@pytest.mark.parametrize("seed", range(5))
def test_texts_say_what_they_are_labelled(seed: int) -> None:
    concepts = {captions.kind_concept(i): word for i, word in enumerate(KINDS)}
    concepts |= {captions.color_concept(i): word for i, word in enumerate(COLOR_NAMES)}
    for i, kind in enumerate(KINDS):
        concepts |= {captions.pair_concept(i, j): f"{color} {kind}" for j, color in enumerate(COLOR_NAMES)}
    singular = dict(zip(captions.PLURALS, KINDS, strict=True))
    for text in captions.draw(np.random.default_rng(seed)):
        said = {singular.get(word, word) for word in text.words.split()} & {*KINDS, *COLOR_NAMES}
        meant = {
            word for concept in text.concepts if concept != captions.ANYTHING for word in concepts[concept].split()
        }
        assert said == meant, text


def test_every_question_is_of_a_form_that_was_taught() -> None:
    asked = [form.format(kind=kind) for form in captions.ASKED_OF_KINDS for kind in KINDS]
    asked += [form.format(color=color) for form in captions.ASKED_OF_COLORS for color in COLOR_NAMES]
    asked += [captions.ASKED_OF_TWO.format(one=one, other=other) for one in KINDS for other in KINDS]
    for seed in range(3):
        rng = np.random.default_rng([DEV_SEED, seed])
        questions = (*rooms.ask(rooms.random_rooms(rng), rng, 8), *clips.ask(clips.random_clip(rng), rng, 8))
        assert {question.prompt for question in questions} <= set(asked)


def test_clues_are_what_a_question_names() -> None:
    assert captions.clues("what is the color of the cone") == ("cone",)
    assert captions.clues("which thing in here is colored red") == ("red thing",)
    assert captions.clues("which thing comes first cone or ball") == ("cone", "ball")


# --- training --------------------------------------------------------------------------------------------------------

TINY = Config(steps=4, batch=8, warmup=2, first=1, every=2, shards=2, scenes=2, checkpoint_seconds=0.0)


def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = Run(TINY, 3, tmp_path / "whole")
    losses = [loss for _, *loss in whole.losses()]
    stopped = Run(TINY, 3, tmp_path / "stopped").losses()
    before = [next(stopped)[1:] for _ in range(3)]  # step 2 was yielded after its checkpoint was written
    stopped.close()
    after = [loss for _, *loss in Run(TINY, 3, tmp_path / "stopped", resume=True).losses()]
    assert np.allclose([*map(list, before), *after], losses, rtol=0, atol=0)
    weights = (tmp_path / name / "scorer" / modeling.WEIGHTS for name in ("whole", "stopped"))
    assert next(weights).read_bytes() == next(weights).read_bytes()


def test_half_precision_on_disk_changes_no_score(tmp_path: Path, frames: list[Image.Image]) -> None:
    torch.manual_seed(0)
    model = modeling.build_model().eval()
    modeling.save(model, tmp_path)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pictures = modeling.pixels(torch.from_numpy(np.stack([np.asarray(frame) for frame in frames[:4]])))
    words = modeling.tokens(modeling.build_tokenizer(), ["cone", "red thing"])
    with torch.no_grad():
        kept, read = (m.get_logits(pictures, words)[0].sigmoid() for m in (model, loaded.eval()))
    assert next(loaded.parameters()).dtype == torch.float32
    assert torch.allclose(kept, read, atol=2e-3)


def test_a_pool_keeps_every_thing_and_some_bare_pictures(tmp_path: Path) -> None:
    run = Run(TINY, 0, tmp_path)
    found = pool(run.shelf, 0, 0, 0.5)
    there = found.seen[:, captions.ANYTHING] > 0
    shards = [run.shelf.get(task, 0) for task in ("rooms", "haystack")]
    assert there.sum() == sum(int(shard.summaries.any(-1).sum()) for shard in shards)
    assert (~there).sum() == int(0.5 * there.sum())
    assert not found.seen[~there].any()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_auc_counts_ties_half() -> None:
    scores, positive = np.array([0.1, 0.5, 0.5, 0.9, 0.2]), np.array([False, True, False, True, False])
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(wins))
    assert np.isnan(auc(scores, np.ones(5, bool)))


def test_calibration_error_is_nil_for_what_is_so() -> None:
    said = np.array([0.25] * 4 + [0.75] * 4)
    so = np.array([True, False, False, False, True, True, True, False])
    assert calibration_error(said, so) == pytest.approx(0)
    assert calibration_error(said, ~so) == pytest.approx(0.5)
