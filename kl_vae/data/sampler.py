"""Deterministic samplers: the samples of a step depend only on the seed and the step.

Shapes: N samples, G global batch size, b micro-batch size per rank; G = b * ranks * accumulation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kl_vae.runtime.randomness import generator_for

# (epoch, index in the source, position in the global batch or in the validation set)
Key = tuple[int, int, int]


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return the sample order of an epoch, a permutation of `n` indices: int64 [n]."""
    return torch.randperm(n, generator=generator_for("permutation", seed, epoch))


class StepSampler(Sampler[list[Key]]):
    """Sampler of the micro-batches of one rank, for steps `start_step` to `total_steps - 1`.

    An epoch has N // G steps. Step o of an epoch uses `permutation[o * G : (o + 1) * G]`,
    independently of the number of ranks and micro-batches. Micro-batch m of rank r uses b
    positions of this slice, starting at m * ranks * b + r * b.

    Raises:
        ValueError: G is not a positive multiple of b * ranks, or N is less than G.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
    ) -> None:
        stride = micro_batch_size * world_size
        if stride < 1 or global_batch_size < 1 or global_batch_size % stride:
            raise ValueError(
                f"global_batch_size={global_batch_size}: must be a positive "
                f"multiple of micro_batch_size={micro_batch_size} times the number of "
                f"ranks, {world_size}"
            )
        if num_samples < global_batch_size:
            raise ValueError(
                f"fewer images ({num_samples}) than one global batch ({global_batch_size}): "
                "lower global_batch_size, or add images"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        # start of each micro-batch of this rank in a global batch
        self.starts = range(rank * micro_batch_size, global_batch_size, stride)

    def __len__(self) -> int:
        """Return the number of micro-batches that `__iter__` yields."""
        return max(0, self.total_steps - self.start_step) * len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the keys of each micro-batch in step order."""
        steps_per_epoch = self.num_samples // self.global_batch_size
        order: list[int] = []
        for step in range(self.start_step, self.total_steps):
            epoch, offset = divmod(step, steps_per_epoch)
            if offset == 0 or not order:
                order = permutation(self.seed, epoch, self.num_samples).tolist()
            first = offset * self.global_batch_size
            for start in self.starts:
                positions = range(start, start + self.micro_batch_size)
                yield [(epoch, order[first + position], position) for position in positions]


def validation_batches(
    num_samples: int, batch_size: int, rank: int, world_size: int
) -> list[list[Key]]:
    """Return the validation batches of a rank; all ranks together cover each sample once.

    There is no padding: the last batch may be smaller, and a rank may have no batches.
    """
    keys = [(0, index, index) for index in range(rank, num_samples, world_size)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
