"""Every term and gradient of the main method's loss against the official code, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE

from ekd_jax.methods import METHODS, losses
from ekd_jax.methods.base import Batch
from ekd_jax.models.ensemble import Outputs

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "loss_reference.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inputs(reference):
    """Logits, maps and adaptation layers of the official run, ours in layout."""
    maps = [[reference[f"map_b{b}_s{s}"].transpose(0, 2, 3, 1) for s in range(5)] for b in range(3)]
    layers = {
        f"block{b + 1}_student{s + 1}": {
            "kernel": reference[f"adapt_w_b{b}_s{s}"].T,
            "bias": reference[f"adapt_b_b{b}_s{s}"],
        }
        for b in range(3)
        for s in range(1, 5)
    }
    return jax.tree.map(jnp.asarray, (reference["student_logits"], maps, layers))


def official(reference, logits, maps, layers, **knobs):
    """The loss and its terms by our method."""
    outputs = Outputs(logits, tuple(map(tuple, maps)), (), jnp.zeros((8, 1, 1, 1)))
    method = METHODS["oem"](**knobs)
    batch = Batch(reference["labels"], jnp.zeros(()))
    return method.apply({"params": {"adaptation_layers": layers}}, outputs, batch)


def term(terms, name):
    return np.array([terms[f"student_{i}/{name}"] for i in range(1, 6)])


def test_terms(reference):
    loss, terms = official(reference, *inputs(reference))
    np.testing.assert_allclose(term(terms, "loss_ce"), reference["ce_students"], **TOLERANCE)
    np.testing.assert_allclose(term(terms, "loss_kd"), reference["kl_per_student"], **TOLERANCE)
    for b in range(3):
        found = term(terms, f"loss_intermediate_block{b + 1}")
        np.testing.assert_allclose(found, reference["mse_block_student"][b], **TOLERANCE)
    total = reference["mse_block_student"].sum(0)
    np.testing.assert_allclose(term(terms, "loss_intermediate"), total, **TOLERANCE)
    np.testing.assert_allclose(loss, reference["loss_total"], **TOLERANCE)


def test_gradients(reference):
    gradients = jax.grad(lambda *a: official(reference, *a)[0], argnums=(0, 1, 2))(*inputs(reference))
    logits, maps, layers = gradients
    np.testing.assert_allclose(logits, reference["grad_student_logits"], **TOLERANCE)
    for b in range(3):
        assert not maps[b][0].any(), "the pseudo teacher's maps are targets, not learners"
        for s in range(1, 5):
            expected = reference[f"grad_map_b{b}_s{s}"].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(maps[b][s], expected, **TOLERANCE)
            layer = layers[f"block{b + 1}_student{s + 1}"]
            np.testing.assert_allclose(layer["kernel"], reference[f"grad_adapt_w_b{b}_s{s}"].T, **TOLERANCE)
            np.testing.assert_allclose(layer["bias"], reference[f"grad_adapt_b_b{b}_s{s}"], **TOLERANCE)


def test_every_softmax_is_computed_once(reference):
    """In loss and gradient together: the students' own and at T, and the ensemble's at T."""
    given = inputs(reference)
    gradient = jax.jit(jax.value_and_grad(lambda *a: official(reference, *a)[0], argnums=(0, 1, 2)))
    jax.config.update("jax_disable_most_optimizations", False)  # as a run is compiled
    try:
        program = gradient.lower(*given).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    students, batch, classes = given[0].shape
    found = sorted(re.findall(r" = (\S+?)(?:{\S*)? exponential\(", program))
    assert found == [f"f64[{students},{batch},{classes}]"] * 2 + [f"f64[{batch},{classes}]"]


@pytest.mark.parametrize("temperature", range(1, 9))
def test_temperature(reference, temperature):
    _, terms = official(reference, *inputs(reference), temperature=float(temperature))
    expected = reference["kl_T"][temperature - 1]
    np.testing.assert_allclose(term(terms, "loss_kd").sum(), expected, **TOLERANCE)
    _, unscaled = official(
        reference, *inputs(reference), temperature=float(temperature), scale_by_temperature=False
    )
    np.testing.assert_allclose(term(unscaled, "loss_kd").sum() * temperature**2, expected, **TOLERANCE)


def test_channel_mean_and_other_weights(reference):
    logits, maps, layers = inputs(reference)
    _, terms = official(reference, logits, maps, layers, adaptation="channel_mean")
    found = term(terms, "loss_intermediate").sum()
    np.testing.assert_allclose(found, reference["loss_intermediate_noadapt"], **TOLERANCE)
    loss, _ = official(reference, logits, maps, layers, alpha=1.0, beta=1.0, gamma=1.0)
    np.testing.assert_allclose(loss, reference["loss_total_ratio111"], **TOLERANCE)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("case", ["two classes", "one example", "identical", "huge"])
def test_distillation_at_the_edges(case, temperature):
    """Value and gradient against the formula written out in NumPy, where it can be."""
    generator = np.random.default_rng(0)
    batch, classes = (1, 7) if case == "one example" else (6, 2 if case == "two classes" else 7)
    student, teacher = generator.normal(size=(2, batch, classes))
    if case == "identical":
        teacher = student.copy()
    if case == "huge":
        student, teacher = 1e4 * student, 1e4 * teacher

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    value = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    gradient = temperature * (np.exp(log_q) - np.exp(log_p)) / batch
    found = jax.value_and_grad(losses.knowledge_distillation)(jnp.asarray(student), teacher, temperature)
    np.testing.assert_allclose(found[0], value, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-10, atol=1e-12)
