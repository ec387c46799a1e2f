"""The Frechet distance between the Inception features of images and of their reconstructions.

n images, d features of each (2048), B batch, H and W the image's height and width.

The network is torch-fidelity's: the one of the original code, with TensorFlow's weights and its
resize to 299 x 299, without antialiasing. Other networks and resizes give other values.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kl_vae.metrics.moments import RunningMoments

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
_SHA256 = "6726825d"  # its first digits
_LAYER = "2048"  # after the last pooling


@dataclass(frozen=True)
class FeatureStatistics:
    """The Gaussian that is fitted to n vectors of features, float64.

    Attributes:
        number: n.
        mean: [d].
        factor: R [min(n, d), d], of the covariance R^T R, with n - 1 in its denominator.
    """

    number: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, parts: Callable[[], Iterable[Tensor]]) -> FeatureStatistics:
        """The statistics of features that come in parts [n_i, d].

        Args:
            parts: called once, or twice for few images (n <= d); each time it gives the same
                parts in the same order.

        Raises:
            ValueError: fewer than two images.
        """
        of_parts = (RunningMoments.of(part, covariance=True) for part in parts())
        moments = functools.reduce(RunningMoments.merge, of_parts)
        number, mean = moments.count, moments.mean
        if number < 2:
            raise ValueError(f"rfid: {number} image has no covariance; give at least 2 images")
        if number <= len(mean):
            factor = torch.cat([part.double() - mean for part in parts()])
        else:
            values, vectors = torch.linalg.eigh(moments.squares)
            factor = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
        return cls(number, mean, factor / (number - 1) ** 0.5)


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017).

    |m1 - m2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2)). The eigenvalues of C1 C2 are the squared
    singular values of R1 R2^T, and so the last trace is their sum, whatever the ranks.
    """
    means = (one.mean - other.mean).square().sum()
    traces = one.factor.square().sum() + other.factor.square().sum()
    between = torch.linalg.svdvals(one.factor @ other.factor.T).sum()
    return max(float(means + traces - 2.0 * between), 0.0)


def find_inception(weights: str | Path | None) -> Path:
    """The file of the network's weights; torch.hub's cache has it, or it is downloaded there.

    Raises:
        ValueError: `weights` is no file, or they cannot be downloaded.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"fid_weights={weights}: no such file; give {WEIGHTS} from {URL}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # written beside, its sha256 checked, then renamed
        torch.hub.download_url_to_file(URL, str(path), _SHA256, progress=sys.stderr.isatty())
    except Exception as error:  # any: no network has many faces
        raise ValueError(
            f"rfid: cannot download the weights of its network ({error}); put {WEIGHTS} (from "
            f"{URL}) into {path.parent}, or give it as fid_weights"
        ) from None
    return path


def load_inception(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the network from its file of weights.

    Returns:
        A function of pictures [B, 3, H, W], uint8, that gives their features [B, d], float32, on
        the CPU.

    Raises:
        ValueError: torch-fidelity is not installed, or the file holds something else.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError('rfid needs torch-fidelity: pip install "kl-vae[eval]"') from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # the library unpickles whatever a file holds: it is given what was read here safely
        stream = io.BytesIO()
        torch.save(tensors, stream)
        stream.seek(0)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [_LAYER], feature_extractor_weights_path=stream
        )
    except Exception as error:  # on damaged bytes torch raises any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: not the weights of rfid's network ({reason}); give {WEIGHTS} from {URL}"
        ) from None
    network = network.to(device)

    @torch.inference_mode()
    def features(pictures: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            found: Tensor = network(pictures.to(device))[0]
        return found.float().cpu()

    return features
