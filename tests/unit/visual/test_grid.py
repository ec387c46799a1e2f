import numpy as np
import pytest
import torch
from PIL import Image

from kl_vae.visual.grid import (
    comparison_grid,
    image_grid,
    save_png,
    sheet_header,
    sheet_row,
    shortened,
)


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


def columns(row: torch.Tensor, width: int) -> list[torch.Tensor]:
    """The images of a row of a sheet, without the text above and the gap below."""
    lefts = [2 + i * (width + 2) for i in range(3)]
    return [row[:, 20:-2, left : left + width] for left in lefts]


def test_a_row_of_a_sheet_has_cells_of_the_shape_of_its_image():
    for height, width, scaled in [(60, 120, 100), (120, 60, 400), (30, 200, 30)]:
        row = sheet_row("a", "b", plain(100, height, width), plain(90, height, width), 200)
        assert row.shape == (3, 20 + scaled + 2, 3 * 202 + 2)
        for cell, value in zip(columns(row, 200), (100, 90, 40), strict=True):
            assert (cell == value).all()  # no white


def test_a_very_high_image_does_not_make_a_sheet_without_end():
    row = sheet_row("a", "b", plain(100, 4000, 10), plain(90, 4000, 10), 200)
    assert row.shape[1] == 20 + 400 + 2
    assert columns(row, 200)[0][0, 200, 99] == 100


def test_small_images_keep_their_pixels():
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    row = sheet_row("a", "b", image, image, 200)
    assert torch.equal(
        columns(row, 200)[0], image.repeat_interleave(40, 1).repeat_interleave(40, 2)
    )


def test_name_metrics_and_columns_are_written():
    def left_and_right(name, metrics):
        row = sheet_row(name, metrics, plain(0, 10, 10), plain(0, 10, 10), 200)
        dark = (row[0, :20] < 128).any(0).nonzero().flatten()
        return int(dark.min()), int(dark.max()), dark.numel()

    assert left_and_right("name", "")[1] < 100
    assert left_and_right("", "PSNR 20.00 dB")[0] > 500
    assert left_and_right("a longer name", "PSNR")[2] > left_and_right("name", "PSNR")[2]
    left, right, _ = left_and_right("long/" * 100, "PSNR 20.00 dB   SSIM 0.512   LPIPS 0.123")
    assert left < 10 and 600 < right < 606
    header = sheet_header(200)
    assert header.shape == (3, 20, 3 * 202 + 2)
    starts = [(header[0, :, x : x + 30] < 128).any() for x in (2, 204, 406)]
    assert starts == [True] * 3


@pytest.mark.parametrize(
    ("room", "short"), [(9, "abcdefghi"), (8, "abc...hi"), (4, "a..."), (3, "..."), (1, "...")]
)
def test_a_long_name_loses_its_middle(room, short):
    assert shortened("abcdefghi", room, len) == short


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_png_leaves_no_temporary_file(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    pixels = np.asarray(Image.open(tmp_path / "new" / "a.png")).reshape(5, 7, channels)
    assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
