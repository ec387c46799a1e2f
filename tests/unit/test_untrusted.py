"""Untrusted files are never executed: forbidden calls, and errors of malicious files."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import kl_vae
from kl_vae.checkpoints.run_files import write_checkpoint
from kl_vae.cli.main import main
from tests.messages import is_about, mentions

SOURCES = sorted(Path(kl_vae.__file__).parent.rglob("*.py"))

# what runs code that lies in a file; a few places import, and only what the user has named
EXECUTES = {"eval", "exec", "__import__", "pickle.load", "pickle.loads", "os.system"}
IMPORTS = {
    "__init__.py": "the package's own modules, by name",
    "runtime/imports.py": "what a config names below a prefix that the user allowed",
    "cli/main.py": "commands, and --import",
    "data/file_types.py": "plugins of Pillow, by name",
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Each call in a file, with the dotted name of what is called."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in nodes]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_nothing_unpickles_or_executes(path: Path) -> None:
    for name, call in calls(path):
        assert name not in EXECUTES, f"{path}:{call.lineno}: {name}"
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        if name == "torch.load":
            assert options["weights_only"] == "True", f"{path}:{call.lineno}"
        if name == "np.load":
            assert options["allow_pickle"] == "False", f"{path}:{call.lineno}"
        if name == "yaml.load":
            assert options["Loader"] == "_StrictLoader", f"{path}:{call.lineno}"
        if name.endswith("import_module"):
            relative = path.relative_to(Path(kl_vae.__file__).parent).as_posix()
            assert relative in IMPORTS, f"{path}:{call.lineno}"


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import torch\nx = torch.load('f', weights_only=False)\n")
    (tmp_path / "b.py").write_text("eval('1')\n")
    (tmp_path / "c.py").write_text("x = np.load('f')\n")
    for name in ("a.py", "b.py", "c.py"):
        with pytest.raises((AssertionError, KeyError)):
            test_nothing_unpickles_or_executes(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("attn_type", ("attn_type='my_evil.Class'", "linear, none, vanilla")),
        ("norm_type", ("norm_type='my_evil.Class'", "group")),
        ("block_type", ("block_type='my_evil.Class'", "resnet")),
        ("lossconfig", None),
    ],
)
def test_what_a_checkpoint_names_is_never_imported(
    key: str,
    parts: tuple[str, ...] | None,
    tiny_model: kl_vae.AutoEncoderKL,
    tiny_ddconfig: dict[str, Any],
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (project / "my_evil.py").write_text("open('executed', 'w')\nclass Class: pass\n")
    monkeypatch.syspath_prepend(project)
    params: dict[str, Any] = {"ddconfig": tiny_ddconfig, "embed_dim": 3}
    named = {"target": "my_evil.Class"} if key == "lossconfig" else "my_evil.Class"
    (params if key == "lossconfig" else params["ddconfig"])[key] = named
    content = {"model": tiny_model.state_dict(), "config": {"model": {"params": params}}}
    write_checkpoint(project / "a.pt", content)
    code = main(["reconstruct", "--checkpoint", "a.pt", "--images", "images", "--out", "out"])
    assert not (project / "executed").exists()
    if parts is None:
        assert code == 0
    else:
        assert code == 2 and is_about(capsys.readouterr().err, *parts)


def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path: Path) -> None:
    from kl_vae.checkpoints.torch_file import read_torch_file

    path = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(4)}, path)
    content = path.read_bytes()
    # the pickled size (4,) becomes (127,)
    size, claimed = b"K\x04\x85", b"K\x7f\x85"
    assert content.count(size) == 1
    path.write_bytes(content.replace(size, claimed))
    with pytest.raises(ValueError, match=mentions(path, "checkpoint")):
        read_torch_file(path)
