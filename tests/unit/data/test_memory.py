"""Compare the memory of reading one file with the docstring of `read_image`."""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kl_vae.data.tiff import MAX_TILES
from tests.bad_files import bombs, large_metadata, png, tiff, zeros

MB = 2**20
DTYPES = ("u1", "<u2", ">f4", "<f8")
# each file is read in a fork of one process with all imports done
SCRIPT = """
import json, os, sys
import torch
from PIL import Image
from kl_vae.data import ImageError, read_image

torch.set_num_threads(1)
Image.init()

def peak(read):
    child = os.fork()
    if child == 0:
        try:
            read()
        except ImageError:
            pass
        finally:
            os._exit(0)
    status, usage = os.wait4(child, 0)[1:]
    assert status == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

for line in sys.stdin:
    files, channels, max_pixels = json.loads(line)
    nothing = peak(lambda: None)
    taken = {file: peak(lambda: read_image(file, channels, max_pixels)) - nothing for file in files}
    print(json.dumps(taken), flush=True)
"""


Memory = Callable[[list[Path], int, int], dict[str, int]]


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    """Peak memory of reading each file in bytes, by the file's name."""
    command = [sys.executable, "-c", SCRIPT]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None

        def measure(files: list[Path], channels: int, max_pixels: int) -> dict[str, int]:
            print(json.dumps([list(map(str, files)), channels, max_pixels]), file=reader.stdin)
            reader.stdin.flush()
            taken = json.loads(reader.stdout.readline())
            return {Path(file).name: number for file, number in taken.items()}

        yield measure


def write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


@pytest.mark.slow
def test_memory_of_small_files(tmp_path: Path, memory: Memory) -> None:
    comments = b"\xff\xfe\0\2" * 250_000
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "a.png")
    jpeg, plain = ((tmp_path / name).read_bytes() for name in ("a.jpg", "a.png"))
    text = b"zTXta\0\0" + zeros(2**20 - 1)
    text = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    lists = {
        "comments.jpg": jpeg[:2] + comments + jpeg[2:],
        "texts.png": plain[:33] + 500 * text + plain[33:],
        "allowed_strips.tif": tiff({273: [200] * MAX_TILES, 278: 1}),
    }
    files = {**bombs(), **large_metadata()}
    taken = memory(write(tmp_path, files | lists), 3, 1_000_000)
    for name, content in files.items():
        assert taken[name] < 12 * MB + 2 * len(content), name
    for name, content in lists.items():
        assert taken[name] < 100 * MB + 50 * len(content), name


@pytest.mark.slow
def test_bytes_per_pixel(tmp_path: Path, memory: Memory) -> None:
    width, height = 1600, 1250
    pixels = width * height
    grey = Image.new("L", (width, height), 77)
    deep = png(pixels // 8, 8, zeros(8 + 8 * pixels), bits=16, color=6)
    files = write(tmp_path, {"row.png": deep, "column.png": png(1, pixels, zeros(2 * pixels))})

    def save(name: str, image: Image.Image, **options: object) -> None:
        image.save(tmp_path / name, **options)
        files.append(tmp_path / name)

    turned = Image.Exif()
    turned[0x0112] = 6
    colors = Image.merge("RGBA", [grey] * 4)
    save("turned.webp", colors, lossless=True, method=0, quality=0, exif=turned)
    save("turned.jpg", Image.merge("CMYK", [grey] * 4), progressive=True, exif=turned)
    save("turned.tif", colors, compression="tiff_adobe_deflate", tiffinfo={274: 6, 278: height})
    save("palette.gif", grey.convert("P"), transparency=3)
    save("transparent.png", colors, compress_level=1)
    save("floats.tif", grey.convert("F"))
    save("deep.png", Image.fromarray(np.full((height, width), 9, np.uint16)), transparency=9)
    for name, taken in memory(files, 4, pixels).items():
        assert taken < 24 * pixels + 10 * MB, (name, taken / pixels)


@pytest.mark.slow
def test_memory_of_arrays(tmp_path: Path, memory: Memory) -> None:
    arrays = {f"{i}.npy": np.zeros((1000, 1500, 3), dtype) for i, dtype in enumerate(DTYPES)}
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
    for name, taken in memory([tmp_path / name for name in arrays], 3, 3_000_000).items():
        assert taken < arrays[name].nbytes + 4 * arrays[name].size + 40 * MB, name
