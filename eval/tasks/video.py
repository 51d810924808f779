"""What the video tasks share: multiple-choice records about a file, and where the files lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError, MissingExtraError
from vlm_budget.eval.choices import LETTERS, score_choice
from vlm_budget.eval.sample import Clip, Sample, inside
from vlm_budget.eval.source import Source, read_lines, read_list
from vlm_budget.eval.task import Scores

VIDEOS = (".mp4", ".mkv", ".webm", ".MP4", ".avi", ".mov")


def read_rows(path: Path) -> list[Any]:
    """Records of a parquet file, a JSON list, or JSON lines; lines that are none come as ``Broken``.

    Raises:
        DataError: The file is missing or damaged.
        MissingExtraError: It is parquet, and ``datasets`` is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return list(read_lines(path))
    if suffix != ".parquet":
        return read_list(path)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading parquet files needs datasets: pip install 'vlm-budget[eval]'") from error
    try:
        return list(datasets.load_dataset("parquet", data_files={"test": str(path)}, split="test", streaming=True))
    except Exception as error:  # the library raises anything on a damaged file
        raise DataError(f"cannot read {str(path)!r}: {' '.join(str(error).split())[:200]}") from error


def media_root(source: Source, files: str) -> Path:
    """The folder in which a dataset's videos or pictures lie.

    Raises:
        DataError: The questions come from the hub, which gives no files with them.
    """
    if source.root is not None:
        return source.folder
    folder = Path((source.hub or "").partition(",")[0])
    if source.hub and folder.is_dir():
        return folder
    raise DataError(
        f"the hub's rows hold the questions only, not {files}: download the dataset "
        "(hf download NAME --repo-type dataset --local-dir FOLDER), unpack it, and pass --data TASK=FOLDER"
    )


def find_video(root: Path, folders: Sequence[str], name: str) -> Clip:
    """A video by its name, with or without its suffix, or a folder of its frames.

    Where there is none, a clip that says so when it is read.

    Raises:
        DataError: The name leads out of the data folder, or cannot be a file's.
    """
    wanted = [name] if Path(name).suffix in VIDEOS else [f"{name}{suffix}" for suffix in VIDEOS]
    places = [f"{folder}/{one}" if folder else one for folder in folders for one in wanted]
    # Removed videos are replaced by a folder of frames.
    stems = [place[: -len(Path(place).suffix)] for place in places]
    paths = [inside(root, place) for place in (*places, *dict.fromkeys(stems))]
    try:
        found = next((path for path in paths if path.exists()), paths[0])
    except OSError as error:  # a name too long, a folder that may not be entered
        raise DataError(f"cannot look for video {name[:80]!r}: {error.strerror}") from error
    return Clip(f"{folders[0]}/{wanted[0]}" if found == paths[0] else str(found.relative_to(root.resolve())), found)


def text(record: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A field that is text, or a number as text.

    Raises:
        DataError: It is missing, empty, or something else.
    """
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        has = ", ".join(map(str, record))
        raise DataError(f"field {name!r} must be text, got {value!r}; the record has {has}"[:500])
    return str(value).strip()


def texts(record: Mapping[str, Any], name: str, least: int = 1) -> list[str]:
    """A field that is a list of texts.

    Raises:
        DataError: It is missing, too short, or something else.
    """
    value = record.get(name)
    if not isinstance(value, list | tuple) or not least <= len(value) <= len(LETTERS):
        raise DataError(f"field {name!r} must be a list of {least} to {len(LETTERS)} texts, got {value!r}"[:500])
    return [text({name: one}, name) for one in value]


def score(answer: str, sample: Sample) -> Scores:
    """Whether the right letter was chosen, and whether any could be read."""
    return score_choice(answer, sample.facts["options"], sample.answers[0])
