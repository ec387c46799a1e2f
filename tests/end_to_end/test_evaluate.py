"""`kl-vae evaluate` as a user types it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kl_vae import AutoEncoderKL
from kl_vae.accel.accelerate import accelerate_as
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from kl_vae.data import to_float
from kl_vae.inference.evaluate import Evaluator
from kl_vae.inference.progress import FOLDER
from kl_vae.losses.lpips import LPIPS
from kl_vae.metrics.moments import latent_moments, latent_normalization
from tests.messages import is_about
from tests.processes import TORCHRUN, run_to_its_end

NUMBER = 20  # images, in units of 8
COMMAND = ["evaluate", "--checkpoint", "a.pt", "b.pt", "--images", "images", "--out", "out"]
COMMAND += ["--num-workers", "0"]


def save(path: str, ddconfig: dict[str, Any], seed: int, scale: float = 1.0) -> AutoEncoderKL:
    """Save one of our checkpoints, as a run does."""
    torch.manual_seed(seed)
    model = AutoEncoderKL(ddconfig, embed_dim=3)
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(scale)
    params = {"ddconfig": ddconfig, "embed_dim": 3, "lossconfig": {"target": "elbo"}}
    content = {"model": model.state_dict(), "config": {"model": {"params": params}}, "step": 7}
    write_checkpoint(Path(path), content)
    return model.eval()


@pytest.fixture
def small_ddconfig(tiny_ddconfig: dict[str, Any]) -> dict[str, Any]:
    """With as little to compute as there can be, f = 2."""
    return {**tiny_ddconfig, "ch_mult": [1, 1], "attn_resolutions": []}


@pytest.fixture
def models(
    tmp_path: Path,
    small_ddconfig: dict[str, Any],
    make_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> list[AutoEncoderKL]:
    """A working directory with a.pt, b.pt and 20 images in `images`."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", NUMBER)
    return [save("a.pt", small_ddconfig, 0, 0.01), save("b.pt", small_ddconfig, 1, 9.0)]


def results(out: str = "out") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(out, "results.json").read_text())
    return content


