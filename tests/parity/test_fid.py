"""The Frechet distance against torch-fidelity and torchmetrics; its network with random weights."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from kl_vae.data import read_image
from kl_vae.metrics.fid import (
    FeatureStatistics,
    find_inception,
    frechet_distance,
    load_inception,
)
from tests.messages import is_about, mentions

inception_module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
torchmetrics_fid = pytest.importorskip("torchmetrics.image.fid")

CPU = torch.device("cpu")


def statistics(features: Tensor, part: int = 7) -> FeatureStatistics:
    return FeatureStatistics.of(lambda: features.split(part))


def two_sets(number: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, number, d, generator=generator)
    return x @ torch.randn(d, d, generator=generator) + 3.0, 1.2 * y + 1.0


@pytest.mark.parametrize(("number", "d"), [(200, 24), (20, 40)])  # of full rank, and not
def test_the_distance_of_torch_fidelity(number: int, d: int) -> None:
    x, y = two_sets(number, d)
    of_each = [metric_fid.fid_features_to_statistics(features.double()) for features in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*of_each, verbose=False)
    measured = frechet_distance(statistics(x), statistics(y))
    assert measured == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert frechet_distance(statistics(y), statistics(x)) == pytest.approx(measured, rel=1e-6)


def test_the_distance_of_torchmetrics() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).requires_grad_(False)
    x, y = torch.rand(2, 60, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = torchmetrics_fid.FrechetInceptionDistance(network, True, True, (3, 4, 4))
    theirs.update(x, real=True)
    theirs.update(y.square(), real=False)
    measured = frechet_distance(statistics(network(x)), statistics(network(y.square())))
    assert measured == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_a_set_has_no_distance_to_itself() -> None:
    x, y = two_sets(30, 64)
    assert frechet_distance(statistics(x), statistics(x, 4)) < 1e-9 * x.var(0).sum()
    assert frechet_distance(statistics(x), statistics(y)) > 1.0


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match=mentions("rfid", 1, 2, "covariance")):
        statistics(torch.zeros(1, 3))


class Random(inception_module.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
    """The network with the weights that its layers begin with."""

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception-v3-compat", ["2048"], nothing)

    def load_state_dict(self, _: Any) -> None:
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights that keep the features' size from layer to layer (He et al. 2015)."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    tensors = Random().state_dict()
    torch.save({k: x * 6**0.5 if x.dim() == 4 else x for k, x in tensors.items()}, path)
    yield path
    path.unlink()  # 96 MB


def test_rfid_of_the_command(
    weights: Path,
    tmp_path: Path,
    tiny_ddconfig: dict[str, Any],
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(Path("images"), 2, size=(16, 16))
    torch.manual_seed(0)
    model = AutoEncoderKL(tiny_ddconfig, embed_dim=3).eval()
    params = {"ddconfig": tiny_ddconfig, "embed_dim": 3, "lossconfig": {"target": "elbo"}}
    content = {"model": model.state_dict(), "config": {"model": {"params": params}}, "step": 7}
    write_checkpoint(Path("model.pt"), content)
    command = ["evaluate", "--checkpoint", "model.pt", "--images", "images", "--out", "out"]
    command += ["--metrics", "rfid", "--fid-weights", str(weights), "--num-workers", "0"]
    assert main(command) == 0
    assert any(is_about(message, "rfid", 2, "biased") for message in caplog.messages)
    found = json.loads(Path("out/results.json").read_text())["checkpoints"][0]
    assert "psnr" not in found
    assert "| rFID |" in Path("out/results.md").read_text()

    theirs = inception_module.FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
    pictures = torch.stack([read_image(f"images/{i:03d}.png", 3) for i in range(2)])
    with torch.no_grad():
        decoded = model.decode(model.encode(pictures / 127.5 - 1).mode()).clamp(-1, 1)
        after = ((decoded + 1) * 127.5).round().byte()
        features = [theirs(images)[0] for images in (pictures, after)]
    expected = frechet_distance(*(statistics(of_images) for of_images in features))
    assert found["rfid"] == pytest.approx(expected, rel=1e-4)


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    text = mentions(path, "rfid", "weights-inception-2015-12-05-6726825d.pth")
    for content in (b"", pickle.dumps(print)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            load_inception(path, CPU)
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=text):
        load_inception(path, CPU)


def test_a_file_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"fc.weight": Harm()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=mentions("weights.pth", "rfid")):
        load_inception(tmp_path / "weights.pth", CPU)
    assert not (tmp_path / "harm").exists()


def test_weights_are_cached_and_the_error_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("kl_vae.metrics.fid.URL", "http://127.0.0.1:9/weights.pth")  # refused
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    url = "http://127.0.0.1:9/weights.pth"
    error = mentions("rfid", cached.name, url, cached.parent, "fid_weights")
    with pytest.raises(ValueError, match=error):
        find_inception(None)
    cached.write_bytes(b"")
    assert find_inception(None) == cached


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    error = mentions("rfid", "torch-fidelity", 'pip install "kl-vae[eval]"')
    with pytest.raises(ValueError, match=error):
        load_inception(tmp_path / "weights.pth", CPU)
