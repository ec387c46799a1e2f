"""`kl-vae reconstruct` as a user types it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from kl_vae.data import FolderSource, read_image, to_float
from kl_vae.losses.lpips import LPIPS
from tests.messages import is_about
from tests.tiny import save_tiny_model

RECONSTRUCT = ["reconstruct", "--num-workers", "0"]


def save_images(folder: Path, **sizes: tuple[int, int]) -> None:
    """Save smooth images of (width, height) under names in which __ stands for a dot."""
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        path = folder / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(path)


def tree(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def read_rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def model(tmp_path) -> list[str]:
    return save_tiny_model(tmp_path)


@pytest.fixture
def images(tmp_path) -> Path:
    save_images(tmp_path / "images", a__jpg=(21, 16), a__png=(12, 13), sub_in_b__webp=(9, 30))
    return tmp_path / "images"


def test_a_folder_as_a_user_types_it(tmp_path, model, images):
    (images / "bad.jpg").write_bytes(b"nothing of the kind")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kl_vae", "reconstruct", *model, "--num-workers", "2"]
    command += ["--images", str(images), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert any(is_about(x, f"{images}/bad.jpg", "PNG") for x in done.stderr.splitlines())
    assert tree(out) == [
        "a.png",
        "a.png.png",
        "comparison.png",
        "gallery/originals/a.png",
        "gallery/originals/a.png.png",
        "gallery/originals/sub/b.png",
        "gallery/thumbnails/a.jpg",
        "gallery/thumbnails/a.png.jpg",
        "gallery/thumbnails/sub/b.jpg",
        "index.html",
        "metrics.csv",
        "sub/b.png",
        "summary.json",
    ]
    rows = read_rows(out)
    assert [(row["path"], row["output"], row["width"], row["height"]) for row in rows] == [
        (f"{images}/a.jpg", "a.png", "21", "16"),
        (f"{images}/a.png", "a.png.png", "12", "13"),
        (f"{images}/sub/b.webp", "sub/b.png", "9", "30"),
    ]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in summary["skipped"]] == [f"{images}/bad.jpg"]
    assert (summary["number"], summary["number_without_ssim"]) == (3, 1)
    last_line = done.stdout.splitlines()[-1]
    psnr, ssim = f"{summary['mean_psnr_db']:.2f} dB", f"{summary['mean_ssim']:.3f}"
    figures = ("3 images", "full size", "PSNR", psnr, "SSIM", ssim)
    assert summary["ssim"] == "wang"
    assert is_about(last_line, *figures, out, "comparison.png", f"{out}/index.html")
    # anyone can recompute the figures from the files
    for row in rows:
        with Image.open(row["path"]) as before, Image.open(out / row["output"]) as after:
            pair = np.asarray(before.convert("RGB")), np.asarray(after)
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(*pair), abs=1e-4)
        if row["ssim"]:
            expected = structural_similarity(
                *pair,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
            )
            assert float(row["ssim"]) == pytest.approx(expected, abs=1e-5)


def test_running_again_gives_the_same(tmp_path, model, images):
    out = tmp_path / "out"
    command = [*RECONSTRUCT, *model, "--images", str(images), "--out", str(out)]
    command += ["--mode", "sample", "--seed", "3"]
    assert main(command) == 0
    before = {name: (out / name).read_bytes() for name in tree(out)}
    assert main(command) == 0
    assert {name: (out / name).read_bytes() for name in tree(out)} == before


def test_folders_and_files_with_resize_crop_and_patterns(tmp_path, model, images):
    save_images(tmp_path / "more", a__jpg=(40, 60), c__bmp=(40, 60))
    out = tmp_path / "out"
    command = [*RECONSTRUCT, *model, "--out", str(out), "--grid-size", "1"]
    command += ["--images", str(images), f"{tmp_path}/more/a.jpg", "--include", "*.jpg", "sub/*"]
    command += ["--resize", "12", "--crop", "11", "--exclude", "*.webp"]
    assert main(command) == 0
    assert [(row["path"], row["output"]) for row in read_rows(out)] == [
        (f"{images}/a.jpg", "a.png"),
        (f"{tmp_path}/more/a.jpg", "a.jpg.png"),
    ]
    for name in ("a.png", "a.jpg.png"):
        with Image.open(out / name) as picture:
            assert picture.size == (11, 11)
    with Image.open(out / "comparison.png") as comparison:
        assert comparison.size == (3 * 194 + 2, 20 + 20 + 192 + 2)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_transparent_models(tmp_path, images, channels, mode):
    out = tmp_path / "out"
    command = [
        *RECONSTRUCT,
        *save_tiny_model(tmp_path, in_channels=channels, out_ch=channels),
        "--out",
        str(out),
    ]
    assert main([*command, "--images", str(images / "a.png")]) == 0
    with Image.open(out / "a.png") as picture:
        assert (picture.mode, picture.size) == (mode, (12, 13))


def test_arrays_of_many_channels(tmp_path):
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.random.default_rng(0).random((12, 14, 6)))
    out = tmp_path / "out"
    command = [*RECONSTRUCT, *save_tiny_model(tmp_path, in_channels=6, out_ch=6), "--out", str(out)]
    assert main([*command, "--images", str(tmp_path / "arrays")]) == 0
    assert tree(out) == [
        "a.npy",
        "comparison.png",
        "gallery/originals/a.png",
        "gallery/reconstructions/a.png",
        "gallery/thumbnails/a.jpg",
        "index.html",
        "metrics.csv",
        "summary.json",
    ]
    saved = np.load(out / "a.npy")
    assert (saved.dtype, saved.shape) == (np.float32, (12, 14, 6))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path, model, images, caplog):
    os.rename(images / "a.png", os.fsencode(images) + b"/\xff.png")
    with open(os.fsencode(images) + b"/\xfe.png", "wb") as file:
        file.write(b"bad")
    out = tmp_path / "out"
    assert main([*RECONSTRUCT, *model, "--images", str(images), "--out", str(out)]) == 1
    assert b"\xff.png" in os.listdir(os.fsencode(out))
    assert r"\xff.png" in [row["output"] for row in read_rows(out)]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["skipped"][0]["path"] == rf"{images}/\xfe.png"
    assert any(is_about(message, r"\xfe.png", "PNG") for message in caplog.messages)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"--checkpoint": "{}/none.pt"}, ("none.pt", "checkpoint")),
        ({"--images": "{}/none"}, ("none", "folder")),
        ({"--images": "{}/empty"}, ("empty", "images")),
        ({"--include": "*.gif"}, ("include=['*.gif']", "exclude=[]", 3)),
        ({"--out": "{}/images"}, ("images", "output folder")),
        ({"--out": "{}/images/sub/out"}, ("images/sub/out", "output folder")),
        ({"--out": "{}/model.yaml"}, ("model.yaml", "file")),
        ({"--out": "{}/model.yaml/out"}, ("model.yaml/out",)),
        ({"--images": "{}/images/a.png", "--out": "{}/images"}, ("images/a.png", "overwritten")),
        ({"--device": "tpu"}, ("'tpu'", "auto, cuda, mps, cpu")),
        ({"--quality": "80"}, ("quality=80", "png", "webp", "jpg")),
        ({"--tile": "100"}, ("overlap=128", 0, "tile=100")),
        ({"--overlap": "9"}, ("overlap=9", 2)),
        ({"--lpips-heads": "{}/heads.pth"}, ("lpips_heads", "lpips")),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    tmp_path, model, images, capsys, changed, parts
):
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    arguments = dict(zip(model[::2], model[1::2], strict=True))
    arguments |= {"--images": str(images), "--out": str(tmp_path / "out")}
    arguments |= {key: value.format(tmp_path) for key, value in changed.items()}
    assert main([*RECONSTRUCT, *(word for pair in arguments.items() for word in pair)]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae reconstruct: error: ")
    assert is_about(last_line, *parts)
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_context_is_an_error(tmp_path, model, images, capsys):
    config = yaml.safe_load((tmp_path / "model.yaml").read_text())
    config["model"]["params"]["ddconfig"]["context_channels"] = 5
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    with_context = AutoEncoderKL(**config["model"]["params"])
    torch.save(with_context.state_dict(), tmp_path / "model.pt")
    out = tmp_path / "out"
    assert main([*RECONSTRUCT, *model, "--images", str(images), "--out", str(out)]) == 2
    assert is_about(capsys.readouterr().err, "context_channels=5")


def test_size_and_variant_of_ssim_are_printed(tmp_path, model, images, capsys):
    command = ["reconstruct", *model, "--images", str(images), "--out", str(tmp_path / "out")]
    command += ["--resize", "12", "--crop", "10", "--num-workers", "0", "--ssim", "skimage"]
    assert main(command) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert is_about(last_line, "short side 12, center crop 10", "PSNR", "SSIM (skimage)")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["ssim"], summary["resize"], summary["crop"]) == ("skimage", 12, 10)
    assert summary["number_without_ssim"] == 0


@pytest.mark.parametrize("option", ["--resize", "--max-pixels", "--batch-size", "--tile"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_sizes_are_positive(model, capsys, option, value):
    command = [*RECONSTRUCT, *model, "--images", "images", "--out", "out", f"{option}={value}"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert is_about(capsys.readouterr().err, option, repr(value), 1)


def test_special_files_are_skipped(tmp_path, model, images, caplog):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    names = [f"{tmp_path}/{name}" for name in ("pipe.png", "loop.png", "images/a.png")]
    out = tmp_path / "out"
    assert main([*RECONSTRUCT, *model, "--images", *names, "--out", str(out)]) == 1
    assert [row["path"] for row in read_rows(out)] == names[2:]
    first, second = caplog.messages
    assert is_about(first, names[0], "file")
    assert is_about(second, names[1], "Too many levels of symbolic links")


def test_formats_and_no_gallery(tmp_path, model, images, capsys):
    out = tmp_path / "out"
    command = [*RECONSTRUCT, *model, "--out", str(out), "--images", str(images), "--no-gallery"]
    assert main([*command, "--format", "webp", "--quality", "100"]) == 0
    names = ["a.png.webp", "a.webp", "comparison.png", "metrics.csv", "sub/b.webp", "summary.json"]
    assert tree(out) == names
    with Image.open(out / "a.webp") as picture:
        assert (picture.format, picture.size) == ("WEBP", (21, 16))
    assert main([*command, "--format", "jpg"]) == 2
    assert is_about(capsys.readouterr().err, out, "format", "'webp'", "'jpg'", "--overwrite")
    assert tree(out) == names
    assert main([*command, "--format", "jpg", "--overwrite"]) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["format"], summary["quality"]) == ("jpg", 90)
    assert (summary["fast"], summary["compile"]) == ("auto", False)


@pytest.mark.parametrize(
    ("channels", "options", "parts"),
    [
        (4, ["--format", "jpg"], ("format=jpg", "png", "webp")),
        (6, ["--format", "jpg"], ("format=jpg", "channels", 6)),
        (1, ["--lpips", "vgg"], ("lpips=vgg", "channels", 1)),
    ],
)
def test_formats_and_metrics_that_need_other_channels(tmp_path, capsys, channels, options, parts):
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.zeros((12, 14, channels)))
    command = [
        *RECONSTRUCT,
        *save_tiny_model(tmp_path, in_channels=channels, out_ch=channels),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--images", str(tmp_path / "arrays" / "a.npy")]
    assert main([*command, *options]) == 2
    assert is_about(capsys.readouterr().err, *parts)
    assert not (tmp_path / "out").exists()


def test_interrupted_and_resumed(tmp_path, model, capsys, monkeypatch):
    """Ctrl-C comes when the first of two units is done, and a part of the second."""
    save_images(tmp_path / "images", **{f"{i:02d}__png": (16 + i % 3, 16) for i in range(12)})
    command = [*RECONSTRUCT, *model, "--images", f"{tmp_path}/images", "--batch-size", "2"]
    assert main([*command, "--out", f"{tmp_path}/whole"]) == 0
    command += ["--out", f"{tmp_path}/out"]
    capsys.readouterr()

    read_image, before = FolderSource.read, []

    def interrupted(self, index, wanted):
        if index == 11:
            raise KeyboardInterrupt
        before.append(index)
        return read_image(self, index, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", interrupted)
        assert main(command) == 130
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae reconstruct: ") and is_about(last_line, "--resume")
    assert before == list(range(11))
    assert len(list((tmp_path / "out").glob("*.png"))) == 10

    assert main(command) == 2
    assert is_about(capsys.readouterr().err, "out/.unfinished", "--resume")
    assert main([*command, "--resume", "--mode", "sample"]) == 2
    assert is_about(capsys.readouterr().err, "mode", "'mode'", "'sample'")
    read = []
    monkeypatch.setattr(
        FolderSource,
        "read",
        lambda self, index, wanted: read.append(index) or read_image(self, index, wanted),
    )
    assert main([*command, "--resume", "--grid-size", "1"]) == 0
    psnr = [float(row["psnr"]) for row in read_rows(tmp_path / "out")]
    worst = psnr.index(min(psnr))
    assert read == [*range(8, 12), worst]  # once more, for comparison.png
    assert main([*command, "--resume"]) == 0  # of nothing: all over again
    names = tree(tmp_path / "whole")
    assert tree(tmp_path / "out") == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_begun_again_where_an_unfinished_command_was_removed(tmp_path, model, images):
    out = tmp_path / "out"
    command = [*RECONSTRUCT, *model, "--images", str(images), "--out", str(out)]
    assert main(command) == 0
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "identity.json").write_text("{}")
    assert main(command) == 2
    (out / ".unfinished" / "identity.json").unlink()
    assert main(command) == 0


def test_lpips_from_local_files(tmp_path, model, images, capsys):
    """Random weights: what is measured here is the column, its mean, and what has none."""
    features, heads = tmp_path / "features.pth", tmp_path / "heads.pth"
    torch.manual_seed(0)
    weights = torchvision.models.squeezenet1_1(weights=None).features.state_dict()
    torch.save(weights, features)
    channels = (64, 128, 256, 384, 384, 512, 512)
    content = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    torch.save(content, heads)
    out = tmp_path / "out"
    command = [*RECONSTRUCT, *model, "--images", str(images), "--out", str(out), "--resize", "40"]
    command += ["--lpips", "squeeze", "--lpips-features", str(features)]
    assert main([*command, "--lpips-heads", "none.pth"]) == 2
    errors = capsys.readouterr().err
    assert is_about(errors, "heads=none.pth", "lpips_features", "lpips_heads")
    command += ["--lpips-heads", str(heads)]
    assert main(command) == 0
    values = [float(row["lpips"]) for row in read_rows(out)]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["mean_lpips"] == pytest.approx(sum(values) / 3, abs=1e-5)
    lpips = LPIPS("squeeze", features=features, heads=heads)
    originals = out / "gallery" / "originals"
    x, y = (to_float(read_image(folder / "a.png", 3))[None] for folder in (originals, out))
    assert values[0] == pytest.approx(lpips(x, y).item(), abs=1e-5)
