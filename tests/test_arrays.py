"""Data from outside: arrays in memory, sets that users register, and what importing them costs."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from conftest import ROOT, one_device, plain_environment, tiny_config

import ekd_jax.data
from ekd_jax.common.errors import UserError
from ekd_jax.data import dataset, registry, stream
from ekd_jax.data.arrays import from_arrays
from ekd_jax.data.feed import evaluation_set, training_feed
from ekd_jax.data.opening import facts, open_data
from ekd_jax.data.tfds import records


def arrays(count=60, test_count=20, size=8, channels=3, classes=3, seed=0):
    """Arguments of `from_arrays`."""
    generator = np.random.default_rng(seed)
    return {
        "images": generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8),
        "labels": np.arange(count) % classes,
        "class_names": [f"class {k}" for k in range(classes)],
        "test_images": generator.integers(0, 256, (test_count, size, size, channels), dtype=np.uint8),
        "test_labels": np.arange(test_count) % classes,
    }


def arrays_config(**changes):
    own = {"data__name": "arrays", "data__train_examples": 0, "train__batch_size": 10}
    return tiny_config(**(own | changes))


@pytest.fixture
def no_registrations(monkeypatch):
    """Whatever a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_loaders", {})
    monkeypatch.setattr(registry, "_loaded", {})


# --- arrays ----------------------------------------------------------------------------------


def test_arrays_are_read_as_they_are():
    given = arrays()
    source = from_arrays(**given)
    known = facts(arrays_config(), source)
    data = open_data(arrays_config(), source)
    assert known == data.facts
    assert (known.name, known.input_shape, known.num_classes) == ("arrays", (8, 8, 3), 3)
    assert (known.train_examples, known.validation_examples, known.test_examples) == (60, 0, 20)
    for i in range(60):
        np.testing.assert_array_equal(data.train[i].image, given["images"][i])
        assert data.train[i].label == given["labels"][i]


def test_validation_subset_and_size_work_on_arrays():
    config = arrays_config(
        data__validation_examples=10, data__train_examples=30, data__fit="stretch", data__image_size=16
    )
    data = open_data(config, from_arrays(**arrays()))
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    assert data.facts.input_shape == (16, 16, 3)
    assert data.reader(data.train[0]).shape == (16, 16, 3)


@pytest.mark.parametrize("placement", ["replicated", "sharded", "stream"])
@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)  # test_data.py has workers
def test_batches_of_arrays(placement, workers):
    """Also from worker processes, which get a copy of the arrays."""
    if workers and placement != "stream":
        pytest.skip("only streams have workers")
    given, mesh = arrays(), one_device()
    config = arrays_config(data__placement=placement, data__workers=workers)
    data = open_data(config, from_arrays(**given))
    feed = training_feed(config, data, mesh, 6)
    try:
        batches = [
            jax.device_get(jax.jit(feed.select_batch)(feed.load(step), np.int32(0))) for step in range(6)
        ]
    finally:
        feed.close()
    images, labels, numbers = (np.concatenate(column) for column in zip(*batches, strict=True))
    assert sorted(numbers) == list(range(60))
    np.testing.assert_array_equal(images, given["images"][numbers])
    np.testing.assert_array_equal(labels, given["labels"][numbers])
    examples = evaluation_set(config, data, mesh, "test")
    seen = np.concatenate([np.asarray(images)[:number] for images, _, number in examples.chunks()])
    np.testing.assert_array_equal(seen, given["test_images"])


def test_arrays_are_not_copied_to_workers_unless_asked_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    assert stream.workers_and_threads(arrays_config(), in_memory=True) == (0, 96)
    assert stream.workers_and_threads(arrays_config(data__workers=3), in_memory=True) == (3, 32)
    data = open_data(arrays_config(data__validation_examples=10), from_arrays(**arrays()))
    rows = slice(0, 10)
    assert stream.ProcessBatches(data, data.train, 10, rows, range(1), 0).in_memory, "also a part of them"


