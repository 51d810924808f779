"""Files of tasks, records of datasets and pictures: good ones as they are, bad ones with a word."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from poster_task import TASKS, write_posters, write_records
from vlm_budget.errors import DataError, ImageError, TaskError, UnknownNameError
from vlm_budget.eval import task as task_module
from vlm_budget.eval.batching import batches, halves, windows
from vlm_budget.eval.sample import Broken, Clip, Picture, Sample, inside
from vlm_budget.eval.source import Source, read_json, read_lines, read_list, read_table, require
from vlm_budget.eval.task import FOLDERS, Task, add_folder, find_tasks, read_task, task_names

SHIPPED = sorted(path.stem for path in FOLDERS[0].glob("*.yaml"))
GOOD = "version: 1\ntitle: mine\nmodality: text\nload: poster_task:load\nscore: poster_task:score\nmetric: accuracy\n"


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that a test names are gone after it."""
    monkeypatch.setattr(task_module, "FOLDERS", FOLDERS[:1])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder for tasks."""
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_says_all_that_a_run_needs(name: str) -> None:
    task = read_task(name)
    assert task.name == name
    assert task.title
    for target in filter(None, (task.load, task.score, task.summary)):
        assert callable(task_module._resolve(target)), target
    if task.needs_data:
        assert {"url", "licence", "files", "metric"} <= set(task.data)
        assert task.data["files"]


def test_names_and_groups() -> None:
    assert task_names() == SHIPPED
    assert len({read_task(name).title for name in SHIPPED}) == len(SHIPPED)
    nano = ["nano_count", "nano_existence", "nano_place", "nano_retrieval"]
    assert [task.name for task in find_tasks(["nano"])] == nano
    assert [task.name for task in find_tasks(["textvqa", "nano_place", "nano", "textvqa"])] == [
        "textvqa",
        "nano_place",
        "nano_count",
        "nano_existence",
        "nano_retrieval",
    ]
    for group in {one for name in SHIPPED for one in read_task(name).groups}:
        assert group not in SHIPPED
        assert {task.name for task in find_tasks([group])} == {
            name for name in SHIPPED if group in read_task(name).groups
        }


@pytest.mark.parametrize(
    ("name", "hint"),
    [("textvqaa", "Did you mean 'textvqa'"), ("TextVQA", "'textvqa'"), ("nnano", "'nano'"), ("xyzzy", "eval ls")],
)
def test_an_unknown_task_is_said_with_what_is_near(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown task '{name}'") as caught:
        find_tasks([name])
    assert hint in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == (name != "xyzzy")


def test_a_folder_of_ones_own_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError):
        read_task("posters")
    for spelling in (TASKS, str(TASKS), TASKS / ".." / TASKS.name):
        add_folder(spelling)
    assert read_task("posters").version == 3
    assert len(task_module.FOLDERS) == 2
    monkeypatch.chdir(tmp_path)
    for place in ("nowhere", str(TASKS / "posters.yaml")):
        with pytest.raises(TaskError, match=f"there is no folder of tasks '{place}'"):
            add_folder(place)


def test_a_second_task_of_one_name_is_refused(mine: Path) -> None:
    (mine / "textvqa.yaml").write_text(GOOD)
    with pytest.raises(TaskError, match=r"task 'textvqa' of .*mine' has the name of .*textvqa\.yaml'; rename"):
        add_folder(mine)
    assert read_task("textvqa").title == "TextVQA, validation"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: [1\n", "cannot read task"),
        ("x: 2020-99-99\n", "cannot read task"),
        ("[" * 50_000, "cannot read task"),
        ("- version\n", "is no mapping of fields"),
        ("", "is no mapping of fields"),
        (GOOD + "metrc: x\nfoo: 1\n", "has unknown fields: foo, metrc"),
        (GOOD.replace("metric: accuracy\n", ""), "is incomplete: .*'metric'"),
        (GOOD + "name: other\n", "calls itself 'other'; a task is named like its file"),
        (GOOD.replace("text", "smell"), "modality must be one of image, video, views, text"),
        (GOOD.replace("version: 1", "version: 0"), "version must be a number from 1 on, got 0"),
        (GOOD.replace("version: 1", "version: yes"), "version must be a number from 1 on, got True"),
        (GOOD + "frames: 2.5\n", "frames must be a number from 1 on"),
        (GOOD + "prompt: 3\n", "prompt must be text, got 3"),
        (GOOD + "summary: [a]\n", "summary must be text"),
        (GOOD + "groups: nano\n", "groups must be a list of names, got 'nano'"),
        (GOOD + "groups: [1]\n", "groups must be a list of names"),
        (GOOD + "data: yes\n", "data must be a mapping, got True"),
        (GOOD + "reads_text: 1\n", "reads_text must be true or false"),
    ],
)
def test_a_damaged_task_is_said(mine: Path, text: str, message: str) -> None:
    (mine / "bad.yaml").write_text(text)
    add_folder(mine)
    with pytest.raises(TaskError, match=message) as caught:
        read_task("bad")
    assert "bad" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_that_is_no_text_is_said(mine: Path) -> None:
    (mine / "bad.yaml").write_bytes(b"title: \xff\xfe")
    add_folder(mine)
    with pytest.raises(TaskError, match="cannot read task"):
        read_task("bad")


@pytest.mark.parametrize(
    "target", ["no_such_module_xyz:load", "poster_task:no_such", "poster_task", ":load", "", ".x:y", "broken_task:load"]
)
def test_a_function_that_is_not_there_is_said(mine: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine))
    (mine / "broken_task.py").write_text("def load(:\n")
    (mine / "bad.yaml").write_text(GOOD.replace("poster_task:load", repr(target)))
    add_folder(mine)
    with pytest.raises(TaskError, match="there is no function") as caught:
        next(read_task("bad").samples(Source()))
    assert repr(target) in str(caught.value)


def test_a_metric_that_is_no_score_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("t", 1, "t", "text", "x:y", "poster_task:score", "f1")
    with pytest.raises(TaskError, match=r"names metric 'f1', its scores are \['accuracy'\]"):
        task.scores("a", Sample("1", "q", ("a",)))


def test_figures_are_means_without_hidden_scores() -> None:
    task = Task("t", 1, "t", "text", "x:y", "x:y", "a")
    assert task.figures([({"a": 1.0, "_h": 9.0}, {}), ({"a": 0.0, "b": 3.0}, {})]) == {"a": 0.5, "b": 3.0}


def test_no_task_gives_more_samples_than_the_limit(tmp_path: Path) -> None:
    add_folder(TASKS)
    write_posters(tmp_path / "posters", 1)
    task = read_task("posters")
    assert len(list(task.samples(Source(root=tmp_path / "posters")))) == 6
    assert len(list(task.samples(Source(root=tmp_path / "posters", limit=4)))) == 4
    assert len(list(read_task("nano_count").samples(Source(limit=7)))) == 7


def test_an_id_that_stands_twice_breaks_its_second_sample_only(tmp_path: Path) -> None:
    add_folder(TASKS)
    records = write_posters(tmp_path, 1)
    names = ["a", "a", "a #2", "b", "a"]
    write_records(tmp_path, [{**one, "id": name} for one, name in zip(records, names, strict=False)])
    found = list(read_task("posters").samples(Source(root=tmp_path)))
    assert [one.id for one in found] == ["a", "a #2", "a #2 #2", "b", "a #3"]
    assert [getattr(one, "error", None) for one in found] == [None, *["its id stands twice"] * 2, None] + [
        "its id stands twice"
    ]


def test_a_seed_draws_other_posters_and_none_the_published_ones() -> None:
    def ids(seed: int | None) -> list[tuple[str, str]]:
        found = read_task("nano_retrieval").samples(Source(seed=seed, limit=5))
        return [(one.prompt, one.answers[0]) for one in found if isinstance(one, Sample)]

    assert ids(None) == ids(None) != ids(3)


# Sources


def test_a_damaged_picture_of_the_hub_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="hub datasets are read with datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = coloured("PNG", (10, 90, 200))
    rows = [{"image": {"bytes": one, "path": None}} for one in (data, data[:60], b"no picture", data)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    (tmp_path / "hub").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "hub" / "test-0.parquet"))
    found = list(Source(hub=str(tmp_path / "hub"), split="test").rows())
    assert len(found) == 4
    loaded: list[Any] = []
    for number, row in enumerate(found):
        try:
            loaded.append(Picture(str(number), row["image"]["bytes"]).load().getpixel((6, 4)))
        except ImageError as error:
            loaded.append(str(error))
    assert loaded[0] == loaded[3] == (10, 90, 200)
    assert "'1' is damaged or truncated" in loaded[1]
    assert "'2' is not a picture" in loaded[2]


def test_a_hub_dataset_that_breaks_off_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="hub datasets are read with datasets: pip install datasets")

    class Rows:
        features: dict[str, Any] = {}

        def __iter__(self) -> Iterator[dict[str, int]]:
            yield {"a": 1}
            raise OSError("unexpected end of stream\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    rows = Source(hub="me/mine", split="test").rows()
    assert next(rows) == {"a": 1}
    with pytest.raises(DataError, match="cannot read on in dataset 'me/mine', split 'test': unexpected end of stream$"):
        next(rows)


def test_sources_that_are_not_named_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name it with --data"):
        _ = Source().folder
    with pytest.raises(DataError, match="there is no data folder"):
        _ = Source(root=tmp_path / "nowhere").folder
    with pytest.raises(DataError, match="no dataset is named"):
        next(Source().rows())
    with pytest.raises(DataError, match=r"holds none of a\.json, b/\*\.json: is it the dataset's own layout"):
        Source(root=tmp_path).find("a.json", "b/*.json")
    (tmp_path / "b").mkdir()
    for name in ("2.json", "1.json"):
        (tmp_path / "b" / name).write_text("[]")
    assert Source(root=tmp_path).find("a.json", "b/*.json") == (tmp_path / "b" / "1.json").resolve()


@pytest.mark.parametrize(
    "data", [b"[" * 200_000, b'{"a":', b"\xff\xfe\x00", b"", b'{"a": ' * 200_000], ids=lambda data: repr(data[:6])
)
def test_damaged_json_is_said_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read .*x\.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_with_a_byte_order_mark_and_lists_under_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"data": {"rows": [1, 2]}}')
    assert read_list(path, "data", "rows") == [1, 2]
    with pytest.raises(DataError, match=r"x\.json has no 'row'"):
        read_list(path, "data", "row")
    with pytest.raises(DataError, match="holds a dict where a list"):
        read_list(path, "data")
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path)


def test_lines_that_are_no_records_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n[1]\n{"a":\n\xff\n' + b"[" * 200_000 + b'\n{"a": "\xe2\x80\xa8"}')
    found = list(read_lines(path))
    assert [one for one in found if not isinstance(one, Broken)] == [{"a": 1}, {"a": "\u2028"}]
    broken = {one.id: one.error for one in found if isinstance(one, Broken)}
    assert list(broken) == [f"x.jsonl line {number}" for number in (3, 4, 5, 6)]
    assert broken["x.jsonl line 3"] == "no record: a list, not an object"
    with pytest.raises(DataError, match="cannot read"):
        list(read_lines(tmp_path))


def test_tables_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("\ufeffa\tb\n1\t2\n", encoding="utf-8")
    assert list(read_table(path)) == [{"a": "1", "b": "2"}]
    path.write_bytes(b"a\tb\n\xff\t2\n")
    with pytest.raises(DataError, match="cannot read"):
        list(read_table(path))
    assert require({"a": 0, "b": ""}, ("b", "a")) == ["", 0]
    with pytest.raises(DataError, match="the record has no b and no c; it has a, b"):
        require({"a": 1, "b": None}, ("a", "b", "c"))


# Pictures and paths


def coloured(kind: str, colour: Any, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.new(mode, (7, 5), colour)
    image.paste(0 if isinstance(colour, int) else tuple(0 for _ in colour), (0, 0, 3, 2))
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return coloured("PNG", (200, 30, 30), exif=exif)


@pytest.mark.parametrize(
    ("data", "size", "corner", "far"),
    [
        (coloured("PNG", (1, 2, 3)), (7, 5), (0, 0, 0), (1, 2, 3)),
        (turned(), (5, 7), (200, 30, 30), (200, 30, 30)),
        (coloured("PNG", (9, 9, 9, 255), "RGBA"), (7, 5), (255, 255, 255), (9, 9, 9)),
        (coloured("PNG", 0xFFFF, "I;16"), (7, 5), (0, 0, 0), (255, 255, 255)),
        (coloured("GIF", 255, "L"), (7, 5), (0, 0, 0), (255, 255, 255)),
    ],
    ids=["plain", "EXIF orientation", "transparency", "16 bits", "palette"],
)
def test_a_file_its_bytes_and_the_opened_picture_are_equal(
    tmp_path: Path, data: bytes, size: tuple[int, int], corner: Any, far: Any
) -> None:
    (tmp_path / "x").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    found = [Picture("x", source).load() for source in (tmp_path / "x", data, opened)]
    for image in found:
        assert (image.mode, image.size) == ("RGB", size)
        assert image.tobytes() == found[0].tobytes()
    assert (found[0].getpixel((0, 0)), found[0].getpixel((size[0] - 1, size[1] - 1))) == (corner, far)


def test_a_picture_that_cannot_be_decoded_is_an_image_error(tmp_path: Path) -> None:
    data = coloured("PNG", (1, 2, 3))[:60]
    (tmp_path / "x.png").write_bytes(data)
    for source in (tmp_path / "x.png", data, Image.open(io.BytesIO(data))):
        with pytest.raises(ImageError, match=r"x\.png' is damaged or truncated"):
            Picture("x.png", source).load()
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        Picture("flat", Image.new("RGB", (0, 5))).load()
    with pytest.raises(ImageError, match="there is no file"):
        Picture.inside(tmp_path, "gone.png").load()


def test_no_path_leads_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "in").mkdir(parents=True)
    secret = tmp_path / "secret.png"
    secret.write_bytes(coloured("PNG", (1, 2, 3)))
    (root / "link.png").symlink_to(secret)
    (root / "in" / "up").symlink_to(tmp_path)
    (root / "in" / "near").symlink_to(root / "x.png")
    (root / "loop").symlink_to("loop")
    (tmp_path / "data2").mkdir()
    assert inside(root, "in/../x.png") == (root / "x.png").resolve()
    assert inside(root, "in/near") == (root / "x.png").resolve()
    assert inside(root, str(root / "x.png")) == (root / "x.png").resolve()
    for path in ("../secret.png", "link.png", "in/up/secret.png", str(secret), os.sep, "../data2/x", "in/../../x"):
        with pytest.raises(DataError, match="leads out of the data folder"):
            Picture.inside(root, path)
    for path in ("a\0b", "\ud800", "loop", "loop/x"):
        with pytest.raises(DataError, match="is no usable path"):
            inside(root, path)
    with pytest.raises(ImageError, match="cannot be read"):
        Picture.inside(root, "n" * 5000).load()


def test_a_folder_that_is_itself_a_link_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(coloured("PNG", (1, 2, 3)))
    (tmp_path / "here").symlink_to("data")
    assert Picture.inside(tmp_path / "here", "x.png").load().size == (7, 5)


# Batches


def test_a_batch_holds_samples_of_one_kind_in_order_of_length() -> None:
    picture, clip = Picture("p", b""), Clip("c", Path("c.mp4"))
    window: list[Sample | Broken] = [
        Sample("long", "p" * 9, ("a",), (picture,)),
        Broken("line 2", "torn"),
        Sample("film", "p", ("a",), clip=clip),
        Sample("two", "p", ("a",), (picture, picture)),
        Sample("short", "p", ("a",), (picture,)),
        Sample("text", "p" * 99, ("a",)),
    ]
    found = [[one.id for one in batch] for batch in batches(window, 2)]
    assert found == [["text", "short"], ["long", "two"], ["line 2"], ["film"]]


def test_windows_hold_all_samples_once_and_never_many() -> None:
    samples = [Sample(str(number), "p", ()) for number in range(21)]
    found = list(windows(iter(samples), 2))
    assert [len(one) for one in found] == [8, 8, 5]
    assert [one for window in found for one in window] == samples
    assert halves(samples[:3]) == (samples[:2], samples[2:3])
