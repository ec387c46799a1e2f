"""The page of a gallery, opened from its file in a browser."""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kl_vae.visual.gallery import GALLERY, GalleryImage, write_gallery
from tests.browser import chromium, complaints, open_page, requested, screenshot, width_of

NUMBER = 2_000
CONTENTS = 20
SIDE = 32
HOSTILE = ("</script><script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "${7*7}{{data}}")
ODD = os.fsdecode(b"odd \xff\xc3\xa9#?%41&.png")  # a file's name
CHECKED = (60, 90, 120), (64, 88, 120)  # the colours of original and reconstruction, at (0, 0)
GONE = "gone.png"


def contents(i: int) -> tuple[np.ndarray, np.ndarray]:
    """A checkerboard of pixels, [SIDE, SIDE, 3] of uint8, and what is not quite the same."""
    rows, columns = np.indices((SIDE, SIDE))
    board = np.where(((rows + columns) % 2 == 0)[..., None], CHECKED[0], (210, 210, 210 + i))
    difference = np.subtract(CHECKED[1], CHECKED[0])
    return board.astype(np.uint8), (board + difference).astype(np.uint8)


def figures(rng: random.Random, i: int) -> dict[str, float | None]:
    return {
        "psnr": math.inf if i == 3 else rng.uniform(20, 40),
        "ssim": None if i in (4, 5) else rng.uniform(0.5, 1),
        "lpips": rng.uniform(0, 0.5),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[GalleryImage]]:
    """A folder with the page of 2,000 images, which share 20 pairs of files, and the images."""
    folder = tmp_path_factory.mktemp("gallery")
    for i in range(CONTENTS):
        stem = ODD if i == 0 else f"{i}.png"
        for kind, pixels in zip("or", contents(i), strict=True):
            Image.fromarray(pixels).save(folder / f"{kind}{stem}", format="PNG")
    rng = random.Random(0)
    listed = []
    for i in range(NUMBER):
        name = HOSTILE[i] if i < len(HOSTILE) else f"class {i % 7}/{i:05d}.png"
        stem = ODD if i % CONTENTS == 0 else f"{i % CONTENTS}.png"
        paths = (f"o{stem}", GONE if i == 7 else f"r{stem}", GONE if i == 7 else f"o{stem}")
        listed.append(GalleryImage(name, *paths, SIDE, SIDE, figures(rng, i)))
    write_gallery(folder / GALLERY, listed, {"checkpoint": HOSTILE[0], "mode": "sample"})
    return folder, listed


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(1400, 900) as started:
        yield started


@pytest.fixture
def opened(
    browser: Any, pictures: tuple[Path, list[GalleryImage]]
) -> Iterator[Callable[[str], Any]]:
    """Opens the page at an address; at the end nothing was complained of or asked of a network."""

    def load(fragment: str = "") -> Any:
        open_page(browser, pictures[0] / GALLERY, fragment)
        return browser

    yield load
    said = [text for text in complaints(browser) if GONE not in text]
    assert said == []
    assert {url.split(":")[0] for url in requested(browser)} <= {"file", "about"}


def script(browser: Any, code: str, *arguments: Any) -> Any:
    return browser.execute_script(f"return {code}", *arguments)


def wait(browser: Any, code: str, *arguments: Any) -> Any:
    """Ask until the answer is true, 5 s at most."""
    for _ in range(250):
        answer = script(browser, code, *arguments)
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"never true: {code}")


