"""Where the drawings come from: packages of the npm registry and of Debian, pinned by their sha256.

Each package's client is asked for the file, so that whatever registry, proxy or mirror the user has configured is
used. Nothing of a package is run. What is here decides the licence of weights that are trained on it: sources
under a share-alike licence (OpenMoji, EmojiOne 1) are left out on purpose.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from model.sources.cache import file_lock, is_intact
from seed_story.errors import DownloadError
from seed_story.files import cache_dir, file_sha256


@dataclass(frozen=True)
class Package:
    """One archive of drawings.

    Args:
        name, version: as the registry's client names them.
        kind: "npm" or "deb".
        sha256: of the archive.
        licence: the SPDX identifier of the drawings.
        credit: whom the licence wants named.
    """

    name: str
    version: str
    kind: str
    sha256: str
    licence: str
    credit: str

    @property
    def path(self) -> Path:
        """Where the archive is, or will be, in the cache."""
        suffix = "tgz" if self.kind == "npm" else "deb"
        plain = self.name.removeprefix("@").replace("/", "-")
        return cache_dir() / "drawings" / f"{plain}-{self.version.replace(':', '_')}.{suffix}"

    @property
    def command(self) -> tuple[str, ...]:
        """What brings the archive into the current folder."""
        if self.kind == "npm":
            return ("npm", "pack", "--silent", f"{self.name}@{self.version}")
        return ("apt-get", "download", "--quiet", f"{self.name}={self.version}")

    def fetch(self) -> Path:
        """The archive in the cache; downloaded unless it is there with the right sha256.

        Raises:
            DownloadError: the client is missing or fails, or the archive has another sha256.
        """
        with file_lock(self.path):
            if not is_intact(self.path, self.sha256):
                self._download()
        return self.path

    def _download(self) -> None:
        by_hand = f"Or put the archive of {self.name} {self.version} at {self.path}."
        if shutil.which(self.command[0]) is None:
            raise DownloadError(f"{self.command[0]} isn't installed, and {self.name} comes through it", hint=by_hand)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as inside:
            done = subprocess.run(self.command, cwd=inside, capture_output=True, text=True, check=False)
            files = list(Path(inside).iterdir())
            if done.returncode or len(files) != 1:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                raise DownloadError(f"{' '.join(self.command)} failed", got="; ".join(lines[-3:]) or "no file",
                                    hint=f"Check the network connection and its configuration. {by_hand}")  # fmt: skip
            if not is_intact(files[0], self.sha256):
                raise DownloadError(f"{self.name} {self.version} came with another sha256",
                                    got=file_sha256(files[0]), expected=self.sha256)  # fmt: skip
            files[0].replace(self.path)


_MICROSOFT, _GOOGLE = "Fluent Emoji, Microsoft", "Noto Emoji, Google"
PACKAGES: dict[str, Package] = {
    "fluent-3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "npm",
                         "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT", _MICROSOFT),
    "fluent-flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "npm",
                           "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT", _MICROSOFT),
    "noto": Package("@iconify-json/noto", "1.2.9", "npm",
                    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", _GOOGLE),
    "noto-v1": Package("@iconify-json/noto-v1", "1.2.5", "npm",
                       "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0", _GOOGLE),
    "fxemoji": Package("@iconify-json/fxemoji", "1.2.2", "npm",
                       "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "Apache-2.0",
                       "FxEmojis, Mozilla"),
    "emojione": Package("@iconify-json/emojione", "1.2.3", "npm",
                        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0",
                        "Emoji One (Colored), Emoji One"),
    "streamline": Package("@iconify-json/streamline-emojis", "1.2.4", "npm",
                          "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc", "CC-BY-4.0",
                          "Streamline Emojis, Streamline"),
    "twemoji": Package("@iconify-json/twemoji", "1.2.5", "npm",
                       "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0",
                       "Twemoji, Twitter and contributors"),
    "openclipart": Package("openclipart-svg", "1:0.18+dfsg-19", "deb",
                           "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", "CC-PDDC",
                           "Open Clip Art Library"),
}  # fmt: skip
"""By style."""
