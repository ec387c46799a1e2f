"""Export CompVis files and diffusers folders."""

import json
import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kl_vae import AutoEncoderKL
from kl_vae.checkpoints.export import DTYPES, write_compvis, write_diffusers
from tests.conftest import TINY_DDCONFIG
from tests.messages import is_about, mentions
from tests.processes import assert_same

NAME = "diffusion_pytorch_model.safetensors"
PER_CHANNEL = {"mean": (0.5, -1.0, 0.0, 2.0), "std": (1.0, 2.0, 0.5, 4.0), "per_channel": True}
Write = Callable[..., None]
WRITERS = [(write_compvis, "model.safetensors"), (write_diffusers, "vae")]
both = pytest.mark.parametrize(("write", "name"), WRITERS, ids=["compvis", "diffusers"])


@pytest.fixture(scope="module")
def model() -> AutoEncoderKL:
    torch.manual_seed(0)
    return AutoEncoderKL(TINY_DDCONFIG, 4, latents={"scale_factor": 0.5, "shift_factor": 0.25})


@pytest.fixture
def written(model: AutoEncoderKL) -> Callable[..., None]:
    def call(write: Write, out: Path, dtype: str = "fp32", **changed: Any) -> None:
        write(out, model.state_dict() | changed, model.params, dtype)

    return call


def tensors_of(out: Path) -> dict[str, Any]:
    return dict(load_file(out / NAME if out.is_dir() else out))


@both
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_weights_have_the_requested_dtype(
    model: AutoEncoderKL, written: Write, tmp_path: Path, write: Write, name: str, dtype: str
) -> None:
    out = tmp_path / name
    written(write, out, dtype)
    assert {x.dtype for x in tensors_of(out).values()} == {DTYPES[dtype]}
    expected = {key: x.to(DTYPES[dtype]).float() for key, x in model.state_dict().items()}
    read = AutoEncoderKL.from_checkpoint(out)
    assert_same(read.state_dict(), expected)  # float32 again
    assert read.latents == model.latents
    assert [path.name for path in tmp_path.iterdir()] == [name]


@both
def test_an_unknown_dtype_is_refused(
    written: Write, tmp_path: Path, write: Write, name: str
) -> None:
    with pytest.raises(ValueError, match=mentions("dtype='fp8'", "fp32, fp16, bf16")):
        written(write, tmp_path / name, "fp8")
    assert not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize(
    ("value", "dtype", "parts"),
    [
        (-7e4, "fp16", ("fp16", 70000, "bf16", "fp32")),
        (3.4e38, "bf16", ("bf16", "3.4e+38")),
        (torch.inf, "fp32", ("fp32", "inf")),
        (torch.nan, "fp16", ("fp16", "nan")),
    ],
)
def test_values_that_do_not_fit_are_refused(
    written: Write,
    tmp_path: Path,
    write: Write,
    name: str,
    value: float,
    dtype: str,
    parts: tuple[object, ...],
) -> None:
    bias = torch.zeros(8)
    bias[3] = value
    with pytest.raises(ValueError, match=mentions("quant_conv.bias", *parts)):
        written(write, tmp_path / name, dtype, **{"quant_conv.bias": bias})
    assert not list(tmp_path.iterdir())


