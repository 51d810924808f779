"""Bad input: a typed error, one line on stderr, exit code 1, nothing on stdout, no traceback unless asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_budget
from vlm_budget.cli.loading import family_of, load, pick_device, resolve
from vlm_budget.errors import ModelLoadError, OptionError, UnsupportedModelError

Cli = Callable[..., Any]

QUICK = ("--repeats", 1, "--max-new-tokens", 1)


def one_line_error(result: Any, message: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "0"), "budget must be above 0"),
        (("--budget", "-5"), "budget must be above 0"),
        (("--budget", "150%"), "a relative budget is a share in (0, 1]"),
        (("--budget", "nan"), "finite"),
        (("--budget", "a fifth"), "cannot read a budget from 'a fifth'"),
        (("--budget", "0.1% flops"), "nearest feasible budget is '"),
        (("--budget", "1 kB kv"), "the prompt costs at least "),
        (("--budget", "80 ms"), "vlm-budget calibrate MODEL"),
        (("--budget", "1000"), "asks for 1000 visual tokens but the prompt has only 192"),
        (("--budget", "0.001"), "nearest feasible budget is 1 token (or"),
        (("--method", "hird"), "Did you mean 'hired'"),
        (("--option", "alpa=1"), "Did you mean 'alpha'?"),
        (("--option", "alpha=x"), "alpha is a float, got 'x'"),
        (("--option", "alpha=3"), "alpha must lie in [0, 1]"),
        (("--out", "nowhere/kept.png"), "there is no folder 'nowhere'"),
        (("--out", "."), "is a directory"),
        (("--out", "kept.txt"), "Pillow writes no .txt"),
    ],
)
def test_bad_values(cli: Cli, tiny_model: Path, poster: Path, arguments: tuple[str, str], message: str) -> None:
    one_line_error(cli("run", poster, "--model", tiny_model, *QUICK, *arguments), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "there is no file"),
        (lambda file: file.mkdir(), "is a directory"),
        (lambda file: file.touch(), "is empty: 0 bytes"),
        (lambda file: file.write_text("a cat"), "not a picture in any format"),
    ],
)
def test_bad_pictures(cli: Cli, tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "x.png")
    one_line_error(cli("run", "x.png"), message)


def test_a_truncated_picture(cli: Cli, tmp_path: Path, poster: Path) -> None:
    (tmp_path / "x.png").write_bytes(poster.read_bytes()[:2000])
    one_line_error(cli("run", "x.png"), "damaged or truncated")


def test_a_decompression_bomb(cli: Cli, poster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    one_line_error(cli("run", poster), "too large")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./missing", "there is no model folder './missing'"),
        ("a/b/c", "there is no model folder 'a/b/c'"),
        ("nanoo", "Did you mean 'nano'?"),
        (".", "has no config.json"),
        ("broken", "cannot load 'broken'"),
        ("foreign", "BertModel is not a supported model. Supported: Gemma3ForConditionalGeneration"),
        ("unknown", "cannot load 'unknown'"),
        ("some-org/some-model", "neither a folder here nor a model that the hub gives"),
    ],
)
def test_bad_models(cli: Cli, tmp_path: Path, poster: Path, model: str, message: str) -> None:
    for name, config in (
        ("broken", "{"),
        ("foreign", json.dumps({"model_type": "bert", "architectures": ["BertModel"]})),
        ("unknown", json.dumps({"model_type": "no_such_type"})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    one_line_error(cli("run", poster, "--model", model), message)


def test_damaged_weights(cli: Cli, tmp_path: Path, poster: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    one_line_error(cli("run", poster, "--model", "damaged"), "cannot load 'damaged'")


def test_a_prompt_with_other_image_tokens_than_pictures(cli: Cli, tiny_model: Path, poster: Path) -> None:
    result = cli("run", poster, "-p", "<image> <image> why", "--model", tiny_model, *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["run", "demo"])
def test_usage_errors_have_another_exit_code(cli: Cli, verb: str) -> None:
    assert cli(verb, "--no-such-option").exit_code == 2
    assert cli(verb, "--repeats", 0).exit_code == 2
    assert cli(verb, "--positions", "sideways").exit_code == 2


def test_debug_lets_the_error_rise(cli: Cli) -> None:
    result = cli("run", "gone.png", "--debug")
    assert isinstance(result.exception, vlm_budget.ImageError)


def test_an_unexpected_error_is_one_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch, poster: Path) -> None:
    def broken(*args: object) -> None:
        raise KeyError("what\nis this")

    monkeypatch.setattr("vlm_budget.cli.loading.load", broken)
    one_line_error(cli("run", poster), "unexpected KeyError")


# --- types -----------------------------------------------------------------------------------------------------------


def test_errors_are_typed_for_callers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError):
        resolve(str(tmp_path / "gone"))
    with pytest.raises(OSError, match="no model folder"):
        load(str(tmp_path / "gone"), "cpu", "auto", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="--device cuda"):
        pick_device("cuda")


def test_an_unsupported_class_is_refused_by_its_configuration() -> None:
    from transformers import BertConfig, LlavaConfig

    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is not a supported model"):
        family_of(BertConfig(architectures=["BertForMaskedLM"]))
    with pytest.raises(UnsupportedModelError):
        family_of(BertConfig())
    assert family_of(LlavaConfig(architectures=["LlavaForConditionalGeneration"])) == "llava"


def test_a_shipped_model_is_found_by_name_and_a_hub_id_is_left_alone() -> None:
    assert resolve("nano")[1] is True
    assert resolve("llava-hf/llava-1.5-7b-hf") == ("llava-hf/llava-1.5-7b-hf", False)
