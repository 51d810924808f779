from __future__ import annotations

import pytest

from dataset_files import HOSTILE, parquet, small_video, split, write, write_lines
from vlm_budget.errors import DataError, ImageError
from vlm_budget.eval.frames import read_frames
from vlm_budget.eval.sample import Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import find_tasks, read_task


def test_all_tasks_are_found_by_name_and_by_group():
    names = {"videomme", "mlvu", "longvideobench"}
    assert names <= {one.name for one in find_tasks(["video"])}
    assert "scanqa" in {one.name for one in find_tasks(["views"])}
    assert "math500" in {one.name for one in find_tasks(["text"])}
    for name in (*names, "scanqa", "math500"):
        task = read_task(name)
        assert task.needs_data and {"url", "paper", "licence", "files", "metric"} <= set(task.data)


# Video-MME


def videomme_row(**changes) -> dict:
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many socks are there?",
        "options": ["A. Two.", "B. Three.", "C. Four.", "D. Five."],
        "answer": "C",
    }
    return {**row, **changes}


def test_videomme_reads_the_published_parquet_and_its_exports(tmp_path):
    rows = [videomme_row(), videomme_row(question_id="001-2", answer="A", task_type="Action Reasoning")]
    small_video(tmp_path / "a" / "data" / "fFjv93ACGo8.mp4")
    parquet(tmp_path / "a" / "videomme" / "test-00000-of-00001.parquet", rows)
    write(tmp_path / "b" / "test.json", rows)
    write_lines(tmp_path / "b2" / "test.jsonl", rows)
    task = read_task("videomme")
    whole, broken = split(task.samples(Source(tmp_path / "a")))
    assert not broken and [one.id for one in whole] == ["001-1", "001-2"]
    first = whole[0]
    assert first.prompt == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nHow many socks are there?\nA. Two.\nB. Three.\nC. Four.\n"
        "D. Five.\nThe best answer is:"
    )
    assert first.answers == ("C",) and first.group == "fFjv93ACGo8" and not first.images
    assert first.facts["duration"] == "short" and first.facts["sub_category"] == "Humanity & History"
    assert first.clip.name == "data/fFjv93ACGo8.mp4" and len(read_frames(first.clip, 4)) == 4
    for folder in ("b", "b2"):
        again, broken = split(task.samples(Source(tmp_path / folder)))
        assert not broken and [(one.id, one.prompt, one.answers) for one in again] == [
            (one.id, one.prompt, one.answers) for one in whole
        ]


def test_videomme_from_the_hub(tmp_path):
    parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", [videomme_row()])
    small_video(tmp_path / "hub" / "videos" / "fFjv93ACGo8.mkv")
    (only,), broken = split(read_task("videomme").samples(Source(hub=str(tmp_path / "hub"))))
    assert not broken and only.answers == ("C",) and only.clip.name == "videos/fFjv93ACGo8.mkv"
    with pytest.raises(DataError, match="hf download"):
        list(read_task("videomme").samples(Source(hub=None)))


def test_videomme_faulty_records_go_by(tmp_path):
    rows = [
        videomme_row(),
        videomme_row(question_id="x1", options=None),
        videomme_row(question_id="x2", options="A. Two."),
        videomme_row(question_id="x3", answer="Z"),
        videomme_row(question_id="x4", videoID="../../secret"),
        videomme_row(question_id="x5", question=["no", "text"]),
        videomme_row(question_id="x7", videoID="a" * 5000),
        videomme_row(question_id="x8", videoID="a\0b"),
        videomme_row(),
        "{not json",
        "[1, 2]",
        {"video_id": "001"},
        videomme_row(question_id="x6", question=HOSTILE, options=[HOSTILE, "b"], answer="B", videoID="gone"),
    ]
    write_lines(tmp_path / "test.jsonl", rows)
    good, broken = split(read_task("videomme").samples(Source(tmp_path)))
    assert [one.id for one in good] == ["001-1", "x6"] and len(broken) == 11
    assert HOSTILE in good[1].prompt
    errors = " | ".join(one.error for one in broken)
    for part in ("options", "'Z'", "leads out of the data folder", "question", "was there before", "no record"):
        assert part in errors
    with pytest.raises(ImageError, match="there is no video 'data/gone.mp4'"):
        read_frames(good[1].clip, 2)


def test_missing_and_damaged_files_are_said_before_the_first_sample(tmp_path):
    for name in ("videomme", "mlvu", "longvideobench", "scanqa", "math500"):
        with pytest.raises(DataError, match="holds none of"):
            next(iter(read_task(name).samples(Source(tmp_path))))
        with pytest.raises(DataError, match="there is no data folder"):
            next(iter(read_task(name).samples(Source(tmp_path / "gone"))))
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no parquet at all")
    with pytest.raises(DataError, match="cannot read"):
        next(iter(read_task("videomme").samples(Source(tmp_path))))
    (tmp_path / "lvb_val.json").write_text('[{"id": 1}, ')
    with pytest.raises(DataError, match="lvb_val.json"):
        next(iter(read_task("longvideobench").samples(Source(tmp_path))))


