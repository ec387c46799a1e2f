"""How the images of a step are shared among ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

from kl_vae.training.config import TrainingConfig


def divide_batch(
    training: TrainingConfig, world_size: int, before: Mapping[str, int] | None = None
) -> tuple[int, dict[str, int]]:
    """How many micro-batches each rank splits its share of the global batch into.

    A run that goes on with another number of ranks keeps its micro-batches as large as they were,
    or makes them smaller, so that they fit into the memory: the number is computed anew.

    Args:
        training: of the config.
        world_size: number of ranks.
        before: the plan of the checkpoint that the run goes on from; None: it is new.

    Returns:
        The number, and the plan: `accumulate_batches` as configured and `micro_batch_size`, the
        images that a rank passes through the model at once, at most.

    Raises:
        ValueError: the global batch cannot be divided so.
    """
    images, asked = training.global_batch_size, training.accumulate_batches
    if before is not None and before["accumulate_batches"] == asked:
        share, rest = divmod(images, world_size)
        if rest:
            raise ValueError(
                f"training.global_batch_size={images}: cannot be divided among {world_size} ranks; "
                "go on with a number of ranks that divides it"
            )
        counts = (n for n in range(1, share + 1) if share % n == 0)
        return next(n for n in counts if share // n <= before["micro_batch_size"]), dict(before)
    parts = world_size * asked
    if images % parts:
        raise ValueError(
            f"training.global_batch_size={images}: cannot be divided among "
            f"{world_size} ranks x {asked} accumulated batches; "
            f"use a multiple of {parts}"
        )
    return asked, {"accumulate_batches": asked, "micro_batch_size": images // parts}
