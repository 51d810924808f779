"""Reading 32 frames spread over an hour of video: does the reader cost more than a bare PyAV loop, and how much memory?

The file is written first: one minute of 1280 x 720 H.264 at 25 frames a second, with a key frame every ten seconds and
B-frames, whose packets are copied sixty times behind each other. It is deleted at the end.

``bare`` is what one writes without the reader: open, seek to each time, decode until it has passed, convert. Both run
in turn, round after round, and must give the same pixels and time stamps, or nothing is reported. Memory is the growth
of the highest resident size of a process of its own that reads once, libraries imported before.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from vlm_budget.eval.record import environment, write_json
from vlm_budget.video.frames import Video, spread_times

WIDTH, HEIGHT, RATE = 1280, 720, 25
Read = tuple[list[Image.Image], list[float]]


def write_minute(path: Path, seconds: int = 60) -> None:
    """A gradient that drifts, and a bright square that runs across it."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    slope = ((rows + columns) // 12).astype(np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "28", "bf": "2", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", 10 * RATE
        planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, dtype=np.uint8)
        for number in range(seconds * RATE):
            planes[:HEIGHT] = 40 + np.roll(slope, number, axis=1) // 2
            left, top = number * 7 % (WIDTH - 64), number * 3 % (HEIGHT - 64)
            planes[top : top + 64, left : left + 64] = 230
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat(source: Path, path: Path, times: int, seconds: int = 60) -> None:
    """Copy the packets of a file behind each other, nothing encoded anew."""
    with av.open(str(path), "w") as target:
        stream = None
        for turn in range(times):
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                shift = int(turn * seconds / video.time_base)
                for packet in container.demux(video):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        target.mux(packet)


def bare(path: Path, count: int) -> Read:
    """A seek and a decoding loop for each time."""
    images, times = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for wanted in spread_times(float(stream.duration * stream.time_base), count):
            container.seek(int(wanted / stream.time_base), stream=stream)
            shown = None
            for frame in container.decode(stream):
                if frame.time > wanted:
                    break
                shown = frame
            images.append(shown.to_image())
            times.append(shown.time)
    return images, times


def ours(path: Path, count: int) -> Read:
    """The reader."""
    with Video.open(path) as video:
        frames = video.spread(count)
    return [frame.image for frame in frames], [frame.time for frame in frames]


FORMS: dict[str, Callable[[Path, int], Read]] = {"ours": ours, "bare": bare}


def check(count: int, own: Read, other: Read) -> None:
    """Both forms gave the same.

    Raises:
        SystemExit: They did not.
    """
    same = len(own[0]) == len(other[0]) == count and np.allclose(own[1], other[1], rtol=0, atol=1e-9)
    if not same or any(one.tobytes() != two.tobytes() for one, two in zip(own[0], other[0], strict=True)):
        raise SystemExit("the reader and the bare loop give different frames: nothing is reported")


def peak_mb() -> float:
    """The highest resident size of this process so far, in MB; of it alone, which ``getrusage`` does not tell."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+([0-9]+) kB", status)[0]) * 1024 / 1e6


def memory(path: Path, count: int, form: str) -> float:
    """By how many MB a fresh process grows that reads once."""
    flags = ["--grown", form, "--count", str(count), "--file", str(path)]
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure(path: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of both forms, in turn, by the clock and of the processor, and their memory."""
    times: dict[str, dict[str, list[float]]] = {"seconds": {}, "cpu_seconds": {}}
    for number in range(rounds):
        read = {}
        for form in sorted(FORMS, reverse=bool(number % 2)):
            gc.collect()
            start = time.perf_counter(), time.process_time()
            read[form] = FORMS[form](path, count)
            for name, began, now in zip(times, start, (time.perf_counter(), time.process_time()), strict=True):
                times[name].setdefault(form, []).append(now - began)
        check(count, read["ours"], read["bare"])
        print(f"round {number + 1}: the reader and the bare loop give the same frames", flush=True)
    found: dict[str, Any] = {}
    for name, forms in times.items():
        ratios = [own / other for own, other in zip(forms["ours"], forms["bare"], strict=True)]
        found[name] = {form: {"median": statistics.median(of), "all": of} for form, of in forms.items()}
        found[name]["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {
        **found,
        "grown_mb": {form: memory(path, count, form) for form in FORMS},
        "pictures_mb": count * WIDTH * HEIGHT * 3 / 1e6,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--grown", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.grown:
        before = peak_mb()
        FORMS[arguments.grown](arguments.file, arguments.count)
        print(json.dumps(peak_mb() - before))
        return
    with tempfile.TemporaryDirectory() as folder:
        minute, path = Path(folder) / "minute.mp4", Path(folder) / "video.mp4"
        write_minute(minute)
        repeat(minute, path, arguments.minutes)
        megabytes = path.stat().st_size / 1e6
        print(f"{arguments.minutes} minutes are written: {megabytes:.0f} MB", flush=True)
        result = measure(path, arguments.count, arguments.rounds)
    ratios = [result[name]["ratio"]["median"] for name in ("seconds", "cpu_seconds")]
    grown = result["grown_mb"]["ours"]
    print(f"ratio {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of the processor; grown by {grown:.0f} MB", flush=True)
    write_json(
        arguments.out / "video_reading.json",
        {
            "environment": environment("cpu", "uint8"),
            "av": version("av"),
            "minutes": arguments.minutes,
            "width": WIDTH,
            "height": HEIGHT,
            "rate": RATE,
            "codec": "h264",
            "file_mb": megabytes,
            "frames": arguments.count,
            "rounds": arguments.rounds,
            **result,
        },
    )


if __name__ == "__main__":
    main()
