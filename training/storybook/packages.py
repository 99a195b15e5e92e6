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
"""By style: the drawings that stories and questions show."""
ICONS: dict[str, Package] = {
    "fluent-high-contrast": Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "npm",
                                    "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0", "MIT",
                                    _MICROSOFT),
    "emojione-monotone": Package("@iconify-json/emojione-monotone", "1.2.1", "npm",
                                 "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e", "CC-BY-4.0",
                                 "Emoji One (Monotone), Emoji One"),
    "phosphor": Package("@iconify-json/ph", "1.2.2", "npm",
                        "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc", "MIT", "Phosphor Icons"),
    "mingcute": Package("@iconify-json/mingcute", "1.2.8", "npm",
                        "fec65f4430ac70a968e0e7fc7741e7064ba91e6da992b905f75c9d70c717bd2c", "Apache-2.0",
                        "MingCute Icon, MingCute Design"),
    "game-icons": Package("@iconify-json/game-icons", "1.2.4", "npm",
                          "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4", "CC-BY-3.0",
                          "Game-icons.net, Lorc, Delapouite and contributors"),
    "mdi": Package("@iconify-json/mdi", "1.2.3", "npm",
                   "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac", "Apache-2.0",
                   "Material Design Icons, Pictogrammers"),
    "icon-park": Package("@iconify-json/icon-park", "1.2.4", "npm",
                         "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f", "Apache-2.0",
                         "IconPark, ByteDance"),
    "tabler": Package("@iconify-json/tabler", "1.2.41", "npm",
                      "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6", "MIT",
                      "Tabler Icons, Pawe\u0142 Kuna"),
    "hugeicons": Package("@iconify-json/hugeicons", "1.2.35", "npm",
                         "cca09de913319938961fa0613a8eb42952f76c3ee13a7c68ef411091590c5d8b", "MIT", "Hugeicons"),
    "lucide": Package("@iconify-json/lucide", "1.2.137", "npm",
                      "e74db8c3a55fff55bc82de21268c4bced9f65ff10aacc0d5f3a395b0e93243c3", "ISC",
                      "Lucide, its contributors"),
    "solar": Package("@iconify-json/solar", "1.2.13", "npm",
                     "9efec9045e9188c5dd5cf9de52f8ad968ffabee565026480a6c74bfe63b3bbc2", "CC-BY-4.0",
                     "Solar, 480 Design"),
    "font-awesome": Package("@iconify-json/fa6-solid", "1.2.4", "npm",
                            "082c792eaad4751626438773fa7360cb23f495b687cf2dd01b2b0fccc7f6af8b", "CC-BY-4.0",
                            "Font Awesome 6 Solid, Fonticons"),
    "material-symbols": Package("@iconify-json/material-symbols", "1.2.98", "npm",
                                "142d50bf28e7db85362795be335ebc29dac611d73c404fc1e6fc5cc198e2b3d0", "Apache-2.0",
                                "Material Symbols, Google"),
}  # fmt: skip
"""By style: pictograms, most in one colour, of which flash cards are made; no question shows one."""
