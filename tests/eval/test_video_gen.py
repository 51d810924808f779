"""The small video model's pipeline, its record and its tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="video models need diffusers")

from diffusers import WanTransformer3DModel

import vlm_budget
from vlm_budget.errors import ModelLoadError, OptionError, UnknownNameError
from vlm_budget.eval import video_gen
from vlm_budget.eval.video_gen import card, clips, curves, modeling, pictures, report
from vlm_budget.eval.video_gen.pipeline import NanoVideoPipeline, make_pipeline
from vlm_budget.eval.video_gen.settings import PAIRS, RECORD, Setting, settings
from vlm_budget.eval.video_gen.spread import of_clips, of_pairs
from vlm_budget.registry import VIDEO_METHODS
from vlm_budget.video.dit.call import Grid

PROMPTS = [
    "a red disc moving up and a blue square moving left on grey",
    "a cyan triangle moving down-right and a green disc moving up on dark",
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipe() -> NanoVideoPipeline:
    """The architecture with two narrow layers and random weights."""
    torch.manual_seed(0)
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64}
    return make_pipeline(WanTransformer3DModel(**{**modeling.CONFIG, **small}))


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_words_become_a_prompt_and_are_read_back() -> None:
    words = clips.draw_words(20, torch.Generator().manual_seed(0))
    for own in words:
        assert torch.equal(clips.read_prompt(clips.prompt_of(own)), own)
    with pytest.raises(OptionError, match="cannot read the prompt 'a dog'"):
        clips.read_prompt("a dog")


def test_a_clip_is_the_same_in_any_batch_and_of_any_output_type(pipe: NanoVideoPipeline) -> None:
    both = pipe(PROMPTS, num_inference_steps=2, generator=noise(1, 2)).frames
    one = pipe(PROMPTS[1], num_inference_steps=2, generator=noise(2)[0]).frames
    assert both.shape == (2, 12, 40, 40, 3)
    assert 0 <= both.min() <= both.max() <= 1
    torch.testing.assert_close(torch.from_numpy(both[1]), torch.from_numpy(one[0]), atol=1e-5, rtol=0)
    frames = pipe(PROMPTS, num_inference_steps=2, generator=noise(1, 2), output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(frames.permute(0, 1, 3, 4, 2), torch.from_numpy(both))
    latents = pipe(PROMPTS, num_inference_steps=2, generator=noise(1, 2), output_type="latent").frames
    torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1).transpose(1, 2), frames)


def test_guidance_goes_from_without_words_to_with_them(pipe: NanoVideoPipeline) -> None:
    start = torch.randn(1, 3, 4, 8, 8, generator=noise(0)[0])
    size = {"num_frames": 4, "height": 8, "width": 8, "num_inference_steps": 1, "output_type": "latent"}

    def run(scale: float) -> torch.Tensor:
        return pipe(PROMPTS[0], latents=start, guidance_scale=scale, **size).frames

    text = clips.embed(clips.read_prompt(PROMPTS[0])[None])
    pipe.scheduler.set_timesteps(1)
    with torch.no_grad():
        time = pipe.scheduler.timesteps.expand(1)
        told, untold = (pipe.transformer(start, time, words, return_dict=False)[0] for words in (text, 0 * text))
    torch.testing.assert_close(start - run(1.0), told)
    torch.testing.assert_close(start - run(3.0), untold + 3 * (told - untold))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "at least one prompt"),
        ({"height": 42}, "multiples of 4"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"output_type": "gif"}, "output_type"),
        ({"latents": torch.zeros(1, 3, 12, 40, 44)}, "latents must be"),
    ],
)
def test_what_cannot_be_made_is_refused(pipe: NanoVideoPipeline, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pipe(**{"prompt": PROMPTS[0], **wrong})


def test_models_are_found_by_name_or_folder(pipe: NanoVideoPipeline, tmp_path: Path) -> None:
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    loaded = video_gen.load(str(tmp_path))
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], value)
    with pytest.raises(UnknownNameError, match="Did you mean 'nano-video'"):
        video_gen.load("nano-vide")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="no video model"):
        video_gen.load(str(tmp_path / "empty"))


def test_every_setting_can_be_configured_and_every_mask_has_a_curve() -> None:
    wanted = settings()
    assert len({setting.key for setting in wanted}) == len(wanted)
    for setting in wanted:
        method = VIDEO_METHODS.get(setting.method)(**setting.options)
        assert method.settled, setting
        if setting.nominal is not None:
            assert method.promised(Grid(12, 10, 10)) == setting.nominal
    assert {setting.method for setting in wanted} >= set(VIDEO_METHODS) - {"dense"}
    names = {setting.curve for setting in wanted}
    assert {curve for pair in PAIRS for curve in pair} <= names


def test_spread_and_pairs_are_their_formulas() -> None:
    found = of_clips((30.0, 34.0, math.inf))
    assert (found["mean"], found["min"], found["max"]) == (32.0, 30.0, 34.0)
    assert found["sd"] == pytest.approx(math.sqrt(8), abs=1e-4)
    assert found["clips"][2] is None
    pairs = of_pairs((3.0, 5.0, 1.0, None), (1.0, 2.0, 2.0, 0.0))
    assert pairs["mean"] == pytest.approx(4 / 3, abs=1e-4)
    assert pairs["above"] == 2
    assert pairs["se"] == pytest.approx(pairs["sd"] / math.sqrt(3), abs=1e-4)


@pytest.fixture(scope="module")
def recorded(pipe: NanoVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Two settings of two clips, measured in two starts."""
    folder = tmp_path_factory.mktemp("sweep")
    pipe.transformer.save_pretrained(folder / "model" / "transformer")
    three = [Setting("svg2, corrected", "svg2", {"density": 0.3}, 0.3), Setting("svg1", "svg1", {"density": 0.3}, 0.3)]
    pair = (("svg2, corrected", "svg1"),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "settings", lambda: three)
        patch.setattr(curves, "PAIRS", pair)
        where = (str(folder / "model"), folder / "record.json", folder / "journal.jsonl")
        curves.sweep(*where, minutes=9, clips=2, steps=2, only="svg1")
        first = json.loads((folder / "record.json").read_text())
        assert [row["curve"] for row in first["rows"]] == ["svg1"]
        lines = (folder / "journal.jsonl").read_text()
        found = curves.sweep(*where, minutes=9, clips=2, steps=2, backwards=True)
        assert (folder / "journal.jsonl").read_text().startswith(lines), "what was measured is not measured again"
        assert len((folder / "journal.jsonl").read_text().splitlines()) == 3
    return json.loads(json.dumps(found)), folder


