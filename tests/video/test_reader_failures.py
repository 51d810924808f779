from __future__ import annotations

import builtins
import math
import sys

import numpy as np
import pytest
from PIL import Image

from clips import cut, damage, greys_of, write_clip, write_sound
from vlm_budget.errors import ImageError, MissingExtraError, OptionError, VideoError
from vlm_budget.video.frames import Video, decoding

pytest.importorskip("av", reason="PyAV is not installed (the video extra)")


def test_packets_that_cannot_be_decoded_are_left_out_and_counted(tmp_path):
    path = damage(write_clip(tmp_path / "a.mov", [10 * n for n in range(20)], codec="mjpeg"), [5, 6, 12])
    with Video.open(path) as video:
        frames = video.at([n / 10 for n in range(20)])
        assert video.corrupt == 3
    held = [n - {5: 1, 6: 2, 12: 1}.get(n, 0) for n in range(20)]  # the frame before stays
    assert [one.time for one in frames] == pytest.approx([n / 10 for n in held])
    with Video.open(path, strict=True) as video, pytest.raises(VideoError, match="damaged"):
        video.at([0.5])


def test_a_lost_packet_of_h264_is_counted_once_however_often_it_is_met(tmp_path):
    path = damage(write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)], gop=5), [7])
    with Video.open(path) as video:
        for _ in range(3):
            assert video.at([0.3])[0].time == pytest.approx(0.3)
            assert video.at([1.9])[0].time == pytest.approx(1.9)
            video.at([n / 10 for n in range(20)])
        assert video.corrupt == 1
        assert all(one.time != pytest.approx(0.7) for one in video.every(0.1))


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mov", "mjpeg"), ("a.mkv", "libx264")])
def test_a_video_of_nothing_but_corrupt_frames_is_an_error(tmp_path, name, codec):
    path = damage(write_clip(tmp_path / name, [10 * n for n in range(20)], codec=codec))
    with pytest.raises(VideoError, match="no frame that can be decoded"):
        Video.open(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.mp4", {"options": {"movflags": "faststart"}}), ("a.mkv", {}), ("a.ts", {}), ("a.avi", {"codec": "mpeg4"})],
)
def test_a_truncated_file_is_read_as_far_as_it_goes(tmp_path, name, options):
    noise = np.random.default_rng(0).integers(0, 255, (200, 16, 32, 3), dtype=np.uint8)
    path = write_clip(tmp_path / name, noise, gop=10, **options)
    cut(path, 0.5)
    with Video.open(path) as video:
        begins = [one.time for one in video.every(0.1)]
        assert 7 < begins[-1] < 13 and begins == sorted(begins)
        if video.duration > 19:  # transport streams tell nothing: theirs is what is left
            assert video.at([15.0])[0].time == pytest.approx(begins[-1], abs=0.11)
            assert video.cut_off
            assert video.at([18.0, 3.0])[1].time == pytest.approx(3.0)
            found = [one.time for one in video.spread(10)]
            assert found == sorted(set(found)) and len(found) < 10
            assert [one.time for one in video.every(0.1)] == begins
    if name != "a.ts":
        with Video.open(path, strict=True) as video, pytest.raises(VideoError, match="cut off|damaged"):
            video.spread(10)


@pytest.mark.parametrize("share", [0.5, 0.05, 0.001])
def test_a_truncated_header_is_an_error(tmp_path, share):
    path = cut(write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)]), share)  # its header stands at its end
    with pytest.raises(VideoError, match="damaged"):
        Video.open(path)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "folder").mkdir()
    write_sound(tmp_path / "sound.mp4")
    Image.new("RGB", (4, 4)).save(tmp_path / "list.mp4", format="JPEG")
    cases = {"gone.mp4": "there is no", "empty.mp4": "0 bytes", "text.mp4": "damaged", "folder": "is a folder"}
    cases |= {"sound.mp4": "no video stream", "\0.mp4": "there is no"}
    for name, message in cases.items():
        with pytest.raises(VideoError, match=message) as caught:
            Video.open(tmp_path / name)
        assert isinstance(caught.value, ImageError)
        assert name == "\0.mp4" or name in str(caught.value)
    with pytest.raises(VideoError, match="'clip 7' is empty"):
        Video.open(tmp_path / "empty.mp4", name="clip 7")


def test_a_stream_without_a_clock_is_an_error(tmp_path):
    path = write_clip(tmp_path / "a.h264", [10 * n for n in range(20)])
    with pytest.raises(VideoError, match="does not say when its frames are shown.*ffmpeg"):
        Video.open(path)


def test_a_video_that_tells_neither_rate_nor_duration_is_timed_by_its_packets(tmp_path):
    path = tmp_path / "live.mkv"  # as a stream that is written without going back
    write_clip(path, [10 * n for n in range(20)], options={"live": "1"})
    with Video.open(path) as video:
        assert video.duration == pytest.approx(2.0, abs=0.11)
        assert greys_of([one.image for one in video.spread(4)]) == pytest.approx([20, 70, 120, 170], abs=2)


def test_a_rate_of_zero_does_not_matter(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    before = decoding.Decoder._prepare

    def unrated(self):
        before(self)
        self.rate = 0.0

    monkeypatch.setattr(decoding.Decoder, "_prepare", unrated)
    with Video.open(path) as video:
        assert video.rate == 0
        assert [one.time for one in video.at([2.0, 0.35])] == pytest.approx([1.9, 0.3])


@pytest.mark.parametrize("time", [-0.1, math.nan, math.inf, "1", None, True, 2.6, 1e9, 1e300])
def test_times_that_no_video_shows(tmp_path, time):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    with Video.open(path) as video:
        with pytest.raises(VideoError, match="a.mp4"):
            video.at([0.5, time])
        assert video.at([2.0])[0].time == pytest.approx(1.9)  # its end shows its last frame
        with pytest.raises(VideoError, match="sequence"):
            video.at(0.5)


def test_parts_counts_and_caps_that_make_no_sense(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    with Video.open(path, max_frames=8) as video:
        for start, end in ((1.0, 0.5), (0.5, 0.5), (-1.0, None), (math.nan, None), (0.0, math.inf), (5.0, None)):
            with pytest.raises(VideoError, match="a.mp4"):
                video.spread(2, start, end)
        for count in (0, -1, 1.5, True, "4", 9):
            with pytest.raises(OptionError):
                video.spread(count)
        with pytest.raises(OptionError, match="more than one call may hold"):
            video.at([0.1] * 9)
        for step in (0, -1, math.nan, math.inf, True, "1", None):
            with pytest.raises(OptionError, match="step"):
                video.every(step)
    for options in ({"max_pixels": 0}, {"max_pixels": 1.5}, {"max_frames": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            Video.open(path, **options)


def test_a_closed_video_says_so(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [10 * n for n in range(20)])
    with Video.open(path) as video:
        frames = video.every(0.1)
        next(frames)
    for read in (lambda: video.at([0.1]), lambda: video.spread(2), lambda: next(frames)):
        with pytest.raises(VideoError, match="closed"):
            read()
    video.close()


def test_frames_as_large_as_a_decompression_bomb_are_refused(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [0] * 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 16 - 1)
    with pytest.raises(VideoError, match="too large: 32 x 16"):
        Video.open(path)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", [0] * 10)
    found = builtins.__import__

    def fails(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return found(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "av")
    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(MissingExtraError, match=r"vlm-budget\[video\]"):
        Video.open(path)
