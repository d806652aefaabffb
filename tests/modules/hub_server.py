"""A local stand-in for the Hub: repositories are folders, addressed and answered as the Hub does."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

COMMIT = "a" * 40


class _Handler(http.server.BaseHTTPRequestHandler):
    root: Path
    requests: list[str]

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and (self.root / parts[2] / parts[3]).is_dir():
            self._describe("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 3 and parts[2] == "resolve" and (self.root / parts[0] / parts[1]).is_dir():
            self._send_file(self.root.joinpath(*parts[:2], *parts[4:]))
        else:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        self.requests.append(f"{self.command} {self.path}")
        body = self._body()
        parts = self.path.strip("/").split("/")
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            self.requests.append(f"create {name} {_visibility(fields)}")
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self._send(200, {"url": f"{host}/{name}"})
        elif "preupload" in parts:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif "commit" in parts:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = self.root / parts[2] / parts[3] / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            self._send(200, {"commitUrl": f"{host}/{parts[2]}/{parts[3]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._send(200, {})

    def _describe(self, repo_id: str, parts: list[str]):
        files = sorted(path for path in (self.root / repo_id).rglob("*") if path.is_file())
        names = [path.relative_to(self.root / repo_id).as_posix() for path in files]
        if parts[:1] == ["tree"]:
            self._send(200, [_entry(name, path) for name, path in zip(names, files, strict=True)])
        elif parts[:1] == ["revision"] and parts[1] not in ("main", COMMIT):
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in names]
            self._send(200, {"id": repo_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def _send_file(self, path: Path):
        if path.is_file():
            headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT}
            self._send(200, path.read_bytes(), headers)
        else:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *args):
        pass


def _visibility(fields: dict) -> str:
    """As old and new clients state it."""
    return fields.get("visibility") or {True: "private", False: "public", None: "default"}[fields.get("private")]


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(name: str, path: Path) -> dict:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}


@contextlib.contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve root/{owner}/{name} folders; gives the endpoint and the list of requests, which grows."""
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "requests": requests})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
