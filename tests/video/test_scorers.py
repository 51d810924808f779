"""Frame scorers: probabilities in [0, 1] that are what the models' logits say, and typed errors."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tiny_clip import save_clip, tiny_clip
from vlm_budget.errors import (
    FrameScoreError,
    MissingExtraError,
    ModelLoadError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
)
from vlm_budget.eval.nano import folder as nano_folder
from vlm_budget.prompts import build_inputs
from vlm_budget.video.frames.queries import Query, scorer_question
from vlm_budget.video.frames.scorers import SCORERS, FrameScorer, GivenScores, check_scores, load_scorer, relevance
from vlm_budget.video.frames.yes_no import NO, YES, YesNoScorer, answer_tokens

COLORS = ("red", "green", "blue", "white", "orange")
FRAMES = [Image.new("RGB", (40, 24), color) for color in COLORS]
QUESTION = "Where is the mug?"

needs_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed (extra 'vision')"
)


class Fixed:
    """A scorer that gives what it is told."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores
        self.clues: Sequence[str] = ()

    def score(self, frames: Sequence[Any], clues: Sequence[str], progress: Any = None) -> Any:
        self.clues = clues
        return self.scores


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_relevance_is_the_best_score_over_the_clues() -> None:
    scorer = Fixed([[0.1, 0.9], [0.3, 0.2], [0.0, 0.0]])
    found = relevance(scorer, FRAMES[:3], Query(QUESTION, ("mug",), ("sink",)))
    assert scorer.clues == ("mug", "sink")
    assert found.tolist() == pytest.approx([0.9, 0.3, 0.0])
    assert found.dtype == torch.float32


def test_without_clues_the_question_is_scored() -> None:
    scorer = Fixed([[0.5]])
    relevance(scorer, FRAMES[:1], QUESTION)
    assert scorer.clues == (QUESTION,)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.1], [float("nan")], [0.2]], "1 of 3 scores are NaN or infinite, the first at \\[1, 0\\]"),
        ([[0.1], [float("inf")], [0.2]], "NaN or infinite"),
        ([[0.1], [0.2]], "expected scores of shape \\[3, 1\\], got \\[2, 1\\]"),
        ([0.1, 0.2, 0.3], "got \\[3\\]"),
        ([[0.1], [1.5], [0.2]], "scores lie in \\[0, 1\\], got 0.1 to 1.5"),
        ([[0.1], [-0.5], [0.2]], "got -0.5 to"),
        ([["a"], ["b"], ["c"]], "not numbers"),
        (None, "not numbers"),
    ],
)
def test_scores_that_cannot_be_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(FrameScoreError, match=message):
        relevance(Fixed(scores), FRAMES[:3], QUESTION)


def test_a_scorers_own_relevance_is_checked_as_well() -> None:
    class Own(Fixed):
        def relevance(self, frames: Any, query: Any, progress: Any = None) -> Any:
            return [math.nan] * len(frames)

    with pytest.raises(FrameScoreError, match="Own: 2 of 2"):
        relevance(Own(None), FRAMES[:2], QUESTION)


def test_given_scores_are_one_per_frame() -> None:
    given = GivenScores([0.2, 0.4])
    assert relevance(given, FRAMES[:2], Query(QUESTION, ("a", "b"))).tolist() == pytest.approx([0.2, 0.4])
    assert given.score(FRAMES[:2], ["a", "b", "c"]).shape == (2, 3)
    with pytest.raises(FrameScoreError, match="2 scores were given for 3 frames"):
        relevance(given, FRAMES[:3], QUESTION)


@pytest.mark.parametrize("scores", [[math.nan], [[0.1, 0.2]], 0.5, None, ["x"], [2.0]])
def test_unusable_given_scores_are_refused(scores: Any) -> None:
    with pytest.raises(FrameScoreError):
        GivenScores(scores)


