"""What every mask does to the clips of the small video model: ``python -m vlm_budget.eval.video_gen.curves``.

Clips of held-out words and noise are made dense, and then with each setting from the same noise. A line of JSON per
setting goes into a journal as soon as it is done, so that a second start goes on; the record is written from the
journal. A second process with ``--backwards`` shares work and journal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlm_budget.eval.record import environment, write_json

from . import load
from .clips import Size, draw_words, prompt_of
from .pipeline import STEPS, NanoVideoPipeline
from .settings import NO_WARMUP, PAIRS, RECORD, Setting, settings
from .sharpness import keys_needed
from .spread import of_clips, of_pairs

JOURNAL = Path("runs/video_gen_quality.jsonl")
WORDS_SEED, NOISE_SEED = 20_260_101, 70_000


class Bench:
    """Held-out clips of a model, dense and under settings.

    Args:
        pipe: The pipeline.
        clips: How many clips.
        steps: Denoising steps.
    """

    def __init__(self, pipe: NanoVideoPipeline, clips: int = 8, steps: int = STEPS) -> None:
        self.pipe, self.steps = pipe, steps
        words = draw_words(clips, torch.Generator().manual_seed(WORDS_SEED))
        self.prompts = [prompt_of(one) for one in words]
        began = time.perf_counter()
        self.dense = self.run()
        self.dense_seconds = time.perf_counter() - began

    def run(self, steps: int | None = None, noise_seed: int = NOISE_SEED) -> torch.Tensor:
        """Frames [B, F, 3, H, W] of all clips."""
        noise = [torch.Generator().manual_seed(noise_seed + clip) for clip in range(len(self.prompts))]
        found: Any = self.pipe(self.prompts, generator=noise, output_type="pt", num_inference_steps=steps or self.steps)
        frames: torch.Tensor = found.frames
        return frames

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Densities, PSNR and SSIM of every clip, error and recall of a setting."""
        from vlm_budget.video.dit.handle import patch_video

        options = {**NO_WARMUP, **setting.options}
        handle = patch_video(self.pipe, setting.method, force=True, **options)
        with handle:
            began = time.perf_counter()
            frames = self.run()
            seconds = time.perf_counter() - began
            report = handle.report()
        return {
            "curve": setting.curve,
            "key": setting.key,
            "method": setting.method,
            "options": options,
            "nominal": setting.nominal,
            "density": report.density,
            "sparse_density": report.sparse_density,
            "error": report.error,
            "recall": report.recall,
            "relative_seconds": seconds / self.dense_seconds,
            **self.against(frames),
        }

    def against(self, frames: torch.Tensor) -> dict[str, Any]:
        """PSNR and SSIM of frames beside the dense ones."""
        from vlm_budget.video.dit.quality import quality_of

        found = quality_of(frames, self.dense)
        return {"psnr": of_clips(found.psnr), "ssim": of_clips(found.ssim or ())}

    def scales(self) -> dict[str, Any]:
        """What other changes of a dense run do: the scale of PSNR on these clips."""
        half = self.against(self.run(steps=self.steps // 2))
        double = self.against(self.run(steps=self.steps * 2))
        other = self.against(self.run(noise_seed=NOISE_SEED + 1000))
        kept = self.pipe.transformer.state_dict()
        kept = {name: value.clone() for name, value in kept.items()}
        for value in self.pipe.transformer.parameters():
            value.data = value.data.bfloat16().float()
        rounded = self.against(self.run())
        self.pipe.transformer.load_state_dict(kept)
        return {
            "half of the steps": half,
            "twice the steps": double,
            "another noise, same words": other,
            "weights rounded to bfloat16": rounded,
        }


def record(bench: Bench, rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with paired differences."""
    wanted = settings()
    found = {row["key"]: row for row in rows}
    known = [{**found[one.key], "curve": one.curve} for one in wanted if one.key in found]
    return {
        "environment": environment(),
        **about,
        "steps": bench.steps,
        "prompts": bench.prompts,
        "words_seed": WORDS_SEED,
        "noise_seed": NOISE_SEED,
        "settings": len(wanted),
        "rows": known,
        "pairs": list(_pairs(known)),
    }


def _pairs(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Differences of PSNR, clip by clip, between curves at one nominal density."""
    base = {"svg2, corrected"}
    options = [row["curve"] for row in rows if row["curve"].startswith("svg2, corrected, ")]
    for ours, other in (*PAIRS, *((name, curve) for name in dict.fromkeys(options) for curve in base)):
        for a in rows:
            for b in rows:
                if a["curve"] == ours and b["curve"] == other and a["nominal"] == b["nominal"] is not None:
                    yield {
                        "curve": ours,
                        "minus": other,
                        "nominal": a["nominal"],
                        "densities": [a["density"], b["density"]],
                        "psnr": of_pairs(a["psnr"]["clips"], b["psnr"]["clips"]),
                    }


def fingerprint(pipe: NanoVideoPipeline, clips: int, steps: int) -> str:
    """What a journal's lines must share: the model, the clips and the steps."""
    digest = hashlib.sha256(f"{clips} {steps} {WORDS_SEED} {NOISE_SEED}".encode())
    for name, value in sorted(pipe.transformer.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def sweep(
    model: str,
    out: Path,
    journal: Path,
    minutes: float,
    clips: int = 8,
    steps: int = STEPS,
    only: str = "",
    backwards: bool = False,
) -> dict[str, Any] | None:
    """Measure what the journal lacks until the time is over, and write the record.

    Args:
        model: Name or folder of the model.
        out: The record.
        journal: Lines of earlier starts; those of another model, of other clips or steps do not count.
        minutes: After which no further setting is begun.
        clips: How many.
        steps: Denoising steps.
        only: Measure only settings with this in their curve's name.
        backwards: Begin with the last setting, for a second process that meets the first one in the middle.

    Returns:
        The record; None where the other process has not measured the scales yet.
    """
    began = time.monotonic()
    torch.set_num_threads(1)
    pipe = load(model)
    of = fingerprint(pipe, clips, steps)
    bench = Bench(pipe, clips, steps)
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not backwards and _read(journal, of)[0] is None:
        _append(journal, {"of": of, "about": _about(bench, model, of)})
    for setting in settings()[:: -1 if backwards else 1]:
        if setting.key in _read(journal, of)[1] or only not in setting.curve:  # another process may have been here
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        row = bench.measure(setting)
        _append(journal, {"of": of, "row": row})
        print(f"{row['density']:7.2%} {row['psnr']['mean']:6.2f} dB  {setting.curve}  {setting.key}", flush=True)
    about, rows = _read(journal, of)
    if about is None:
        return None
    found = record(bench, list(rows.values()), about)
    write_json(out, found)
    return found


def _about(bench: Bench, model: str, of: str) -> dict[str, Any]:
    transformer = bench.pipe.transformer
    return {
        "model": Path(model).name,
        "fingerprint": of,
        "parameters": sum(value.numel() for value in transformer.parameters()),
        "tokens": Size().tokens,
        "keys_needed": {str(mass): keys_needed(transformer, mass) for mass in (0.9, 0.95)},
        "scales": bench.scales(),
    }


def _append(journal: Path, line: dict[str, Any]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _read(journal: Path, of: str) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """What a journal says about a model, and its rows by key."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []
    lines = [line for line in lines if line["of"] == of]
    about = next((line["about"] for line in lines if "about" in line), None)
    return about, {line["row"]["key"]: line["row"] for line in lines if "row" in line}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano-video", help="its name, or a folder with transformer/")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    parser.add_argument("--minutes", type=float, default=30, help="after which no further setting is begun")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="only settings with this in their curve's name")
    parser.add_argument("--backwards", action="store_true", help="for a second process that shares the journal")
    arguments = parser.parse_args(argv)
    sweep(
        arguments.model,
        arguments.out,
        arguments.journal,
        arguments.minutes,
        arguments.clips,
        arguments.steps,
        arguments.only,
        arguments.backwards,
    )


if __name__ == "__main__":
    main()
