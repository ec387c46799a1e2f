"""Folders of latents: their content, and resuming."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource, ImageDataset, LatentDataset, list_images, to_float
from kl_vae.inference import encode as inference_encode
from kl_vae.inference import progress
from kl_vae.inference.encode import (
    EncodeConfig,
    EncodingResult,
    encode_dataset,
    encode_folder,
    measure_latents,
)
from kl_vae.inference.progress import FOLDER, Progress
from kl_vae.latents import LatentNormalization
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.randomness import generator_for
from tests.messages import is_about, mentions
from tests.shards import picture, write_shard

pytest.importorskip("safetensors")

ALONE = Ranks(0, 1, torch.device("cpu"))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONFIG = EncodeConfig(shard_size=3, batch_size=2, num_workers=0, dtype="fp32")
IMAGES = [f"{i:03d}.png" for i in range(7)]
SHARDS = [f"latents-0000{i}-of-00003.safetensors" for i in range(3)]


@pytest.fixture
def images(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    """Seven images of 16 x 16, stored in shards of 3, 3 and 1."""
    return make_images(tmp_path / "images", 7, size=(16, 16))


def dataset_of(folder: Path) -> ImageDataset:
    source = FolderSource(folder, list(list_images(folder, 3)), 3)
    return ImageDataset(source, 16, 16, flip=False, seed=0, training=False)


def encode(
    model: AutoEncoderKL,
    images: Path | ImageDataset,
    out: Path,
    resume: bool = False,
    **changed: Any,
) -> EncodingResult:
    config = dataclasses.replace(CONFIG, **changed)
    dataset = dataset_of(images) if isinstance(images, Path) else images
    return encode_folder(model, dataset, out, config, ALONE, checkpoint="model.pt", resume=resume)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of images in the order in which they are encoded and stored."""
    keys: list[str] = []
    stored_latents = inference_encode.stored_latents

    def record(*args: Any) -> Tensor:
        keys.extend(args[3])
        return stored_latents(*args)

    monkeypatch.setattr(inference_encode, "stored_latents", record)
    return keys


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_batches(model: AutoEncoderKL, folder: Path, mirrored: bool = False) -> Tensor:
    """The moments [7, 4, 4, 4], encoded in the batches of the shards."""
    dataset = dataset_of(folder)
    x = torch.stack([to_float(dataset.source.read(i)) for i in range(len(dataset))])
    x = x.flip(3) if mirrored else x
    with torch.no_grad():
        return torch.cat(
            [model.encode(x[a:b]).parameters for a, b in ((0, 2), (2, 3), (3, 5), (5, 6), (6, 7))]
        )


def stored(folder: Path, view: Any = "latents") -> Tensor:
    return torch.stack([sample.latents for sample in LatentDataset(folder, view)])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_moments_are_stored_bit_for_bit(
    model: AutoEncoderKL, images: Path, tmp_path: Path, dtype: Any
) -> None:
    encode(model, images, tmp_path / "out", dtype=dtype, flip=True)
    expected = in_batches(model, images)
    assert torch.equal(stored(tmp_path / "out"), expected.to(DTYPES[dtype]))
    mirrored = in_batches(model, images, mirrored=True)
    assert not torch.equal(mirrored, expected)
    assert torch.equal(stored(tmp_path / "out", "flipped"), mirrored.to(DTYPES[dtype]))


def test_modes_and_samples(model: AutoEncoderKL, images: Path, tmp_path: Path) -> None:
    encode(model, images, tmp_path / "mode", what="mode")
    mean, logvar = in_batches(model, images).chunk(2, 1)
    assert torch.equal(stored(tmp_path / "mode"), mean)
    encode(model, images, tmp_path / "sample", what="sample", flip=True, seed=5)
    noise = [
        torch.randn(2, 4, 4, generator=generator_for("encode", 5, f"{i:03d}.png", "latents"))
        for i in range(7)
    ]
    sample = mean + (0.5 * logvar).exp() * torch.stack(noise)
    assert torch.equal(stored(tmp_path / "sample"), sample)
    moments = in_batches(model, images, mirrored=True)
    drawn = stored(tmp_path / "sample", "flipped") - moments.chunk(2, 1)[0]
    assert not torch.allclose(drawn / (0.5 * moments.chunk(2, 1)[1]).exp(), torch.stack(noise))


