"""KD losses, and the methods that are little more: KD and DML; against PyTorch and formulas, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.methods import METHODS, losses
from ekd_jax.methods.base import Batch, TeacherOutputs
from ekd_jax.methods.distilling import WithKDLoss, average_teachers, linear_warm_up
from ekd_jax.models.ensemble import Outputs
from ekd_jax.runs.state import init_state, init_variables, method_variables, network_variables
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.step import make_step

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
CASES = ("random", "two classes", "one example", "identical", "huge")
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
SHAPE = (8, 8, 1)


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


float64 = pytest.mark.usefixtures("_float64")


def example(case, seed=0):
    """Logits (B, K) of a student and of a teacher, and the classes (B,)."""
    generator = np.random.default_rng(seed)
    batch, classes = (1, 7) if case == "one example" else (6, 2 if case == "two classes" else 7)
    student, teacher = 3 * generator.normal(size=(2, batch, classes))
    if case == "identical":
        teacher = student.copy()
    if case == "huge":
        student, teacher = 1e4 * student, 1e4 * teacher
    return student, teacher, generator.integers(0, classes, batch)


def by_torch(function, *arrays):
    """Value and gradients in every array."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(np.array(a), dtype=torch.float64, requires_grad=True) for a in arrays]
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.item(), [
        np.zeros(a.shape) if g is None else g.numpy() for a, g in zip(arrays, gradients, strict=True)
    ]


def assert_equal(found, expected, tolerance=TOLERANCE):
    """Values and gradients."""
    np.testing.assert_allclose(found[0], expected[0], **tolerance)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(gradient, wanted, **tolerance)


def standardized_kl(student, teacher, temperature):
    return losses.knowledge_distillation(
        losses.standardize(student), losses.standardize(teacher), temperature
    )


