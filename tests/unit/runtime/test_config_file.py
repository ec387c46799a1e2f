"""Reading configs: strict YAML, overrides, and published configs."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kl_vae import AutoEncoderKL
from kl_vae.ddconfig import DDConfig
from kl_vae.runtime.config_file import (
    MAX_BYTES,
    apply_override,
    dump_config,
    find_config,
    load_config,
    load_model_params,
    parse_yaml,
    shipped_configs,
)
from tests.messages import is_about, mentions

COMPVIS = """\
model:
  base_learning_rate: 4.5e-6
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: val/rec_loss
    embed_dim: 4
    image_key: jpg
    lossconfig:
      target: torch.nn.Identity
    ddconfig:
      double_z: true
      z_channels: 4
      resolution: 16
      in_channels: 3
      out_ch: 3
      ch: 32
      ch_mult: [1, 2]
      num_res_blocks: 1
      attn_resolutions: []
      dropout: 0.0
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 12
lightning:
  trainer:
    benchmark: true
    accumulate_grad_batches: 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "it.yaml"
    path.write_text("model: {params: {embed_dim: 4}}\noptimizer:\n  learning_rate: 1.0e-3\n")
    return path


def test_a_file_is_read_as_plain_values(file: Path) -> None:
    expected = {"model": {"params": {"embed_dim": 4}}, "optimizer": {"learning_rate": 0.001}}
    assert load_config(file) == expected
    assert load_config(str(file)) == expected
    assert load_model_params(file) == {"embed_dim": 4}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: {c: 2, c: 3}\n", ("line 2", "c", "twice")),
        ("a: 1\na: 1\n", ("line 2", "a", "twice")),
        ("a: &name [1]\nb: *name\n", ("line 2", "aliases", "*name")),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", ("line 3", "aliases")),
        ("a: !!python/object/apply:os.getcwd []\n", ("line 1", "tags", "python/object/apply")),
        ("a: !!python/name:os.getcwd\n", ("line 1", "tags", "python/name")),
        ("a: [1\n", ("YAML", "line 2")),
        ("a: 1\n---\nb: 2\n", ("YAML", "another document")),
        ("a: \0\n", ("YAML",)),
        ("a: !!float 3\n", ("line 1", "tags", "float")),
        ("a: 1\nb: !own {c: 1}\n", ("line 2", "tags", "!own")),
        ("a: !!binary aGVsbG8=\n", ("line 1", "tags", "binary")),
        ("a: 1:30:00\n", ("line 1", "1:30:00", "base 60", "quote")),
        ("a: {b: -1:30.5}\n", ("line 1", "-1:30.5", "base 60", "quote")),
        ("a:\n- 0256\n", ("line 2", "0256", "8", "quote")),
        ("a: " + "1:" * 200_000 + "1\n", ("line 1", "400001", "quote")),
        ("a: 0x" + "f" * 200_000 + "\n", ("line 1", "200002", "quote")),
        ("? " + "9" * 5000 + "\n: 1\n", ("line 1", "5000", "quote")),
        ("[" * 5000, ("nested",)),
        ("", ("keys", "docs/config.md")),
        ("- 1\n", ("keys", "docs/config.md")),
        ("5\n", ("keys", "docs/config.md")),
    ],
)
def test_invalid_yaml(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=mentions(path, *parts)):
        load_config(path)


def test_an_error_of_yaml_is_one_short_line(tmp_path: Path) -> None:
    for text in ("a: 0x" + "f" * 200_000, "a: 1\n  b: 2", "a: !!python/name:os.getcwd\n"):
        with pytest.raises(ValueError) as caught:
            parse_yaml(text, "it")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_numbers_and_dates_that_are_texts_stay_texts() -> None:
    text = "{root: 2020-01-31, time: '1:30:00', mode: '0256', day: 08, count: 1_000, sign: 0x10}"
    expected = {"root": "2020-01-31", "time": "1:30:00", "mode": "0256", "day": "08"}
    expected |= {"count": 1000, "sign": 16}  # type: ignore[dict-item]
    assert parse_yaml(text, "it") == expected
    assert parse_yaml(dump_config(expected), "it") == expected


def test_files_that_are_too_large_or_not_utf8_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(b"a: 1\n" + b"#" * MAX_BYTES)
    with pytest.raises(ValueError, match=mentions(path, MAX_BYTES)):
        load_config(path)
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ValueError, match=mentions(path, "utf-8")):
        load_config(path)
    path.write_text("\ufeffa: ä\n", encoding="utf-8")  # as some editors begin a file
    assert load_config(path) == {"a": "ä"}


