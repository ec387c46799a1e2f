"""Discriminator, moving average, freezing and equivariance in runs as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_vae import AutoEncoderKL
from kl_vae.cli.main import main
from kl_vae.training.config import RunConfig
from tests.messages import is_about, mentions
from tests.processes import assert_same, checkpoint, metrics

GAN = [
    "model.params.lossconfig={target: ldm.modules.losses.LPIPSWithDiscriminator, params: "
    "{disc_start: 3, kl_weight: 1.0e-6, disc_weight: 0.5, disc_num_layers: 1, disc_ndf: 8, "
    "perceptual_weight: 0.0, lecam_weight: 0.1}}",
    "training.ema_decay=0.9",
]


def train(*arguments: str) -> int:
    return main(["train", "tiny.yaml", *arguments])


def differ(one: dict[str, Tensor], other: dict[str, Tensor], beginning: str) -> list[bool]:
    keys = [key for key in one if key.startswith(beginning)]
    assert keys
    return [not torch.equal(one[key], other[key]) for key in keys]


def test_a_gan_run_logs_what_it_does_and_saves_all_of_it(project: Path) -> None:
    assert train("--run-dir", "run", *GAN) == 0
    lines = [line for line in metrics("run") if "train/psnr" in line]
    assert [("train/d_weight" in line) for line in lines] == [False] * 3 + [True] * 3
    for key in ("logits_real", "logits_fake", "disc_loss", "lecam", "disc_grad_norm", "g_loss"):
        assert [(f"train/{key}" in line) for line in lines] == [False] * 3 + [True] * 3
    assert all(len(line["train/latent_std"]) == 4 for line in lines)
    assert {"train/grad_norm", "train/nll_loss", "train/disc_factor"} <= lines[0].keys()
    validation = metrics("run")[-1]
    for key in ("psnr", "ssim", "rec_loss", "latent_mean"):
        assert f"val/{key}" in validation and f"val_ema/{key}" in validation
    content = checkpoint("run", 6)
    assert len(content["updaters"]) == 2
    assert content["ema"].keys() == {k for k in content["model"] if not k.startswith("loss.")}
    assert content["ema_updates"] == 6
    assert "loss.logits_average" in content["model"]
    assert content["model"]["loss.discriminator.main.3.num_batches_tracked"] == 3 * 3


def test_a_resumed_gan_run_equals_one_never_stopped_bit_for_bit(project: Path) -> None:
    arguments = [*GAN, "training.accumulate_batches=2", "training.equivariance=0.5"]
    arguments += ["training.equivariance_min_scale=0.75"]
    arguments += ["data.recolor=true", "optimizer.name=muon"]
    arguments += ["training.activation_checkpointing=blocks", "model.params.ddconfig.dropout=0.1"]
    assert train("--run-dir", "whole", *arguments) == 0
    for steps in (2, 5, 6):  # before the discriminator and after
        assert train("--run-dir", "parts", *arguments, f"training.max_steps={steps}") == 0
    whole, parts = checkpoint("whole", 6), checkpoint("parts", 6)
    for key in ("model", "ema", "ema_updates", "updaters", "step", "images_seen"):
        assert_same(whole[key], parts[key])
    lines = [{k: v for k, v in x.items() if k != "images_per_second"} for x in metrics("parts")]
    for line in metrics("whole"):
        line.pop("images_per_second", None)
        assert line in lines


def test_another_accumulation_is_named_where_the_weight_depends_on_it(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert train("--run-dir", "run", *GAN, "training.max_steps=1") == 0
    more = ["training.max_steps=2", "training.accumulate_batches=2"]
    assert train("--run-dir", "run", *GAN, *more) == 0
    assert any(is_about(text, "accumulates", 2, 1) for text in caplog.messages)


def test_the_average_is_used_unless_told_otherwise(project: Path, capsys: Any) -> None:
    assert train("--run-dir", "run", *GAN, "optimizer.learning_rate=0.01") == 0
    content = checkpoint("run", 6)
    file = "run/checkpoints/step_00000006.pt"
    averaged = AutoEncoderKL.from_checkpoint(file)
    last = AutoEncoderKL.from_checkpoint(file, ema=False)
    assert_same(dict(averaged.state_dict()), content["ema"])
    assert_same(
        dict(last.state_dict()),
        {key: x for key, x in content["model"].items() if not key.startswith("loss.")},
    )
    pictures = {}
    for flags in ([], ["--no-ema"]):
        out = f"out{len(flags)}"
        command = ["reconstruct", "--checkpoint", file, "--images", "images", "--out", out]
        assert main([*command, *flags]) == 0
        pictures[out] = Path(out, "000.png").read_bytes()
    assert pictures["out0"] != pictures["out1"]

    for flags, expected, words in (([], averaged, "averaged "), (["--no-ema"], last, "")):
        name = f"weights{len(flags)}.pt"
        assert main(["export", "--checkpoint", file, "--out", name, *flags]) == 0
        last_line = capsys.readouterr().out.splitlines()[-1]
        assert is_about(last_line, "step 6", f"{len(content['ema'])} tensors", name)
        assert is_about(last_line, "averaged") == bool(words)
        assert Path(name).stat().st_size < Path(file).stat().st_size / 3
        exported = AutoEncoderKL.from_checkpoint(name)  # knows its architecture
        assert_same(dict(exported.state_dict()), dict(expected.state_dict()))
    assert main(["export", "--checkpoint", "run", "--out", "weights0.pt"]) == 2
    assert is_about(capsys.readouterr().err, "weights0.pt", "exists")
    assert main(["export", "--checkpoint", "images", "--out", "x.pt"]) == 2
    assert is_about(capsys.readouterr().err, "images", "checkpoint")


def test_the_average_can_be_monitored(project: Path) -> None:
    arguments = ["training.ema_decay=0.9", "model.params.monitor=val_ema/psnr"]
    assert train("--run-dir", "run", *arguments, "training.validate_every_steps=2") == 0
    best = json.loads(Path("run/checkpoints/best.json").read_text())
    figures = [line["val_ema/psnr"] for line in metrics("run") if "val_ema/psnr" in line]
    assert best["monitor"] == "val_ema/psnr" and best["value"] == max(figures)


@pytest.mark.slow
def test_a_second_stage_trains_the_decoder_alone_at_a_larger_size(
    project: Path, caplog: Any
) -> None:
    assert train("--run-dir", "small") == 0
    caplog.set_level("INFO")
    second = ["model.params.ckpt_path=small", "data.resize=32", "data.crop=32"]
    second += ["training.freeze=[encoder.*, quant_conv.*]", *GAN]
    assert train("--run-dir", "large", *second) == 0
    before, after = checkpoint("small", 6)["model"], checkpoint("large", 6)["model"]
    for frozen in ("encoder.", "quant_conv."):
        assert not any(differ(before, after, frozen))
    assert all(differ(before, after, "decoder.")) and all(differ(before, after, "post_quant_"))
    count = sum(x.numel() for key, x in after.items() if key.startswith(("decoder.", "post_q")))
    model = ("f = 2", "32 x 32", "4 x 16 x 16", f"{count:,}")
    assert any(is_about(text, *model) for text in caplog.messages)


@pytest.mark.slow
def test_equivariant_latents_turn_with_the_image(project: Path) -> None:
    arguments = ["training.equivariance=1.0", "training.equivariance_min_scale=0.5"]
    assert train("--run-dir", "run", *arguments) == 0
    assert train("--run-dir", "plain") == 0
    assert any(differ(checkpoint("run", 6)["model"], checkpoint("plain", 6)["model"], "decoder."))


LOSS = "model.params.lossconfig.params."
MISTAKES: dict[str, tuple[list[str], tuple[object, ...]]] = {
    "no weights": (
        [f"{LOSS}perceptual_weight=1.0", f"{LOSS}perceptual=squeeze"],
        ("perceptual=squeeze",),
    ),
    "small crop": ([f"{LOSS}disc_num_layers=3"], ("disc_num_layers=3", "16 x 16")),
    "small crop by equivariance": (
        ["training.equivariance=0.5"],
        ("disc_num_layers=1", "4 x 4"),
    ),
    "channels": ([f"{LOSS}disc_in_channels=1"], ("disc_in_channels=1", "[1, 3, 16, 16]")),
    "no condition": ([f"{LOSS}disc_conditional=true"], ("disc_conditional=True", "cond")),
    "frozen last layer": (
        ["training.freeze=[decoder.conv_out.*]"],
        ("disc_weighting=global", "disc_weighting: fixed"),
    ),
    "frozen nothing": (["training.freeze=[enc.*]"], ("training.freeze=enc.*", "encoder.*")),
    "no such average": (
        ["model.params.monitor=val_ema/psnr", "training.ema_decay=null"],
        ("model.params.monitor=val_ema/psnr", "val/psnr"),
    ),
    "decay": (["training.ema_decay=1.0"], ("training.ema_decay=1.0",)),
    "equivariance": (["training.equivariance=2"], ("training.equivariance=2.0",)),
    "scale": (
        ["training.equivariance_min_scale=0"],
        ("training.equivariance_min_scale=0.0",),
    ),
    "discriminator's rate": (
        ["discriminator_optimizer.learning_rate=0"],
        ("discriminator_optimizer.learning_rate=0.0",),
    ),
    "groups": (
        ["model.params.ddconfig.norm_groups=0"],
        ("model.params.ddconfig.norm_groups=0", 1),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_is_one_line_and_writes_nothing(
    mistake: str, project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(project / "empty"))

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    arguments, parts = MISTAKES[mistake]
    assert train("--run-dir", "run", *GAN, *arguments) == 2
    errors = capsys.readouterr().err
    assert is_about(errors, *parts)
    assert len(errors.strip().splitlines()) == 1
    assert not Path("run").exists()


def gan_model(**changes: Any) -> AutoEncoderKL:
    """The model of GAN in `tiny.yaml`, with other weights."""
    config = RunConfig.load("tiny.yaml", GAN)
    lossconfig = config.model.params.lossconfig
    assert lossconfig is not None
    lossconfig["params"].update(changes)
    torch.manual_seed(7)
    return AutoEncoderKL(config.model.params.ddconfig, config.model.params.embed_dim, lossconfig)


def choose(run: str, step: int) -> None:
    """Make the checkpoint of a step the best one of a run."""
    best = {"checkpoint": f"step_{step:08d}.pt"}
    Path(run, "checkpoints", "best.json").write_text(json.dumps(best))


@pytest.mark.parametrize(("best", "discriminator"), [(2, 6), (4, 4), (6, 6)])
def test_an_untrained_discriminator_is_replaced_by_the_newest(
    project: Path, best: int, discriminator: int, caplog: pytest.LogCaptureFixture
) -> None:
    steps = ["training.save_every_steps=2", "training.keep_checkpoints=5"]
    assert train("--run-dir", "run", *GAN, *steps, "training.max_steps=6") == 0
    choose("run", best)
    model = gan_model()
    caplog.clear()
    with caplog.at_level("INFO", "kl_vae"):
        model.init_from_ckpt("run")
    loaded = model.state_dict()
    of_best, of_newest = checkpoint("run", best), checkpoint("run", discriminator)
    for key in loaded.keys() & of_best["ema"].keys():
        assert torch.equal(loaded[key], of_best["ema"][key])
    for key in loaded:
        if key.startswith(("loss.discriminator.", "loss.logits_average")):
            assert torch.equal(loaded[key], of_newest["model"][key])
    said = [m for m in caplog.messages if is_about(m, "discriminator", "step", best)]
    assert len(said) == (best != discriminator)
    assert all(is_about(message, discriminator) for message in said)


def test_a_discriminator_that_no_checkpoint_has_trained_is_said(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train("--run-dir", "run", *GAN, "training.max_steps=2") == 0
    caplog.clear()
    with caplog.at_level("INFO", "kl_vae"):
        gan_model().init_from_ckpt("run")
    assert any(is_about(message, "discriminator", "not trained") for message in caplog.messages)


@pytest.mark.parametrize("norm", ["group", "act", "none"])
def test_a_discriminator_with_another_norm_is_an_error(project: Path, norm: str) -> None:
    assert train("--run-dir", "run", *GAN, "training.max_steps=1") == 0
    model = gan_model(disc_norm=norm)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    error = mentions("loss.discriminator.main", "disc_norm", "ignore_keys=[loss.discriminator]")
    with pytest.raises(ValueError, match=error):
        model.init_from_ckpt("run")
    assert_same(model.state_dict(), before)
    model.init_from_ckpt("run", ignore_keys=["loss.discriminator"])
    assert not any(differ(model.state_dict(), before, "loss.discriminator."))
    assert any(differ(model.state_dict(), before, "encoder."))


@pytest.mark.parametrize("there", [0.0, 0.1])
def test_averages_of_logits_that_only_one_side_has_are_an_error(
    project: Path, there: float
) -> None:
    gan = [GAN[0].replace("lecam_weight: 0.1", f"lecam_weight: {there}"), *GAN[1:]]
    assert train("--run-dir", "run", *gan, "training.max_steps=1") == 0
    model = gan_model(lecam_weight=0.1 - there)
    error = mentions("loss.logits_average", "lecam_weight", "ignore_keys=[loss.logits_average]")
    with pytest.raises(ValueError, match=error):
        model.init_from_ckpt("run")
    model.init_from_ckpt("run", ignore_keys=["loss.logits_average"])


def test_a_run_with_another_norm_writes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--run-dir", "small", *GAN, "training.max_steps=1") == 0
    changed = [GAN[0].replace("disc_start", "disc_norm: group, disc_start"), *GAN[1:]]
    capsys.readouterr()
    assert train("--run-dir", "large", *changed, "model.params.ckpt_path=small") == 2
    assert is_about(capsys.readouterr().err, "small", "loss.discriminator.main", "disc_norm")
    assert not Path("large").exists()
