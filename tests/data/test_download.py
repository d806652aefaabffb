import gzip
import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.schemas import InputError
from data.sources import download
from data.sources.amazon_p5 import AmazonP5
from data.sources.base import RawFile, Source, SourceTables

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class FileServer(ThreadingHTTPServer):
    """Serves `files`; honours ranges if told to; closes the connection of each URL after `cuts` bytes, once each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.cuts: list[int] = []
        self.requests: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        wanted = self.headers.get("Range")
        self.server.requests.append((name, wanted))
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if begin and begin >= len(content):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = begin + self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[begin:end])
        return None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class FakeSource(Source):
    name = "fake"
    text_template = ("{title}.",)
    local_folders = ("fake-1",)

    def __init__(self, *files: RawFile) -> None:
        self.files = list(files)

    def raw_files(self) -> list[RawFile]:
        return self.files

    def read(self, raw_dir: Path) -> SourceTables:
        raise NotImplementedError


def test_a_lost_connection_is_resumed_where_it_broke(server, tmp_path, capsys):
    server.files["a.bin"] = CONTENT
    server.cuts = [1000, 500]
    download.fetch(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256, size=len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests == [("a.bin", None), ("a.bin", "bytes=1000-"), ("a.bin", "bytes=1500-")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin"]
    assert "downloading a.bin" in capsys.readouterr().err


def test_a_killed_download_is_resumed_by_the_next_run(server, tmp_path):
    server.files["a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:4000])
    download.fetch(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests == [("a.bin", "bytes=4000-")]


def test_a_complete_part_needs_nothing_more(server, tmp_path):
    server.files["a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    download.fetch(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_part_of_another_version_is_fetched_afresh(server, tmp_path):
    server.files["a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(b"x" * 4000)
    download.fetch(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests == [("a.bin", "bytes=4000-"), ("a.bin", None)]


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.files["a.bin"] = CONTENT
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:4000])
    download.fetch(server.url("a.bin"), tmp_path / "a.bin", sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({"sha256": "0" * 64}, f"expected sha256 {'0' * 64}, got {SHA256}"),
        ({"size": 17}, "expected 17 bytes, got 10240"),
    ],
)
def test_what_is_not_as_expected_is_deleted(server, tmp_path, checks, message):
    server.files["a.bin"] = CONTENT
    with pytest.raises(InputError, match=message):
        download.fetch(server.url("a.bin"), tmp_path / "a.bin", **checks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "kind"), [("a.json.gz", "gzip"), ("a.zip", "zip")])
def test_containers_are_checked_without_a_checksum(server, tmp_path, name, kind):
    server.files[name] = gzip.compress(CONTENT)[:-10]
    with pytest.raises(InputError, match=f"not a whole {kind} file"):
        download.fetch(server.url(name), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def zip_source(server: FileServer) -> FakeSource:
    files = (RawFile(name, server.url("set.zip"), f"set/{name}") for name in ("one.csv", "two.csv"))
    return FakeSource(*files)


def test_only_named_members_leave_an_archive(server, tmp_path):
    server.files["set.zip"] = archive(**{"set__one.csv": b"1", "set__two.csv": b"2", "..__..__evil.csv": b"!"})
    folder = download.ensure_raw_files(zip_source(server), None, tmp_path / "raw" / "fake")
    assert folder == tmp_path / "raw" / "fake"
    assert (folder / "one.csv").read_bytes() == b"1"
    assert (folder / "two.csv").read_bytes() == b"2"
    assert len(server.requests) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["one.csv", "set.zip", "two.csv"]
    download.ensure_raw_files(zip_source(server), None, folder)
    assert len(server.requests) == 1


def test_an_archive_fetched_by_hand_is_used(server, tmp_path):
    raw_dir = tmp_path / "mine"
    raw_dir.mkdir()
    (raw_dir / "set.zip").write_bytes(archive(**{"set__one.csv": b"1", "set__two.csv": b"2"}))
    folder = download.ensure_raw_files(zip_source(server), raw_dir, tmp_path / "cache")
    assert (folder / "two.csv").read_bytes() == b"2"
    assert server.requests == []
    assert [path.name for path in raw_dir.iterdir()] == ["set.zip"]


def test_a_truncated_archive(server, tmp_path):
    (tmp_path / "set.zip").write_bytes(archive(**{"set__one.csv": CONTENT})[:-30])
    with pytest.raises(InputError, match=r"set\.zip is truncated or damaged .*; delete it"):
        download.ensure_raw_files(zip_source(server), None, tmp_path)


def test_an_archive_without_the_member(server, tmp_path):
    server.files["set.zip"] = archive(**{"set__one.csv": b"1"})
    with pytest.raises(InputError, match=r"set\.zip lacks set/two\.csv"):
        download.ensure_raw_files(zip_source(server), None, tmp_path)


def test_local_files_come_first_and_are_only_read(server, tmp_path):
    source = FakeSource(RawFile("a.csv", server.url("a.csv")))
    local = tmp_path / "parent" / "fake-1"
    local.mkdir(parents=True)
    (local / "a.csv").write_bytes(b"local")
    for raw_dir in (local, local.parent):
        assert (download.ensure_raw_files(source, raw_dir, tmp_path / "cache") / "a.csv").read_bytes() == b"local"
    assert server.requests == []
    assert not (tmp_path / "cache").exists()
    assert [path.name for path in local.iterdir()] == ["a.csv"]


def test_alternatives_and_optional_files(server, tmp_path, caplog):
    source = FakeSource(
        RawFile("a_5.csv", server.url("a_5.csv"), alternatives=("a.csv",)),
        RawFile("meta.csv", server.url("meta.csv"), optional=True),
    )
    (tmp_path / "a.csv").write_bytes(b"all")
    assert download.ensure_raw_files(source, tmp_path, tmp_path / "cache") == tmp_path
    assert source.files[0].find(tmp_path) == tmp_path / "a.csv"
    server.files["a_5.csv"] = b"core"
    folder = download.ensure_raw_files(source, None, tmp_path / "cache")
    assert (folder / "a_5.csv").read_bytes() == b"core"
    assert "going on without meta.csv" in caplog.text


def test_files_that_only_a_person_can_fetch(tmp_path):
    with pytest.raises(InputError) as caught:
        download.ensure_raw_files(AmazonP5("toys"), None, tmp_path / "raw")
    message = str(caught.value)
    assert "amazon-toys: raw files are missing: sequential_data.txt, datamaps.json, meta.json.gz" in message
    assert "P5_data.zip of the P5 authors, https://drive.google.com/" in message
    assert "in its folder data/toys" in message
    assert "set DatasetConfig.raw_dir to the folder that holds them" in message
    assert "\n" not in message
    assert not (tmp_path / "raw").exists()


def test_only_what_is_missing_is_named(tmp_path):
    folder = tmp_path / "local" / "toys"
    folder.mkdir(parents=True)
    (folder / "meta.json.gz").write_text("x")
    with pytest.raises(InputError) as caught:
        download.ensure_raw_files(AmazonP5("toys"), tmp_path / "local", tmp_path / "raw")
    message = str(caught.value)
    assert "raw files are missing: sequential_data.txt, datamaps.json (looked in" in message
    assert f"All must lie in one folder: put them into {folder}, or all of them into {tmp_path / 'raw'}." in message


def test_refused_downloads_say_what_to_do(server, tmp_path):
    source = FakeSource(RawFile("a.csv", server.url("a.csv")))
    with pytest.raises(InputError, match=r"raw files are missing: a\.csv .*HTTP Error 404.*come from http.*Put them"):
        download.ensure_raw_files(source, None, tmp_path)
    assert server.requests == [("a.csv", None)]


def test_unreachable_servers_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    source = FakeSource(RawFile("a.csv", "http://127.0.0.1:9/a.csv"))
    with pytest.raises(InputError, match=r"could not be downloaded .*refused.*come from http://127\.0\.0\.1:9/a\.csv"):
        download.ensure_raw_files(source, None, tmp_path)


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "a.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(InputError, match=r"a\.csv is a Git-LFS pointer, not the data\. Run `git lfs pull`"):
        download.ensure_raw_files(FakeSource(RawFile("a.csv")), tmp_path, tmp_path / "cache")


def test_empty_file(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match=r"a\.csv is empty"):
        download.ensure_raw_files(FakeSource(RawFile("a.csv")), tmp_path, tmp_path / "cache")


def test_raw_dir_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"raw_dir .*nowhere is not a folder"):
        download.ensure_raw_files(FakeSource(RawFile("a.csv")), tmp_path / "nowhere", tmp_path)