def test_the_fingerprint_is_that_of_the_content():
    given = arrays()
    same = from_arrays(**{name: np.copy(value) for name, value in given.items() if name != "class_names"},
                       class_names=given["class_names"])  # fmt: skip
    assert from_arrays(**given).fingerprint == same.fingerprint
    for name in ("images", "labels", "test_images", "test_labels"):
        changed = np.copy(given[name])
        changed.flat[-1] = (changed.flat[-1] + 1) % 3
        other = from_arrays(**given | {name: changed})
        assert other.fingerprint != same.fingerprint, name
    assert from_arrays(**given | {"class_names": list("abc")}).fingerprint != same.fingerprint
    assert from_arrays(**arrays(seed=1)).train.fingerprint != same.train.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": lambda a: a / 255}, "images must be uint8, 0 to 255, not float64: multiply by 255"),
        ({"images": lambda a: a.astype(np.int32)}, "images must be uint8, 0 to 255, not int32"),
        ({"images": lambda a: a[..., 0]}, r"60x8x8 must be \(N, H, W, C\): .* images\[..., None\]"),
        ({"images": lambda a: a.transpose(0, 3, 1, 2)}, "60x3x8x8 must be .*: move the axis of channels last"),
        ({"images": lambda a: a.reshape(60, -1)}, "60x192 must be"),
        ({"images": lambda a: a[:0]}, "0x8x8x3 holds no images"),
        ({"labels": lambda a: a[:-1]}, "labels has 59 labels, but images has 60 images"),
        ({"labels": lambda a: a + 1}, r"labels\[2\] is 3, but class_names has 3 classes: .* 0 to 2"),
        ({"labels": lambda a: a - 1}, r"labels\[0\] is -1"),
        ({"labels": lambda a: a.astype(float)}, r"labels must be integers \(N,\), not float64 60"),
        ({"labels": lambda a: np.eye(3)[a]}, "not float64 60x3: take their argmax"),
        ({"test_labels": lambda a: a * 0 + 7}, r"test_labels\[0\] is 7"),
        ({"test_images": lambda a: a[:, :4]}, "images are 8x8x3 and test_images 4x8x3"),
        ({"test_images": lambda a: a[:0], "test_labels": lambda a: a[:0]}, "test_images 0x8x8x3 holds no"),
        ({"class_names": lambda a: ()}, "one per class"),
        ({"class_names": lambda a: "abc"}, "one per class"),
        ({"class_names": lambda a: ["a", "b", "a"]}, "has 'a' more than once"),
        ({"class_names": lambda a: a[:2]}, r"labels\[2\] is 2, but class_names has 2"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_used(changes, message):
    given = arrays()
    with pytest.raises(UserError, match=message) as error:
        from_arrays(**given | {name: change(given[name]) for name, change in changes.items()})
    assert "\n" not in str(error.value)


def test_a_run_on_arrays_needs_them():
    for use in (facts, open_data):
        with pytest.raises(UserError, match=r"passed in Python: pass data=\.\.\., or register") as error:
            use(arrays_config())
        assert "\n" not in str(error.value)
        with pytest.raises(
            UserError, match="data.name=digits, but the set that was passed is named arrays"
        ):
            use(tiny_config(), from_arrays(**arrays()))


# --- sets that users register ----------------------------------------------------------------


def test_a_registered_set_is_found_by_its_name(no_registrations):
    calls = []
    ekd_jax.data.register_dataset("shapes", lambda: calls.append(1) or from_arrays(**arrays()))
    assert "shapes" in ekd_jax.data.list_datasets()
    assert not calls, "it is loaded when it is needed"
    config = arrays_config(data__name="shapes")
    assert facts(config) == open_data(config).facts
    assert facts(config).name == "shapes"
    assert len(calls) == 1
    for wrong in ("shape", "Shapes"):
        with pytest.raises(UserError, match="did you mean 'shapes'"):
            facts(arrays_config(data__name=wrong))
    with pytest.raises(UserError, match="choose one of .*imagenet2012, shapes"):
        facts(arrays_config(data__name="qqqqqqqqqqqq"))


@pytest.mark.parametrize("name", ["digits", "folder", "arrays", "cifar10", "imagenet2012", "shapes"])
def test_a_name_that_is_taken_is_refused(name, no_registrations):
    registry.register_dataset("shapes", lambda: from_arrays(**arrays()))
    with pytest.raises(UserError, match=f"there is a data set named '{name}' already"):
        registry.register_dataset(name, lambda: from_arrays(**arrays()))
    with pytest.raises(UserError, match="must consist of letters"):
        registry.register_dataset("my set", lambda: from_arrays(**arrays()))


class Squares:
    """Examples of one's own: nothing is in memory."""

    fingerprint = "squares"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return dataset.Example(np.full((4, 4, 1), index, np.uint8), index % 2, f"square {index}")


def squares(train=30, stated=30):
    return dataset.Source(
        dataset.Facts("", (4, 4, 1), ("even", "odd"), stated, 10), Squares(train), Squares(10)
    )


def test_examples_of_ones_own(no_registrations):
    registry.register_dataset("squares", squares)
    config = arrays_config(data__name="squares", data__placement="stream", data__workers=1)
    data = open_data(config)
    feed = training_feed(config, data, one_device(), 3)
    numbers = np.concatenate([np.asarray(feed.load(step)[2]) for step in range(3)])
    feed.close()
    assert sorted(numbers) == list(range(30))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: 1 / 0, "loading the registered data set wrong failed: division by zero"),
        (lambda: arrays(), "must return an ekd_jax.data.Source, .* not dict"),
        (lambda: squares(stated=31), "states 31 train examples and has 30"),
        (lambda: squares(train=0, stated=0), "states 0 train examples and has 0: there must be some"),
    ],
)
def test_registered_sets_that_cannot_be_used(load, message, no_registrations):
    registry.register_dataset("wrong", load)
    with pytest.raises(UserError, match=message) as error:
        facts(arrays_config(data__name="wrong"))
    assert "\n" not in str(error.value)


