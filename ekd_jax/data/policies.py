"""RandAugment and TrivialAugment on the device, equal bit for bit to torchvision's on PIL images.

An operation moves pixels, or blends the image with a degenerate one, or replaces every gray level by another.
Each image passes through these three kinds in turn, and at most one of them changes it. Branches for the 14
operations would not be cheaper: `vmap` computes all branches.

Whatever depends on an operation's strength is tabulated in double precision when the program is built. The
arithmetic left for the device is exact: all devices compute the same image, and it is PIL's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
LEVELS = 31
_GRAYS = 256
_LUMA = (19595, 38470, 7471)  # weights of red, green and blue in 1/65536: ITU-R 601 as PIL rounds it


class Space(NamedTuple):
    """The strength of each operation at the highest level.

    Attributes:
        shear: slope.
        translate_x, translate_y: distance in pixels.
        rotate: angle in degrees.
        enhance: change of the factor by which brightness, color, contrast or sharpness is multiplied.
        posterize: number of bits that are removed.
    """

    shear: float
    translate_x: float
    translate_y: float
    rotate: float
    enhance: float
    posterize: int


def randaugment_space(height: int, width: int) -> Space:
    """Return the strengths of `torchvision.transforms.RandAugment` for images of this size."""
    return Space(0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 4)


TRIVIALAUGMENT_SPACE = Space(0.99, 32, 32, 135, 0.99, 6)  # torchvision.transforms.TrivialAugmentWide


class Strengths(NamedTuple):
    """Tables of all strengths, as the device needs them; index 1 of an axis of 2 is the negative sign.

    Attributes:
        maps: `affine_map` of every operation, (14, 31, 2, 6) int32.
        products: factor times the difference of two gray levels, for differences from -255, (31, 2, 511) float32.
        masks: bits that Posterize keeps, (31,) uint8.
        thresholds: lowest gray level that Solarize inverts, (31,) float32.
    """

    maps: np.ndarray
    products: np.ndarray
    masks: np.ndarray
    thresholds: np.ndarray


def randaugment(key: Array, image: Array, operations: int, level: int) -> Array:
    """Apply random operations one after another, all at the same level (Cubuk et al. 2020).

    Args:
        key: random key of this image.
        image: (H, W, C) uint8, C 1 or 3.
        operations: number of operations, N in the paper.
        level: strength from 0 to 30, M in the paper.

    Returns:
        The image (H, W, C) uint8.
    """
    size = image.shape[:2]
    strengths = tabulate(randaugment_space(*size), *size)
    for operation_key in jax.random.split(key, operations):
        pick, sign = jax.random.split(operation_key)
        operation = jax.random.randint(pick, (), 0, len(OPERATIONS))
        image = apply(image, operation, level, jax.random.randint(sign, (), 0, 2), strengths)
    return image


def trivialaugment(key: Array, image: Array) -> Array:
    """Apply one random operation at a random level (TrivialAugment Wide, Müller & Hutter 2021).

    Args:
        key: random key of this image.
        image: (H, W, C) uint8, C 1 or 3.

    Returns:
        The image (H, W, C) uint8.
    """
    strengths = tabulate(TRIVIALAUGMENT_SPACE, *image.shape[:2])
    pick, strength, sign = jax.random.split(key, 3)
    operation = jax.random.randint(pick, (), 0, len(OPERATIONS))
    level = jax.random.randint(strength, (), 0, LEVELS)
    return apply(image, operation, level, jax.random.randint(sign, (), 0, 2), strengths)


def apply(
    image: Array, operation: int | Array, level: int | Array, negative: int | Array, strengths: Strengths
) -> Array:
    """Apply one operation.

    Args:
        image: (H, W, C) uint8, C 1 or 3.
        operation: index into `OPERATIONS`.
        level: strength from 0 to 30; ignored by Identity, AutoContrast and Equalize.
        negative: 1 for the negative sign of an operation that has one (ShearX to Sharpness), otherwise 0.
        strengths: tables for images of this size.

    Returns:
        The image (H, W, C) uint8.
    """
    maps, products, masks, thresholds = map(jnp.asarray, strengths)
    image = warp(image, maps[operation, level, negative])
    image = _blend(_degenerate(image, operation), image, products[level, negative])
    curve = _curve(image, operation, masks[level], thresholds[level])
    return curve[image, jnp.arange(image.shape[-1])]


def tabulate(space: Space, height: int, width: int) -> Strengths:
    """Return the tables for images of this size, with levels spaced evenly from 0 to the strengths in `space`."""

    def signed(highest: float) -> np.ndarray:
        magnitudes = np.linspace(0, highest, LEVELS, dtype=np.float32).astype(np.float64)
        return np.stack([magnitudes, -magnitudes], axis=1)

    maps = np.tile(affine_map(1, 0, 0, 0, 1, 0), (len(OPERATIONS), LEVELS, 2, 1))
    for operation, found in {
        "ShearX": affine_map(1, signed(space.shear), 0, 0, 1, 0),
        "ShearY": affine_map(1, 0, 0, signed(space.shear), 1, 0),
        "TranslateX": affine_map(1, 0, -np.trunc(signed(space.translate_x)), 0, 1, 0),
        "TranslateY": affine_map(1, 0, 0, 0, 1, -np.trunc(signed(space.translate_y))),
        "Rotate": rotation_map(signed(space.rotate), height, width),
    }.items():
        maps[OPERATIONS.index(operation)] = found
    factors = (1 + signed(space.enhance)).astype(np.float32)
    removed = np.round(np.linspace(0, space.posterize, LEVELS)).astype(int)
    return Strengths(
        maps=maps,
        products=factors[..., None] * np.arange(1 - _GRAYS, _GRAYS, dtype=np.float32),
        masks=(255 >> removed << removed).astype(np.uint8),
        thresholds=np.linspace(255, 0, LEVELS, dtype=np.float32),
    )


# --- pixels move -----------------------------------------------------------------------------


def affine_map(*matrix: np.ndarray | float) -> np.ndarray:
    """Return the map from pixels of the result to positions in the image, rounded as in PIL's Geometry.c.

    The rounding is that of its function affine_fixed.

    Args:
        *matrix: a, b, c, d, e, f of x' = ax + by + c, y' = dx + ey + f, with shapes that broadcast.

    Returns:
        The six numbers (..., 6) int32 in 1/65536 pixel; c and f refer to the center of the first pixel.
    """
    a, b, c, d, e, f = np.broadcast_arrays(*matrix)
    middle = np.stack([a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e], axis=-1)
    return np.floor(middle * 65536 + 0.5).astype(np.int32)


def rotation_map(degrees: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the `affine_map` of a counterclockwise rotation about the center, like PIL's Image.rotate."""
    angle = -np.radians(degrees)
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2, height / 2
    return affine_map(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def warp(image: Array, affine: Array) -> Array:
    """Return, for each pixel, the nearest pixel of `image` (H, W, C) to which `affine` maps it; 0 outside.

    `affine` is an `affine_map` (6,).
    """
    a, b, c, d, e, f = affine
    y, x = jnp.indices(image.shape[:2])
    from_y, from_x = (d * x + e * y + f) >> 16, (a * x + b * y + c) >> 16
    return image.at[from_y, from_x].get(mode="fill", fill_value=0, wrap_negative_indices=False)


# --- the image is blended with a degenerate one ----------------------------------------------


def _degenerate(image: Array, operation: int | Array) -> Array:
    """Return the image that factor 0 stands for (PIL's ImageEnhance), int32; the image itself for other
    operations."""
    image = image.astype(jnp.int32)
    gray = image
    if image.shape[-1] == 3:
        gray = (image * jnp.asarray(_LUMA)).sum(-1, keepdims=True) + 32768 >> 16
    chosen = {
        "Brightness": jnp.zeros_like(image),
        "Color": jnp.broadcast_to(gray, image.shape),
        "Contrast": jnp.full_like(image, (2 * gray.sum() + gray.size) // (2 * gray.size)),
        "Sharpness": _smooth(image),
    }
    return _select(operation, chosen, image)


def _smooth(image: Array) -> Array:
    """Apply PIL's ImageFilter.SMOOTH, which leaves the border unchanged."""
    height, width, _ = image.shape
    windows = [image[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
    weighted = sum(windows) + 4 * windows[4]
    return image.at[1:-1, 1:-1].set((2 * weighted + 13) // 26)


def _blend(degenerate: Array, image: Array, products: Array) -> Array:
    """Return degenerate + factor * (image - degenerate), clipped to gray levels.

    The product comes from a table, because a compiler may fuse multiplication and addition and so round once
    instead of twice.
    """
    return jnp.clip(degenerate + products[image - degenerate + 255], 0, 255).astype(jnp.uint8)


# --- every gray level is replaced ------------------------------------------------------------


def _curve(image: Array, operation: int | Array, mask: Array, threshold: Array) -> Array:
    """Return the gray level that replaces each gray level (PIL's ImageOps), (256, C) uint8."""
    grays = jnp.arange(_GRAYS)[:, None]
    chosen = {
        "Posterize": grays & mask,
        "Solarize": jnp.where(grays < threshold, grays, 255 - grays),
        "AutoContrast": _autocontrast(image, grays),
        "Equalize": _equalize(image, grays),
    }
    shape = (_GRAYS, image.shape[-1])
    chosen = {name: jnp.broadcast_to(curve, shape) for name, curve in chosen.items()}
    return _select(operation, chosen, jnp.broadcast_to(grays, shape)).astype(jnp.uint8)


def _autocontrast(image: Array, grays: Array) -> Array:
    """Stretch each channel's range of gray levels to 0 to 255."""
    low, high = (bound.astype(jnp.int32) for bound in (image.min((0, 1)), image.max((0, 1))))
    extent = jnp.maximum(high - low, 1)
    whole, rest = jnp.divmod((grays - low) * 255, extent)
    # PIL subtracts two products in double precision; the difference may fall just short of an integer.
    residues = jnp.asarray(_stretched_residues())
    error = lax.bitcast_convert_type(residues[extent, grays] - residues[extent, low], jnp.int32)
    spacing = 1 << 31 - lax.clz(jnp.maximum(whole - 1, 1))
    short = (rest == 0) & (2 * error < -spacing)
    return jnp.where(high > low, jnp.clip(whole - short, 0, 255), grays)


def _stretched_residues() -> np.ndarray:
    """Return the doubles gray * (255 / extent) in units of 2**-52, modulo 2**32, as a table (256, 256) uint32 of
    (extent, gray).

    If the difference of two such doubles is almost an integer, the difference of their entries tells how far it is
    from the integer. 2**-52 is the spacing of doubles at 1.
    """
    grays = np.arange(256.0)
    products = grays * (255 / np.maximum(grays, 1))[:, None]
    return np.fmod(products * 2.0**52, 2.0**32).astype(np.uint32)


def _equalize(image: Array, grays: Array) -> Array:
    """Spread each channel's gray levels so that all are about equally frequent."""
    pixels = image.reshape(-1, image.shape[-1])
    histogram = (
        jnp.zeros((_GRAYS, pixels.shape[1]), jnp.int32).at[pixels, jnp.arange(pixels.shape[1])].add(1)
    )
    below = jnp.cumsum(histogram, axis=0) - histogram
    step = below[pixels.max(0), jnp.arange(pixels.shape[1])] // 255
    spread = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.clip(spread, 0, 255), grays)


def _select(operation: int | Array, chosen: dict[str, Array], otherwise: Array) -> Array:
    """Return the entry of the operation's name, or `otherwise` if there is none."""
    return jnp.select(
        [operation == OPERATIONS.index(name) for name in chosen], [*chosen.values()], otherwise
    )
