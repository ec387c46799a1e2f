"""Download of autoencoders from the Hugging Face Hub.

A name is `hf://ORG/NAME`, optionally followed by a subfolder or a file. `@REVISION` after NAME
selects a branch, tag or commit other than main. Only the config and one set of weights of an
autoencoder are downloaded. huggingface_hub caches them, and uses the cache when offline.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from kl_vae.checkpoints.diffusers import CONFIG, WEIGHT_FILES, read_json, shard_names, variant_of

PREFIX = "hf://"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of weight files
FORM = "hf://ORG/NAME[@REVISION][/SUBFOLDER or /FILE.safetensors]"

_PATH_PREFIX = "hf:/"  # PREFIX after conversion to Path
# a slash in a revision is written as %2F, except in a pull request's refs/pr/N, as in fsspec
_NAME = re.compile(
    r"hf://?(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>refs/pr/\d+|[^/]+))?(?P<path>(/[^/]+)*)"
)
_SHARD = re.compile(r"[\w-][\w.-]*")  # a file in the folder of the index: no slash, no leading dot


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path is a name on the hub; a Path has one slash less after `hf:`."""
    return _text(path).startswith(_PATH_PREFIX)


def fetch(name: str | Path) -> Path:
    """Download the files of a name to the cache, and return the local path.

    A name that ends in .safetensors, .ckpt, .pt, .pth or .bin is a file. Any other name is a folder
    with a diffusers autoencoder. If its config.json is missing or not that of an autoencoder, as in
    a pipeline, the subfolder `vae` is used. All files are from the same commit.

    Returns:
        The file, or the folder that contains config.json and the weights. It is in the cache and
        must not be modified.

    Raises:
        ValueError: The name is invalid, does not exist or is not accessible, there is neither a
            connection nor a cached copy, or huggingface_hub is not installed.
    """
    parts = _NAME.fullmatch(_text(name))
    rest = _text(name)[parts.start("repository") :] if parts else ""
    revision = unquote(parts["revision"] or "main") if parts else ""
    if not parts or {"", ".", ".."} & {*rest.split("/"), *revision.split("/")}:
        raise ValueError(f"{name}: not a valid name on the hub; use {FORM}")
    snapshot = _Snapshot(PREFIX + rest, parts["repository"], revision)
    path = parts["path"].removeprefix("/")
    if path.endswith(SUFFIXES):
        folder, _, name = path.rpartition("/")
        if variant_of(name) is not None:  # its config states what the tensors do not show
            snapshot.get(f"{folder}/{CONFIG}" if folder else CONFIG)
        return snapshot.require(path, "check its name")
    return _fetch_folder(snapshot, f"{path}/" if path else "")


def _fetch_folder(snapshot: _Snapshot, folder: str) -> Path:
    """Fetch the config and the weights in a folder ("" or "a/b/") or in its subfolder `vae/`."""
    config = snapshot.get(folder + CONFIG)
    if config is None or not _is_of_autoencoder(config):
        folder, outer = f"{folder}vae/", folder
        config = snapshot.get(folder + CONFIG)
        if config is None:
            raise snapshot.missing(
                "contains no autoencoder",
                f"{outer}{CONFIG} whose _class_name begins with Autoencoder, {folder}{CONFIG}",
                f"give its subfolder or a file: {FORM}",
            )
    for weights in WEIGHT_FILES:
        if path := snapshot.get(folder + weights):
            break
    else:
        problem = f"no weights in the folder of {folder}{CONFIG}"
        raise snapshot.missing(problem, ", ".join(WEIGHT_FILES), "give a weight file")
    if weights.endswith(".json"):
        for shard in _shards(path, f"{snapshot.name}: {folder}{weights}"):
            snapshot.require(folder + shard, f"{folder}{weights} lists it; give a weight file")
    return config.parent


class _Snapshot:
    """The files of a repository at one commit, that of the first file found."""

    def __init__(self, name: str, repository: str, revision: str) -> None:
        self.name = name
        self._repository = repository
        self._revision = revision
        self._unreachable = ""  # reason and fix; if set, only the cache is searched

    def get(self, file: str) -> Path | None:
        """Return the cached path of a file; None: not in the repository, or not reachable."""
        try:
            from huggingface_hub import errors, hf_hub_download
        except ImportError as error:
            raise ValueError(
                f"{self.name}: reading from the hub needs huggingface_hub ({error}); "
                'pip install "kl-vae[hub]", or give a local path'
            ) from None
        try:
            path = hf_hub_download(
                self._repository,
                file,
                revision=self._revision,
                local_files_only=bool(self._unreachable),
            )
        except errors.LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError
            if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
                self._unreachable = (
                    "HF_HUB_OFFLINE is set; download it once online, or give a local path"
                )
            elif not self._unreachable:
                self._unreachable = _failure(error.__cause__ or error, "download it once online")
            return None
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # OSError, or from requests, httpx or hf_xet
            raise ValueError(f"{self.name}: {self._explain(error, file)}") from error
        self._revision = Path(path).parents[file.count("/")].name  # snapshots/COMMIT/FILE
        return Path(path)

    def require(self, file: str, fix: str) -> Path:
        """Return the cached path of a file.

        Raises:
            ValueError: The file is not in the repository, or not reachable.
        """
        path = self.get(file)
        if path is None:
            raise self.missing("no such file", file, fix)
        return path

    def missing(self, problem: str, looked_for: str, fix: str) -> ValueError:
        """Return the error for a missing file, or for an uncached file without a connection."""
        if self._unreachable:
            problem, fix = "not in the cache", self._unreachable
        return ValueError(f"{self.name}: {problem} (looked for {looked_for}); {fix}")

    def _explain(self, error: Exception, file: str) -> str:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):  # a subclass of RepositoryNotFoundError
            return "a gated repository; request access on its page, then log in: `hf auth login`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                "no such repository, or a private one; check the name, or log in: `hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision {self._revision!r}; give an existing branch, tag or commit"
        if isinstance(error, errors.HFValidationError):
            return f"{_first_line(error)}; use {FORM}"
        return f"{file}: {_failure(error, 'try again')}"


def _text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path


def _is_of_autoencoder(config: Path) -> bool:
    try:
        return str(read_json(config).get("_class_name")).startswith("Autoencoder")
    except ValueError:  # damaged
        return False


def _shards(index: Path, source: str) -> list[str]:
    """Return the names of the shards in an index; they must be in its folder."""
    try:
        files = shard_names(index)
    except ValueError:
        files = []
    bad = [file for file in files if not _SHARD.fullmatch(file)]
    if bad or not files:
        found = f"lists {bad[0]!r}, which is not in its folder" if bad else "lists no files"
        raise ValueError(f"{source}: {found}; give a weight file")
    return files


def _failure(error: BaseException, fix: str) -> str:
    """Return the message for a failed download, with a fix."""
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        fix = "log in (`hf auth login`) or correct HF_TOKEN"
    return f"the download failed ({_first_line(error)}); {fix}, or give a local path"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error message that is not empty, or the type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
