"""From any picture to the array that the vision graph reads.

The way of a picture: decode, flatten to RGB (alpha over white), make it square, scale it to `size` with the
bicubic filter, turn upright by its EXIF orientation, divide by 255. Mean and standard deviation are inside the
exported graph.

A square is made in one of two ways. A photograph loses the ends of its longer side, as in DINOv2's evaluation
transform (which cuts off another eighth all around; a story needs the edges). A drawing or a cut-out on a plain
ground is set into a larger square of that ground instead: there the ends are the thing itself, a fox's head and
tail, and nothing is lost with more ground.
"""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seed_story.errors import PictureError

__all__ = ["MAX_PIXELS", "Picture", "load_and_preprocess_image", "preprocess_image"]

MAX_PIXELS = 100_000_000
"""The largest picture that is decoded, width times height: about 300 MB as RGB."""

Picture: TypeAlias = str | Path | bytes | BinaryIO | Image.Image | NDArray[np.uint8]
"""Whatever a user may hand in as a picture."""

# No EPS or the like: Pillow runs other programs for them. AVIF last: Pillow before 11.3 doesn't know the
# name.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "AVIF")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # the EXIF tag

_PLAIN_SHARE = 0.6
"""Of the pixels along a picture's edges, that have one colour where it has a plain ground."""
_PLAIN_SPREAD = 16  # levels of 256 in each channel; what JPEG does to a plain ground is less

# catch_warnings changes the process's filters; the lock keeps two of our own threads from mixing them up.
_WARNINGS_LOCK = threading.Lock()


def load_and_preprocess_image(source: Picture, size: int = 224) -> NDArray[np.float32]:
    """Reads a picture and prepares it for the vision graph.

    Args:
        source: a path, a file's bytes, a file opened in binary mode (read from its start, left open), a
            Pillow image (left open, at its current frame), or a uint8 array `[height, width, 3]`. Of an
            animation's file, the first frame.
        size: the side of the square, pixels.

    Returns:
        float32 `[1, size, size, 3]`, RGB, 0..1.

    Raises:
        PictureError: the picture is missing, empty, damaged, too large or in no known format, or `size` is
            below 1.
    """
    if isinstance(source, (Image.Image, np.ndarray)):
        return preprocess_image(source, size)
    if isinstance(source, (str, Path)):
        return _from_path(source, size)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise PictureError("the picture's data is empty", got="0 bytes", expected="an encoded picture")
        return _from_stream(io.BytesIO(source), "these bytes", size)
    if hasattr(source, "read"):
        return _from_stream(source, f"the file {getattr(source, 'name', '')!r}", size)
    raise PictureError(
        "this isn't a picture",
        got=type(source).__name__,
        expected="a path, bytes, a binary file, a PIL image or a uint8 array [height, width, 3]",
    )


