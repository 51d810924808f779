"""Loss and gradients are those of the hand-compacted prompts, also with gradient checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tiny_parts import Tiny

from .conftest import Case
from .patched import forward
from .reference import Row, language_model, placeholders, rows

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def labelled(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Inputs with labels on every text token that something stands before."""
    inputs = tiny.clone()
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.clone()
    labels[~valid | torch.isin(ids, torch.tensor(placeholders(tiny.model)))] = -100
    labels[torch.arange(len(ids)), valid.long().argmax(1)] = -100
    return inputs | {"labels": labels}


def compacted_loss(tiny: Tiny, rows: list[Row], columns: list[list[int]], labels: torch.Tensor) -> torch.Tensor:
    """Mean over all labelled tokens of the batch, each prompt compacted by hand."""
    total, count = torch.zeros(()), 0
    for row, kept, all_labels, mask in zip(rows, columns, labels, tiny.inputs["attention_mask"].bool(), strict=True):
        wanted = all_labels[mask][kept][1:]
        total = total + cross_entropy(row.graph()[:-1], wanted, ignore_index=-100, reduction="sum")
        count += int((wanted != -100).sum())
    return total / count


def decoder_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of the decoder layers' weights, which are then cleared."""
    found = {
        name: parameter.grad.clone()
        for name, parameter in language_model(model).layers.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def check_against_compacted(case: Case, inputs: dict[str, torch.Tensor]) -> None:
    """Loss, gradients of the decoder, and a gradient that reaches the vision side."""
    tiny, model = case.tiny, case.tiny.model
    full = rows(model, inputs)
    packed = not full[0].multi_axis
    with case.patch() as handle:
        columns = forward(handle, inputs, full, use_cache=False).columns
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    reached = [
        name for name, p in model.model.named_parameters() if "language_model" not in name and p.grad is not None
    ]
    found = decoder_gradients(model)
    compact = [row.compact(kept, packed) for row, kept in zip(full, columns, strict=True)]
    want = compacted_loss(tiny, compact, columns, inputs["labels"])
    want.backward()
    torch.testing.assert_close(loss, want, **TOLERANCE)
    expected = decoder_gradients(model)
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert any("proj" in name or "merger" in name or "connector" in name for name in reached)


def test_loss_and_gradients_equal_the_compacted_ones(any_case: Case) -> None:
    check_against_compacted(any_case, labelled(any_case.tiny))


def test_loss_and_gradients_in_training_mode(any_case: Case) -> None:
    any_case.tiny.model.train()
    check_against_compacted(any_case, labelled(any_case.tiny))


def test_gradient_checkpointing(any_case: Case) -> None:
    model = any_case.tiny.model
    model.train()
    inputs = labelled(any_case.tiny)
    with any_case.patch():
        plain = model(**inputs, use_cache=False).loss
        plain.backward()
        expected = decoder_gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    torch.testing.assert_close(loss, plain, **TOLERANCE)
    for name, gradient in decoder_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE)
