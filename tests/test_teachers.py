"""Frozen teachers: what they say, and that it does not matter whether it is kept or computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_device, tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.data.augment import normalize
from ekd_jax.data.opening import open_data
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.teachers import load_teacher
from ekd_jax.training import loop, single, teaching
from ekd_jax.training.teaching import make_teach

FIXED = {"data__crop_padding": 0, "train__epochs": 1, "model__students": (0.25,)}


def images_of(config, number):
    test = open_data(config).test
    examples = [test[i] for i in range(number)]
    return np.stack([e.image for e in examples]), np.array([e.label for e in examples])


@pytest.mark.parametrize(("suffix", "name"), [("", "ensemble"), (":1", "student_1"), (":2", "student_2")])
def test_a_finished_run_is_a_teacher(finished, suffix, name):
    """Its ensemble, or one of its students: as accurate as its last evaluation says."""
    path, _ = finished
    teacher = load_teacher(f"{path}{suffix}", path)
    images, labels = images_of(tiny_config(), 898)
    said = teacher(teacher.frozen, normalize(images, teacher.preprocessing.mean, teacher.preprocessing.std))
    accuracy = 100 * (np.argmax(said.logits, 1) == labels).mean()
    assert accuracy == pytest.approx(load_run(path).evaluate()[f"{name}/top1"], abs=1e-4)
    assert [m.shape[-1] for m in said.maps] == {"": [], ":1": [4, 8, 16], ":2": [2, 4, 8]}[suffix]


def test_a_student_that_was_taken_out_is_the_same_teacher(finished, tmp_path):
    load_run(finished[0]).extract(2, tmp_path / "student")
    a, b = (load_teacher(s, tmp_path) for s in (f"{finished[0]}:2", str(tmp_path / "student")))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    jax.tree.map(np.testing.assert_array_equal, a(a.frozen, x), b(b.frozen, x).replace(method=a.method))
    assert a.shapes().logits.shape == (1, 10)


def test_kept_logits_give_the_same_run(finished, tmp_path, monkeypatch):
    """With fixed images the teacher's logits are a table; without it every loss is the same."""
    config = tiny_config("kd", **FIXED, method__teachers=(str(finished[0]),))
    seen = []
    inputs = loop.frozen_inputs
    monkeypatch.setattr(loop, "frozen_inputs", lambda *a: seen.append(inputs(*a)) or seen[-1])
    single.run(config, tmp_path / "kept", one_device())
    monkeypatch.setattr(teaching, "images_are_fixed", lambda data: False)
    single.run(config, tmp_path / "computed", one_device())
    assert [set(s) for s in seen] == [{"stored"}, {"teachers"}]
    assert seen[0]["stored"].shape == (200, 1, 10)
    kept, computed = (
        [r["loss"] for r in read_metrics(tmp_path / name) if r["split"] == "train"]
        for name in ("kept", "computed")
    )
    np.testing.assert_allclose(kept, computed, rtol=1e-5)


@pytest.mark.parametrize("change", ["flip", "crop_padding", "cutout", "mixup", "policy", "rotation"])
def test_what_is_drawn_anew_is_not_kept(change):
    fixed = tiny_config(**FIXED).data
    assert teaching.images_are_fixed(fixed)
    value = {"policy": "trivialaugment", "flip": True, "mixup": 0.2, "rotation": 5.0}.get(change, 2)
    assert not teaching.images_are_fixed(tiny_config(**FIXED | {f"data__{change}": value}).data)


def test_a_teacher_sees_images_normalized_its_way(finished):
    config = tiny_config(data__mean=(0.25,), data__std=(0.125,))
    teacher = load_teacher(str(finished[0]), finished[0])
    images, _ = images_of(config, 8)
    teach = make_teach([teacher], config.data)
    (said,) = teach({"teachers": [teacher.frozen]}, normalize(images, (0.25,), (0.125,)), jnp.arange(8))
    expected = teacher(
        teacher.frozen, normalize(images, teacher.preprocessing.mean, teacher.preprocessing.std)
    ).logits
    np.testing.assert_allclose(said.logits, expected, atol=1e-4)


def test_a_run_has_no_such_student(finished):
    with pytest.raises(UserError, match="has students 1 to 2"):
        load_teacher(f"{finished[0]}:3", finished[0])


def test_what_is_restored_is_what_was_trained(finished):
    run = load_run(finished[0])
    assert run.names == ["student_1", "student_2", "ensemble"]
    assert run.checkpoint.step == finished[1].steps
