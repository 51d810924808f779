from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clips import greys_of, played, write_clip
from vlm_budget.video.frames import Frame, Video, decoding

pytest.importorskip("av", reason="PyAV is not installed (the video extra)")

SHAPES = {
    "b-frames": ("a.mp4", {"bframes": 3, "gop": 12}),
    "one key frame": ("a.mp4", {"gop": 1000, "bframes": 2}),
    "only key frames": ("a.mov", {"codec": "mjpeg"}),
    "matroska": ("a.mkv", {"gop": 12, "bframes": 2}),
    "webm": ("a.webm", {"codec": "libvpx-vp9", "gop": 12}),
    "transport stream": ("a.ts", {"gop": 12, "bframes": 2}),
    "transport stream, one key frame": ("a.ts", {"gop": 1000}),
    "avi": ("a.avi", {"codec": "mpeg4", "gop": 12}),
    "gif": ("a.gif", {"codec": "gif"}),
    "late start": ("a.mp4", {"start": 3.5, "gop": 12, "bframes": 2}),
    "late start, stream": ("a.ts", {"start": 3.5, "gop": 12}),
    "late start, flash": ("a.flv", {"start": 3.5, "gop": 12}),
    "uneven": ("a.mp4", {"times": [n * n / 100 + (n % 3) / 50 for n in range(60)], "gop": 12, "bframes": 2}),
    "uneven matroska": ("a.mkv", {"times": [n * n / 100 + (n % 3) / 50 for n in range(60)], "gop": 12, "bframes": 2}),
}


@pytest.fixture(params=SHAPES)
def clip(request, tmp_path):
    name, options = SHAPES[request.param]
    noise = np.random.default_rng(0).integers(0, 255, (60, 16, 32, 3), dtype=np.uint8)
    return write_clip(tmp_path / name, noise, **options)


def shown(frames, time):
    """The last frame that began until a time, of (time, pixels)."""
    return [one for one in frames if one[0] <= time + 6e-4][-1]


def test_clips_hold_the_b_frames_that_are_asked_for(tmp_path):
    import av

    path = write_clip(tmp_path / "a.mp4", list(range(40)), gop=1000, bframes=3)
    with av.open(str(path)) as container:
        kinds = [av.video.frame.PictureType(one.pict_type).name for one in container.decode(video=0)]
    assert kinds.count("B") > 25


@pytest.mark.parametrize("reach", [0.0, decoding._SEEK], ids=["always jumping", "jumping where it pays"])
def test_every_time_shows_what_a_plain_loop_shows(clip, reach, monkeypatch):
    monkeypatch.setattr(decoding, "_SEEK", reach)
    frames = played(clip)
    assert len(frames) == 60
    wanted = [time for time, _ in frames]
    wanted += [random.Random(0).uniform(0, wanted[-1]) for _ in range(60)]
    wanted = [time for time in wanted if all(abs(time - one) > 2e-3 or time == one for one, _ in frames)]
    random.Random(1).shuffle(wanted)
    with Video.open(clip) as video:
        found = video.at(wanted)
        for part in (wanted[:5], wanted[5:10]):  # and once more, against the run of time
            found += video.at(part)
    for time, one in zip(wanted + wanted[:10], found, strict=True):
        when, pixels = shown(frames, time)
        assert one.time == pytest.approx(when, abs=1e-9)
        assert np.array_equal(np.asarray(one.image), pixels)


def test_times_are_the_files_own_and_not_counted_out_of_the_rate(tmp_path):
    times = [0.0, 0.04, 0.5, 0.501, 2.75, 2.8, 9.0]
    path = write_clip(tmp_path / "a.mp4", [30 * n for n in range(7)], times=times)
    with Video.open(path) as video:
        assert [one.time for one in video.at(times)] == pytest.approx(times, abs=1e-9)
        assert [one.time for one in video.at([0.039, 0.499, 2.749, 8.999])] == pytest.approx([0.0, 0.04, 0.501, 2.8])
        assert greys_of([one.image for one in video.at([0.5, 0.501])]) == pytest.approx([60, 90], abs=2)