def test_multiple_choice_scores_and_figures():
    task = read_task("videomme")
    options = ["Two.", "Three.", "Four.", "Five."]
    sample = Sample("1", "?", ("C",), facts={"options": options})
    assert task.scores("C. Four.", sample) == {"accuracy": 1.0, "readable": 1.0}
    assert task.scores("A", sample) == {"accuracy": 0.0, "readable": 1.0}
    assert task.scores("I cannot tell", sample) == {"accuracy": 0.0, "readable": 0.0}
    rows = [
        ({"accuracy": 1.0}, {"duration": "short", "domain": "Knowledge"}),
        ({"accuracy": 0.0}, {"duration": "short", "domain": "Life Record"}),
        ({"accuracy": 1.0}, {"duration": "long", "domain": "Knowledge"}),
    ]
    figures = task.figures(rows)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["accuracy, duration short"] == 0.5 and figures["accuracy, duration long"] == 1.0
    assert figures["accuracy, domain Knowledge"] == 1.0


# MLVU

KINDS = ["1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning"]


def mlvu_row(**changes) -> dict:
    row = {
        "video": "movie101_66.mp4",
        "duration": 246,
        "question": "What color is the main male character in the video?",
        "candidates": ["Yellow", "Red", "Green", "Blue"],
        "answer": "Yellow",
        "question_type": "plotQA",
    }
    return {**row, **changes}


def test_mlvu_reads_its_seven_files(tmp_path):
    for kind in KINDS:
        count = mlvu_row(candidates=["0", "2", "4", "8"], answer="4", question_type="count", video="count_1.mp4")
        write(tmp_path / "json" / f"{kind}.json", [count if kind == "4_count" else mlvu_row(question_type=kind[2:])])
    small_video(tmp_path / "video" / "1_plotQA" / "movie101_66.mp4")
    good, broken = split(read_task("mlvu").samples(Source(tmp_path)))
    assert not broken and [one.id for one in good] == [f"{kind}-1" for kind in KINDS]
    assert good[0].prompt == (
        "What color is the main male character in the video?\n(A) Yellow\n(B) Red\n(C) Green\n(D) Blue\n"
        "Only give the best option.\nBest option: ("
    )
    assert good[0].answers == ("A",) and good[3].answers == ("C",)
    assert len(read_frames(good[0].clip, 3)) == 3
    # The same file name stands for another video in every folder.
    assert good[1].clip.path == (tmp_path / "video" / "2_needle" / "movie101_66.mp4").resolve()
    assert good[0].group != good[1].group
    (tmp_path / "json" / "4_count.json").unlink()
    with pytest.raises(DataError, match="4_count.json"):
        next(iter(read_task("mlvu").samples(Source(tmp_path))))


def test_mlvu_faulty_records_go_by(tmp_path):
    for kind in KINDS:
        write(tmp_path / "json" / f"{kind}.json", [])
    rows = [mlvu_row(answer="Purple"), mlvu_row(candidates=["Red", "Red"], answer="Red"), mlvu_row(video="/etc/passwd")]
    rows += [mlvu_row(video="../../../secret.mp4"), 7, mlvu_row(candidates=None), mlvu_row()]
    write(tmp_path / "json" / "1_plotQA.json", rows)
    good, broken = split(read_task("mlvu").samples(Source(tmp_path)))
    # "/etc/passwd" behind the folder's name is a file below it, and is not there.
    assert [one.id for one in good] == ["1_plotQA-3", "1_plotQA-7"] and len(broken) == 5
    assert good[0].clip.path.is_relative_to(tmp_path.resolve())
    assert "Purple" in broken[0].error and "leads out" in broken[2].error


