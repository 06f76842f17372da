"""GET / for browsers and for everyone else. What the page does in a browser: integration-tests/test_page.py."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from api_kit import Answer, Api, serving
from tgi_router import page

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


async def browse(api: Api, **headers: str) -> Answer:
    return await api.get("/", headers={"accept": BROWSER, **headers})


async def test_a_browser_gets_the_page_and_everyone_else_the_health() -> None:
    async with serving() as api:
        shown = await browse(api)
        assert (shown.status, shown.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert shown.body.startswith(b"<!doctype html>")
        for accept in ("*/*", "application/json", "application/json, text/plain, */*", "text/html;q=0, */*"):
            answer = await api.get("/", headers={"accept": accept})
            assert (answer.status, answer.body) == (200, b""), accept


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("text/html", True),
        ("Text/HTML ; charset=utf-8", True),
        ("application/xml;q=0.9, text/html;q=0.5", True),
        ("text/html;q=0.0", False),
        ("text/*", False),
        ("", False),
    ],
)
def test_only_who_names_html_wants_the_page(accept: str, wanted: bool) -> None:
    assert page.wants_page(accept) is wanted


async def test_the_status_is_the_health_s_so_that_a_probe_that_takes_html_is_told_too() -> None:
    async with serving() as api:
        etag = (await browse(api)).headers["etag"]
        await api.group.kill()
        while api.server.batcher.healthy:
            await api.get("/health")
        sick = await browse(api, **{"if-none-match": etag})
        assert sick.status == 503
        assert sick.body.startswith(b"<!doctype html>")


async def test_a_browser_that_has_the_page_is_not_sent_it_again() -> None:
    async with serving() as api:
        first = await browse(api)
        assert first.headers["cache-control"] == "no-cache"
        assert first.headers["vary"].startswith("accept, ")
        again = await browse(api, **{"if-none-match": first.headers["etag"]})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
        other = await browse(api, **{"if-none-match": '"of an older version"'})
        assert (other.status, other.body) == (200, first.body)


async def test_the_page_travels_compressed_to_who_can_read_that() -> None:
    async with serving() as api:
        small = await browse(api, **{"accept-encoding": "gzip"})
        plain = await browse(api, **{"accept-encoding": "identity"})
        assert small.headers["content-encoding"] == "gzip"
        assert int(small.headers["content-length"]) < 25_000
        assert small.body == plain.body  # the client has decompressed it
        assert "accept-encoding" in plain.headers["vary"]


async def test_the_health_at_the_root_has_no_header_of_the_page() -> None:
    async with serving() as api:
        root, health = await api.get("/"), await api.get("/health")
        assert set(root.headers) == set(health.headers)
        assert root.headers["vary"] == health.headers["vary"]


async def test_the_policy_allows_the_page_s_own_script_and_style_and_nothing_else() -> None:
    async with serving() as api:
        shown = await browse(api)
    policy = dict(rule.partition(" ")[::2] for rule in shown.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", shown.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert shown.headers["x-content-type-options"] == "nosniff"


async def test_the_page_needs_no_key_and_holds_none(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-of-the-server")
    async with serving(api_key_file=str(tmp_path / "key")) as api:
        shown = await browse(api)
        assert shown.status == 200
        assert b"secret-of-the-server" not in shown.body


def test_the_page_is_one_small_file_that_loads_nothing() -> None:
    body = page.load().body.decode()
    assert len(body.encode()) < 72_000
    assert re.findall(r"<(?:link|img|script|iframe|source)[^>]*\b(?:src|href)=[\"'](?!data:)", body) == []
    assert re.findall(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b\s*[(=]", body) == []
    assert re.findall(r"(?:src|href|url\(|import\s*\(?)\s*=?\s*[\"']?https?:", body) == []
