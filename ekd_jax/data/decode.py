"""Decoding and resizing on the host: from the bytes of an image file to pixels of the network's input size.

If simplejpeg and OpenCV are installed (`ekd_jax[imagenet]`), they decode JPEGs and resize random crops. Otherwise
Pillow does, in twice the time and with pixels that differ by interpolation.
"""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes
from ekd_jax.common.text import printable
from ekd_jax.data.dataset import Example

try:
    import cv2
    import simplejpeg
except ImportError:
    cv2 = simplejpeg = None
else:
    cv2.setNumThreads(0)  # our own threads read one image each

Fit = Literal["native", "stretch", "crop"]
EVALUATION_MARGIN = 256 / 224  # short side of the resized image, relative to the side of the center crop
CROP_AREA, CROP_RATIO, CROP_ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of random crops
MAX_PIXELS = 178_956_970  # Pillow's own limit: RGB pixels take half a gigabyte
MAX_FILE_BYTES = 2**31  # the pixels of the largest image fit, uncompressed, with 16 bits and transparency

# Formats that are read, and the suffixes of their files. Others of Pillow are left out because they start another
# program (EPS) or cannot be told from other files (TGA).
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"),
}


class CorruptImageError(UserError):
    """An image that cannot be read.

    Args:
        why: which image, and the reason.
        advice: what the user can do.
    """

    def __init__(self, why: str, advice: str):
        super().__init__(why, advice)
        self.why = why

    def __str__(self) -> str:
        return ": ".join(self.args)


class _TooLargeError(ValueError):
    """An image with more pixels than the limit."""


