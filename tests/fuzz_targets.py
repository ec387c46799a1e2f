"""The valid files that `tests.fuzz` damages, and the functions that read them.

Paths are relative to the working directory, which is a folder of one case.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image

import kl_vae
from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.run_files import best_checkpoint, read_metrics, read_status
from kl_vae.data import LatentDataset
from kl_vae.data.build import build_datasets
from kl_vae.data.config import DataConfig
from kl_vae.data.file_types import IMAGE_EXTENSIONS
from kl_vae.data.sizes import check_sizes
from kl_vae.inference.images import load_images
from kl_vae.inference.latent_folder import class_labels
from kl_vae.inference.sources import open_sources
from kl_vae.runtime.config_file import load_model_params, shipped_configs
from kl_vae.runtime.schema import from_mapping
from kl_vae.training.config import RunConfig
from kl_vae.training.run_directory import RunDirectory
from tests.bad_files import MAX_PIXELS, picture, valid_images
from tests.image_kinds import kinds as image_kinds
from tests.mutations import ODD_VALUES
from tests.shards import picture as png_picture
from tests.shards import write_shard
from tests.tiny import tiny_ddconfig, tiny_model

Files = dict[str, bytes]


@dataclass(frozen=True)
class Example:
    """Valid files that are read together.

    Attributes:
        files: by relative path.
        damage: paths of the files to damage, one of them per case.
        read: reads them, given the path of the damaged file; returns `skipped` if it was reported
            and left out.
        names: texts of which a message contains one, besides that path.
    """

    files: Mapping[str, bytes]
    damage: Sequence[str]
    read: Callable[[str, Random], str | None]
    names: Sequence[str] = ()


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Context manager that changes the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_file(path: Path, content: bytes) -> None:
    """Write a file with a constant time of modification."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (10**9, 10**9))


def read_folder(folder: Path) -> Files:
    """Return the content of all files below a folder, by path relative to its parent."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in paths}


@cache
def model_of(channels: int) -> AutoEncoderKL:
    """Return a tiny model for images of so many channels."""
    return tiny_model(in_channels=channels, out_ch=channels, attn_type="none")


# --- images


def images(folder: Path) -> list[Example]:
    """Images of every format, next to an undamaged one."""
    folder.mkdir()
    examples = []
    for number, kind in enumerate(image_kinds()):
        path = folder / f"{number}{kind.suffix}"
        kind.write(path)
        examples.append(_image(path, kind.channels, dict(kind.settings)))
    for name, content in {**valid_images(), **_optional_images()}.items():
        (folder / name).write_bytes(content)
        examples.append(_image(folder / name, 3, {}))
    return examples


def _optional_images() -> Files:
    """Images of the types that need a plugin, as far as they are installed, and metadata."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for suffix in (".jp2", ".j2k", ".avif", ".heic", ".jxl", ".mpo", ".gif", ".apng"):
        if suffix in IMAGE_EXTENSIONS:
            stream = io.BytesIO()
            kind = {".apng": "PNG", ".mpo": "JPEG"}.get(
                suffix, Image.registered_extensions().get(suffix)
            )
            picture().save(stream, kind)
            found[f"of_type{suffix}"] = stream.getvalue()
    for suffix, kind in ((".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP")):
        stream = io.BytesIO()
        picture().save(stream, kind, exif=exif)
        found[f"turned{suffix}"] = stream.getvalue()
    return found


def _image(path: Path, channels: int, settings: dict[str, Any]) -> Example:
    content = path.read_bytes()
    names = [f"images/a{path.suffix}", f"images/b{path.suffix}"]
    read = partial(read_images, "images", channels, settings)
    return Example(dict.fromkeys(names, content), names[:1], read, names)


