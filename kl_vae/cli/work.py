"""What commands over many images share: their units, with images and a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kl_vae.data import Source
    from kl_vae.inference.images import LoadedImage
    from kl_vae.inference.progress import Ledger
    from kl_vae.runtime.distributed import Ranks


@contextmanager
def loaded_units(
    source: Source,
    units: Sequence[range],
    ledger: Ledger,
    ranks: Ranks,
    *,
    resize: int | None,
    crop: int | None,
    num_workers: int,
) -> Iterator[Iterator[tuple[int, Iterator[LoadedImage]]]]:
    """Give this rank's units that are not done, each with its images, which are decoded ahead."""
    from tqdm import tqdm

    from kl_vae.inference.images import load_images

    own = ledger.share(len(units))
    indices = [index for unit in own for index in units[unit]]
    images = load_images(source, indices, resize=resize, crop=crop, num_workers=num_workers)
    hidden = None if ranks.is_first else True  # None: no bar where stderr is a file
    with (
        closing(images),
        tqdm(images, total=len(indices), unit="image", disable=hidden) as progress,
    ):
        read = iter(progress)
        yield ((unit, islice(read, len(units[unit]))) for unit in own)
