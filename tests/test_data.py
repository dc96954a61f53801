"""Which examples a run reads, in which order, and how they reach the devices; messages when something is wrong."""

import io
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, command, one_device, plain_environment, tiny_config
from PIL import Image

from ekd_jax.common import parallel
from ekd_jax.common.cache import Cache
from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.data import decode as images
from ekd_jax.data import order, resident, stream
from ekd_jax.data.dataset import Example, Subset
from ekd_jax.data.decode import CorruptImageError, Reader
from ekd_jax.data.feed import evaluation_set, placements, training_feed
from ekd_jax.data.opening import DIGITS, facts, known_facts, open_data, read_example
from ekd_jax.runs.metrics import MEASURED, read_metrics
from ekd_jax.training import single

# --- order -----------------------------------------------------------------------------------


def test_every_example_is_seen_once_per_epoch_in_a_new_order():
    one, two = (order.epoch_order(0, epoch, 101) for epoch in (3, 4))
    assert sorted(one) == sorted(two) == list(range(101))
    assert list(one) != list(two) != list(order.epoch_order(1, 4, 101))


def test_the_order_never_changes():
    """A run can be resumed after an upgrade: the numbers themselves are fixed."""
    assert order.epoch_order(7, 2, 10).tolist() == [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]
    assert order.holdout_order(10).tolist() == [7, 9, 8, 5, 0, 2, 4, 3, 6, 1]


def test_draws_differ_by_seed_and_place():
    draws = np.array(
        [order.crop_draws(seed, place) for seed in range(3) for place in (*range(100), 10**12)]
    )
    assert len(np.unique(draws)) == draws.size
    assert 0 <= draws.min() < 0.001 < 0.999 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert order.crop_draws(3, 1000)[:2] == pytest.approx([0.017808506364409338, 0.44281142770993964])


# --- feeds -----------------------------------------------------------------------------------


def batches(config, steps, mesh=None, start=0):
    """Return images, labels and numbers of the training batches, as NumPy arrays."""
    mesh = mesh or one_device()
    feed = training_feed(config, open_data(config), mesh, start + steps)
    pick = jax.jit(feed.select_batch)
    zero = parallel.replicate(mesh, np.int32(0))
    try:
        return [jax.device_get(pick(feed.load(step), zero)) for step in range(start, start + steps)]
    finally:
        feed.close()


def assert_same_batches(found, expected):
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def reference():
    """Ten batches of 48 from 200 digits, which straddle epochs, from a set on one device."""
    config = tiny_config(train__batch_size=48, data__placement="replicated")
    data = open_data(config)
    found = batches(config, 10)
    for batch in found:
        for image, label, number in zip(*batch, strict=True):
            example = data.train[number]
            np.testing.assert_array_equal(image, example.image)
            assert label == example.label
    return found


def test_three_epochs_hold_each_example_three_times():
    numbers = np.concatenate([n for *_, n in batches(tiny_config(train__batch_size=40), 15)])
    for epoch in np.split(numbers, 3):
        assert sorted(epoch) == list(range(200))


@pytest.mark.parametrize("placement", ["replicated", "sharded", "stream"])
@pytest.mark.parametrize("devices", [1, 8])
def test_placement_and_devices_do_not_change_batches(reference, placement, devices):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    config = tiny_config(train__batch_size=48, data__placement=placement)
    assert_same_batches(batches(config, 10, mesh), reference)


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 4), (2, 2)])
def test_workers_do_not_change_batches(reference, workers, threads):
    config = tiny_config(
        train__batch_size=48, data__placement="stream", data__workers=workers, data__threads=threads
    )
    assert_same_batches(batches(config, 10), reference)


@pytest.mark.parametrize("placement", ["replicated", "stream"])
def test_a_batch_does_not_need_those_before_it(reference, placement):
    config = tiny_config(train__batch_size=48, data__placement=placement)
    assert_same_batches(batches(config, 3, start=7), reference[7:])