def read_images(
    root: str, channels: int, settings: Mapping[str, Any], name: str, draw: Random
) -> str | None:
    """Read images as training and as `kl_vae.reconstruct` do."""
    source, _ = open_sources(
        [root],
        channels,
        ["*", "*.npy"],
        (),
        MAX_PIXELS,
        settings.get("range", "auto"),
        settings.get("pages"),
    )
    for loaded in load_images(source, range(len(source))):
        if loaded.image is None:
            assert loaded.reason.isprintable() and 0 < len(loaded.reason) < 5000, loaded.reason
        else:
            _check_image(loaded.image, channels, None)
        source.digest(loaded.index)
    if draw.random() < 0.03:
        kl_vae.reconstruct(
            model_of(channels),
            root,
            "out",
            include=["*", "*.npy"],
            max_pixels=MAX_PIXELS,
            value_range=settings.get("range", "auto"),
            pages=settings.get("pages"),
            num_workers=0,
            tiling="whole",
        )
    config = from_mapping(
        DataConfig,
        {
            "train": {"root": root, "include": ["*", "*.npy"]},
            "validation": {"fraction": 0.0},
            "resize": draw.choice((None, 10, 20)),
            "crop": 8,
            "recolor": True,
            "num_workers": 0,
            "max_pixels": MAX_PIXELS,
            **settings,
        },
    )
    dataset, _ = build_datasets(config, channels, 8, seed=0)
    dataset.keep(check_sizes(dataset, config, "training"))
    samples = [dataset[0, index, 0] for index in range(len(dataset))]
    for sample in samples:
        _check_image(sample.image, channels, 8)
        assert all(bad.reason and bad.reason.isprintable() for bad in sample.bad), sample.bad
    return "skipped" if any(sample.bad for sample in samples) else None


def _check_image(image: torch.Tensor, channels: int, side: int | None) -> None:
    assert image.shape[0] == channels and (side is None or image.shape[1:] == (side, side))
    if image.dtype != torch.uint8:
        assert image.dtype == torch.float32 and image.abs().max() <= 1.0, "not within [-1, 1]"


# --- tar shards


def tars(folder: Path) -> list[Example]:
    """Shards of every tar format, with labels, long names, arrays and further members."""
    array = io.BytesIO()
    np.save(array, np.full((20, 20, 3), 9, np.uint8))
    members = {
        "0/a.png": png_picture(0),
        "0/a.cls": b"3",
        "0/b.input.png": png_picture(1),
        "0/b.cls": b" 4\n",
        f"{'long/' * 40}c.png": png_picture(2),
        f"{'long/' * 40}c.cls": b"5",
        "d.json": b"{}",
        "é.npy": array.getvalue(),
        "é.cls": b"6",
    }
    examples = []
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        content = write_shard(folder / "a.tar", members, format).read_bytes()
        short = {f"z/{key}": x for key, x in members.items() if len(key) < 90}
        other = write_shard(folder / "b.tar", short, tarfile.USTAR_FORMAT).read_bytes()
        for shard in (content, other, content + other):
            examples.append(Example({"shards/a.tar": shard}, ["shards/a.tar"], read_shard))
    return examples


def read_shard(name: str, draw: Random) -> str | None:
    """Read images and labels of a shard."""
    source, _ = open_sources(["shards"], 3, ["*", "*.npy"], (), MAX_PIXELS)
    labels = []
    for index in range(len(source)):
        assert source.name(index).isprintable()
    try:
        labels = class_labels(source).values.tolist()
    except ValueError as error:
        assert any(source.name(i) in str(error) for i in range(len(source))), error
    assert all(label >= -1 for label in labels)
    return read_images("shards", 3, {}, name, draw)


# --- configs


def yamls(folder: Path) -> list[Example]:
    """Shipped configs, that of a run, and those of latent-diffusion and generative-models."""
    texts = {path.name: path.read_bytes() for path in shipped_configs().values()}
    run = make_run(folder)
    texts["run.yaml"] = run["run/config.yaml"]
    texts |= {f"{name}.yaml": yaml.safe_dump(x).encode() for name, x in published_configs().items()}
    examples = [
        Example({"a.yaml": text}, ["a.yaml"], read_config, ["a.yaml", "=", ": required"])
        for text in texts.values()
    ]
    examples.append(Example(run, ["run/config.yaml"], read_run_config, ["run"]))
    return examples


