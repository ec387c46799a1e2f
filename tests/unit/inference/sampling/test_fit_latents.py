"""The latents that a Gaussian is fitted to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kl_vae.inference.sampling.fit_latents import EncodedImages, StoredLatents, evenly_spaced
from kl_vae.inference.sampling.gaussian_work import GaussianWork

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource, LatentDataset
from kl_vae.inference.progress import Ledger
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.distributed import Ranks

NAMES = ["000.png", "001.png", "bad.png", "002.png"]


@pytest.fixture
def source(tmp_path: Path, make_images: Callable[..., Path]) -> FolderSource:
    """Three images, and a file that is none."""
    folder = make_images(tmp_path / "images", 3)
    (folder / "bad.png").write_bytes(b"nothing of the kind")
    return FolderSource(folder, NAMES, 3)


def test_each_image_has_its_own_sample_whatever_it_is_encoded_with(
    model: AutoEncoderKL, source: FolderSource
) -> None:
    images = EncodedImages(model, source, 16, "fp32", num_workers=0)
    assert images.shape == (2, 4, 4)
    assert len(images) == 4
    first, second = images.read([[0, 2], [3, 1]])
    assert first.latents is not None
    assert second.latents is not None
    ((name, reason),) = first.skipped
    assert name == source.name(2)
    assert reason.startswith("not an image")
    assert [len(first.latents), len(second.latents), len(second.skipped)] == [1, 2, 0]
    (alone,) = images.read([[1]])
    assert alone.latents is not None
    torch.testing.assert_close(alone.latents[0], second.latents[1])
    (none,) = images.read([[2]])
    assert none.latents is None


@pytest.mark.parametrize(
    ("number", "most", "expected"),
    [(10, 4, [0, 2, 5, 7]), (3, 1000, [0, 1, 2]), (5, 1, [0])],
)
def test_evenly_spaced(number: int, most: int, expected: list[int]) -> None:
    assert evenly_spaced(number, most) == expected


def write_latents(folder: Path, model: AutoEncoderKL, source: FolderSource, **config: Any) -> None:
    from kl_vae.inference.encoding.encode import LatentEncoding
    from kl_vae.inference.encoding.stored_latents import EncodeConfig

    from kl_vae.data import ImageDataset

    dataset = ImageDataset(source, 16, 16, flip=False, seed=0, training=False)
    work = LatentEncoding(
        model,
        dataset,
        folder,
        EncodeConfig(dtype="fp32", num_workers=0, **config),
        Ranks(0, 1, torch.device("cpu")),
        "runs/a",
    )
    work.run(lambda *_: None)
    work.finish()


@pytest.mark.parametrize("normalize", [False, True])
def test_stored_moments_give_the_same_latents(
    tmp_path: Path, model: AutoEncoderKL, source: FolderSource, normalize: bool
) -> None:
    good = FolderSource(source.root, ["000.png", "001.png", "002.png"], 3)
    model.latents = LatentNormalization(
        mean=(1.0, -2.0), std=(0.5, 3.0), per_channel=True, scale_factor=2.0
    )
    write_latents(tmp_path / "out", model, good, normalize=normalize)
    stored = StoredLatents(LatentDataset(tmp_path / "out"), model, "model.pt")
    assert (stored.shape, len(stored)) == ((2, 4, 4), 3)
    (expected,) = EncodedImages(model, good, 16, "fp32", 0).read([[0, 1, 2]])
    assert expected.latents is not None
    first, second = stored.read([[0], [1, 2]])
    assert first.latents is not None
    assert second.latents is not None
    torch.testing.assert_close(torch.cat([first.latents, second.latents]), expected.latents)


def test_latents_of_other_models(
    tmp_path: Path, model: AutoEncoderKL, source: FolderSource, caplog: pytest.LogCaptureFixture
) -> None:
    write_latents(tmp_path / "out", model, source, what="mode")
    dataset = LatentDataset(tmp_path / "out")
    stored = StoredLatents(dataset, model, "other.pt")
    stored.warn_of_other_weights(model)
    assert not caplog.messages
    with torch.no_grad():
        model.quant_conv.bias += 1.0
    stored.warn_of_other_weights(model)
    (message,) = caplog.messages
    assert "out: encoded with other weights (runs/a) than those of other.pt, which may" in message

    def other(**changed: Any) -> AutoEncoderKL:
        params = dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, attn_resolutions=[])
        params |= dict(in_channels=3, out_ch=3, resolution=16, z_channels=2)
        return AutoEncoderKL(params | changed, embed_dim=None)

    text = (
        r"out: latents of 2 channels, and those of other.pt have 3; give the checkpoint that they "
        r"were encoded with \(runs/a\), or encode the images again"
    )
    with pytest.raises(ValueError, match=text):
        StoredLatents(dataset, other(z_channels=3), "other.pt")
    with pytest.raises(ValueError, match="out: latents of 4 pixels a latent, and those of other"):
        StoredLatents(dataset, other(ch_mult=[1, 1]), "other.pt")


def test_too_few_images_end_the_work(
    tmp_path: Path, model: AutoEncoderKL, source: FolderSource
) -> None:
    images = EncodedImages(model, FolderSource(source.root, NAMES[1:3], 3), 16, "fp32", 0)
    said: list[str] = []
    ranks = Ranks(0, 1, torch.device("cpu"))
    for covariance, mend in (("low-resolution", ", or --covariance channels"), ("channels", "")):
        work = GaussianWork(images, 2, covariance, 2, said.append)  # type: ignore[arg-type]
        ledger = Ledger(tmp_path / "out", {}, False, ranks)
        records = list(work.do([0], ledger))
        assert records == [{"images": 1, "skipped": 1}]
        if not mend:
            work.check(records, ledger)
            work.finish(records, ledger)
            assert work.latents(0, 0, 6).shape == (2, 6, 6)
            continue
        text = "--covariance low-resolution: needs at least 2 images, and 1 can be used; give"
        with pytest.raises(ValueError, match=f"{text} others, or more{mend}"):
            work.check(records, ledger)
    assert said[0].startswith(f"skipped {source.name(2)}: ")
