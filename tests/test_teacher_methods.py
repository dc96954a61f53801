"""Methods with frozen teachers, EKD, DCKD, MEAL and SRM, against PyTorch; and the teachers themselves."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_device, tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_method, build_networks
from ekd_jax.data import resident
from ekd_jax.data.opening import DIGITS
from ekd_jax.methods import METHODS
from ekd_jax.methods.base import Batch, TeacherOutputs
from ekd_jax.methods.meal import adaptive_average_pool, draw_index, flatten_map, reverse_gradient
from ekd_jax.methods.srm import binary_cross_entropy, similarity, sparsify
from ekd_jax.models.cost import count_parameters
from ekd_jax.models.ensemble import Outputs
from ekd_jax.runs import workdir
from ekd_jax.runs.checkpoint import Checkpoints
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import batch_shapes, init_state
from ekd_jax.runs.teachers import load_teacher, network_of
from ekd_jax.students.description import (
    NetworkDescription,
    Preprocessing,
    Provenance,
    StudentDescription,
)
from ekd_jax.students.student import LoadedStudent, load_student, write_student
from ekd_jax.training import plans, single
from ekd_jax.training.dry_run import dry_run
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.setup import prepare
from ekd_jax.training.step import make_step
from ekd_jax.training.teaching import make_teach

SHAPE = (8, 8, 1)
# Inputs of one shape are compared by one compiled program.
ALIKE, TWO, ONE = ("random", "identical", "huge"), ("two classes",), ("one example",)
CASES = ((ALIKE, 0.5), (ALIKE, 20.0), (TWO, 4.0), (ONE, 1.0))  # with a temperature
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


pytestmark = pytest.mark.slow  # two minutes of compiling; test_teachers.py is always run
float64 = pytest.mark.usefixtures("_float64")


def example(case, students=2, teachers=2, seed=0):
    """Logits of students (S, B, K) and of teachers (T, B, K), and classes (B,)."""
    generator = np.random.default_rng(seed)
    batch, classes = (1, 7) if case == "one example" else (6, 2 if case == "two classes" else 7)
    own = 3 * generator.normal(size=(students, batch, classes))
    taught = 3 * generator.normal(size=(teachers, batch, classes))
    if case == "identical":
        own, taught = np.ones_like(own) * own[0], np.ones_like(taught) * own[0]
    if case == "huge":
        own, taught = 1e4 * own, 1e4 * taught
    return own, taught, generator.integers(0, classes, batch)


def maps(generator, batch, *sizes):
    """Maps (B, H, W, C) of such (side, channels)."""
    return [generator.normal(size=(batch, side, side, channels)) for side, channels in sizes]


def outputs_of(logits, features=(), pooled=None):
    pooled = [jnp.zeros((logits.shape[1], 1, 1, 1))] * len(logits) if pooled is None else pooled
    return Outputs(jnp.asarray(logits), tuple(map(tuple, features)), tuple(pooled), jnp.zeros((1, 1, 1, 1)))


def batch_of(classes, logits, maps=None, epoch=0.0, key=None, method=None):
    maps = maps or [()] * len(logits)
    pairs = zip(logits, maps, strict=True)
    teachers = tuple(TeacherOutputs(jnp.asarray(z), tuple(m), method or {}) for z, m in pairs)
    return Batch(jnp.asarray(classes), jnp.asarray(epoch), key, teachers)


def in_torch(tree):
    torch = pytest.importorskip("torch")
    return jax.tree.map(
        lambda x: torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True), tree
    )


def torch_gradients(value, tree):
    import torch

    leaves, structure = jax.tree.flatten(tree)
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(found, leaves, strict=True)
    return jax.tree.unflatten(structure, [np.zeros(x.shape) if g is None else g.numpy() for g, x in pairs])


def compare(ours, reference, *examples, relative=1e-9):
    """Value and gradients in the arrays of a tree, given the classes, against PyTorch's."""
    compiled = jax.jit(jax.value_and_grad(ours))
    for tree, classes in examples:
        value, gradients = compiled(jax.tree.map(jnp.asarray, tree), classes)
        leaves = in_torch(tree)
        expected = reference(leaves, classes)
        near = {"rtol": relative, "atol": 1e-9 * max(1.0, abs(expected.item()))}
        np.testing.assert_allclose(value, expected.item(), **near)
        same = lambda found, want: np.testing.assert_allclose(found, want, **near)  # noqa: B023
        jax.tree.map(same, gradients, torch_gradients(expected, leaves))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def torch_kd(z, t, temperature):
    """T^2 KL, batchmean (docs/reference/kd_losses.md#kl), with log_softmax on both sides."""
    import torch.nn.functional as tf

    log_p, log_q = tf.log_softmax(t.detach() / temperature, 1), tf.log_softmax(z / temperature, 1)
    return tf.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


# --- EKD ----------------------------------------------------------------------------------------


def ekd_example(case):
    """Branch 1's map is as large as its teacher's, branch 2's is not."""
    own, taught, classes = example(case)
    generator = np.random.default_rng(1)
    sizes = {"student1": (3, 6), "student2": (5, 4)}
    tree = {
        "logits": own,
        "taught": taught,
        "pooled": maps(generator, len(classes), (2, 3), (4, 5)),
        "maps": [maps(generator, len(classes), (8, 2), (2, 6)), maps(generator, len(classes), (2, 4))],
        "layers": {
            name: {"kernel": generator.normal(size=size), "bias": generator.normal(size=size[1])}
            for name, size in sizes.items()
        },
    }
    return tree, classes