def published_configs() -> dict[str, dict[str, Any]]:
    """Return configs as of latent-diffusion and of generative-models, with small models."""
    stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 2,
            "monitor": "val/rec_loss",
            "ddconfig": tiny_ddconfig(),
            "lossconfig": {
                "target": "ldm.modules.losses.LPIPSWithDiscriminator",
                "params": {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5},
            },
        },
    }
    coder = {"target": "sgm.modules.diffusionmodules.model.Encoder", "params": tiny_ddconfig()}
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 6}}
    trainer = {"trainer": {"accumulate_grad_batches": 2, "max_epochs": 1000}}
    return {
        "ldm": {
            "model": {"base_learning_rate": 4.5e-6, **stage},
            "data": data,
            "lightning": trainer,
        },
        "diffusion": {
            "model": {
                "base_learning_rate": 1e-4,
                "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
                "params": {"scale_factor": 0.18215, "first_stage_config": stage},
            },
            "data": data,
            "training": {"max_steps": 10},
        },
        "sgm": {
            "model": {
                "base_learning_rate": 4.5e-6,
                "target": "sgm.models.autoencoder.AutoencodingEngine",
                "params": {
                    "input_key": "jpg",
                    "monitor": "val/loss/rec",
                    "encoder_config": coder,
                    "decoder_config": {
                        "target": "sgm.modules.diffusionmodules.model.Decoder",
                        "params": "${model.params.encoder_config.params}",
                    },
                    "regularizer_config": {"target": "a.DiagonalGaussianRegularizer"},
                    "loss_config": {
                        "target": "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator",
                        "params": {
                            "perceptual_weight": 0.0,
                            "disc_start": 20001,
                            "regularization_weights": {"kl_loss": 0.5},
                        },
                    },
                },
            },
        },
    }


_KEYS = ("data.train.root", "data.range", "data.crop", "training.max_steps", "optimizer.betas")
_KEYS += ("model.params.ddconfig.ch_mult", "model.params.latents", "training.freeze", "model", "x")


def read_config(name: str, draw: Random) -> None:
    """Read a config with overrides, and the model's part of it."""
    overrides = []
    if draw.random() < 0.3:
        value = draw.choice(ODD_VALUES)
        text = value if isinstance(value, str) else json.dumps(value)
        overrides.append(f"{draw.choice(_KEYS)}={text}")
    try:
        load_model_params(name)
    except ValueError:
        pass
    RunConfig.load(name, overrides)


def read_run_config(name: str, draw: Random) -> None:
    """Compare a config with that of a run to resume."""
    config = from_mapping(RunConfig, run_config())
    run = RunDirectory(Path("run"))
    run.pixel_range()
    run.check(asdict(config))


# --- runs and checkpoints


def run_config() -> dict[str, Any]:
    """Return the config of a tiny run on `images`."""
    return {
        "model": {
            "params": {
                "embed_dim": 2,
                "monitor": "val/rec_loss",
                "lossconfig": {"target": "elbo", "params": {"kl_weight": 1e-4}},
                "ddconfig": tiny_ddconfig(attn_type="none"),
            }
        },
        "data": {"train": {"root": "images"}, "validation": {"fraction": 0.3}, "num_workers": 0},
        "training": {
            "global_batch_size": 2,
            "max_steps": 2,
            "log_every_steps": 1,
            "ema_decay": 0.9,
        },
    }


def make_run(folder: Path) -> Files:
    """Train two steps; return the files of the run and of its images, the same every time."""
    (folder / "images").mkdir(parents=True)
    for number in range(6):
        (folder / "images" / f"{number}.png").write_bytes(png_picture(number))
    with working_in(folder):
        kl_vae.train(run_config(), "run", device="cpu")
    shutil.rmtree(folder / "run" / "samples")
    files = {**read_folder(folder / "images"), **read_folder(folder / "run")}
    for name in ("status.json", "history.jsonl", "metrics.jsonl"):
        text = files[f"run/{name}"].decode()
        text = re.sub(r'"(time|pid|images_per_second)": ("[^"]*"|[\d.]+)', r'"\1": 1', text)
        files[f"run/{name}"] = text.encode()
    return files


