"""What else gets its hands on a model: PEFT, accelerate, pipelines, threads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import numpy
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import vlm_budget
from tiny_parts import FLOOR, IMAGE, SIDE, Tiny, row_inputs

from .conftest import BUDGET, EACH_ONCE, GENERATING, METHOD, Case, case, fresh
from .patched import generate, unpatched_or_skip
from .reference import language_model

# --- PEFT ------------------------------------------------------------------------------------------------------------


def lora(model: Any) -> Any:
    """The model with adapters, not zero, on its decoder's attention."""
    import peft

    prefix = next(name for name, module in model.named_modules() if module is language_model(model))
    config = peft.LoraConfig(target_modules=rf"{prefix}\..*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


def test_adapters_around_a_patched_model_and_a_patch_around_adapters(generating_case: Case) -> None:
    tiny = generating_case.tiny
    # The reference: adapters merged into the weights, then patched like any model.
    merged = lora(copy.deepcopy(tiny.model)).merge_and_unload()
    plain = generate(merged, tiny.clone())
    with vlm_budget.patch(merged, METHOD, BUDGET):
        want = generate(merged, tiny.clone())

    wrapped = lora(copy.deepcopy(tiny.model))
    assert generate(wrapped, tiny.clone()) == plain
    with vlm_budget.patch(wrapped, METHOD, BUDGET) as handle:
        assert handle.model is wrapped.get_base_model()
        assert generate(wrapped, tiny.clone()) == want
    assert generate(wrapped, tiny.clone()) == plain

    with vlm_budget.patch(tiny.model, METHOD, BUDGET):
        later = lora(tiny.model)
        assert generate(later, tiny.clone()) == want
        unloaded = later.merge_and_unload()
        assert generate(unloaded, tiny.clone()) == want
        vlm_budget.unpatch(unloaded)
        assert generate(unloaded, tiny.clone()) == plain


def test_adapters_train_under_a_patch(llava_case: Case) -> None:
    tiny = llava_case.tiny
    wrapped = lora(tiny.model).train()
    labels = tiny.inputs["input_ids"].masked_fill(tiny.inputs["input_ids"] == IMAGE, -100)
    with vlm_budget.patch(wrapped, METHOD, BUDGET):
        wrapped(**tiny.clone(), labels=labels).loss.backward()
    gradients = [p.grad for name, p in wrapped.named_parameters() if "lora" in name]
    assert gradients and all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


# --- accelerate ------------------------------------------------------------------------------------------------------


def to_cpu(model: Any, folder: Path) -> Any:
    """All weights off the device, brought in for each module as it runs."""
    return accelerate.cpu_offload(model, torch.device("cpu"))


def to_disk(model: Any, folder: Path) -> Any:
    """All weights on disk."""
    return accelerate.disk_offload(model, str(folder), torch.device("cpu"))


def mixed(model: Any, folder: Path) -> Any:
    """A device map: two decoder layers and the head on disk, the rest in memory, hooks everywhere."""
    warnings.filterwarnings("ignore", message="The following device_map keys do not match", category=UserWarning)
    decoder = next(name for name, module in model.named_modules() if module is language_model(model))
    disk = (f"{decoder}.layers.0", f"{decoder}.layers.1", "lm_head")
    places = {}
    for name, module in model.named_modules():
        on_disk = name in disk
        if on_disk or not any(name.startswith(f"{path}.") for path in disk) and not list(module.children()):
            places[name] = "disk" if on_disk else "cpu"
    for name, _ in model.named_parameters():
        if not any(name.startswith(f"{path}.") for path in places):
            places[name] = "cpu"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize(
    ("name", "offload"),
    [(name, mixed) for name in GENERATING]
    + [(name, how) for name in ("llava", "internvl") for how in (to_cpu, to_disk)],
)
def test_offloaded_weights(name: str, offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    known = case(name)
    tiny = known.tiny
    unpatched_or_skip(
        lambda: generate(offload(copy.deepcopy(tiny.model), tmp_path / "plain"), tiny.clone()),
        known.unpruned,
        offload.__name__,
    )
    before = offload(copy.deepcopy(tiny.model), tmp_path / "before")
    with vlm_budget.patch(before, METHOD, BUDGET) as handle:
        assert generate(before, tiny.clone()) == known.pruned
        assert handle.report().plan == handle.plan(**tiny.clone())
    assert generate(before, tiny.clone()) == known.unpruned
    with known.patch():
        after = offload(tiny.model, tmp_path / "after")
        assert generate(after, tiny.clone()) == known.pruned
    assert generate(after, tiny.clone()) == known.unpruned


# --- pipeline --------------------------------------------------------------------------------------------------------


def pipeline(model: Any) -> Any:
    """An image-text-to-text pipeline whose words are token ids."""
    words = {f"w{token}": token for token in range(118)}
    words |= {"<pad>": 118, "<unk>": 119, "<image>": IMAGE, "<other>": 121}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<other>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side),
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model.generation_config.pad_token_id = 118
    return transformers.pipeline("image-text-to-text", model=model, processor=processor)


def test_pipeline(llava: Tiny) -> None:
    pipe = pipeline(llava.model)
    noise = numpy.random.default_rng(0).integers(0, 255, (2, 60, 60, 3), dtype=numpy.uint8)
    images = [Image.fromarray(part) for part in noise]
    text = ["<image> w5 w6", "w9 <image> w7 w8 w3"]

    def run(batch_size: int) -> list[str]:
        made = pipe(images=images, text=text, max_new_tokens=5, batch_size=batch_size, return_full_text=False)
        return [part[0]["generated_text"] if isinstance(part, list) else part["generated_text"] for part in made]

    before = run(2)
    with vlm_budget.patch(pipe, METHOD, 0.1) as handle:
        assert handle.model is llava.model
        found = run(2)
        assert [item.keep for item in handle.report().plan.items] == [4, 4]
        assert found == run(1)
    assert found != before
    assert run(2) == before


# --- threads ---------------------------------------------------------------------------------------------------------


def prompts(tiny: Tiny) -> list[dict[str, torch.Tensor]]:
    """Prompts of different lengths and pictures: the batch, its rows, and the same with other pixels."""
    plain = [tiny.clone(), row_inputs(tiny, 0), row_inputs(tiny, 1)]
    negative = [{n: -v if v.is_floating_point() else v.clone() for n, v in inputs.items()} for inputs in plain]
    return plain + negative


@pytest.mark.parametrize(("name", "method"), EACH_ONCE)
def test_concurrent_calls_do_not_see_each_other(name: str, method: str) -> None:
    tiny = fresh(name)
    if FLOOR and tiny.family not in ("llava", "llava_next", "llava_next_video"):
        pytest.skip("4.x keeps state of a call on the model: rope_deltas, and layers' forwards wrapped to record them")
    work = prompts(tiny) * 2
    with vlm_budget.patch(tiny.model, method, BUDGET):
        want = [generate(tiny.model, inputs) for inputs in work]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: generate(tiny.model, inputs), work))
    assert found == want


def test_concurrent_calls_of_differently_patched_models() -> None:
    first, second = fresh("llava"), fresh("llava")
    work = prompts(first)
    with vlm_budget.patch(first.model, "hired", BUDGET), vlm_budget.patch(second.model, "uniform", 0.7):
        jobs = [(model, inputs) for inputs in work for model in (first.model, second.model)] * 3
        want = [generate(model, inputs) for model, inputs in jobs]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda job: generate(*job), jobs)) == want
    assert want[0] != want[1]
