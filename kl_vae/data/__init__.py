"""Image datasets: listing, decoding, cropping and resumable batches. Independent of the model."""

from kl_vae.data.build import build_datasets
from kl_vae.data.config import DataConfig, SourceConfig, ValidationConfig
from kl_vae.data.dataset import BadImage, ImageDataset, Sample
from kl_vae.data.decoding import MAX_PIXELS, ImageError, read_image, read_size
from kl_vae.data.file_types import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS
from kl_vae.data.folder import list_images, select
from kl_vae.data.latents import LatentDataset, LatentSample
from kl_vae.data.loader import STOP_SIGNALS, Batch, batch_loader, collate
from kl_vae.data.named import NAMED, NamedSource
from kl_vae.data.paths import PathList, fingerprint
from kl_vae.data.pixel_format import PixelFormat, ValueRange, decide_format
from kl_vae.data.pixels import Wanted, normalized, pil_to_tensor, to_float, to_uint8
from kl_vae.data.roots import is_shard, open_root, resolve_root
from kl_vae.data.sampler import Key, StepSampler, permutation, validation_batches
from kl_vae.data.sizes import check_sizes, read_sizes
from kl_vae.data.sources import (
    FolderSource,
    JoinedSource,
    Source,
    StoredSource,
    with_format,
)
from kl_vae.data.tar_shards import TarSource
from kl_vae.data.transforms import (
    center_crop,
    channels_inside,
    random_flip,
    random_recolor,
    resize_short_side,
)

__all__ = [
    "ARRAY_EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "NAMED",
    "STOP_SIGNALS",
    "BadImage",
    "Batch",
    "DataConfig",
    "FolderSource",
    "ImageDataset",
    "ImageError",
    "JoinedSource",
    "Key",
    "LatentDataset",
    "LatentSample",
    "NamedSource",
    "PathList",
    "PixelFormat",
    "Sample",
    "Source",
    "SourceConfig",
    "StepSampler",
    "StoredSource",
    "TarSource",
    "ValidationConfig",
    "ValueRange",
    "Wanted",
    "batch_loader",
    "build_datasets",
    "center_crop",
    "decide_format",
    "with_format",
    "channels_inside",
    "check_sizes",
    "collate",
    "fingerprint",
    "is_shard",
    "list_images",
    "normalized",
    "open_root",
    "permutation",
    "pil_to_tensor",
    "random_flip",
    "random_recolor",
    "read_image",
    "read_size",
    "read_sizes",
    "resize_short_side",
    "resolve_root",
    "select",
    "to_float",
    "to_uint8",
    "validation_batches",
]