def read_image_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of an image file; a pipe or a device is refused, never waited for.

    Args:
        path: of the file, or of a link to it.
        max_bytes: largest file that is read.

    Raises:
        CorruptImageError: there is no such file, it is no regular file, it may not be read, or it is too large.
    """
    try:
        return read_bytes(path, max_bytes)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        why = (error.strerror if isinstance(error, OSError) else "") or reason(error)
    raise CorruptImageError(
        f"the image {printable(os.fspath(path))} cannot be read ({why})", "restore, replace or remove it"
    )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns an example into pixels of a given size.

    Attributes:
        shape: H, W, C of the result; C is 1 or 3.
        fit: how an image is brought to that size. "native": it has the size already; "stretch": it is resized
            regardless of its proportions; "crop": a part of it is cut out and resized.
        max_pixels: largest image that is decoded, in pixels; a small file may claim any size.
    """

    shape: tuple[int, int, int]
    fit: Fit = "native"
    max_pixels: int = MAX_PIXELS

    def __call__(self, example: Example, draws: np.ndarray | None = None) -> np.ndarray:
        """Return the pixels (H, W, C) uint8.

        Args:
            example: the image as it is stored.
            draws: random numbers (40,) in [0, 1) that determine the crop, for training with fit="crop". Without
                them the center is cut out.

        Raises:
            CorruptImageError: the image cannot be decoded, has another size with fit="native", or has more than
                `max_pixels` pixels.
        """
        try:
            pixels = self._read(example.image, draws)
        except Exception as error:  # decoders raise anything for damaged bytes, such as KeyError
            advice = "repair or remove it, or leave such images out with --config.data.corrupt=skip"
            if isinstance(error, _TooLargeError):
                advice = "raise --config.data.max_pixels if it is yours, or remove it"
            raise CorruptImageError(
                f"the image {example.name} cannot be read ({_in_plain_words(error)})", advice
            ) from error
        if pixels.shape != self.shape:
            found, wanted = ("x".join(map(str, s)) for s in (pixels.shape, self.shape))
            raise CorruptImageError(
                f"the image {example.name} is {found}, not {wanted} like the others",
                "pass --config.data.fit=stretch or crop, and --config.data.image_size",
            )
        return pixels

    def _read(self, image: bytes | np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        height, width, channels = self.shape
        if self.fit == "crop" and draws is not None:
            return random_crop(image, self.shape, draws, self.max_pixels)
        pixels = decode(image, channels, max_pixels=self.max_pixels)
        if self.fit == "crop":
            return center_crop(pixels, height, width, self.max_pixels)
        if self.fit == "stretch" and pixels.shape != self.shape:
            return resized(pixels, height, width)
        return pixels


def _in_plain_words(error: Exception) -> str:
    """Return why an image cannot be read."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, OSError | ValueError | SyntaxError):
        return reason(error)
    return f"it is damaged: {type(error).__name__} {reason(error)}"


def decode(
    image: bytes | np.ndarray,
    channels: int,
    factor: int = 1,
    fast: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Return the upright pixels of an image file, (H, W, channels) uint8; pixels are returned unchanged.

    Of several frames the first is read.

    Args:
        image: bytes of an image file in one of the formats of `SUFFIXES`, or pixels (H, W, C) uint8.
        channels: 1 for gray, 3 for RGB. Other color models (CMYK, palettes, 16 bits) are converted. Transparency
            is dropped, as by Pillow's `convert("RGB")`: the colors below it show.
        factor: 1, 2, 4 or 8: how much smaller the result may be where that is faster.
        fast: use the JPEG decoder's faster, less exact arithmetic, as TensorFlow does, and ignore errors that it
            can recover from.
        max_pixels: largest image that is decoded.

    Raises:
        ValueError: the image is larger than that, or its colors cannot be converted.
        Exception: the decoder's own error for a damaged file, of any type.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"its pixels are {image.dtype}, not uint8 of 0 to 255")
        return image
    return _upright(_decode(image, channels, factor, fast, max_pixels), _orientation(image, max_pixels))


def _decode(image: bytes, channels: int, factor: int, fast: bool, max_pixels: int) -> np.ndarray:
    """Return the pixels of an image file as they are stored, whatever its orientation."""
    if simplejpeg is not None and simplejpeg.is_jpeg(image):
        try:
            height, width, model, _ = simplejpeg.decode_jpeg_header(image)
            _check_size(height, width, max_pixels)
            if model not in ("CMYK", "YCCK"):
                colors = "GRAY" if channels == 1 else "RGB"
                return simplejpeg.decode_jpeg(image, colors, fast, fast, min_factor=factor, strict=not fast)
        except _TooLargeError:
            raise
        except ValueError:
            pass  # Pillow ignores harmless errors, and reports the others
    with _open(image, max_pixels) as file:
        if factor > 1:  # has an effect on JPEGs only
            file.draft(None, (-(-file.width // factor), -(-file.height // factor)))
        decoded = np.asarray(_with_8_bits(file).convert("L" if channels == 1 else "RGB"))
    return decoded.reshape(*decoded.shape[:2], channels)


def _open(image: bytes, max_pixels: int) -> Image.Image:
    """Open an image file with Pillow, which reads its header only.

    Raises:
        ValueError: it is not an image, or has more than `max_pixels` pixels.
    """
    if not image:
        raise ValueError("it is empty")
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        # Pillow has one limit per process, and comes first.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        file = Image.open(io.BytesIO(image), formats=_formats())
    except UnidentifiedImageError as error:
        raise ValueError(f"it is not an image of a format that is read: {', '.join(_formats())}") from error
    except Image.DecompressionBombError as error:
        raise _TooLargeError(f"it has more than {max_pixels:,} pixels") from error
    _check_size(file.height, file.width, max_pixels)
    return file


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats to read, without those that Pillow was built without."""
    Image.init()
    return tuple(name for name in SUFFIXES if name in Image.OPEN)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise _TooLargeError(f"it has {height}x{width} pixels, above the limit of {max_pixels:,}")
    if height < 1 or width < 1:
        raise ValueError("it has no pixels")


def _with_8_bits(file: Image.Image) -> Image.Image:
    """Return an image whose 8 bits per channel can be converted to RGB and gray.

    Raises:
        ValueError: the scale of its pixels is unknown, or its color model cannot be converted.
    """
    if file.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown scale; save it with 8 bits")
    if file.mode == "I" and file.format not in ("PNG", "PPM"):  # there it means 16 bits
        raise ValueError("its pixels are signed or 32-bit integers of unknown scale; save it with 8 bits")
    if file.mode == "LAB":
        raise ValueError("its color model is CIELAB; save it as RGB")
    if file.mode.startswith("I"):
        bits, white_is_zero = 16, False
        if isinstance(file, TiffImagePlugin.TiffImageFile):  # Pillow leaves these two to the caller
            bits = file.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
            white_is_zero = file.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        gray = (np.asarray(file) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - gray if white_is_zero else gray)
    if file.mode in ("La", "RGBa"):  # premultiplied by their transparency
        return file.convert("LA" if file.mode == "La" else "RGBA")
    return file


def _orientation(image: bytes, max_pixels: int) -> int:
    """Return the EXIF orientation, 1 (upright) to 8. Pillow turns TIFF files itself."""
    if image.startswith(b"\xff\xd8"):
        may_have_one = any(
            marker == 0xE1 and image[start + 4 : start + 8] == b"Exif" for marker, start in _segments(image)
        )
    else:
        png, webp, avif = image.startswith(b"\x89PNG"), image.startswith(b"RIFF"), image[4:8] == b"ftyp"
        may_have_one = (png and b"eXIf" in image) or (webp and b"EXIF" in image) or avif
    if not may_have_one:
        return 1
    with _open(image, max_pixels) as file:
        orientation: int = file.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def _segments(image: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of the segments of a JPEG's header, up to the one with the image's size."""
    start = 2
    while image[:2] == b"\xff\xd8" and start + 4 <= len(image) and image[start] == 0xFF:
        marker = image[start + 1]
        yield marker, start
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return
        start += 2 + int.from_bytes(image[start + 2 : start + 4])


def _keep_rows(image: bytes, rows: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a baseline JPEG that ends after `rows` rows; these decode to the same pixels.

    A decoder has to start at the first row, but it need not decode the rows below a crop: this saves a tenth of
    the time. An image is returned unchanged if it is not upright, not a baseline JPEG, or may be truncated, which
    would go unnoticed.
    """
    *_, (marker, start) = [(0, 0), *_segments(image)]
    if marker != 0xC0 or not image.endswith(b"\xff\xd9") or _orientation(image, max_pixels) != 1:
        return image
    return image[: start + 5] + rows.to_bytes(2) + image[start + 7 :]


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror pixels as EXIF 2.3 defines orientations."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def random_crop(
    image: bytes | np.ndarray,
    shape: tuple[int, int, int],
    draws: np.ndarray,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Return a random part of the image, resized to `shape` (Szegedy et al. 2015).

    It is drawn as by torchvision's RandomResizedCrop: .08 to 1 of the area, proportions 3/4 to 4/3. A large part is
    decoded at a half, a quarter or an eighth of its size, but not below `shape`. The remaining reduction is less
    than twofold, so linear interpolation skips no pixel.

    Args:
        image: bytes of an image file, or pixels (H, W, C) uint8.
        shape: H, W, C of the result.
        draws: random numbers (40,) in [0, 1).
        max_pixels: largest image that is decoded.

    Raises:
        ValueError, Exception: as `decode`.
    """
    height, width, channels = shape
    full = _size(image, max_pixels)
    top, left, h, w = random_box(*full, draws)
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or (h >= f * height and w >= f * width))
    if factor == 1 and isinstance(image, bytes):
        image = _keep_rows(image, top + h, max_pixels)
    pixels = decode(image, channels, factor, fast=True, max_pixels=max_pixels)
    scale = pixels.shape[1] / full[1]
    y, x = round(top * scale), round(left * scale)
    cut = pixels[y : y + max(1, round(h * scale)), x : x + max(1, round(w * scale))]
    if cv2 is None:
        return resized(cut, height, width)
    # OpenCV drops the axis of a single channel.
    return cv2.resize(cut, (width, height), interpolation=cv2.INTER_LINEAR).reshape(shape)


def random_box(height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random part, as torchvision's RandomResizedCrop.get_params."""
    low, high = (math.log(r) for r in CROP_RATIO)
    for area, ratio, y, x in draws.reshape(CROP_ATTEMPTS, 4).tolist():
        pixels = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area)
        proportion = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(pixels * proportion)), round(math.sqrt(pixels / proportion))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    # No attempt fits, as with very long images: take the largest part of allowed proportions at the center.
    proportion = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * proportion)), min(height, round(width / proportion))
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(pixels: np.ndarray, height: int, width: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Resize the short side to 256/224 of the crop's short side, and return the center (height, width, C) uint8.

    This is the usual evaluation on ImageNet (torchvision: Resize(256), CenterCrop(224)), with Pillow's antialiased
    bilinear filter, by which published numbers were measured.

    Raises:
        ValueError: the image is so long and narrow that it would have more than `max_pixels` pixels when resized.
    """
    h, w = pixels.shape[:2]
    short = round(min(height, width) * EVALUATION_MARGIN)
    size = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    if size[0] * size[1] > max_pixels:
        raise ValueError(f"it is {h}x{w}, too long and narrow for its short side to become {short} pixels")
    pixels = resized(pixels, *size)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def _size(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of the upright image."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if simplejpeg is not None and simplejpeg.is_jpeg(image):
        height, width, *_ = simplejpeg.decode_jpeg_header(image, strict=False)
        _check_size(height, width, max_pixels)
    else:
        with _open(image, max_pixels) as file:
            width, height = file.size
    return (width, height) if _orientation(image, max_pixels) >= 5 else (height, width)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return pixels (height, width, C) uint8, resized from (H, W, C) by Pillow's antialiased bilinear filter."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    result = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return result.reshape(height, width, pixels.shape[-1])
