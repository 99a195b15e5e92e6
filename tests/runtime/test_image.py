"""Pictures: every mode and size arrives as the same array, every broken one as a PictureError that helps."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from seed_story.errors import PictureError
from seed_story.image import MAX_PIXELS, load_and_preprocess_image, preprocess_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(side: int = 64) -> Image.Image:
    """Red, green / blue, white: any flip or turn shows."""
    array = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    array[:half, :half], array[:half, half:], array[half:, :half], array[half:, half:] = (
        RED,
        GREEN,
        BLUE,
        WHITE,
    )
    return Image.fromarray(array)


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The four corners, clockwise from the top left, as 8-bit colours."""
    _, height, width, _ = pixels.shape
    places = [(2, 2), (2, width - 3), (height - 3, width - 3), (height - 3, 2)]
    return [tuple(int(v) for v in np.rint(pixels[0, y, x] * 255)) for y, x in places]


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_shape_dtype_range_and_layout() -> None:
    pixels = load_and_preprocess_image(noise(300, 200), 224)
    assert pixels.shape == (1, 224, 224, 3) and pixels.dtype == np.float32
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert 0 <= pixels.min() < 0.3 and 0.7 < pixels.max() <= 1


def test_every_kind_of_source_gives_the_same_array(tmp_path: Path) -> None:
    image = noise(90, 70)
    path = tmp_path / "a picture.png"
    image.save(path)
    data = path.read_bytes()
    want = preprocess_image(image, 32)
    with path.open("rb") as file:
        file.seek(5)  # someone has looked at it already
        np.testing.assert_array_equal(load_and_preprocess_image(file, 32), want)
        assert not file.closed
    for source in (str(path), path, data, bytearray(data), io.BytesIO(data), image, np.asarray(image)):
        np.testing.assert_array_equal(load_and_preprocess_image(source, 32), want)  # type: ignore[arg-type]


def test_a_square_of_the_right_size_is_not_resampled() -> None:
    image = noise(48, 48)
    np.testing.assert_array_equal(preprocess_image(image, 48)[0], np.asarray(image, np.float32) / np.float32(255))


