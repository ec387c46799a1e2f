"""Folders of latents: their content, and resuming."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def replace(path: Path, keep_time: bool = False) -> None:
    """Replace an image by another of the same size in bytes."""
    before, number = path.stat(), path.read_bytes()
    array = np.load(path)
    np.save(path, 1.0 - array)
    assert path.stat().st_size == len(number) and path.read_bytes() != number
    change = 0 if keep_time else 1_000_000_000
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + change))


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Seven arrays of 16 x 16 x 3, stored in shards of 3, 3 and 1."""
    folder = tmp_path / "arrays"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        np.save(folder / f"{i:03d}.npy", rng.random((16, 16, 3), dtype=np.float32))
    return folder


def array_dataset(folder: Path, number: int = 7) -> ImageDataset:
    source = FolderSource(folder, [f"{i:03d}.npy" for i in range(number)], 3)
    return ImageDataset(source, 16, 16, flip=False, seed=0, training=False)


def resumed(
    model: AutoEncoderKL, folder: Path, out: Path, caplog: pytest.LogCaptureFixture, verify: bool
) -> tuple[EncodingResult, list[str]]:
    """Resume; return the result and the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = encode_folder(
            model,
            array_dataset(folder),
            out,
            CONFIG,
            ALONE,
            checkpoint="model.pt",
            resume=True,
            verify=verify,
        )
    return result, list(caplog.messages)


@pytest.mark.parametrize("verify", [False, True])
def test_latents_of_images_that_have_changed_are_encoded_again(
    model: AutoEncoderKL,
    arrays: Path,
    tmp_path: Path,
    encoded: list[str],
    caplog: pytest.LogCaptureFixture,
    verify: bool,
) -> None:
    out = tmp_path / "out"
    encode(model, array_dataset(arrays), out)
    assert resumed(model, arrays, out, caplog, verify) == (
        dataclasses.replace(encode(model, array_dataset(arrays), out, True), verified=True),
        [],
    )
    replace(arrays / "001.npy")
    replace(arrays / "002.npy")
    encoded.clear()
    result, (message,) = resumed(model, arrays, out, caplog, verify)
    assert not result.verified and encoded == ["000.npy", "001.npy", "002.npy"]
    assert is_about(message, SHARDS[0], "001.npy", "002.npy")
    assert not is_about(message, "000.npy")
    encode(model, array_dataset(arrays), tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")
    assert resumed(model, arrays, out, caplog, verify)[0].verified


def test_verify_compares_contents(
    model: AutoEncoderKL, arrays: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    encode(model, array_dataset(arrays), out)
    replace(arrays / "004.npy", keep_time=True)
    assert resumed(model, arrays, out, caplog, verify=False)[0].verified  # cannot be seen
    result, (message,) = resumed(model, arrays, out, caplog, verify=True)
    assert not result.verified and is_about(message, SHARDS[1], "004.npy")
    for path in arrays.iterdir():
        path.touch()  # of the same content
    before = {path.name: path.read_bytes() for path in out.glob("latents-*")}
    for verify in (True, False):  # the new times are recorded
        result, messages = resumed(model, arrays, out, caplog, verify)
        assert result.verified and not messages
    assert {path.name: path.read_bytes() for path in out.glob("latents-*")} == before


def test_a_changed_size_and_a_missing_file_are_changes(
    model: AutoEncoderKL, arrays: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    encode(model, array_dataset(arrays), out)
    (arrays / "000.npy").unlink()
    np.save(arrays / "006.npy", np.zeros((20, 20, 3), np.float32))
    result, messages = resumed(model, arrays, out, caplog, verify=False)
    assert (result.images, result.skipped) == (6, 1)
    assert sum(is_about(x, SHARDS[0], "000.npy") for x in messages) == 1
    assert sum(is_about(x, SHARDS[2], "006.npy") for x in messages) == 1


def test_an_image_that_changes_while_it_is_encoded_is_noticed(
    model: AutoEncoderKL,
    arrays: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored_latents = inference_encode.stored_latents

    def change(*args: Any) -> Tensor:
        if "003.npy" in args[3]:
            replace(arrays / "003.npy")
        return stored_latents(*args)

    with monkeypatch.context() as patch:
        patch.setattr(inference_encode, "stored_latents", change)
        encode(model, array_dataset(arrays), tmp_path / "out")
    for verify in (True, False):
        result, messages = resumed(model, arrays, tmp_path / "out", caplog, verify)
        assert result.verified != verify
        assert [is_about(x, SHARDS[1], "003.npy") for x in messages] == [True] * verify


def test_a_changed_image_of_an_unfinished_folder_is_encoded_again(
    model: AutoEncoderKL, images: Path, tmp_path: Path, encoded: list[str]
) -> None:
    out, dataset = tmp_path / "out", dataset_of(images)
    dataset.source = Failing(images, IMAGES, 3)
    with pytest.raises(RuntimeError, match="killed"):
        encode(model, dataset, out)
    (images / "001.png").write_bytes((images / "006.png").read_bytes())
    encoded.clear()
    encode(model, images, out, resume=True)
    assert encoded == IMAGES
    encode(model, images, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")


def test_a_changed_tar_file_is_a_change_of_its_images(
    model: AutoEncoderKL, arrays: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pack(name: str, first: int, last: int) -> None:
        with tarfile.open(tmp_path / name, "w") as shard:
            for i in range(first, last):
                shard.add(arrays / f"{i:03d}.npy", f"{i:03d}.npy")

    def encode_shards(out: str, **arguments: Any) -> EncodingResult:
        caplog.clear()
        return encode_dataset(
            model,
            [tmp_path / "a.tar", tmp_path / "b.tar"],
            tmp_path / out,
            include=["*.npy"],
            crop=16,
            shard_size=3,
            num_workers=0,
            dtype="fp32",
            **arguments,
        )

    pack("a.tar", 0, 3)
    pack("b.tar", 3, 7)
    encode_shards("out")
    assert encode_shards("out", resume=True).verified
    replace(arrays / "005.npy")
    pack("b.tar", 3, 7)
    result = encode_shards("out", resume=True, verify=True)
    (message,) = caplog.messages[-1:]
    assert not result.verified
    assert is_about(message, SHARDS[1], "b.tar/005.npy") and not is_about(message, "004.npy")
    encode_shards("fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    (tmp_path / "a.tar").touch()
    assert not encode_shards("out", resume=True).verified
    assert any(is_about(x, SHARDS[0], "a.tar/000.npy") for x in caplog.messages)


def test_a_folder_of_a_version_without_the_times_of_its_images(
    model: AutoEncoderKL, arrays: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, dataset = tmp_path / "out", array_dataset(arrays)
    encode(model, dataset, out)
    whole = content(out)
    (out / "sources.jsonl").unlink()
    index = json.loads(whole["index.json"])
    names, index["settings"]["source"] = index["settings"]["source"], dataset.fingerprint
    (out / "index.json").write_text(json.dumps(index))
    result, (message,) = resumed(model, arrays, out, caplog, verify=False)
    assert result.verified and is_about(message, "size")
    assert json.loads((out / "index.json").read_text())["settings"]["source"] == names
    replace(arrays / "000.npy")  # from now on it is noticed
    result, (message,) = resumed(model, arrays, out, caplog, verify=False)
    assert not result.verified and is_about(message, "000.npy")


def test_a_folder_that_lost_the_record_of_its_images(
    model: AutoEncoderKL, arrays: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    encode(model, array_dataset(arrays), out)
    whole = content(out)
    (out / "sources.jsonl").unlink()
    result, messages = resumed(model, arrays, out, caplog, verify=False)
    assert not result.verified
    assert all(is_about(x, "sources.jsonl") for x in messages) and len(messages) == 3
    assert content(out) == whole
    for text in ("[[1]]\n", "{", "[3]", "0.0", "false", '[[Infinity, 1, ""]]'):
        (out / "sources.jsonl").write_text(text)
        with pytest.raises(ValueError, match=mentions("sources.jsonl", "remove it")):
            resumed(model, arrays, out, caplog, verify=False)


def test_verify_needs_a_folder_to_resume(model: AutoEncoderKL, images: Path) -> None:
    for arguments in ({"statistics": "s.pt"}, {"out": "out"}):
        with pytest.raises(ValueError, match=mentions("verify", "resume")):
            encode_dataset(model, images, verify=True, **arguments)  # type: ignore[arg-type]


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
