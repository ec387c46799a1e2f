"""Weights of LPIPS: download into the torch.hub cache, and loading."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

HEADS_URL = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
    "lpips/weights/v0.1/{net}.pth"
)
HEADS_SHA256 = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "squeeze": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
}
# torchvision names of the ImageNet weights that LPIPS v0.1 was fitted with
_FEATURES = {
    "vgg": "VGG16_Weights.IMAGENET1K_V1",
    "alex": "AlexNet_Weights.IMAGENET1K_V1",
    "squeeze": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}
_PREFIX = "features."


@dataclass(frozen=True)
class Download:
    """A published file, and its name in the checkpoint folder of torch.hub."""

    url: str
    name: str
    sha256: str  # complete, or the first digits

    @property
    def path(self) -> Path:
        """Path of the file in the cache."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


def features_download(net: str) -> Download:
    """Return the download of a network's ImageNet weights from torchvision."""
    import torchvision

    url = torchvision.models.get_weight(_FEATURES[net]).url
    name = url.rpartition("/")[2]  # such as vgg16-397923af.pth
    return Download(url, name, Path(name).stem.rpartition("-")[2])


def heads_download(net: str) -> Download:
    """Return the download of a network's published linear heads."""
    return Download(HEADS_URL.format(net=net), f"lpips_v0.1_{net}.pth", HEADS_SHA256[net])


def find_weights(
    net: str, features: str | Path | None, heads: str | Path | None, linear: bool
) -> tuple[Path, Path | None]:
    """Return the files of a network's features and of its heads (None unless `linear`).

    A path of None means the published file. In distributed training, one process per node downloads
    while all other processes wait, so all ranks must call this.

    Raises:
        ValueError: a file is missing and cannot be downloaded, or cached heads are not the
            published ones.
    """
    features_file = None if features is None else _existing("features", features)
    heads_file = _existing("heads", heads) if linear and heads is not None else None
    downloads = []
    if features_file is None:
        downloads.append(features_download(net))
        features_file = downloads[0].path
    if linear and heads_file is None:
        downloads.append(heads_download(net))
        heads_file = downloads[-1].path
    if downloads:
        _fetch(downloads)
    return features_file, heads_file


def read_features(path: Path, net: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Load the float32 tensors of a torchvision network's `.features`, with the keys of `shapes`.

    The file contains the whole network, or only `.features`, with or without the prefix
    "features.".

    Raises:
        ValueError: the file cannot be read, or its keys or shapes do not match `shapes`.
    """
    tensors = _read(path)
    if any(key.startswith(_PREFIX) for key in tensors):
        tensors = {
            key.removeprefix(_PREFIX): x for key, x in tensors.items() if key.startswith(_PREFIX)
        }
    _check_shapes(path, f"the features of LPIPS's {net} network", tensors, shapes)
    return tensors


def read_heads(path: Path, net: str, channels: Sequence[int]) -> list[Tensor]:
    """Load the float32 weights [1, C, 1, 1] of the linear heads, in the order of the taps.

    Raises:
        ValueError: the file cannot be read, or its keys or shapes do not match one head per tap.
    """
    shapes = {f"lin{i}.model.1.weight": torch.Size((1, c, 1, 1)) for i, c in enumerate(channels)}
    tensors = _read(path)
    _check_shapes(path, f"the heads of LPIPS's {net} network", tensors, shapes)
    return [tensors[key] for key in shapes]


def _fetch(files: Sequence[Download]) -> None:
    distributed = dist.is_available() and dist.is_initialized()
    failure: Exception | None = None
    # without torch.distributed, every process may download: the atomic rename makes that safe
    if not distributed or os.environ.get("LOCAL_RANK", "0") == "0":
        failure = _download_missing(files)
    if distributed:
        dist.barrier()  # on all ranks, also after a failure and if no file is missing
    missing = [file for file in files if not file.path.is_file()]
    if missing:
        reason = failure or "the process with LOCAL_RANK=0 on this node failed"
        wanted = " and ".join(f"{file.name} (from {file.url})" for file in missing)
        raise ValueError(
            f"LPIPS: cannot download the weights ({reason}); put {wanted} into "
            f"{missing[0].path.parent}, or give local paths as features and heads "
            "(heads are not needed with linear: false)"
        )
    for file in files:
        if (
            len(file.sha256) == 64
        ):  # torchvision only publishes the first 8 digits, which the download checks
            digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
            if digest != file.sha256:
                raise ValueError(
                    f"{file.path}: sha256 is {digest}, but the published file has {file.sha256}; "
                    "delete the file to download it again"
                )


def _download_missing(files: Sequence[Download]) -> Exception | None:
    try:
        for file in files:
            if not file.path.is_file():
                logger.info("downloading %s to %s", file.url, file.path)
                file.path.parent.mkdir(parents=True, exist_ok=True)
                # downloads to a temporary file, checks its sha256, then renames it
                torch.hub.download_url_to_file(
                    file.url, str(file.path), file.sha256, progress=sys.stderr.isatty()
                )
    except Exception as error:  # of any type, since the other ranks wait in the barrier
        return error
    return None


def _existing(key: str, path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file; give an existing file, or null to download")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about old PyTorch formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise any type for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a file of tensors ({reason}); download the file again"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: contains {type(content).__name__}; give a file with a state dict"
        )
    return {str(k): x.detach().float() for k, x in content.items() if isinstance(x, Tensor)}


def _check_shapes(
    path: Path, what: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    wrong = [f"{key} is missing" for key in shapes if key not in tensors]
    for key, x in tensors.items():
        if key not in shapes:
            wrong.append(f"{key} is unexpected")
        elif x.shape != shapes[key]:
            wrong.append(f"{key} is {tuple(x.shape)}")
    if wrong:
        described = [f"{key} {tuple(shape)}" for key, shape in shapes.items()]
        raise ValueError(
            f"{path}: not {what}: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; "
            f"give a file with {len(shapes)} tensors, {described[0]} to {described[-1]}"
        )
