"""Measure images per CPU-second: JPEGs read, decoded, cropped at random, resized to 224x224 and batched.

    python benchmarks/input_pipeline.py --source=DIRECTORY_OF_IMAGES --json=out.json

Our pipeline is compared with tf.data and with PyTorch's DataLoader with Pillow, if they are installed. Each
measurement runs in its own process on one core; the pipelines take turns, round after round. All read the same
JPEGs, 500x375 like ImageNet's average: mosaics of the images in DIRECTORY (so their detail is real), or noise with
the spectrum of natural images. Random horizontal flips are left out, except in tf.data_flip: ours run on the device,
those of the others on the host.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import app, flags
from PIL import Image

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "directory of images, at any depth; noise if not given")
flags.DEFINE_integer("images", 600, "number of JPEGs to make")
flags.DEFINE_integer("batches", 30, "batches measured per round, after two that do not count")
flags.DEFINE_integer("rounds", 5, "number of times that each pipeline is measured")
flags.DEFINE_list(
    "pipelines",
    ["ekd_jax", "ekd_jax_pillow", "tf.data", "tf.data_flip", "torch"],
    "pipelines to measure, in this order",
)
flags.DEFINE_string("json", None, "file to write the figures to")
flags.DEFINE_string("measure", None, "for a child process: the pipeline")
flags.DEFINE_string("folder", None, "for a child process: the directory of JPEGs")

WIDTH, HEIGHT, SIZE, BATCH, QUALITY = 500, 375, 224, 64, 96


def make_images(folder: pathlib.Path) -> int:
    """Write the JPEGs as folder/<class>/<number>.jpg, and return their mean size in bytes."""
    generator = np.random.default_rng(0)
    tiles = list(_tiles(generator)) if FLAGS.source else []
    sizes = []
    for number in range(FLAGS.images):
        pixels = _mosaic(tiles, generator) if tiles else _noise(generator)
        path = folder / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


def _tiles(generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield up to 400 of the images in --source, in random order."""
    paths = sorted(
        p for p in pathlib.Path(FLAGS.source).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    for number in generator.permutation(len(paths))[:400]:
        with Image.open(paths[number]) as file:
            yield np.asarray(file.convert("RGB"))


def _mosaic(tiles: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return an image that is filled with tiles side by side."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top = 0
    while top < HEIGHT:
        left, depth = 0, HEIGHT
        while left < WIDTH:
            tile = tiles[generator.integers(len(tiles))]
            part = pixels[top : top + tile.shape[0], left : left + tile.shape[1]]
            part[:] = tile[: part.shape[0], : part.shape[1]]
            left, depth = left + tile.shape[1], min(depth, tile.shape[0])
        top += depth
    return pixels


def _noise(generator: np.random.Generator) -> np.ndarray:
    """Return noise whose amplitudes fall as 1 / frequency."""
    frequencies = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequencies[0, 0] = 1
    spectrum = np.fft.rfft2(generator.normal(size=(3, HEIGHT, WIDTH))) / frequencies
    field = np.fft.irfft2(spectrum, (HEIGHT, WIDTH)).transpose(1, 2, 0)
    return np.clip(128 + 50 * field / field.std(), 0, 255).astype(np.uint8)


# --- the pipelines: each yields batches (64, 224, 224, 3) uint8 without end ---------------------


def ekd_jax(folder: str, pillow: bool = False) -> Iterator[np.ndarray]:
    """Yield what training reads, up to the device."""
    import grain

    from ekd_jax.data import decode as decoders
    from ekd_jax.data.decode import Reader
    from ekd_jax.data.folder import open_folder
    from ekd_jax.data.opening import Data
    from ekd_jax.data.stream import ProcessBatches

    if pillow:
        decoders.simplejpeg = decoders.cv2 = None  # type: ignore[assignment]
    source = open_folder(folder)
    facts = dataclasses.replace(source.facts, image_shape=(SIZE, SIZE, 3))
    data = Data(facts, source.train, None, source.test, Reader(facts.input_shape, "crop"))
    batches = ProcessBatches(data, data.train, BATCH, slice(0, BATCH), range(10_000), seed=0)
    read = grain.MapDataset.source(batches)
    for images, _, _ in read.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)):
        yield images


def ekd_jax_pillow(folder: str) -> Iterator[np.ndarray]:
    """Yield what `ekd_jax` does, without simplejpeg and OpenCV."""
    return ekd_jax(folder, pillow=True)