def test_a_missing_file_names_the_shipped_configs() -> None:
    names = sorted(shipped_configs())
    assert "quickstart" in names
    with pytest.raises(ValueError, match=mentions("runs/other", "YAML", ", ".join(names))):
        load_config("runs/other")
    with pytest.raises(ValueError, match=mentions("quikstart", "did you mean quickstart?")):
        load_config("quikstart")


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_a_shipped_config_is_found_by_name_and_describes_an_autoencoder(name: str) -> None:
    assert find_config(name) == find_config(f"{name}.yaml") == shipped_configs()[name]
    params = load_model_params(name)
    params["ddconfig"] = DDConfig.from_dict(params["ddconfig"])
    if "disc_start" in params["lossconfig"]["params"]:
        params["lossconfig"]["params"]["perceptual_weight"] = 0.0  # needs no weights of VGG
    with torch.device("meta"):
        assert AutoEncoderKL(**params).loss is not None


def test_a_config_without_model_params_is_an_error(tmp_path: Path) -> None:
    for text in ("a: 1\n", "model:\n", "model: {params: 3}\n"):
        (tmp_path / "it.yaml").write_text(text)
        with pytest.raises(ValueError, match=mentions("it.yaml", "model.params")):
            load_model_params(tmp_path / "it.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=2", {"a": {"b": 2, "c": None}}),
        ("a.b=1.0e-4", {"a": {"b": 1e-4, "c": None}}),
        ("a.b=[1, x]", {"a": {"b": [1, "x"], "c": None}}),
        ("a.b=null", {"a": {"b": None, "c": None}}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": None}}),
        ("a.b=", {"a": {"b": None, "c": None}}),
        ("a.c.d=1", {"a": {"b": 1, "c": {"d": 1}}}),
        ("n.e.w=true", {"a": {"b": 1, "c": None}, "n": {"e": {"w": True}}}),
        ("a={b: 3}", {"a": {"b": 3}}),
    ],
)
def test_an_override_sets_one_key(override: str, expected: dict[str, Any]) -> None:
    config: dict[str, Any] = {"a": {"b": 1, "c": None}}
    apply_override(config, override)
    assert config == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("a.b", ("'a.b'", "key.path=value", "optimizer.learning_rate=0.001")),
        ("=3", ("'=3'", "key.path=value")),
        ("a..b=3", ("'a..b=3'", "key.path=value")),
        ("a.b.c=3", ("a.b.c=3", "b", 1)),
        ("a.b=[1", ("a.b=[1", "YAML")),
        ("a.b={c: 1, c: 2}", ("a.b={c: 1, c: 2}", "twice")),
        ("a.\x1b[31m.c=1\x1b", ("a.\\x1b[31m.c", "YAML")),
        (f"a.b=[{'a ' * 10_000}", ("a.b=[a a a", "YAML")),
        ("a" * 10_000, ("key.path=value",)),
        ("a.b.\x1b[31m=1", ("a.b.\\x1b[31m", "b", 1)),
        ('a={"\\e": 1, "\\e": 2}', ("\\x1b", "twice")),
    ],
)
def test_an_invalid_override_is_named(override: str, parts: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)) as caught:
        apply_override({"a": {"b": 1}}, override)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_an_unquoted_pattern_is_answered_with_the_quoted_one(file: Path) -> None:
    for pattern, quoted in (("[*.png]", '["*.png"]'), ("[a, *.png, *.jpg]", 'a, "*.png", "*.jpg"')):
        with pytest.raises(ValueError, match=mentions("data.train.include", quoted)):
            apply_override({}, f"data.train.include={pattern}")
    file.write_text("data:\n  train:\n    include: [*.png]\n")
    with pytest.raises(ValueError, match=mentions(file, 'include: ["*.png"]')):
        load_config(file)


def test_overrides_apply_in_order_to_a_file(file: Path) -> None:
    config = load_config(file, ["optimizer.learning_rate=1", "optimizer.learning_rate=2"])
    assert config["optimizer"] == {"learning_rate": 2}
    assert load_config(file)["optimizer"] == {"learning_rate": 0.001}


PACKAGE = """\
data:
  train: {root: "package:skimage/data", include: [chelsea.png, coffee.png]}
  validation: {include: [coffee.png]}
"""


