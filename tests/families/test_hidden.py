"""The projector's inputs, token by token: projected again they are the features, or the features stand in for them."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fingerprint import changes, fingerprint
from tiny_encoders import arguments, family_of, modalities, observe
from tiny_models import SETUPS, Tiny, build
from vlm_budget.engine.observe import Observer
from vlm_budget.engine.selection import Observation, seen_rows
from vlm_budget.errors import LayoutError
from vlm_budget.pruner import unprojected

# Which items of which set-ups are resampled behind the projector: large mosaics, and the frames of a video.
RESAMPLED = {
    ("llava_onevision", "image"): [True, False, True],
    ("llava_onevision_multi", "image"): [False, False, True],
    ("llava_onevision_video", "image"): [True, False],
    ("llava_onevision_video", "video"): [True],
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def packed(output: Any) -> torch.Tensor:
    """The features of an encoder's output."""
    parts = getattr(output, "pooler_output", output)
    while not isinstance(parts, torch.Tensor):
        parts = parts[0]
    return parts


def observers(tiny: Tiny) -> Iterator[tuple[str, Observer, Observation]]:
    """Per modality, an observer and what it saw."""
    for modality in modalities(tiny):
        observer = Observer(tiny.model.model, family_of(tiny), (), hidden=True)
        yield modality, observer, observe(tiny, modality, hidden=True)[1]


def widths(tiny: Tiny) -> int:
    """Channels of the projector's input, from the weights of its first layer."""
    module = family_of(tiny).projector(tiny.model.model, "image")
    assert module is not None
    if tiny.family == "gemma3":
        return tiny.model.config.vision_config.hidden_size
    first = next(layer for layer in module.modules() if isinstance(layer, torch.nn.Linear))
    return first.in_features


@pytest.mark.parametrize("name", SETUPS)
def test_hidden_rows_project_to_the_features_of_their_tokens(name: str) -> None:
    tiny = build(name)
    for modality, observer, seen in observers(tiny):
        assert seen.hidden is not None and observer.project is not None
        resampled = RESAMPLED.get((name, modality), [False] * len(seen.items))
        assert [hidden is None for hidden in seen.hidden] == resampled == [item.resampled for item in seen.items]
        for item, features, hidden in zip(seen.items, seen.features, seen.hidden, strict=True):
            if hidden is None:
                continue
            assert hidden.shape == (item.size, widths(tiny)) and not hidden.requires_grad
            assert (hidden[item.separators] == 0).all() and (hidden[item.candidates] != 0).any(1).all()
            again = observer.project(hidden[item.candidates])
            torch.testing.assert_close(again, features[item.candidates], **TOLERANCE)
            assert features[item.candidates].std() > 0.01


def test_tokens_of_a_shrunk_mosaic_are_no_projections_of_the_patches_they_are_named_after() -> None:
    """What the features stand in for: rows put in place all the same would be projected to something else."""
    tiny = build("llava_onevision")
    family, base = family_of(tiny), tiny.model.model
    given: list[torch.Tensor] = []
    hook = base.multi_modal_projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    seen = observe(tiny, "image")[1]
    hook.remove()
    hidden = family.token_hidden(base, given, [replace(item, resampled=False) for item in seen.items])
    for item, features, rows in zip(seen.items, seen.features, hidden, strict=True):
        assert rows is not None
        with torch.no_grad():
            equal = torch.isclose(family.project(base, rows), features, **TOLERANCE).all(1)[item.candidates]
        whole = (item.partition == 0)[item.candidates]
        assert equal[whole].all(), "the thumbnail is not shrunk"
        assert equal[~whole].all() == (not item.resampled)


def test_items_whose_tokens_are_resampled_get_their_features_instead() -> None:
    tiny = build("llava_onevision_video")
    for modality, observer, seen in observers(tiny):
        counts = {modality: [sum(item.size for item in seen.items)]}
        (row,) = seen_rows([seen], counts, (), observer.project)  # type: ignore[arg-type]
        for one, resampled in zip(row, RESAMPLED["llava_onevision_video", modality], strict=True):
            assert (one.hidden is one.features) == resampled == (one.project is unprojected)


def test_without_the_wish_nothing_is_hooked_or_kept() -> None:
    tiny = build("llava")
    before = fingerprint(tiny.model)
    observer = Observer(tiny.model.model, family_of(tiny), ())
    assert observer.attach() == [] and observer.project is None
    assert changes(before, fingerprint(tiny.model)) == []
    assert observe(tiny, "image")[1].hidden is None