def checkpoints(folder: Path) -> list[Example]:
    """Checkpoints of runs, and weights in every layout."""
    run = make_run(folder)
    checkpoint = next(name for name in run if name.endswith(".pt"))
    whole = {name: x for name, x in run.items() if not name.endswith(".sha256")}
    best = "run/checkpoints/best.json"
    resumed = [checkpoint] * 6 + [best, "run/metrics.jsonl", "run/status.json", "run/history.jsonl"]
    examples = [
        Example(whole, [checkpoint, checkpoint, best], partial(load_weights, "run"), ["run"]),
        Example(whole, resumed, resume, ["run"]),
        Example({"a.pt": run[checkpoint]}, ["a.pt"], partial(load_weights, "a.pt")),
    ]
    torch.manual_seed(0)
    model = tiny_model(attn_type="vanilla")
    for legacy in (False, True):
        stream = io.BytesIO()
        content = {"state_dict": model.state_dict(), "epoch": 3, "hyper_parameters": {"a": [1]}}
        torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
        files = {"a.ckpt": stream.getvalue()}
        examples.append(Example(files, ["a.ckpt"], partial(load_weights, "a.ckpt")))
    (folder / "model.pt").write_bytes(run[checkpoint])
    kl_vae.export(folder / "model.pt", folder / "a.safetensors")
    files = {"a.safetensors": (folder / "a.safetensors").read_bytes()}
    examples.append(Example(files, list(files), partial(load_weights, "a.safetensors")))
    kl_vae.convert(folder / "model.pt", folder / "vae", to="diffusers")
    files = read_folder(folder / "vae")
    weights = next(name for name in files if name.endswith(".safetensors"))
    paths = ["vae/config.json", weights]
    examples.append(Example(files, paths, partial(load_weights, "vae"), ["vae"]))
    examples.append(_sharded(files, weights))
    return examples