def test_checked_scores_leave_their_device_format_and_graph() -> None:
    found = check_scores(torch.tensor([0.5], dtype=torch.float64, requires_grad=True), (1,))
    assert (found.dtype, found.requires_grad) == (torch.float32, False)


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_registered_scorer_is_one() -> None:
    assert SCORERS.names() == ["clip", "vlm"]
    for name in SCORERS:
        assert issubclass(SCORERS.get(name), FrameScorer)
    assert isinstance(GivenScores([0.1]), FrameScorer)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("clap:x", UnknownNameError, "unknown frame scorer 'clap'. Did you mean 'clip'"),
        ("", UnknownNameError, "unknown frame scorer ''"),
        ("clip", OptionError, "clip:NAME_OR_FOLDER"),
        ("vlm:", OptionError, "vlm:NAME_OR_FOLDER"),
        ("vlm:./nowhere", ModelLoadError, "no model folder"),
        ("vlm:nanoo", ModelLoadError, "Did you mean 'nano'"),
    ],
)
def test_names_that_mean_nothing_are_refused(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_scorer(spec)


# --- CLIP ------------------------------------------------------------------------------------------------------------


def clip_scorer(bias: float | None, **options: Any) -> Any:
    from open_clip import SimpleTokenizer, image_transform

    from vlm_budget.video.frames.clip import ClipScorer

    preprocess = image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    return ClipScorer(tiny_clip(bias), preprocess, SimpleTokenizer(context_length=16), **options)


@needs_clip
def test_a_model_with_a_bias_says_its_own_probability() -> None:
    scorer = clip_scorer(-1.5)
    clues = ["a red mug", "the sea"]
    found = scorer.score(FRAMES, clues)
    pixels = torch.stack([scorer._preprocess(frame) for frame in FRAMES])
    with torch.no_grad():
        out = scorer.model(pixels, scorer._tokenizer(clues))
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T + out["logit_bias"]
    assert torch.allclose(found, logits.sigmoid(), atol=1e-6)
    assert found.std() > 1e-3


@needs_clip
def test_without_a_bias_a_clue_is_weighed_against_a_neutral_text() -> None:
    scorer = clip_scorer(None, neutral="a photo")
    found = scorer.score(FRAMES, ["a red mug", "a photo"])
    pixels = torch.stack([scorer._preprocess(frame) for frame in FRAMES])
    with torch.no_grad():
        out = scorer.model(pixels, scorer._tokenizer(["a red mug", "a photo"]))
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    assert torch.allclose(found[:, 0], logits.softmax(1)[:, 0], atol=1e-6)
    assert torch.allclose(found[:, 1], torch.full((5,), 0.5), atol=1e-6)


@needs_clip
@pytest.mark.parametrize("batch", [1, 2, 5, 7])
def test_batches_change_nothing_and_are_told(batch: int) -> None:
    told: list[tuple[int, int]] = []
    found = clip_scorer(0.0, batch=batch).score(FRAMES, ["x", "y"], lambda *count: told.append(count))
    assert torch.allclose(found, clip_scorer(0.0).score(FRAMES, ["x", "y"]), atol=1e-6)
    assert told == [(min(5, end), 5) for end in range(batch, 5 + batch, batch)]


@needs_clip
def test_templates_make_captions_and_braces_in_clues_stay() -> None:
    plain, templated = clip_scorer(0.0), clip_scorer(0.0, template="a photo of {}")
    assert torch.equal(templated.score(FRAMES, ["mug {x}"]), plain.score(FRAMES, ["a photo of mug {x}"]))


@needs_clip
@pytest.mark.parametrize("bias", [None, -2.0])
def test_a_folder_gives_the_scores_of_the_model_that_was_saved(bias: float | None, tmp_path: Path) -> None:
    scorer = load_scorer(f"clip:{save_clip(tiny_clip(bias), tmp_path / 'clip')}")
    assert torch.allclose(scorer.score(FRAMES, ["mug"]), clip_scorer(bias).score(FRAMES, ["mug"]), atol=1e-6)


@needs_clip
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no open_clip_config.json|there is no open_clip_config.json"),
        ("local-dir:nowhere", "there is no open_clip_config.json"),
        ("ViT-B-32", "names no weights"),
        ("ViT-X-99/openai", "cannot load the scorer 'ViT-X-99/openai'"),
        ("damaged", "cannot load the scorer 'damaged'"),
    ],
)
def test_clip_models_that_are_not_there(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (save_clip(tiny_clip(), tmp_path / "damaged") / "open_clip_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match=message):
        load_scorer(f"clip:{name}")


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"vlm-budget\[vision\]"):
        load_scorer("clip:ViT-B-32/openai")


@needs_clip
def test_no_frames_give_no_scores() -> None:
    assert clip_scorer(0.0).score([], ["mug"]).shape == (0, 1)
    assert clip_scorer(0.0).score([Image.new("RGB", (8, 8))] * 3, []).shape == (3, 0)


# --- a small VLM -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> Any:
    import transformers

    folder = nano_folder("nano")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def words(nano: Any) -> dict[str, tuple[str, ...]]:
    """Two words of nano's vocabulary on each side."""
    return {"yes": ("red", "blue"), "no": ("1", "2")}


def test_the_probability_is_that_of_the_token_sets(nano: Any, words: Any) -> None:
    model, processor = nano
    scorer = YesNoScorer(model, processor, **words)
    found = scorer.ask(FRAMES[:2], "what color is it")
    yes, no = (
        [processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in side] for side in words.values()
    )
    for frame, value in zip(FRAMES, found.tolist(), strict=False):
        inputs = build_inputs(processor, ["what color is it"], [[frame]], model)
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].softmax(0)
        mine, other = chances[yes].sum().item(), chances[no].sum().item()
        assert value == pytest.approx(mine / (mine + other), abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_of_a_vlm_change_nothing(nano: Any, words: Any, batch: int) -> None:
    told: list[tuple[int, int]] = []
    query = Query("what color is it", targets=("red",))
    small = YesNoScorer(*nano, batch=batch, **words)
    found = relevance(small, FRAMES, query, lambda *count: told.append(count))
    assert torch.allclose(found, YesNoScorer(*nano, batch=8, **words).ask(FRAMES, scorer_question(query)), atol=1e-4)
    assert told[-1] == (5, 5) and len(told) == math.ceil(5 / batch)


def test_clues_are_asked_one_by_one(nano: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    asked: list[str] = []
    scorer = YesNoScorer(*nano, **words)
    ask = scorer.ask
    monkeypatch.setattr(scorer, "ask", lambda frames, text, done: asked.append(text) or ask(frames, text, done))
    found = scorer.score(FRAMES[:2], ["red", "a mug"], lambda *count: told.append(count))
    assert ["this: red?" in asked[0], "this: a mug?" in asked[1]] == [True, True]
    assert found.shape == (2, 2) and torch.allclose(found[:, 0], ask(FRAMES[:2], asked[0]))
    assert told == [(2, 4), (4, 4)]
    assert scorer.score([], ["red"]).shape == (0, 1)


def test_large_frames_are_made_smaller_first(nano: Any, words: Any) -> None:
    seen: list[tuple[int, int]] = []
    scorer = YesNoScorer(*nano, max_pixels=1000, **words)
    large, tiny = Image.new("RGB", (400, 100)), Image.new("RGB", (30, 30))
    seen += [scorer._small(large).size, scorer._small(tiny).size]
    assert seen == [(63, 15), (30, 30)]
    assert YesNoScorer(*nano, max_pixels=None, **words)._small(large).size == (400, 100)


def test_a_question_with_a_picture_token_is_refused(nano: Any, words: Any) -> None:
    with pytest.raises(OptionError, match="'<image>', which stands for a picture"):
        relevance(YesNoScorer(*nano, **words), FRAMES[:1], "is <image> red")


class Pieces:
    """A tokenizer of pieces: a space is a token of its own, as SentencePiece may have it."""

    unk_token_id = 0
    ids = {" ": 1, "A": 2, "B": 3, "Yes": 4, "No": 5, "N": 6}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        found, rest = [], text
        while rest:
            piece = next((piece for piece in sorted(self.ids, key=len, reverse=True) if rest.startswith(piece)), None)
            found.append(self.ids[piece] if piece else 0)
            rest = rest[len(piece) if piece else 1 :]
        return found


def test_what_begins_both_answers_or_is_unknown_does_not_count() -> None:
    assert answer_tokens(Pieces(), YES, NO) == ((2, 4), (3, 5, 6))


@pytest.mark.parametrize(("yes", "no"), [(("oui",), NO), (YES, ("non",)), (("A",), ("A",)), ((), NO)])
def test_an_empty_set_is_refused(yes: tuple[str, ...], no: tuple[str, ...]) -> None:
    with pytest.raises(FrameScoreError, match="no token of Pieces"):
        answer_tokens(Pieces(), yes, no)


def test_a_model_that_knows_no_spelling_of_an_answer_is_refused(nano: Any) -> None:
    assert YesNoScorer(*nano).yes == tuple(nano[1].tokenizer.encode("yes", add_special_tokens=False))
    with pytest.raises(FrameScoreError, match="name spellings it knows"):
        YesNoScorer(*nano, yes=("oui", "si"))


def test_sizes_below_one_are_refused(nano: Any, words: Any) -> None:
    for options in ({"batch": 0}, {"max_pixels": 0}):
        with pytest.raises(OptionError):
            YesNoScorer(*nano, **words, **options)


def test_a_vlm_of_no_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(UnsupportedModelError, match="BertModel"):
        load_scorer(f"vlm:{tmp_path}")
