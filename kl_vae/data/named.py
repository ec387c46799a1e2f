"""Data sets known by name, which torchvision downloads."""

import warnings
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from kl_vae.data.pixels import EVERYTHING, MODE_BY_CHANNELS, Wanted, pil_to_tensor
from kl_vae.runtime.files import display_name

_CLASSES = {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}  # torchvision's
NAMED = tuple(_CLASSES)


class NamedSource:
    """CIFAR-10 (32 x 32, RGB) or Fashion-MNIST (28 x 28, grey), kept under `root`.

    Downloaded where `root` does not hold it. Colour becomes grey by its
    luminance where `channels` is 1; grey is repeated where it is 3.

    Raises:
        ValueError: the name or the number of channels is unknown, or the data
            set is neither in `root` nor to be had.
    """

    def __init__(self, name: str, root: Path, training: bool, channels: int) -> None:
        if name not in _CLASSES:
            raise ValueError(f"no data set {name!r}: choose one of {', '.join(NAMED)}")
        if channels not in MODE_BY_CHANNELS:
            raise ValueError(f"{name} is read with 1, 3 or 4 channels, not {channels}")
        self.channels = channels
        from torchvision import datasets  # takes as long to import as torch

        self._title = f"{name} {'train' if training else 'test'}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy's, on CIFAR-10's old pickles
                data = getattr(datasets, _CLASSES[name])(root, train=training, download=True).data
        except Exception as error:  # of a downloader, an archive, a pickle
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{name} is not in {display_name(root)} and cannot be downloaded ({reason}): "
                "download it there on a machine with a network, or copy its files there"
            ) from error
        self._images = np.asarray(data)  # [N,H,W] or [N,H,W,3], uint8
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def read(self, index: int, wanted: Wanted = EVERYTHING) -> Tensor:
        """Return [C,H,W], uint8."""
        return pil_to_tensor(Image.fromarray(self._images[index]), self.channels, wanted)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width), the same for every image."""
        height, width = self._images.shape[1:3]
        return height, width

    def name(self, index: int) -> str:
        """Return the image's name in errors: `cifar10 train 17`."""
        return f"{self._title} {index}"

    def key(self, index: int) -> str:
        """Return a file's name for the image: `0000017.png`."""
        return f"{index:07d}.png"

    def label_text(self, index: int) -> str | None:
        """None: the labels are left where they are."""
        return None

    @property
    def files(self) -> list[Path]:
        """None: they are in memory."""
        return []

    def _fingerprint(self) -> str:
        digest = blake2b(f"{self._title} {self._images.shape}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self._images).data)
        return digest.hexdigest()
