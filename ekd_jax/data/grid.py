"""A grid of images as the network sees them, for `ekd preview`."""

import functools
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ekd_jax.data import order
from ekd_jax.data.augment import training_batch
from ekd_jax.data.decode import Reader
from ekd_jax.data.opening import Data, read_example

SIDE = 128  # pixels that a small image is enlarged to, at least
MARGIN, LINE, FONT_SIZE = 6, 15, 12


def draw_preview(config: Any, data: Data, examples: int, epochs: int) -> Image.Image:
    """The grid.

    Args:
        config: resolved.
        data: opened.
        examples: rows; the first of the training set's first epoch.
        epochs: columns beside the image as stored.
    """
    numbers = order.epoch_order(config.seed, 0, len(data.train))[:examples]
    as_stored = Reader(data.facts.input_shape, "native" if config.data.fit == "native" else "stretch")
    names = data.facts.class_names
    cells = [[] for _ in numbers]  # type: list[list[tuple[np.ndarray, str]]]
    for row, number in enumerate(numbers):
        image, label = read_example(data.train, as_stored, data.facts, int(number))
        cells[row].append((image, names[label]))
    prepare = jax.jit(
        functools.partial(training_batch, num_classes=data.facts.num_classes, data=config.data)
    )
    for epoch in range(epochs):
        # As in training, but that these examples come first in every epoch.
        read = [
            read_example(
                data.train,
                data.reader,
                data.facts,
                int(number),
                order.crop_draws(config.seed, epoch * len(data.train) + row),
            )
            for row, number in enumerate(numbers)
        ]
        images, labels = (np.asarray(column) for column in zip(*read, strict=True))
        key = jax.random.fold_in(jax.random.key(config.seed), epoch)
        seen, targets = jax.device_get(prepare(key, images, labels, numbers))
        seen = np.clip((seen * config.data.std + config.data.mean) * 255, 0, 255).round().astype(np.uint8)
        for row in range(len(numbers)):
            cells[row].append((seen[row], target_text(targets[row], names)))
    return draw(cells, ["as stored", *(f"epoch {epoch + 1}" for epoch in range(epochs))])


def target_text(target: np.ndarray, names: tuple[str, ...]) -> str:
    """`cat`, or `cat .70 dog .30` for a share of classes, the two greatest."""
    if target.ndim == 0:
        return names[int(target)]
    largest = [int(k) for k in np.argsort(-target)[:2] if target[k] > 1.5 / len(target)]
    return "  ".join(f"{names[k]} {target[k]:.2f}".replace(" 0.", " .") for k in largest)


def draw(cells: list[list[tuple[np.ndarray, str]]], header: list[str]) -> Image.Image:
    """Images in rows with a line of text under each, and the header above."""
    height, width, _ = cells[0][0][0].shape
    scale = max(1, -(-SIDE // max(height, width)))
    across, down = width * scale + MARGIN, height * scale + LINE + MARGIN
    grid = Image.new("RGB", (MARGIN + across * len(header), LINE + MARGIN + down * len(cells)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)

    def write(x: int, y: int, text: str) -> None:
        while len(text) > 1 and pen.textlength(text, font) > across - MARGIN:
            text = text[:-2] + "…"
        pen.text((x, y), text, "black", font)

    for column, text in enumerate(header):
        write(MARGIN + column * across, 2, text)
    for row, line in enumerate(cells):
        for column, (image, text) in enumerate(line):
            x, y = MARGIN + column * across, LINE + MARGIN + row * down
            picture = Image.fromarray(image.repeat(3, -1) if image.shape[-1] == 1 else image)
            grid.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
            write(x, y + height * scale + 1, text)
    return grid
