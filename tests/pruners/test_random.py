"""Random: a fair draw that the seed and the item's place decide, and nothing else."""

import pytest
import torch

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.pruners.random import Random

ITEM = make.anyres(2, 2, side=5, pad=(1, 0))


def draw(seed: int = 0, order: int = 0, k: int = 33) -> list[int]:
    return Random(seed=seed).select(make.context(ITEM, order=order), k).keep.tolist()


def test_the_seed_decides_the_draw() -> None:
    assert draw(seed=0) == draw(seed=0)
    assert len({tuple(draw(seed=seed)) for seed in range(20)}) == 20


def test_two_images_of_a_prompt_get_different_draws() -> None:
    assert draw(order=0) == draw(order=0)
    assert len({tuple(draw(seed=seed, order=order)) for seed in range(5) for order in range(5)}) == 25


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**31, 2**63 - 1, 2**64 + 1, 10**30])
def test_every_integer_is_a_seed(seed: int) -> None:
    assert draw(seed=seed) == draw(seed=seed) != draw(seed=seed + 1)


@pytest.mark.parametrize("seed", [0.5, "0", None, True])
def test_what_is_no_integer_is_no_seed(seed: object) -> None:
    with pytest.raises(OptionError, match="seed must be an int"):
        Random(seed=seed)  # type: ignore[arg-type]


def test_every_patch_is_drawn_about_equally_often_and_no_separator() -> None:
    times = torch.zeros(ITEM.size)
    rounds, k = 2000, 33
    for seed in range(rounds):
        times[Random(seed=seed).pick(make.context(ITEM), k)] += 1
    share = k / len(ITEM.candidates)
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert (times[ITEM.separators] == 0).all()
    assert ((times[ITEM.candidates] - rounds * share).abs() < 5 * deviation).all()


def test_a_larger_budget_keeps_what_a_smaller_one_kept() -> None:
    for k in range(1, len(ITEM.candidates)):
        assert set(draw(k=k)) < set(draw(k=k + 1))


@pytest.mark.gpu
def test_the_gpu_gets_the_draw_of_the_cpu() -> None:
    ctx = make.context(ITEM, device="cuda")
    keep = Random(seed=3).select(ctx, 33).keep
    assert keep.is_cuda and keep.tolist() == draw(seed=3)