def ekd_loss(method, tree, classes):
    outputs = outputs_of(tree["logits"], pooled=tree["pooled"])
    batch = batch_of(classes, tree["taught"], tree["maps"])
    return method.apply({"params": {"projection": tree["layers"]}}, outputs, batch)[0]


@float64
@pytest.mark.parametrize(("cases", "temperature"), CASES)
def test_ekd(cases, temperature):
    torch = pytest.importorskip("torch")
    tf = torch.nn.functional
    weights = {"ce_weight": 0.7, "kd_weight": 0.8, "feature_weight": 0.3, "mean_weight": 0.2}
    method = METHODS["ekd"](temperature=temperature, **weights)

    def reference(tree, classes):
        y, loss = torch.tensor(classes), 0.0
        first, second = tree["layers"]["student1"], tree["layers"]["student2"]
        images = tree["pooled"][0].permute(0, 3, 1, 2)
        projected = tf.conv2d(images, first["kernel"].T[:, :, None, None], first["bias"])
        target = tree["maps"][0][-1].permute(0, 3, 1, 2).detach()
        features = tf.mse_loss(projected, target)
        projected = tf.linear(tree["pooled"][1].mean((1, 2)), second["kernel"].T, second["bias"])
        features = features + tf.mse_loss(projected, tree["maps"][1][-1].mean((1, 2)).detach())
        for z, t in zip(tree["logits"], tree["taught"], strict=True):
            loss = loss + 0.7 * tf.cross_entropy(z, y) + 0.8 * torch_kd(z, t, temperature)
        mean = tree["logits"].mean(0)
        pull = torch_kd(mean, tree["taught"].mean(0), temperature)
        return loss + tf.cross_entropy(mean, y) + 0.3 * features + 0.2 * pull

    compare(functools.partial(ekd_loss, method), reference, *map(ekd_example, cases))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({}, {"logits", "pooled", "layers"}), ({"feature_weight": 0.0}, {"logits"})],
)
def test_what_ekd_trains(weights, expected):
    tree, classes = ekd_example("random")
    gradient = jax.jit(jax.grad(functools.partial(ekd_loss, METHODS["ekd"](**weights))))
    assert reached(gradient(tree, classes)) == expected


def reached(gradients):
    """Names of the parts that a gradient reaches."""
    moved = lambda tree: any(np.any(leaf != 0) for leaf in jax.tree.leaves(tree))
    return {name for name, tree in gradients.items() if moved(tree)}


def test_an_ekd_ensemble_is_the_mean_of_its_branches():
    own, _, _ = example("random", students=3)
    found = METHODS["ekd"]().apply({}, outputs_of(own), method="ensemble_logits")
    np.testing.assert_allclose(found, own.mean(0), rtol=1e-5)


# --- DCKD ---------------------------------------------------------------------------------------


def dckd_example(case, students=3):
    own, taught, classes = example(case, students)
    return {"logits": own, "taught": taught}, classes


@float64
@pytest.mark.parametrize(
    ("cases", "temperature", "students"), [*((*case, 3) for case in CASES), (("random",), 4.0, 1)]
)
def test_dckd(cases, temperature, students):
    torch = pytest.importorskip("torch")
    tf = torch.nn.functional
    knobs = {"ce_weight": 0.3, "teacher_weight": 0.6, "peers_weight": 0.7}
    method = METHODS["dckd"](temperature=temperature, rampup_epochs=10.0, **knobs)
    ramp = np.exp(-5 * (1 - 4 / 10) ** 2)  # of 4 whole epochs

    def ours(tree, classes):
        batch = batch_of(classes, tree["taught"], epoch=4.9)
        return method.apply({}, outputs_of(tree["logits"]), batch)[0]

    def reference(tree, classes):
        y, loss = torch.tensor(classes), 0.0
        for i, z in enumerate(tree["logits"]):
            loss = loss + 0.3 * tf.cross_entropy(z, y)
            loss = loss + 0.6 * torch_kd(z, tree["taught"].mean(0), temperature)
            peers = [p for j, p in enumerate(tree["logits"].detach()) if j != i]
            if peers:
                q = torch.stack([tf.softmax(p / temperature, 1) for p in peers]).mean(0)
                kl = tf.kl_div(tf.log_softmax(z / temperature, 1), q, reduction="batchmean")
                loss = loss + 0.7 * ramp * temperature**2 * kl
        return loss

    compare(ours, reference, *(dckd_example(case, students) for case in cases))