def compiled(loss):
    """Value and gradients in the logits of student and teacher; compiled once a shape, not once a T."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


DKD, DIST, LSKD = map(
    compiled, (losses.decoupled_distillation, losses.correlation_distillation, standardized_kl)
)


# --- the losses as their authors write them ----------------------------------------------------


def torch_kl(student, teacher, temperature):
    """T^2 KL, batchmean (docs/reference/kd_losses.md#kl)."""
    import torch.nn.functional as tf

    log_q, p = tf.log_softmax(student / temperature, 1), tf.softmax(teacher / temperature, 1)
    return tf.kl_div(log_q, p, reduction="batchmean") * temperature**2


def torch_dkd(student, teacher, classes, temperature, alpha, beta):
    """mdistiller/distillers/DKD.py: masks, and -1000 for the target."""
    import torch
    import torch.nn.functional as tf

    target = torch.zeros_like(student).scatter_(1, torch.tensor(classes)[:, None], 1)

    def two(z):
        p = tf.softmax(z / temperature, 1)
        return torch.cat([(p * target).sum(1, keepdim=True), (p * (1 - target)).sum(1, keepdim=True)], 1)

    of_target = tf.kl_div(torch.log(two(student)), two(teacher), reduction="batchmean")
    p = tf.softmax(teacher / temperature - 1000 * target, 1)
    log_q = tf.log_softmax(student / temperature - 1000 * target, 1)
    of_others = tf.kl_div(log_q, p, reduction="batchmean")
    return temperature**2 * (alpha * of_target + beta * of_others)


def torch_dist(student, teacher, temperature, beta, gamma, epsilon=0.0):
    """vanillaKD/losses/dist.py; there `epsilon` is 1e-8, in Pearson's correlation there is none."""
    import torch.nn.functional as tf

    def relation(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        norms = a.norm(dim=1) * b.norm(dim=1)
        return 1 - ((a * b).sum(1) / (norms + epsilon if epsilon else norms.clamp_min(1e-300))).mean()

    p, t = tf.softmax(student / temperature, 1), tf.softmax(teacher / temperature, 1)
    return temperature**2 * (beta * relation(p, t) + gamma * relation(p.T, t.T))


def torch_standardized(z):
    """logit-standardization-KD/mdistiller/distillers/KD.py."""
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


ORDINARY = [case for case in CASES if case != "huge"]


@float64
@pytest.mark.parametrize("case", ORDINARY)
def test_decoupled_distillation(case):
    student, teacher, classes = example(case)
    for temperature, alpha, beta in itertools.product(TEMPERATURES, (1.0, 0.3), (2.0, 8.0)):
        value, gradients = DKD(student, teacher, classes, temperature, alpha, beta)
        reference = lambda s, knobs=(temperature, alpha, beta): torch_dkd(
            s, s.new_tensor(teacher), classes, *knobs
        )
        assert_equal((value, gradients[:1]), by_torch(reference, student))


@float64
@pytest.mark.parametrize("case", ORDINARY)
def test_correlation_distillation(case):
    student, teacher, _ = example(case)
    for temperature in TEMPERATURES:
        found = DIST(student, teacher, temperature, 2.0, 0.5)
        reference = lambda s, t, *epsilon, temperature=temperature: torch_dist(
            s, t, temperature, 2.0, 0.5, *epsilon
        )
        assert_equal(found, by_torch(reference, student, teacher))
        if temperature <= 4:
            official = by_torch(lambda s, t, loss=reference: loss(s, t, 1e-8), student, teacher)
            assert_equal(found, official, {"rtol": 1e-4, "atol": 1e-4})


@float64
@pytest.mark.parametrize("case", CASES)
def test_standardized_distillation(case):
    student, teacher, _ = example(case)
    for temperature in TEMPERATURES:
        reference = lambda s, t, temperature=temperature: torch_kl(
            torch_standardized(s), torch_standardized(t), temperature
        )
        assert_equal(LSKD(student, teacher, temperature), by_torch(reference, student, teacher))


@float64
def test_standardized():
    z = np.random.default_rng(0).normal(3, 5, (4, 6, 7))
    expected = (z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(losses.standardize(jnp.asarray(z)), expected, **TOLERANCE)
    equal = jnp.full((3, 8), 0.5)
    value, pull = jax.vjp(losses.standardize, equal)
    assert not value.any()
    (gradient,) = pull(jnp.asarray(z[0, :3, :1] + np.eye(3, 8)))
    wanted = by_torch(
        lambda x: (torch_standardized(x) * torch_standardized(x).new_tensor(np.eye(3, 8))).sum(),
        np.asarray(equal),
    )[1][0]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-10)


# --- logits so large that the authors' code gives NaN: formulas in NumPy, in logarithms ---------


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def dkd_by_formula(student, teacher, classes, temperature, alpha, beta):
    """Value and gradient in the student's logits."""
    total, gradient = 0.0, np.zeros_like(student)
    for i, target in enumerate(classes):
        others = np.arange(student.shape[1]) != target
        log_q, log_p = log_softmax(student[i] / temperature), log_softmax(teacher[i] / temperature)
        two_q, two_p = (np.array([v[target], np.logaddexp.reduce(v[others])]) for v in (log_q, log_p))
        rest_q, rest_p = (log_softmax(z[i][others] / temperature) for z in (student, teacher))
        total += alpha * (np.exp(two_p) * (two_p - two_q)).sum()
        total += beta * (np.exp(rest_p) * (rest_p - rest_q)).sum()
        of_two = alpha * (np.exp(two_q) - np.exp(two_p))
        gradient[i, target] = of_two[0]
        gradient[i, others] = of_two[1] * np.exp(rest_q) + beta * (np.exp(rest_q) - np.exp(rest_p))
    return temperature**2 * total / len(classes), temperature * gradient / len(classes)


def dist_by_formula(student, teacher, temperature, beta, gamma):
    """The same; products of tiny probabilities have the wider exponent of long double."""
    p, t = (np.exp(log_softmax(z / temperature)).astype(np.longdouble) for z in (student, teacher))
    total, gradient = 0.0, np.zeros_like(p)
    for axis, weight in ((1, beta), (0, gamma)):
        a, b = (v - v.mean(axis, keepdims=True) for v in (p, t))
        norms = [np.sqrt((v * v).sum(axis, keepdims=True)) for v in (a, b)]
        defined = (norms[0] > 0) & (norms[1] > 0)
        norm_a, norm_b = (np.where(defined, n, 1) for n in norms)
        cosine = (a * b).sum(axis, keepdims=True) / (norm_a * norm_b)
        slope = np.where(defined, (b / norm_b - cosine * a / norm_a) / norm_a, 0)
        total += weight * (1 - cosine).mean()
        gradient -= weight * slope / cosine.size
    gradient = p * (gradient - (p * gradient).sum(1, keepdims=True)) / temperature
    return float(temperature**2 * total), (temperature**2 * gradient).astype(float)


@float64
@pytest.mark.parametrize("case", CASES)
def test_losses_of_huge_logits(case):
    student, teacher, classes = example(case)
    for temperature in TEMPERATURES:
        value, gradients = DKD(student, teacher, classes, temperature, 0.7, 3.0)
        expected, gradient = dkd_by_formula(student, teacher, classes, temperature, 0.7, 3.0)
        assert_equal((value, gradients[:1]), (expected, [gradient]))
        assert np.isfinite(gradients[1]).all()
        value, gradients = DIST(student, teacher, temperature, 2.0, 0.5)
        expected, gradient = dist_by_formula(student, teacher, temperature, 2.0, 0.5)
        assert_equal((value, gradients[:1]), (expected, [gradient]))
        assert np.isfinite(gradients[1]).all()


# --- float32 -------------------------------------------------------------------------------------


@float64
@pytest.mark.parametrize("case", [*CASES, "equal", "equal examples", "one huge"])
def test_float32_is_finite(case):
    """Values and gradients; of ordinary logits they are those of float64."""
    student, teacher, classes = example("one example" if case == "one huge" else case)
    if case == "equal":
        student = np.full_like(student, 3.3)
    if case == "equal examples":
        student[:] = student[0]
    if case == "one huge":
        student, teacher = 1e4 * student, 1e4 * teacher
    given = [[z.astype(dtype) for z in (student, teacher)] for dtype in (np.float32, np.float64)]
    for loss, knobs in ((DKD, (1.0, 2.0)), (DIST, (2.0, 2.0)), (LSKD, ())):
        for temperature in TEMPERATURES:
            arguments = (*([classes] if loss is DKD else []), temperature, *knobs)
            single, double = (loss(*z, *arguments) for z in given)
            for x in jax.tree.leaves(single):
                assert x.dtype == jnp.float32
                assert np.isfinite(x).all()
            if case in ORDINARY:
                assert_equal(single, double, {"rtol": 1e-3, "atol": 1e-5 * max(1, temperature**2)})


@float64
def test_a_class_that_is_never_likely_keeps_its_correlation():
    """Squares of its probabilities underflow in float32."""
    student, teacher, _ = example("random")
    student[:, 0] -= 60
    teacher[:, 0] -= 60
    expected, _ = dist_by_formula(student, teacher, 1.0, 0.0, 1.0)
    for dtype, precision in ((np.float32, 1e-4), (np.float64, 1e-10)):
        value, _ = DIST(student.astype(dtype), teacher.astype(dtype), 1.0, 0.0, 1.0)
        np.testing.assert_allclose(value, expected, rtol=precision)


@float64
@pytest.mark.parametrize("kind", ["equal classes", "equal examples"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_does_not_vary_gives_no_huge_gradient(kind, dtype):
    """Pearson's correlation is not defined there; rounding must not decide."""
    student, teacher, _ = example("random")
    student = np.full_like(student, 3.3) if kind == "equal classes" else np.tile(student[:1], (6, 1))
    for temperature in TEMPERATURES:
        _, gradients = DIST(student.astype(dtype), teacher.astype(dtype), temperature, 1.0, 1.0)
        assert max(np.abs(g).max() for g in gradients) < 2 * max(1, temperature**2)


# --- WithKDLoss ----------------------------------------------------------------------------------


@float64
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("kd_loss", ["kl", "dkd", "dist"])
def test_distil(kd_loss, scale, standardize):
    """Every loss for several students at once, against one teacher or one each, who do not learn."""
    temperature, epoch = 2.5, 7.9
    method = WithKDLoss(
        temperature=temperature, scale_by_temperature=scale, kd_loss=kd_loss, standardize=standardize,
        dkd_alpha=0.7, dkd_beta=3.0, dkd_warmup_epochs=10.0, dist_beta=1.5, dist_gamma=0.5,
    )  # fmt: skip
    generator = np.random.default_rng(1)
    logits, teachers = 3 * generator.normal(size=(2, 3, 6, 7))
    classes = generator.integers(0, 7, 6)
    batch = Batch(jnp.asarray(classes), jnp.asarray(epoch))

    def reference(z, t):
        if standardize:
            z, t = torch_standardized(z), torch_standardized(t)
        factor = 1 if scale else temperature**-2
        match kd_loss:
            case "kl":
                return torch_kl(z, t.detach(), temperature) * factor
            case "dkd":  # the eighth epoch of ten
                return torch_dkd(z, t.detach(), classes, temperature, 0.7, 3.0) * factor * 0.8
            case "dist":  # tau^2 is part of the loss
                return torch_dist(z, t.detach(), temperature, 1.5, 0.5)

    @jax.jit
    def distil(z, t):
        value, pull = jax.vjp(lambda z, t: method.distillation_loss(z, t, batch), z, t)
        return value, pull(jnp.ones(3))

    for given in (teachers, np.broadcast_to(teachers[0], (3, 6, 7))):
        value, gradients = distil(logits, given)
        assert value.shape == (3,)
        assert not gradients[1].any()
        for i in range(3):
            expected, wanted = by_torch(reference, logits[i], given[i])
            np.testing.assert_allclose(value[i], expected, **TOLERANCE)
            np.testing.assert_allclose(gradients[0][i], wanted[0], **TOLERANCE)
    shared = method.distillation_loss(jnp.asarray(logits), jnp.asarray(teachers[0]), batch)
    np.testing.assert_allclose(shared, value, **TOLERANCE)


@float64
def test_classes_of_mixed_labels_are_the_greatest_shares():
    student, teacher, classes = example("random")
    shares = np.full((6, 7), 0.05)
    shares[np.arange(6), classes] = 0.7
    method = WithKDLoss(kd_loss="dkd")
    found = [
        method.distillation_loss(*map(jnp.asarray, (student, teacher)), Batch(labels, jnp.zeros(())))
        for labels in map(jnp.asarray, (classes, shares))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0.0, 0.05), (0.99, 0.05), (1.0, 0.1), (18.5, 0.95), (19.0, 1.0), (500.0, 1.0)]
)
def test_warm_up(epoch, expected):
    """mdistiller counts epochs from 1: min(epoch / 20, 1)."""
    assert float(linear_warm_up(jnp.float32(epoch), 20.0)) == pytest.approx(expected, rel=1e-6)
    assert linear_warm_up(jnp.float32(epoch), 0.0) == 1.0


@float64
@pytest.mark.parametrize("case", CASES)
def test_mean_of_teachers(case):
    logits = np.stack([*example(case)[:2], example(case, 1)[0]])
    mean = average_teachers(jnp.asarray(logits), 1.0, "logits")
    np.testing.assert_allclose(mean, logits.sum(0) / 3, rtol=1e-12)
    for temperature in TEMPERATURES:
        found = np.asarray(average_teachers(jnp.asarray(logits), temperature, "probabilities"))
        assert np.isfinite(found).all()
        p = np.exp(log_softmax(logits / temperature)).mean(0)
        np.testing.assert_allclose(np.exp(log_softmax(found / temperature)), p, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize(
    ("method", "knob", "value", "message"),
    [
        ("kd", "kd_loss", "dks", "be one of kl, dkd, dist; did you mean 'dkd'?"),
        ("kd", "temperature", 0.0, "be above 0"),
        ("kd", "dkd_alpha", -1.0, "not be negative"),
        ("kd", "dkd_warmup_epochs", -1.0, "not be negative"),
        ("kd", "average", "logit", "be one of logits, probabilities; did you mean 'logits'?"),
        ("kd", "kd_weight", -0.1, "not be negative"),
        (
            "dml",
            "target",
            "mean_logit",
            "be one of pairwise, mean_probabilities, mean_logits; did you mean 'mean_logits'?",
        ),
        ("dml", "update", "alternate", "be one of simultaneous, alternating; did you mean 'alternating'?"),
        ("dml", "peer_reduction", "max", "be one of mean, sum; did you mean 'mean'?"),
        ("dml", "dist_gamma", -1.0, "not be negative"),
    ],
)
def test_impossible_knobs(method, knob, value, message):
    with pytest.raises(UserError) as error:
        METHODS[method](**{knob: value})
    assert str(error.value) == f"method.{knob}={value!r} must {message}"


def test_knowledge_distillation_needs_a_teacher():
    with pytest.raises(UserError, match="method.teachers is empty"):
        _ = METHODS["kd"]().teacher_sources
    assert METHODS["kd"](teachers=("a", "b:2")).teacher_sources == ("a", "b:2")


# --- KD ------------------------------------------------------------------------------------------


def outputs_of(logits):
    """Outputs of students of whom only the logits matter."""
    maps = tuple(jnp.zeros((len(logits[0]), 1, 1, 1)) for _ in logits)
    return Outputs(jnp.asarray(logits), (maps,), maps, maps[0])


def torch_ce(z, labels):
    import torch
    import torch.nn.functional as tf

    return tf.cross_entropy(z, torch.tensor(labels))


@float64
@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0])
def test_two_teachers_averaged(average, temperature):
    generator = np.random.default_rng(2)
    logits, teachers = 3 * generator.normal(size=(3, 6, 7)), 3 * generator.normal(size=(2, 6, 7))
    labels = generator.integers(0, 7, 6)
    method = METHODS["kd"](temperature=temperature, average=average, ce_weight=0.3, kd_weight=0.8)

    def ours(z, t):
        batch = Batch(jnp.asarray(labels), jnp.zeros(()), teachers=tuple(map(TeacherOutputs, t)))
        return method.apply({}, outputs_of(z), batch)[0]

    def reference(z, t):
        import torch

        if average == "logits":
            p = torch.softmax(t.detach().mean(0) / temperature, 1)
        else:
            p = torch.softmax(t.detach() / temperature, 2).mean(0)
        kd = sum(
            temperature**2 * (p * (p.log() - torch.log_softmax(s / temperature, 1))).sum(1).mean()
            for s in z
        )
        return 0.3 * sum(torch_ce(s, labels) for s in z) + 0.8 * kd

    found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(logits, teachers)
    assert_equal(found, by_torch(reference, logits, teachers))
    batch = Batch(jnp.asarray(labels), jnp.zeros(()), teachers=tuple(map(TeacherOutputs, teachers)))
    _, terms = method.apply({}, outputs_of(logits), batch)
    assert terms.keys() == {f"student_{i}/loss_{term}" for i in (1, 2, 3) for term in ("ce", "kd")}


def test_defaults_are_the_papers_and_protocols():
    """docs/reference/dml.md and docs/reference/kd.md."""
    kd, dml = METHODS["kd"](), METHODS["dml"]()
    assert (kd.temperature, kd.ce_weight, kd.kd_weight, kd.scale_by_temperature) == (4.0, 0.1, 0.9, True)
    assert (kd.dkd_alpha, kd.dkd_beta, kd.dkd_warmup_epochs, kd.dist_beta, kd.dist_gamma) == (
        1,
        2,
        20,
        2,
        2,
    )
    assert (dml.temperature, dml.target, dml.peer_reduction, dml.update) == (
        1.0, "pairwise", "mean", "simultaneous",
    )  # fmt: skip
    assert (kd.sharing, dml.sharing) == ("none", "none")


# --- DML -----------------------------------------------------------------------------------------


def torch_dml(z, labels, temperature, target, reduction):
    """docs/reference/dml.md#loss."""
    import torch

    total = 0.0
    for k in range(len(z)):
        peers = [z[j].detach() for j in range(len(z)) if j != k]
        if target == "pairwise":
            kd = sum(torch_kl(z[k], peer, temperature) for peer in peers)
            kd = kd / len(peers) if reduction == "mean" else kd
        elif target == "mean_logits":
            kd = torch_kl(z[k], sum(peers) / len(peers), temperature)
        else:
            p = sum(torch.softmax(peer / temperature, 1) for peer in peers) / len(peers)
            log_q = torch.log_softmax(z[k] / temperature, 1)
            kd = temperature**2 * (p * (p.log() - log_q)).sum(1).mean()
        total = total + torch_ce(z[k], labels) + kd
    return total


@float64
@pytest.mark.parametrize(("networks", "temperature"), [(2, 0.5), (4, 1.0), (3, 20.0)])
@pytest.mark.parametrize(
    ("target", "reduction"),
    [("pairwise", "mean"), ("pairwise", "sum"), ("mean_probabilities", "mean"), ("mean_logits", "mean")],
)
def test_mutual_learning(target, reduction, networks, temperature):
    generator = np.random.default_rng(3)
    logits, labels = 3 * generator.normal(size=(networks, 6, 7)), generator.integers(0, 7, 6)
    method = METHODS["dml"](target=target, peer_reduction=reduction, temperature=temperature)
    batch = Batch(jnp.asarray(labels), jnp.zeros(()))
    found = jax.jit(jax.value_and_grad(lambda z: method.apply({}, outputs_of(z), batch)[0]))(logits)
    expected = by_torch(lambda z: torch_dml(z, labels, temperature, target, reduction), logits)
    assert_equal((found[0], [found[1]]), expected)

    names = [f"student_{k}/loss_{term}" for term in ("ce", "kd") for k in range(1, networks + 1)]

    def terms_of(z):
        terms = method.apply({}, outputs_of(z), batch)[1]
        return jnp.stack([terms[name] for name in names])

    reached = np.abs(jax.jit(jax.jacrev(terms_of))(logits)).sum((2, 3)) > 0
    np.testing.assert_array_equal(reached, np.tile(np.eye(networks, dtype=bool), (2, 1)))


def test_equal_networks_and_one_alone_have_nothing_to_learn_from_each_other():
    logits = np.random.default_rng(4).normal(size=(1, 6, 7)).astype(np.float32)
    batch = Batch(jnp.arange(6) % 7, jnp.zeros(()))
    for target in ("pairwise", "mean_probabilities", "mean_logits"):
        for several in (logits, np.repeat(logits, 3, 0)):
            method = METHODS["dml"](target=target)
            loss, terms = jax.jit(lambda z, method=method: method.apply({}, outputs_of(z), batch))(several)
            kd = [float(value) for name, value in terms.items() if name.endswith("loss_kd")]
            ce = [float(value) for name, value in terms.items() if name.endswith("loss_ce")]
            np.testing.assert_allclose(kd, 0, atol=1e-6)
            assert float(loss) == pytest.approx(sum(ce), rel=1e-5)


# --- real networks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    images = generator.normal(size=(16, *SHAPE)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(generator.integers(0, 10, 16))


@pytest.mark.parametrize("name", ["kd", "dml"])
def test_what_a_term_trains(batch, name):
    """The KD loss of student 2 trains student 2 alone; nothing else has parameters."""
    teachers = {"method__teachers": ("unused",)} if name == "kd" else {}
    config = tiny_config(name, model__students=(0.25, 0.25), **teachers)
    networks = build_networks(config, 10, SHAPE)
    teacher = TeacherOutputs(jax.random.normal(jax.random.key(0), (16, 10)))
    variables = init_variables(networks, 0, [teacher])
    assert not jax.tree.leaves([variables["params"]["base"], variables["params"]["method"]])

    def term(params):
        full = variables | {"params": params}
        outputs, _ = networks.ensemble.apply(network_variables(full), batch[0], train=True)
        given = Batch(batch[1], jnp.zeros(()), teachers=(teacher,) if name == "kd" else ())
        return networks.method.apply(method_variables(full), outputs, given)[1]["student_2/loss_kd"]

    found = jax.jit(jax.grad(term))(variables["params"])["students"]
    assert all(np.any(g != 0) for g in jax.tree.leaves(found["2"]))
    assert not any(np.any(g != 0) for g in jax.tree.leaves(found["1"]))


def owner(path):
    """The student that a leaf of the state belongs to, or ""."""
    names = [str(getattr(key, "key", "")) for key in path]
    return names[names.index("students") + 1] if "students" in names else ""


def test_alternating_updates_one_network_a_step(batch):
    """Each in turn, its momentum and statistics included; the others stay as they are to the bit."""
    config = tiny_config("dml", model__students=(0.25, 0.25), method__update="alternating")
    networks = build_networks(config, 10, SHAPE)
    optimizer = make_optimizer(config, networks.method, 100)
    step = jax.jit(make_step(networks, optimizer))
    after = init_state(networks, optimizer, 0)
    for number in range(3):
        before, after = after, step(after, *batch)[0]
        learner, changed = str(number % 2 + 1), set()
        old = jax.tree.leaves(before)
        for (path, leaf), then in zip(jax.tree_util.tree_leaves_with_path(after), old, strict=True):
            if owner(path) not in ("", learner):
                np.testing.assert_array_equal(leaf, then, err_msg=jax.tree_util.keystr(path))
            elif owner(path) and np.any(leaf != then):
                changed.add(path[0].name)
        assert changed == {"params", "batch_stats", "opt_state"}
        assert int(after.step) == number + 1