def tf_data(folder: str, flip: bool = False) -> Iterator[np.ndarray]:
    """Yield from TensorFlow's usual pipeline for ImageNet, which decodes only the crop."""
    import tensorflow as tf

    def read(path: "tf.Tensor") -> "tf.Tensor":
        file = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(file),
            tf.zeros((1, 0, 4)),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        pixels = tf.image.decode_and_crop_jpeg(file, window, channels=3)
        if flip:
            pixels = tf.image.random_flip_left_right(pixels)
        return tf.cast(tf.image.resize(pixels, (SIZE, SIZE)), tf.uint8)

    dataset = tf.data.Dataset.list_files(f"{folder}/*/*.jpg").cache().shuffle(10_000).repeat()
    dataset = dataset.map(read, tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    return iter(dataset.as_numpy_iterator())


def tf_data_flip(folder: str) -> Iterator[np.ndarray]:
    """Yield what `tf_data` does, with the flips that training needs."""
    return tf_data(folder, flip=True)


def torch_pillow(folder: str) -> Iterator[np.ndarray]:
    """Yield from PyTorch's DataLoader with torchvision's usual transforms, written out with Pillow."""
    import torch

    from ekd_jax.data.decode import random_box
    from ekd_jax.data.order import DRAWS

    paths = sorted(str(p) for p in pathlib.Path(folder).rglob("*.jpg"))

    class Set(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, i: int) -> torch.Tensor:
            with Image.open(paths[i]) as file:
                image = file.convert("RGB")
            draws = torch.rand(DRAWS).numpy()
            top, left, height, width = random_box(image.height, image.width, draws)
            image = image.crop((left, top, left + width, top + height))
            return torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))

    loader = torch.utils.data.DataLoader(Set(), BATCH, shuffle=True, drop_last=True, num_workers=0)
    while True:
        yield from (batch.numpy() for batch in loader)


PIPELINES: dict[str, Callable[[str], Iterator[np.ndarray]]] = {
    "ekd_jax": ekd_jax,
    "ekd_jax_pillow": ekd_jax_pillow,
    "tf.data": tf_data,
    "tf.data_flip": tf_data_flip,
    "torch": torch_pillow,
}


def measure(name: str, folder: str) -> dict[str, float]:
    """Return the images per CPU-second and per second of a pipeline in this process, on one core."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    batches = PIPELINES[name](folder)
    for _ in range(2):
        assert next(batches).shape == (BATCH, SIZE, SIZE, 3)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(FLAGS.batches):
        next(batches)
    images = FLAGS.batches * BATCH
    return {
        "per_cpu_second": images / (time.process_time() - cpu),
        "per_second": images / (time.perf_counter() - wall),
    }


def main(_: list[str]) -> None:
    """Measure every pipeline that is installed."""
    if FLAGS.measure:
        try:
            found = measure(FLAGS.measure, FLAGS.folder)
        except ImportError as error:
            found = {"missing": str(error)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
        os._exit(0)  # without waiting for threads that read ahead

    from ekd_jax.common.files import write_json
    from ekd_jax.common.text import table
    from ekd_jax.runs.workdir import environment

    figures: dict[str, list[dict[str, float]]] = {name: [] for name in FLAGS.pipelines}
    with tempfile.TemporaryDirectory() as folder:
        size = make_images(pathlib.Path(folder))
        for _round in range(FLAGS.rounds):
            for name in FLAGS.pipelines:
                command = [sys.executable, __file__, f"--measure={name}", f"--folder={folder}"]
                done = subprocess.run(
                    [*command, f"--batches={FLAGS.batches}"], stdout=subprocess.PIPE, check=True, text=True,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
                )  # fmt: skip
                figures[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, rounds in figures.items():
        if "missing" in rounds[0]:
            print(f"{name}: {rounds[0]['missing']}")
            continue
        rates = [r["per_cpu_second"] for r in rounds]
        ours = [r["per_cpu_second"] for r in figures["ekd_jax"]]
        ratios = [a / b for a, b in zip(ours, rates, strict=True)]
        rows.append({
            "pipeline": name,
            "images/CPU-s": round(statistics.median(rates)),
            "least": round(min(rates)),
            "most": round(max(rates)),
            "images/s": round(statistics.median(r["per_second"] for r in rounds)),
            "ours/it": round(statistics.median(ratios), 2),
        })  # fmt: skip
    print(table([list(row.values()) for row in rows], list(rows[0])))
    where = environment()
    jpegs = f"JPEGs {WIDTH}x{HEIGHT}, {size:,} bytes"
    note = f"n = {FLAGS.rounds} rounds of {FLAGS.batches} batches of {BATCH}; {jpegs}"
    print(note)
    if FLAGS.json:
        write_json(pathlib.Path(FLAGS.json), {"environment": where, "note": note, "rows": rows})


if __name__ == "__main__":
    app.run(main)
