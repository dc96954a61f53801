"""A five-student ResNet-20 with the official weights computes what the official code computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, forward, student_from_torch, tiny_config

from ekd_jax import models
from ekd_jax.config.build import Networks, build_method
from ekd_jax.methods.base import Batch
from ekd_jax.runs.state import init_variables, method_variables, network_variables
from ekd_jax.students.torch_names import sources
from ekd_jax.training.step import objective

STUDENTS = range(5)


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "model_reference_resnet20.npz") as file:
        return dict(file)


def part(reference, prefix):
    return {
        name.removeprefix(prefix): value for name, value in reference.items() if name.startswith(prefix)
    }


@pytest.fixture(scope="module")
def network():
    ensemble = models.build_ensemble("resnet20", 5, 100)
    method = build_method(tiny_config())
    return ensemble, method, init_variables(Networks(method, ensemble, (32, 32, 3)), 0)


def official_at(reference, network, when):
    """The official variables: "init", or "after1" training step's statistics."""
    ensemble, _, variables = network
    state = lambda who: part(reference, f"init/{who}/") | part(reference, f"{when}/{who}/")
    rules = sources("resnet20")[0].rules
    variables = jax.tree.map(np.asarray, variables)
    for i in STUDENTS:
        like = ensemble.student_variables(variables, i + 1)
        own = student_from_torch(like, state("base") | state(f"student{i}"), rules)
        variables = ensemble.with_student_variables(variables, i + 1, own)
    adaptation = part(reference, "adapt/")
    for name, layer in variables["params"]["method"]["adaptation_layers"].items():
        block, student = (int(number) - 1 for number in re.findall(r"\d+", name))
        layer["kernel"] = adaptation[f"b{block}_s{student}/w"].T
        layer["bias"] = adaptation[f"b{block}_s{student}/b"]
    return variables


@pytest.fixture(scope="module")
def trained(reference, network):
    """Outputs, statistics, metrics and gradients of one training step."""
    ensemble, method, _ = network
    variables = official_at(reference, network, "init")

    def loss(params):
        full = variables | {"params": params}
        images = reference["x"].transpose(0, 2, 3, 1)
        outputs, stats = ensemble.apply(network_variables(full), images, train=True)
        batch = Batch(reference["y"], jnp.zeros(()))
        value, (metrics, _) = objective(method, method_variables(full), outputs, batch)
        return value, (outputs, stats, metrics)

    (value, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return value, *found, gradients


def test_outputs_and_maps_in_training(reference, trained):
    _, outputs, _, _, _ = trained
    np.testing.assert_allclose(outputs.logits_SxBxK, reference["train/outs"][1:], atol=1e-4)
    for b in range(3):
        expected = reference[f"train/map_b{b}_s0"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(outputs.features[b][0][:2], expected, atol=1e-4)


def test_losses(reference, trained):
    value, _, _, metrics, _ = trained
    total = lambda name: sum(metrics[f"student_{i + 1}/{name}"] for i in STUDENTS)
    ce = [metrics[f"student_{i + 1}/loss_ce"] for i in STUDENTS]
    np.testing.assert_allclose(ce, reference["train/ce"][1:], rtol=1e-5)
    expected = reference["train/losses"]
    found = [
        value,
        total("loss_ce") + reference["train/ce"][0],
        total("loss_intermediate"),
        total("loss_kd"),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradients(reference, trained):
    """All gradients that the reference holds: base block, and four layers of every student."""
    gradients = trained[-1]
    base, students = gradients["base"], gradients["students"]
    found = {
        "base/conv1.weight": base["stem"]["conv"]["kernel"],
        "base/bn1.weight": base["stem"]["bn"]["scale"],
        "base/bn1.bias": base["stem"]["bn"]["bias"],
    }
    for i in STUDENTS:
        own = students[str(i + 1)]
        found[f"student{i}/layer1.0.conv1.weight"] = own["stage1"]["first"]["conv1"]["kernel"]
        found[f"student{i}/layer2.0.shortcut.0.weight"] = own["stage2"]["first"]["shortcut_conv"]["kernel"]
        found[f"student{i}/layer3.2.conv2.weight"] = own["stage3"]["rest"]["conv2"]["kernel"][1]
        found[f"student{i}/linear.weight"] = own["head"]["linear"]["kernel"]
    expected = part(reference, "grad/")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        np.testing.assert_allclose(found[name], value.transpose(axes), atol=1e-4, err_msg=name)


def test_statistics_after_a_step(reference, network, trained):
    found = {k: v for k, v in trained[2].items() if k != "method"}
    after = official_at(reference, network, "after1")["batch_stats"]
    expected = {k: v for k, v in after.items() if k != "method"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_evaluation_mode(reference, network):
    variables = official_at(reference, network, "after1")
    outputs, _ = forward(network[0], variables, reference["x"].transpose(0, 2, 3, 1), train=False)
    np.testing.assert_allclose(outputs.logits_SxBxK, reference["eval_true/student_logits"], atol=1e-4)
