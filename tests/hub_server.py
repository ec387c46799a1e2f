"""A small Hugging Face hub on this machine, and a process that fetches from it as a user's does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# huggingface_hub reads its environment when it is imported, hence another process; it waits long
# between its tries where the hub does not answer, which here it does at once or never
_FETCH = """
import json, sys, time
from pathlib import Path
time.sleep = lambda seconds: None
from kl_vae.checkpoints.hub import fetch
answers = {}
for name in json.load(sys.stdin):
    try:
        answers[name] = str(fetch(name if name.startswith("hf://") else Path(name)))
    except ValueError as error:
        answers[name] = error.args[0]
json.dump(answers, sys.stdout)
"""


class Hub:
    """Repositories, each a dict of commits, and what was asked of them; a context that serves."""

    def __init__(self) -> None:
        self.requests: list[str] = []  # METHOD ORG/NAME@REVISION/FILE, as they came
        self.refused: dict[
            str, tuple[int, str]
        ] = {}  # repository or request -> status, X-Error-Code
        self._files: dict[tuple[str, str], dict[str, bytes]] = {}  # by repository and commit
        self._branches: dict[tuple[str, str], str] = {}  # commit by repository and branch
        self._next: dict[tuple[str, str], str] = {}  # what a branch becomes after a download
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(
        self, repository: str, files: dict[str, Any], branch: str = "main", delayed: bool = False
    ) -> str:
        """Add a commit of files (bytes, or what becomes JSON); return its hash.

        The branch points to it from now on or, delayed, after the next file is downloaded.
        """
        content = {
            name: x if isinstance(x, bytes) else json.dumps(x).encode() for name, x in files.items()
        }
        commit = hashlib.sha1(repr((repository, branch, content)).encode()).hexdigest()
        self._files[repository, commit] = content
        (self._next if delayed else self._branches)[repository, branch] = commit
        return commit

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        organisation, name, resolve, revision, file = path.removeprefix("/").split("/", 4)
        assert resolve == "resolve", path
        repository, revision, file = f"{organisation}/{name}", unquote(revision), unquote(file)
        self.requests.append(f"{method} {repository}@{revision}/{file}")
        for refused in {repository, self.requests[-1]} & self.refused.keys():
            status, code = self.refused[refused]
            return status, {"X-Error-Code": code} if code else {}, b""
        if all(repository != known for known, _ in self._files):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self._branches.get((repository, revision), revision)
        files = self._files.get((repository, commit))
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        if method == "GET" and (repository, revision) in self._next:
            self._branches[repository, revision] = self._next.pop((repository, revision))
        return 200, {**headers, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}, files[file]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        status, headers, body = self.hub.answer(self.command, self.path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        pass


def hub_environment(url: str, cache: Path, **environment: str) -> dict[str, str]:
    """The environment of a process for which `url` is the hub, with a cache of its own."""
    theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
    given = {key: x for key, x in os.environ.items() if not key.startswith(theirs)}
    ours = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    return {**given, **ours, **environment}


def fetch_all(
    names: Iterable[str], url: str, cache: Path, **environment: str
) -> dict[str, Path | str]:
    """`fetch` many names in another process; what each gives: a path, or the text of its error."""
    done = subprocess.run(
        [sys.executable, "-c", _FETCH],
        input=json.dumps(list(names)),
        env=hub_environment(url, cache, **environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return {name: Path(x) if x.startswith(str(cache)) else x for name, x in answers.items()}