def test_mlvu_from_the_hub_with_options_in_the_question_or_beside_it(tmp_path):
    inside = {
        "video_name": "1_plotQA/movie101_66.mp4",
        "question": "What color is it?\n(A) Yellow\n(B) Red\n(C) Green",
        "answer": "B",
        "task_type": "plotQA",
    }
    parquet(tmp_path / "a" / "data" / "test-00000-of-00001.parquet", [inside, {**inside, "question": "No options"}])
    small_video(tmp_path / "a" / "video" / "1_plotQA" / "movie101_66.mp4")
    (only,), (broken,) = split(read_task("mlvu").samples(Source(hub=str(tmp_path / "a"))))
    assert only.answers == ("B",) and only.facts["options"] == ["Yellow", "Red", "Green"]
    assert only.prompt.startswith("What color is it?\n(A) Yellow\n(B) Red\n(C) Green\nOnly give")
    assert len(read_frames(only.clip, 2)) == 2 and "candidates" in broken.error
    beside = {**inside, "question": "What color is it?", "candidates": ["Yellow", "Red"], "answer": "Red"}
    parquet(tmp_path / "b" / "data" / "test-00000-of-00001.parquet", [{**beside, "question_id": "plotQA_7"}])
    (only,), _ = split(read_task("mlvu").samples(Source(hub=str(tmp_path / "b"))))
    assert only.id == "plotQA_7" and only.answers == ("B",) and only.prompt.startswith("What color is it?\n(A) Yellow")


def test_mlvu_average_is_over_kinds_not_questions():
    # plotQA 3 of 3, count 0 of 1: three quarters of the questions, half of the kinds.
    rows = [({"accuracy": 1.0}, {"question_type": "plotQA"})] * 3 + [({"accuracy": 0.0}, {"question_type": "count"})]
    figures = read_task("mlvu").figures(rows)
    assert figures["accuracy"] == 0.75 and figures["m_avg"] == 0.5
    assert figures["accuracy, question_type count"] == 0.0


# LongVideoBench


def lvb_row(**changes) -> dict:
    row = {
        "video_id": "86CxyhFV9MI",
        "question": "In the video, what happens to the man's clothes?",
        "question_wo_referring_query": "What happens to his clothes?",
        "candidates": ["jacket", "tank top", "bathrobe", "shirt", "shirtless"],
        "correct_choice": 4,
        "position": [854],
        "topic_category": "NP-News-Programs",
        "question_category": "TAA",
        "level": "L2-Relation",
        "id": "86CxyhFV9MI_0",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "duration_group": 600,
        "starting_timestamp_for_subtitles": 0,
        "duration": 190.16,
        "view_count": 259852,
    }
    return {**row, **changes}


def test_longvideobench_reads_lvb_val(tmp_path):
    write(tmp_path / "lvb_val.json", [lvb_row()])
    small_video(tmp_path / "videos" / "86CxyhFV9MI.mp4")
    (only,), broken = split(read_task("longvideobench").samples(Source(tmp_path)))
    assert not broken and only.id == "86CxyhFV9MI_0" and only.answers == ("E",)
    assert only.prompt == (
        "Question: In the video, what happens to the man's clothes?\nA. jacket\nB. tank top\nC. bathrobe\nD. shirt\n"
        "E. shirtless\nAnswer with the option's letter from the given choices directly."
    )
    assert only.facts["duration_group"] == "600" and only.group == "86CxyhFV9MI"
    assert len(read_frames(only.clip, 4)) == 4


def test_longvideobench_from_the_hub_has_options_in_columns(tmp_path):
    row = lvb_row(correct_choice=2)
    options = {f"option{n}": value for n, value in enumerate(["jacket", "tank top", "bathrobe", "N/A", "N/A"])}
    for name in ("candidates", "position"):
        row.pop(name)
    parquet(
        tmp_path / "hub" / "validation-00000-of-00001.parquet", [{**row, **options}, {**row, **options, "id": None}]
    )
    small_video(tmp_path / "hub" / "videos" / "86CxyhFV9MI.mp4")
    (only,), (broken,) = split(read_task("longvideobench").samples(Source(hub=str(tmp_path / "hub"))))
    assert only.answers == ("C",) and only.facts["options"] == ["jacket", "tank top", "bathrobe"]
    assert "'id'" in broken.error


def test_longvideobench_faulty_records_go_by(tmp_path):
    rows = [lvb_row(correct_choice=one) for one in (5, -1, "4", True, None, 4.0)]
    rows += [lvb_row(video_path="../../x.mp4"), lvb_row(candidates=["one"]), lvb_row(candidates=[1, None])]
    write(tmp_path / "lvb_val.json", rows)
    good, broken = split(read_task("longvideobench").samples(Source(tmp_path)))
    assert not good and len(broken) == len(rows)
    assert all("correct_choice" in one.error for one in broken[:6]) and "leads out" in broken[6].error


def test_longvideobench_figures_by_duration():
    rows = [({"accuracy": float(n)}, {"duration_group": group, "question_category": "S2E"}) for n, group in
            ((1, "15"), (0, "15"), (1, "3600"), (1, "600"))]  # fmt: skip
    figures = read_task("longvideobench").figures(rows)
    assert list(figures)[1:4] == [f"accuracy, duration_group {one}" for one in (15, 600, 3600)]
    assert figures["accuracy, duration_group 15"] == 0.5 and figures["accuracy, question_category S2E"] == 0.75