@pytest.mark.parametrize("size", [(128, 64), (64, 192)])
def test_equals_resize_of_the_shortest_side_then_centre_crop(size: tuple[int, int]) -> None:
    """The two-step form, as torchvision and transformers do it; sizes where it needs no rounding."""
    image = noise(*size)
    width, height = size[0] // 2, size[1] // 2
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_allclose(preprocess_image(image, 32)[0], whole[top : top + 32, left : left + 32], atol=1.01 / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quadrants(), "JPEG", exif=exif, quality=100, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got = load_and_preprocess_image(data, 64)
    np.testing.assert_allclose(got[0], np.asarray(upright, np.float32) / 255, atol=1.01 / 255)
    first = corners(got)[0]
    assert np.argmax(first) == {1: 0, 2: 1, 5: 0, 6: 2, 8: 1}.get(orientation, np.argmax(first))


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    data = encode(quadrants(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f\xff\xff", quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_and_preprocess_image(data, 32).shape == (1, 32, 32, 3)


def test_alpha_is_composited_over_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    np.testing.assert_array_equal(preprocess_image(clear, 8), 1.0)
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    np.testing.assert_allclose(preprocess_image(half, 8)[0, 0, 0], [1, 127 / 255, 127 / 255], atol=0.005)
    grey = Image.new("LA", (8, 8), (0, 0))
    np.testing.assert_array_equal(preprocess_image(grey, 8), 1.0)


def test_palette_with_and_without_transparency() -> None:
    palette = quadrants().quantize(4)
    assert corners(preprocess_image(palette, 64)) == [RED, GREEN, WHITE, BLUE]
    index = palette.getpixel((0, 0))
    clear_red = load_and_preprocess_image(encode(palette, "PNG", transparency=index), 64)
    assert corners(clear_red) == [WHITE, GREEN, WHITE, BLUE]


def test_truecolour_key_transparency() -> None:
    data = encode(quadrants(), "PNG", transparency=BLUE)
    assert corners(load_and_preprocess_image(data, 64)) == [RED, GREEN, WHITE, WHITE]


def test_sixteen_bit_grey_looks_like_its_eight_bit_form() -> None:
    eight = np.random.default_rng(1).integers(0, 256, (20, 20), np.uint8)
    want = preprocess_image(Image.fromarray(eight), 20)
    sixteen = Image.fromarray(eight.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for image in (
        sixteen,
        Image.open(io.BytesIO(encode(sixteen))),
        Image.fromarray(eight.astype(np.int32) * 257),
    ):
        np.testing.assert_array_equal(preprocess_image(image, 20), want)
    big_endian = Image.frombytes("I;16B", (20, 20), (eight.astype(">u2") * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(preprocess_image(big_endian, 20), want)


def test_wide_integers_and_floats_are_stretched() -> None:
    ramp = np.linspace(-1e6, 1e6, 16, dtype=np.int32).reshape(4, 4)
    pixels = preprocess_image(Image.fromarray(ramp), 4)
    assert pixels.min() == 0 and pixels.max() == 1 and np.unique(pixels).size == 16
    unit = np.full((4, 4), 0.5, np.float32)
    np.testing.assert_allclose(preprocess_image(Image.fromarray(unit), 4), 0.5, atol=0.005)
    np.testing.assert_array_equal(preprocess_image(Image.fromarray(unit * 0 - 7), 4), 0)  # constant: no division by 0
    with pytest.raises(PictureError, match="NaN"):
        preprocess_image(Image.fromarray(unit * np.nan), 4)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_keep_black_and_white(mode: str) -> None:
    array = np.zeros((16, 16, 3), np.uint8)
    array[:, 8:] = 255
    pixels = preprocess_image(Image.fromarray(array).convert(mode), 16)
    np.testing.assert_allclose(pixels[0, 8, 2], 0, atol=0.02)
    np.testing.assert_allclose(pixels[0, 8, 13], 1, atol=0.02)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    got = corners(load_and_preprocess_image(encode(quadrants().convert("CMYK"), "JPEG", quality=95), 64))
    np.testing.assert_allclose(got, [RED, GREEN, WHITE, BLUE], atol=40)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert corners(load_and_preprocess_image(data, 16))[0] == RED


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_tiny_and_extreme_shapes(size: tuple[int, int]) -> None:
    pixels = preprocess_image(Image.new("RGB", size, RED), 224)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array([1, 0, 0], np.float32), (1, 224, 224, 3)))


def test_a_photograph_loses_the_ends_of_its_longer_side() -> None:
    array = np.asarray(noise(50, 10)).copy()
    array[:, 20:30] = RED
    pixels = preprocess_image(array, 10)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array([1, 0, 0], np.float32), (1, 10, 10, 3)))


@pytest.mark.parametrize("ground", [WHITE, (200, 180, 40)])
@pytest.mark.parametrize("wide", [True, False])
def test_a_thing_on_a_plain_ground_is_seen_whole(ground: tuple[int, int, int], wide: bool) -> None:
    """Its two ends lie outside the middle square; what is added has the ground's colour."""
    array = np.full((40, 80, 3), ground, np.uint8)
    array[18:22, :40], array[18:22, 40:] = BLUE, RED  # ends that touch the picture's own
    image = Image.fromarray(array if wide else array.transpose(1, 0, 2))
    pixels = np.rint(preprocess_image(image, 80)[0] * 255)
    want = np.full((80, 80, 3), ground, np.float32)
    want[20:60] = array
    np.testing.assert_array_equal(pixels, want if wide else want.transpose(1, 0, 2))


def test_a_cut_out_is_on_white_and_jpeg_leaves_a_ground_plain() -> None:
    clear = Image.new("RGBA", (30, 10), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 4, 30, 6))
    assert corners(preprocess_image(clear, 30)) == [WHITE] * 4
    picture = Image.new("RGB", (300, 100), (90, 160, 90))
    picture.paste(noise(280, 80), (10, 10))
    again = load_and_preprocess_image(encode(picture, "JPEG", quality=60), 30)
    np.testing.assert_allclose(again[0, :6], np.broadcast_to(np.array([90, 160, 90]) / 255, (6, 30, 3)), atol=4 / 255)


@pytest.mark.parametrize(("share", "whole"), [(0.5, False), (0.7, True)])
def test_a_ground_is_plain_where_most_of_the_edges_have_its_colour(share: float, whole: bool) -> None:
    array = np.asarray(noise(60, 30)).copy()
    array[:, : round(60 * share)] = GREEN  # with its end, this is a little more than `share` of the edges
    assert (corners(preprocess_image(array, 60))[1] == GREEN) is whole  # noise, in the middle square


def test_a_strided_array_is_read_right() -> None:
    array = np.asarray(noise(40, 40))
    np.testing.assert_array_equal(preprocess_image(array[::2, ::-2], 20), preprocess_image(array[::2, ::-2].copy(), 20))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height and holds a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 10_001, 20_000, 2_000_000])