def type_keys(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def text(browser: Any, selector: str) -> str:
    return str(script(browser, "document.querySelector(arguments[0]).textContent", selector))


def first_names(browser: Any) -> list[str]:
    code = "[...document.querySelectorAll('.card')].slice(0, 3).map((card) => card.title)"
    return list(script(browser, code))


def choose(browser: Any, name: str, value: str) -> None:
    """Set a field as a user does."""
    code = """
        const field = document.getElementById(arguments[0]);
        field.value = arguments[1];
        field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input"));
    """
    browser.execute_script(code, name, value)


def in_view(browser: Any) -> str:
    """The name in the viewer, once its images are there."""
    wait(
        browser,
        "document.querySelectorAll('.layer img').length === 2"
        " && !document.querySelector('.waiting')",
    )
    return text(browser, "#caption")


def middle(browser: Any) -> tuple[int, int]:
    """The middle of the stage, in pixels of the screen."""
    area = browser.find_element("id", "stage").rect
    return round(area["x"] + area["width"] / 2), round(area["y"] + area["height"] / 2)


def drag(browser: Any, start: tuple[int, int], by: tuple[int, int]) -> None:
    """Press the mouse at a place of the screen, move it, and let go."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(browser)
    pointer = actions.pointer_action
    pointer.move_to_location(*start).pointer_down()
    pointer.move_to_location(start[0] + by[0], start[1] + by[1]).pointer_up()
    actions.perform()


def test_two_thousand_pictures_open_at_once_and_are_all_there(
    opened: Callable[[str], Any], pictures: tuple[Path, list[GalleryImage]]
) -> None:
    start = time.perf_counter()
    browser = opened("")
    wait(browser, "document.querySelectorAll('.card').length")
    assert time.perf_counter() - start < 10  # is 0.3 s alone
    assert text(browser, "#count") == "2,000 images"
    assert script(browser, "document.querySelectorAll('.card').length") < 200
    summary = text(browser, "#summary")
    psnr = sorted(p.metrics["psnr"] for p in pictures[1] if p.metrics["psnr"] != math.inf)  # type: ignore[type-var]
    assert f"{sum(psnr) / len(psnr):.2f} dB{psnr[len(psnr) // 2]:.2f} dB{psnr[0]:.2f} dB" in summary  # type: ignore[arg-type]
    assert "1 at \u221e" in summary and "2 without" in summary
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait(browser, "document.querySelector('.card:last-child').ariaLabel.endsWith('2000 of 2000')")
    wait(
        browser,
        "[...document.querySelectorAll('.card img')].some((image) => image.naturalWidth === 32)",
    )
    assert script(browser, "document.querySelectorAll('.card').length") < 200


@pytest.mark.parametrize(
    ("metric", "highest_first"), [("psnr", False), ("ssim", False), ("lpips", True)]
)
def test_each_metric_sorts_the_worst_first_and_unknown_ones_last(
    opened: Callable[[str], Any],
    pictures: tuple[Path, list[GalleryImage]],
    metric: str,
    highest_first: bool,
) -> None:
    known = [p for p in pictures[1] if p.metrics[metric] is not None]
    order = sorted(known, key=lambda p: p.metrics[metric] or 0.0, reverse=highest_first)
    browser = opened("")
    choose(browser, "sort", metric)
    assert first_names(browser) == [p.name for p in order[:3]]
    browser.find_element("id", "direction").click()
    assert first_names(browser) == [p.name for p in order[::-1][:3]]
    assert text(browser, "#direction") == "best first"


def test_a_filter_by_name_and_one_by_figure(
    opened: Callable[[str], Any], pictures: tuple[Path, list[GalleryImage]]
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = opened("#sort=name")
    type_keys(browser, "/", "CLASS 3")
    few = [p for p in pictures[1] if "class 3" in p.name]
    assert text(browser, "#count") == f"{len(few)} of 2,000 images"
    assert first_names(browser) == [p.name for p in few[:3]]
    plot = browser.find_element("id", "plot")
    ActionChains(browser).move_to_element_with_offset(plot, 0, 10).click().perform()
    low, high = (
        float(script(browser, f"document.getElementById('{end}').value")) for end in ("low", "high")
    )
    within = [p for p in few if low <= (p.metrics["psnr"] or 0.0) < high]
    assert 0 < len(within) < len(few)
    assert text(browser, "#count") == f"{len(within)} of 2,000 images"
    wait(browser, "location.hash.includes('low=')")
    assert re.search(
        r"sort=name&filter=CLASS\+3&low=\d+\.?\d*&high=\d+\.?\d*$", browser.current_url
    )
    ActionChains(browser).click().perform()  # the bar once more
    assert text(browser, "#count") == f"{len(few)} of 2,000 images"
    browser.find_element("id", "clear").click()
    assert text(browser, "#count") == "2,000 images"
    choose(browser, "filter", "no such name")
    assert text(browser, "#none") == "No image has this name and metric."


def test_hostile_names_are_text(opened: Callable[[str], Any]) -> None:
    browser = opened("")
    for name in HOSTILE:
        choose(browser, "filter", name)
        assert first_names(browser) == [name]
        assert text(browser, ".card .name") == name
    assert text(browser, "#about dd") == HOSTILE[0]
    assert not script(browser, "document.querySelector('[onerror]')")
    browser.find_element("css selector", ".card").click()
    assert in_view(browser) == HOSTILE[-1]


def test_the_line_between_original_and_reconstruction_moves(opened: Callable[[str], Any]) -> None:
    browser = opened("#image=class+6/00020.png")
    assert in_view(browser) == "class 6/00020.png"
    clip = "document.getElementById('reconstruction').style.clipPath"
    before = script(browser, clip)
    x, y = middle(browser)
    drag(browser, (x, y), (120, 0))
    assert script(browser, clip) != before
    assert f" {x + 120}px" in script(browser, clip)
    picture = screenshot(browser)
    zoom = int(text(browser, "#zoom")[:-1])  # whole
    left = x - SIDE * zoom // 2  # of the image, on the screen
    top = y - SIDE * zoom // 2
    assert picture.getpixel((left + 1, top + 1)) == CHECKED[0]
    far = left + (SIDE - 2) * zoom + 1  # an even column, right of the line
    assert picture.getpixel((far, top + 1)) == CHECKED[1]
    choose(browser, "split", "0")
    assert f" {left}px" in script(browser, clip)


def test_the_difference_is_that_of_the_pixels_times_the_gain(opened: Callable[[str], Any]) -> None:
    browser = opened("#image=class+6/00020.png&view=difference")
    in_view(browser)
    at = middle(browser)
    true = np.abs(np.subtract(*CHECKED))
    assert screenshot(browser).getpixel(at) == tuple(true * 8)
    type_keys(browser, "]]")
    assert text(browser, "#left-tag") == "|original \u2212 reconstruction| \u00d7 32"
    assert screenshot(browser).getpixel(at) == tuple(true * 32)
    type_keys(browser, "[[[[[[")
    assert screenshot(browser).getpixel(at) == tuple(true)


@pytest.mark.parametrize("view", ["slider", "side"])
def test_a_pixel_is_eight_pixels_in_both_pictures(opened: Callable[[str], Any], view: str) -> None:
    browser = opened(f"#image=class+6/00020.png&view={view}")
    in_view(browser)
    type_keys(browser, "8")
    assert text(browser, "#zoom") == "8\u00d7"
    x, y = middle(browser)
    row = np.asarray(screenshot(browser))[y + 2]  # [1400, 3]
    edges = np.flatnonzero((row[1:] != row[:-1]).any(1)) + 1
    lengths = np.diff(edges)
    assert (lengths == 8).sum() >= (2 * (SIDE - 2) if view == "side" else SIDE - 6)
    if view == "side":
        half = row[: x - 1], row[x + 1 :]
        shifted = [np.flatnonzero((each[1:] != each[:-1]).any(1)) for each in half]
        assert shifted[0].tolist() == shifted[1].tolist()  # the same place in both


def test_the_wheel_zooms_where_it_is_and_dragging_moves(opened: Callable[[str], Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    browser = opened("#image=class+6/00020.png&view=toggle&zoom=30")
    in_view(browser)
    x, y = middle(browser)
    image = "document.querySelector('#original img').getBoundingClientRect()"
    corner = f"(({{x, y, width}}) => [x, y, width / {SIDE}])({image})"
    left, top, scale = script(browser, corner)
    at = (x + 100, y - 50)
    before = (at[0] - left) / scale, (at[1] - top) / scale
    origin = ScrollOrigin.from_viewport(*at)
    ActionChains(browser).scroll_from_origin(origin, 0, -200).perform()
    left, top, larger = script(browser, corner)
    assert larger > scale and larger == round(larger)
    after = (at[0] - left) / larger, (at[1] - top) / larger
    assert after == pytest.approx(before, abs=1 / larger)
    drag(browser, at, (15, 8))
    assert script(browser, corner) == pytest.approx([left + 15, top + 8, larger], abs=1)


def test_space_shows_the_original_for_as_long_as_it_is_held(opened: Callable[[str], Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = opened("#image=class+6/00020.png&view=toggle")
    in_view(browser)
    at = middle(browser)
    assert screenshot(browser).getpixel(at) == CHECKED[1]
    ActionChains(browser).key_down(" ").perform()
    assert text(browser, "#left-tag") == "original"
    assert screenshot(browser).getpixel(at) == CHECKED[0]
    ActionChains(browser).key_up(" ").perform()
    assert screenshot(browser).getpixel(at) == CHECKED[1]


def test_the_keys_go_through_the_order_and_the_address_opens_the_same(
    opened: Callable[[str], Any], pictures: tuple[Path, list[GalleryImage]]
) -> None:
    from selenium.webdriver.common.keys import Keys

    order = [p.name for p in sorted(pictures[1], key=lambda p: -(p.metrics["lpips"] or 0.0))]
    browser = opened("#sort=lpips")
    browser.find_element("css selector", ".card").click()
    assert in_view(browser) == order[0]
    type_keys(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, "d")
    assert in_view(browser) == order[1]
    assert text(browser, "#position") == "2 / 2,000"
    type_keys(browser, "]", "8", "+")
    wait(browser, "location.hash.includes('zoom=16')")
    url = browser.current_url
    opened("#" + url.split("#")[1])
    assert in_view(browser) == order[1]
    assert text(browser, "#left-tag").endswith("16") and text(browser, "#zoom") == "16\u00d7"
    type_keys(browser, Keys.END)
    assert in_view(browser) == order[-1]
    type_keys(browser, "?")
    assert script(browser, "document.getElementById('help').open")
    type_keys(browser, Keys.ESCAPE)
    type_keys(browser, Keys.ESCAPE)
    assert not script(browser, "document.getElementById('viewer').open")
    wait(browser, "document.activeElement.title === arguments[0]", order[-1])  # scrolled to
    wait(browser, "location.hash === '#sort=lpips'")


def test_a_picture_whose_file_is_gone(opened: Callable[[str], Any]) -> None:
    browser = opened("#filter=00007")
    wait(browser, "document.querySelector('.card img').alt === 'This thumbnail cannot be loaded'")
    browser.find_element("css selector", ".card").click()
    wait(browser, "!document.getElementById('note').hidden")
    assert text(browser, "#note") == f"The reconstruction cannot be loaded: {GONE}"
    type_keys(browser, "d")
    x, y = middle(browser)
    assert screenshot(browser).getpixel((x, y)) == screenshot(browser).getpixel((x, y - 300))


@pytest.mark.parametrize("fragment", ["", "#low=20.125&high=1000", "#image=class+6/00020.png"])
def test_the_page_is_no_wider_than_a_phone(opened: Callable[[str], Any], fragment: str) -> None:
    browser = opened(fragment)
    wait(browser, "document.querySelectorAll('.card').length")
    assert [width_of(browser, width) for width in (390, 1400)] == [390, 1400]
    width_of(browser, 390)
    ends = "[...document.querySelectorAll('.card, svg, .bar > *')].map((each) => "
    ends += "each.getBoundingClientRect()).filter((at) => at.left < 0 || at.right > 390).length"
    assert script(browser, ends) == 0
    width_of(browser, 1400)


@pytest.mark.parametrize("kind", ["even", "with outliers", "two values", "one value"])
def test_a_few_pictures_have_a_few_bins_with_round_edges(
    kind: str, browser: Any, tmp_path: Path
) -> None:
    def psnr(i: int) -> float:
        values = {"even": 20 + i / 3, "with outliers": i / 50 + 1000 * (i == 0), "one value": 23.4}
        return values.get(kind, 20.0 + i % 2 / 7)

    files = ("o.png", "r.png", "t.jpg")
    listed = [GalleryImage(f"{i}.png", *files, 8, 8, {"psnr": psnr(i)}) for i in range(24)]
    write_gallery(tmp_path / GALLERY, listed, {})
    open_page(browser, tmp_path / GALLERY)
    bins = script(browser, "document.querySelectorAll('#plot rect').length")
    assert bins == 1 if kind == "one value" else 5 <= bins <= 40
    assert kind != "even" or bins <= 8
    ends = "[...document.querySelectorAll('#plot text')].map((each) => each.textContent)"
    low, high = map(float, script(browser, ends))
    assert low <= min(map(psnr, range(24))) and high > max(map(psnr, range(24)))
    width = f"{(high - low) / bins:.3e}"
    assert width[:4] in ("1.00", "2.00", "2.50", "5.00")
    assert text(browser, "#plot-name") == "PSNR in dB"
    complaints(browser)  # the images are not there


def test_a_page_without_pictures(browser: Any, tmp_path: Path) -> None:
    write_gallery(tmp_path / GALLERY, [], {})
    open_page(browser, tmp_path / GALLERY)
    assert text(browser, "#none") == "There are no images."
    assert text(browser, "#count") == "0 images"
    assert complaints(browser) == []