def test_the_hook_is_taken_away_without_a_trace(setup: Tiny) -> None:
    before = fingerprint(setup.model)
    observer = Observer(setup.model.model, family_of(setup), (), hidden=True)
    attached = observer.attach()
    assert len(attached) == 1 and changes(before, fingerprint(setup.model))
    attached[0].detach()
    assert changes(before, fingerprint(setup.model)) == []


def test_watching_the_projector_leaves_the_features_bit_identical(setup: Tiny) -> None:
    for modality in modalities(setup):
        plain, watched = (observe(setup, modality, hidden=hidden)[0] for hidden in (False, True))
        assert torch.equal(packed(watched), packed(plain))


def test_a_failed_call_leaves_nothing_behind_for_the_next() -> None:
    tiny = build("llava")
    observer = Observer(tiny.model.model, family_of(tiny), (), hidden=True)
    attached = observer.attach()
    call, given = tiny.model.model.get_image_features, arguments(tiny, "image")

    def broken(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        raise RuntimeError("out of memory")

    broken.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"):
        observer.observe("image", broken, (), given)
    tiny.model.model.get_image_features(**given)  # not watched
    _, seen = observer.observe("image", call, (), given)
    assert seen.hidden is not None and [len(part) for part in seen.hidden if part is not None] == [36] * 3
    attached[0].detach()


def test_projecting_keeps_the_dtype_and_takes_no_gradient() -> None:
    tiny = build("llava")
    base = tiny.model.model.to(torch.bfloat16)
    observer = Observer(base, family_of(tiny), (), hidden=True)
    attached = observer.attach()
    given = arguments(tiny, "image", tiny.inputs["pixel_values"].bfloat16())
    _, seen = observer.observe("image", base.get_image_features, (), given)
    (row,) = seen_rows([seen], {"image": [108]}, (), observer.project)
    hidden = row[0].hidden
    assert hidden is not None and hidden.dtype == torch.bfloat16
    again = row[0].project(hidden[:3].float())  # a mean, say
    assert again.dtype == torch.bfloat16 and not again.requires_grad and again.shape == (3, 32)
    torch.testing.assert_close(again, row[0].features[:3].detach(), rtol=0.02, atol=0.02)
    attached[0].detach()


def test_threads_see_the_rows_of_their_own_call_only() -> None:
    tiny = build("llava")
    base = tiny.model.model
    observer = Observer(base, family_of(tiny), (), hidden=True)
    attached = observer.attach()
    batches = [torch.randn(size, 3, 48, 48) for size in (1, 2, 3)]
    start = threading.Barrier(len(batches))
    found: list[list[torch.Tensor]] = [[] for _ in batches]

    def work(index: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(10):
                given = arguments(tiny, "image", batches[index])
                _, seen = observer.observe("image", base.get_image_features, (), given)
                assert seen.hidden is not None
                found[index].append(torch.stack([part for part in seen.hidden if part is not None]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attached[0].detach()
    for pixels, rows in zip(batches, found, strict=True):
        alone = observe(tiny, "image", pixels=pixels, hidden=True)[1].hidden
        assert alone is not None and len(rows) == 10
        for each in rows:
            torch.testing.assert_close(each, torch.stack(list(alone)), rtol=0, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_projector_shows_its_inputs_to_its_own_sink(duplicate: Any) -> None:
    tiny = build("llava")
    observer = Observer(tiny.model.model, family_of(tiny), (), hidden=True)
    attached = observer.attach()
    module, sink = duplicate((tiny.model.model.multi_modal_projector, observer.inputs))
    rows = torch.randn(5, 32)
    for one in (observer.inputs, sink):
        one.start()
    module(rows)
    assert observer.inputs.stop() == []
    (seen,) = sink.stop()
    assert torch.equal(seen, rows)
    attached[0].detach()


@pytest.mark.parametrize("rows", [[], [torch.zeros(1, 7, 32)]])
def test_a_projector_that_saw_other_rows_is_refused(setup: Tiny, rows: list[torch.Tensor]) -> None:
    items = observe(setup, modalities(setup)[0])[1].items
    with pytest.raises(LayoutError, match=f"get {7 * len(rows)} rows, the layout has"):
        family_of(setup).token_hidden(setup.model.model, rows, items)