def preprocess_image(image: Image.Image | NDArray[np.uint8], size: int = 224) -> NDArray[np.float32]:
    """Prepares a picture that is in memory already.

    Args:
        image: a Pillow image of any mode (a lazily opened one is decoded here; its EXIF orientation counts),
            or a uint8 array `[height, width, 3]`, RGB.
        size: the side of the square, pixels.

    Returns:
        float32 `[1, size, size, 3]`, RGB, 0..1.

    Raises:
        PictureError: the picture is empty, too large, damaged, of a shape, type or mode that has no RGB form,
            or `size` is below 1.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise PictureError("the size to prepare a picture for is impossible", got=size, expected="1 or more pixels")
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    _check_dimensions(image)
    try:
        rgb = _flatten(image)
        square = _square(rgb, size)
    except PictureError:
        raise
    except Exception as error:  # a decoder fed with damaged data raises anything at all
        raise PictureError(
            "the picture is damaged or cut short",
            got=f"{type(error).__name__}: {error}",
            expected="a complete picture",
            hint="Copy or save it again.",
        ) from error
    turn = _TURNS.get(_orientation(image))
    if (
        turn is not None
    ):  # a square around the centre turns as well after the crop as before it, at a fraction of the price
        square = square.transpose(turn)
    pixels = np.asarray(square, dtype=np.float32)
    return np.ascontiguousarray(pixels[None] / np.float32(255))


def _from_path(source: str | Path, size: int) -> NDArray[np.float32]:
    path = Path(source)
    try:
        if path.is_dir():
            raise PictureError("the picture is a folder", got=path, expected="a picture file")
        with path.open("rb") as file:
            if path.is_file() and path.stat().st_size == 0:
                raise PictureError("the picture's file is empty", got=f"{path}, 0 bytes", expected="a picture")
            return _from_stream(file, str(path), size)
    except FileNotFoundError as error:
        remote = str(source).startswith(("http:", "https:", "data:"))
        hint = "Download it first, then pass the file or its bytes." if remote else "Check the path."
        raise PictureError("the picture doesn't exist", got=path, expected="a picture file", hint=hint) from error
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise PictureError("the picture can't be opened", got=error, expected="a readable picture file") from error


def _from_stream(stream: BinaryIO | io.BytesIO, name: str, size: int) -> NDArray[np.float32]:
    """Decodes an encoded picture; the stream stays open."""
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures (judged below) and of formats it tried
            image = Image.open(stream, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(error) from error
    except Exception as error:  # UnidentifiedImageError mostly, but damaged headers raise anything at all
        raise PictureError(
            "the file isn't a picture, or its beginning is damaged",
            got=name,
            expected="JPEG, PNG, WebP, GIF, BMP, TIFF or another common format",
            hint="Open it in an image viewer and save it as PNG or JPEG.",
        ) from error
    return preprocess_image(image, size)


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise PictureError(
            "the array isn't a picture",
            got=f"{array.dtype} {list(array.shape)}",
            expected="uint8 [height, width, 3]",
            hint="Grey: np.repeat(x[..., None], 3, -1). Floats in 0..1: (x * 255).round().astype(np.uint8).",
        )
    if array.size == 0:
        raise PictureError("the picture has no pixels", got=list(array.shape), expected="1x1 or more")
    return Image.fromarray(np.ascontiguousarray(array))


def _check_dimensions(image: Image.Image) -> None:
    """Judges the header, before anything is decoded."""
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError("the picture has no pixels", got=f"{width}x{height}", expected="1x1 or more")
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width}x{height}")


def _too_large(got: object) -> PictureError:
    return PictureError(
        "the picture is too large to decode safely",
        got=got,
        expected=f"at most {MAX_PIXELS // 1_000_000} megapixels",
        hint="Scale it down first: the model looks at a few hundred pixels a side.",
    )


def _square(rgb: Image.Image, size: int) -> Image.Image:
    """The whole picture on a square of its ground, if that is plain and the picture no square; else its middle."""
    width, height = rgb.size
    ground = _plain_ground(rgb) if width != height else None
    if ground is None:
        return rgb.resize((size, size), Image.Resampling.BICUBIC, box=_centre_square(rgb.size))
    scale = size / max(width, height)
    whole = rgb.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), ground)
    square.paste(whole, ((size - whole.width) // 2, (size - whole.height) // 2))
    return square


def _plain_ground(rgb: Image.Image) -> tuple[int, int, int] | None:
    """The colour that most of the picture's edges have; None if there is no such colour."""
    right, bottom = rgb.width - 1, rgb.height - 1
    edges = [
        (0, 0, right + 1, 1),
        (0, bottom, right + 1, bottom + 1),
        (0, 0, 1, bottom + 1),
        (right, 0, right + 1, bottom + 1),
    ]
    pixels = np.concatenate([np.asarray(rgb.crop(edge), np.int16).reshape(-1, 3) for edge in edges])
    ground = np.median(pixels, axis=0)
    plain = np.mean(np.abs(pixels - ground).max(axis=1) <= _PLAIN_SPREAD) >= _PLAIN_SHARE
    red, green, blue = (int(channel) for channel in ground)
    return (red, green, blue) if plain else None


def _centre_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box to scale: one step, so that a strip of 1x5000 never becomes 224x1,120,000 on the way."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; a damaged EXIF block is no reason to refuse a picture."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha over white, deep grey scaled to 8 bits rather than clipped."""
    image.load()
    if image.mode.startswith(("I", "F")):
        image = _deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F to 8 bits.

    16-bit values, and 32-bit integers that fit 16 bits (how older Pillows open a 16-bit PNG), are divided by
    257, so that 65535 is white. Floats in 0..1 are multiplied by 255. Anything else is stretched from its own
    lowest value, black, to its highest, white.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise PictureError("the picture has pixels that are no numbers", got="NaN or infinity", expected="numbers")
    low, high = float(values.min()), float(values.max())
    ceiling = 1.0 if image.mode == "F" else 65535.0
    if low >= 0 and high <= ceiling:
        low, high = 0.0, ceiling
    scaled = (values - low) * (255.0 / ((high - low) or 1.0))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
