"""The page for people: what GET / answers a browser. index.html is the whole of it; it only uses the public API.

Owns the file, its ETag and the headers that say what it may do: run its own script and style (allowed by their hashes,
so nothing that is put into the document can run), speak to this server, and nothing else. Routes are in routes/info.py.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

from aiohttp import ETag, web

_INLINE = re.compile(r"<(style|script)\b[^>]*>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """The document as it is sent, before compression. etag: of these bytes."""

    body: bytes
    etag: str
    headers: dict[str, str]


def load() -> Page:
    """Reads the page; once, when the application is built."""
    text = (resources.files(__name__) / "index.html").read_text(encoding="utf-8")
    body = text.encode()
    return Page(body, hashlib.sha256(body).hexdigest()[:32], _headers(text))


def _headers(text: str) -> dict[str, str]:
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, content in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(hashes['script'])}",
        f"style-src {' '.join(hashes['style'])}",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # and no policy makes any: innerHTML throws
        "trusted-types 'none'",
    ]
    return {
        "cache-control": "no-cache",  # may be kept, must be asked about: a new version is seen at once
        "content-security-policy": "; ".join(policy),
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "vary": "accept, accept-encoding",
        "x-content-type-options": "nosniff",
    }


def wants_page(accept: str) -> bool:
    """Whether a client with this Accept header is a browser: it names text/html. `*/*`, as curl sends, does not."""
    for item in accept.lower().split(","):
        kind, _, parameters = item.partition(";")
        if kind.strip() == "text/html":
            return re.search(r"(^|;)\s*q\s*=\s*0(\.0*)?\s*(;|$)", parameters) is None
    return False


def respond(request: web.Request, page: Page, status: int) -> web.Response:
    """The page, or 304 when the browser has it. status: what the server's health is, said to people as to probes."""
    known = request.if_none_match or ()
    if status == 200 and any(tag.value in (page.etag, "*") for tag in known):
        response = web.Response(status=304, headers=page.headers)
    else:
        response = web.Response(
            status=status, body=page.body, content_type="text/html", charset="utf-8", headers=page.headers
        )
        response.enable_compression()
    response.etag = ETag(page.etag, is_weak=True)  # weak: the same page, compressed or not
    return response


PAGE: web.AppKey[Page] = web.AppKey("page", Page)
