"""Model cards: what stands on them is what was measured, and what they tell readers to type works."""

import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import command, fresh_student

from ekd_jax.runs.run import load_run
from ekd_jax.students.card import CLASSES_SHOWN, model_card
from ekd_jax.students.description import ClassScores, Provenance
from ekd_jax.students.student import write_student


@pytest.fixture(scope="module")
def extracted(finished, tmp_path_factory):
    """Return the directory of a student that the command extracted."""
    output = tmp_path_factory.mktemp("card") / "student"
    done = command("extract", f"--workdir={finished[0]}", "--student=2", f"--output={output}")
    assert (done.returncode, done.stderr) == (0, "")
    return output


def rows_of(card, header):
    """Return the cells of the table with this header."""
    lines = card.split(f"| {header} |")[1].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines[:end]]


def test_a_card_states_what_was_measured(extracted, finished):
    card = (extracted / "README.md").read_text()
    run, summary = load_run(finished[0]), finished[1]
    last = summary.students[1].top1_last
    assert f"| {last:.4g} % |" in card
    examples = run.description.data.test_examples
    assert f"On {examples} test images, after the last of 3 epochs (step {summary.steps})" in card
    expected = run.evaluate().of_classes("student_2")
    found = rows_of(card, "class | images | recall % | precision % | F1 %")
    assert found == [
        [name, f"{c['images']}", f"{c['recall']:.2f}", f"{c['precision']:.2f}", f"{c['f1']:.2f}"]
        for name, c in expected.items()
    ]
    assert f"| {summary.students[1].parameters:,} | {summary.students[1].macs:,} |" in card
    assert hashlib.sha256((extracted / "weights.safetensors").read_bytes()).hexdigest() in card
    assert "License of the data: CC BY 4.0" in card


def test_the_settings_on_a_card_train_the_student_again(extracted, finished):
    """They are all that differs from the defaults."""
    settings = rows_of((extracted / "README.md").read_text(), "setting | value")
    flags = [f"{name.strip('`')}={value.strip('`')}" for name, value in settings]
    changed = json.loads((finished[0] / "config.json").read_text())
    fresh = dict(flag.split("=", 1) for flag in flags)
    assert json.loads(fresh["model.students"]) == changed["model"]["students"]
    assert {"data.name", "model.name", "train.epochs"} <= fresh.keys()
    assert not {"seed", "method.name", "data.data_dir", "train.log_every_steps"} & fresh.keys()


def test_python_on_a_card_runs(extracted, monkeypatch):
    monkeypatch.chdir(extracted)
    code = re.search(
        r"```python\n(import ekd_jax.*?)```", (extracted / "README.md").read_text(), re.DOTALL
    )[1]
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    names = {"images": images}
    exec(code, names)  # as a reader would
    np.testing.assert_allclose(names["probabilities"].sum(-1), 1, rtol=1e-5)
    assert names["probabilities"].shape == (3, 10)


def card_of(**changes):
    own = fresh_student(("cat", "a|b*c_d", "<x>")).description
    return model_card(dataclasses.replace(own, **changes), 1.5)


def with_network(name):
    own = fresh_student(("a", "b")).description
    return {"network": dataclasses.replace(own.network, name=name)}


SCORES = ClassScores(3, 50.0, 25.0, 100 / 3)
ON_CARDS = [
    ({}, "It was not evaluated", "By class"),
    ({"metrics": {"top1": 50.0}}, "On the test images, ", "By class"),
    ({"metrics": {"top1": 50.0}, "examples": 12_345}, "On 12,345 test images", "By class"),
    ({"metrics": {"top1": 50.0}, "evaluated_on": "validation"}, "On the validation images", "By class"),
    ({"metrics": {"top1": 50.0}, "by_class": {"a|b*c_d": SCORES}}, r"| a\|b\*c\_d | 3 | 50.00 |", "Classes, in"),
    ({}, r"cat, a\|b\*c\_d, \<x\>.", "more."),
    ({"class_names": tuple(map(str, range(1000)))}, "19 and 980 more.", "20,"),
    ({"provenance": Provenance("photos")}, "License of the data: not known", "CC BY"),
    ({"provenance": Provenance("svhn_cropped")}, "for non-commercial use only", "not known"),
    ({"provenance": Provenance("x", converted_from="w.pth")}, "the PyTorch file `w.pth`", "## Training"),
    ({"provenance": Provenance("x", settings={"model.initial_weights": "D"})}, "from the weights in `D`", "random"),
    (with_network("resnet18"), "--library=timm --output", "--torch_network"),
    (with_network("shufflenet_v2_x1_0"), "--library=torchvision --output", "--torch_network"),
    (with_network("vgg8"), "--library=RepDistiller --torch_network=MODULE:FUNCTION", "--library=timm"),
    (with_network("my_network"), "--format=onnx", "--format=torch"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "there", "not_there"), ON_CARDS)
def test_cards_say_what_is_known_and_no_more(changes, there, not_there):
    card = card_of(**changes)
    assert there in card
    assert not_there not in card


def test_of_many_classes_the_worst_are_shown():
    names = tuple(map(str, range(150)))
    by_class = {name: ClassScores(5, 50.0, 50.0, float(name)) for name in names}
    card = card_of(class_names=names, metrics={"top1": 1.0}, by_class=by_class)
    found = rows_of(card, "class | images | recall % | precision % | F1 %")
    assert [row[0] for row in found] == [str(number) for number in range(CLASSES_SHOWN)]
    assert "the 100 worst of 150; `student.json` has all" in card


def test_a_student_is_extracted_without_its_test_images(finished, tmp_path):
    """Its card lacks the scores by class, and a line says why."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"name": "folder", "data_dir": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(config))
    done = command("extract", f"--workdir={run}", "--student=1", f"--output={tmp_path}/student")
    assert done.returncode == 0
    assert "the model card gets no scores by class: " in done.stderr
    assert "gone" in done.stderr
    assert "ekd evaluate --student_dir=. --per_class" in (tmp_path / "student" / "README.md").read_text()


def test_every_writer_of_students_writes_a_card(tmp_path):
    write_student(tmp_path / "student", fresh_student(("a", "b")))
    assert (
        (tmp_path / "student" / "README.md").read_text().startswith("# resnet8 at width 1/4 for arrays\n")
    )
