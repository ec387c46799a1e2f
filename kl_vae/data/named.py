"""Standard datasets that torchvision downloads."""

import warnings
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from kl_vae.data.pixel_format import PixelFormat
from kl_vae.data.pixels import MODE_BY_CHANNELS, WHOLE_IMAGE, Wanted, pil_to_tensor
from kl_vae.runtime.files import display_name

_CLASSES = {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}  # in torchvision.datasets
NAMED = tuple(_CLASSES)


class NamedSource:
    """CIFAR-10 (32 x 32, RGB) or Fashion-MNIST (28 x 28, greyscale), N images.

    Args:
        name: `cifar10` or `fashion-mnist`.
        root: folder of the dataset; it is downloaded to it if missing.
        training: use the training split, otherwise the test split.
        channels: 1 (colour is converted to luminance), 3 (grey is repeated) or 4 (RGBA).

    Raises:
        ValueError: The name or the number of channels is not supported, or the dataset is not in
            `root` and cannot be downloaded.
    """

    def __init__(self, name: str, root: Path, training: bool, channels: int) -> None:
        if name not in _CLASSES:
            raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(NAMED)}")
        if channels not in MODE_BY_CHANNELS:
            raise ValueError(f"{name} can be read with 1, 3 or 4 channels, not {channels}")
        self.channels = channels
        self.pixel_format = PixelFormat()
        from torchvision import datasets  # slow to import

        self._title = f"{name} {'train' if training else 'test'}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from NumPy, about CIFAR-10's old pickles
                data = getattr(datasets, _CLASSES[name])(root, train=training, download=True).data
        except Exception as error:  # from the download, the archive or the pickle
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{name} is not in {display_name(root)} and cannot be downloaded ({reason}): "
                "download it on a machine with network access, or copy its files to that folder"
            ) from error
        self._images = np.asarray(data)  # [N,H,W] or [N,H,W,3], uint8
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def read(self, index: int, wanted: Wanted = WHOLE_IMAGE) -> Tensor:
        """Return [C,H,W], uint8."""
        return pil_to_tensor(Image.fromarray(self._images[index]), self.channels, wanted)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width), the same for every image."""
        height, width = self._images.shape[1:3]
        return height, width

    def name(self, index: int) -> str:
        """Return the image's name in error messages, such as `cifar10 train 17`."""
        return f"{self._title} {index}"

    def key(self, index: int) -> str:
        """Return a file name for the image, such as `0000017.png`."""
        return f"{index:07d}.png"

    def label_text(self, index: int) -> str | None:
        """Return None: the labels are not read."""
        return None

    def state(self, index: int) -> tuple[int, int]:
        """Return the size of the image in bytes, and 0: it is in memory."""
        return self._images[index].nbytes, 0

    def digest(self, index: int) -> str:
        """Return a hash of the image."""
        return blake2b(self._images[index].tobytes(), digest_size=16).hexdigest()

    @property
    def files(self) -> list[Path]:
        """Files that contain the images; empty, because the images are in memory."""
        return []

    def _fingerprint(self) -> str:
        digest = blake2b(f"{self._title} {self._images.shape}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self._images).data)
        return digest.hexdigest()