def test_asked_order_and_repeats_are_kept(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    with Video.open(path) as video:
        frames = video.at([1.5, 0.2, 1.5, 0.25, 0.0])
        assert greys_of([one.image for one in frames]) == pytest.approx([150, 20, 150, 20, 0], abs=2)
        assert frames[0] is frames[2] and frames[1] is frames[3]
        assert video.at([]) == []
        assert video.at(np.array([0.3]))[0].time == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.ts", "a.mp4"])
def test_a_clock_that_begins_late_makes_no_video_longer(tmp_path, name):
    codec = {"codec": "libvpx"} if name == "a.webm" else {}
    with Video.open(write_clip(tmp_path / name, [10 * n for n in range(20)], start=1000, **codec)) as video:
        assert video.duration == pytest.approx(2.0, abs=0.11)
        frames = video.spread(4)
        assert [one.time for one in frames] == pytest.approx([0.2, 0.7, 1.2, 1.7], abs=0.11)
        assert greys_of([one.image for one in frames]) == pytest.approx([20, 70, 120, 170], abs=12)
        assert not video.cut_off


def test_facts_of_a_video(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [0] * 20, rotation=90)
    with Video.open(path) as video:
        assert video.duration == pytest.approx(2.0) and video.rate == pytest.approx(10.0)
        assert video.size == (16, 32) and video.rotation == 90
        assert video.corrupt == 0 and not video.cut_off


# Points move to (a x + c y, b x + d y), y pointing down; the four corners tell where they went.
@pytest.mark.parametrize(
    ("matrix", "wanted", "degrees"),
    [
        ((1, 0, 0, 1), lambda pixels: pixels, 0),
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1), 90),
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2), 180),
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, 3), 270),
        ((-1, 0, 0, 1), np.fliplr, 180),
        ((1, 0, 0, -1), np.flipud, 0),
        ((0, 1, 1, 0), lambda pixels: pixels.transpose(1, 0, 2), 270),
        ((0, -1, -1, 0), lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2), 90),
    ],
)
def test_frames_are_upright(tmp_path, matrix, wanted, degrees):
    corners = np.zeros((3, 16, 32, 3), dtype=np.uint8)
    corners[:, :8, 16:], corners[:, 8:, :16], corners[:, 8:, 16:] = 80, 160, 240
    path = write_clip(tmp_path / "a.mp4", corners, matrix=matrix)
    with Video.open(path) as video:
        image = np.asarray(video.at([0.1])[0].image)
        assert video.rotation == degrees
        assert image.shape[1::-1] == video.size
    assert np.abs(image.astype(int) - wanted(corners[0]).astype(int)).max() <= 2


def test_rotation_as_pyav_writes_it_is_counter_clockwise(tmp_path):
    corners = np.zeros((3, 16, 32, 3), dtype=np.uint8)
    corners[:, :8, 16:] = 240
    path = write_clip(tmp_path / "a.mp4", corners, rotation=90)
    with Video.open(path) as video:
        image = np.asarray(video.at([0.1])[0].image).astype(int)
    assert np.abs(image - np.rot90(corners[0]).astype(int)).max() <= 2


@pytest.mark.parametrize("most", [512, 511, 128, 100, 7, 1])
def test_frames_keep_within_the_pixels_and_their_aspect_ratio(tmp_path, most):
    path = write_clip(tmp_path / "a.mp4", [100] * 5, rotation=90)
    with Video.open(path, max_pixels=most) as video:
        width, height = video.at([0.2])[0].image.size
        assert (width, height) == video.size
    assert width * height <= most
    if most >= 100:
        assert width * height > 0.8 * most and height / width == pytest.approx(2, rel=0.15)


def test_small_frames_are_never_scaled_up(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [100] * 5)
    with Video.open(path, max_pixels=10**6) as video:
        assert video.at([0.2])[0].image.size == (32, 16)


def test_spread_gives_the_middles_of_equal_pieces(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)], bframes=2)
    with Video.open(path) as video:
        assert [one.time for one in video.spread(4)] == pytest.approx([0.2, 0.7, 1.2, 1.7])
        assert [one.time for one in video.spread(2, 1.0, 1.4)] == pytest.approx([1.1, 1.3])
        assert [one.time for one in video.spread(2, 1.0, 99.0)] == pytest.approx([1.2, 1.7])


def test_a_video_of_fewer_frames_gives_each_once(tmp_path):
    even = write_clip(tmp_path / "even.mp4", [0, 100, 200])
    # The second frame is shown for 10 ms: no middle of eight pieces falls on it.
    uneven = write_clip(tmp_path / "uneven.mp4", [0, 100, 200], times=[0.0, 0.03, 0.04])
    for path in (even, uneven):
        with Video.open(path) as video:
            for count in (3, 4, 8, 200):
                assert greys_of([one.image for one in video.spread(count)]) == pytest.approx([0, 100, 200], abs=2)
    with Video.open(even) as video:
        assert [one.time for one in video.spread(9, 0.1, 0.2)] == pytest.approx([0.1])
        assert [one.time for one in video.spread(9, 0.15, 0.25)] == pytest.approx([0.1, 0.2])