@pytest.mark.parametrize("per_channel", [False, True])
def test_normalised_latents(
    model: AutoEncoderKL, images: Path, tmp_path: Path, per_channel: bool
) -> None:
    model.latents = LatentNormalization(
        scale_factor=0.5,
        shift_factor=0.25,
        mean=(0.5, -1.0),
        std=(2.0, 3.0),
        per_channel=per_channel,
    )
    for what in ("mode", "moments"):
        encode(model, images, tmp_path / what, what=what, normalize=True)
    mean, logvar = in_batches(model, images).chunk(2, 1)
    normalized = model.normalize_latents(mean)
    assert torch.equal(stored(tmp_path / "mode"), normalized)
    stored_mean, stored_logvar = stored(tmp_path / "moments").chunk(2, 1)
    assert torch.equal(stored_mean, normalized)
    # (z - shift) / std of a Gaussian has its variance divided by std^2
    std = torch.tensor([2.0, 3.0]).view(2, 1, 1) if per_channel else torch.tensor(2.0)
    torch.testing.assert_close(stored_logvar.exp(), logvar.exp() / std.square())
    index = LatentDataset(tmp_path / "moments").index
    assert index.settings.normalized and index.settings.normalization is not None
    raw = LatentDataset(tmp_path / "mode").index.statistics
    assert index.statistics == raw  # always of raw latents
    assert raw.mean == pytest.approx(mean.double().mean((0, 2, 3)).tolist(), rel=1e-5)


def test_normalize_needs_a_scale(model: AutoEncoderKL, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions("normalize", "kl-vae encode --statistics")):
        encode(model, images, tmp_path / "out", normalize=True)
    assert not (tmp_path / "out").exists()


class Failing(FolderSource):
    """Raises at one of its images, as if the process were killed."""

    fails_at = 5

    def read(self, index: int) -> Tensor:
        if index == self.fails_at:
            raise RuntimeError("killed")
        return super().read(index)


@pytest.mark.parametrize("fails_at", [1, 5])
def test_a_resumed_run_gives_the_same_files_as_an_uninterrupted_one(
    model: AutoEncoderKL, images: Path, tmp_path: Path, encoded: list[str], fails_at: int
) -> None:
    encode(model, images, tmp_path / "whole", what="sample", labels=False)
    out = tmp_path / "out"
    dataset = dataset_of(images)
    dataset.source = source = Failing(images, [f"{i:03d}.png" for i in range(7)], 3)
    source.fails_at = fails_at
    with pytest.raises(RuntimeError, match="killed"):
        encode(model, dataset, out, what="sample")
    assert not (out / "index.json").exists()
    (out / ".123.tmp").write_bytes(b"left by a killed process")
    with pytest.raises(ValueError, match=mentions(out / FOLDER, "--resume")):
        encode(model, images, out, what="sample")
    with pytest.raises(ValueError, match=mentions(out / FOLDER, "seed", 0, 1, "--out")):
        encode(model, images, out, resume=True, what="sample", seed=1)
    first = (out / SHARDS[0]).stat().st_mtime_ns if fails_at == 5 else None
    encoded.clear()
    result = encode(model, images, out, resume=True, what="sample", batch_size=2)
    assert not result.verified and len(encoded) == (4 if first else 7)
    assert content(out) == content(tmp_path / "whole")
    assert first is None or (out / SHARDS[0]).stat().st_mtime_ns == first  # not written again