def test_a_sweep_goes_on_where_it_stopped_and_pairs_its_clips(recorded: tuple[dict[str, Any], Path]) -> None:
    data, _ = recorded
    assert [row["curve"] for row in data["rows"]] == ["svg2, corrected", "svg1"]
    assert all(0 < row["density"] <= 0.3 for row in data["rows"])
    (pair,) = data["pairs"]
    ours, other = (row["psnr"]["clips"] for row in data["rows"])
    assert pair["psnr"]["clips"] == pytest.approx([a - b for a, b in zip(ours, other, strict=True)], abs=1e-4)
    assert (
        data["scales"]["half of the steps"]["psnr"]["mean"]
        > data["scales"]["another noise, same words"]["psnr"]["mean"]
    )


def test_the_record_becomes_tables_and_a_picture(recorded: tuple[dict[str, Any], Path]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs it")
    data, folder = recorded
    page = folder / "page.md"
    page.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in report.SECTIONS))
    report.main(["--record", str(folder / "record.json"), "--page", str(page), "--picture", str(folder / "p.svg")])
    text = page.read_text()
    assert f"{data['rows'][0]['psnr']['mean']:.2f}" in text
    assert "another noise, same words" in text
    assert "| svg2, corrected | svg1 | 30% |" in text
    assert (folder / "p.svg").read_text().count("svg2, corrected") >= 1


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from PIL import Image

    dense = torch.rand(5, 40, 40, 3, generator=noise(0)[0]).numpy()
    frames = pictures.side_by_side(dense, dense**2, ("dense", "sparse"))
    pictures.save(tmp_path / "clip.gif", frames)
    with Image.open(tmp_path / "clip.gif") as moving:
        assert moving.n_frames == 5
    pictures.save(tmp_path / "clip.png", frames)
    pictures.save(tmp_path / "clip.mp4", frames)
    import av

    with av.open(str(tmp_path / "clip.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 5
    before = (tmp_path / "clip.png").read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OptionError, match="the disk is full"):
            pictures.save(tmp_path / "clip.png", frames)
    assert (tmp_path / "clip.png").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.gif", "clip.mp4", "clip.png"]


def test_the_card_tells_recipe_sharpness_and_errors() -> None:
    record = {
        "parameters": 1_300_000,
        "bytes": 2_600_000,
        "progress": {"steps": 4000, "clips": 40_000, "seconds": 3600.0},
        "stages": [{"until": 0.15, "frames": 6, "side": 24, "batch": 12}],
        "note": "Something was different.",
        "keys_needed": {"0.9": 0.157, "0.95": 0.2},
        "held_out_loss": {"0.9": 0.05, "0.2": 0.2},
    }
    text = card.render(record)
    for told in ("2.6 MB", "4,000 steps", "60 minutes", "| 15% of the time | 6 | 24 x 24 | 12 |", "15.7%", "0.0500"):
        assert told in text, told
    assert "Something was different." in text


def test_the_shipped_model_is_small_and_its_attention_is_sharp() -> None:
    from vlm_budget.eval.video_gen.sharpness import keys_needed

    size = sum(file.stat().st_size for file in video_gen.folder().rglob("*") if file.is_file())
    assert size < 16e6
    assert keys_needed(video_gen.load().transformer, clips=1) <= 0.25


def test_correction_and_clusters_keep_a_shipped_clip_better() -> None:
    """Few steps of one clip: the whole story is the recorded sweep."""
    pipe = video_gen.load()
    run = {"prompt": PROMPTS[0], "num_inference_steps": 8, "output_type": "pt"}
    dense = pipe(**run, generator=noise(3)[0]).frames
    from vlm_budget.video.dit.quality import quality_of

    found = {}
    for name, method, options in (
        ("corrected", "svg2", {"correction": True}),
        ("plain", "svg2", {"correction": False}),
        ("random", "block_topk", {"choose": "random", "extent": (3, 2, 2)}),
    ):
        with vlm_budget.patch(pipe, method, force=True, density=0.25, warmup=0, dense_layers=0, **options) as handle:
            found[name] = quality_of(pipe(**run, generator=noise(3)[0]).frames, dense).mean_psnr
            assert handle.report().density <= 0.25
    assert found["corrected"] > found["plain"] > found["random"] + 2
    assert torch.equal(pipe(**run, generator=noise(3)[0]).frames, dense)


def test_the_record_holds_what_is_claimed_of_correction_and_clusters() -> None:
    data = json.loads((ROOT / RECORD).read_text())
    assert len(data["prompts"]) >= 6
    best = [row for row in data["rows"] if row["curve"] == "svg2, corrected" and row["density"] <= 0.3]
    assert max(row["psnr"]["mean"] for row in best) >= 30
    pairs = {(pair["curve"], pair["minus"], pair["nominal"]): pair["psnr"] for pair in data["pairs"]}
    for other in ("svg2", "block_topk, corrected"):
        difference = pairs["svg2, corrected", other, 0.3]
        assert difference["mean"] > difference["sd"] > 0, "by more than the spread over the clips"


def test_the_page_shows_what_was_recorded() -> None:
    data = json.loads((ROOT / RECORD).read_text())
    page = (ROOT / "docs" / "video_generation.md").read_text()
    for name, section in report.SECTIONS.items():
        assert section(data).strip() in page, f"run `make docs`: {name}"
