"""Random access to stored latents, and errors of invalid folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from kl_vae.data import LatentDataset, LatentSample
from kl_vae.data.latent_format import (
    LatentIndex,
    LatentSettings,
    LatentStatistics,
    ShardEntry,
    read_index,
)
from kl_vae.distribution import DiagonalGaussianDistribution
from tests.messages import is_about, mentions

safetensors_torch = pytest.importorskip("safetensors.torch")

SETTINGS = LatentSettings(
    what="mode",
    dtype="bf16",
    normalized=False,
    flipped=True,
    f=8,
    channels=4,
    crop=16,
    resize=16,
    precision="fp32",
    seed=None,
    images=8,
    shard_size=3,
    labels="0",
    source="1",
    weights="2",
    normalization=None,
)
NUMBERS = (3, 0, 2)  # images per shard
FILES = [f"latents-0000{i}-of-00003.safetensors" for i in range(3)]
KEYS = ["a/0.png", "b \U0001f600/1.png", "\udcff.png", "a/3.png", "4.png"]


def latents(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, 2, 2, generator=generator).bfloat16()


def write_shard(path: Path, tensors: dict[str, torch.Tensor], keys: Any) -> ShardEntry:
    """Write a shard and return its entry of the index."""
    content = safetensors_torch.save(tensors, {"keys": json.dumps(keys)})
    path.write_bytes(content)
    return ShardEntry(
        file=path.name,
        number=len(tensors["latents"]),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        skipped=(),
        values=0,
        mean=(),
        squares=(),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images in three shards, of which one is empty."""
    shards, start = [], 0
    for file, number in zip(FILES, NUMBERS, strict=True):
        part = slice(start, start + number)
        tensors = {
            "latents": latents(0)[part].clone(),
            "flipped": latents(1)[part].clone(),
            "labels": torch.arange(5)[part].clone() * 10,
        }
        shards.append(write_shard(tmp_path / file, tensors, KEYS[part]))
        start += number
    index = LatentIndex(
        checkpoint="model.pt",
        settings=SETTINGS,
        classes=None,
        number=5,
        statistics=LatentStatistics(
            scale_factor=1.0, shift_factor=0.0, mean=(0.0,) * 4, std=(1.0,) * 4
        ),
        shards=tuple(shards),
    )
    (tmp_path / "index.json").write_text(index.to_json())
    assert read_index(tmp_path) == index
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit index.json."""
    content = json.loads((folder / "index.json").read_text())
    edit(content)
    (folder / "index.json").write_text(json.dumps(content))


def assert_is(sample: LatentSample, seed: int, i: int) -> None:
    assert torch.equal(sample.latents, latents(seed)[i])
    assert (sample.label, sample.name) == (10 * i, KEYS[i])


def test_random_access(folder: Path) -> None:
    dataset = LatentDataset(folder)
    assert len(dataset) == 5
    for i in (4, 0, 2, 1, 3, -1):
        assert_is(dataset[i], 0, i % 5)
    assert len(list(dataset)) == 5
    for i in (5, -6):
        with pytest.raises(IndexError, match=mentions(i, 5)):
            dataset[i]
    dataset[0].latents.zero_()  # a copy
    assert_is(dataset[0], 0, 0)
    dataset.verify()
    assert dataset.index.settings == SETTINGS
    for part in (str(folder), "view='latents'", "length=5", "mode [4, 2, 2] bf16", "labels"):
        assert part in repr(dataset)


def test_views_of_flipped_latents(folder: Path) -> None:
    flipped, both = LatentDataset(folder, "flipped"), LatentDataset(folder, "both")
    assert (len(flipped), len(both)) == (5, 10)
    for i in range(5):
        assert_is(flipped[i], 1, i)
        assert_is(both[i], 0, i)
        assert_is(both[5 + i], 1, i)
    with pytest.raises(ValueError, match=mentions("view='left'", "latents, flipped, both")):
        LatentDataset(folder, "left")  # type: ignore[arg-type]


def test_views_and_labels_that_were_not_stored(folder: Path) -> None:
    for file, number in zip(FILES, NUMBERS, strict=True):
        write_shard(folder / file, {"latents": latents(2)[:number].clone()}, KEYS[:number])

    def without(content: dict[str, Any]) -> None:
        content["settings"] |= {"flipped": False, "labels": None}
        for shard in content["shards"]:
            shard["bytes"] = (folder / shard["file"]).stat().st_size

    change(folder, without)
    assert LatentDataset(folder)[4].label == -1
    with pytest.raises(ValueError, match=mentions("flipped", "view='latents'", "encode")):
        LatentDataset(folder, "both")


def test_in_worker_processes(folder: Path) -> None:
    dataset = LatentDataset(folder)
    dataset[0]  # open files are not pickled
    assert_is(pickle.loads(pickle.dumps(dataset))[4], 0, 4)
    loader = DataLoader(
        dataset, batch_size=2, num_workers=1, shuffle=True, multiprocessing_context="fork"
    )
    seen = [
        (label, x)
        for batch in loader
        for label, x in zip(batch.label.tolist(), batch.latents, strict=True)
    ]
    assert sorted(label for label, _ in seen) == [0, 10, 20, 30, 40]
    for label, x in seen:
        assert torch.equal(x, latents(0)[label // 10])


def test_shards_that_are_not_whole(folder: Path) -> None:
    path = folder / FILES[2]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(ValueError, match=mentions(FILES[2], f"{size - 1:,} bytes", f"{size:,}")):
        LatentDataset(folder)
    path.write_bytes(b"\xff" * size)  # of the same size
    dataset = LatentDataset(folder)
    assert_is(dataset[2], 0, 2)
    with pytest.raises(ValueError, match=mentions(folder / FILES[2])):
        dataset[3]
    with pytest.raises(ValueError, match=mentions("1 of 3", FILES[2])):
        dataset.verify()
    path.write_bytes(content)
    assert_is(dataset[3], 0, 3)
    path.unlink()
    with pytest.raises(ValueError, match=mentions(FILES[2], "No such file or directory")):
        LatentDataset(folder)
    with pytest.raises(ValueError, match=mentions("1 of 3", FILES[2])):
        dataset.verify()


@pytest.mark.parametrize(
    ("tensors", "keys"),
    [
        ({"latents": latents(0)[:3, :2].clone()}, KEYS[:3]),
        ({"latents": latents(0)[:3].float()}, KEYS[:3]),
        ({"flipped": latents(0)[:2].clone()}, KEYS[:3]),
        ({"labels": torch.zeros(3)}, KEYS[:3]),
        ({"more": torch.zeros(3)}, KEYS[:3]),
        ({}, KEYS[:2]),
    ],
)
def test_shards_that_differ_from_the_index(
    folder: Path, tensors: dict[str, torch.Tensor], keys: list[str]
) -> None:
    whole = {"latents": latents(0)[:3], "flipped": latents(1)[:3], "labels": torch.arange(3)}
    entry = write_shard(
        folder / FILES[0], {k: x.clone() for k, x in (whole | tensors).items()}, keys
    )
    change(folder, lambda content: content["shards"][0].update(bytes=entry.bytes))
    with pytest.raises(ValueError, match=mentions(folder / FILES[0], "index")):
        LatentDataset(folder)[0]


@pytest.mark.parametrize("keys", [None, 5, [1, 2, 3], ["\ud800", "b", "c"]])
def test_shards_with_invalid_keys(folder: Path, keys: Any) -> None:
    whole = {"latents": latents(0)[:3], "flipped": latents(1)[:3], "labels": torch.arange(3)}
    entry = write_shard(folder / FILES[0], {k: x.clone() for k, x in whole.items()}, keys)
    change(folder, lambda content: content["shards"][0].update(bytes=entry.bytes))
    with pytest.raises(ValueError, match=mentions(folder / FILES[0])):
        LatentDataset(folder)[0]


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda x: x.update(format="other"), ("latents", "kl-vae encode")),
        (lambda x: x.update(version=2), ("version", 2, 1)),
        (lambda x: x.update(number=6), ("number=6", "shards")),
        (lambda x: x["shards"].pop(1), ("shards", 2, 3)),
        (lambda x: x["settings"].update(f=0), ("settings.f=0", 1)),
        (lambda x: x.update({"a\ud800": 1}), ("a\\ud800=1",)),
        (lambda x: x["statistics"]["std"].pop(), ("std", 3, 4)),
        (lambda x: x["statistics"].update(std=[0.0] * 4), ("std", 0)),
        (lambda x: x["statistics"].update(mean=[0.0], std=[1.0]), ("mean", 1, 4)),
        (lambda x: x["settings"].pop("dtype"), ("settings.dtype", "missing")),
        (lambda x: x["settings"].update(what="x"), ("settings.what='x'", "mode")),
        (lambda x: x.update(shards=[1, 2]), ("shards[0]=1", 1)),
        (lambda x: x["shards"][0].update(number=-1), ("number", "bytes", "values", 0)),
        *(
            (lambda x, file=file: x["shards"][0].update(file=file), (f"file='{file}'",))
            for file in (
                "../latents-00000-of-00003.safetensors",
                "/etc/passwd",
                "model.safetensors",
            )
        ),
    ],
)
def test_an_index_of_something_else(
    folder: Path, edit: Callable[[dict[str, Any]], None], parts: tuple[object, ...]
) -> None:
    change(folder, edit)
    with pytest.raises(ValueError, match=mentions("index.json", *parts)) as caught:
        LatentDataset(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00"])
def test_an_index_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    with pytest.raises(ValueError, match=mentions(folder / "index.json", "JSON")):
        LatentDataset(folder)


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    parts = (tmp_path / "none", "index.json", "kl-vae encode --out")
    with pytest.raises(ValueError, match=mentions(*parts)):
        LatentDataset(tmp_path / "none")


def test_without_safetensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    parts = ("safetensors", 'pip install "kl-vae[formats]"')
    with pytest.raises(ValueError, match=mentions(*parts)):
        LatentDataset(folder)


def test_settings_give_shape_and_number_of_shards() -> None:
    assert SETTINGS.shape == (4, 2, 2) and SETTINGS.number_shards == 3
    moments = dataclasses.replace(SETTINGS, what="moments", images=9)
    assert moments.shape == (8, 2, 2) and moments.number_shards == 3


def test_normalized_latents_are_standardized_per_channel(folder: Path) -> None:
    raw, dataset = LatentDataset(folder, "both"), LatentDataset(folder, "both", normalize=True)
    statistics = raw.index.statistics
    mean, std = (torch.tensor(x)[:, None, None] for x in (statistics.mean, statistics.std))
    for stored, sample in zip(raw, dataset, strict=True):
        assert sample.latents.dtype == torch.float32
        torch.testing.assert_close(sample.latents, (stored.latents.float() - mean) / std)
        back = dataset.normalization.denormalize(sample.latents[None])[0]
        torch.testing.assert_close(back, stored.latents.float())
        assert (sample.label, sample.name) == (stored.label, stored.name)
    assert "normalized" in repr(dataset) and "raw" in repr(raw)


def test_normalized_moments_are_moments_of_the_normalized_latents(folder: Path) -> None:
    for file, number in zip(FILES, NUMBERS, strict=True):
        moments = latents(2)[:number].clone()  # z = 2
        tensors = {"latents": moments, "flipped": moments.clone(), "labels": torch.arange(number)}
        write_shard(folder / file, tensors, KEYS[:number])

    def of_moments(content: dict[str, Any]) -> None:
        content["settings"] |= {"what": "moments", "channels": 2}
        content["statistics"] |= {"mean": [1.0, -2.0], "std": [0.5, 4.0]}
        for shard in content["shards"]:
            shard["bytes"] = (folder / shard["file"]).stat().st_size

    change(folder, of_moments)
    given, found = (
        LatentDataset(folder)[1].latents,
        LatentDataset(folder, normalize=True)[1].latents,
    )
    std = torch.tensor([0.5, 4.0])[:, None, None]
    before, after = (DiagonalGaussianDistribution(x[None].float()) for x in (given, found))
    mean = (before.mean - torch.tensor([1.0, -2.0])[:, None, None]) / std
    torch.testing.assert_close(after.mean, mean)
    torch.testing.assert_close(after.std, before.std / std)


def test_latents_are_not_normalized_twice(folder: Path) -> None:
    change(folder, lambda content: content["settings"].update(normalized=True))
    with pytest.raises(ValueError, match=mentions("normalize=True", folder.name)):
        LatentDataset(folder, normalize=True)


READ_ALL = """
import sys
from pathlib import Path
from kl_vae.data import LatentDataset

folder, shard, size = sys.argv[1:]
dataset = LatentDataset(folder)
dataset[0], dataset[4]
with open(Path(folder, shard), "r+b") as file:
    file.truncate(int(size))
try:
    dataset[4]
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_shard_that_is_truncated_while_it_is_read_does_not_kill_the_process(
    folder: Path, size: int
) -> None:
    command = [sys.executable, "-c", READ_ALL, str(folder), FILES[2], str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert is_about(done.stdout, FILES[2], f"{size} bytes")


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_shard_shorter_than_its_header_says_is_named(folder: Path, kept: int) -> None:
    path = folder / FILES[0]
    path.write_bytes(path.read_bytes()[:kept])
    # the index agrees with the truncated file
    change(folder, lambda x: x["shards"][0].update(bytes=path.stat().st_size))
    with pytest.raises(ValueError, match=mentions(path)):
        LatentDataset(folder)[0]
