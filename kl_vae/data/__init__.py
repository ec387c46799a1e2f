"""Images from files: decode, list a folder, resumable batches; knows nothing of the model."""

from kl_vae.data.build import build_datasets
from kl_vae.data.config import DataConfig, SourceConfig, ValidationConfig
from kl_vae.data.dataset import BadImage, ImageDataset, Sample
from kl_vae.data.folder import list_images, select
from kl_vae.data.images import (
    ARRAY_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    ImageError,
    read_image,
    read_size,
)
from kl_vae.data.joined import JoinedSource
from kl_vae.data.latents import LatentDataset, LatentSample
from kl_vae.data.loader import STOP_SIGNALS, Batch, batch_loader, collate
from kl_vae.data.named import NAMED, NamedSource
from kl_vae.data.paths import PathList
from kl_vae.data.pil_modes import pil_to_tensor
from kl_vae.data.roots import open_root, resolve_root
from kl_vae.data.sampler import Key, StepSampler, permutation, validation_batches
from kl_vae.data.shard_patterns import is_shard
from kl_vae.data.source import FolderSource, Source, StoredSource
from kl_vae.data.split import fingerprint, held_out, split
from kl_vae.data.tar_shards import TarSource
from kl_vae.data.transforms import (
    center_crop,
    channels_inside,
    random_crop,
    random_flip,
    random_recolor,
    resize_short_side,
)
from kl_vae.data.value_range import normalized, to_float, to_uint8
from kl_vae.data.wanted import Wanted

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
    "Sample",
    "Source",
    "SourceConfig",
    "StepSampler",
    "StoredSource",
    "TarSource",
    "ValidationConfig",
    "Wanted",
    "batch_loader",
    "build_datasets",
    "center_crop",
    "channels_inside",
    "collate",
    "fingerprint",
    "held_out",
    "is_shard",
    "list_images",
    "normalized",
    "open_root",
    "permutation",
    "pil_to_tensor",
    "random_crop",
    "random_flip",
    "random_recolor",
    "read_image",
    "read_size",
    "resize_short_side",
    "resolve_root",
    "select",
    "split",
    "to_float",
    "to_uint8",
    "validation_batches",
]