def test_damaged_shards_are_done_again(
    model: AutoEncoderKL,
    images: Path,
    tmp_path: Path,
    encoded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    encode(model, images, out)
    before = content(out)
    encoded.clear()
    assert encode(model, images, out, resume=True).verified
    assert content(out) == before and not encoded
    (out / SHARDS[0]).write_bytes(before[SHARDS[0]][:-1] + b"?")
    (out / SHARDS[2]).unlink()
    (out / "index.json").touch()
    with caplog.at_level(logging.WARNING):
        result = encode(model, images, out, resume=True)
    assert not result.verified and encoded == ["000.png", "001.png", "002.png", "006.png"]
    first, third = caplog.messages
    assert is_about(first, SHARDS[0]) and is_about(third, SHARDS[2])
    assert content(out) == before


def test_a_shard_damaged_during_verification_is_encoded_again(
    model: AutoEncoderKL, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    encode(model, images, out)
    before = content(out)

    # a shard is truncated after the verification was killed
    def killed(_: Progress) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Progress, "close", killed)
        encode(model, images, out, resume=True)
    assert (out / FOLDER).exists()
    (out / SHARDS[1]).write_bytes(before[SHARDS[1]][:50])
    encode(model, images, out, resume=True)
    assert content(out) == before


def test_complete_latents_are_not_thrown_away(
    model: AutoEncoderKL, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    encode(model, images, out)
    before = content(out)
    with pytest.raises(ValueError, match=mentions("out", "--resume")):
        encode(model, images, out)
    changes = mentions("out", "dtype", "'fp32'", "'bf16'", "what", "'moments'", "'mode'")
    with pytest.raises(ValueError, match=changes):
        encode(model, images, out, resume=True, dtype="bf16", what="mode")
    torch.nn.init.ones_(model.encoder.conv_in.bias)
    with pytest.raises(ValueError, match=mentions("out", "weights")):
        encode(model, images, out, resume=True)
    assert content(out) == before
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match=mentions("out", SHARDS[0], "index.json")):
        encode(model, images, out, resume=True)


def test_images_that_cannot_be_used_are_left_out(
    model: AutoEncoderKL, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in (0, 1, 2, 4):  # all of the first shard
        (images / f"{i:03d}.png").write_bytes(b"no image")
    result = encode(model, images, tmp_path / "out", flip=True)
    assert result.skipped == 4
    named = [name for name in IMAGES if any(is_about(text, name) for text in caplog.messages)]
    assert named == ["000.png", "001.png", "002.png", "004.png"]
    latents = LatentDataset(tmp_path / "out", "both")
    assert [shard.number for shard in latents.index.shards] == [0, 2, 1]
    assert latents.index.skipped == 4
    bad = [x.name for x in latents.index.shards[0].skipped]
    assert bad == [str(images / f"{i:03d}.png") for i in range(3)]
    assert is_about(latents.index.shards[1].skipped[0].reason, "PNG", "JPEG")
    assert [sample.name for sample in latents] == 2 * ["003.png", "005.png", "006.png"]
    latents.verify()
    for path in images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=mentions(7, "images")):
        encode(model, images, tmp_path / "none")
    assert not content(tmp_path / "none")


def test_values_beyond_fp16(
    model: AutoEncoderKL, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        model.quant_conv.bias[0] = 1e5
    with pytest.raises(ValueError, match=mentions("000.png", "fp16", "--dtype bf16")) as caught:
        encode(model, images, tmp_path / "out", dtype="fp16")
    assert re.search(r"1e\+05|\b1\d{5}|\b9\d{4}", str(caught.value))  # the largest latent
    # an encoder in fp16 overflows, in fp32 it does not
    with caplog.at_level(logging.WARNING):
        encode(model, images, tmp_path / "fp16", dtype="bf16", precision="fp16")
    assert is_about(caplog.messages[0], "000.png", 1, "NaN", "fp16", "fp32")
    expected = in_batches(model, images).bfloat16()
    torch.testing.assert_close(stored(tmp_path / "fp16"), expected)


class Labelled(FolderSource):
    """Images with labels, like those of tar files."""

    texts: Sequence[str | None] = ("3", "0\n", "7", "3", "3", "1", "2")

    def label_text(self, index: int) -> str | None:
        return self.texts[index]


def test_labels_of_folders_and_of_the_source(
    model: AutoEncoderKL, images: Path, tmp_path: Path
) -> None:
    for i, folder in enumerate(["b", "a", "\u00e4", "a", "Z", "b", "b"]):
        (images / folder / "deep").mkdir(parents=True, exist_ok=True)
        (images / f"{i:03d}.png").rename(images / folder / "deep" / f"{i:03d}.png")
    encode(model, images, tmp_path / "out", labels=True)
    latents = LatentDataset(tmp_path / "out")
    assert latents.index.classes == ("Z", "a", "b", "\u00e4")
    assert [(x.label, x.name[-7:]) for x in latents] == [
        (0, "004.png"), (1, "001.png"), (1, "003.png"), (2, "000.png"), (2, "005.png"),
        (2, "006.png"), (3, "002.png"),
    ]  # fmt: skip

    dataset = dataset_of(images)
    paths = dataset.source.paths  # type: ignore[attr-defined]
    dataset.source = source = Labelled(images, paths, 3)
    encode(model, dataset, tmp_path / "given", labels=True)
    given = LatentDataset(tmp_path / "given")
    assert given.index.classes is None
    assert [x.label for x in given] == [3, 0, 7, 3, 3, 1, 2]
    source.texts = ("3", "0", "7", "3", "3", "1", "3")
    with pytest.raises(ValueError, match=mentions("given", "labels")):
        encode(model, dataset, tmp_path / "given", resume=True, labels=True)
    for text, parts in (("-1", ("label", "'-1'", "non-negative")), (None, ("label", "integer"))):
        source.texts = ("3", text, "7", "3", "3", "1", "2")
        with pytest.raises(ValueError, match=mentions(source.name(1), *parts)):
            encode(model, dataset, tmp_path / "bad", labels=True)


def test_a_label_that_cannot_be_read_affects_its_image_only(
    model: AutoEncoderKL, tmp_path: Path
) -> None:
    size = model.config.resolution
    texts = [b"1", b"1" * 5000, b"\xff", b"%d" % 2**63, b"%d" % (2**63 - 1), b"0" * 5000]
    members = {f"{i}.png": picture(i, size, size) for i in range(len(texts))}
    members |= {f"{i}.cls": text for i, text in enumerate(texts)}
    images = write_shard(tmp_path / "a.tar", members)
    result = encode_dataset(model, images, tmp_path / "out", labels=True, num_workers=0)
    assert (result.images, result.skipped) == (3, 3)
    latents = LatentDataset(tmp_path / "out")
    assert {x.name: x.label for x in latents} == {"0.png": 1, "4.png": 2**63 - 1, "5.png": 0}
    skipped = [image for shard in latents.index.shards for image in shard.skipped]
    for image, number, parts in zip(
        skipped, (1, 2, 3), ((5000, "label"), (".cls", "utf-8"), (2**63, 19)), strict=True
    ):
        assert image.name == f"{images}/{number}.png"
        assert is_about(image.reason, *parts)


def test_images_without_a_label(model: AutoEncoderKL, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions("000.png", "label", "--images")):
        encode(model, images, tmp_path / "out", labels=True)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"what": "mean"}, ("what='mean'", "moments", "sample", "mode")),
        ({"dtype": "fp8"}, ("dtype='fp8'", "fp32", "fp16", "bf16")),
        ({"precision": "fp8"}, ("precision='fp8'", "fp32", "bf16", "fp16")),
        ({"shard_size": 0}, ("shard_size=0", 1)),
        ({"batch_size": 0}, ("batch_size=0", 1)),
    ],
)
def test_settings_are_checked(changed: dict[str, Any], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        EncodeConfig(**changed)


def test_a_path_that_cannot_be_written_is_an_error(
    model: AutoEncoderKL, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / SHARDS[0]).mkdir(parents=True)
    (out / FOLDER).mkdir()
    (out / SHARDS[0] / "something").touch()
    with pytest.raises(ValueError, match=mentions(out / SHARDS[0], "--resume")):
        encode(model, images, out)
    (out / SHARDS[0] / "something").unlink()
    (out / SHARDS[0]).rmdir()
    (out / "index.json").mkdir()
    with pytest.raises(ValueError, match=mentions("index.json", "kl-vae encode --out")):
        encode(model, images, out, resume=True)


def test_a_model_in_memory_from_python(model: AutoEncoderKL, images: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "out", tmp_path / "weights.pt"
    options: dict[str, Any] = {"dtype": "fp32", "batch_size": 2, "num_workers": 0}
    result = encode_dataset(model, images, out, shard_size=3, statistics=weights, **options)
    assert (result.images, result.skipped, result.exported, result.verified) == (7, 0, True, False)
    assert torch.equal(stored(out), in_batches(model, images))
    assert model.latents is None  # not modified
    assert AutoEncoderKL.from_checkpoint(weights).latents == result.latents
    with pytest.raises(ValueError, match=mentions("out", "statistics")):
        encode_dataset(model, images)


def test_statistics_alone_match_those_of_the_folder(
    model: AutoEncoderKL, images: Path, tmp_path: Path
) -> None:
    (images / "003.png").write_bytes(b"no image")
    both = encode(model, images, tmp_path / "out", flip=True).latents
    config = dataclasses.replace(CONFIG, batch_size=3, dtype="fp16")
    measured = measure_latents(model, dataset_of(images), config, ALONE)
    assert (measured.images, measured.skipped, measured.index) == (6, 1, None)
    for key, value in dataclasses.asdict(both).items():
        assert dataclasses.asdict(measured.latents)[key] == pytest.approx(value, rel=1e-5), key


def test_without_a_terminal_progress_is_logged(
    model: AutoEncoderKL,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        encode(model, images, tmp_path / "out")
    numbers = [re.findall(r"\d+", message) for message in caplog.messages]
    done = [int(found[0]) for found in numbers if len(found) == 2 and found[1] == "7"]
    assert done == [2, 3, 5, 6, 7]
