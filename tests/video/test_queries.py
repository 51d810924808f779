"""Questions taken apart: what a model wrote is read within bounds, and never run."""

import time

import pytest

from vlm_budget.errors import OptionError
from vlm_budget.video.frames.queries import (
    LONGEST_CLUE,
    LONGEST_QUESTION,
    MOST_CLUES,
    Query,
    as_query,
    check_question,
    decouple,
    given_clues,
    instruction,
    read_clues,
    scorer_question,
)

QUESTION = "What color is the mug next to the sink?"


def steps(listed: str, needed: str = "yes") -> str:
    return f"Step 1: {needed}\nStep 2: {listed}\nStep 3: {listed}\n"


# --- the three steps -------------------------------------------------------------------------------------------------


def test_the_answering_model_is_asked_in_three_steps_about_the_question() -> None:
    asked: list[str] = []

    def answer(text: str) -> str:
        asked.append(text)
        return 'Step 1: yes\nStep 2: ["mug", "sink", "freshness"]\nStep 3: ["mug", "sink"]'

    query = decouple(answer, f"  {QUESTION} ")
    assert query == Query(QUESTION, targets=("mug", "sink"))
    assert query.clues == ("mug", "sink")
    (text,) = asked
    assert text.endswith(f"Question: {QUESTION}\n") and text.count("Step 3:") == 4 and "physical" in text


def test_events_are_asked_for_and_kept_apart() -> None:
    query = decouple(lambda text: steps('["pot boils over"]'), QUESTION, "events")
    assert (query.targets, query.events) == ((), ("pot boils over",))
    assert "events" in instruction(QUESTION, "events") and "physical" not in instruction(QUESTION, "events")
    assert "any part of one of these events: pot boils over?" in scorer_question(query)


@pytest.mark.parametrize(
    ("written", "note"),
    [
        ("Step 1: no\nStep 2: []\nStep 3: null", "nothing in particular"),
        ("step 1 - NO.", "nothing in particular"),
        ("Step 1: yes\nStep 2: ['love']\nStep 3: null", "nothing in particular"),
        ("Step 1: yes\nStep 2: []\nStep 3: []", "is empty"),
        ("the mug and the sink", "did not write the steps"),
        ("", "did not write the steps"),
        ("Step 1: yes\nStep 3: the mug", "wrote no list"),
        (None, "gave NoneType, not text"),
        (7, "gave int, not text"),
    ],
)
def test_without_entities_the_question_is_the_clue_and_the_reason_is_told(written: object, note: str) -> None:
    query = decouple(lambda text: written, QUESTION)  # type: ignore[arg-type,return-value]
    assert query.clues == (QUESTION,)
    assert note in query.note
    assert QUESTION in scorer_question(query)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (steps('["a red mug", "sink"]'), ("a red mug", "sink")),
        (steps("['a red mug', 'sink']"), ("a red mug", "sink")),
        (steps("[a red mug, sink]"), ("a red mug", "sink")),
        (steps('["man\'s hat", "tie"]'), ("man's hat", "tie")),
        (steps("['man's hat', 'tie']"), ("man's hat", "tie")),
        ("STEP 1: YES\nSTEP 2: ['x']\nSTEP 3 (left): ['y']", ("y",)),
        ("**Step 1:** yes\n**Step 2:** ['x']\n**Step 3:** ['y']", ("y",)),
        ("Step 1: yes\nStep 2: ['x']", ("x",)),
        (steps('["Mug", "mug", " MUG ", "sink."]'), ("Mug", "sink")),
        (steps('["one\\nmug", "two\n mugs"]'), ("one mug", "two mugs")),
        (steps('["狗", "köpek"]'), ("狗", "köpek")),
        (steps('["mug"]') + "\nQuestion: What else?\nStep 1: no\nStep 3: ['cat']", ("mug",)),
        ("Step 1: Does one see?\nStep 3: Write.\nStep 1: yes\nStep 3: ['mug']", ("mug",)),
    ],
)
def test_lists_as_models_write_them_are_read(written: str, found: tuple[str, ...]) -> None:
    assert read_clues(written)[0] == found


