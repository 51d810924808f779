"""What a family says about its model, against what the model does."""

from typing import Any

import pytest
import torch

import tiny_models
from tiny_encoders import arguments, family_of, modalities
from tiny_models import Tiny
from tiny_parts import IMAGE, VIDEO
from vlm_budget.errors import PatchError
from vlm_budget.registry import FAMILIES


def test_model_classes_are_named(setup: Tiny) -> None:
    family = family_of(setup)
    assert {type(setup.model).__name__, type(setup.model.model).__name__} == set(family.models)
    assert family.base(setup.model) is setup.model.model
    assert family.base(setup.model.model) is setup.model.model


def test_language_model_is_the_module_that_gets_the_embeddings(setup: Tiny) -> None:
    base = setup.model.model
    widths = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        widths.append(kwargs["inputs_embeds"].shape[1])

    hook = family_of(setup).language_model(base).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        setup.model(**setup.clone())
    hook.remove()
    assert widths == [setup.inputs["input_ids"].shape[1]]


def test_forward_encodes_through_the_instance(setup: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap on the instance sees every encoder call, and the call's arguments are the processor's."""
    base, family = setup.model.model, family_of(setup)
    seen = []
    for modality, name in family.encoders.items():
        method = getattr(type(base), name).__get__(base)

        def tap(*args: Any, modality: str = modality, method: Any = method, **kwargs: Any) -> Any:
            seen.append(modality)
            return method(*args, **kwargs)

        monkeypatch.setattr(base, name, tap, raising=False)
    with torch.no_grad():
        setup.model(**setup.clone())
    # Qwen3-VL encodes videos by its image encoder.
    assert [m for m in seen if m in modalities(setup)] == modalities(setup)


def test_given_modalities_are_those_with_pixels_or_features(setup: Tiny) -> None:
    family = family_of(setup)
    given = modalities(setup)
    assert family.given_modalities(setup.inputs) == given
    assert family.given_modalities({"input_ids": setup.inputs["input_ids"], "pixel_values": None}) == []
    assert family.given_modalities({"mm_encoder_outputs": dict.fromkeys(given, object())}) == given
    assert family.given_modalities({"mm_encoder_outputs": None}) == []


def test_token_ids_are_the_placeholders(setup: Tiny) -> None:
    family = family_of(setup)
    expected = {"image": IMAGE, "video": VIDEO}
    assert family.token_ids(setup.model.model.config) == {m: expected[m] for m in family.encoders}


def test_tower_describes_the_layers_that_run(setup: Tiny) -> None:
    base, family = setup.model.model, family_of(setup)
    calls = []
    hooks = [
        layer.register_forward_hook(lambda m, a, o, index=index: calls.append(index))
        for index, layer in enumerate(family.vision_layers(base))
    ]
    modality = modalities(setup)[0]
    with torch.no_grad():
        getattr(base, f"get_{modality}_features")(**arguments(setup, modality))
    for hook in hooks:
        hook.remove()
    tower = family.tower(base)
    assert calls == list(range(tower.layers))
    assert tower.has_cls == (setup.family in ("llava", "llava_next", "llava_next_video", "internvl"))


def test_feature_layer_is_the_deepest_one_the_features_depend_on(copied: Tiny) -> None:
    base, family = copied.model.model, family_of(copied)
    modality = modalities(copied)[0]

    def encode() -> torch.Tensor:
        with torch.no_grad():
            output = getattr(base, f"get_{modality}_features")(**arguments(copied, modality))
        parts = getattr(output, "pooler_output", output)
        return parts[0] if isinstance(parts[0], torch.Tensor) else parts[0][0]

    before, tower = encode(), family.tower(base)
    used = []
    for index, layer in enumerate(family.vision_layers(base)):
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        for parameter in layer.parameters():
            parameter.data *= 1.5
        if not torch.equal(encode(), before):
            used.append(index)
        layer.load_state_dict(state)
    # Qwen2.5-VL names its last layer of full attention instead, for what follows attends within windows.
    assert tower.feature_layer == (1 if copied.family == "qwen2_5_vl" else max(used))


def test_probed_layers_out_of_range_are_refused(setup: Tiny) -> None:
    base, family = setup.model.model, family_of(setup)
    with pytest.raises(PatchError, match="0 to"):
        family.vision_attention(base, family.tower(base).layers)


def test_no_family_lacks_a_set_up() -> None:
    assert {tiny_models.build(name).family for name in tiny_models.SETUPS} == set(FAMILIES)
