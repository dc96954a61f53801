"""Online methods: losses and gradients against formulas written out in PyTorch or NumPy, float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from scipy.optimize import minimize

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.methods import METHODS
from ekd_jax.methods import kdcl as kdcl_module
from ekd_jax.methods.base import Batch
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import trace
from ekd_jax.runs.state import init_variables, method_variables, network_variables

EPOCH = 33.4
CASES = {
    "random": {},
    "identical logits": {"identical": True},
    "huge logits": {"scale": 1e4},
    "two classes, one example": {"batch": 1, "classes": 2},
}
# Everything that has a loss of its own: method and knobs.
KINDS = {
    "one": {},
    "one mean": {"ensemble": "mean", "kd_weight": 0.75, "rampup_epochs": 0.0},
    "okddip": {},
    "okddip detached": {"detach_targets": True},
    "cl_ilr": {"beta": 0.3},
    "ffl": {"kd_weight": 0.75},
    "pcl": {},
    "kdcl naive": {"target": "naive"},
    "kdcl minlogit": {"target": "minlogit", "ce_weight": 0.5},
    "kdcl general": {"target": "general", "kd_weight": 0.5},
    "kdcl mean": {"target": "mean"},
    "byot": {"hint_weight": 0.01},
}
ALIKE = ("one mean", "okddip detached", "kdcl naive", "kdcl mean")  # at the edges, as others
WIDTHS = {"byot": (6,)}  # of students, if not three: it is much to compile


def method_of(kind, **more):
    return METHODS[kind.split()[0]](**KINDS[kind], **more)


def inputs(widths=(6, 6, 4), batch=6, classes=7, scale=1.0, identical=False):
    """Random outputs of students of such widths, and a batch; float64 where that is on."""
    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.normal(size=shape)
    students = len(widths)
    logits = scale * normal(students, batch, classes)
    if identical:
        logits[:] = logits[0]
    maps = lambda size, channels: tuple(np.abs(normal(batch, size, size, c)) for c in channels)
    pooled = maps(2, widths)
    outputs = Outputs(
        logits, (maps(8, (2,) * students), maps(4, (5,) * students), pooled), pooled, normal(batch, 4, 4, 5)
    )
    averaged = outputs.replace(logits_SxBxK=scale * normal(students, batch, classes))
    labels = generator.integers(0, classes, batch)
    as_jax = functools.partial(jax.tree.map, jnp.asarray)
    return as_jax(outputs), Batch(jnp.asarray(labels), jnp.asarray(EPOCH), copy_outputs=(as_jax(averaged),))


def initial(method, outputs, batch):
    """Random parameters, all of them, and initial batch statistics."""
    generator = np.random.default_rng(1)
    variables = trace(method, outputs, batch).init(0, "method")
    params = jax.tree.map(
        lambda x: jnp.asarray(generator.normal(size=x.shape)), variables.get("params", {})
    )
    return params, variables.get("batch_stats", {})


QUICKLY = {"xla_backend_optimization_level": 0}  # compile


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def loss_and_gradients(method, params, stats, outputs, batch):
    """Loss, terms, new statistics; gradients in parameters and outputs."""

    def loss(params, outputs):
        variables = {"params": params, "batch_stats": stats}
        (value, terms), new = method.apply(variables, outputs, batch, mutable=["batch_stats"])
        return value, (terms, new.get("batch_stats", {}))

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, outputs)


# --- the formulas in PyTorch: (torch, method, parameters, outputs, batch) -> loss -----------------


def ramp(method):
    epochs = method.rampup_epochs
    return method.kd_weight * (np.exp(-5 * (1 - 33 / epochs) ** 2) if epochs else 1.0)


def kl(torch, teacher, z, temperature):
    """T^2 KL(teacher || z), mean over the batch; gradients flow into both."""
    a, b = (torch.log_softmax(v / temperature, -1) for v in (teacher, z))
    return temperature**2 * (a.exp() * (a - b)).sum(-1).mean()


def ce(torch, z, batch):
    return torch.nn.functional.cross_entropy(z, torch.tensor(np.array(batch.labels)))


def norm(x, own, axes):
    mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt() * own["scale"] + own["bias"]


def conv_norm(torch, x, own, stride=1, groups=1):
    """On NHWC."""
    kernel = own["conv"]["kernel"].permute(3, 2, 0, 1)
    padding = kernel.shape[-1] // 2
    y = torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2), kernel, stride=stride, padding=padding, groups=groups
    )
    return torch.relu(norm(y.permute(0, 2, 3, 1), own["bn"], (0, 1, 2)))


def linear(x, own):
    return x @ own["kernel"] + own["bias"]


def one(torch, method, params, outputs, batch):
    z = outputs.logits_SxBxK
    if method.ensemble == "gated":
        own = params["gate"]
        scores = norm(linear(outputs.base.mean((1, 2)), own["linear"]), own["bn"], (0,))
        gate = torch.softmax(torch.relu(scores), 1)
        teacher = sum(gate[:, i, None] * zi for i, zi in enumerate(z))
    else:
        teacher = sum(z) / len(z)
    kd = sum(kl(torch, teacher.detach(), zi, method.temperature) for zi in z)
    return sum(ce(torch, zi, batch) for zi in [*z, teacher]) + ramp(method) * kd


def okddip(torch, method, params, outputs, batch):
    *peers, leader = outputs.logits_SxBxK
    features = [x.mean((1, 2)) for x in outputs.pooled[:-1]]
    own = params["attention"]
    query = [h @ own[f"query_{h.shape[-1]}"] for h in features]
    key = [h @ own[f"key_{h.shape[-1]}"] for h in features]
    targets = []
    for q in query:
        attention = torch.softmax(torch.stack([(q * k).sum(-1) for k in key], -1), -1)
        targets.append(sum(attention[:, b, None] * z for b, z in enumerate(peers)))
    pairs = [*zip(targets, peers, strict=True), (sum(peers) / len(peers), leader)]
    if method.detach_targets:
        pairs = [(t.detach(), z) for t, z in pairs]
    kd = sum(kl(torch, t, z, method.temperature) for t, z in pairs)
    return sum(ce(torch, z, batch) for z in outputs.logits_SxBxK) + ramp(method) * kd


def cl_ilr(torch, method, params, outputs, batch):
    z, loss = outputs.logits_SxBxK, 0
    for h in range(len(z)):
        others = sum(z[j].detach() for j in range(len(z)) if j != h) / (len(z) - 1)
        loss += method.beta * ce(torch, z[h], batch)
        loss += (1 - method.beta) * kl(torch, others, z[h], method.temperature)
    return loss


def fused(torch, params, outputs):
    own, x = params["fusion"], torch.cat(list(outputs.pooled), -1)
    x = conv_norm(torch, x, own["depthwise"], groups=x.shape[-1])
    return linear(conv_norm(torch, x, own["pointwise"]).mean((1, 2)), own["linear"])


def ffl(torch, method, params, outputs, batch):
    z, zf = outputs.logits_SxBxK, fused(torch, params, outputs)
    kd = sum(kl(torch, zf.detach(), zi, method.temperature) for zi in z)
    kd = kd + kl(torch, sum(z).detach() / len(z), zf, method.temperature)
    return sum(ce(torch, zi, batch) for zi in [*z, zf]) + ramp(method) * kd


def pcl(torch, method, params, outputs, batch):
    z, averaged = outputs.logits_SxBxK, torch.tensor(np.array(batch.copy_outputs[0].logits_SxBxK))
    features = torch.cat([x.mean((1, 2)) for x in outputs.pooled], -1)
    teacher = linear(features, params["classifier"]["linear"])
    kd = 0
    for i in range(len(z)):
        kd += kl(torch, teacher.detach(), z[i], method.temperature)
        others = [j for j in range(len(z)) if j != i]
        kd += sum(kl(torch, averaged[j], z[i], method.temperature) for j in others) / len(others)
    return sum(ce(torch, zi, batch) for zi in [*z, teacher]) + ramp(method) * kd


def kdcl(torch, method, params, outputs, batch):
    z = outputs.logits_SxBxK
    given = z.detach()
    rows = torch.arange(len(batch.labels))
    labels = torch.tensor(np.array(batch.labels))
    match method.target:
        case "naive":
            target = given[np.argmin([float(ce(torch, zi, batch)) for zi in given])]
        case "minlogit":
            target = torch.stack([zi - zi[rows, labels][:, None] for zi in given]).amin(0)
        case "general":
            errors = torch.softmax(given, -1) - torch.nn.functional.one_hot(labels, given.shape[-1])
            covariance = torch.einsum("ibk,jbk->ij", errors, errors).numpy() / len(labels)
            target = torch.tensordot(torch.tensor(closed_form(covariance)), given, 1)
        case _:
            target = given.mean(0)
    kd = sum(kl(torch, target, zi, method.temperature) for zi in z)
    return method.ce_weight * sum(ce(torch, zi, batch) for zi in z) + method.kd_weight * kd


def byot(torch, method, params, outputs, batch):
    loss, z = 0, outputs.logits_SxBxK
    for s in range(len(z)):
        loss = loss + ce(torch, z[s], batch)
        deepest = outputs.pooled[s].mean((1, 2)).detach()
        for j in (1, 2):
            own, x = params["shallow"][f"student{s + 1}_stage{j}"], outputs.features[j - 1][s]
            for number in range(3 - j):
                x = conv_norm(torch, x, own[f"conv{number + 1}"], stride=2)
            x = conv_norm(torch, x, own["expand"]).mean((1, 2))
            logits = linear(x, own["linear"])
            loss = loss + (1 - method.alpha) * ce(torch, logits, batch)
            loss = loss + method.alpha * kl(torch, z[s].detach(), logits, method.temperature)
            loss = loss + method.hint_weight * ((x - deepest) ** 2).sum()
    return loss


def closed_form(covariance):
    """C^-1 1 without what is negative, of sum 1; C of trace 1 with the ridge."""
    c = covariance / max(np.trace(covariance), 1e-300) + kdcl_module.RIDGE * np.eye(len(covariance))
    weights = np.maximum(np.linalg.inv(c).sum(1), 0)
    return weights / weights.sum()


FORMULAS = {
    "one": one,
    "okddip": okddip,
    "cl_ilr": cl_ilr,
    "ffl": ffl,
    "pcl": pcl,
    "kdcl": kdcl,
    "byot": byot,
}


@pytest.mark.parametrize(
    ("kind", "case"), [(k, c) for k in KINDS for c in CASES if "one" not in c or k not in ALIKE]
)
def test_loss_and_gradients(kind, case):
    """In every parameter of the method and in all that it is given."""
    torch = pytest.importorskip("torch")
    case = CASES[case]
    method = method_of(kind, **({"temperature": 0.5} if "batch" in case else {}))
    with jax.enable_x64(True):
        outputs, batch = inputs(WIDTHS.get(kind, (6, 6, 4)), **case)
        params, stats = initial(method, outputs, batch)
        (found, _), gradients = loss_and_gradients(method, params, stats, outputs, batch)
        leaves, tree = jax.tree.flatten((params, outputs))
        tensors = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in leaves]
        given_params, given = jax.tree.unflatten(tree, tensors)
        loss = FORMULAS[kind.split()[0]](torch, method, given_params, given, batch)
        loss.backward()
    # the gate computes in float32
    near = (
        {"rtol": 1e-4, "atol": 1e-4 * case.get("scale", 1)}
        if kind == "one"
        else {"rtol": 1e-8, "atol": 1e-9}
    )
    np.testing.assert_allclose(float(found), loss.item(), **near)
    for ours, tensor in zip(jax.tree.leaves(gradients), tensors, strict=True):
        expected = np.zeros(ours.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(ours, expected, **near)


@pytest.mark.parametrize("kind", [*(k for k in KINDS if k not in ALIKE), "kdcl linear"])
def test_finite_for_huge_logits(kind):
    """In float32, where a probability underflows."""
    method = METHODS["kdcl"](target="linear") if kind == "kdcl linear" else method_of(kind)
    outputs, batch = inputs(WIDTHS.get(kind, (6, 6, 4)), scale=1e4)
    params, stats = initial(method, outputs, batch)
    (loss, (terms, _)), gradients = loss_and_gradients(method, params, stats, outputs, batch)
    for x in jax.tree.leaves((loss, terms, gradients)):
        assert np.isfinite(x).all()


# --- KDCL's targets ---------------------------------------------------------------------------


convex_weights = jax.jit(kdcl_module.convex_weights)


def cross_entropy_of(weights, logits, labels):
    z = np.tensordot(weights, logits, 1)
    z = z - z.max(-1, keepdims=True)
    return (np.log(np.exp(z).sum(-1)) - z[np.arange(len(labels)), labels]).mean()


def hard_problem(students, scale, seed):
    """Networks of unequal skill."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, 64)
    logits = scale * generator.normal(size=(students, 64, 10))
    logits[:, np.arange(64), labels] += scale * generator.uniform(0, 3, (students, 1))
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_linear_weights_of_two_networks(scale):
    """Against a fine grid; the minimum is inside for some scales and at an end for others."""
    grid = np.linspace(0, 1, 2001)
    for seed in range(3):
        logits, labels = hard_problem(2, scale, seed)
        weights = np.asarray(convex_weights(jnp.asarray(logits), jnp.asarray(labels)), np.float64)
        np.testing.assert_allclose(weights.sum(), 1, atol=1e-5)
        assert (weights >= 0).all()
        values = [cross_entropy_of(np.array([w, 1 - w]), logits.astype(np.float64), labels) for w in grid]
        found = cross_entropy_of(weights / weights.sum(), logits.astype(np.float64), labels)
        assert found <= min(values) * (1 + 1e-5)
        assert abs(weights[0] - grid[np.argmin(values)]) < 2e-3


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_linear_weights_of_four_networks(scale):
    """Against SciPy's SLSQP."""
    logits, labels = hard_problem(4, scale, 5)
    own = logits.astype(np.float64)
    best = minimize(
        lambda w: cross_entropy_of(w, own, labels),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    weights = np.asarray(convex_weights(jnp.asarray(logits), jnp.asarray(labels)), np.float64)
    assert cross_entropy_of(weights / weights.sum(), own, labels) <= best.fun * (1 + 5e-3)


def test_linear_weights_of_equals_are_finite():
    logits, labels = hard_problem(1, 1.0, 0)
    weights = convex_weights(jnp.asarray(np.repeat(logits, 3, 0)), jnp.asarray(labels))
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    np.testing.assert_allclose(convex_weights(jnp.asarray(logits), jnp.asarray(labels)), [1.0])
    shares = jax.nn.one_hot(labels, 10) * 0.9 + 0.01
    assert np.isfinite(convex_weights(jnp.asarray(np.repeat(logits, 2, 0)), shares)).all()


def test_linear_target_is_the_weighted_mean():
    with jax.enable_x64(True):
        outputs, batch = inputs()
        weights = np.asarray(convex_weights(outputs.logits_SxBxK, batch.labels))
        target = np.tensordot(weights, outputs.logits_SxBxK, 1)
        (_, (terms, _)), _ = loss_and_gradients(METHODS["kdcl"](target="linear"), {}, {}, outputs, batch)
    log_softmax = lambda z: z / 2 - np.log(np.exp(z / 2).sum(-1, keepdims=True))
    for i, z in enumerate(np.asarray(outputs.logits_SxBxK), 1):
        teacher = log_softmax(target)
        expected = 4 * (np.exp(teacher) * (teacher - log_softmax(z))).sum(-1).mean()
        np.testing.assert_allclose(terms[f"student_{i}/loss_kd"], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("covariance", "expected"),
    [
        (np.diag([1.0, 1.0, 2.0]), [0.4, 0.4, 0.2]),
        (np.ones((3, 3)), [1 / 3] * 3),  # identical networks
        (np.zeros((3, 3)), [1 / 3] * 3),  # none is ever wrong
        (1e-20 * np.diag([1.0, 1.0, 2.0]), [0.4, 0.4, 0.2]),
        (np.array([[1.0, 1.5], [1.5, 4.0]]), [1.0, 0.0]),  # a negative weight
        (np.ones((1, 1)), [1.0]),
    ],
)
def test_general_weights(covariance, expected):
    weights = kdcl_module.general_weights(jnp.asarray(covariance, jnp.float32))
    np.testing.assert_allclose(weights, expected, atol=5e-3)
    np.testing.assert_allclose(weights, closed_form(covariance), atol=1e-4)


def test_error_covariance_is_a_running_mean():
    method = method_of("kdcl general")
    with jax.enable_x64(True):
        outputs, batch = inputs()
        params, stats = initial(method, outputs, batch)
        p = np.exp(outputs.logits_SxBxK)
        errors = p / p.sum(-1, keepdims=True) - np.eye(7)[batch.labels]
        found = np.array([[(a * b).sum(-1).mean() for a in errors] for b in errors])
        expected = np.zeros((3, 3))
        for _ in range(2):
            (_, (_, stats)), _ = loss_and_gradients(method, params, stats, outputs, batch)
            expected = 0.9 * expected + 0.1 * found
            np.testing.assert_allclose(stats["errors"]["covariance"], expected, rtol=1e-6)


# --- what predicts, and how copies move --------------------------------------------------------


def predictions(kind, outputs, batch):
    method = method_of(kind)
    params, stats = initial(method, outputs, batch)
    predict = functools.partial(
        method.apply, {"params": params, "batch_stats": stats}, method="predictions"
    )
    found = jax.jit(predict, compiler_options=QUICKLY)(outputs)
    return params, dict(zip(method.prediction_names(outputs), map(np.asarray, found), strict=True))


@pytest.mark.parametrize("kind", ["okddip", "cl_ilr", "kdcl naive", "one mean"])
def test_the_ensemble_is_the_mean(kind):
    outputs, batch = inputs()
    _, found = predictions(kind, outputs, batch)
    assert list(found) == ["student_1", "student_2", "student_3", "ensemble"]
    np.testing.assert_allclose(found["ensemble"], np.mean(outputs.logits_SxBxK, 0), rtol=1e-5, atol=1e-6)


def test_gated_ensemble_in_evaluation():
    """By the running statistics, which are 0 and 1 to begin with."""
    outputs, batch = inputs()
    params, found = predictions("one", outputs, batch)
    own = jax.tree.map(np.asarray, params["gate"])
    scores = linear(np.mean(outputs.base, (1, 2)), own["linear"]) / np.sqrt(1 + 1e-5)
    gate = np.exp(np.maximum(scores * own["bn"]["scale"] + own["bn"]["bias"], 0))
    gate /= gate.sum(1, keepdims=True)
    expected = sum(gate[:, i, None] * z for i, z in enumerate(outputs.logits_SxBxK))
    np.testing.assert_allclose(found["ensemble"], expected, rtol=1e-4, atol=1e-5)


def test_ensemble_classifier_of_pcl():
    outputs, batch = inputs()
    params, found = predictions("pcl", outputs, batch)
    features = np.concatenate([np.mean(x, (1, 2)) for x in outputs.pooled], -1)
    expected = linear(features, jax.tree.map(np.asarray, params["classifier"]["linear"]))
    np.testing.assert_allclose(found["ensemble"], expected, rtol=1e-4, atol=1e-5)


def test_fused_ensemble_does_not_see_the_batch():
    """In evaluation an example's fused logits are its own."""
    outputs, batch = inputs()
    _, together = predictions("ffl", outputs, batch)
    batch = batch.replace(labels=batch.labels[:2])
    first = outputs.replace(
        logits_SxBxK=outputs.logits_SxBxK[:, :2], pooled=tuple(x[:2] for x in outputs.pooled)
    )
    _, alone = predictions("ffl", first, batch)
    np.testing.assert_allclose(alone["ensemble"], together["ensemble"][:2], rtol=1e-4, atol=1e-5)
    assert not np.allclose(together["ensemble"], np.mean(outputs.logits_SxBxK, 0))


def test_shallow_classifiers_predict():
    outputs, batch = inputs((6, 4))
    _, found = predictions("byot", outputs, batch)
    shallow = [f"shallow_{j}_of_{s}" for s in (1, 2) for j in (1, 2)]
    assert list(found) == ["student_1", "student_2", *shallow, "ensemble"]
    *each, ensemble = found.values()
    np.testing.assert_allclose(ensemble, np.mean(each, 0), rtol=1e-4, atol=1e-5)
    names = METHODS["byot"]().prediction_names(inputs((6,))[0])
    assert names == ["student_1", "shallow_1", "shallow_2", "ensemble"]


def test_averages_of_pcl():
    """The mean of the networks after all steps at first, without the initial ones; then 1 / 1000 of the
    latest, as src/utils/ema.py of the code that PCL follows."""
    method = METHODS["pcl"]()
    networks = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    variables = lambda x: {"params": {"w": x}, "batch_stats": {"m": 2 * x}}
    copies = {"1": variables(networks[0])}
    for step, x in enumerate(networks[1:], 1):
        copies = method.update_copies(copies, variables(x), jnp.int32(step), 100, 1.0)
        np.testing.assert_allclose(copies["1"]["params"]["w"], networks[1 : step + 1].mean(0), rtol=1e-5)
    late = method.update_copies(copies, variables(networks[0]), jnp.int32(5000), 9000, 1.0)
    expected = 0.999 * networks[1:].mean(0) + 0.001 * networks[0]
    np.testing.assert_allclose(late["1"]["params"]["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(late["1"]["batch_stats"]["m"], 2 * expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["one", "cl_ilr", "pcl", "kdcl general"])
def test_one_student_alone(kind):
    """Nothing fails or is NaN without a peer."""
    method = method_of(kind)
    outputs, batch = inputs((6,))
    params, stats = initial(method, outputs, batch)
    (loss, _), gradients = loss_and_gradients(method, params, stats, outputs, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, gradients)))


def test_okddip_without_a_peer():
    with pytest.raises(UserError, match="2 or more"):
        initial(METHODS["okddip"](), *inputs((6,)))


def test_ffl_of_unequal_maps():
    outputs, batch = inputs()
    first, *rest = outputs.pooled
    with pytest.raises(UserError, match="equal size"):
        initial(METHODS["ffl"](), outputs.replace(pooled=(first[:, :1], *rest)), batch)


# --- which parameters each term trains ----------------------------------------------------------

BOTH = {"base", "student 1", "student 2"}
WHO = {  # method: number of students, {term: what it trains}
    "one": (2, {"ensemble/loss_ce": BOTH | {"gate"}, "student_2/loss_kd": {"base", "student 2"}}),
    "okddip": (3, {"student_1/loss_kd": BOTH | {"attention"}, "student_3/loss_kd": BOTH | {"student 3"}}),
    "cl_ilr": (4, {"student_4/loss_kd": {"base", "split 2", "student 4"}}),
    "ffl": (2, {"ensemble/loss_kd": BOTH | {"fusion"}, "student_1/loss_kd": {"base", "student 1"}}),
    "pcl": (2, {"ensemble/loss_ce": BOTH | {"classifier"}, "student_2/loss_peers": {"base", "student 2"}}),
    "kdcl": (2, {"student_1/loss_kd": {"student 1"}}),
    "byot": (
        1,
        {"student_1/loss_ce": {"student 1"}, "student_1/loss_kd_shallow2": {"student 1", "shallow"}},
    ),
}


@pytest.mark.parametrize("name", WHO)
@pytest.mark.slow
def test_what_each_term_trains(name):
    students, expected = WHO[name]
    config = tiny_config(name, model__students=(1,) * students)
    networks = build_networks(config, 10, (8, 8, 1))
    method = networks.method
    variables = init_variables(networks, 0)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(students, 8, 8, 8, 1)).astype(np.float32)
    views = tuple(images) if method.separate_views else images[0]
    labels = jnp.asarray(generator.integers(0, 10, 8))

    def terms(params):
        full = variables | {"params": params}
        outputs, _ = networks.ensemble.apply(network_variables(full), views, train=True)
        other = outputs.replace(logits_SxBxK=outputs.logits_SxBxK + 1.0 * jnp.arange(10))
        batch = Batch(labels, jnp.zeros(()), copy_outputs=(other,) * method.number_of_copies)
        (_, found), _ = method.apply(method_variables(full), outputs, batch, mutable=["batch_stats"])
        return jnp.stack([found[name] for name in expected])

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradients(params):
        pull = jax.vjp(terms, params)[1]
        return [pull(row)[0] for row in jnp.eye(len(expected))]

    found = jax.device_get(gradients(variables["params"]))
    for (term, wanted), gradient in zip(expected.items(), found, strict=True):
        parts = {f"student {i}": g for i, g in gradient["students"].items()} | gradient["method"]
        parts |= {f"split {i}": g for i, g in gradient.get("splits", {}).get("1", {}).items()}
        parts["base"] = gradient["base"]
        moved = {part for part, tree in parts.items() if any(np.any(x != 0) for x in jax.tree.leaves(tree))}
        assert moved == wanted, term


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        ("one", {"ensemble": "gate"}, r"method.ensemble='gate' must be .*; did you mean 'gated'\?"),
        ("one", {"rampup_epochs": -1.0}, "method.rampup_epochs=-1.0 must not be negative"),
        ("pcl", {"momentum": 1.0}, "method.momentum=1.0 must be at least 0 and below 1"),
        ("pcl", {"kd_weight": -1.0}, "method.kd_weight=-1.0 must not be negative"),
        ("cl_ilr", {"beta": 1.5}, "method.beta=1.5 must be from 0 to 1"),
        ("cl_ilr", {"temperature": 0.0}, "method.temperature=0.0 must be above 0"),
        ("okddip", {"kd_loss": "dkd"}, "method.detach_targets=False needs method.kd_loss=kl .*"),
        ("okddip", {"standardize": True}, "method.detach_targets=False needs .*standardize=False.*"),
        ("kdcl", {"target": "minlogits"}, r"method.target='minlogits' must .*; did you mean 'minlogit'\?"),
        ("kdcl", {"ce_weight": -1.0}, "method.ce_weight=-1.0 must not be negative"),
        ("byot", {"alpha": -0.1}, "method.alpha=-0.1 must be from 0 to 1"),
        ("byot", {"hint_weight": -1.0}, "method.hint_weight=-1.0 must not be negative"),
        ("snapshot", {"cycles": 0}, "method.cycles=0 must be above 0"),
        ("snapshot", {"last": -1}, "method.last=-1 must not be negative"),
        ("snapshot", {"cycles": 3, "last": 4}, "method.last=4 must be from 0 to method.cycles=3"),
    ],
)
def test_impossible_knobs(method, knobs, message):
    with pytest.raises(UserError) as error:
        METHODS[method](**knobs)
    assert re.fullmatch(message, str(error.value))
