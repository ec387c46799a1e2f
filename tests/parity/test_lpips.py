"""LPIPS against the lpips package with the same weights, and with weights that were trained."""

import math
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from kl_vae.losses.lpips import LPIPS
from kl_vae.losses.lpips_weights import HEADS_SHA256, heads_download

ARCHITECTURES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "weights").is_dir(), reason=f"no trained weights in {SHARED / 'weights'}"
)


def random_features(net: str) -> dict[str, Tensor]:
    """Weights that keep the features' size from layer to layer (He et al. 2015)."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.get_model(ARCHITECTURES[net]).features.state_dict()
    scales = {
        key: math.sqrt(2 / x[0].numel()) if x.dim() == 4 else 0.1 for key, x in shapes.items()
    }
    return {
        key: scales[key] * torch.randn(x.shape, generator=generator) for key, x in shapes.items()
    }


def reference(net: str, linear: bool, features: dict[str, Tensor]) -> Any:
    """The package's module, with random heads, over the given features."""
    torch.manual_seed(1)
    with torch.device("meta"):  # torchvision would draw its classifier, 500 MB of vgg16
        module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, lpips=linear, verbose=False)
    module.scaling_layer = lpips.ScalingLayer()
    own = [key for key in module.net.state_dict() if key.partition(".")[0].startswith("slice")]
    assert len(own) == len(features)
    module.net.load_state_dict({key: features[key.partition(".")[2]] for key in own}, assign=True)
    heads = {
        key: torch.rand(x.shape) for key, x in module.state_dict().items() if key.startswith("lin")
    }
    heads |= {key: heads[key.replace("lins.", "lin")] for key in heads if key.startswith("lins.")}
    module.load_state_dict(heads, strict=False, assign=True)
    assert not any(x.is_meta for x in (*module.parameters(), *module.buffers()))
    return module


def value_and_gradient(distance: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.clone().requires_grad_()
    value = distance(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), y)
    return value.detach(), gradient


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
@pytest.mark.parametrize("size", [(64, 64), (49, 77)])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_lpips(net: str, linear: bool, size: tuple[int, int], tmp_path: Path) -> None:
    features = random_features(net)
    theirs = reference(net, linear, features)
    torch.save(features, tmp_path / "features.pth")
    heads = {
        key: x for key, x in theirs.state_dict().items() if key.startswith("lin") and key[3] != "s"
    }
    torch.save(heads, tmp_path / "heads.pth")
    ours = LPIPS(net, linear, tmp_path / "features.pth", tmp_path / "heads.pth")

    x, y = 2 * torch.rand(2, 2, 3, *size, generator=torch.Generator().manual_seed(2)) - 1
    expected, expected_gradient = value_and_gradient(theirs, x, y)
    value, gradient = value_and_gradient(ours, x, y)
    assert value.shape == expected.shape == (2, 1, 1, 1)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@needs_shared
@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_the_published_heads(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published file passes from the cache, and is the one that the package carries."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    cached = heads_download(net).path
    cached.parent.mkdir()
    cached.write_bytes((SHARED / "weights" / cached.name).read_bytes())
    torch.save(random_features(net), tmp_path / "features.pth")
    module = LPIPS(net, features=tmp_path / "features.pth")
    carried = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    for i, x in enumerate(torch.load(carried, map_location="cpu", weights_only=True).values()):
        assert torch.equal(module.get_buffer(f"head{i}"), x)
        assert (x >= 0).all()
    assert heads_download(net).sha256 == HEADS_SHA256[net]


@needs_shared
def test_trained_features_order_distortions() -> None:
    features = SHARED / "weights" / "squeezenet1_1_caffe_rgbnorm_features.pth"
    distance = LPIPS("squeeze", linear=False, features=features)
    photographs = sorted((SHARED / "data" / "photos" / "val").glob("*.jpg"))[::8]
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in photographs])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)[..., 128:384, 128:384] / 127.5 - 1

    def blurred(sigma: float) -> Tensor:
        return torchvision.transforms.functional.gaussian_blur(x, 25, sigma)

    def noisy(sigma: float) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return (x + sigma * noise).clamp(-1, 1)

    for distort, strengths in ((blurred, (0.5, 1.0, 2.0, 4.0)), (noisy, (0.02, 0.05, 0.1, 0.3))):
        distances = torch.stack([distance(x, distort(s)).flatten() for s in strengths])
        assert (distances[0] > 0).all()
        assert (distances.diff(dim=0) > 0).all()  # for each photograph
    assert (distance(x, x.flip(0)) > distance(x, blurred(0.5))).all()