def test_frames_held_for_long_are_not_given_twice(tmp_path):
    times = [0.0, *(8 + n / 10 for n in range(20))]
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(21)], times=times)
    with Video.open(path) as video:
        found = [one.time for one in video.spread(10)]
    assert found == pytest.approx([0.0, 8.5, 9.5]) and len(set(found)) == len(found)


def test_every_goes_on_from_where_it_was_whatever_is_read_between(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    with Video.open(path) as video:
        found = []
        for frame in video.every(0.45):
            found.append(frame.time)
            video.at([1.9, 0.0])
        assert found == pytest.approx([0.0, 0.4, 0.9, 1.3, 1.8])
        assert all(isinstance(one, Frame) for one in video.every(10.0))


def test_progress_is_told_after_each_frame(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    told = []
    with Video.open(path) as video:
        video.spread(4, progress=lambda done, total: told.append((done, total)))
        video.at([0.1, 0.1], lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]


class Counted(decoding.Decoder):
    """A decoder that counts its frames."""

    decoded = 0

    def _next(self):
        found = super()._next()
        self.decoded += found is not None
        return found


def decoded_for(path, times, monkeypatch):
    monkeypatch.setattr("vlm_budget.video.frames.reader.Decoder", Counted)
    with Video.open(path) as video:
        video.at(times)
        return video._decoder.decoded


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_one_key_frame_for_the_whole_video_is_decoded_at_most_twice(tmp_path, monkeypatch, suffix):
    path = write_clip(tmp_path / f"a.{suffix}", [n % 250 for n in range(400)], rate=5, gop=1000)
    # Thirteen jumps to the start would decode 2,600 frames.
    assert decoded_for(path, [6.0 * n for n in range(1, 14)], monkeypatch) < 800


def test_what_lies_between_far_key_frames_is_left_out(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [n % 250 for n in range(1000)], rate=5, gop=10)
    assert decoded_for(path, [20.0 * n + 0.1 for n in range(10)], monkeypatch) < 10 * 12


def test_close_key_frames_are_jumped_between_once_they_are_seen_to_be_close(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mov", [n % 250 for n in range(300)], codec="mjpeg")
    # One frame a second of ten: of 300 frames 30 are wanted.
    assert decoded_for(path, [float(n) for n in range(30)], monkeypatch) < 100


def test_frames_that_no_other_refers_to_are_left_out_far_before_the_wanted_one(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [n % 250 for n in range(400)], gop=1000, bframes=2)
    # Of 350 frames up to the wanted one and 2 or 3 behind it, one in three is such.
    assert decoded_for(path, [35.0], monkeypatch) < 250


def test_a_frame_that_no_other_refers_to_and_that_is_held_for_long_is_shown(tmp_path, monkeypatch):
    # Every frame is held for longer than _NEAR at some wanted times.
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)], times=[2.0 * n for n in range(20)], bframes=3)
    with Video.open(path) as video:
        for n in range(20):
            assert video.at([2.0 * n + 1.9])[0].time == pytest.approx(2.0 * n)
        assert greys_of([one.image for one in video.at([2.0 * n + 0.1 for n in range(20)])]) == pytest.approx(
            [10 * n for n in range(20)], abs=2
        )


MEMORY = """
import re, sys
from vlm_budget.video.frames import Video
import av, PIL.Image, numpy
from av.video.reformatter import VideoReformatter

def peak():  # of this process alone: what getrusage tells includes the process that started it
    return int(re.search("VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read()).group(1)) / 1024

with Video.open(sys.argv[1], max_pixels=64 * 36) as video:
    video.spread(4)
    before = peak()
    times = [frame.time for frame in video.every(0.1)]
    print(len(times), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells a process's memory on Linux only")
def test_reading_on_does_not_gather_frames_in_memory(tmp_path):
    # 200 frames of 1280 x 720 are 553 MB as RGB, and half of that as they are decoded.
    pixels = np.full((720, 1280, 3), 90, dtype=np.uint8)
    path = write_clip(tmp_path / "a.mp4", np.broadcast_to(pixels, (200, 720, 1280, 3)), gop=50)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    count, grown = done.stdout.split()
    assert int(count) == 200 and float(grown) < 100
