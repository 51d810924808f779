from __future__ import annotations

import builtins
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_budget.errors import ImageError, MissingExtraError, OptionError
from vlm_budget.eval.frames import pictures_in, read_frames, spread
from vlm_budget.eval.sample import Clip

av = pytest.importorskip("av", reason="PyAV is not installed (the video extra)")


def write_video(path: Path, greys: Sequence[int], rate: int = 10, gop: int = 10, offset: int = 0) -> Path:
    """Lossless frames, each of one grey, so that a frame tells its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 16, "yuv420p", gop
        for number, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), grey, dtype=np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts = number + offset
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(pictures: Sequence[Image.Image]) -> list[int]:
    return [round(float(np.asarray(one).mean())) for one in pictures]


def near(found: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(found) == len(wanted) and all(abs(a - b) <= 2 for a, b in zip(found, wanted, strict=True))


def test_frames_are_the_middles_of_equal_pieces(tmp_path):
    # 2 s, 20 frames: four pieces of 0.5 s have their middles at 0.25, 0.75, 1.25 and 1.75 s: frames 2, 7, 12, 17.
    path = write_video(tmp_path / "a.mp4", [10 * n for n in range(20)])
    pictures = read_frames(Clip("a", path), 4)
    assert near(greys(pictures), [20, 70, 120, 170])
    assert all(one.mode == "RGB" and one.size == (32, 16) for one in pictures)


def test_one_frame_is_the_middle_one(tmp_path):
    path = write_video(tmp_path / "a.mp4", [10 * n for n in range(20)])
    assert near(greys(read_frames(Clip("a", path), 1)), [100])


def test_start_and_end_cut_a_part_out(tmp_path):
    # From 1.0 s to 1.4 s two pieces, middles at 1.1 and 1.3 s: frames 11 and 13.
    path = write_video(tmp_path / "a.mp4", [10 * n for n in range(20)])
    assert near(greys(read_frames(Clip("a", path, 1.0, 1.4), 2)), [110, 130])
    # An end behind the video's own counts as that: 1 s to 2 s, middles at 1.25 and 1.75 s.
    assert near(greys(read_frames(Clip("a", path, 1.0, 99.0), 2)), [120, 170])


def test_a_short_clip_gives_each_frame_once(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 100, 200])
    assert near(greys(read_frames(Clip("a", path), 16)), [0, 100, 200])


def test_long_videos_are_jumped_through_to_the_same_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [n % 250 for n in range(300)], rate=5, gop=7)
    jumped = greys(read_frames(Clip("a", path), 6))
    monkeypatch.setattr("vlm_budget.video.frames.decoding._SEEK", 1e9)
    assert jumped == greys(read_frames(Clip("a", path), 6))
    assert near(jumped, [25, 75, 125, 175, 225, 25])  # 60 s in 6 pieces: the middles are frames 25, 75, ... 275


@pytest.mark.parametrize("suffix", ["mkv", "mov", "webm"])
def test_other_containers(tmp_path, suffix):
    if suffix == "webm":
        with av.open(str(tmp_path / "a.webm"), "w") as container:
            stream = container.add_stream("libvpx", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
            for grey in [20] * 5 + [220] * 5:
                frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), grey, dtype=np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        write_video(tmp_path / f"a.{suffix}", [20] * 5 + [220] * 5)
    low, high = greys(read_frames(Clip("a", tmp_path / f"a.{suffix}"), 2))
    assert low < 60 and high > 180


def test_a_folder_of_pictures_is_a_clip_in_natural_order(tmp_path):
    for number in range(12):
        Image.new("RGB", (4, 4), (20 * number,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    # Twelve pictures in three pieces of four: the middles are numbers 2, 6 and 10.
    assert greys(read_frames(Clip("views", tmp_path), 3)) == [40, 120, 200]
    assert [one.name for one in pictures_in(tmp_path)][-3:] == ["9.png", "10.png", "11.png"]
    with pytest.raises(ImageError, match="no clock"):
        read_frames(Clip("views", tmp_path, 1.0), 3)


def test_depth_pictures_beside_colour_are_left_out(tmp_path):
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.jpg")
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    assert [one.name for one in pictures_in(tmp_path)] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize(
    ("total", "count", "wanted"),
    [(12, 3, [2, 6, 10]), (5, 5, [0, 1, 2, 3, 4]), (3, 8, [0, 1, 2]), (7, 2, [1, 5]), (1, 1, [0]), (0, 4, [])],
)
def test_spread(total, count, wanted):
    assert spread(total, count) == wanted


def test_missing_empty_and_strange_files_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "folder").mkdir()
    cases = {"gone.mp4": "there is no video", "empty.mp4": "0 bytes", "text.mp4": "damaged", "folder": "no pictures"}
    for name, message in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            read_frames(Clip(name, tmp_path / name), 4)
        assert name in str(caught.value)


def test_a_truncated_video_is_an_error_not_fewer_frames(tmp_path):
    noise = np.random.default_rng(0)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 16, "yuv420p", 5
        for _ in range(60):
            pixels = noise.integers(0, 255, (16, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    assert len(read_frames(Clip("a", path), 8)) == 8
    for share in (0.9, 0.5, 0.2, 0.01):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageError):
            read_frames(Clip("a", path), 8)


def test_sound_without_pictures_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match="no video stream"):
        read_frames(Clip("a", tmp_path / "a.mp4"), 2)


def test_parts_that_make_no_sense(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0] * 10)
    for start, end in ((2.0, 1.0), (-1.0, None), (float("nan"), None), (0.5, 0.5), (5.0, None)):
        with pytest.raises(ImageError, match="a"):
            read_frames(Clip("a", path, start, end), 2)
    for count in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="frames"):
            read_frames(Clip("a", path), count)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [0] * 10)
    found = builtins.__import__

    def fails(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return found(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "av")
    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(MissingExtraError, match=r"vlm-budget\[video\]"):
        read_frames(Clip("a", path), 2)
