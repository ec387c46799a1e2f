"""Examples of the step sampler; tests/property/test_sampler.py has its properties."""

import pytest
import torch

from kl_vae.data import StepSampler, permutation, validation_batches
from kl_vae.data import sampler as sampler_module
from tests.messages import mentions


def test_permutation() -> None:
    order = permutation(seed=0, epoch=0, n=100)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, permutation(0, 0, 100))
    assert not torch.equal(order, permutation(0, 1, 100))
    assert not torch.equal(order, permutation(1, 0, 100))


def test_two_ranks_with_two_micro_batches_each() -> None:
    order = permutation(5, 0, 20).tolist()
    sampler = StepSampler(20, 8, 2, rank=1, world_size=2, seed=5, start_step=0, total_steps=2)
    assert list(sampler) == [
        [(0, order[2], 2), (0, order[3], 3)],
        [(0, order[6], 6), (0, order[7], 7)],
        [(0, order[10], 2), (0, order[11], 3)],
        [(0, order[14], 6), (0, order[15], 7)],
    ]
    assert len(sampler) == 4


def test_an_incomplete_batch_at_the_end_of_an_epoch_is_dropped() -> None:
    sampler = StepSampler(10, 4, 4, 0, 1, seed=0, start_step=0, total_steps=4)  # 2 steps per epoch
    epochs = [[epoch for epoch, _, _ in batch] for batch in sampler]
    assert epochs == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


def test_one_permutation_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(seed: int, epoch: int, n: int) -> torch.Tensor:
        drawn.append(epoch)
        return permutation(seed, epoch, n)

    monkeypatch.setattr(sampler_module, "permutation", counted)
    list(StepSampler(10, 2, 1, 0, 1, seed=0, start_step=7, total_steps=20))
    assert drawn == [1, 2, 3]


def test_no_steps_left() -> None:
    sampler = StepSampler(10, 2, 1, 0, 1, seed=0, start_step=5, total_steps=5)
    assert list(sampler) == []
    assert len(sampler) == 0


@pytest.mark.parametrize("sizes", [(8, 3, 2), (8, 16, 1), (8, 0, 1), (0, 1, 1)])
def test_batch_sizes_that_do_not_divide(sizes: tuple[int, int, int]) -> None:
    total, micro, ranks = sizes
    parts = (f"global_batch_size={total}", f"micro_batch_size={micro}", "ranks", ranks)
    with pytest.raises(ValueError, match=mentions(*parts)):
        StepSampler(100, total, micro, 0, ranks, seed=0, start_step=0, total_steps=1)


def test_fewer_images_than_a_global_batch() -> None:
    with pytest.raises(ValueError, match=mentions("images", 7, 8, "global_batch_size")):
        StepSampler(7, 8, 4, 0, 2, seed=0, start_step=0, total_steps=1)


def test_validation_batches() -> None:
    assert validation_batches(5, 2, rank=0, world_size=2) == [[(0, 0, 0), (0, 2, 2)], [(0, 4, 4)]]
    assert validation_batches(5, 2, rank=1, world_size=2) == [[(0, 1, 1), (0, 3, 3)]]
    assert validation_batches(2, 4, rank=3, world_size=4) == []
