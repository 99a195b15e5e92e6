"""Archives of drawings: fetched by their client once, verified, and never half there. The client here is a script."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from seed_story.errors import DownloadError
from training.storybook.packages import PACKAGES, Package

ARCHIVE = b"an archive of drawings"
PACKAGE = Package("@set/drawings", "1.2.3", "npm", hashlib.sha256(ARCHIVE).hexdigest(), "MIT", "Ann")


class Client:
    """A folder of programs in front of the `PATH`, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls.log"
        self.folder.mkdir()

    def install(self, script: str, name: str = "npm") -> None:
        program = self.folder / name
        program.write_text(f'#!/bin/sh\necho "$@" >> "{self.log}"\n{script}\n')
        program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    made = Client(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path / "cache"))
    return made


def writes(content: bytes) -> str:
    return f"printf '{content.decode()}' > set-drawings-1.2.3.tgz; echo set-drawings-1.2.3.tgz"


def left_behind() -> list[str]:
    """What is beside the archive's place, the empty lock file aside."""
    return [p.name for p in PACKAGE.path.parent.iterdir() if not p.name.endswith(".lock")]


def test_fetches_once(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client.install(writes(ARCHIVE))
    expected = tmp_path / "cache" / "drawings" / "set-drawings-1.2.3.tgz"
    assert (PACKAGE.fetch(), PACKAGE.fetch()) == (expected, expected)
    assert expected.read_bytes() == ARCHIVE
    assert client.calls == ["pack --silent @set/drawings@1.2.3"]
    assert left_behind() == [expected.name]
    assert not list(tmp_path.glob("*.tgz"))


def test_a_damaged_archive_is_fetched_again(client: Client) -> None:
    client.install(writes(ARCHIVE))
    PACKAGE.fetch().write_bytes(ARCHIVE[:5])
    assert PACKAGE.fetch().read_bytes() == ARCHIVE
    assert len(client.calls) == 2


def test_an_archive_put_there_by_hand_needs_no_client(client: Client) -> None:
    PACKAGE.path.parent.mkdir(parents=True)
    PACKAGE.path.write_bytes(ARCHIVE)
    client.install("exit 1")
    assert PACKAGE.fetch() == PACKAGE.path
    assert client.calls == []


def test_refuses_another_archive(client: Client) -> None:
    client.install(writes(b"another archive"))
    with pytest.raises(DownloadError, match="came with another sha256") as caught:
        PACKAGE.fetch()
    assert hashlib.sha256(b"another archive").hexdigest() in str(caught.value)
    assert PACKAGE.sha256 in str(caught.value)
    assert left_behind() == []


def test_another_archive_does_not_replace_what_was_there(client: Client) -> None:
    PACKAGE.path.parent.mkdir(parents=True)
    PACKAGE.path.write_bytes(b"what the user put there")
    client.install(writes(b"another archive"))
    with pytest.raises(DownloadError):
        PACKAGE.fetch()
    assert PACKAGE.path.read_bytes() == b"what the user put there"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"{writes(ARCHIVE)}; echo 'no such host' >&2; exit 7", "no such host"),
        ("exit 1", "no file"),
        ("exit 0", "no file"),
        (f"{writes(ARCHIVE)}; touch another.tgz", "no file"),
    ],
    ids=["fails and says why", "fails silently", "writes nothing", "writes two files"],
)
def test_a_client_that_fails(client: Client, script: str, said: str) -> None:
    client.install(script)
    with pytest.raises(DownloadError, match=r"npm pack --silent @set/drawings@1\.2\.3 failed") as caught:
        PACKAGE.fetch()
    assert said in str(caught.value)
    assert str(PACKAGE.path) in str(caught.value)
    assert left_behind() == []


def test_a_missing_client_is_named_with_the_way_around_it(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(client.folder))
    with pytest.raises(DownloadError, match="npm isn't installed") as caught:
        PACKAGE.fetch()
    assert str(PACKAGE.path) in str(caught.value)
    assert left_behind() == []


def test_a_debian_package_comes_through_apt(client: Client) -> None:
    package = Package("clip-art", "1:0.18-19", "deb", PACKAGE.sha256, "CC-PDDC", "Ann")
    client.install("printf 'an archive of drawings' > clip-art_1%3a0.18-19_all.deb", "apt-get")
    assert package.fetch().name == "clip-art-1_0.18-19.deb"
    assert client.calls == ["download --quiet clip-art=1:0.18-19"]


def test_packages_are_pinned_and_may_be_trained_on() -> None:
    assert len(PACKAGES) == len({p.sha256 for p in PACKAGES.values()})
    for package in PACKAGES.values():
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert re.fullmatch(r"[0-9][^^~*x ]*", package.version)
        assert package.kind in ("npm", "deb")
        assert package.licence in ("MIT", "Apache-2.0", "CC-BY-4.0", "CC-PDDC")  # none is share-alike
        assert package.credit
