"""Predictions for files and directories, and evaluation class by class, as commands."""

import csv
import json

import numpy as np
import pytest
from conftest import command, fresh_student
from PIL import Image

from ekd_jax.students.student import load_student, read_image, write_student

CLASSES = ("cat", "dog", "cow")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student, a directory of images with a file that is none, and a folder of class directories."""
    path = tmp_path_factory.mktemp("predict")
    fresh = fresh_student(CLASSES)
    write_student(path / "student", fresh)
    random = np.random.default_rng(0)
    for i in range(70):
        file = path / "photos" / f"{i % 3}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(file)
    for k, name in enumerate(("cow", "cat")):  # another order, and one class fewer
        (path / "labeled" / name).mkdir(parents=True)
        for i in range(10):
            image = Image.fromarray(random.integers(0, 256, (12, 9), np.uint8))
            image.save(path / "labeled" / name / f"{k}{i}.png")
    return path


def expected(place, file):
    """Probabilities by class of a file."""
    student = load_student(place / "student")
    return dict(zip(CLASSES, np.asarray(student.predict(read_image(file, student)))[0], strict=True))


def test_a_directory_as_csv(place, tmp_path):
    flags = [f"--student_dir={place}/student", f"--image={place}/photos", "--top=9"]
    result = command("predict", *flags, f"--output={tmp_path}/found.csv")
    assert result.returncode == 0, result.stderr
    assert "70 images -> " in result.stdout
    with open(tmp_path / "found.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 70
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    for row in rows[:2]:
        given = {row[f"class_{k}"]: float(row[f"probability_{k}"]) for k in (1, 2, 3)}
        assert given == pytest.approx(expected(place, place / row["image"]), abs=1e-5)
        assert float(row["probability_1"]) >= float(row["probability_2"]) >= float(row["probability_3"])


def test_files_as_json_and_one_that_cannot_be_read(place, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [place / "photos" / "0" / "0.png", tmp_path / "broken.png"]
    flags = [f"--student_dir={place}/student", *(f"--image={image}" for image in images), "--top=1"]
    result = command("predict", *flags, f"--output={tmp_path}/found.json")
    assert result.returncode == 1
    assert "broken.png" in result.stderr
    assert "left out 1 of 2 images" in result.stderr
    assert "Traceback" not in result.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["image"] == str(images[0])
    (best,) = found["classes"]
    probabilities = expected(place, images[0])
    assert best["class"] == max(probabilities, key=probabilities.get)
    assert best["probability"] == pytest.approx(max(probabilities.values()), abs=1e-5)


def test_one_image_that_cannot_be_read_is_an_error(place, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    result = command("predict", f"--student_dir={place}/student", f"--image={tmp_path}/broken.png")
    assert (result.returncode, result.stdout) == (2, "")
    assert "broken.png" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top=0"], "--top=0"),
        (["--output=found.txt"], "must end in .csv or .json"),
        (["--output=nowhere/found.csv"], "in a directory that exists"),
        (["--image=nowhere.png"], "nowhere.png"),
    ],
)
def test_mistakes(place, flags, message):
    image = [] if "--image" in flags[0] else [f"--image={place}/photos"]
    result = command("predict", f"--student_dir={place}/student", *image, *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_folder_is_evaluated_class_by_class(place, tmp_path):
    flags = [f"--student_dir={place}/student", "--data=folder", f"--data_dir={place}/labeled"]
    result = command(
        "evaluate", *flags, "--split=all", "--per_class", f"--confusion={tmp_path}/confusion.csv", "--json"
    )
    assert result.returncode == 0, result.stderr
    assert "folder (all) has images of 2 of the 3 classes of the student, none of 'dog'" in result.stderr
    found = json.loads(result.stdout)
    said = {
        name: [
            max(p, key=p.get) for p in (expected(place, f) for f in (place / "labeled" / name).iterdir())
        ]
        for name in ("cow", "cat")
    }
    right = [name == one for name, those in said.items() for one in those]
    assert found["images"] == 20
    assert found["absent_classes"] == ["dog"]
    assert found["student_1/top1"] == pytest.approx(100 * np.mean(right))
    assert {name: row["images"] for name, row in found["classes"].items()} == {"cat": 10, "cow": 10}
    for name, those in said.items():
        assert found["classes"][name]["recall"] == pytest.approx(
            100 * np.mean([one == name for one in those])
        )
    with open(tmp_path / "confusion.csv") as file:
        rows = {row["class \\ predicted"]: row for row in csv.DictReader(file)}
    for name, those in said.items():
        assert {k: int(rows[name][k]) for k in CLASSES} == {k: those.count(k) for k in CLASSES}
    assert {int(rows["dog"][k]) for k in CLASSES} == {0}
