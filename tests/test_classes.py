"""Classes are matched by name: evaluation, teachers, initial weights, and a run that resumes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import fresh_student, one_device, tiny_config
from PIL import Image

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.data.arrays import from_arrays
from ekd_jax.data.classes import label_map
from ekd_jax.data.dataset import Facts
from ekd_jax.runs import workdir
from ekd_jax.runs.evaluation import evaluate_student
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import InitialWeights, init_state, start_from
from ekd_jax.runs.teachers import load_teachers
from ekd_jax.students.student import LoadedStudent, write_student
from ekd_jax.training import single
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.setup import prepare

NAMES = ("0", "180", "90")  # the order of strings
IMAGES = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 1), np.uint8)


def data_of(names, labels, images=IMAGES):
    """A set whose image i has the class `labels[i]`."""
    numbers = np.array([names.index(name) for name in labels])
    return from_arrays(images[:4], np.arange(4) % len(names), names, images, numbers)


@pytest.fixture(scope="module")
def student():
    fresh = fresh_student(NAMES)
    bias = fresh.variables["params"]["head"]["linear"]["bias"]
    bias -= np.asarray(fresh.logits(IMAGES)).mean(0)  # so that it predicts every class
    return fresh


@pytest.fixture(scope="module")
def truth(student):
    """A class for each image, so that the student is right about two of three."""
    said = np.asarray(student.predict(IMAGES)).argmax(1)
    return [NAMES[k if i % 3 else (k + 1) % 3] for i, k in enumerate(said)]


@pytest.mark.parametrize(
    "names", [NAMES, ("90", "0", "180"), ("180", "90", "0")], ids=["as trained", "rotated", "mixed"]
)
def test_the_order_of_classes_in_the_data_does_not_matter(student, truth, names):
    found = evaluate_student(student, source=data_of(names, truth), confusion=True)
    assert found["student_1/top1"] == pytest.approx(100 * 2 / 3)
    assert found.examples == 48
    assert not found.absent
    # the confusion matrix, counted by hand from the predictions
    said = np.asarray(student.predict(IMAGES)).argmax(1)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, ([NAMES.index(name) for name in truth], said), 1)
    np.testing.assert_array_equal(found.counts.confusion[0], expected)
    np.testing.assert_array_equal(found.counts.images, expected.sum(1))
    recall = {
        name: 100 * expected[k, k] / expected[k].sum() for k, name in enumerate(NAMES) if expected[k].sum()
    }
    precision = {name: 100 * expected[k, k] / max(1, expected[:, k].sum()) for k, name in enumerate(NAMES)}
    by_class = found.of_classes("student_1")
    assert {name: row["recall"] for name, row in by_class.items()} == pytest.approx(recall)
    assert {name: row["precision"] for name, row in by_class.items()} == pytest.approx(
        {name: precision[name] for name in by_class}
    )
    assert found["student_1/macro_recall"] == pytest.approx(np.mean(list(recall.values())))


def test_the_order_of_classes_in_the_student_does_not_matter(student, truth):
    """The columns of its classifier and its class names are permuted together."""
    order = [2, 0, 1]
    variables = jax.tree.map(np.copy, student.variables)
    linear = variables["params"]["head"]["linear"]
    variables["params"]["head"]["linear"] = {name: leaf[..., order] for name, leaf in linear.items()}
    own = dataclasses.replace(student.description, class_names=tuple(NAMES[k] for k in order))
    found = evaluate_student(LoadedStudent(own, variables), source=data_of(NAMES, truth))
    assert found["student_1/top1"] == pytest.approx(100 * 2 / 3)
    before = evaluate_student(student, source=data_of(NAMES, truth))
    assert found.of_classes("student_1") == before.of_classes("student_1")


@pytest.mark.parametrize("names", [("0", "90"), ("90", "0")])
def test_a_set_that_lacks_a_class(student, truth, names, caplog):
    """It is evaluated over the classes that it has; predictions of the missing class are wrong."""
    chosen = [i for i, name in enumerate(truth) if name != "180"]
    source = data_of(names, [truth[i] for i in chosen], IMAGES[chosen])
    with caplog.at_level("WARNING", "ekd_jax"):
        found = evaluate_student(student, source=source)
    said = np.asarray(student.predict(IMAGES)).argmax(1)
    right = [NAMES[said[i]] == truth[i] for i in chosen]
    assert found["student_1/top1"] == pytest.approx(100 * np.mean(right))
    assert found.absent == ["180"]
    assert "has images of 2 of the 3 classes of the student, none of '180'" in caplog.text


@pytest.mark.parametrize(("test_split", "images"), [(None, 3), ("", 3), ("val", 6)])
def test_another_directory_of_test_images(student, tmp_path, test_split, images):
    for split, number in (("train", 1), ("test", 1), ("val", 2)):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.full((8, 8), 40 * i + 10 * len(split), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    data = {"name": "folder", "data_dir": str(tmp_path), "test_split": test_split}
    assert evaluate_student(student, data).examples == images


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("0", "180", "9o"), "class '9o' that the student does not have; did you mean '90'"),
        (("0", "180", "90", "270"), "class '270' that the student does not have; did you mean '"),
        (
            ("cat", "dog"),
            "classes 'cat', 'dog' that the student does not have; its classes are '0', '180', '90'",
        ),
    ],
)
def test_unknown_classes_are_refused(student, names, message):
    source = from_arrays(IMAGES[:4], np.arange(4) % len(names), names, IMAGES, np.arange(48) % len(names))
    with pytest.raises(UserError, match=message) as error:
        evaluate_student(student, source=source)
    assert "\n" not in str(error.value)


def test_classes_without_names_match_only_themselves():
    assert label_map(("1", "0"), ("0", "1"), "the data", "the student") == (1, 0)
    with pytest.raises(UserError, match="only numbered, 0 to 1: give it the names"):
        label_map(("cat", "dog"), ("0", "1"), "the data", "the student")


def test_labels_out_of_range_are_found_when_classes_are_reordered(student):
    class Wrong:
        fingerprint = "wrong"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return dataclasses.replace(right.test[index], label=-1)

    right = data_of(("90", "0", "180"), ["0"] * 48)
    facts = dataclasses.replace(right.facts, test_examples=4)
    source = dataclasses.replace(right, test=Wrong(), facts=facts)
    with pytest.raises(UserError, match="is -1, but arrays has 3 classes"):
        evaluate_student(student, source=source)


# --- teachers and initial weights ----------------------------------------------------------------


def facts(names, shape=(8, 8, 1)):
    return Facts("arrays", shape, names, 4, 4)


def test_a_teacher_answers_in_the_order_of_the_data(student, tmp_path):
    write_student(tmp_path / "teacher", student)
    source = str(tmp_path / "teacher")
    (own,), (other,) = (
        load_teachers([source], tmp_path, facts(names)) for names in (NAMES, ("90", "0", "180"))
    )
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    logits = np.asarray(own(own.frozen, x).logits)
    np.testing.assert_array_equal(other(other.frozen, x).logits, logits[:, [2, 0, 1]])
    assert own.info == other.info


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (
            ("0", "180", "45"),
            (8, 8, 1),
            "the data has the class '45' that method.teachers: .* does not have",
        ),
        (("0", "180"), (8, 8, 1), "method.teachers: .* has the class '90' that the data does not have"),
        (NAMES, (9, 9, 1), "trained for images 8x8x1, the data has 9x9x1"),
    ],
)
def test_a_teacher_of_other_classes_or_images_is_refused(student, tmp_path, names, shape, message):
    write_student(tmp_path / "teacher", student)
    with pytest.raises(UserError, match=message):
        load_teachers([str(tmp_path / "teacher")], tmp_path, facts(names, shape))


@pytest.mark.parametrize(
    ("names", "columns", "taken"),
    [
        (NAMES, [0, 1, 2], None),
        (("90", "0", "180"), [2, 0, 1], 3),
        (("45", "90"), [None, 2], 1),
        (("0", "180", "270", "90"), [0, 1, None, 2], 3),
        (("a", "b", "c"), [None, None, None], 0),
    ],
    ids=["same", "other order", "fewer", "more", "others"],
)
def test_initial_weights_of_the_classifier_go_by_name(student, caplog, names, columns, taken):
    config = tiny_config(model__students=(0.25,))
    networks = build_networks(config, len(names), (8, 8, 1))
    state = init_state(networks, make_optimizer(config, networks.method, 10), 1)
    given = InitialWeights("x", student.variables, NAMES)
    with caplog.at_level("INFO", "ekd_jax"):
        new = start_from(state, networks, given, names)
    before, after = (
        networks.ensemble.student_variables({"params": s.params, "batch_stats": s.batch_stats}, 1)["params"]
        for s in (state, new)
    )
    np.testing.assert_array_equal(
        after["stem"]["conv"]["kernel"], student.variables["params"]["stem"]["conv"]["kernel"]
    )
    for leaf in ("kernel", "bias"):
        own, theirs = (tree["head"]["linear"][leaf] for tree in (before, student.variables["params"]))
        for column, place in enumerate(columns):
            expected = own[..., column] if place is None else theirs[..., place]
            np.testing.assert_array_equal(after["head"]["linear"][leaf][..., column], expected)
    said = f"starts from the weights of {taken} of the {len(names)} classes" if taken is not None else ""
    assert said in caplog.text
    assert bool(caplog.text) == (taken is not None)


# --- resuming ------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Three classes of ten images."""
    folder = tmp_path / "photos"
    for k, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((8, 8), 20 * i + k, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def rename(folder):
    (folder / "90").rename(folder / "270")


def swap(folder):
    (folder / "0").rename(folder / "x")
    (folder / "90").rename(folder / "0")
    (folder / "x").rename(folder / "90")


def add_images(folder):
    for i in range(5):
        shutil.copy(folder / "0" / "1.png", folder / "0" / f"new{i}.png")


def add_a_class(folder):
    shutil.copytree(folder / "0", folder / "45")


def remove_a_class(folder):
    shutil.rmtree(folder / "180")


def replace_an_image(folder):
    (folder / "0" / "1.png").write_bytes((folder / "0" / "2.png").read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "no class '90'; new class '270'"),
        (swap, "other images"),
        (add_images, "train examples: 24 then, 28 now; test examples: 6 then, 7 now"),
        (add_a_class, "new class '45'; train examples: 24 then, 32 now"),
        (remove_a_class, "no class '180'; train examples"),
        (replace_an_image, "other images"),
    ],
)
def test_a_run_resumes_on_the_same_data_only(photos, tmp_path, change, message):
    """Nothing is written before the data is known to be the same."""
    data = {"data__name": "folder", "data__data_dir": str(photos), "data__image_size": 8}
    config = tiny_config(**data, data__train_examples=0, data__fit="stretch", train__batch_size=8)
    run = tmp_path / "run"
    run.mkdir()
    workdir.claim(run, config)
    workdir.write_description(run, prepare(config, one_device()).description)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    change(photos)
    with pytest.raises(UserError, match=message) as error:
        single.run(config, run, one_device())
    assert "put it back, or choose another --workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_data_that_moved_is_the_same_data(photos, tmp_path):
    data = {"data__name": "folder", "data__image_size": 8, "data__train_examples": 0}
    knobs = {**data, "data__fit": "stretch", "train__batch_size": 8}
    first, second = (
        prepare(tiny_config(**knobs, data__data_dir=str(place)), one_device()).description
        for place in (photos, shutil.copytree(photos, tmp_path / "elsewhere" / "copy"))
    )
    assert first == second


def test_validation_images_are_those_that_the_run_held_out(finished):
    path, _ = finished
    run = load_run(path)
    with pytest.raises(UserError, match="no images were held out"):
        run.evaluate("validation")
    everything = run.evaluate("all")
    assert everything.examples == 200 + 898
    parts = [run.evaluate(split) for split in ("train", "test")]
    np.testing.assert_array_equal(everything.counts.correct, sum(part.counts.correct for part in parts))


def test_the_runs_of_a_plan_have_the_same_data(photos, tmp_path):
    """An earlier run that is complete counts, too."""
    data = {"data__name": "folder", "data__data_dir": str(photos), "data__image_size": 8}
    config = tiny_config(**data, data__train_examples=0, data__fit="stretch", train__batch_size=8)
    earlier = tmp_path / "run" / "earlier" / "teacher"
    earlier.mkdir(parents=True)
    workdir.claim(earlier, config)
    workdir.write_description(earlier, prepare(config, one_device()).description)
    add_images(photos)
    with pytest.raises(
        UserError, match=r"the run in .*earlier/teacher was started with \(train examples: 24 then"
    ):
        single.run(config, tmp_path / "run", one_device())
