"""The downloader against a real HTTP server on a loopback port."""

from __future__ import annotations

import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model.sources import cache
from model.sources.download import TransferError, download
from seed_story.errors import DownloadError
from seed_story.files import cache_dir

BODY = bytes(range(256)) * 12_000  # 3 MB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY; the fields say how badly."""

    daemon_threads = True
    ranges = True
    cut_after: list[int]  # for the coming requests: bytes of the body to send before hanging up
    pause = 0.0  # seconds between pieces of 64 kB
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut_after = []
        self.asked: list[str] = []  # the Range header of each request, or ""

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, span = self.server, self.headers.get("Range", "")
        server.asked.append(span)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and server.ranges else 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        end = start + server.cut_after.pop(0) if server.cut_after else len(BODY)
        for i in range(start, end, 1 << 16):
            self.wfile.write(BODY[i : min(i + (1 << 16), end)])
            time.sleep(server.pause)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file.bin"


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def test_a_file_arrives_whole_and_is_not_fetched_again(server: Server, target: Path) -> None:
    assert download(server.url, target, sha256=SHA256) == target
    assert target.read_bytes() == BODY
    assert not part_of(target).exists()
    download(server.url, target, sha256=SHA256)
    assert server.asked == [""]


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, target: Path) -> None:
    server.cut_after = [1_000_000, 500_000]
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY
    assert server.asked == ["", "bytes=1000000-", "bytes=1500000-"]


def test_a_part_from_an_earlier_run_is_resumed(server: Server, target: Path) -> None:
    server.cut_after = [1_000_000, 0]
    with pytest.raises(TransferError, match="1000000 bytes"):
        download(server.url, target, sha256=SHA256)
    assert part_of(target).stat().st_size == 1_000_000
    assert not target.exists()
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY
    assert server.asked[-1] == "bytes=1000000-"


def test_a_server_without_ranges_starts_over(server: Server, target: Path) -> None:
    server.ranges = False
    server.cut_after = [1_000_000]
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY


def test_a_server_that_never_finishes_is_given_up(server: Server, target: Path) -> None:
    server.ranges = False
    server.cut_after = [1_000_000] * 50
    with pytest.raises(TransferError, match="ended early"):
        download(server.url, target, sha256=SHA256)
    assert len(server.asked) == 2


def test_a_part_of_another_file_is_replaced(server: Server, target: Path) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(b"x" * 1000)
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY
    assert server.asked == ["bytes=1000-", ""]


@pytest.mark.parametrize("extra", [b"", b"too long"])
def test_a_part_that_is_complete_or_too_long(server: Server, target: Path, extra: bytes) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(BODY + extra)
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY


def test_without_a_sha256_nothing_is_resumed(server: Server, target: Path) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(b"x" * 1000)
    download(server.url, target)
    assert target.read_bytes() == BODY


def test_another_sha256_removes_the_file(server: Server, target: Path) -> None:
    with pytest.raises(DownloadError, match="another sha256") as caught:
        download(server.url, target, sha256="0" * 64)
    assert caught.value.got == SHA256
    assert not target.exists()
    assert not part_of(target).exists()


def test_a_damaged_file_in_place_is_fetched_again(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"damaged")
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_is_told(server: Server, target: Path, status: int) -> None:
    server.status = status
    with pytest.raises(TransferError, match=f"HTTP {status}"):
        download(server.url, target, sha256=SHA256)
    assert not target.exists()


def test_no_server(target: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(TransferError, match="can't be reached"):
        download(url, target)


def test_only_web_addresses(target: Path) -> None:
    with pytest.raises(TransferError, match="web address"):
        download("file:///etc/hostname", target)


def test_a_full_disk_by_write(server: Server, target: Path) -> None:
    target.parent.mkdir()
    part_of(target).symlink_to("/dev/full")  # the kernel's own ENOSPC
    with pytest.raises(DownloadError, match="disk is full"):
        download(server.url, target, sha256=SHA256)


def test_a_full_disk_beforehand(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.sources.download.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(DownloadError, match="3 MB needed"):
        download(server.url, target, sha256=SHA256)


def test_two_at_once_fetch_it_once(server: Server, target: Path) -> None:
    server.pause = 0.002
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(download, server.url, target, sha256=SHA256) for _ in range(2)]
    assert [job.result() for job in jobs] == [target, target]
    assert server.asked == [""]
    assert target.read_bytes() == BODY


def test_ctrl_c_keeps_the_part(server: Server, target: Path) -> None:
    server.pause = 0.05
    code = "import sys; from pathlib import Path; from model.sources.download import download\n"
    code += "download(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3])"
    command = [sys.executable, "-c", code, server.url, str(target), SHA256]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, env={"PYTHONPATH": f"{root}:{root}/runtime"},
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        while not (part_of(target).exists() and part_of(target).stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    kept = part_of(target).stat().st_size
    assert 0 < kept < len(BODY)
    server.pause = 0.0
    download(server.url, target, sha256=SHA256)
    assert server.asked == ["", f"bytes={kept}-"]
    assert target.read_bytes() == BODY


def test_the_bar_goes_to_stderr(server: Server, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download(server.url, target, sha256=SHA256, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "file.bin" in err


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEED_STORY_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "seed-story"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "seed-story"
    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="SEED_STORY_CACHE"):
        cache.make_folder(tmp_path / "file" / "folder")