MODULE = """
import numpy as np
import ekd_jax.data

def load():
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (labels[:, None, None, None] * 100 + generator.integers(0, 50, (60, 8, 8, 1))).astype(np.uint8)
    return ekd_jax.data.from_arrays(images, labels, ["dark", "gray", "light"], images[::2], labels[::2])

ekd_jax.data.register_dataset("shades", load)
"""


@pytest.fixture
def shades(tmp_path):
    """A directory with a module that registers a set, and a function that runs a command there."""
    (tmp_path / "my_shades.py").write_text(MODULE)

    def run(module, *arguments):
        return subprocess.run(
            [sys.executable, "-m", f"ekd_jax.{module}", *map(str, arguments)],
            cwd=tmp_path, env=plain_environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


FLAGS = (
    f"--config={ROOT}/configs/digits.py",
    "--config.imports=('my_shades',)",
    "--config.data.name=shades",
)


def test_commands_find_a_registered_set(shades, tmp_path):
    """The module is found in the working directory."""
    done = shades("prepare", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "shades is ready: 60 images to train on, 30 to test on, 3 classes" in done.stdout
    done = shades("preview", *FLAGS, f"--output={tmp_path}/grid.png")
    assert done.returncode == 0, done.stderr
    done = shades("prepare", *FLAGS[:1], "--config.data.name=shades")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "data.name=shades" in done.stderr


@pytest.mark.slow
def test_a_run_on_a_registered_set(shades, tmp_path):
    """Trained and evaluated from the command line, by worker processes."""
    done = shades(
        "main", *FLAGS, "--workdir=run", "--config.train.epochs=8", "--config.train.batch_size=10",
        "--config.model.name=resnet8", "--config.model.students=(1,0.5)", "--config.data.workers=1",
        "--config.data.placement=stream", "--config.train.evaluate_every_epochs=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = shades("evaluate", "--workdir=run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ensemble/top1"] > 60


# --- names and imports -----------------------------------------------------------------------


def test_well_known_names_are_those_of_the_package():
    assert set(registry.FROM_TFDS) == set(records.SIZES) == set(records.BUILDERS)


def test_public_names():
    for name in ekd_jax.data.__all__:
        assert name in dir(ekd_jax.data)
        assert getattr(ekd_jax.data, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'arays'"):
        _ = ekd_jax.data.arays


@pytest.mark.parametrize(
    "names", ["data.augment, data.decode, data.dataset", "data.opening, data.registry"]
)
def test_reading_images_needs_no_training_code(names):
    """Predicting with a student imports the first three, a user's module the others."""
    modules = [f"ekd_jax.{name.strip()}" for name in names.split(",")]
    code = textwrap.dedent(f"""
        import sys
        import {", ".join(modules)}
        heavy = ("tensorflow_datasets", "tensorflow", "clu", "orbax", "optax", "tensorboardX", "grain", "flax")
        assert not [name for name in heavy if name in sys.modules]
        from absl import flags
        assert not [module for module in flags.FLAGS.flags_by_module_dict() if "ekd_jax" in module]
    """)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=plain_environment())
