"""A page in one file that works offline: HTML, style, scripts and data put together."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def render_page(
    package: str,
    scripts: Sequence[str],
    title: str,
    data: object,
    *,
    folder: str = "web",
    links: bool = True,
) -> bytes:
    """Put a page together from the page.html in a folder of a package.

    It has {{policy}}, {{title}}, {{style}}, {{data}} and {{script}} once each. The policy lets
    nothing in but this style, these scripts, and images.

    Args:
        package: the dotted name of the package.
        scripts: their names, in the order in which they are run; they share one scope.
        title: plain text.
        data: plain values without NaN or infinity.
        folder: holds page.html, page.css and the scripts; relative to the package.
        links: images may be files beside the page, not only data: URIs.
    """
    source = files(package).joinpath(folder)
    style = (source / "page.css").read_text(encoding="utf-8")
    code = "\n".join((source / name).read_text(encoding="utf-8") for name in scripts)
    script = f'"use strict";\n(() => {{\n{code}\n}})();\n'
    policy = (
        "default-src 'none'",
        "img-src data:" + (" 'self' file:" if links else ""),
        f"style-src {_digest(style)}",
        f"script-src {_digest(script)}",
        "base-uri 'none'",
        "form-action 'none'",
    )
    parts = {
        "policy": "; ".join(policy),
        "title": html.escape(title),
        "style": style,
        "data": script_json(data),
        "script": script,
    }
    page = (source / "page.html").read_text(encoding="utf-8")
    # in one pass: a title of {{data}} is a title
    filled = _PLACE.sub(lambda place: parts[place[1]], page)
    return filled.encode(errors="backslashreplace")  # a title may hold odd bytes


def script_json(data: object) -> str:
    r"""JSON that no text in it can end: ASCII, without the characters that mean something in HTML.

    HTML Standard, section 4.12.1.3: `</script` and `<!--` have a meaning inside of a script.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
