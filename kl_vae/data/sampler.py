"""Which samples a step takes: arithmetic over (seed, epoch), so that resuming is arithmetic, too.

N samples, G the global batch, b the micro-batch of one rank; G = b * ranks * accumulation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kl_vae.runtime.randomness import generator_for

# (epoch, index in the source, position in the global batch or in the validation set)
Key = tuple[int, int, int]


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return an epoch's order of `n` samples: int64 [n]."""
    return torch.randperm(n, generator=generator_for("permutation", seed, epoch))


class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one rank, from step `start_step` up to `total_steps`.

    An epoch has N // G steps. Its step o takes `permutation[o * G : (o + 1) * G]`,
    whatever the number of ranks and micro-batches: of it, micro-batch m of rank r
    takes the b positions from m * ranks * b + r * b on.

    Raises:
        ValueError: G is no positive multiple of b * ranks, or there are fewer than G samples.
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
                "lower global_batch_size or add images"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        # where in a global batch each micro-batch of this rank begins
        self.starts = range(rank * micro_batch_size, global_batch_size, stride)

    def __len__(self) -> int:
        """Return the number of micro-batches that `__iter__` yields."""
        return max(0, self.total_steps - self.start_step) * len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the keys of each micro-batch, step after step."""
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
    """Return a rank's batches of the validation set: over all ranks each sample exactly once.

    Nothing is padded or repeated: the last batch may be smaller, and a rank may have none.
    """
    keys = [(0, index, index) for index in range(rank, num_samples, world_size)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