@pytest.mark.parametrize(
    ("overrides", "train", "validation"),
    [
        (["data.train.root=photos"], None, None),
        (["data.train={root: photos}"], None, None),
        (["data.train.root=photos", "data.train.include=[a.png]"], ["a.png"], None),
        (["data.validation.include=[b.png]", "data.train.root=photos"], None, ["b.png"]),
        (["data.validation.root=photos"], ["chelsea.png", "coffee.png"], None),
        (["data.train.root=package:skimage/data"], ["chelsea.png", "coffee.png"], ["coffee.png"]),
        (["data.resize=64"], ["chelsea.png", "coffee.png"], ["coffee.png"]),
    ],
)
def test_names_of_a_packages_images_are_dropped_with_its_root(
    file: Path,
    overrides: list[str],
    train: list[str] | None,
    validation: list[str] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file.write_text(PACKAGE)
    with caplog.at_level(logging.INFO, "kl_vae"):
        data = load_config(file, overrides)["data"]
    assert data["train"].get("include") == train
    assert data["validation"].get("include") == validation
    before = {"data.train": ["chelsea.png", "coffee.png"], "data.validation": ["coffee.png"]}
    dropped = [key for key in before if "include" not in data[key.partition(".")[2]]]
    dropped = [key for key in dropped if f"{key}={{root: photos}}" not in overrides]
    assert len(caplog.messages) == len(dropped)
    for key, message in zip(dropped, caplog.messages, strict=True):
        assert is_about(message, f"{key}.include", "package:skimage/data", "photos")


def test_patterns_of_a_users_own_folder_stay_when_it_moves(file: Path) -> None:
    file.write_text("data: {train: {root: old, include: ['a/*']}}")
    data = load_config(file, ["data.train.root=new"])["data"]
    assert data["train"] == {"root": "new", "include": ["a/*"]}


def test_of_a_compvis_file_model_and_recipe_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "autoencoder_kl.yaml"
    path.write_text(COMPVIS)
    with caplog.at_level(logging.INFO, "kl_vae"):
        config = load_config(path, ["data.train.root=images"])
    params = config["model"].pop("params")
    assert AutoEncoderKL(**params).latent_channels == 4
    rate = 4.5e-6 * 2 * 12
    adam = {"learning_rate": pytest.approx(rate), "eps": 1e-8, "clip_grad_norm": None}
    assert config == {
        "model": {},
        "data": {"train": {"root": "images"}, "resize": 16},
        "training": {"global_batch_size": 24, "accumulate_batches": 2, "max_steps": 200000},
        "optimizer": {"name": "adam", "betas": [0.5, 0.9], **adam},
        "discriminator_optimizer": adam,
    }
    named = ("image_key", "main.DataModuleFromConfig", "lightning", "global_batch_size")
    for message, name in zip(caplog.messages, named, strict=True):
        assert is_about(message, name)


def test_the_published_learning_rate_is_per_image_on_all_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "autoencoder_kl.yaml"
    path.write_text(COMPVIS)
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = load_config(path)
    assert config["training"]["global_batch_size"] == 72
    assert config["optimizer"]["learning_rate"] == pytest.approx(4.5e-6 * 72)
    config = load_config(path, ["training.global_batch_size=8"])
    assert config["optimizer"]["learning_rate"] == pytest.approx(4.5e-6 * 8)
    assert "accumulate_batches" not in config["training"]


def test_what_a_user_adds_to_a_compvis_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "autoencoder_kl.yaml"
    path.write_text(COMPVIS.replace("benchmark: true", "max_epochs: 5"))
    assert load_config(path)["training"]["epochs"] == 5
    overrides = ["optimizer.name=muon", "training.max_steps=7", "data.resize=null"]
    config = load_config(path, overrides)
    assert config["optimizer"] == {"name": "muon"}
    assert config["training"]["max_steps"] == 7 and "epochs" not in config["training"]
    assert config["data"]["resize"] is None
    rate = load_config(path, ["optimizer.learning_rate=1.0"])["optimizer"]["learning_rate"]
    assert rate == 1.0


def test_own_configs_give_no_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(file, ["model.target=AutoEncoderKL", "model.params.image_key=image"])
    assert caplog.messages == []


def test_a_config_of_another_model_is_an_error(file: Path) -> None:
    file.write_text("model: {target: ldm.models.autoencoder.VQModelInterface}\n")
    error = mentions("model.target='ldm.models.autoencoder.VQModelInterface'")
    with pytest.raises(ValueError, match=error):
        load_config(file)


def test_dump_writes_tuples_as_lists_and_repeats_what_is_shared() -> None:
    shared = (1, 2)
    text = dump_config({"b": shared, "a": shared, "rate": 1e-6})
    assert parse_yaml(text, "it") == {"b": [1, 2], "a": [1, 2], "rate": 1e-6}
    assert list(yaml.safe_load(text)) == ["b", "a", "rate"]