@float64
@pytest.mark.parametrize(("cases", "temperature"), CASES)
def test_what_peers_say_of_other_classes(cases, temperature):
    """others_only: KL between the probabilities of all classes but the target, renormalized."""
    torch = pytest.importorskip("torch")
    knobs = {"ce_weight": 0.0, "teacher_weight": 0.0, "peers_weight": 1.0, "rampup_epochs": 0.0}
    method = METHODS["dckd"](temperature=temperature, others_only=True, **knobs)

    def ours(tree, classes):
        return method.apply({}, outputs_of(tree["logits"]), batch_of(classes, tree["taught"]))[0]

    def reference(tree, classes):
        log_p = torch.log_softmax(tree["logits"] / temperature, 2)
        others = torch.ones(log_p.shape[1:], dtype=torch.bool)
        others[torch.arange(len(classes)), torch.tensor(classes)] = False
        loss = 0.0
        for i in range(3):
            log_q = torch.logsumexp(torch.stack([log_p[j].detach() for j in range(3) if j != i]), 0)
            both = [v[others].reshape(len(classes), -1) for v in (log_q, log_p[i])]
            log_q, log_own = (v - torch.logsumexp(v, 1, keepdim=True) for v in both)
            loss = loss + temperature**2 * (log_q.exp() * (log_q - log_own)).sum() / len(classes)
        return loss

    compare(ours, reference, *map(dckd_example, cases), relative=1e-7)


# --- MEAL ---------------------------------------------------------------------------------------


def discriminators(generator, names, sizes, shrink):
    """Random weights; biases that keep some of the last scores above 0."""
    layers = {}
    for name, d in zip(names, sizes, strict=True):
        widths = [d, max(1, d // shrink), max(1, d // shrink**2), 2]
        pairs = enumerate(itertools.pairwise(widths), 1)
        layers[name] = {
            f"linear{i}": {"kernel": generator.normal(size=(a, b)), "bias": generator.uniform(0, 1, b)}
            for i, (a, b) in pairs
        }
    return layers


def torch_discrimination(layers, own, target):
    """discriminator.py and discriminatorLoss of loss.py."""
    import torch
    import torch.nn.functional as tf

    x = torch.cat((own, target.detach()), 0)
    for i in (1, 2, 3):
        x = tf.relu(tf.linear(x, layers[f"linear{i}"]["kernel"].T, layers[f"linear{i}"]["bias"]))
    truth = torch.tensor([[1.0, 0.0]] * len(own) + [[0.0, 1.0]] * len(own), dtype=torch.float64)
    return tf.binary_cross_entropy_with_logits(x, truth)


def torch_soft_ce(z, p):
    import torch.nn.functional as tf

    return -(tf.log_softmax(z, 1) * p.detach()).sum(1).mean()


def meal_example(case, teachers, shrink):
    own, taught, classes = example(case, 2, teachers)
    names = ["student1_tap1", "student2_tap1"]
    if case == "identical":
        own = own + 1e-3  # |x| has no gradient at 0
    layers = discriminators(np.random.default_rng(2), names, [own.shape[-1]] * 2, shrink)
    return {"logits": own, "layers": layers, "taught": taught}, classes


def meal_loss(method, tree, classes):
    params = {"params": {"discriminators": tree["layers"]}}
    return method.apply(params, outputs_of(tree["logits"]), batch_of(classes, tree["taught"]))


@float64
@pytest.mark.parametrize(
    ("cases", "similarity", "adversarial"),
    [
        (ALIKE, "ce", True),
        (ALIKE, "ce", False),
        (ALIKE, "l1", True),
        (ALIKE, "l2", True),
        (TWO, "ce", True),
        (ONE, "ce", True),
    ],
)
def test_meal_on_logits(cases, similarity, adversarial):
    torch = pytest.importorskip("torch")
    tf = torch.nn.functional
    weights = {"similarity_weights": (0.5,), "discriminator_weights": (2.0,)}
    method = METHODS["meal"](similarity=similarity, adversarial=adversarial, **weights)
    compiled = jax.jit(jax.value_and_grad(functools.partial(meal_loss, method), has_aux=True))
    alike = {
        "ce": lambda z, t: torch_soft_ce(z, tf.softmax(t, 1)),
        "l1": lambda z, t: tf.l1_loss(z, t.detach()),
        "l2": lambda z, t: tf.mse_loss(z, t.detach()),
    }[similarity]
    for tree, classes in (meal_example(case, 1, 2) for case in cases):
        (value, terms), gradients = compiled(jax.tree.map(jnp.asarray, tree), classes)
        leaves = in_torch(tree)
        pairs = list(zip(leaves["layers"].values(), leaves["logits"], strict=True))
        same = [alike(z, leaves["taught"][0]) for _, z in pairs]
        told = [torch_discrimination(layers, z, leaves["taught"][0]) for layers, z in pairs]
        near = {"rtol": 1e-9, "atol": 1e-8}
        np.testing.assert_allclose(value, (0.5 * sum(same) + 2 * sum(told)).item(), **near)
        for i in (0, 1):
            found = [
                terms[f"student_{i + 1}/loss_{name}"] for name in ("similarity", "discriminator", "ce")
            ]
            ce = tf.cross_entropy(leaves["logits"][i], torch.tensor(classes))
            np.testing.assert_allclose(found, [same[i].item(), told[i].item(), ce.item()], **near)
        of_same, of_told = torch_gradients(0.5 * sum(same), leaves), torch_gradients(2 * sum(told), leaves)
        sign = -1 if adversarial else 1
        expected = of_same["logits"] + sign * of_told["logits"]
        np.testing.assert_allclose(gradients["logits"], expected, **near)
        for found, want in zip(
            *map(jax.tree.leaves, (gradients["layers"], of_told["layers"])), strict=True
        ):
            np.testing.assert_allclose(found, want, **near)
        assert not gradients["taught"].any()
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@float64
def test_meal_on_all_maps():
    """Maps of other sizes than the teacher's, each tap with a length and weights of its own."""
    torch = pytest.importorskip("torch")
    own, taught, classes = example("random", 1, 1)
    generator = np.random.default_rng(3)
    features, theirs = maps(generator, 6, (8, 3), (3, 5)), maps(generator, 6, (4, 2), (4, 7))
    lengths, gamma, eta = (10, 20), (0.1, 0.2, 1.0), (1.0, 0.5, 2.0)
    names = [f"student1_tap{i}" for i in (1, 2, 3)]
    layers = discriminators(generator, names, [10, 20, 7], 2)
    method = METHODS["meal"](
        taps="all",
        tap_lengths=lengths,
        similarity_weights=gamma,
        discriminator_weights=eta,
        adversarial=False,
    )

    def ours(tree, classes):
        params = {"params": {"discriminators": tree["layers"]}}
        outputs = outputs_of(tree["logits"], [(x,) for x in tree["features"]])
        return method.apply(params, outputs, batch_of(classes, taught, [theirs]))[0]

    def vector(x, length):  # models/vgg.py with pool_out=avg
        images = x.permute(0, 3, 1, 2)
        return torch.nn.AdaptiveAvgPool1d(length)(images.reshape(*images.shape[:2], -1)).mean(1)

    def reference(tree, classes):
        given = [vector(x, n) for x, n in zip(tree["features"], lengths, strict=True)]
        target = [vector(torch.tensor(x), n) for x, n in zip(theirs, lengths, strict=True)]
        taps = zip([*given, tree["logits"][0]], [*target, torch.tensor(taught[0])], strict=True)
        loss = 0.0
        for i, (s, t) in enumerate(taps):
            loss = loss + gamma[i] * torch_soft_ce(s, torch.softmax(t, 1))
            loss = loss + eta[i] * torch_discrimination(tree["layers"][names[i]], s, t)
        return loss

    compare(ours, reference, ({"logits": own, "features": features, "layers": layers}, classes))


@float64
@pytest.mark.parametrize("cases", [ALIKE, TWO, ONE])
def test_meal_v2(cases):
    torch = pytest.importorskip("torch")
    method = METHODS["meal_v2"]()

    def reference(tree, classes):  # extensions/teacher_wrapper.py, loss.py
        target, mean = torch.softmax(tree["taught"], 2).mean(0), tree["taught"].mean(0)
        pairs = zip(tree["layers"].values(), tree["logits"], strict=True)
        return sum(torch_soft_ce(z, target) + torch_discrimination(own, z, mean) for own, z in pairs)

    examples = (meal_example(case, 3, 8) for case in cases)
    compare(lambda *given: meal_loss(method, *given)[0], reference, *examples)


@float64
@pytest.mark.parametrize(("size", "length"), [(12, 5), (5, 12), (9, 9), (1, 4), (64, 3), (7, 1)])
def test_adaptive_pooling(size, length):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(3, size))
    expected = torch.nn.AdaptiveAvgPool1d(length)(torch.tensor(x)[:, None])[:, 0]
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), length), expected, **TOLERANCE)


