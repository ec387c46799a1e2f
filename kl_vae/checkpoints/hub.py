"""Which local folder or file a name on the Hugging Face hub means.

A name is `hf://ORG/NAME`, a subfolder of it or a file in it, with `@REVISION` after NAME for
another branch, tag or commit than main. Only an autoencoder's config and one set of its weights
are downloaded; huggingface_hub keeps them in its cache, and finds them there when offline.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from kl_vae.checkpoints.diffusers import CONFIG, INDEX, WEIGHT_FILES, read_json, shard_names

PREFIX = "hf://"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files of weights
FORM = "hf://ORG/NAME[@REVISION][/SUBFOLDER or /FILE.safetensors]"

_PATH_PREFIX = "hf:/"  # what Path makes of PREFIX
# a revision with a slash is written with %2F, but for that of a pull request, as fsspec does
_NAME = re.compile(
    r"hf://?(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>refs/pr/\d+|[^/]+))?(?P<path>(/[^/]+)*)"
)
_SHARD = re.compile(r"[\w-][\w.-]*")  # a file beside the index: no slash, no leading dot


def is_hub_name(path: str | Path) -> bool:
    """Return whether it names something on the hub; so may a Path, which has lost a slash."""
    return _text(path).startswith(_PATH_PREFIX)


def fetch(name: str | Path) -> Path:
    """Download what a name means, unless it is in the cache, and return its local path.

    A last part that ends in .safetensors, .ckpt, .pt, .pth or .bin is a file. All else is a folder
    with an autoencoder of diffusers: in it or, where its config.json is of something else or
    lacking, as in a pipeline, in its subfolder `vae`. All files are of one commit.

    Returns:
        The file, or the folder that holds config.json and the weights. They are in the cache:
        not to be written to.

    Raises:
        ValueError: not such a name, nothing of the kind on the hub, no access, neither a
            connection nor the files in the cache, or no huggingface_hub.
    """
    parts = _NAME.fullmatch(_text(name))
    rest = _text(name)[parts.start("repository") :] if parts else ""
    revision = unquote(parts["revision"] or "main") if parts else ""
    if not parts or {"", ".", ".."} & {*rest.split("/"), *revision.split("/")}:
        raise ValueError(f"{name}: not a name on the hub; write {FORM}")
    snapshot = _Snapshot(PREFIX + rest, parts["repository"], revision)
    path = parts["path"].removeprefix("/")
    if path.endswith(SUFFIXES):
        return snapshot.require(path, "check its name")
    return _fetch_folder(snapshot, f"{path}/" if path else "")


def _fetch_folder(snapshot: _Snapshot, folder: str) -> Path:
    """Fetch the config and the weights that lie in a folder ("" or "a/b/") or in its `vae/`."""
    config = snapshot.get(folder + CONFIG)
    if config is None or not _is_of_autoencoder(config):
        folder, outer = f"{folder}vae/", folder
        config = snapshot.get(folder + CONFIG)
        if config is None:
            raise snapshot.missing(
                "no autoencoder in it",
                f"a {outer}{CONFIG} whose _class_name begins with Autoencoder, {folder}{CONFIG}",
                f"name its subfolder or a file: {FORM}",
            )
    for weights in WEIGHT_FILES:
        if path := snapshot.get(folder + weights):
            break
    else:
        problem = f"no weights beside {folder}{CONFIG}"
        raise snapshot.missing(problem, ", ".join(WEIGHT_FILES), "name a file of weights")
    if weights == INDEX:
        for shard in _shards(path, f"{snapshot.name}: {folder}{INDEX}"):
            snapshot.require(folder + shard, f"{folder}{INDEX} names it; name a file of weights")
    return config.parent


class _Snapshot:
    """The files of a repository at one commit: that of the first file that is found."""

    def __init__(self, name: str, repository: str, revision: str) -> None:
        self.name = name
        self._repository = repository
        self._revision = revision
        self._unreachable = ""  # why, and the fix: from then on only the cache is searched

    def get(self, file: str) -> Path | None:
        """Return a file's path in the cache; None: not in the repository, or not reachable."""
        try:
            from huggingface_hub import errors, hf_hub_download
        except ImportError as error:
            raise ValueError(
                f"{self.name}: a name on the hub needs huggingface_hub ({error}); "
                'pip install "kl-vae[hub]", or give a local path'
            ) from None
        try:
            path = hf_hub_download(
                self._repository,
                file,
                revision=self._revision,
                local_files_only=bool(self._unreachable),
            )
        except errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError too
            if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
                self._unreachable = "HF_HUB_OFFLINE is set; connect once, or give a local path"
            elif not self._unreachable:
                self._unreachable = _failure(error.__cause__ or error, "connect once")
            return None
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # of the disk, requests, httpx or hf_xet: no class in common
            raise ValueError(f"{self.name}: {self._explain(error, file)}") from error
        self._revision = Path(path).parents[file.count("/")].name  # snapshots/COMMIT/FILE
        return Path(path)

    def require(self, file: str, fix: str) -> Path:
        """Return a file's path in the cache; ValueError without one."""
        path = self.get(file)
        if path is None:
            raise self.missing("no such file in it", file, fix)
        return path

    def missing(self, problem: str, looked_for: str, fix: str) -> ValueError:
        """Return the error for a missing file; without a connection, one that is not cached."""
        if self._unreachable:
            problem, fix = "not in the cache", self._unreachable
        return ValueError(f"{self.name}: {problem} (looked for {looked_for}); {fix}")

    def _explain(self, error: Exception, file: str) -> str:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
            return "a gated repository; ask for access on its page, then log in: `hf auth login`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                "no such repository, or a private one; check the name, or log in: `hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision {self._revision!r} in it; name a branch, tag or commit that it has"
        if isinstance(error, errors.HFValidationError):
            return f"{_first_line(error)}; write {FORM}"
        return f"{file}: {_failure(error, 'fix that')}"


def _text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path


def _is_of_autoencoder(config: Path) -> bool:
    try:
        return str(read_json(config).get("_class_name")).startswith("Autoencoder")
    except ValueError:  # damaged
        return False


def _shards(index: Path, source: str) -> list[str]:
    """Return the names of the files that an index of weights names; they belong beside it."""
    try:
        files = shard_names(index)
    except ValueError:
        files = []
    bad = [file for file in files if not _SHARD.fullmatch(file)]
    if bad or not files:
        found = f"names {bad[0]!r}, which is not beside it" if bad else "names no files"
        raise ValueError(f"{source}: {found}; name a file of weights")
    return files


def _failure(error: BaseException, fix: str) -> str:
    """Return why the hub did not answer, and what to do."""
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        fix = "log in (`hf auth login`) or correct HF_TOKEN"
    return f"the download failed ({_first_line(error)}); {fix}, or give a local path"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
