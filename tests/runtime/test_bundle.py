"""A bundle that isn't whole, isn't ours, or isn't where it should be is refused, with words that help."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seed_story import bundle as bundle_module
from seed_story.bundle import BUNDLE_VARIABLE, MANIFEST, TOKENIZER, Bundle, Manifest
from seed_story.contract import SCHEMA_VERSION, Steps
from seed_story.errors import BundleError, SeedStoryError
from seed_story.files import CACHE_VARIABLE, file_sha256
from tests.runtime.paper_bundle import write_paper_bundle

FILES = ("vit.tflite", "qformer.tflite", "decoder.tflite", TOKENIZER)


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    return write_paper_bundle(tmp_path / "paper")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def refused(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert isinstance(caught.value, SeedStoryError)
    assert caught.value.exit_code == 1
    return caught.value


def test_whole_bundle_opens(paper: Path) -> None:
    bundle = Bundle.open(str(paper))
    assert bundle.path == paper
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert bundle.file(TOKENIZER) == paper / TOKENIZER
    assert Manifest.from_dict(bundle.manifest.to_dict()) == bundle.manifest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_bit_anywhere(paper: Path, name: str, place: float) -> None:
    data = bytearray((paper / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (paper / name).write_bytes(data)
    error = refused(paper)
    assert error.what == f"{name} is damaged"
    assert str(error.got).startswith("sha256 ")
    assert error.expected == json.loads((paper / MANIFEST).read_text())["files"][name]["sha256"]
    assert error.hint


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_truncated_or_longer(paper: Path, name: str, change: int) -> None:
    data = (paper / name).read_bytes()
    (paper / name).write_bytes(data[:change] if change < 0 else data + b"\0")
    error = refused(paper)
    assert error.what == f"{name} has another size"
    assert (error.got, error.expected) == (f"{len(data) + change} bytes", f"{len(data)} bytes")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(paper: Path, name: str) -> None:
    (paper / name).unlink()
    error = refused(paper)
    assert name in error.what
    assert str(paper / name) in str(error.expected)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dangling", [False, True])
def test_link_out_of_the_folder(paper: Path, name: str, dangling: bool) -> None:
    """Its content is right today; who owns it tomorrow isn't known."""
    outside = paper.parent / "outside"
    shutil.move(paper / name, outside)
    (paper / name).symlink_to(outside)
    if dangling:
        outside.unlink()
    assert name in refused(paper).what


def test_folder_in_place_of_a_file(paper: Path) -> None:
    (paper / TOKENIZER).unlink()
    (paper / TOKENIZER).mkdir()
    assert TOKENIZER in refused(paper).what


@pytest.mark.parametrize(
    ("version", "hint"),
    [(SCHEMA_VERSION + 1, "Update"), (999, "Update"), (SCHEMA_VERSION - 1, "Export"), (None, "Export"), ("1", "Export"),
     ([], "Export")],
)  # fmt: skip
def test_other_schema_versions(paper: Path, version: object, hint: str) -> None:
    edit(paper, lambda values: values.update(schema_version=version))
    error = refused(paper)
    assert "schema version" in error.what
    assert (error.got, error.expected) == (version, SCHEMA_VERSION)
    assert error.hint.startswith(hint)


def test_newer_schema_is_said_first(paper: Path) -> None:
    """A newer manifest may look like anything: not one of its other fields is judged."""
    (paper / MANIFEST).write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1, "graphs": "of the future"}))
    assert refused(paper).hint.startswith("Update")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"{'a': 1}", b"\xff\xfe{}", b"\0" * 100, b"[" * 100_000, b'{"schema_version": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "python", "utf-16", "zeros", "deep", "long number"],
)
def test_manifest_that_is_no_json(paper: Path, data: bytes) -> None:
    (paper / MANIFEST).write_bytes(data)
    error = refused(paper)
    assert str(paper / MANIFEST) in error.what
    assert error.got is not None
    assert error.expected == "JSON in UTF-8"
    assert error.hint


@pytest.mark.parametrize("cut", [1, 20, 500, 2000])
def test_manifest_cut_off(paper: Path, cut: int) -> None:
    text = (paper / MANIFEST).read_text()
    (paper / MANIFEST).write_text(text[:-cut])
    assert "can't be read" in refused(paper).what


@pytest.mark.parametrize("value", ["[]", "null", "1", '"text"', "true"])
def test_manifest_that_is_no_object(paper: Path, value: str) -> None:
    (paper / MANIFEST).write_text(value)
    error = refused(paper)
    assert error.expected == "an object"
    assert error.got in ("list", "NoneType", "int", "str", "bool")


@pytest.mark.parametrize(
    "field", ["name", "architecture", "cache", "prefill_sizes", "prompt", "special_tokens", "files", "recipe",
              "qformer_trained", "parity", "versions", "licences"],
)  # fmt: skip
def test_missing_field(paper: Path, field: str) -> None:
    edit(paper, lambda values: values.pop(field))
    error = refused(paper)
    assert error.what == "the manifest is damaged"
    assert field in str(error.got)


@pytest.mark.parametrize(
    "field", ["architecture", "cache", "prefill_sizes", "begin_sizes", "prompt", "special_tokens", "files"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 5, "text", {"a": {}}, [[]]], ids=str)
def test_field_of_another_kind(paper: Path, field: str, value: object) -> None:
    edit(paper, lambda values: values.update({field: value}))
    refused(paper)


def test_a_bundle_from_before_there_were_kinds_of_steps(paper: Path) -> None:
    edit(paper, lambda values: [values.pop(field) for field in ("begin_sizes", "attention", "verify")])
    assert Bundle.open(paper).manifest.steps == Steps((4,), (), attention=False, verify=0)


