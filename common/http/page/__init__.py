"""The page at `/`: a chat with the engine behind the server.

Plain HTML, CSS and JavaScript modules, served as they lie in `static/`; nothing is built and nothing
comes from another host. The files are read once, at import, and each has a route of its own: no
request chooses a path, so none can leave the folder.

The page holds nothing secret. A server with `--api-key` serves it without the key (`is_public`), and
the page asks its reader for the key.
"""

from pathlib import Path

from fastapi import FastAPI, Response

STATIC = Path(__file__).parent / "static"

CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}

# The second fence behind `textContent`: even if a model's text became markup, none of it would run,
# and the page could talk to no host but its own.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _read_assets() -> dict[str, tuple[bytes, str]]:
    """URL path -> (content, content type) of every file of `static/` with a known suffix."""
    return {
        "/" if path.name == "index.html" else f"/inspector/{path.name}": (
            path.read_bytes(),
            CONTENT_TYPES[path.suffix],
        )
        for path in sorted(STATIC.iterdir())
        if path.suffix in CONTENT_TYPES
    }


_ASSETS = _read_assets()

PUBLIC_PATHS = frozenset(_ASSETS)


def is_public(path: str) -> bool:
    """True for `/` and the page's own files, the paths that a server with a key serves without it.

    `path` is the decoded path the router sees. The comparison is exact: no prefix, no folding of
    case, slashes or dots, so that no spelling of another path is let through.
    """
    return path in PUBLIC_PATHS


def mount(app: FastAPI) -> None:
    """Add `GET /` and `GET /inspector/<file>` to `app`."""
    for path, (content, content_type) in _ASSETS.items():
        app.add_api_route(
            path,
            _asset_endpoint(content, content_type),
            methods=["GET", "HEAD"],
            include_in_schema=False,
        )


def _asset_endpoint(content: bytes, content_type: str):
    async def asset() -> Response:
        return Response(content, headers=HEADERS | {"Content-Type": content_type})

    return asset
