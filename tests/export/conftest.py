from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest

from seed_story.config import CacheConfig
from seed_story.decoder import Decoder
from tests.export.tiny_decoders import SINK_ROWS, SIZES, VARIANTS, VERIFY, TinyDecoder, export_tiny


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyDecoder]:
    """A variant of `VARIANTS`, exported when it is first asked for."""

    @cache
    def exported(name: str) -> TinyDecoder:
        return export_tiny(*VARIANTS[name], tmp_path_factory.mktemp(name))

    return exported


@pytest.fixture(scope="session")
def verifying_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], TinyDecoder]:
    """A variant of `VARIANTS` with `verify_4` and a cache of the second's kind, exported when it is first asked for."""

    @cache
    def exported(name: str, kind: str) -> TinyDecoder:
        sink_rows = SINK_ROWS[name] if kind == "int8" else None
        return export_tiny(*VARIANTS[name], tmp_path_factory.mktemp(name), verify=VERIFY, sink_rows=sink_rows)

    return exported


@pytest.fixture
def open_decoder() -> Iterator[Callable[..., Decoder]]:
    """Opens decoders and closes them when the test is over."""
    opened = []

    def opener(tiny: TinyDecoder, cache: CacheConfig, sizes: Sequence[int] = SIZES) -> Decoder:
        opened.append(tiny.open(cache, sizes))
        return opened[-1]

    yield opener
    for decoder in opened:
        decoder.close()