def test_bombs_are_refused_from_the_header(side: int) -> None:
    """10,000 squared is the limit itself: allowed by the header, then found cut short."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(PictureError, match="cut short" if side**2 <= MAX_PIXELS else "too large"):
            load_and_preprocess_image(png_header(side, side))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not [w for w in seen if issubclass(w.category, Image.DecompressionBombWarning)]


def test_messages_say_what_got_expected_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PictureError) as missing:
        load_and_preprocess_image(tmp_path / "none.png")
    error = missing.value
    assert "doesn't exist" in error.what and "none.png" in str(error.got) and error.expected and error.hint
    with pytest.raises(PictureError, match="Download it first"):
        load_and_preprocess_image("https://example.org/bear.png")
    with pytest.raises(PictureError, match="folder"):
        load_and_preprocess_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(PictureError, match="empty"):
        load_and_preprocess_image(tmp_path / "empty.png")
    with pytest.raises(PictureError, match="empty"):
        load_and_preprocess_image(b"")
    (tmp_path / "story.txt").write_text("Once upon a time " * 9)
    with pytest.raises(PictureError, match="isn't a picture"):
        load_and_preprocess_image(tmp_path / "story.txt")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_every_truncation_is_a_picture_error(kind: str, tmp_path: Path) -> None:
    data = encode(noise(60, 60), kind)
    path = tmp_path / "cut"
    assert load_and_preprocess_image(data, 32).shape == (1, 32, 32, 3)
    for part in (1, 10, 30, len(data) // 2):
        path.write_bytes(data[:part])
        late = part > 30 and kind not in ("WEBP", "TIFF")  # those two fail while they are identified
        with pytest.raises(PictureError, match="cut short" if late else None):
            load_and_preprocess_image(path, 32)


def test_a_lazily_opened_truncated_image_is_a_picture_error() -> None:
    data = encode(noise(60, 60), "PNG")
    with pytest.raises(PictureError, match="cut short"):
        preprocess_image(Image.open(io.BytesIO(data[: len(data) // 2])), 32)


@pytest.mark.parametrize(
    "source",
    [None, 5, "", "a\0b", "x" * 5000, io.StringIO("text"), io.BytesIO(), b"GIF89a", b"%!PS-Adobe-3.0 EPSF\n",
     np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)),
     np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (0, 5))],
)  # fmt: skip
def test_impossible_sources(source: object) -> None:
    with pytest.raises(PictureError):
        load_and_preprocess_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(PictureError, match="size"):
        load_and_preprocess_image(quadrants(), size)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_damaged_files_give_an_array_or_a_picture_error(kind: str, data: st.DataObject) -> None:
    broken = bytearray(encode(noise(20, 20), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, min(len(broken), 200) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(PictureError):
            assert load_and_preprocess_image(bytes(broken), 8).shape == (1, 8, 8, 3)