PROCESS = """
import os, sys, jax, numpy as np
process, processes, port, placement, output = *map(int, sys.argv[1:4]), *sys.argv[4:]
sys.path.insert(0, "tests")
from conftest import tiny_config
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from ekd_jax.common import parallel
from ekd_jax.data.feed import training_feed, evaluation_set
from ekd_jax.data.opening import open_data
config = tiny_config(train__batch_size=48, data__placement=placement, evaluate__batch_size=100)
mesh, data = parallel.make_mesh(), open_data(config)
opened = type(data.train).__getitem__
read = set()
def remembering(self, index):
    read.add(index)
    return opened(self, index)
type(data.train).__getitem__ = remembering
feed = training_feed(config, data, mesh, 3)
split = parallel.split(mesh)
pick = jax.jit(lambda held: feed.select_batch(held, 0), out_shardings=(split,) * 3)
def own(array):
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start)
    return np.concatenate([s.data for s in shards])
found = [[own(x) for x in pick(feed.load(step))] for step in range(3)]
tests = evaluation_set(config, data, mesh, "test")
total = jax.jit(lambda labels, n: (labels * (jax.numpy.arange(len(labels)) < n)).sum())
labels = sum(int(total(labels, n)) for _, labels, n in tests.chunks())
arrays = {f"{i}{j}": x for i, b in enumerate(found) for j, x in enumerate(b)}
np.savez(output, labels=labels, read=len(read), **arrays)
feed.close()
"""


@pytest.mark.parametrize(
    ("processes", "placement"),
    [
        (2, "stream"),
        *(pytest.param(2, name, marks=pytest.mark.slow) for name in ("replicated", "sharded")),
        pytest.param(4, "stream", marks=pytest.mark.slow),
    ],
)
def test_processes_share_the_same_batches(reference, processes, placement, tmp_path):
    """Each process reads only its own part; together these are the batches of one process."""
    port = 20_000 + os.getpid() % 10_000 + processes * 7 + len(placement)
    environment = plain_environment()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROCESS,
                *map(str, (k, processes, port, placement, tmp_path / f"{k}.npz")),
            ],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(processes)
    ]
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    parts = [np.load(tmp_path / f"{k}.npz") for k in range(processes)]
    joined = [[np.concatenate([p[f"{i}{j}"] for p in parts]) for j in range(3)] for i in range(3)]
    assert_same_batches(joined, reference[:3])
    expected = sum(open_data(tiny_config()).test[i].label for i in range(898))
    assert [int(p["labels"]) for p in parts] == [expected] * processes
    if placement == "stream":
        assert all(p["read"] < 200 * 0.75 for p in parts), "a process reads its part alone"
    if placement == "sharded":
        assert all(p["read"] <= 898 // 2 + 4 for p in parts)


@pytest.mark.parametrize("batch_size", [7, 898, 5000])
@pytest.mark.parametrize("placement", ["replicated", "sharded", "stream"])
@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_sees_each_example_once(batch_size, placement, devices):
    config = tiny_config(data__placement=placement, evaluate__batch_size=batch_size)
    data = open_data(config)
    examples = evaluation_set(config, data, parallel.make_mesh(jax.devices()[:devices]), "test")
    seen = [np.asarray(images)[:number] for images, _, number in examples.chunks()]
    labels = [np.asarray(labels)[:number] for _, labels, number in examples.chunks()]
    assert np.concatenate(labels).tolist() == [data.test[i].label for i in range(898)]
    np.testing.assert_array_equal(np.concatenate(seen), [data.test[i].image for i in range(898)])


def test_streamed_and_resident_runs_are_the_same(finished, tmp_path):
    """Training, evaluation and summary, not only batches."""
    path, _ = finished
    single.run(tiny_config(data__placement="stream"), tmp_path / "run", one_device())
    for found, expected in zip(read_metrics(tmp_path / "run"), read_metrics(path), strict=True):
        for name in found.keys() - set(MEASURED):
            assert found[name] == expected[name] or found[name] == pytest.approx(
                expected[name], rel=1e-5
            ), name


def test_waiting_for_images_is_measured_apart_from_training(tmp_path, monkeypatch):
    """A batch takes .4 s at a twentieth of a second per image; a step of this network takes about .05 s."""
    read = stream.read_example
    changes = {"data__placement": "stream", "data__threads": 1}
    changes |= {"train__batch_size": 8, "train__epochs": 0.56, "train__log_every_steps": 7}
    waited = {}
    for name, seconds in (("quick", 0.0), ("slow", 0.05)):
        # training images are read with draws, test images without
        pause = lambda *a, seconds=seconds: time.sleep(0 if a[-1] is None else seconds) or read(*a)
        monkeypatch.setattr(stream, "read_example", pause)
        single.run(tiny_config(**changes), tmp_path / name, one_device())
        waited[name] = [r["input_wait"] for r in read_metrics(tmp_path / name) if r["split"] == "train"]
    assert waited["slow"][-1] > 60, "the first batches were read while the program was compiled"
    assert waited["quick"][-1] < 20


@pytest.mark.parametrize(
    ("share", "fit", "expected"),
    [
        (0.5, "stretch", ("replicated", "replicated")),
        (3e-6, "stretch", ("replicated", "sharded")),
        (5e-7, "stretch", ("sharded", "stream")),
        (1e-9, "stretch", ("stream", "stream")),
        (0.5, "crop", ("stream", "replicated")),
    ],
)
def test_images_live_where_they_fit(monkeypatch, share, fit, expected):
    """200 and 898 images of 64 bytes, 13 and 57 kB, on four devices of 16 GB."""
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: 16 * 10**9)
    config = tiny_config(data__device_share=share, data__fit=fit, data__image_size=8, data__name="digits")
    chosen = placements(config, known_facts(config), parallel.make_mesh(jax.devices()[:4]))
    assert chosen == expected


