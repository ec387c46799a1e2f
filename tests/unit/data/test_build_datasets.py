"""Build data sets from a configuration, and its errors."""

import dataclasses
import logging
import struct
from pathlib import Path

import pytest
from PIL import Image

from kl_vae.data import (
    DataConfig,
    FolderSource,
    ImageDataset,
    SourceConfig,
    TarSource,
    ValidationConfig,
    build_datasets,
)
from kl_vae.data.build import name_hash
from tests.messages import is_about, mentions
from tests.shards import make_shards, picture, write_shard


def make(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make(tmp_path, *(f"{folder}/{number}.png" for folder in "ab" for number in range(10)))
    return tmp_path


def paths(dataset: ImageDataset | None) -> list[str]:
    assert dataset is not None
    assert isinstance(dataset.source, FolderSource)
    return list(dataset.source.paths)


def build(
    train: Path | None, validation: ValidationConfig | None = None, **options: object
) -> tuple[ImageDataset, ImageDataset | None]:
    config = DataConfig(
        train=SourceConfig(root=None if train is None else str(train)),
        validation=validation or ValidationConfig(),
        **options,
    )
    return build_datasets(config, channels=3, resolution=8, seed=4)


def refusal(
    train: Path | None, validation: ValidationConfig | None = None, **options: object
) -> str:
    with pytest.raises(ValueError) as caught:
        build(train, validation, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_are_passed_to_the_datasets(root: Path) -> None:
    training, validation = build(root, resize=12, flip=False, max_pixels=99)
    assert validation is not None
    for dataset, is_training in ((training, True), (validation, False)):
        assert (dataset.crop, dataset.resize, dataset.flip, dataset.seed) == (8, 12, False, 4)
        assert dataset.training is is_training
        assert isinstance(dataset.source, FolderSource)
        assert (dataset.source.channels, dataset.source.max_pixels) == (3, 99)
    assert build(root, crop=6)[0].crop == 6


def test_a_held_out_fraction(root: Path) -> None:
    training, validation = build(root, ValidationConfig(fraction=0.5))
    assert sorted(paths(training) + paths(validation)) == sorted(
        f"{folder}/{number}.png" for folder in "ab" for number in range(10)
    )
    assert len(paths(validation)) >= 3


def test_the_split_is_stable_between_versions() -> None:
    assert [n for n in range(40) if name_hash(f"{n}.png") < 0.1] == [11, 26]
    held_out = sum(name_hash(f"folder/{n}.png") < 0.05 for n in range(4000))
    assert 150 < held_out < 250  # 200 expected, standard deviation 14


def test_held_out_images_remain_held_out(root: Path) -> None:
    before = set(paths(build(root, ValidationConfig(fraction=0.3))[1]))
    make(root, *(f"c/{number}.png" for number in range(20)))
    after = set(paths(build(root, ValidationConfig(fraction=0.3))[1]))
    assert before == {path for path in after if not path.startswith("c/")}
    assert after < set(paths(build(root, ValidationConfig(fraction=0.6))[1]))


def test_a_fraction_of_zero_means_no_validation(root: Path) -> None:
    training, validation = build(root, ValidationConfig(fraction=0))
    assert validation is None
    assert len(training) == 20


def test_at_least_one_file_is_held_out(root: Path) -> None:
    training, validation = build(root, ValidationConfig(fraction=1e-9))
    assert len(training) == 19
    _, larger = build(root, ValidationConfig(fraction=0.5))
    assert paths(validation)[0] in paths(larger)


def test_a_single_image_is_for_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "a.png")
    with caplog.at_level(logging.WARNING):
        training, validation = build(tmp_path, ValidationConfig(fraction=1e-9))
    assert paths(training) == ["a.png"]
    assert validation is None
    assert is_about(caplog.text, "validation", "image")


def test_a_fraction_that_leaves_no_training(root: Path) -> None:
    error = refusal(root, ValidationConfig(fraction=1 - 1e-9))
    assert is_about(error, "data.validation.fraction=0.999999999", 20, "data.validation.root")


def groups(names: list[str]) -> set[str]:
    return {name.partition("/")[2].partition("_")[0] for name in names}


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Four images of each of 20 patients, in two folders."""
    make(tmp_path, *(f"{f}/p{p:02}_{n}.png" for f in "xy" for p in range(20) for n in range(2)))
    return tmp_path


@pytest.mark.parametrize("group", [r"(p\d+)_", r"p\d+", r"(?<=/)(?:p)(\d+)(_)", r"/(?P<id>p..)"])
def test_no_group_is_on_both_sides(
    patients: Path, group: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    training, validation = build(patients, ValidationConfig(fraction=0.3, group=group))
    train, held_out = groups(paths(training)), groups(paths(validation))
    assert not train & held_out and len(train | held_out) == 20
    assert 2 <= len(held_out) <= 12
    assert (len(training), len(validation or ())) == (4 * len(train), 4 * len(held_out))
    counts = (f"{len(held_out)} of 20", f"{4 * len(held_out)} of 80")
    assert is_about(caplog.text, "data.validation.group", *counts)
    # more images of the same groups change nothing
    make(patients, *(f"z/p{p:02}_9.png" for p in range(20)))
    training, validation = build(patients, ValidationConfig(fraction=0.3, group=group))
    assert (groups(paths(training)), groups(paths(validation))) == (train, held_out)


def test_groups_of_shards(tmp_path: Path) -> None:
    for shard in range(2):
        members = {f"s{n}/{shard}.png": picture(n, 8, 8) for n in range(8)}
        write_shard(tmp_path / f"{shard}.tar", members)
    training, validation = build(tmp_path, ValidationConfig(fraction=0.4, group="^s."))
    assert validation is not None and len(validation) % 2 == 0
    sides = [{d.source.key(i)[:2] for i in range(len(d))} for d in (training, validation)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8


def test_images_without_a_group_are_one_each(
    patients: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make(patients, *(f"other/{n}.png" for n in range(60)))
    _, validation = build(patients, ValidationConfig(fraction=0.5, group=r"(p\d+)_|other"))
    others = [path for path in paths(validation) if path.startswith("other")]
    assert 10 <= len(others) <= 50
    assert is_about(caplog.text, "60 of 140", "80 groups")


def test_at_least_one_group_is_held_out(patients: Path) -> None:
    training, validation = build(patients, ValidationConfig(fraction=1e-9, group="p.._"))
    assert (len(training), len(validation or ())) == (76, 4)


@pytest.mark.parametrize(
    ("group", "fraction", "parts"),
    [
        ("q", 0.1, ("data.validation.group='q'", 80, "x/p00_0.png")),
        ("png", 1e-9, ("data.validation.group='png'", 80, "png")),
        ("p.._", 1 - 1e-9, ("data.validation.fraction=0.999999999", 80)),
    ],
)
def test_groups_that_leave_a_side_empty(
    patients: Path, group: str, fraction: float, parts: tuple[object, ...]
) -> None:
    assert is_about(refusal(patients, ValidationConfig(fraction=fraction, group=group)), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"group": "("}, ("group='('", "regular expression")),
        ({"group": "a{99999999999999}"}, ("group='a{99999999999999}'", "regular expression")),
        ({"group": "(" * 5000}, ("group='(((", "regular expression")),
        ({"group": "a", "root": "x"}, ("group='a'", "root")),
        ({"group": "a", "include": ("b",)}, ("group='a'", "include")),
        ({"group": "a", "fraction": 0.0}, ("group='a'", "fraction")),
    ],
)
def test_invalid_groups(options: dict[str, object], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        ValidationConfig(**options)


def test_included_validation_files_are_not_trained_on(root: Path) -> None:
    training, validation = build(root, ValidationConfig(include=("b/*",), exclude=("b/[5-9].*",)))
    assert paths(validation) == [f"b/{number}.png" for number in range(5)]
    assert len(training) == 15
    assert not set(paths(training)) & set(paths(validation))


@pytest.mark.parametrize(("pattern", "matched"), [("c/*", "none"), ("*.png", "all")])
def test_validation_patterns_that_match_none_or_all(root: Path, pattern: str, matched: str) -> None:
    error = refusal(root, ValidationConfig(include=(pattern,)))
    parts = (f"data.validation.include=['{pattern}']", matched, 20, "data.train.root")
    assert is_about(error, *parts, "data.validation.root")


def test_a_separate_validation_folder(root: Path) -> None:
    config = ValidationConfig(root=str(root / "b"), include=("[0-4].png",))
    training, validation = build(root / "a", config)
    assert paths(training) == [f"{number}.png" for number in range(10)]
    assert paths(validation) == [f"{number}.png" for number in range(5)]
    assert validation is not None
    assert validation.source.name(0) == f"{root}/b/0.png"


@pytest.mark.parametrize(
    ("train", "validation", "example"),
    [("", "b", "b/0.png"), ("a", "", "a/0.png"), ("", "a/..", "a/0.png")],
)
def test_folders_that_share_images(root: Path, train: str, validation: str, example: str) -> None:
    count = 20 if validation == "a/.." else 10
    error = refusal(root / train, ValidationConfig(root=str(root / validation)))
    parts = (f"data.validation.root={root / validation}", count, f"{root}/{example}")
    assert is_about(error, *parts, "data.train.exclude")


def test_one_folder_with_disjoint_patterns(root: Path) -> None:
    config = DataConfig(
        train=SourceConfig(str(root), include=("a/*",)),
        validation=ValidationConfig(str(root), include=("b/*",)),
    )
    training, validation = build_datasets(config, 3, 8, 0)
    assert paths(training) == [f"a/{number}.png" for number in range(10)]
    assert paths(validation) == [f"b/{number}.png" for number in range(10)]


def test_no_root() -> None:
    assert is_about(refusal(None), "data.train.root=FOLDER")


def test_missing_folders(root: Path) -> None:
    assert is_about(refusal(root / "x"), "data.train.root", f"{root}/x")
    error = refusal(root, ValidationConfig(root=f"{root}/y"))
    assert is_about(error, "data.validation.root", f"{root}/y")
    error = refusal(Path("package:no_such_package"))
    assert is_about(error, "data.train.root", "package:no_such_package", "Python")


def test_resize_smaller_than_the_resolution(root: Path) -> None:
    assert is_about(refusal(root, resize=7), "data.resize=7", "crop", 8)
    build(root, resize=7, crop=6)


# --- single values


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"resize": 0}, ("resize=0", 1)),
        ({"crop": -3}, ("crop=-3", 1)),
        ({"max_pixels": 0}, ("max_pixels=0", 1)),
        ({"num_workers": -1}, ("num_workers=-1", 0)),
        ({"resize": 32, "crop": 64}, ("resize=32", "crop", 64)),
        (
            {"name": "cifar10", "validation": ValidationConfig(group="x")},
            ("name=cifar10", "validation.group"),
        ),
        ({"name": "mnist"}, ("name=mnist", "folder, cifar10, fashion-mnist")),
        (
            {"name": "cifar10", "train": SourceConfig(include=("a",))},
            ("name=cifar10", "validation.root", "include", "exclude"),
        ),
        (
            {"name": "cifar10", "validation": ValidationConfig(root="x")},
            ("name=cifar10", "validation.root", "include", "exclude"),
        ),
    ],
)
def test_invalid_values(options: dict[str, object], parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        DataConfig(**options)


@pytest.mark.parametrize("fraction", [1, -0.1, float("nan")])
def test_invalid_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=mentions(f"fraction={fraction}", 0, 1)):
        ValidationConfig(fraction=fraction)


def test_an_exclude_without_effect_is_an_error() -> None:
    with pytest.raises(ValueError, match=mentions("exclude=['a']", "root", "include")):
        ValidationConfig(exclude=("a",))


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().crop = 3


# --- named data sets


def test_a_named_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 6), ("t10k", 4)):
        images = struct.pack(">4I", 0x803, count, 28, 28) + bytes(count * 28 * 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2I", 0x801, count) + bytes(count)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    training, validation = build(tmp_path, name="fashion-mnist", resize=8)
    assert validation is not None
    assert (len(training), len(validation)) == (6, 4)
    assert not training[0, 0, 0].image.any()
    _, nothing = build(tmp_path, ValidationConfig(fraction=0), name="fashion-mnist")
    assert nothing is None


# --- tar shards


def test_shards_are_split_like_a_folder(root: Path, tmp_path: Path) -> None:
    folder = root / "pack"
    folder.mkdir()
    contents = make_shards(tmp_path / "shards", shards=3, images=10)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for chosen in (ValidationConfig(fraction=0.3), ValidationConfig(include=("0000*",))):
        of_folder, of_shards = build(folder, chosen), build(tmp_path / "shards", chosen)
        for one, other in zip(of_folder, of_shards, strict=True):
            assert one is not None and other is not None
            assert isinstance(other.source, TarSource)
            assert paths(one) == list(other.source.keys)
            assert one.fingerprint == other.fingerprint
            assert one[0, 1, 0].image.equal(other[0, 1, 0].image)
    training, validation = build(
        Path(f"{tmp_path}/shards/train-{{0000..0001}}.tar"),
        ValidationConfig(root=str(tmp_path / "shards" / "train-0002.tar"), exclude=("*5.png",)),
    )
    assert validation is not None and (len(training), len(validation)) == (20, 9)


def test_shards_that_share_images(tmp_path: Path) -> None:
    make_shards(tmp_path, shards=2, images=3)
    shard = tmp_path / "train-0001.tar"
    error = refusal(tmp_path, ValidationConfig(root=str(shard)))
    parts = (f"data.validation.root={shard}", 3, f"{shard}/00003.png", "data.train.exclude")
    assert is_about(error, *parts)


def test_damaged_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"damaged")
    assert is_about(refusal(tmp_path), "data.train.root", f"{tmp_path}/a.tar", "byte 0")


def test_images_of_one_name_in_several_shards_stay_together(tmp_path: Path) -> None:
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", {f"{i}.png": picture(i) for i in range(20)})
    training, validation = build(tmp_path, ValidationConfig(fraction=0.2))
    assert validation is not None
    assert isinstance(training.source, TarSource) and isinstance(validation.source, TarSource)
    assert not set(training.source.keys) & set(validation.source.keys)
    assert (len(training) + len(validation), len(validation) % 2) == (40, 0)