def test_numbers_that_no_bundle_has(paper: Path) -> None:
    for path, value in (
        (("files", TOKENIZER, "bytes"), math.inf),
        (("architecture", "vision", "patch_size"), 0),
        (("architecture", "llama", "num_kv_heads"), 0),
        (("cache", "slots"), 2),
        (("cache", "sinks"), -1),
    ):
        folder = write_paper_bundle(paper.parent / "".join(path))

        def change(values: dict[str, Any], path: tuple[str, ...] = path, value: float = value) -> None:
            for key in path[:-1]:
                values = values[key]
            values[path[-1]] = value

        edit(folder, change)
        assert refused(folder).what == "the manifest is damaged"


ESCAPES = [
    "../x", "..", ".", "", "/etc/passwd", "a/../../x", "a/b", "./x", "..\\x", "a\\b", "\\\\server\\share", "C:\\x",
    "c:x", "/", "x/",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_path_that_leaves_the_folder(paper: Path, name: str) -> None:
    (paper.parent / "x").write_bytes(b"")
    entry = {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "bytes": 0}
    edit(paper, lambda values: values["files"].update({name: entry}))
    error = refused(paper)
    assert "outside its folder" in error.what
    assert error.got == repr(name)
    assert error.expected == "a plain name"


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_impossible_file_name(paper: Path, name: str) -> None:
    edit(paper, lambda values: values["files"].update({name: {"sha256": "0", "bytes": 0}}))
    refused(paper)


@pytest.mark.parametrize("name", FILES)
def test_file_that_the_manifest_does_not_vouch_for(paper: Path, name: str) -> None:
    edit(paper, lambda values: values["files"].pop(name))
    error = refused(paper)
    assert name in error.expected  # type: ignore[operator]


def test_changed_contract(paper: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["contract"]["decoder"]["decode"]["inputs"]["mask"][-1] += 1

    edit(paper, change)
    error = refused(paper)
    assert "contract" in error.what
    assert error.hint.startswith("Export the bundle again")


@pytest.mark.parametrize("change", [
    lambda values: values.pop("contract"),
    lambda values: values.update(contract=None),
    lambda values: values["contract"].update(other={}),
    lambda values: values["contract"]["decoder"].pop("decode"),
    lambda values: values.update(prefill_sizes=[4, 8]),  # the architecture changes under the contract
    lambda values: values["cache"].update(slots=13),
    lambda values: values["architecture"]["llama"].update(num_layers=3),
])  # fmt: skip
def test_contract_that_the_architecture_does_not_imply(paper: Path, change: Callable[[Any], object]) -> None:
    edit(paper, change)
    assert "contract" in refused(paper).what


def test_more_files_and_keys_are_let_be(paper: Path) -> None:
    """A note beside the bundle, and a key of a later export with the same schema."""
    (paper / "NOTES.txt").write_text("hello")
    edit(paper, lambda values: values.update(mood="good"))
    Bundle.open(paper)


# --------------------------------------------------------------------------------
# Where it is looked for


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders that are looked into, by the way to them; all empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    return {
        "given": tmp_path / "given",
        "variable": tmp_path / "variable",
        "build": tmp_path / "build" / "story",
        "cache": tmp_path / "cache" / "bundles" / "story",
    }


def test_search_order(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in places.items():
        write_paper_bundle(place, name=name)
    assert Bundle.open(places["given"]).manifest.name == "given"
    monkeypatch.setenv(BUNDLE_VARIABLE, str(places["variable"]))
    assert Bundle.open(places["given"]).manifest.name == "given"
    assert Bundle.open().manifest.name == "variable"
    monkeypatch.setenv(BUNDLE_VARIABLE, "")  # as good as unset
    assert Bundle.open().manifest.name == "build"
    shutil.rmtree(places["build"])
    assert Bundle.open().manifest.name == "cache"
    shutil.rmtree(places["cache"])
    with pytest.raises(BundleError) as caught:
        Bundle.open()
    assert "build/story" in str(caught.value) and str(places["cache"]) in str(caught.value)
    assert "make export" in caught.value.hint


def test_variable_that_points_nowhere_is_not_passed_over(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_paper_bundle(places["build"])
    monkeypatch.setenv(BUNDLE_VARIABLE, str(places["variable"]))
    with pytest.raises(BundleError, match="variable"):
        Bundle.open()


def test_damaged_default_is_not_passed_over(places: dict[str, Path]) -> None:
    write_paper_bundle(places["cache"])
    (write_paper_bundle(places["build"]) / TOKENIZER).unlink()
    with pytest.raises(BundleError, match=TOKENIZER):
        Bundle.open()


def test_home_in_a_path(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write_paper_bundle(places["given"])
    monkeypatch.setenv("HOME", str(places["given"].parent))
    assert Bundle.open("~/given").path == places["given"]


@pytest.mark.parametrize("kind", ["nothing", "file", "empty folder"])
def test_no_bundle_there(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("hello")
    elif kind == "empty folder":
        place.mkdir()
    error = refused(place)
    assert str(place) in str(error)
    assert "make export" in error.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_manifest_without_permission(paper: Path) -> None:
    (paper / MANIFEST).chmod(0)
    assert "can't be read" in refused(paper).what


def test_path_of_an_unknown_user() -> None:
    assert "no such bundle" in refused(Path("~nobody-of-that-name/story")).what


@pytest.mark.parametrize("name", FILES)
def test_file_that_the_disk_cannot_read(paper: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return file_sha256(path)

    monkeypatch.setattr(bundle_module, "checked_sha256", fail)
    error = refused(paper)
    assert (error.what, error.got) == (f"{name} can't be read", "Input/output error")