def test_images_cropped_in_every_epoch_cannot_stay_on_the_device():
    config = tiny_config(data__placement="replicated", data__fit="crop", data__image_size=8)
    with pytest.raises(UserError, match="placement=stream"):
        training_feed(config, open_data(config), one_device(), 1)


# --- what a run reads ------------------------------------------------------------------------


def test_digits_are_what_the_package_says():
    data = open_data(tiny_config(data__train_examples=0))
    assert (len(data.train), len(data.test)) == (DIGITS.train_examples, DIGITS.test_examples) == (899, 898)
    pixels = np.stack([data.train[i].image for i in range(899)])
    assert pixels.shape[1:] == DIGITS.image_shape == data.facts.input_shape
    assert (pixels.dtype, pixels.min(), pixels.max()) == (np.uint8, 0, 255)
    labels = [examples[i].label for examples in (data.train, data.test) for i in range(len(examples))]
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(open_data(tiny_config(data__train_examples=30)).train) == 30


def test_images_are_held_out_for_validation():
    """They are the same for every seed, and all others are training images."""
    data = [
        open_data(tiny_config(seed=seed, data__validation_examples=199, data__train_examples=0))
        for seed in (0, 1)
    ]
    everything = open_data(tiny_config(data__train_examples=0)).train

    def pixels(examples):
        return sorted(examples[i].image.tobytes() for i in range(len(examples)))

    assert (len(data[0].train), len(data[0].validation)) == (700, 199)
    assert pixels(data[0].validation) == pixels(data[1].validation)
    assert sorted(pixels(data[0].train) + pixels(data[0].validation)) == pixels(everything)
    assert open_data(tiny_config()).validation is None


