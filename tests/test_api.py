"""The Python interface, as in the README."""

import logging
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY

import ekd_jax


def small_config():
    config = ekd_jax.default_config()
    for name, value in (TINY | {"train.epochs": 1.0}).items():
        section, _, knob = name.rpartition(".")
        config[section][knob] = value
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "run"
    return path, ekd_jax.train(small_config(), path, verbose=False)


def test_every_public_name_is_there():
    for name in ekd_jax.__all__:
        assert getattr(ekd_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ekd_jax.trian


def test_a_run_is_trained_and_read_back(run, tmp_path):
    path, summary = run
    assert [s.student for s in summary.students] == [1, 2]
    loaded = ekd_jax.load_run(path)
    images = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), dtype=np.uint8)
    predicted = loaded.predict(images)
    assert list(predicted) == ["student_1", "student_2", "ensemble"]
    student = loaded.extract(2, tmp_path / "student")
    again = ekd_jax.load_student(tmp_path / "student")
    assert again.description == student.description
    for found in (student.predict(images), again.predict(images), loaded.student(2).predict(images)):
        np.testing.assert_allclose(found, predicted["student_2"], rtol=1e-5, atol=1e-6)
    found = loaded.evaluate()
    assert found["student_2/top1"] == pytest.approx(summary.students[1].top1_last, abs=1e-3)
    assert ekd_jax.evaluate_student(again)["student_2/top1"] == pytest.approx(found["student_2/top1"])


def test_images_of_another_shape_are_refused(run):
    with pytest.raises(ekd_jax.UserError, match=r"takes uint8 images Bx8x8x1, not float"):
        ekd_jax.load_run(run[0]).predict(np.zeros((1, 8, 8, 1)))


def test_the_same_call_again_only_reports(run, capsys):
    path, summary = run
    assert ekd_jax.train(small_config(), path) == summary
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors == f"{path} holds the complete run: nothing to train\n"
    assert ekd_jax.train(small_config(), path, verbose=False) == summary
    assert capsys.readouterr() == ("", "")


def test_a_run_is_read_without_a_word(finished):
    """Orbax warns that what is read is read only."""
    code = f"import ekd_jax; ekd_jax.load_run({str(finished[0])!r}).student(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_nothing_is_left_behind_after_an_exception(tmp_path):
    """No lock, no thread, no handler: the next call in the same process works."""
    before, handlers = {t.name for t in threading.enumerate()}, list(logging.getLogger("ekd_jax").handlers)
    config = small_config()
    config.optimizer.learning_rate = 1e9
    for _ in range(2):  # also: the lock is free again
        with pytest.raises(ekd_jax.UserError, match="not finite"):
            ekd_jax.train(config, tmp_path / "run")
    alive = {t.name for t in threading.enumerate() if not t.daemon}
    assert alive <= before | {"MainThread"}
    assert logging.getLogger("ekd_jax").handlers == handlers


def test_training_works_outside_the_main_thread(tmp_path):
    """As in a server or a notebook's worker: no signal handlers there."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(ekd_jax.train(small_config(), tmp_path / "run", verbose=False))
    )
    thread.start()
    thread.join(timeout=300)
    assert found
    assert found[0].steps > 0


@pytest.mark.slow  # test_outside.py trains on arrays, too
def test_arrays_are_trained_on(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(96) % 3
    images = (generator.integers(0, 60, (96, 8, 8, 3)) + labels[:, None, None, None] * 90).astype(np.uint8)
    data = ekd_jax.from_arrays(
        images[:64], labels[:64], ("dark", "gray", "light"), images[64:], labels[64:]
    )
    config = small_config()
    config.data.train_examples, config.train.epochs, config.data.crop_padding = 0, 8.0, 0
    summary = ekd_jax.train(config, tmp_path / "run", data=data, verbose=False)
    assert summary.ensemble.top1_last > 60
    run = ekd_jax.load_run(tmp_path / "run")
    assert run.description.class_names == ("dark", "gray", "light")
    assert run.evaluate(source=data)["ensemble/top1"] == pytest.approx(summary.ensemble.top1_last, abs=1e-3)
    with pytest.raises(ekd_jax.UserError, match="data="):
        run.evaluate()


@pytest.mark.slow  # test_compare.py trains plans, too
def test_a_method_of_several_runs_is_trained(tmp_path):
    config = ekd_jax.default_config("self_distillation")
    for name, value in (TINY | {"train.epochs": 1.0, "model.students": (0.25,)}).items():
        section, _, knob = name.rpartition(".")
        config[section][knob] = value
    ekd_jax.train(config, tmp_path / "run", verbose=False)
    assert (tmp_path / "run/earlier/member1/summary.json").exists()


def test_recipes_are_loaded():
    config = ekd_jax.load_recipe(ROOT / "configs/resnet_cifar100.py", "depth=110")
    assert config.model.name == "resnet110"
    assert ekd_jax.load_recipe(f"{ROOT}/configs/resnet_cifar100.py:depth=110") == config
    with pytest.raises(ekd_jax.UserError, match="did you mean .*digits.py"):
        ekd_jax.load_recipe(ROOT / "configs/digit.py")


def test_the_example_in_the_readme(tmp_path, monkeypatch):
    """It runs as it stands, with fewer epochs and narrower students."""
    readme = (ROOT / "README.md").read_text()
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "ekd_jax.train(" in b]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names: dict = {}
    narrow = f"epochs = 1; config.model.students = {(0.5, 0.4, 0.3, 0.2, 0.1)}"
    code, changed = re.subn(r"(?<=config\.train\.)epochs = \d+", narrow, code)
    assert changed == 1
    exec(code, names)
    assert (tmp_path / "students").exists()


LIGHT = """
import sys
import ekd_jax
student = ekd_jax.load_student(sys.argv[1])
import numpy as np
student.predict(np.zeros((1, *student.input_shape), np.uint8))
from absl import flags
heavy = ("orbax", "orbax.checkpoint", "optax", "tensorboardX", "tensorflow_datasets", "clu", "grain", "ml_collections")
print([name for name in heavy if name in sys.modules], [n for n in ("config", "workdir") if n in flags.FLAGS])
"""


def test_predicting_loads_little(run, tmp_path):
    """No Orbax, Optax or TensorBoard, and no flags, for a student that predicts."""
    ekd_jax.load_run(run[0]).extract(1, tmp_path / "student")
    found = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "student")],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert found.stdout.split("\n")[0] == "[] []"
    assert len(jax.devices()) == 8
