"""Images beside their reconstructions, read again from where these were written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from kl_vae.data import MAX_PIXELS, ImageError, Source, read_image
from kl_vae.inference.images import load_images
from kl_vae.inference.reconstruction.output_files import OutputFiles
from kl_vae.visual.grid import comparison_row
from kl_vae.visual.image_files import as_pictures, as_saved

logger = logging.getLogger(__name__)


def comparison_cells(
    source: Source,
    indices: Sequence[int],
    files: OutputFiles,
    resize: int | None,
    crop: int | None,
    to_rgb: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Yield image, reconstruction and difference of each image, uint8 [3, H, W].

    An image whose files are not what they were is left out with a warning.

    Args:
        source: of the images.
        indices: which.
        files: where their reconstructions are.
        resize: as they were read before; see `load_images`.
        crop: as well.
        to_rgb: the model's.
    """
    for loaded in load_images(source, indices, resize=resize, crop=crop):
        name = source.name(loaded.index)
        try:
            if loaded.image is None:
                raise ImageError(f"{name}: {loaded.reason}")
            image = as_saved(loaded.image)
            path = files.out / files.pictures[loaded.index]
            # images can be made larger than what is read otherwise
            most = max(MAX_PIXELS, image[0].numel())
            written = read_image(path, image.shape[0], max_pixels=most)
            if written.shape != image.shape:
                raise ImageError(f"{name}: has another size than before")
        except ImageError as error:
            logger.warning("left out of the comparison: %s", error)
            continue
        yield from comparison_row(*as_pictures(image, written, to_rgb))