def _sharded(files: Mapping[str, bytes], weights: str) -> Example:
    """Return the same folder with its weights in two files and an index."""
    from safetensors.torch import load, save

    tensors = load(files[weights])
    names = sorted(tensors)
    stem = weights.removesuffix(".safetensors")
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    sharded = {name: x for name, x in files.items() if name != weights}
    weight_map = {}
    for shard, part in zip(shards, parts, strict=True):
        sharded[shard] = save({name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, Path(shard).name)
    index = f"{weights}.index.json"
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    sharded[index] = json.dumps(content).encode()
    damage = ["vae/config.json", index, index, *shards]
    return Example(sharded, damage, partial(load_weights, "vae"), ["vae"])


def load_weights(path: str, name: str, draw: Random) -> None:
    """Load a model and use it."""
    model = AutoEncoderKL.from_checkpoint(path, ema=draw.random() < 0.5)
    channels = model.config.in_channels
    with torch.no_grad():
        latents = model.encode(torch.zeros(1, channels, 16, 16)).mode()
        assert model.decode(latents).shape == (1, model.config.out_ch, 16, 16)
        if model.latents is not None:
            model.normalize_latents(latents)


def resume(name: str, draw: Random) -> None:
    """Resume a run for one more step."""
    kl_vae.train("run", overrides=["training.max_steps=3"], device="cpu")


# --- metrics


def metrics(folder: Path) -> list[Example]:
    """The files that a report reads."""
    run = make_run(folder)
    lines = [{"step": i, "train/psnr": 20.0 + i, "val/latent_mean": [0.1, 0.2]} for i in range(30)]
    run["run/bad_images.txt"] = b"images/x.png\tdamaged\n"
    run["run/metrics.jsonl"] += "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {name: x for name, x in run.items() if not name.endswith((".pt", ".png"))}
    files["run/checkpoints/step_00000002.pt"] = b""
    files |= {f"other/{name[4:]}": x for name, x in files.items() if name.startswith("run/")}
    names = ("config.yaml", "metrics.jsonl", "metrics.jsonl", "status.json", "history.jsonl")
    damage = [f"run/{name}" for name in (*names, "checkpoints/best.json", "bad_images.txt")]
    return [Example(files, damage, read_run, ["run"])]


def read_run(name: str, draw: Random) -> None:
    """Report on a run, alone and compared with another."""
    run = Path("run")
    best_checkpoint(run)
    read_status(run)
    assert all(type(line["step"]) is int for line in read_metrics(run))
    runs, page = draw.choice(((["run"], "run/report.html"), (["run", "other"], "page.html")))
    result = kl_vae.report(runs, page, embed=draw.random() < 0.5)
    text = Path(page).read_bytes().decode()
    assert text.rstrip().endswith("</html>"), text[-100:]
    assert all(line.isprintable() for line in result.text.splitlines()), result.text


# --- latents and other results


def latents(folder: Path) -> list[Example]:
    """Folders of latents, and results that are not finished."""
    images = {f"images/x/{number}.png": png_picture(number) for number in range(6)}
    for name, content in images.items():
        write_file(folder / name, content)
    with working_in(folder):
        encode(resume=False)
        latents = read_folder(Path("latents").resolve())
        reconstruct(resume=False)
        results = read_folder(Path("results").resolve())
        for path, write in (("latents", encode), ("results", reconstruct)):
            shutil.rmtree(path)
            with mock.patch("kl_vae.inference.progress.Progress.close", side_effect=_Killed):
                with suppress(_Killed):
                    write(resume=False)
        unfinished = {**read_folder(Path("latents").resolve())}
        unfinished_results = {**read_folder(Path("results").resolve())}
    shards = [name for name in latents if name.endswith(".safetensors")]
    index = "latents/index.json"
    return [
        Example(latents, [index] * 4 + shards, read_latents, ["latents"]),
        _resumed(images, latents, [index, "latents/sources.jsonl", shards[0]], encode, "latents"),
        _resumed(images, unfinished, _records(unfinished), encode, "latents"),
        _resumed(images, results, ["results/summary.json"], reconstruct, "results"),
        _resumed(images, unfinished_results, _records(unfinished_results), reconstruct, "results"),
    ]


class _Killed(BaseException):
    """The end of a command that is killed."""


def _records(files: Files) -> list[str]:
    return [name for name in files if "/.unfinished/" in name and name.endswith(".json")]


def _resumed(
    images: Files, files: Files, damage: list[str], write: Callable[..., None], name: str
) -> Example:
    def read(_: str, draw: Random) -> None:
        write(resume=True)

    return Example({**images, **files}, damage, read, [name])


def encode(resume: bool) -> None:
    """Encode images, or complete or verify the latents."""
    kl_vae.encode_dataset(
        model_of(3),
        "images",
        "latents",
        crop=16,
        flip=True,
        labels=True,
        shard_size=4,
        num_workers=0,
        resume=resume,
    )


def reconstruct(resume: bool) -> None:
    """Reconstruct images, or complete the results."""
    kl_vae.reconstruct(
        model_of(3), "images", "results", num_workers=0, gallery=False, resume=resume
    )


def read_latents(name: str, draw: Random) -> None:
    """Read all latents, as stored and normalised."""
    for normalize in (False, True):
        dataset = LatentDataset("latents", "both", normalize=normalize)
        repr(dataset)
        for index in range(min(len(dataset), 100)):
            sample = dataset[index]
            assert isinstance(sample.name, str) and type(sample.label) is int
        dataset.verify()


KINDS: Mapping[str, Callable[[Path], list[Example]]] = {
    "images": images,
    "tars": tars,
    "yaml": yamls,
    "checkpoints": checkpoints,
    "metrics": metrics,
    "latents": latents,
}
