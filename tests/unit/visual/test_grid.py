import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.visual.grid import comparison_grid, image_grid, save_png


def plain(value: int, height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_a_comparison_is_input_reconstruction_and_four_times_the_difference():
    inputs, reconstructions = [plain(100, 4, 6), plain(0, 4, 6)], [plain(90, 4, 6), plain(80, 4, 6)]
    grid = comparison_grid(inputs, reconstructions)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * 6 + 2, 3 * 8 + 2)
    assert grid[0, 4, [5, 13, 21]].tolist() == [100, 90, 40]
    assert grid[0, 10, [5, 13, 21]].tolist() == [0, 80, 255]  # 320 is clamped


def test_batches_must_have_the_same_length():
    batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert comparison_grid(batch, batch).shape == (3, 14, 20)
    with pytest.raises(ValueError, match="zip"):
        comparison_grid(batch, batch[:1])


def test_images_of_different_sizes_are_centred_on_white():
    grid = image_grid([plain(10, 8, 2), plain(20, 2, 8), plain(30, 8, 8)], columns=2)
    assert grid.shape == (3, 2 * 10 + 2, 2 * 10 + 2)
    assert grid[0, 6, 2:10].tolist() == [255] * 3 + [10] * 2 + [255] * 3
    assert grid[0, 2:10, 16].tolist() == [255] * 3 + [20] * 2 + [255] * 3
    assert grid[0, 16, 6] == 30
    assert (grid[0, 12:, 12:] == 255).all()  # the fourth cell is empty


@pytest.mark.parametrize(("size", "fitted"), [((40, 20), (10, 5)), ((1000, 1), (10, 1))])
def test_large_images_are_downsampled(size, fitted):
    grid = image_grid([plain(50, *size)], columns=1, max_side=10)
    assert grid.shape == (3, fitted[0] + 4, fitted[1] + 4)
    assert (grid[:, 2:-2, 2:-2] == 50).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_png_leaves_no_temporary_file(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    pixels = np.asarray(Image.open(tmp_path / "new" / "a.png")).reshape(5, 7, channels)
    assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
