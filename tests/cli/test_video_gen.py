"""``vlm-budget video-gen``: a clip dense and sparse side by side."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="video models need diffusers")

from .conftest import Cli

CHEAP = ("--steps", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow transformer with random weights, as training would write it."""
    from diffusers import WanTransformer3DModel

    from vlm_budget.eval.video_gen.modeling import CONFIG

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("video") / "tiny"
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64}
    WanTransformer3DModel(**{**CONFIG, **small}).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.mp4"])
def test_the_demo_draws_both_clips_and_tells_density_quality_and_time(cli: Cli, model: Path, name: str) -> None:
    done = cli("video-gen", "demo", "--model", model, "--out", name, "--warmup", 0.5, *CHEAP)
    assert done.exit_code == 0, done.output
    for told in ("density of the run", "PSNR against dense", "SSIM against dense", "seconds, as a ratio", "1.00x"):
        assert told in done.output
    assert Path(name).stat().st_size > 1000


def test_the_demo_tells_the_same_as_json(cli: Cli, model: Path) -> None:
    done = cli("video-gen", "demo", "--model", model, "--density", 0.4, "--warmup", 0.5, "--json", *CHEAP)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["report"]["sparse_density"] <= 0.4
    assert told["report"]["density"] == pytest.approx((1 + told["report"]["sparse_density"]) / 2)
    assert told["quality"]["mean_psnr"] > 0
    assert Path(told["picture"]).is_file()


def test_a_field_of_the_method_can_be_given(cli: Cli, model: Path) -> None:
    fields = ("-o", "extent=[2, 5, 5]", "-o", "correction=true")
    done = cli("video-gen", "demo", "--model", model, "-m", "block_topk", *fields, "--json", *CHEAP)
    assert done.exit_code == 0, done.output
    assert "extent=(2, 5, 5), correction=True" in json.loads(done.stdout)["report"]["method"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a dog"), "cannot read the prompt 'a dog'"),
        (("--method", "svg3"), "Did you mean 'svg2'"),
        (("--density", "2"), "density must be a number in (0, 1], got 2.0"),
        (("--density", "0.3", "-o", "top_p=0.9"), "top_p or density"),
        (("-o", "colour=red"), "expected KEY=VALUE with a KEY of svg2"),
        (("-o", "top_p"), "expected KEY=VALUE"),
        (("--out", "clip.txt"), "expected a file that ends in"),
        (("--out", "gone/clip.gif"), "there is no folder"),
        (("--model", "nano-vidio"), "Did you mean 'nano-video'"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback_and_leaves_no_file(
    cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    done = cli("video-gen", "demo", *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(Path.cwd().iterdir()) == []


def test_the_list_names_every_method_and_model(cli: Cli) -> None:
    from vlm_budget.registry import VIDEO_METHODS, VIDEO_MODELS

    done = cli("video-gen", "list")
    assert done.exit_code == 0, done.output
    told = json.loads(cli("video-gen", "list", "--json").stdout)
    assert [row["name"] for row in told["methods"]] == list(VIDEO_METHODS)
    assert [row["name"] for row in told["models"]] == list(VIDEO_MODELS)
    for row in [*told["methods"], *told["models"]]:
        assert row["name"] in done.output
        assert row["what"]
