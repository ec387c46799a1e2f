"""What `pip install` puts on a machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, which stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "kl_vae", "configs"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(
        [*command, "-w", str(folder)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_every_config_and_py_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kl_vae").rglob("*.py")}
    assert modules <= names
    configs = {f"kl_vae/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(configs) >= 7 and configs <= names
    web = [path for path in (ROOT / "kl_vae" / "visual").rglob("web/**/*") if path.is_file()]
    pages = {path.relative_to(ROOT).as_posix() for path in web}
    assert "kl_vae/visual/web/gallery/page.html" in pages and pages <= names
    assert "kl_vae/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "configs", "scripts"))]


def test_an_installed_package_finds_its_configs_by_name(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import kl_vae.runtime.config_file as c;"
        "print(c.__file__); print(*sorted(c.shipped_configs()));"
        "print(c.load_config('kl-f8')['model']['params']['embed_dim'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    where, names, embed_dim = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert {"kl-f4", "kl-f8", "kl-f16", "kl-f32", "quickstart"} <= set(names.split())
    assert embed_dim == "4"


def test_metadata_says_what_users_need(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = archive.read(name).decode()
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    core = {line.split()[1].split(">")[0].lower() for line in needs if "extra ==" not in line}
    assert core == {"torch", "torchvision", "pyyaml", "tqdm"}
    assert "License-Expression: MIT" in metadata
    (points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "kl-vae = kl_vae.cli.main:main" in archive.read(points).decode()