def test_a_run_with_validation_chooses_by_it_and_tests_once(tmp_path):
    config = tiny_config(data__validation_examples=99, train__epochs=2)
    summary = single.run(config, tmp_path / "run", one_device())
    records = read_metrics(tmp_path / "run")
    assert [r["split"] for r in records if r["split"] != "train"] == ["validation", "validation", "test"]
    validation = [r for r in records if r["split"] == "validation"]
    (test,) = (r for r in records if r["split"] == "test")
    assert summary.best_on == "validation"
    assert summary.ensemble.top1_best == max(r["ensemble/top1"] for r in validation)
    assert summary.ensemble.top1_last == test["ensemble/top1"]
    for split, expected in (("validation", validation[-1]), ("test", test)):
        done = command("evaluate", f"--workdir={tmp_path / 'run'}", f"--split={split}", "--json")
        assert done.returncode == 0, done.stderr
        found = eval(done.stdout)
        assert found["student_1/nll"] == pytest.approx(expected["student_1/nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train_examples": 5000}, "digits has 899 training examples"),
        (
            {"data__train_examples": 800, "data__validation_examples": 100},
            "digits has 799 .* besides those",
        ),
        ({"data__validation_examples": 899}, "leaves nothing to train on"),
        ({"data__mean": (0.1, 0.2, 0.3)}, "one value or 1"),
        ({"data__image_size": 16}, "fit=stretch or crop"),
        ({"data__extra": True}, "digits has no extra images"),
        ({"data__name": "cifar01"}, "did you mean 'cifar10'"),
        ({"data__name": "folder", "data__data_dir": "/nowhere"}, "is not a directory"),
    ],
)
def test_impossible_data(changes, message):
    with pytest.raises(UserError, match=message) as error:
        facts(tiny_config(**changes))
    assert "\n" not in str(error.value)


# --- a folder of images ----------------------------------------------------------------------


