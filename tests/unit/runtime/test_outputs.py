import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from kl_vae.runtime.outputs import (
    check_output_folder,
    check_outputs,
    make_folder,
    plan_outputs,
    replace_file,
)
from tests.messages import mentions


def test_the_tree_is_kept_and_the_suffix_replaced():
    assert plan_outputs(["a.jpg", "b/c.d/e.tiff", "noext"]) == ["a.png", "b/c.d/e.png", "noext.png"]
    assert plan_outputs(["a/b.tif"], suffix=".npy") == ["a/b.npy"]


def test_inputs_that_share_a_name_get_different_ones():
    assert plan_outputs(["a.jpg", "a.png"]) == ["a.png", "a.png.png"]
    assert plan_outputs(["A.jpg", "a.jpg", "a.JPG"]) == ["A.png", "a.jpg.png", "a.JPG.2.png"]
    assert plan_outputs(["a.jpg", "a.jpg", "a.jpg"]) == ["a.png", "a.jpg.png", "a.jpg.2.png"]
    assert plan_outputs(["D/a.jpg", "d/a.jpg"]) == ["D/a.png", "d/a.jpg.png"]
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    assert plan_outputs([composed, decomposed])[1] == f"{decomposed}.png"


def test_reserved_names_and_folders_are_left_alone():
    reserved = ["comparison.png"]
    assert plan_outputs(["comparison.jpg"], reserved=reserved) == ["comparison.jpg.png"]
    assert plan_outputs(["Comparison.webp"], reserved=reserved) == ["Comparison.webp.png"]
    assert plan_outputs(["a.jpg", "a.png/b.jpg"]) == ["a.jpg.png", "a.png/b.png"]
    with pytest.raises(ValueError, match=mentions("comparison.png")):
        plan_outputs(["comparison.png/a.jpg"], reserved=reserved)


def test_names_that_are_not_utf8_are_kept():
    names = [os.fsdecode(b"\xff.jpg"), os.fsdecode(b"\xfe.jpg")]
    assert plan_outputs(names) == [os.fsdecode(b"\xff.png"), os.fsdecode(b"\xfe.png")]


ON_WINDOWS = """
import json, ntpath, os, sys
from kl_vae.runtime import files
os.name, os.path = "nt", ntpath
from kl_vae.runtime.outputs import plan_outputs
print(json.dumps(plan_outputs(json.loads(sys.argv[1]))))
"""


def test_on_windows_paths_are_the_same_but_for_characters_that_it_refuses():
    names = ["a/b.jpg", "a/b.png", "a/c.d/e.jpg", "12:30.jpg", r"a\b.jpg", "a_b.jpg", "c?/d.jpg"]
    command = [sys.executable, "-c", ON_WINDOWS, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    same = ["a/b.png", "a/b.png.png", "a/c.d/e.png"]
    assert plan_outputs(names) == [*same, "12:30.png", r"a\b.png", "a_b.png", "c?/d.png"]
    windows = [*same, "12_30.png", "a_b.png", "a_b.jpg.png", "c_/d.png"]
    assert json.loads(done.stdout) == windows


def test_folders_with_too_long_names_are_truncated():
    long = "x" * 255
    names = [f"{long}{number}/a.png" for number in range(2)]
    assert plan_outputs([*names, f"é{long}/b.png"]) == [
        f"{long}/a.png", f"{long}/a.png.png", f"é{long[:-2]}/b.png",
    ]  # fmt: skip


def test_the_output_folder_must_not_be_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match=mentions(tmp_path / "out", "file")):
        check_output_folder(tmp_path / "out")
    with pytest.raises(ValueError, match=mentions(tmp_path / "out" / "sub", "Not a directory")):
        make_folder(tmp_path / "out" / "sub")


@pytest.mark.parametrize(
    "out", ["images", "images/out", "images/new/out", "link", "other/../images"]
)
def test_the_output_folder_is_not_within_the_images(tmp_path, out):
    (tmp_path / "images").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match=mentions(tmp_path / out, tmp_path / "images")):
        check_output_folder(tmp_path / out, [tmp_path / "images"])


def test_a_symlink_loop_is_an_error(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_output_folder(tmp_path / "loop" / "out")
    check_outputs(tmp_path / "loop" / "out", ["a.png"], [], earlier=["metrics.csv"])
    with pytest.raises(ValueError, match=mentions(tmp_path / "loop" / "out")):
        make_folder(tmp_path / "loop" / "out")


def test_other_output_folders_may_be_anywhere(tmp_path):
    (tmp_path / "images").mkdir()
    for out in ("out", "images2", ".", "new/out"):
        check_output_folder(tmp_path / out, [tmp_path / "images"])
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_an_image_is_not_overwritten(tmp_path):
    image = tmp_path / "a.png"
    image.write_text("image")
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match=mentions(image)):
        check_outputs(tmp_path, ["a.png"], [image], earlier=["metrics.csv"])


def test_only_files_of_an_earlier_run_are_replaced(tmp_path):
    (tmp_path / "a.png").write_text("foreign")
    with pytest.raises(ValueError, match=mentions("a.png", "metrics.csv")):
        check_outputs(tmp_path, ["a.png"], [], earlier=["metrics.csv"])
    (tmp_path / "metrics.csv").write_text("")
    check_outputs(tmp_path, ["a.png", "b/c.png"], [], earlier=["metrics.csv"])
    (tmp_path / "d.png").mkdir()
    with pytest.raises(ValueError, match=mentions("d.png", "folder")):
        check_outputs(tmp_path, ["d.png"], [], earlier=["metrics.csv"])


def test_no_output_goes_into_an_image_folder(tmp_path):
    (tmp_path / "images").mkdir()
    folders = [tmp_path / "images"]
    check_outputs(tmp_path, ["a.png", "new/a.png"], [], ["metrics.csv"], image_folders=folders)
    (tmp_path / "link").symlink_to("images")
    for output in ("images/a.png", "images/new/a.png", "link/a.png"):
        with pytest.raises(ValueError, match=mentions(tmp_path / output, tmp_path / "images")):
            check_outputs(
                tmp_path, [output], [], ["metrics.csv"], image_folders=folders, overwrite=True
            )


def test_overwrite_replaces_other_files_but_no_input(tmp_path):
    (tmp_path / "a.png").write_text("foreign")
    check_outputs(tmp_path, ["a.png"], [], ["metrics.csv"], overwrite=True)
    with pytest.raises(ValueError, match=mentions(tmp_path / "a.png")):
        check_outputs(tmp_path, ["a.png"], [tmp_path / "a.png"], ["metrics.csv"], overwrite=True)


@pytest.mark.parametrize("output", ["../a.png", "elsewhere/a.png", "elsewhere/new/a.png"])
def test_outputs_stay_in_the_output_folder(tmp_path, output):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "target").mkdir()
    (out / "elsewhere").symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match=mentions("a.png", "output folder")):
        check_outputs(out, [output], [], earlier=["metrics.csv"])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")  # as long as names get
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=mentions(tmp_path / "folder", "Is a directory")):
        replace_file(tmp_path / "folder", b"")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "folder", path]


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"image")
    (tmp_path / "link.png").symlink_to(tmp_path / "target")
    replace_file(Path(tmp_path / "link.png"), b"new")
    assert (tmp_path / "target").read_bytes() == b"image"
    assert not (tmp_path / "link.png").is_symlink()
