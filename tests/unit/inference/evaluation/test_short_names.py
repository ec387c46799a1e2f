"""What checkpoints are called side by side."""

import pytest

from kl_vae.inference.evaluation.short_names import short_names


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
def test_names_are_what_differs(checkpoints: list[str], names: list[str]) -> None:
    assert short_names(checkpoints) == names
