"""The file of a gallery page; tests/end_to_end/test_gallery.py opens it in a browser."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kl_vae.visual.gallery import GALLERY, GalleryImage, write_gallery
from tests.messages import mentions

HOSTILE = "</script><script>alert(1)</script><!-- \"'&amp;\u2028{{title}} .png"


def picture(
    name: str, metrics: Mapping[str, float | None] | None = None, **paths: str
) -> GalleryImage:
    files = {kind: f"{kind}/{name}" for kind in ("original", "reconstruction", "thumbnail")}
    return GalleryImage(name, **{**files, **paths}, width=6, height=4, metrics=metrics or {})


class Page(HTMLParser):
    """The text of each script and title, and the attributes of each meta."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "title": []}
        self.meta: list[dict[str, str | None]] = []
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        if tag == "meta":
            self.meta.append(dict(attrs))
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._open in self.texts:
            self.texts[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    @property
    def data(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.texts["script"][0])
        return content


def written(path: Path, *pictures: GalleryImage, about: Mapping[str, str] | None = None) -> Page:
    write_gallery(path / GALLERY, pictures, about or {})
    return Page(path / GALLERY)


def test_images_with_their_metrics(tmp_path: Path) -> None:
    page = written(
        tmp_path / "new",
        picture("a.png", {"psnr": 31.23456789, "ssim": None, "lpips": 0.25}),
        picture("b/c.png", {"psnr": math.inf, "ssim": 0.5, "fid": math.nan}),
        picture("d.png", {"psnr": -math.inf, "ssim": math.nan}),
        about={"checkpoint": "last.pt", "mode": "mode"},
    )
    assert page.data["about"] == {"checkpoint": "last.pt", "mode": "mode"}
    assert page.data["metrics"] == ["psnr", "ssim", "lpips"]  # fid has no value
    assert [row[0] for row in page.data["images"]] == ["a.png", "b/c.png", "d.png"]
    assert page.data["images"][1][1:4] == [
        "original/b/c.png",
        "reconstruction/b/c.png",
        "thumbnail/b/c.png",
    ]
    assert [row[4:] for row in page.data["images"]] == [
        [6, 4, 31.234568, None, 0.25],
        [6, 4, "Infinity", 0.5, None],
        [6, 4, "-Infinity", None, None],
    ]
    assert page.texts["title"] == ["Reconstructions · last.pt"]
    assert os.listdir(tmp_path / "new") == [GALLERY]


def test_text_cannot_end_the_script(tmp_path: Path) -> None:
    page = written(tmp_path, picture(HOSTILE), about={"</title>": HOSTILE})
    assert page.data["about"] == {"</title>": HOSTILE}
    assert len(page.texts["script"]) == 2
    assert "alert" not in page.texts["script"][1]
    assert page.texts["title"] == [f"Reconstructions · {HOSTILE}"]
    text = (tmp_path / GALLERY).read_text(encoding="utf-8")
    (data,) = re.findall(r'<script id="data"[^>]*>(.*)</script>', text)
    assert data.isascii() and not set("<>&") & set(data)


def test_names_of_any_bytes_become_urls(tmp_path: Path) -> None:
    odd = os.fsdecode(b"a/\xff \xc3\xa9#?%41:'.png")
    page = written(tmp_path, picture(odd, original=odd), about={"out": odd})
    name, original = page.data["images"][0][:2]
    assert name == r"a/\xff é#?%41:'.png"
    assert original == "a/%FF%20%C3%A9%23%3F%2541%3A%27.png"
    assert page.texts["title"] == [r"Reconstructions · a/\udcff é#?%41:'.png"]


def test_the_content_security_policy_allows_only_images(tmp_path: Path) -> None:
    page = written(tmp_path)
    (policy,) = [each["content"] for each in page.meta if "http-equiv" in each]
    assert re.fullmatch(
        r"default-src 'none'; img-src data: 'self' file:; style-src 'sha256-\S+'; "
        r"script-src 'sha256-\S+'; base-uri 'none'; form-action 'none'",
        policy or "",
    )
    text = (tmp_path / GALLERY).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert page.data == {"about": {}, "metrics": [], "images": []}
    assert page.texts["title"] == ["Reconstructions"]


def test_absolute_paths_and_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=mentions("/x.png", "relative")):
        written(tmp_path, picture("a", thumbnail="/x.png"))
    assert not (tmp_path / GALLERY).exists()
    (tmp_path / GALLERY).mkdir()
    with pytest.raises(ValueError, match=mentions(tmp_path / GALLERY, "Is a directory")):
        written(tmp_path)
