"""Images drawn at a validation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource, ImageDataset, list_images
from kl_vae.visual.validation_images import draw_validation_images
from tests.messages import is_about


@pytest.fixture
def val_set(tmp_path: Path, make_images: Callable[..., Path]) -> ImageDataset:
    make_images(tmp_path, 5)
    source = FolderSource(tmp_path, list_images(tmp_path, 3), 3)
    return ImageDataset(source, 16, 18, False, 0, training=False)


def test_unreadable_images_are_skipped(val_set: ImageDataset, tiny_model: AutoEncoderKL) -> None:
    whole = draw_validation_images(tiny_model, val_set, 5)
    paths = sorted(Path(val_set.source.name(i)) for i in range(5))
    paths[0].write_bytes(b"damaged")
    fewer = draw_validation_images(tiny_model, val_set, 5)
    assert whole.keys() == fewer.keys() == {"reconstructions", "prior"}
    height = whole["reconstructions"].shape[1]
    assert 0.7 < fewer["reconstructions"].shape[1] / height < 0.9  # four rows of five


def test_a_prior_that_is_not_finite_is_skipped(
    val_set: ImageDataset, tiny_model: AutoEncoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    decode = tiny_model.decode
    tiny_model.decode = lambda z, *rest: decode(z, *rest) / (z.norm() < 1)  # type: ignore[method-assign]
    assert draw_validation_images(tiny_model, val_set, 1).keys() == {"reconstructions"}
    assert is_about(caplog.text, "prior", "NaN")
    assert torch.is_grad_enabled()
