"""Which module may import which, and what importing the package costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kl_vae

PACKAGE = Path(kl_vae.__file__).parent

# a module imports only from the floors below its own
FLOORS = (
    ("runtime",),
    ("blocks", "attention", "distribution", "latents", "ddconfig"),
    ("encoder", "decoder"),
    ("losses", "optim", "checkpoints", "data", "metrics", "accel"),
    ("model",),
    ("visual",),
    ("training", "inference"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# on one floor only these imports are allowed
SIDEWAYS = {
    "attention": {"blocks"},
    "ddconfig": {"attention", "blocks"},
    "decoder": {"encoder"},
    "metrics": {"losses"},
}


def part_of(module: str) -> str:
    """`kl_vae.losses.elbo` -> losses; kl_vae itself -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = {
        path: path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")
    }
    return {".".join(path.parts).removesuffix(".__init__"): file for file, path in paths.items()}


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "kl_vae":  # `from kl_vae import model` may mean a module
                imported = [a.name for a in node.names if a.name != "__version__"]
                names = [f"kl_vae.{name}" if name in FLOOR else "kl_vae" for name in imported]
        else:
            continue
        parts |= {part_of(name) for name in names if name.split(".")[0] == "kl_vae"}
    return parts


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120
    )


def test_every_module_has_a_floor_and_every_floor_is_inhabited() -> None:
    assert {part_of(module) for module in modules()} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down_only(module: str) -> None:
    part = part_of(module)
    for imported in imported_parts(modules()[module]) - {part}:
        below = FLOOR[imported] < FLOOR[part] or imported in SIDEWAYS.get(part, ())
        assert below, f"{module} imports kl_vae.{imported}, which does not lie below it"


def test_the_public_names_are_written_alike_in_their_three_places() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for section in tree.body
        if isinstance(section, ast.If)  # TYPE_CHECKING
        for node in ast.walk(section)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"kl_vae.{module}" for name, module in kl_vae._MODULES.items()}
    assert kl_vae.__all__ == sorted([*typed, "__version__"])
    assert all(callable(getattr(kl_vae, name)) for name in typed)
    with pytest.raises(AttributeError, match="module 'kl_vae' has no attribute 'AutoEncoder'"):
        kl_vae.AutoEncoder  # noqa: B018


# the public names that are no whole command, which needs its libraries
MODULES = [
    name
    for name, module in kl_vae._MODULES.items()
    if module.split(".")[0] not in ("inference", "training", "visual")
]
IMPORT = f"from kl_vae import {', '.join(MODULES)}; "


def test_the_modules_need_torch_alone() -> None:
    script = f"import json, sys, torch; before = set(sys.modules); {IMPORT}"
    script += "print(json.dumps(sorted(set(sys.modules) - before)))"
    added = {name.split(".")[0] for name in json.loads(python("-c", script).stdout)}
    assert "kl_vae" in added
    assert not added - {"kl_vae"} - set(sys.stdlib_module_names)


def test_the_encoder_needs_few_modules() -> None:
    script = "import sys, kl_vae.encoder; print(*(m for m in sys.modules if m[:6] == 'kl_vae'))"
    assert len(python("-c", script).stdout.split()) <= 8


def test_help_does_not_wait_for_torch() -> None:
    # each line of -X importtime ends in `| name of an imported module`
    done = python("-X", "importtime", "-m", "kl_vae", "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "usage: kl-vae" in done.stdout
    assert "kl_vae.cli.main" in imported
    assert "torch" not in imported


def test_training_and_inference_do_not_wait_for_torchvision() -> None:
    """It takes as long to import as torch; LPIPS and the named data sets alone need it."""
    script = "import sys, kl_vae.training.loop, kl_vae.inference.coding; "
    script += "print('torch' in sys.modules, 'torchvision' in sys.modules)"
    assert python("-c", script).stdout == "True False\n"


def test_the_command_without_arguments_prints_help_and_knows_its_version() -> None:
    helped = python("-m", "kl_vae").stdout
    assert helped == python("-m", "kl_vae", "--help").stdout
    assert "--version" in helped
    assert python("-m", "kl_vae", "--version").stdout == f"kl-vae {kl_vae.__version__}\n"