def picture(seed, height=40, width=60):
    """Return an image with structure at several scales, (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind="jpeg", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes of ten images of different sizes."""
    for name in ("cat", "dog", "owl"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = picture(hash_of(name) + i, 40 + i, 60 - 2 * i)
            (tmp_path / "images" / name / f"{i}.jpg").write_bytes(encoded(pixels, quality=95))
    return tmp_path / "images"


def hash_of(name):
    return sum(map(ord, name))


def folder_config(folder, **changes):
    own = {
        "data__name": "folder",
        "data__data_dir": str(folder),
        "data__fit": "stretch",
        "data__image_size": 16,
        "data__train_examples": 0,
        "train__batch_size": 8,
    }
    return tiny_config(**(own | changes))


def test_a_folder_of_class_folders(folder):
    config = folder_config(folder)
    known, data = facts(config), open_data(config)
    assert known == data.facts
    assert (known.class_names, known.train_examples, known.test_examples) == (("cat", "dog", "owl"), 24, 6)
    names = [e[i].name for e in (data.train, data.test) for i in range(len(e))]
    assert len(set(names)) == 30
    labels = [data.train[i].label for i in range(24)]
    assert labels != sorted(labels), "the order has nothing to do with classes"
    for i in range(24):
        assert pathlib.Path(data.train[i].name).parent.name == known.class_names[labels[i]]
    pickle.loads(pickle.dumps(data.train))


def test_a_folder_with_train_and_test(folder):
    inner = folder / "train"
    inner.mkdir()
    for name in ("cat", "dog", "owl"):
        (folder / name).rename(inner / name)
    (folder / "val" / "dog").mkdir(parents=True)
    (inner / "dog" / "0.jpg").rename(folder / "val" / "dog" / "x.JPEG")
    data = open_data(folder_config(folder))
    assert (len(data.train), len(data.test), data.test[0].label) == (29, 1, 1)
    (folder / "val" / "newt").mkdir()
    with pytest.raises(UserError, match="the class .*newt is not in"):
        open_data(folder_config(folder))


def test_directories_that_cannot_be_used(folder):
    for message, spoil in (
        ("class directory .*ant holds no image", lambda: (folder / "ant").mkdir()),
        ("differ in size", None),
        ("holds no class directories", None),
    ):
        config = folder_config(folder)
        if message == "differ in size":
            config = folder_config(folder, data__image_size=0, data__fit="native")
        if message == "holds no class directories":
            config = folder_config(folder / "cat")
        if spoil:
            spoil()
        with pytest.raises(UserError, match=message) as error:
            open_data(config)
        if spoil:
            (folder / "ant").rmdir()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_on_a_folder(folder, tmp_path):
    """It is streamed and cropped by worker processes, and its student predicts."""
    flags = [f"--config={ROOT}/configs/digits.py"]
    flags += [
        f"--config.{k.replace('__', '.')}={v}"
        for k, v in {
            "data__name": "folder", "data__data_dir": folder, "data__fit": "crop", "data__image_size": 16,
            "data__mean": 0.5, "data__std": 0.25, "data__workers": 1, "model__students": "(0.25,0.125)",
            "train__batch_size": 8, "train__epochs": 2, "evaluate__batch_size": 4,
        }.items()
    ]  # fmt: skip
    run = tmp_path / "run"
    done = command("main", *flags, f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    done = command("extract", f"--workdir={run}", "--student=2", f"--output={tmp_path / 's'}")
    assert done.returncode == 0, done.stderr
    done = command("evaluate", f"--student_dir={tmp_path / 's'}", f"--data_dir={folder}", "--json")
    assert done.returncode == 0, done.stderr
    (test,) = (r for r in read_metrics(run)[-1:] if r["split"] == "test")
    assert eval(done.stdout)["student_2/nll"] == pytest.approx(test["student_2/nll"], rel=1e-5)
    done = command("predict", f"--student_dir={tmp_path / 's'}", f"--image={folder}/owl/3.jpg")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"cat", "dog", "owl"}


# --- images ----------------------------------------------------------------------------------


def test_color_models_are_converted_to_rgb_and_gray():
    pixels = picture(1)
    gray = np.asarray(Image.fromarray(pixels).convert("L"))
    files = {
        "png": encoded(pixels, "png"),
        "jpeg": encoded(pixels, quality=100, subsampling=0),
        "progressive": encoded(pixels, quality=100, subsampling=0, progressive=True),
        "cmyk": _saved(Image.fromarray(pixels).convert("CMYK"), "jpeg", quality=100),
        "palette": _saved(Image.fromarray(pixels).quantize(256), "png"),
        "alpha": _saved(Image.fromarray(pixels).convert("RGBA"), "png"),
    }
    for name, file in files.items():
        found = images.decode(file, 3)
        limit = {"png": 0, "alpha": 0, "palette": 12}.get(name, 4)
        assert found.shape == pixels.shape, name
        assert np.abs(found.astype(int) - pixels).mean() <= limit, name
    for file in (
        encoded(gray),
        encoded(gray, "png"),
        _saved(Image.fromarray(gray.astype(np.uint16) * 257), "png"),
    ):
        assert images.decode(file, 3).shape == pixels.shape
        found = images.decode(file, 1)
        assert found.shape == (40, 60, 1)
        assert np.abs(found[..., 0].astype(int) - gray).mean() < 2


def _saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pillow_only", [False, True])
def test_images_are_upright(orientation, pillow_only, monkeypatch):
    """Pixels, and the size before they are decoded, are those of Pillow's exif_transpose."""
    from PIL import ImageOps

    if pillow_only:
        monkeypatch.setattr(images, "simplejpeg", None)
        monkeypatch.setattr(images, "cv2", None)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture(2), quality=95, exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    found = images.decode(file, 3)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 2
    assert images._size(file) == expected.shape[:2]


def test_the_center_crop_is_torchvisions():
    """Resize(256), CenterCrop(224), written with Pillow as torchvision does."""
    for height, width in ((300, 500), (500, 300), (224, 224), (100, 90)):
        pixels = picture(3, height, width)
        short = 256
        size = (
            (short, int(short * height / width))
            if width <= height
            else (int(short * width / height), short)
        )
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
        expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
        found = Reader((224, 224, 3), "crop")(Example(pixels, 0, ""))
        np.testing.assert_array_equal(found, expected)


def test_random_crops_have_the_area_and_proportions_of_the_recipe():
    parts = np.array([images.random_box(375, 500, order.crop_draws(0, i)) for i in range(4000)])
    top, left, height, width = parts.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    area, ratio = height * width / (375 * 500), width / height
    assert 0.078 < area.min() < 0.09
    assert area.max() > 0.97
    assert 0.73 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.37
    # Areas and proportions are drawn again until the part fits into the image.
    generator = np.random.default_rng(0)
    areas, ratios = (
        generator.uniform(0.08, 1, 10**5),
        np.exp(generator.uniform(*np.log([3 / 4, 4 / 3]), 10**5)),
    )
    fits = (areas * 375 * 500 * ratios <= 500**2) & (areas * 375 * 500 / ratios <= 375**2)
    assert abs(area.mean() - areas[fits].mean()) < 0.01
    assert images.random_box(10, 1000, order.crop_draws(0, 0))[2:] == (10, 13), "the middle of a long image"


@pytest.mark.parametrize("pillow_only", [False, True])
def test_a_random_crop_is_resized(pillow_only, monkeypatch):
    """It differs from Pillow's crop of the whole image by interpolation only."""
    if pillow_only:
        monkeypatch.setattr(images, "simplejpeg", None)
        monkeypatch.setattr(images, "cv2", None)
    pixels = picture(4, 700, 900)
    file = encoded(pixels, quality=95)
    factors = set()
    for place in range(12):
        top, left, h, w = images.random_box(700, 900, order.crop_draws(0, place))
        factors.add(min(h, w) // 128)
        cut = Image.fromarray(pixels).crop((left, top, left + w, top + h))
        expected = np.asarray(cut.resize((128, 128), Image.Resampling.BILINEAR))
        for image in (file, pixels):
            found = Reader((128, 128, 3), "crop")(Example(image, 0, ""), order.crop_draws(0, place))
            assert np.abs(found.astype(int) - expected).mean() < 2.5
    assert max(factors) >= 4, "some were decoded at a fraction of their size"


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_rows": 1}]
)
def test_a_jpeg_with_fewer_rows_decodes_to_the_same_pixels(options):
    file = encoded(picture(6, 375, 500), quality=90, **options)
    whole = images.decode(file, 3, fast=True)
    for rows in (1, 8, 100, 201, 375):
        short = images._keep_rows(file, rows)
        assert (short == file) == (rows == 375 or "progressive" in options)
        np.testing.assert_array_equal(images.decode(short, 3, fast=True)[:rows], whole[:rows])
    assert images._keep_rows(file[:-100], 8) == file[:-100], "it may be truncated"


@pytest.mark.parametrize(
    "file",
    [b"", b"no image", encoded(picture(5))[:700], encoded(picture(5), "png")[:500]],
    ids=["empty", "text", "short jpeg", "short png"],
)
@pytest.mark.parametrize("fit", ["native", "stretch", "crop"])
def test_corrupt_images_are_named(file, fit):
    for draws in (None, order.crop_draws(0, 0)):
        with pytest.raises(CorruptImageError, match=r"owl/3.jpg cannot be read .*corrupt=skip") as error:
            Reader((40, 60, 3), fit)(Example(file, 0, "owl/3.jpg"), draws)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("placement", ["replicated", "stream"])
def test_a_corrupt_image_ends_the_run_or_is_left_out(folder, placement, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger.name)
    config = folder_config(folder, data__placement=placement)
    victims = [pathlib.Path(open_data(config).train[i].name) for i in (3, 11)]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:500])
    with pytest.raises(UserError, match=f"({victims[0]}|{victims[1]}) cannot be read"):
        batches(config, 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = folder_config(folder, data__placement=placement, data__corrupt="skip")
    for _ in range(2):  # found, and remembered
        numbers = np.concatenate([n for *_, n in batches(config, 11)])  # 88 = 4 x 22
        assert np.bincount(numbers).tolist() == [4] * 22
        assert "left out 2 of 24 images" in caplog.text
        assert all(f"left out: the image {victim} cannot be read" in caplog.text for victim in victims)
        caplog.clear()


def test_a_corrupt_image_in_a_worker_is_one_line(folder):
    victim = pathlib.Path(open_data(folder_config(folder)).train[3].name)
    victim.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read") as error:
        batches(folder_config(folder, data__placement="stream", data__workers=2), 6)
    assert str(victim) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("placement", ["replicated", "stream"])
def test_labels_out_of_range_are_named(placement, monkeypatch):
    config = tiny_config(data__placement=placement)
    read = type(open_data(config).train).__getitem__

    def wrong(self, index):
        example = read(self, index)
        return Example(example.image, 10, example.name) if index == 5 else example

    monkeypatch.setattr(Subset, "__getitem__", wrong)
    with pytest.raises(UserError, match=r"label of digits train\[5\] is 10, but digits has 10 classes"):
        batches(config, 7)


@pytest.mark.parametrize(
    ("cores", "asked", "expected"),
    [(1, {}, (0, 1)), (2, {}, (0, 2)), (8, {}, (0, 8)), (9, {}, (2, 5)), (96, {}, (12, 8)),
     (8, {"data__workers": 4}, (4, 2)), (8, {"data__workers": 0, "data__threads": 3}, (0, 3))],
)  # fmt: skip
def test_number_of_workers_and_threads(cores, asked, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert stream.workers_and_threads(tiny_config(**asked)) == expected


# --- the commands ----------------------------------------------------------------------------


def test_preview_draws_what_the_model_sees(tmp_path):
    config = f"--config={ROOT}/configs/digits.py"
    done = command("preview", config, f"--output={tmp_path}/grid.png", "--examples=3", "--epochs=2")
    assert done.returncode == 0, done.stderr
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    data = open_data(tiny_config(data__train_examples=0))
    for row, number in enumerate(order.epoch_order(0, 0, 899)[:3]):
        stored = data.train[number].image[..., 0].repeat(16, 0).repeat(16, 1)
        top = 21 + row * (128 + 21)
        np.testing.assert_array_equal(grid[top : top + 128, 6:134], stored)
        # moved by at most one place, so most of the ink is still there
        seen = grid[top : top + 128, 140:268]
        assert seen.sum() > 0.7 * stored.sum()
    done = command("preview", config, f"--output={tmp_path}/grid.jpg")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_prepare_says_what_is_ready():
    done = command("prepare", f"--config={ROOT}/configs/digits.py", "--config.data.validation_examples=100")
    assert done.returncode == 0, done.stderr
    assert "799 images to train on, 100 for validation, 898 to test on, 10 classes" in done.stdout


def test_pixels_that_took_long_to_read_are_kept(tmp_path, monkeypatch):
    """The second run reads no image; a damaged cache entry is computed again, and other examples have their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(resident, "CACHE_SECONDS", 0.0)
    data = open_data(tiny_config())
    numbers = range(20, 60)
    first = resident.read_pixels(data.train, data, numbers)
    (kept,) = (tmp_path / "cache/ekd_jax").glob("pixels-*.npz")
    read = []
    monkeypatch.setattr(resident, "read_example", lambda *args: read.append(args) or read_example(*args))

    def again(numbers):
        read.clear()
        return resident.read_pixels(data.train, data, numbers)

    for a, b in zip(again(numbers), first, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not read
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    for a, b in zip(again(numbers), first, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(read) == 40
    again(range(5))
    assert len(read) == 5
    monkeypatch.setattr(resident, "PIXELS", Cache("pixels", 2 * kept.stat().st_size - 1))
    again(range(100, 130))
    left = list((tmp_path / "cache/ekd_jax").glob("pixels-*.npz"))
    assert sum(path.stat().st_size for path in left) < 2 * len(content), "the oldest gave way"
