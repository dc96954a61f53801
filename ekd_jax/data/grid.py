"""A grid of images as the network sees them, for `ekd preview`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image, ImageDraw, ImageFont

from ekd_jax.data import order
from ekd_jax.data.augment import training_batch
from ekd_jax.data.decode import Fit
from ekd_jax.data.labels import make_sampler
from ekd_jax.data.opening import Data, read_example

LEAST_SIDE = 128  # smaller images are enlarged to this many pixels or more
MARGIN, LINE, FONT_SIZE = 6, 15, 12  # in pixels


class Cell(NamedTuple):
    """An image (H, W, C) uint8, and the text below it."""

    image: np.ndarray
    text: str


def draw_preview(config: FrozenConfigDict, data: Data, examples: int, epochs: int) -> Image.Image:
    """Draw training images as they are stored, and as the network sees them in several epochs.

    Args:
        config: resolved configuration.
        data: the opened data set.
        examples: number of rows, the first examples of the first epoch.
        epochs: number of columns besides the image as stored.
    """
    numbers = make_sampler(config, data).epoch(0)[:examples]
    classes = data.facts.num_classes
    augmented = jax.jit(functools.partial(training_batch, num_classes=classes, data=config.data))
    columns = [
        _as_stored(config, data, numbers),
        *(_as_seen(config, data, numbers, epoch, augmented) for epoch in range(epochs)),
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return draw(rows, ["as stored", *(f"epoch {epoch + 1}" for epoch in range(epochs))])


def _as_stored(config: FrozenConfigDict, data: Data, numbers: np.ndarray) -> list[Cell]:
    fit: Fit = "native" if config.data.fit == "native" else "stretch"
    reader = dataclasses.replace(data.reader, fit=fit)
    read = [read_example(data.train, reader, data.facts, int(number)) for number in numbers]
    return [Cell(image, data.facts.class_names[label]) for image, label in read]


def _as_seen(
    config: FrozenConfigDict, data: Data, numbers: np.ndarray, epoch: int, augmented: Any
) -> list[Cell]:
    """Return the examples as in training, except that they come first in every epoch."""
    section, facts = config.data, data.facts
    positions = epoch * len(data.train) + np.arange(len(numbers))
    read = [
        read_example(
            data.train, data.reader, facts, int(number), order.crop_draws(config.seed, int(position))
        )
        for number, position in zip(numbers, positions, strict=True)
    ]
    images, labels = (np.asarray(column) for column in zip(*read, strict=True))
    key = jax.random.fold_in(jax.random.key(config.seed), epoch)
    seen, targets = jax.device_get(augmented(key, images, labels, numbers))
    colors = np.clip((seen * section.std + section.mean) * 255, 0, 255).round().astype(np.uint8)
    return [
        Cell(image, target_text(target, facts.class_names))
        for image, target in zip(colors, targets, strict=True)
    ]


def target_text(target: np.ndarray, names: tuple[str, ...]) -> str:
    """Return a target as text: `cat`, or for probabilities those of the two likeliest, `cat .70  dog .30`."""
    if target.ndim == 0:
        return names[int(target)]
    largest = [int(k) for k in np.argsort(-target)[:2] if target[k] > 1.5 / len(target)]
    return "  ".join(f"{names[k]} {target[k]:.2f}".replace(" 0.", " .") for k in largest)


def draw(rows: list[list[Cell]], header: list[str]) -> Image.Image:
    """Draw rows of images, each with its line of text below, under a header."""
    height, width, _ = rows[0][0].image.shape
    scale = max(1, -(-LEAST_SIDE // max(height, width)))
    across, down = width * scale + MARGIN, height * scale + LINE + MARGIN
    grid = Image.new("RGB", (MARGIN + across * len(header), LINE + MARGIN + down * len(rows)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)

    def write(x: int, y: int, text: str) -> None:
        while len(text) > 1 and pen.textlength(text, font) > across - MARGIN:
            text = text[:-2] + "…"
        pen.text((x, y), text, "black", font)

    for i, text in enumerate(header):
        write(MARGIN + i * across, 2, text)
    for j, row in enumerate(rows):
        for i, (image, text) in enumerate(row):
            x, y = MARGIN + i * across, LINE + MARGIN + j * down
            picture = Image.fromarray(image.repeat(3, -1) if image.shape[-1] == 1 else image)
            grid.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
            write(x, y + height * scale + 1, text)
    return grid