# --- hostile lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        "\"__import__('os').system('touch pwned')\"",
        "__import__('os').system('touch pwned')",
        '"<image>"',
        '"<|im_end|>"',
        '"x" * 10**9',
        '{"a": "b"}',
        '("a", "b")',
        '"a\\u0000b"',
        '"a\x00b"',
        '"\\u001b[31mred"',
        '"\\u202egnp.exe"',
        '"..."',
        '""',
        "7",
        "null",
        '"' + "x" * (LONGEST_CLUE + 1) + '"',
        "[" * 300,
        "-" * 3000 + "1",
        "1" + "+1" * 1500,
        '{{"mug"}}',
        '{{"a": 1}: 2}',
    ],
)
def test_what_is_no_thing_to_look_for_is_left_out(
    entry: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    clues, note = read_clues(steps(f"[{entry}]"))
    assert clues == ()
    assert "left out" in note
    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]


def test_an_escape_that_no_language_knows_is_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert read_clues(steps("['a\\d', 'mug']")) == (("mug",), "left out 1 of the model's entries")
    assert not recwarn.list


def test_good_entries_stand_beside_bad_ones() -> None:
    clues, note = read_clues(steps('["mug", "<image>", 7, "sink"]'))
    assert (clues, note) == (("mug", "sink"), "left out 2 of the model's entries")


@pytest.mark.parametrize("inner", [",".join(f'"thing {n}"' for n in range(10**6)), "[" * 10**6, "x" * 10**6])
def test_endless_lists_are_read_in_no_time_and_cut(inner: str) -> None:
    began = time.process_time()
    clues, note = read_clues(f"Step 1: yes\nStep 3: [{inner}]")
    assert time.process_time() - began < 1
    assert len(clues) <= MOST_CLUES and note
    if "thing" in inner:
        assert clues == tuple(f"thing {n}" for n in range(MOST_CLUES))
        assert "has no end" in note and "left out" in note


def test_many_entries_are_cut_at_the_most() -> None:
    clues, note = read_clues(steps(str([f"thing {n}" for n in range(MOST_CLUES + 3)])))
    assert len(clues) == MOST_CLUES and note == "left out 3 of the model's entries"


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("x" * 10_000, "10,000 characters"),
        ("x" * (LONGEST_QUESTION + 1), "4,001 characters"),
        ("", "not empty"),
        (" \n", "not empty"),
        (None, "not empty"),
        (3, "not empty"),
        ("what \udcff is", "UTF-8"),
    ],
)
def test_unusable_questions_are_refused_before_the_model_is_asked(question: object, message: str) -> None:
    def answer(text: str) -> str:
        raise AssertionError("asked")

    with pytest.raises(OptionError, match=message):
        decouple(answer, question)  # type: ignore[arg-type]


def test_a_query_is_checked_like_its_question() -> None:
    query = Query(QUESTION, targets=("mug",))
    assert as_query(query) is query
    for text in ("", "x" * 10_000):
        with pytest.raises(OptionError):
            as_query(Query(text, targets=("mug",)))
    for wrong in ("mug", ("",), (7,)):
        with pytest.raises(OptionError, match="cues of a query are a list of texts"):
            as_query(Query(QUESTION, cues=wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "entries", ["mug", ["<image>"], [""], ["x" * 65], [f"thing {n}" for n in range(MOST_CLUES + 1)]]
)
def test_things_a_user_names_are_checked(entries: list[str]) -> None:
    assert given_clues(["mug", " a  sink "]) == ("mug", "a sink")
    with pytest.raises(OptionError):
        given_clues(entries)


def test_the_longest_question_is_taken() -> None:
    assert check_question("x" * LONGEST_QUESTION) == "x" * LONGEST_QUESTION


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(OptionError, match="'entities' or 'events', got 'verbs'"):
        decouple(str, QUESTION, "verbs")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        (Query(QUESTION), (f"following question?\n{QUESTION}\n",)),
        (Query(QUESTION, ("mug",), ("sink",)), ("any of these things: mug, sink?",)),
        (Query(QUESTION, events=("a fall",)), ("events: a fall?",)),
        (Query(QUESTION, ("mug",), events=("a fall",)), ("things: mug;", "events: a fall?")),
    ],
)
def test_the_scorer_is_asked_yes_or_no(query: Query, parts: tuple[str, ...]) -> None:
    asked = scorer_question(query)
    assert all(part in asked for part in parts)
    assert asked.endswith("\nA. yes\nB. no\nAnswer with the letter alone.")