def lines(out: str = "out") -> list[dict[str, str]]:
    with Path(out, "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def pixels(name: str, crop: Sequence[int]) -> np.ndarray:
    left, top, width, height = crop
    picture = Image.open(name).crop((left, top, left + width, top + height))
    return np.array(picture)


@torch.no_grad()
def reconstructed(model: AutoEncoderKL, image: np.ndarray) -> np.ndarray:
    """In 8 bits, by the model alone, to the same bits as a command with `--fast off`."""
    accelerate_as("off", model)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    y = model.decode(model.encode(x).mode())[0].clamp(-1, 1)
    return ((y + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_figures_are_those_of_the_pictures(
    models: list[AutoEncoderKL], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND, "--resize", "20", "--crop", "16", "--batch-size", "1", "--fast", "off"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["a", "b"]
    assert is_about(printed[-1], 2, NUMBER, "short side 20, center crop 16", "out/results.md")
    assert is_about(printed[1], "PSNR", "short side 20, center crop 16")
    assert is_about(Path("out/results.md").read_text(), "short side 20, center crop 16")
    assert results()["ssim"] == "wang" and is_about(results()["definitions"]["ssim"], "11 x 11")
    assert not Path("out", FOLDER).exists()
    found, of_images = results(), lines()
    assert [line["checkpoint"] for line in of_images] == ["a", "b"] * NUMBER
    for position, model in enumerate(models):
        psnr, ssim, errors = [], [], []
        for line in of_images[position::2]:
            assert (line["width"], line["height"]) == ("16", "16")
            image = pixels(line["path"], (4, 2, 16, 16))  # the short side is 20: as it is
            other = reconstructed(model, image)
            psnr.append(peak_signal_noise_ratio(image, other, data_range=255))
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            ssim.append(
                structural_similarity(image, other, channel_axis=2, data_range=255, **options)
            )
            errors.append(np.square(image / 255.0 - other / 255.0).mean())
            assert float(line["psnr"]) == pytest.approx(psnr[-1], abs=1e-5)
            assert float(line["ssim"]) == pytest.approx(ssim[-1], abs=1e-5)
            assert line["ms_ssim"] == ""
        of_model = found["checkpoints"][position]
        for key, values in {"psnr": psnr, "ssim": ssim}.items():
            assert of_model[key] == {
                "mean": pytest.approx(np.mean(values), abs=1e-5),
                "standard_error": pytest.approx(np.std(values, ddof=1) / math.sqrt(NUMBER)),
                "number": NUMBER,
                "left_out": 0,
            }
        assert of_model["psnr_of_mean_mse"] == pytest.approx(-10 * np.log10(np.mean(errors)))
        assert of_model["ms_ssim"]["mean"] is None
        assert of_model["ms_ssim"]["left_out"] == NUMBER
        text = f"{of_model['psnr']['mean']:.2f} ± {of_model['psnr']['standard_error']:.2f}"
        assert text in printed[1]
        assert text in Path("out/results.md").read_text()
    assert (found["resize"], found["crop"], found["number"]) == (20, 16, NUMBER)
    assert found["checkpoints"][0]["checkpoint"] == "a.pt"
    assert found["definitions"].keys() >= set(of_images[0]) - {
        *("checkpoint", "path", "width", "height")
    }


def test_latents_and_kl(models: list[AutoEncoderKL]) -> None:
    assert main([*COMMAND, "--crop", "12", "--resize", "20", "--metrics", "psnr"]) == 0
    crops = [pixels(f"images/{i:03d}.png", (6, 4, 12, 12)) for i in range(NUMBER)]
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1
    for model, found in zip(models, results()["checkpoints"], strict=True):
        with torch.no_grad():
            posterior = model.encode(x)
        kl = posterior.kl().double()
        assert found["kl_nats"]["mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
        assert found["kl_nats"]["standard_error"] == pytest.approx(
            kl.std().item() / NUMBER**0.5, rel=1e-3
        )
        bits = kl.mean().item() / math.log(2) / 144
        assert found["kl_bits_per_pixel"]["mean"] == pytest.approx(bits, rel=1e-3)
        expected = latent_normalization(latent_moments(posterior))
        assert found["latents"]["mean"] == pytest.approx(expected.mean)
        assert found["latents"]["std"] == pytest.approx(expected.std)
        assert found["latents"]["scale_factor"] == pytest.approx(expected.scale_factor)
        variances = posterior.mean.double().var((0, 2, 3), correction=0)
        active = found["active_channels"]
        assert active["variance_of_posterior_mean"] == pytest.approx(variances.tolist(), rel=1e-3)
        assert (active["number"], active["of"]) == (int((variances > 0.01).sum()), 3)
        assert "ssim" not in found
    numbers = [found["active_channels"]["number"] for found in results()["checkpoints"]]
    assert numbers[1] == 3 > numbers[0]


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(
    models: list[AutoEncoderKL],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("images/005.png").write_bytes(b"no image")
    options = ["--mode", "sample", "--metrics", "psnr"]
    assert main([*COMMAND, *options, "--out", "whole"]) == 1
    assert any(is_about(text, "images/005.png", "PNG") for text in caplog.messages)
    unit, done = Evaluator.unit, list[object]()

    def ended(*args: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(0)
        return unit(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "unit", ended)
        assert main([*COMMAND, *options]) == 130
    assert sorted(path.name for path in Path("out").iterdir()) == [FOLDER]
    assert main([*COMMAND, *options]) == 2
    assert is_about(capsys.readouterr().err, "out/.unfinished", "--resume")
    assert main([*COMMAND, *options, "--seed", "1", "--resume"]) == 2
    assert is_about(capsys.readouterr().err, "out/.unfinished", "seed", 0, 1)
    assert main([*COMMAND, *options, "--resume"]) == 1
    assert bytes_of("out") == bytes_of("whole")
    last = capsys.readouterr().out.splitlines()[-1]
    assert is_about(last, 2, NUMBER - 1, "out/results.md")
    assert results()["skipped"][0]["path"] == "images/005.png"
    # samples are worse than the modes, and others with another seed
    assert main([*COMMAND, "--seed", "1", *options, "--out", "other"]) == 1
    assert lines("other")[0]["psnr"] != lines()[0]["psnr"]


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(models: list[AutoEncoderKL]) -> None:
    assert main([*COMMAND, "--device", "cpu", "--metrics", "psnr", "ssim"]) == 0
    arguments = [*COMMAND, "--device", "cpu", "--metrics", "psnr", "ssim", "--out", "ranks"]
    command = (*TORCHRUN, "--nproc-per-node", "2", "-m", "kl_vae", *arguments)
    code, errors = run_to_its_end(*command)
    assert code == 0, errors
    assert bytes_of("ranks") == bytes_of("out")


def test_whole_images_of_any_size(
    models: list[AutoEncoderKL], make_images: Callable[..., Path]
) -> None:
    make_images(Path("odd"), 2, size=(33, 21))
    make_images(Path("odd/small"), 1, size=(3, 9))
    assert main([*COMMAND, "--images", "odd", "--whole"]) == 0
    of_images = lines()
    assert [line["width"] for line in of_images] == ["33"] * 4 + ["3"] * 2
    assert [line["height"] for line in of_images] == ["21"] * 4 + ["9"] * 2
    assert of_images[-1]["ssim"] == ""
    found = results()
    assert found["crop"] is None
    assert found["checkpoints"][0]["ssim"]["number"] == 2
    x = torch.from_numpy(pixels("odd/000.png", (0, 0, 33, 21))).permute(2, 0, 1)[None]
    padded = torch.nn.functional.pad(x / 127.5 - 1, (0, 1, 0, 1), mode="replicate")
    with torch.no_grad():
        expected = models[0].encode(padded).kl().item()
    assert float(of_images[0]["kl_nats"]) == pytest.approx(expected, rel=1e-5)


def test_grey_images_lpips_and_a_name(
    models: list[AutoEncoderKL],
    small_ddconfig: dict[str, Any],
    make_images: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_images(Path("grey"), 1, mode="L")
    model = save("grey.pt", {**small_ddconfig, "in_channels": 1, "out_ch": 1}, 0)
    features = torchvision.models.squeezenet1_1(weights=None).features.state_dict()
    torch.save(features, "features.pth")
    channels = (64, 128, 256, 384, 384, 512, 512)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    torch.save(heads, "heads.pth")
    command = [*COMMAND, "--checkpoint", "grey.pt", "--images", "grey", "--names", "a|b"]
    command += ["--crop", "20", "--metrics", "lpips", "psnr", "--lpips-net", "squeeze"]
    command += ["--lpips-features", "features.pth", "--lpips-heads", "heads.pth"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert is_about(printed[-1], 1, "out/results.md")
    assert "| a\\|b |" in Path("out/results.md").read_text()
    found = results()["checkpoints"][0]
    assert found["psnr"]["standard_error"] is None
    assert "±" not in printed[1]
    image = pixels("grey/000.png", (2, 0, 20, 20))[:, :, None]
    pair = [torch.from_numpy(x).permute(2, 0, 1) for x in (image, reconstructed(model, image))]
    x, y = (to_float(x)[None].expand(-1, 3, -1, -1) for x in pair)
    distance = LPIPS("squeeze", features="features.pth", heads="heads.pth")(x, y)
    assert found["lpips"]["mean"] == pytest.approx(distance.item(), rel=1e-5)


def test_overflow_in_fp16_is_recomputed_in_fp32(
    models: list[AutoEncoderKL],
    small_ddconfig: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch.no_grad():
        models[0].decoder.conv_in.weight.mul_(1e9)  # a group norm makes nothing of it
    params = {"ddconfig": small_ddconfig, "embed_dim": 3, "lossconfig": {"target": "elbo"}}
    content = {"model": models[0].state_dict(), "config": {"model": {"params": params}}, "step": 7}
    write_checkpoint(Path("large.pt"), content)
    command = [*COMMAND, "--checkpoint", "large.pt", "b.pt", "--metrics", "psnr", "--device", "cpu"]
    assert main([*command, "--include", "00[0-2].png", "--precision", "fp16"]) == 0
    (message,) = caplog.messages
    assert is_about(message, "large", "images/000.png", 2, "NaN", "fp16", "fp32")
    exactly = [*command, "--include", "00[0-2].png", "--out", "exactly"]
    assert main(exactly) == 0
    found, expected = (results(*out)["checkpoints"][0]["psnr"] for out in ([], ["exactly"]))
    assert found["mean"] == pytest.approx(expected["mean"], rel=1e-4)


def test_weights_with_nan_are_an_error(
    models: list[AutoEncoderKL],
    small_ddconfig: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save("bad.pt", small_ddconfig, 0, math.nan)
    assert main([*COMMAND, "--checkpoint", "a.pt", "bad.pt", "--precision", "bf16"]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("kl-vae evaluate: error: ")
    assert is_about(last_line, "bad.pt", "encoder.conv_out.weight", "NaN")


def test_no_readable_image_is_an_error(
    models: list[AutoEncoderKL], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images/bad.png").write_bytes(b"no image")
    assert main([*COMMAND, "--include", "bad.png"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert is_about(last, "error:", 1, "images/bad.png", "PNG")
    assert list(Path("out").iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (["--checkpoint", "a.pt", "./a.pt"], ("a", "names")),
        (["--checkpoint", "none.pt"], ("none.pt", "checkpoint")),
        (["--names", "a"], ("names", 1, 2)),
        (["--names", "a", " "], ("names", "' '")),
        (["--config"] + ["-"] * 3, ("configs", 3, 2)),
        (["--config", "none.yaml"], ("none.yaml",)),
        (["--images", "none"], ("none", "folder")),
        (["--whole", "--crop", "8"], ("crop=8", "whole")),
        (["--resize", "8"], ("resize=8", "crop", 16)),
        (["--out", "images/out"], ("images/out", "images")),
        (["--device", "tpu"], ("'tpu'", "auto, cuda, mps, cpu")),
        (
            ["--metrics", "rfid", "--fid-weights", "none.pth"],
            (
                "fid_weights=none.pth",
                "weights-inception-2015-12-05-6726825d.pth",
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
            ),
        ),
        (
            ["--metrics", "lpips", "--lpips-features", "none.pth"],
            ("features=none.pth", "lpips_features", "lpips_heads"),
        ),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    models: list[AutoEncoderKL],
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    parts: tuple[object, ...],
) -> None:
    before = sorted(Path().rglob("*"))
    assert main([*COMMAND, *changed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kl-vae evaluate: error: ")
    assert is_about(line, *parts)
    assert sorted(Path().rglob("*")) == before


def test_models_that_cannot_be_compared(
    models: list[AutoEncoderKL],
    small_ddconfig: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save("b.pt.grey", {**small_ddconfig, "in_channels": 1, "out_ch": 1}, 0)
    save("large.pt", {**small_ddconfig, "resolution": 32}, 0)
    assert main([*COMMAND, "--checkpoint", "a.pt", "b.pt.grey"]) == 2
    assert is_about(capsys.readouterr().err, "in_channels=3", "a.pt", 1, "b.pt.grey")
    command = [*COMMAND, "--checkpoint", "a.pt", "large.pt"]
    assert main(command) == 2
    assert is_about(capsys.readouterr().err, "resolution=16", 32, "large", "crop", "whole")
    assert not Path("out").exists()
    assert main([*command, "--crop", "16", "--include", "000.png"]) == 0
