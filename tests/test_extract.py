"""Extraction of students, and what can be wrong with a checkpoint or with a student's directory."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import forward, one_device, tiny_config

import ekd_jax
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.data.augment import normalize
from ekd_jax.data.opening import open_data
from ekd_jax.runs import checkpoint
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.runs.evaluation import evaluate_student
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import init_variables, network_variables
from ekd_jax.training.single import run


def extract(run, student, output, **checkpoint):
    return load_run(run, **checkpoint).extract(student, output).description


@pytest.fixture(scope="module")
def ensemble(finished):
    """The finished run's network and variables."""
    config = tiny_config()
    networks = build_networks(config, 10, (8, 8, 1))
    with open_checkpoints(finished[0]) as checkpoints:
        like = init_variables(networks, 0)
        variables, _ = checkpoints.restore_variables(like, checkpoints.choose())
    return networks.ensemble, network_variables(variables)


@pytest.mark.parametrize("student", [1, 2])
def test_weights_and_logits_are_those_of_the_branch(finished, ensemble, tmp_path, student):
    network, variables = ensemble
    extract(finished[0], student, tmp_path / "student")
    loaded = ekd_jax.load_student(tmp_path / "student")
    for kind in ("params", "batch_stats"):
        own = {**variables[kind]["base"], **variables[kind]["students"][str(student)]}
        jax.tree.map(np.testing.assert_array_equal, loaded.variables[kind], own)

    test = open_data(tiny_config()).test
    images = np.stack([test[i].image for i in range(64)])
    config = tiny_config()
    given = normalize(images, config.data.mean, config.data.std)
    outputs, _ = forward(network, variables, given, train=False)
    expected = outputs.logits_SxBxK[student - 1]
    np.testing.assert_allclose(loaded.logits(images), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(loaded.logits)(images), expected, rtol=1e-5, atol=1e-5)
    probabilities = loaded.predict(images)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(expected), atol=1e-5)
    np.testing.assert_allclose(np.sum(probabilities, 1), 1, atol=1e-5)


def test_the_folder_stands_alone(finished, tmp_path):
    """Loaded after the run is gone, it evaluates to what the run recorded."""
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    description = extract(path, 2, tmp_path / "student", best=True)
    shutil.rmtree(path)
    loaded = ekd_jax.load_student(tmp_path / "student")
    assert loaded.description == description
    assert loaded.class_names[7] == "seven"
    assert loaded.input_shape == (8, 8, 1)
    assert description.provenance.seed == 0
    assert description.network.channels == (2, 4, 8)
    found = evaluate_student(loaded)
    assert {k: found[f"student_2/{k}"] for k in description.metrics} == pytest.approx(
        description.metrics, rel=1e-5
    )
    names = safetensors.numpy.load_file(tmp_path / "student" / "weights.safetensors")
    assert "params/head/linear/kernel" in names
    assert not any("method" in name for name in names)


def test_only_the_student_is_read_from_the_checkpoint(finished, monkeypatch, tmp_path):
    seen = []
    original = checkpoint.Checkpoints.restore_variables

    def spy(self, like, step):
        variables, remembered = original(self, like, step)
        seen.append(variables)
        return variables, remembered

    monkeypatch.setattr(checkpoint.Checkpoints, "restore_variables", spy)
    extract(finished[0], 2, tmp_path / "student")
    assert {k: set(v) for k, v in seen[0].items()} == {
        k: {"base", "students"} for k in ("params", "batch_stats")
    }
    assert set(seen[0]["params"]["students"]) == {"2"}


def test_the_student_that_fits(finished):
    path, summary = finished
    sizes = [s.parameters for s in summary.students]
    run = load_run(path)
    assert run.best_student_within(sizes[1]) == 2
    last = [r for r in read_metrics(path) if r["split"] == "test"][-1]
    assert run.best_student_within(sizes[0]) == max((1, 2), key=lambda i: last[f"student_{i}/top1"])
    with pytest.raises(UserError, match=f"the smallest student has {sizes[1]}"):
        run.best_student_within(sizes[1] - 1)


@pytest.mark.parametrize("student", [0, 3, -1])
def test_student_out_of_range(finished, tmp_path, student):
    with pytest.raises(UserError, match="has students 1 to 2"):
        extract(finished[0], student, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way(finished, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UserError, match="not an empty directory"):
        extract(finished[0], 1, tmp_path)
    with pytest.raises(UserError, match="not an empty directory"):
        extract(finished[0], 1, tmp_path / "mine")
    with pytest.raises(UserError, match="is not the directory of a run"):
        extract(tmp_path / "nothing", 1, tmp_path / "student")
    with pytest.raises(UserError, match="--step=5: the steps kept are .*19"):
        extract(finished[0], 1, tmp_path / "student", step=5)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_images_of_another_shape(finished, tmp_path):
    extract(finished[0], 1, tmp_path / "student")
    loaded = ekd_jax.load_student(tmp_path / "student")
    for wrong in (np.zeros((1, 9, 8, 1), np.uint8), np.zeros((8, 8, 1), np.uint8), np.zeros((1, 8, 8, 1))):
        with pytest.raises(UserError, match="takes uint8 images Bx8x8x1"):
            loaded.predict(wrong)


@pytest.mark.parametrize("damage", ["weights", "truncated", "description", "missing"])
def test_damaged_folders(finished, tmp_path, damage):
    folder = tmp_path / "student"
    extract(finished[0], 1, folder)
    weights, description = folder / "weights.safetensors", folder / "student.json"
    if damage == "weights":
        flip_a_bit(weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "description":
        description.write_text(description.read_text()[:100])
    else:
        weights.unlink()
    with pytest.raises(UserError, match="is damaged|weights.safetensors cannot be read"):
        ekd_jax.load_student(folder)


# --- damaged checkpoints ---------------------------------------------------------------------


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def array_files(path):
    """The files of the latest checkpoint that hold arrays, whichever array is in which."""
    return [p for p in (path / "checkpoints" / "19" / "state").rglob("d/*") if p.stat().st_size > 2000]


def test_a_flipped_bit_is_found(copy):
    for file in array_files(copy):
        flip_a_bit(file)
    with pytest.raises(UserError, match=r"checkpoint .*19 is damaged .*: pass --step=18") as error:
        load_run(copy).evaluate()
    assert "\n" not in str(error.value)


def test_a_truncated_checkpoint_is_found(copy):
    for file in array_files(copy):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        load_run(copy).evaluate()


def test_latest_and_best_are_kept_over_a_resume(copy):
    """The best survives later checkpoints, also of a run that was stopped and goes on."""
    path = copy
    tests = [r for r in read_metrics(path) if r["split"] == "test"]
    best = max(tests, key=lambda r: r["ensemble/top1"])["step"]
    with open_checkpoints(path) as checkpoints:
        assert checkpoints.steps() == sorted({best, 18, 19})
        assert checkpoints.choose(best_by="ensemble/top1") in (best, 19)
    run(tiny_config(), path, one_device())
    assert json.loads((path / "summary.json").read_text())["steps"] == 19
    with open_checkpoints(path) as checkpoints:
        assert best in checkpoints.steps()
