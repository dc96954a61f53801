"""Decoding and resizing on the host: from the bytes of an image file to pixels of the network's input size.

If simplejpeg and OpenCV are installed (`ekd_jax[imagenet]`), they decode JPEGs and resize random crops. Otherwise
Pillow does, in twice the time and with pixels that differ by interpolation.
"""

import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ekd_jax.common.errors import UserError, reason
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


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns an example into pixels of a given size.

    Attributes:
        shape: H, W, C of the result; C is 1 or 3.
        fit: how an image is brought to that size. "native": it has the size already; "stretch": it is resized
            regardless of its proportions; "crop": a part of it is cut out and resized.
    """

    shape: tuple[int, int, int]
    fit: Fit = "native"

    def __call__(self, example: Example, draws: np.ndarray | None = None) -> np.ndarray:
        """Return the pixels (H, W, C) uint8.

        Args:
            example: the image as it is stored.
            draws: random numbers (40,) in [0, 1) that determine the crop, for training with fit="crop". Without
                them the center is cut out.

        Raises:
            CorruptImageError: the image cannot be decoded, or has another size with fit="native".
        """
        height, width, channels = self.shape
        try:
            if self.fit == "crop" and draws is not None:
                return random_crop(example.image, self.shape, draws)
            pixels = decode(example.image, channels)
        except (
            OSError,
            ValueError,
            SyntaxError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as error:
            raise CorruptImageError(
                f"the image {example.name} cannot be read ({reason(error)})",
                "repair or remove it, or leave such images out with --config.data.corrupt=skip",
            ) from error
        if self.fit == "crop":
            return center_crop(pixels, height, width)
        if self.fit == "stretch" and pixels.shape != self.shape:
            return _pillow_resize(pixels, height, width)
        if pixels.shape != self.shape:
            found, wanted = ("x".join(map(str, s)) for s in (pixels.shape, self.shape))
            raise CorruptImageError(
                f"the image {example.name} is {found}, not {wanted} like the others",
                "pass --config.data.fit=stretch or crop, and --config.data.image_size",
            )
        return pixels


def decode(image: bytes | np.ndarray, channels: int, factor: int = 1, fast: bool = False) -> np.ndarray:
    """Return the upright pixels of an image file, (H, W, channels) uint8; pixels are returned unchanged.

    Args:
        image: bytes in any format that Pillow reads, or pixels (H, W, C) uint8.
        channels: 1 for gray, 3 for RGB. Other color models (CMYK, palettes, transparency, 16 bits) are converted.
        factor: 1, 2, 4 or 8: how much smaller the result may be where that is faster.
        fast: use the JPEG decoder's faster, less exact arithmetic, as TensorFlow does, and ignore errors that it
            can recover from.

    Raises:
        OSError, ValueError, ...: the decoder's own error for a damaged file.
    """
    if isinstance(image, np.ndarray):
        return image
    return _upright(_decode(image, channels, factor, fast), _orientation(image))


def _decode(image: bytes, channels: int, factor: int, fast: bool) -> np.ndarray:
    """Return the pixels of an image file as they are stored, whatever its orientation."""
    if simplejpeg is not None and simplejpeg.is_jpeg(image):
        try:
            if simplejpeg.decode_jpeg_header(image)[2] not in ("CMYK", "YCCK"):
                colors = "GRAY" if channels == 1 else "RGB"
                return simplejpeg.decode_jpeg(image, colors, fast, fast, min_factor=factor, strict=not fast)
        except ValueError:
            pass  # Pillow ignores harmless errors, and reports the others
    with Image.open(io.BytesIO(image)) as file:
        if factor > 1:  # has an effect on JPEGs only
            file.draft(None, (-(-file.width // factor), -(-file.height // factor)))
        pixels: Image.Image = file
        if file.mode.startswith("I"):  # 16 bits
            pixels = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
        decoded = np.asarray(pixels.convert("L" if channels == 1 else "RGB"))
    return decoded.reshape(*decoded.shape[:2], channels)


def _orientation(image: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    in_jpeg = any(
        marker == 0xE1 and image[start + 4 : start + 8] == b"Exif" for marker, start in _segments(image)
    )
    if not in_jpeg and not (image.startswith(b"\x89PNG") and b"eXIf" in image):
        return 1
    with Image.open(io.BytesIO(image)) as file:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))


def _segments(image: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of the segments of a JPEG's header, up to the one with the image's size."""
    start = 2
    while image[:2] == b"\xff\xd8" and start + 4 <= len(image) and image[start] == 0xFF:
        marker = image[start + 1]
        yield marker, start
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return
        start += 2 + int.from_bytes(image[start + 2 : start + 4])


def _keep_rows(image: bytes, rows: int) -> bytes:
    """Return a baseline JPEG that ends after `rows` rows; these decode to the same pixels.

    A decoder has to start at the first row, but it need not decode the rows below a crop: this saves a tenth of
    the time. An image is returned unchanged if it is not upright, not a baseline JPEG, or may be truncated, which
    would go unnoticed.
    """
    *_, (marker, start) = [(0, 0), *_segments(image)]
    if marker != 0xC0 or not image.endswith(b"\xff\xd9") or _orientation(image) != 1:
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


def random_crop(image: bytes | np.ndarray, shape: tuple[int, int, int], draws: np.ndarray) -> np.ndarray:
    """Return a random part of the image, resized to `shape` (Szegedy et al. 2015).

    It is drawn as by torchvision's RandomResizedCrop: .08 to 1 of the area, proportions 3/4 to 4/3. A large part is
    decoded at a half, a quarter or an eighth of its size, but not below `shape`. The remaining reduction is less
    than twofold, so linear interpolation skips no pixel.

    Args:
        image: bytes of an image file, or pixels (H, W, C) uint8.
        shape: H, W, C of the result.
        draws: random numbers (40,) in [0, 1).
    """
    height, width, channels = shape
    full = _size(image)
    top, left, h, w = random_box(*full, draws)
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or (h >= f * height and w >= f * width))
    if factor == 1 and isinstance(image, bytes):
        image = _keep_rows(image, top + h)
    pixels = decode(image, channels, factor, fast=True)
    scale = pixels.shape[1] / full[1]
    y, x = round(top * scale), round(left * scale)
    cut = pixels[y : y + max(1, round(h * scale)), x : x + max(1, round(w * scale))]
    if cv2 is None:
        return _pillow_resize(cut, height, width)
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


def center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize the short side to 256/224 of the crop's short side, and return the center (height, width, C) uint8.

    This is the usual evaluation on ImageNet (torchvision: Resize(256), CenterCrop(224)), with Pillow's antialiased
    bilinear filter, by which published numbers were measured.
    """
    h, w = pixels.shape[:2]
    short = round(min(height, width) * EVALUATION_MARGIN)
    size = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    pixels = _pillow_resize(pixels, *size)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def _size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Return height and width of the upright image."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    if simplejpeg is not None and simplejpeg.is_jpeg(image):
        height, width, *_ = simplejpeg.decode_jpeg_header(image, strict=False)
    else:
        with Image.open(io.BytesIO(image)) as file:
            width, height = file.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def _pillow_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize pixels (H, W, C) by an antialiased bilinear filter."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized.reshape(height, width, pixels.shape[-1])
