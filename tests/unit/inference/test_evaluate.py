"""`evaluate` from Python, and the short names of checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kl_vae import AutoEncoderKL
from kl_vae.inference.evaluate import evaluate, short_names
from tests.messages import is_about, mentions


@pytest.mark.parametrize(
    ("checkpoints", "names"),
    [
        (["runs/a"], ["a"]),
        (["model.pt"], ["model"]),
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["a/checkpoints/last.pt", "b/checkpoints/last.pt"], ["a", "b"]),
        (["a/step_1.pt", "a/step_2.pt"], ["step_1", "step_2"]),
        (["a/x.pt", "a/x.ckpt"], ["x.pt", "x.ckpt"]),
        (["runs/a", "runs/a/checkpoints/last.pt"], ["a", "a/checkpoints/last.pt"]),
        (["hf://org/sd", "hf://org/sdxl/vae"], ["sd", "sdxl/vae"]),
        (["runs/v1.5", "runs/v2.5"], ["v1.5", "v2.5"]),
        (["a/1/x", "b/1/x", "b/2/x"], ["a/1", "b/1", "b/2"]),
    ],
)
def test_short_names_are_the_parts_that_differ(checkpoints: list[str], names: list[str]) -> None:
    assert short_names(checkpoints) == names


def test_models_are_measured_in_memory(
    model: AutoEncoderKL,
    tmp_path: Path,
    make_images: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make_images(tmp_path / "images", 3, (24, 20))
    (folder / "bad.png").touch()
    before = sorted(tmp_path.rglob("*"))
    found = evaluate([model, model], folder, names=["a", "b"], crop=16, num_workers=0)
    assert sorted(tmp_path.rglob("*")) == before
    assert (found.count, found.folder, found.lpips_net) == (3, None, None)
    ((skipped, reason),) = found.skipped
    assert skipped == f"{folder}/bad.png" and is_about(reason, "empty")
    assert any(is_about(message, f"{folder}/bad.png", reason) for message in caplog.messages)
    a, b = found.models
    assert (a.name, b.name) == ("a", "b")
    assert a.metrics == b.metrics and set(a.metrics) >= {"psnr", "ssim", "kl_nats"}
    assert found.table().splitlines()[0].split() == ["a", "b"]
    assert found.size == "short side 16, center crop 16"
    assert is_about(found.table().splitlines()[1], "PSNR", found.size)
    other = evaluate(model, folder, crop=16, num_workers=0, ssim="skimage")
    assert is_about(other.table(), "SSIM (skimage)")
    assert other.models[0].metrics["ssim"] != a.metrics["ssim"]
    assert other.models[0].metrics["psnr"] == a.metrics["psnr"]
    whole = evaluate(model, folder, whole=True, num_workers=0, metrics=["psnr"])
    assert is_about(whole.table().splitlines()[1], "PSNR", "full size")
    with pytest.raises(ValueError, match=mentions("ssim='other'", "wang", "skimage")):
        evaluate(model, folder, ssim="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=mentions("metrics", "'mse'", "psnr", "ssim")):
        evaluate(model, folder, metrics=["mse"])
    with pytest.raises(ValueError, match=mentions("model", "names")):
        evaluate([model, model], folder)
