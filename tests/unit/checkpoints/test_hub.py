"""Names on the hub: downloads, the cache, and errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kl_vae.checkpoints.hub import FORM, fetch, is_hub_name
from tests.hub_server import Hub, fetch_all
from tests.messages import is_about, mentions

CONFIG = {"_class_name": "AutoencoderKL"}
SAFETENSORS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
BIN = "diffusion_pytorch_model.bin"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
WEIGHT_MAP = {"decoder.conv_in.weight": SHARDS[1], "a": SHARDS[0], "b": SHARDS[0]}

VAE = {"config.json": CONFIG, SAFETENSORS: b"one", BIN: b"two", "README.md": b"three"}
PIPELINE = {
    "model_index.json": {"_class_name": "FluxPipeline"},
    "unet/config.json": {"_class_name": "UNet2DConditionModel"},
    f"unet/{SAFETENSORS}": b"four",
    "vae/config.json": CONFIG,
    f"vae/{SAFETENSORS}": b"five",
    "sd.safetensors": b"six",
}
REPOSITORIES: dict[str, dict[str, Any]] = {
    "o/vae": VAE,
    "o/pipeline": PIPELINE,
    "o/other": {**PIPELINE, "config.json": {"_class_name": "UNet2DConditionModel"}},
    "o/damaged": {**PIPELINE, "config.json": b"{"},
    "o/nested": {f"a/b/{name}": content for name, content in VAE.items()},
    "o/sharded": {
        "config.json": CONFIG,
        INDEX: {"weight_map": WEIGHT_MAP},
        **{shard: shard.encode() for shard in SHARDS},
        BIN: b"eight",
    },
    "o/bin": {"config.json": CONFIG, BIN: b"nine", "diffusion_pytorch_model.fp16.bin": b"ten"},
    "o/fp16": {"config.json": CONFIG, "diffusion_pytorch_model.fp16.safetensors": b"eleven"},
    "o/moving": VAE,
    "o/single": {**PIPELINE, f"a/b/{BIN}": b"twelve", "a/model.PT": b""},
    "o/empty": {"README.md": b"thirteen"},
    "o/weightless": {"config.json": CONFIG, "model.ckpt": b"fourteen"},
    "o/shardless": {"config.json": CONFIG, INDEX: {"weight_map": WEIGHT_MAP}},
    "o/mapless": {"config.json": CONFIG, INDEX: [1]},
    "o/climbing": {"config.json": CONFIG, INDEX: {"weight_map": {"a": "../secret"}}},
    "o/cut": VAE,
    "o/forbidden": VAE,
}
REFUSED = {
    "o/gated": (403, "GatedRepo"),
    "o/token": (403, ""),
    "o/down": (503, ""),
    "GET o/cut@main/config.json": (410, ""),
    "GET o/forbidden@main/config.json": (403, ""),
}

# name -> folder or file within the snapshot
FETCHED = {
    "hf://o/vae": "",
    "hf:/o/vae": "",
    "hf://o/vae@v1": "",
    "hf://o/vae@feature%2Ffast": "",
    "hf://o/vae@refs/pr/7": "",
    "hf://o/pipeline": "vae",
    "hf://o/pipeline@main/vae": "vae",
    "hf://o/pipeline/sd.safetensors": "sd.safetensors",
    "hf://o/other": "vae",
    "hf://o/damaged": "vae",
    "hf://o/nested/a/b": "a/b",
    "hf://o/sharded": "",
    "hf://o/bin": "",
    "hf://o/fp16": "",
    "hf://o/moving": "",
    f"hf://o/single@main/a/b/{BIN}": f"a/b/{BIN}",
}
IN_VAE = {"vae/config.json", f"vae/{SAFETENSORS}"}
DOWNLOADED = {
    "o/vae": {"config.json", SAFETENSORS},
    "o/pipeline": {*IN_VAE, "sd.safetensors"},
    "o/other": {"config.json", *IN_VAE},
    "o/damaged": {"config.json", *IN_VAE},
    "o/nested": {"a/b/config.json", f"a/b/{SAFETENSORS}"},
    "o/sharded": {"config.json", INDEX, *SHARDS},
    "o/bin": {"config.json", BIN},
    "o/fp16": {"config.json", "diffusion_pytorch_model.fp16.safetensors"},
    "o/single": {f"a/b/{BIN}"},
}
# name -> parts of its error
LOOKED_FOR = ("config.json", "_class_name", "Autoencoder", "vae/config.json")
NOT_FETCHED: dict[str, tuple[object, ...]] = {
    "hf://o/nothing": ("private", "`hf auth login`"),
    "hf://o/gated": ("gated repository", "`hf auth login`"),
    "hf://o/token": (*LOOKED_FOR, "403 Forbidden", "`hf auth login`", "HF_TOKEN"),
    "hf://o/forbidden": ("config.json", "403 Forbidden", "`hf auth login`", "HF_TOKEN"),
    "hf://o/down": (*LOOKED_FOR, 503),
    "hf://o/cut": ("config.json", 410),
    "hf://o/vae@v2": ("'v2'",),
    "hf://o/vae/x.pt": (" x.pt",),
    "hf://o/empty": (*LOOKED_FOR, FORM),
    "hf://o/single/a": (
        *("a/config.json", "_class_name", "Autoencoder", "a/vae/config.json"),
        FORM,
    ),
    "hf://o/weightless": (
        *("config.json", SAFETENSORS, INDEX, BIN),
        *("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"),
    ),
    "hf://o/shardless": (SHARDS[0], INDEX),
    "hf://o/mapless": (INDEX,),
    "hf://o/climbing": (INDEX, "'../secret'"),
    "hf://o/-a": ("Repo id", "'o/-a'", FORM),
}
# errors that are the same with and without the hub
KNOWN_OFFLINE = {"hf://o/mapless", "hf://o/climbing", "hf://o/-a"}


class Answers(NamedTuple):
    """The path or error message of each name, from three processes with one cache."""

    online: dict[str, Path | str]
    offline: dict[str, Path | str]  # with HF_HUB_OFFLINE
    alone: dict[str, Path | str]  # without it, and the hub is down
    pinned: str  # a name with an older commit
    requests: list[str]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    pytest.importorskip("huggingface_hub")
    hub, cache = Hub(), tmp_path_factory.mktemp("cache")
    pinned = "hf://o/vae@" + hub.commit("o/vae", {**VAE, SAFETENSORS: b"old"})
    for repository, files in REPOSITORIES.items():
        hub.commit(repository, files)
    for branch in ("v1", "feature/fast", "refs/pr/7"):
        hub.commit("o/vae", {**VAE, SAFETENSORS: branch.encode()}, branch)
    hub.commit("o/moving", {**VAE, SAFETENSORS: b"new"}, delayed=True)
    hub.refused.update(REFUSED)
    names = [*FETCHED, *NOT_FETCHED, pinned]
    with hub:
        online = fetch_all(names, hub.url, cache)
    offline = fetch_all(names, hub.url, cache, HF_HUB_OFFLINE="1")
    alone = fetch_all([*FETCHED, "hf://o/nothing"], hub.url, cache)
    return Answers(online, offline, alone, pinned, hub.requests)


def path_of(answer: Path | str) -> Path:
    assert isinstance(answer, Path), answer
    return answer


def assert_is_error(answer: Path | str, name: str, *parts: object) -> None:
    assert isinstance(answer, str) and "\n" not in answer
    assert answer.startswith(f"{name}: ") and is_about(answer, *parts), answer


@pytest.mark.parametrize(("name", "place"), FETCHED.items())
def test_a_name_gives_a_path_in_a_snapshot(answers: Answers, name: str, place: str) -> None:
    path = path_of(answers.online[name])
    assert re.search(rf"/snapshots/[0-9a-f]{{40}}{'/' if place else ''}{place}$", path.as_posix())
    assert path.is_file() if place.endswith(("bin", "safetensors")) else path.is_dir()


@pytest.mark.parametrize(("repository", "files"), DOWNLOADED.items())
def test_only_config_and_one_set_of_weights_are_downloaded(
    answers: Answers, repository: str, files: set[str]
) -> None:
    pattern = re.compile(f"GET {repository}@(?:[0-9a-f]{{40}}|main)/(.*)")
    assert {m[1] for request in answers.requests if (m := pattern.fullmatch(request))} == files


def test_no_other_files_of_a_pipeline_are_requested(answers: Answers) -> None:
    asked = [request.partition("@")[2] for request in answers.requests]
    assert not [file for file in asked if "unet" in file or "model_index" in file]


@pytest.mark.parametrize("revision", ["v1", "feature%2Ffast", "refs/pr/7"])
def test_the_weights_are_of_the_given_revision(answers: Answers, revision: str) -> None:
    path = path_of(answers.online[f"hf://o/vae@{revision}"])
    assert (path / SAFETENSORS).read_text() == revision.replace("%2F", "/")


def test_a_commit_is_unchanged_when_its_branch_moves(answers: Answers) -> None:
    assert (path_of(answers.online[answers.pinned]) / SAFETENSORS).read_bytes() == b"old"
    assert (path_of(answers.online["hf://o/vae"]) / SAFETENSORS).read_bytes() == VAE[SAFETENSORS]


def test_weights_and_config_are_of_one_commit(answers: Answers) -> None:
    path = path_of(answers.online["hf://o/moving"])
    assert (path / SAFETENSORS).read_bytes() == VAE[SAFETENSORS]  # not b"new"


def test_what_is_in_the_cache_is_found_without_the_hub(answers: Answers) -> None:
    for name in [*FETCHED, answers.pinned]:
        assert answers.offline[name] == path_of(answers.online[name])
    for name in FETCHED:
        assert answers.alone[name] == answers.online[name]


@pytest.mark.parametrize(("name", "parts"), NOT_FETCHED.items())
def test_errors_online(answers: Answers, name: str, parts: tuple[object, ...]) -> None:
    assert_is_error(answers.online[name], name, *parts)


@pytest.mark.parametrize("name", NOT_FETCHED)
def test_errors_offline(answers: Answers, name: str) -> None:
    if name in KNOWN_OFFLINE:
        assert answers.offline[name] == answers.online[name]
    else:
        assert_is_error(answers.offline[name], name, "cache", "HF_HUB_OFFLINE")


def test_errors_without_a_network(answers: Answers) -> None:
    name = "hf://o/nothing"
    assert_is_error(answers.alone[name], name, "cache", *LOOKED_FOR, "refused")


@pytest.mark.parametrize(
    "name",
    [
        "hf://",
        "hf://o",
        "hf://o/",
        "hf://o/@v1",
        "hf:///o/a",
        "hf://o//a",
        "hf://o/a/",
        "hf://o/a//vae",
        "hf://o/a@",
        "hf://o/a@/vae",
        "hf://o@v1/a",
        "hf://o/a@b@c/..",
        "hf://o/..",
        "hf://o/a/../b",
        "hf://o/a/./b",
        "hf://o/a@..%2Fb",
        "hf://o/a@%2Fb",
        "o/a",
    ],
)
def test_an_invalid_name_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=mentions(f"{name}: ", FORM)):
        fetch(name)


def test_a_path_can_be_a_hub_name() -> None:
    assert all(map(is_hub_name, ["hf://o/a", "hf:/o/a", Path("hf://o/a"), "hf://"]))
    assert not any(map(is_hub_name, ["o/a", "hf", "/hf://o/a", Path("/hf://o/a"), Path("hf:"), ""]))


def test_without_huggingface_hub_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError) as error:
        fetch("hf://o/a")
    parts = ("huggingface_hub", 'pip install "kl-vae[hub]"')
    assert_is_error(str(error.value), "hf://o/a", *parts)
