"""Frechet distance between the Inception features of images and of their reconstructions.

The network is the torch-fidelity port of the original, with the TensorFlow weights and its resize
to 299 x 299 without antialiasing. Other networks and resizing methods give other values.

Shapes: n images, d features per image (2048), B batch, H and W image height and width.
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
_SHA256 = "6726825d"  # first digits
_LAYER = "2048"  # output of the last pooling layer


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian fitted to n feature vectors, float64.

    Attributes:
        number: number of images n.
        mean: mean [d].
        factor: R, [min(n, d), d], with the unbiased covariance R^T R (denominator n - 1).
    """

    number: int
    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, parts: Callable[[], Iterable[Tensor]]) -> FeatureStatistics:
        """Compute the statistics of features given in parts [n_i, d].

        Args:
            parts: returns the parts, the same ones in the same order on each call; called once, or
                twice for few images (n <= d).

        Raises:
            ValueError: there are fewer than two images.
        """
        part_moments = (RunningMoments.of(part, covariance=True) for part in parts())
        moments = functools.reduce(RunningMoments.merge, part_moments)
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
    """Compute the squared Frechet distance of two Gaussians.

    |m1 - m2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017).
    The eigenvalues of C1 C2 are the squared singular values of R1 R2^T, so that the last trace is
    the sum of these singular values, for covariances of any rank.
    """
    means = (one.mean - other.mean).square().sum()
    traces = one.factor.square().sum() + other.factor.square().sum()
    between = torch.linalg.svdvals(one.factor @ other.factor.T).sum()
    return max(float(means + traces - 2.0 * between), 0.0)


def find_inception(weights: str | Path | None) -> Path:
    """Return the weights file of the Inception network.

    If `weights` is None, the file is downloaded once to the torch.hub cache.

    Raises:
        ValueError: `weights` is not a file, or the download fails.
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
        # downloads to a temporary file, checks its sha256, then renames it
        torch.hub.download_url_to_file(URL, str(path), _SHA256, progress=sys.stderr.isatty())
    except Exception as error:  # network failures raise many types
        raise ValueError(
            f"rfid: cannot download the Inception weights ({error}); put {WEIGHTS} (from {URL}) "
            f"into {path.parent}, or give the file as fid_weights"
        ) from None
    return path


def load_inception(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the Inception network from its weights file.

    Returns:
        A function that maps uint8 images [B, 3, H, W] to float32 features [B, d] on the CPU.

    Raises:
        ValueError: torch-fidelity is not installed, or the file has other contents.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError('rfid needs torch-fidelity: pip install "kl-vae[eval]"') from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # the library unpickles files without weights_only, so pass it tensors that were read safely
        stream = io.BytesIO()
        torch.save(tensors, stream)
        stream.seek(0)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [_LAYER], feature_extractor_weights_path=stream
        )
    except Exception as error:  # torch.load may raise any type for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: not the Inception weights of rfid ({reason}); give {WEIGHTS} from {URL}"
        ) from None
    network = network.to(device)

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            found: Tensor = network(images.to(device))[0]
        return found.float().cpu()

    return features