@both
def test_views_and_shared_tensors_are_written(
    model: AutoEncoderKL, written: Write, tmp_path: Path, write: Write, name: str
) -> None:
    """Views, shared memory, tensors that require gradients, doubles."""
    shared = torch.randn(16, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(8, 8, 1, 1).transpose(0, 1)
    changed = {"quant_conv.bias": shared[::2], "quant_conv.weight": kernel}
    changed["post_quant_conv.bias"] = shared[:4]
    written(write, tmp_path / name, **changed)
    expected = {key: x.detach().float() for key, x in (model.state_dict() | changed).items()}
    assert_same(AutoEncoderKL.from_checkpoint(tmp_path / name).state_dict(), expected)


@both
def test_an_existing_path_is_an_error_and_unchanged(
    written: Write, tmp_path: Path, write: Write, name: str
) -> None:
    for content in ("file", "folder"):
        out = tmp_path / content / name
        out.parent.mkdir()
        inner = out / "inner" if content == "folder" else out
        inner.parent.mkdir(exist_ok=True)
        inner.write_text("before")
        with pytest.raises(ValueError, match=mentions(out, "exists")):
            written(write, out)
        assert inner.read_text() == "before"
        assert [path.name for path in out.parent.iterdir()] == [name]


def test_an_empty_folder_is_accepted(written: Write, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    written(write_diffusers, tmp_path / "vae")
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["config.json", NAME]


def test_the_working_directory_is_an_error(
    written: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^\.: .*\bexists\b"):
        written(write_diffusers, Path())
    assert not list(tmp_path.iterdir())


def test_parent_folders_are_created(written: Write, tmp_path: Path) -> None:
    written(write_diffusers, tmp_path / "a" / "b" / "vae")
    assert (tmp_path / "a" / "b" / "vae" / NAME).is_file()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model", "model.SAFETENSORS", "model."])
def test_another_suffix_is_refused(written: Write, tmp_path: Path, name: str) -> None:
    fixed = f"{Path(name).stem}.safetensors"
    with pytest.raises(ValueError, match=mentions(tmp_path / name, fixed)):
        written(write_compvis, tmp_path / name)
    assert not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("folder/../file", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
    ],
    ids=lambda x: x[:20],
)
def test_an_unwritable_path_is_an_error(
    written: Write, tmp_path: Path, write: Write, name: str, place: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    out = tmp_path / place / name
    with pytest.raises(ValueError, match=mentions(out, "[Errno")) as caught:
        written(write, out)
    assert reason in str(caught.value) or "File exists" in str(caught.value)  # from mkdir
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]


@both
def test_a_name_that_is_too_long_is_refused(
    written: Write, tmp_path: Path, write: Write, name: str
) -> None:
    out = tmp_path / ("x" * 300 + name)
    with pytest.raises(ValueError, match=mentions(out, "File name too long")):
        written(write, out)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_a_file_is_an_error(written: Write, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.mkdir()
    with pytest.raises(ValueError, match=mentions(out, "Is a directory")):
        written(write_compvis, out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert not list(out.iterdir())


@pytest.fixture
def little_room() -> Iterator[None]:
    """Limit the size of files, as on a disk that is nearly full."""
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, room[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, room)


@both
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.usefixtures("little_room")
def test_a_full_disk_leaves_nothing_behind(
    written: Write, tmp_path: Path, write: Write, name: str, existing: bool
) -> None:
    out = tmp_path / name
    if existing and write is write_diffusers:
        out.mkdir()
    before = list(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=mentions(out, "File too large")):
        written(write, out)
    assert list(tmp_path.rglob("*")) == before


def test_metadata_hold_the_whole_config(model: AutoEncoderKL, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    params = model.params
    params["ddconfig"] |= {"tanh_out": True, "norm_groups": 16, "resolution": 64}
    params["ddconfig"]["attn_resolutions"] = (32,)
    write_compvis(out, model.state_dict(), params | {"monitor": "val/rec_loss"})
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "kl_vae"}
    assert metadata["format"] == "pt"
    said = json.loads(metadata["kl_vae"])["model"]["params"]
    assert said == json.loads(json.dumps(params | {"monitor": "val/rec_loss"}))
    read = AutoEncoderKL.from_checkpoint(out)
    assert (read.config.tanh_out, read.config.norm_groups) == (True, 16)
    assert read.monitor == "val/rec_loss"
    assert read.latents == model.latents


def test_a_compvis_file_supports_all_configs(tmp_path: Path) -> None:
    keys = {"attn_type": "linear", "resamp_with_conv": False, "ch_mult": [2, 4]}
    model = AutoEncoderKL(TINY_DDCONFIG | keys, 3)
    write_compvis(tmp_path / "model.safetensors", model.state_dict(), model.params)
    read = AutoEncoderKL.from_checkpoint(tmp_path / "model.safetensors")
    assert read.config == model.config
    assert_same(read.state_dict(), model.state_dict())
    parts = ("attn_type=linear", "softmax", "embed_dim=3", "z_channels=4", "ch_mult=[2, 4]", "ch")
    with pytest.raises(ValueError, match=mentions("diffusers", *parts, "resamp_with_conv=false")):
        write_diffusers(tmp_path / "vae", model.state_dict(), model.params)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_batch_norm_stays_float32(tmp_path: Path) -> None:
    latents = {"mean": (1e5,) * 16, "std": (1e-3,) * 16, "patch_size": 2, "per_channel": True}
    model = AutoEncoderKL(TINY_DDCONFIG, 4, latents=latents)
    write_diffusers(tmp_path / "vae", model.state_dict(), model.params, "fp16")
    tensors = tensors_of(tmp_path / "vae")
    assert {str(x.dtype) for key, x in tensors.items() if key.startswith("bn.running")} == {
        "torch.float32"
    }
    assert tensors["bn.num_batches_tracked"].dtype == torch.int64
    assert tensors["quant_conv.weight"].dtype == torch.float16
    read = AutoEncoderKL.from_checkpoint(tmp_path / "vae").latents
    assert read is not None and read.mean == latents["mean"]
    assert read.std == pytest.approx(latents["std"], rel=1e-3)


@pytest.mark.parametrize("latents", [{"patch_size": 2}, {"patch_size": 2, "scale_factor": 2.0}])
def test_patches_without_statistics_keep_their_scale(
    latents: dict[str, Any], tmp_path: Path
) -> None:
    model = AutoEncoderKL(TINY_DDCONFIG, 4, latents=latents)
    write_diffusers(tmp_path / "vae", model.state_dict(), model.params)
    read = AutoEncoderKL.from_checkpoint(tmp_path / "vae").latents
    assert read is not None and read.scale_factor == latents.get("scale_factor", 1.0)


def test_an_unknown_scale_is_logged(
    model: AutoEncoderKL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "vae"
    with caplog.at_level(logging.WARNING, "kl_vae"):
        write_diffusers(tmp_path / "known", model.state_dict(), model.params)
        assert not caplog.messages
        write_diffusers(out, model.state_dict(), model.params | {"latents": None})
    (message,) = caplog.messages
    assert is_about(message, out, "scaling_factor=1.0", "kl-vae encode --statistics")


def listed(config: dict[str, Any]) -> dict[str, Any]:
    return {key: list(x) if isinstance(x, tuple) else x for key, x in config.items()}


@pytest.mark.filterwarnings("ignore")  # of packages that diffusers looks for
@pytest.mark.parametrize(
    ("keys", "embed_dim", "latents"),
    [
        ({}, 4, {"scale_factor": 0.18215}),
        ({"z_channels": 16}, None, {"scale_factor": 1.5305, "shift_factor": 0.0609}),
        ({"attn_type": "none", "attn_resolutions": []}, 4, {"scale_factor": 1.0}),
        ({"ch_mult": [1, 2, 4], "attn_resolutions": [16, 4]}, 4, PER_CHANNEL),
    ],
)
def test_the_config_is_what_diffusers_writes(
    tmp_path: Path, keys: dict[str, Any], embed_dim: int | None, latents: dict[str, Any]
) -> None:
    """Compare each key with the config of a model that diffusers builds from ours."""
    diffusers = pytest.importorskip("diffusers")
    model = AutoEncoderKL(TINY_DDCONFIG | keys, embed_dim, latents=latents)
    write_diffusers(tmp_path / "ours", model.state_dict(), model.params)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    theirs.save_config(tmp_path / "theirs")
    ours, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")
    )
    written = {key: x for key, x in written.items() if not key.startswith("_") or key in ours}
    assert ours == written
    with torch.device("meta"):
        defaults = listed(dict(diffusers.AutoencoderKL().config))
    assert ours.keys() == {key for key in defaults if not key.startswith("_")} | {"_class_name"}


@pytest.mark.filterwarnings("ignore")
def test_the_config_of_a_batch_norm_is_what_diffusers_writes(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "AutoencoderKLFlux2"):
        pytest.skip("diffusers without FLUX.2")
    latents = {"mean": (0.5,) * 16, "std": (2.0,) * 16, "patch_size": 2, "per_channel": True}
    model = AutoEncoderKL(TINY_DDCONFIG, 4, latents=latents)
    write_diffusers(tmp_path / "ours", model.state_dict(), model.params)
    theirs = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "ours")
    theirs.save_config(tmp_path / "theirs")
    ours, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")
    )
    defaulted = {"_diffusers_version", "_name_or_path", "force_upcast"}
    assert {key: x for key, x in written.items() if key in ours} == ours
    assert {key for key in written if key not in ours} <= defaulted | {"decoder_block_out_channels"}


def test_the_config_is_indented_and_sorted(written: Write, tmp_path: Path) -> None:
    written(write_diffusers, tmp_path / "vae")
    text = (tmp_path / "vae" / "config.json").read_text()
    assert text.endswith("}\n")
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(keys)


def test_the_tensors_of_a_loss_are_not_written(tmp_path: Path) -> None:
    loss = {"target": "elbo"}
    model = AutoEncoderKL(TINY_DDCONFIG, 4, loss, latents={"scale_factor": 1.0})
    assert "loss.logvar" in model.state_dict()
    model.save_pretrained(tmp_path / "vae")
    model.save_compvis(tmp_path / "model.safetensors")
    for out in (tmp_path / "vae", tmp_path / "model.safetensors"):
        assert not [key for key in tensors_of(out) if key.startswith("loss.")]
        assert_same(
            AutoEncoderKL.from_checkpoint(out).state_dict(), model.without_loss().state_dict()
        )