def test_maps_are_flattened_row_by_row():
    x = np.arange(2 * 3 * 4 * 1.0).reshape(1, 3, 4, 2)
    np.testing.assert_allclose(flatten_map(jnp.asarray(x), 12)[0], x.mean(-1).ravel())


def test_a_reverse_gradient():
    value, gradient = jax.value_and_grad(lambda x: (reverse_gradient(x) ** 2).sum())(jnp.array([1.0, -3.0]))
    assert value == 10
    np.testing.assert_array_equal(gradient, [-2.0, 6.0])


def test_teachers_are_drawn_uniformly():
    """Each of four, over 4,000 steps, as often as the others; and what is drawn is what teaches."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(4000))
    counts = np.bincount(jax.vmap(lambda key: draw_index(key, 4))(keys), minlength=4)
    assert len(counts) == 4
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-square, 3 degrees of freedom, 1 in 1,000
    own, taught, classes = example("random", 1, 4)
    layers = discriminators(np.random.default_rng(0), ["student1_tap1"], [7], 2)
    params = {"params": {"discriminators": layers}}
    apply = jax.jit(lambda batch: METHODS["meal"]().apply(params, outputs_of(own), batch)[0])
    for key in keys[:6]:
        alone = taught[int(draw_index(key, 4))][None]
        mixed = apply(batch_of(classes, taught, key=key))
        np.testing.assert_allclose(mixed, apply(batch_of(classes, alone, key=key)), rtol=1e-6)


def test_learning_rates_of_discriminators():
    assert METHODS["meal"]().learning_rate_scales == {"discriminators": 0.01}
    assert METHODS["meal_v2"]().learning_rate_scales == {"discriminators": 1.0}
    config = tiny_config("meal", method__teachers=("x",), method__discriminator_learning_rate_scale=0.5)
    assert build_method(config).learning_rate_scales == {"discriminators": 0.5}


# --- SRM ----------------------------------------------------------------------------------------


def torch_codes(x, codewords, kept=None):
    """Layers.py: sigmoid(W^T x + b), with all below the `kept`-th set to 0."""
    import torch

    k = torch.sigmoid(x @ codewords["centers"] + codewords["bias"])
    if kept is None:
        return k
    least = torch.topk(k, kept, dim=-1)[0][..., -1:]
    return k * (k >= least)


def codewords(generator, *sizes):
    return {
        f"stage{i}": {"centers": generator.normal(size=(d, k)), "bias": generator.normal(size=1)}
        for i, (d, k) in enumerate(sizes, 1)
    }


@float64
@pytest.mark.parametrize(
    ("share", "kept", "batch"), [(0.02, (1, 1), 5), (0.4, (2, 4), 1), (1.0, (6, 10), 2)]
)
def test_srm_dictionaries(share, kept, batch):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    tree = {
        "maps": maps(generator, batch, (4, 3), (2, 5)),
        "dictionaries": codewords(generator, (3, 6), (5, 10)),
    }
    method = METHODS["srm_dictionaries"](codeword_multiplier=2.0, sparsity_multiplier=share)
    classes, logits = np.zeros(batch, int), np.zeros((1, batch, 7))

    def ours(tree, classes):
        params = {"params": {"dictionaries": tree["dictionaries"]}}
        outputs = outputs_of(logits, [(x,) for x in tree["maps"]])
        return method.apply(params, outputs, batch_of(classes, []))[0]

    def reference(tree, classes):
        loss = 0.0
        for x, name, s in zip(tree["maps"], ("stage1", "stage2"), kept, strict=True):
            k = torch_codes(x, tree["dictionaries"][name], s)
            loss = loss + torch.nn.functional.mse_loss(k @ tree["dictionaries"][name]["centers"].T, x)
        return loss

    compare(ours, reference, (tree, classes))


@float64
@pytest.mark.parametrize(
    ("labels", "batch"), [("global-local", 1), ("global-local", 5), ("global", 2), ("local", 2)]
)
def test_srm_initialize(labels, batch):
    """Two students of two maps; the teacher has one more before them."""
    torch = pytest.importorskip("torch")
    tf = torch.nn.functional
    generator = np.random.default_rng(0)
    theirs = maps(generator, batch, (8, 2), (4, 3), (2, 5))
    dictionaries = codewords(generator, (2, 4), (3, 6), (5, 10))
    layers = {
        f"student{s}_stage{b}": codewords(generator, (d, k))["stage1"]
        for s, widths in ((1, (2, 4)), (2, (1, 2)))
        for b, (d, k) in enumerate(zip(widths, (6, 10), strict=True), 1)
    }
    features = [maps(generator, batch, (4, 2), (4, 1)), maps(generator, batch, (2, 4), (2, 2))]
    method = METHODS["srm_initialize"](labels=labels, sparsity_multiplier=0.4)
    classes, logits = np.zeros(batch, int), np.zeros((2, batch, 7))

    def ours(tree, classes):
        params = {"params": {"similarity_layers": tree["layers"]}}
        outputs = outputs_of(logits, tree["features"])
        learned = {"dictionaries": tree["dictionaries"]}
        batch = batch_of(classes, logits[:1], [tree["theirs"]], method=learned)
        return method.apply(params, outputs, batch)[0]

    def reference(tree, classes):
        loss = 0.0
        for b, kept in ((1, 2), (2, 4)):
            code = torch_codes(tree["theirs"][b], tree["dictionaries"][f"stage{b + 1}"], kept).detach()
            for s in (1, 2):
                k = torch_codes(tree["features"][b - 1][s - 1], tree["layers"][f"student{s}_stage{b}"])
                if "global" in labels:
                    loss = loss + tf.binary_cross_entropy(k.mean((1, 2)), code.mean((1, 2)))
                if "local" in labels:
                    loss = loss + tf.cross_entropy(k.permute(0, 3, 1, 2), code.argmax(-1))
        return loss

    tree = {"features": features, "layers": layers, "theirs": theirs, "dictionaries": dictionaries}
    compare(ours, reference, (tree, classes))


def test_sparse_codes_are_finite():
    """Sigmoids that are 0 or 1 in float32: value and gradient of reconstruction and BCE."""
    generator = np.random.default_rng(0)
    words = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), codewords(generator, (4, 8))["stage1"])

    def loss(x, words):
        k = similarity(x, words)
        code = sparsify(k, 0.3)
        return binary_cross_entropy(k.mean((1, 2)), code.mean((1, 2))) + (code @ words["centers"].T).sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for size in (0.0, 1e-4, 1.0, 1e4):
        found = compiled(jnp.asarray(size * generator.normal(size=(2, 3, 3, 4)), jnp.float32), words)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    edges = jnp.array([0.0, 1.0, 0.0, 1.0])
    found = jax.jit(jax.value_and_grad(binary_cross_entropy))(edges, jnp.array([0.0, 1.0, 1.0, 0.0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_a_code_keeps_its_greatest_entries():
    k = jnp.array([0.1, 0.9, 0.5, 0.3, 0.9])
    np.testing.assert_allclose(sparsify(k, 0.01), [0, 0.9, 0, 0, 0.9])  # both: they are equal
    np.testing.assert_allclose(sparsify(k, 0.6), [0, 0.9, 0.5, 0, 0.9])
    np.testing.assert_allclose(sparsify(k, 1.0), k)


# --- teachers, and all methods as runs use them --------------------------------------------------


def teacher_folder(
    path, model="resnet8", width=1, classes=10, shape=SHAPE, seed=7, mean=(0.3,), std=(0.4,)
):
    """Write the directory of a student with random weights, which trained nothing."""
    config = tiny_config("baseline", model__name=model, model__students=(width,))
    networks = build_networks(config, classes, shape)
    variables = networks.ensemble.student_variables(networks.trace.init(seed), 1)
    description = StudentDescription(
        network=NetworkDescription(
            name=model,
            widths=tuple(str(w) for w in networks.ensemble.widths[0]),
            num_classes=classes,
            input_shape=shape,
            dtype="float32",
            options={"dropout": -1.0, "stochastic_depth": -1.0, "padding": "", "batch_norm_epsilon": 1e-5},
        ),
        student=1,
        parameters=count_parameters(variables["params"]),
        macs=networks.trace.cost(1).macs,
        class_names=DIGITS.class_names if classes == 10 else tuple(map(str, range(classes))),
        preprocessing=Preprocessing(mean, std),
        provenance=Provenance("digits"),
    )
    write_student(path, LoadedStudent(description, variables))
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teacher_folder(tmp_path_factory.mktemp("teachers") / "teacher")


BFLOAT16 = {"train__dtype": "bfloat16"}
RUNS = {
    "ekd": BFLOAT16,
    "dckd": {},
    "meal": {"method__taps": "all", "method__tap_lengths": (30,), **BFLOAT16},
    "meal_v2": {},
    "srm_dictionaries": BFLOAT16,
    "srm_initialize": BFLOAT16,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_every_method(name, teacher):
    """Traced, not compiled: the state keeps its shapes and dtypes, and what learns is as it should be."""
    changes = {"model__students": (1, 0.5), **RUNS[name]}
    sources = {"srm_dictionaries": 0, "srm_initialize": 1}.get(name, 2)
    if sources:
        changes["method__teachers"] = (teacher,) * sources
    config = tiny_config(name, **changes)
    networks = build_networks(config, 10, SHAPE)
    method = networks.method
    assert method.teacher_sources == (teacher,) * sources
    taught = [load_teacher(source, pathlib.Path()).shapes() for source in method.teacher_sources]
    if name == "srm_initialize":
        dictionaries = codewords(np.random.default_rng(0), (16, 32), (32, 64), (64, 128))
        taught = [dataclasses.replace(taught[0], method={"dictionaries": dictionaries})]
    optimizer = make_optimizer(config, networks.method, 10)
    state = init_state(networks, optimizer, 0, taught)
    _, batch = batch_shapes(networks, taught)
    images = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
    step = make_step(networks, optimizer)
    after, metrics = jax.eval_shape(step, state, images, batch.labels, batch.key, batch.teachers)
    same = lambda a, b: (a.shape, a.dtype) == (np.shape(b), np.asarray(b).dtype)
    assert jax.tree.all(jax.tree.map(same, after, state))
    assert all(metric.shape == () for metric in metrics.values())
    assert {"loss", "student_1/top1", "ensemble/top1"} <= metrics.keys()
    own = {
        "ekd": {"projection"},
        "meal": {"discriminators"},
        "meal_v2": {"discriminators"},
        "srm_dictionaries": {"dictionaries"},
        "srm_initialize": {"similarity_layers"},
    }
    assert state.params["method"].keys() == own.get(name, set())
    assert set(method.learning_rate_scales) <= state.params["method"].keys()
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf)]
    learned = state.params["method"] if name == "srm_dictionaries" else state.params
    assert len(moments) == len(jax.tree.leaves(learned))


def test_teachers_are_frozen(teacher, tmp_path):
    """Three steps of KD: a teacher's weights stay the same to the bit, are in no state, and no gradient
    reaches them; what it says does not depend on the step."""
    config = tiny_config("kd", method__teachers=(teacher,), model__students=(0.5,), data__mean=(0.1,))
    networks = build_networks(config, 10, SHAPE)
    loaded = load_teacher(teacher, tmp_path)
    before = jax.tree.map(np.copy, loaded.variables)
    optimizer = make_optimizer(config, networks.method, 10)
    state = init_state(networks, optimizer, 0, [loaded.shapes()])
    teach, step = make_teach([loaded], config.data), make_step(networks, optimizer)
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.normal(size=(16, *SHAPE)), jnp.float32)
    labels = jnp.asarray(generator.integers(0, 10, 16))

    def taught_step(state, frozen):
        given = teach(frozen, images, jnp.arange(16))
        state, metrics = step(state, images, labels, None, given)
        return metrics["loss"], (state, given[0].logits)

    trained = jax.jit(jax.value_and_grad(taught_step, argnums=1, has_aux=True))
    frozen, said = jax.device_put({"teachers": [loaded.frozen]}), []
    for _ in range(3):
        (_, (state, logits)), gradients = trained(state, frozen)
        said.append(np.asarray(logits))
        assert not any(np.any(g) for g in jax.tree.leaves(gradients))
    jax.tree.map(np.testing.assert_array_equal, frozen["teachers"][0]["variables"], before)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, before)
    np.testing.assert_array_equal(said[0], said[2])
    assert state.params.keys() == {"base", "students", "method"}
    assert len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(networks.trace.init(None)["params"]))
    # its own normalization, whatever the run's
    student = load_student(teacher)
    raw = images * config.data.std[0] + config.data.mean[0]
    expected = student.network.logits(student.variables, (raw - 0.3) / 0.4)
    np.testing.assert_allclose(said[0], expected, atol=1e-4)


def run_folder(path, config, complete=True):
    """Write the directory of a run whose students trained nothing."""
    setup = prepare(config, one_device(), path)
    path.mkdir()
    workdir.claim(path, config)
    workdir.write_description(path, setup.description)
    state = init_state(setup.networks, setup.optimizer, 3, setup.taught)
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        checkpoints.save(state, {"epoch": 0.0, "log": {}, "evaluated_on": "test"}, None)
        checkpoints.wait()
    if complete:
        (path / "summary.json").write_text("{}")
    return str(path)


@pytest.fixture(scope="module")
def ensemble_run(tmp_path_factory):
    """Return the directory of a complete run with students of width 1 and .5."""
    return run_folder(tmp_path_factory.mktemp("finished") / "run", tiny_config())


def refuse(*args, **kwargs):
    raise AssertionError("this must not be reached")


def folder_of_an_unfinished_run(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    return str(path)


PROBLEMS = {
    "empty": (lambda path: (), "method.teachers is empty"),
    "missing": (lambda path: (str(path / "nowhere"),), "there is no directory .*nowhere"),
    "unfinished": (
        lambda path: (folder_of_an_unfinished_run(path / "run"),),
        "neither a student's directory nor that of a complete run",
    ),
    "classes": (
        lambda path: (teacher_folder(path / "t", classes=7),),
        "the data has the classes 'zero', .* does not have",
    ),
    "images": (
        lambda path: (teacher_folder(path / "t", shape=(16, 16, 1)),),
        "images 16x16x1, the data has 8x8x1",
    ),
}


@pytest.mark.parametrize("name", ["kd", "meal", "srm"])  # as each of them asks for teachers
@pytest.mark.parametrize("problem", PROBLEMS)
def test_unfit_teachers(name, problem, tmp_path, monkeypatch):
    """One error before anything is compiled, computed or written."""
    make, message = PROBLEMS[problem]
    teachers = make(tmp_path)
    config = tiny_config(name, model__students=(0.5,), method__teachers=teachers)
    monkeypatch.setattr(single, "_train", refuse)
    monkeypatch.setattr(resident, "read_pixels", refuse)
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(UserError, match=message):
        plans.run(config, tmp_path / "run2", one_device())
    assert not (tmp_path / "run2").exists()


def prepared(name, tmp_path, **changes):
    """What a run does before it compiles."""
    return prepare(tiny_config(name, **changes), one_device(), tmp_path)


def test_what_methods_want_of_teachers(teacher, tmp_path, ensemble_run):
    ensemble = ensemble_run
    cases = [
        ("ekd", {"model__students": (1, 0.5), "method__teachers": (teacher,)}, "names 1, .* asks for 2"),
        ("ekd", {"model__students": (1,), "method__teachers": (ensemble,)}, "number 1 is an ensemble"),
        ("meal", {"method__teachers": (ensemble,), "method__taps": "all"}, "teacher 1 has 0 maps"),
        (
            "meal",
            {"method__teachers": (teacher,), "method__similarity_weights": (1.0, 2.0)},
            "similarity_weights has 2 values: give one, or 1",
        ),
        ("srm_initialize", {"method__teachers": (teacher,)}, "one finished run of srm_dictionaries"),
    ]
    for name, changes, message in cases:
        with pytest.raises(UserError, match=message):
            prepared(name, tmp_path, **changes)
    # without maps an ensemble will do
    fits = {"model__students": (1,), "method__teachers": (ensemble,), "method__feature_weight": 0.0}
    assert prepared("ekd", tmp_path, **fits).taught[0].maps == ()
    one = prepared("ekd", tmp_path, model__students=(1,), method__teachers=(f"{ensemble}:2",))
    assert [m.shape[-1] for m in one.taught[0].maps] == [8, 16, 32]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ekd", {"feature_weight": -1.0}, "not be negative"),
        ("dckd", {"rampup_epochs": -1.0}, "not be negative"),
        ("dckd", {"average": "logit"}, "be one of logits, probabilities; did you mean 'logits'?"),
        ("meal", {"taps": "some"}, "be one of logits, all"),
        ("meal", {"similarity": "kl"}, "be one of ce, l1, l2; did you mean 'l1'?"),
        ("meal", {"tap_lengths": ()}, "not be empty or negative"),
        ("meal", {"discriminator_weights": (-1.0,)}, "not be empty or negative"),
        ("meal_v2", {"discriminator_learning_rate_scale": -1.0}, "not be negative"),
        ("srm", {"labels": "globl"}, "be one of global-local, global, local; did you mean 'global'?"),
        ("srm", {"dictionary_epochs": 0.0}, "be above 0"),
        ("srm_dictionaries", {"sparsity_multiplier": 0.0}, "be above 0"),
        ("blockwise", {"budget": 1.0}, "be above 0 and below 1"),
        ("blockwise", {"cost": "flops"}, "be one of macs, parameters"),
        ("ensemble_distillation", {"members": 0}, "be above 0"),
    ],
)
def test_impossible_knobs(name, changes, message):
    with pytest.raises(UserError) as error:
        METHODS[name](**changes)
    ((knob, value),) = changes.items()
    assert str(error.value) == f"method.{knob}={value!r} must {message}"


# --- whole runs -----------------------------------------------------------------------------------


def test_a_teacher_that_changed_stops_a_resumed_run(tmp_path, monkeypatch):
    """Nothing is compiled; with the old weights in their place again the run would resume."""
    source = teacher_folder(tmp_path / "teacher")
    config = tiny_config("meal", model__students=(0.5,), method__teachers=(source,))
    path = tmp_path / "run"
    run_folder(path, config, complete=False)
    old = (tmp_path / "teacher").rename(tmp_path / "old")
    teacher_folder(tmp_path / "teacher", seed=8)
    monkeypatch.setattr(single, "_train", refuse)
    with pytest.raises(UserError, match="are not those that the run in .* started with"):
        single.run(config, path, one_device())
    (tmp_path / "teacher").rename(tmp_path / "new")
    old.rename(tmp_path / "teacher")
    with pytest.raises(AssertionError, match="must not be reached"):
        single.run(config, path, one_device())


def srm_config(teacher, **changes):
    knobs = {
        "dictionary_epochs": 3.0,
        "dictionary_batch_size": 40,
        "initialize_epochs": 1.0,
        "initialize_batch_size": 56,
    }
    settings = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e-30, "train__epochs": 0.5}
    return tiny_config(
        "srm",
        **{"model__students": (0.5,), "method__teachers": (teacher,), **settings, **changes},
        **{f"method__{name}": value for name, value in knobs.items()},
    )


@pytest.mark.slow
def test_srm_goes_through_its_runs(teacher, tmp_path):
    """Dictionaries of the frozen teacher; a student that learns its codes; then that student learns more."""
    path = tmp_path / "run"
    config = srm_config(teacher)
    said = dry_run(config, path)
    assert "run 1 of 3, dictionaries" in said
    assert "run 3 of 3" in said
    assert not path.exists()
    summary = plans.run(config, path, one_device())
    files = {p: p.stat().st_mtime_ns for p in path.rglob("*.json")}
    assert plans.run(config, path, one_device()) == summary
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*.json")} == files

    first, second, last = (load_run(path / p) for p in ("earlier/dictionaries", "earlier/initialize", ""))
    one, two, three = (run.checkpoint.variables for run in (first, second, last))
    jax.tree.map(
        np.testing.assert_array_equal,
        first.networks.ensemble.student_variables(one, 1),
        load_student(teacher).variables,
    )
    learned = one["params"]["method"]["dictionaries"]
    assert [learned[f"stage{i}"]["centers"].shape for i in (1, 2, 3)] == [(16, 32), (32, 64), (64, 128)]
    assert first.config.data.mean == (0.3,)
    name = "student_1/loss_reconstruction"
    reconstruction = [r[name] for r in read_metrics(path / "earlier/dictionaries") if name in r]
    assert reconstruction[-1] < reconstruction[0]
    np.testing.assert_allclose(first.config.optimizer.milestones, (0.1, 0.7))
    np.testing.assert_allclose(second.config.optimizer.milestones, (30 / 160, 130 / 160))
    layers = two["params"]["method"]["similarity_layers"]
    assert layers["student1_stage3"]["centers"].shape == (32, 128)
    # the last run starts from the second's student, and at this rate stays there
    assert three["params"]["method"] == {}
    jax.tree.map(np.testing.assert_array_equal, three["params"]["students"], two["params"]["students"])
    began = second.networks.trace.init(0)["params"]["students"]["1"]["stage3"]
    now = two["params"]["students"]["1"]["stage3"]
    assert all(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (began, now)), strict=True))


def test_what_srm_wants(teacher, tmp_path, ensemble_run):
    narrow = teacher_folder(tmp_path / "vgg", "vgg8")
    cases = [
        ({"model__students": (1, 0.5)}, teacher, "one student from one teacher, not 2 from 1"),
        ({"model__students": 5}, teacher, "not 5 from 1"),
        ({}, narrow, "must agree in height and width"),
        ({}, ensemble_run, "has 2 students: take one of them"),
    ]
    for changes, source, message in cases:
        with pytest.raises(UserError, match=message):
            plans.runs(srm_config(source, **changes), tmp_path / "run")
    two = srm_config(teacher, method__teachers=(teacher, teacher))
    with pytest.raises(UserError, match="not 1 from 2"):
        plans.runs(two, tmp_path / "run")


def test_the_one_network_of_a_teacher(teacher, ensemble_run):
    """As its student.json describes it; and for a student of a run as the extracted student's would."""
    assert network_of(teacher, pathlib.Path())[0].widths == ("1", "1", "1")
    network, preprocessing, _ = network_of(f"{ensemble_run}:2", pathlib.Path())
    assert network.widths == ("1/2",) * 3
    assert network.name == "resnet8"
    assert (preprocessing.mean, preprocessing.std) == ((0.0,), (1.0,))
    first = next(iter(plans.runs(srm_config(f"{ensemble_run}:2"), pathlib.Path("run")).values()))
    assert first.model.students == (("1/2", "1/2", "1/2"),)
    assert first.model.initial_weights == f"{ensemble_run}:2"
    with pytest.raises(UserError, match="has students 1 to 2"):
        network_of(f"{ensemble_run}:3", pathlib.Path())
