"""Which parameters each term trains, and the method's options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, forward, tiny_config

from ekd_jax import methods
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_networks
from ekd_jax.methods import METHODS
from ekd_jax.methods.base import Batch, Method, knob, knobs_of
from ekd_jax.methods.distilling import WithKDLoss
from ekd_jax.runs.state import init_state, init_variables, method_variables, network_variables
from ekd_jax.training.optimizer import learning_rate, make_optimizer
from ekd_jax.training.step import make_step, objective

SHAPE = (8, 8, 1)
STUDENTS = (1, 0.5, 0.25)


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    images = generator.normal(size=(16, *SHAPE)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(generator.integers(0, 10, 16))


def gradients(batch, **knobs):
    """Gradient of the loss in every parameter."""
    config = tiny_config(**{f"method__{k}": v for k, v in knobs.items()})
    networks = build_networks(config, 10, SHAPE)
    variables = init_variables(networks, 0)

    def loss(params):
        full = variables | {"params": params}
        outputs, _ = networks.ensemble.apply(network_variables(full), batch[0], train=True)
        return objective(networks.method, method_variables(full), outputs, Batch(batch[1], jnp.zeros(())))[
            0
        ]

    return jax.jit(jax.grad(loss))(variables["params"])


def moved(gradients):
    """Names of the parts that a gradient reaches."""
    parts = {"base": gradients["base"], **{f"student {i}": g for i, g in gradients["students"].items()}}
    parts |= gradients["method"]
    return {name for name, tree in parts.items() if any(jnp.any(x != 0) for x in jax.tree.leaves(tree))}


ALL = {"base", "student 1", "student 2"}


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"alpha": 1.0, "beta": 0.0, "gamma": 0.0}, ALL),
        ({"alpha": 0.0, "beta": 1.0, "gamma": 0.0}, ALL - {"student 1"} | {"adaptation_layers"}),
        ({"alpha": 0.0, "beta": 0.0, "gamma": 1.0}, ALL),
        ({"alpha": 0.0, "beta": 1.0, "gamma": 0.0, "adaptation": "channel_mean"}, ALL - {"student 1"}),
        (
            {"alpha": 0.0, "beta": 1.0, "gamma": 0.0, "base_gradient": "pseudo_teacher"},
            {"student 2", "adaptation_layers"},
        ),
        ({"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "ensemble_weights": "learned"}, {"weighting"}),
        ({"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "ensemble_weights": "gated"}, {"weighting"}),
        ({"alpha": 0.0, "beta": 0.0, "gamma": 1.0, "ensemble_weights": "learned"}, ALL | {"weighting"}),
    ],
)
def test_what_each_term_trains(batch, knobs, expected):
    assert moved(gradients(batch, **knobs)) == expected


def test_base_block_learns_from_the_pseudo_teacher_alone(batch):
    """base_gradient="pseudo_teacher" leaves student 1 and the base exactly what student 1 gives."""
    blocked = gradients(batch, beta=0.0, gamma=0.0, base_gradient="pseudo_teacher")
    everyone = gradients(batch, beta=0.0, gamma=0.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        blocked["students"]["2"],
        everyone["students"]["2"],
    )
    assert not np.allclose(
        blocked["base"]["stem"]["conv"]["kernel"], everyone["base"]["stem"]["conv"]["kernel"]
    )


def test_one_student_is_the_baseline(batch):
    """S=1: nothing to match and its own teacher, so alpha times the cross entropy remains."""
    for name, scale in (("oem", 0.7), ("baseline", 1.0)):
        config = tiny_config(method=name, model__students=(0.5,))
        networks = build_networks(config, 10, SHAPE)
        variables = init_variables(networks, 0)

        @jax.jit
        def compute(variables, networks=networks):
            outputs, _ = networks.ensemble.apply(network_variables(variables), batch[0], train=True)
            own = method_variables(variables)
            return objective(networks.method, own, outputs, Batch(batch[1], jnp.zeros(())))

        loss, (metrics, _) = compute(variables)
        assert float(loss) == pytest.approx(scale * float(metrics["student_1/loss_ce"]), rel=1e-6)


def test_ensemble_weights_begin_uniform_and_sum_to_one(batch):
    logits = jax.random.normal(jax.random.key(0), (3, 16, 10))
    config = tiny_config(model__students=STUDENTS, method__ensemble_weights="learned")
    networks = build_networks(config, 10, SHAPE)
    own = init_variables(networks, 0)["params"]["method"]
    variables = init_variables(networks, 0)
    outputs, _ = forward(networks.ensemble, network_variables(variables), batch[0], train=False)
    outputs = outputs.replace(logits_SxBxK=logits)
    combined = networks.method.apply({"params": own}, outputs, method="ensemble_logits")
    np.testing.assert_allclose(combined, logits.mean(0), atol=1e-6)
    own["weighting"]["logits"] = jnp.array([5.0, 0.0, 0.0])
    combined = networks.method.apply({"params": own}, outputs, method="ensemble_logits")
    weights = np.exp([5.0, 0, 0]) / np.exp([5.0, 0, 0]).sum()
    np.testing.assert_allclose(combined, np.tensordot(weights, logits, 1), atol=1e-5)


@pytest.mark.parametrize("weights", ["uniform", "learned", "gated"])
def test_every_kind_of_ensemble_trains(batch, weights):
    config = tiny_config(method__ensemble_weights=weights, optimizer__learning_rate=0.05)
    networks = build_networks(config, 10, SHAPE)
    optimizer = make_optimizer(config, networks.method, 100)
    state = init_state(networks, optimizer, 0)
    step = jax.jit(make_step(networks, optimizer))
    losses = []
    for _ in range(12):
        state, metrics = step(state, *batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_optimizer_begins_as_optax_says(name):
    """`init_state` writes zeros instead of compiling `optimizer.init`."""
    config = tiny_config(optimizer__name=name)
    networks = build_networks(config, 10, SHAPE)
    optimizer = make_optimizer(config, networks.method, 100)
    state = init_state(networks, optimizer, 0)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, optimizer.init(state.params))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_adaptation_layers_learn_at_their_own_rate(scale):
    """A step of plain SGD moves them by the scale times the rate times the gradient, and all else by the rate."""
    plain = {"optimizer__momentum": 0.0, "optimizer__nesterov": False, "optimizer__weight_decay": 0.0}
    config = tiny_config(**plain, method__adaptation_learning_rate_scale=scale)
    networks = build_networks(config, 10, SHAPE)
    optimizer = make_optimizer(config, networks.method, 100)
    params = init_state(networks, optimizer, 0).params
    gradients = jax.tree.map(np.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    rate = -config.optimizer.learning_rate
    own = jax.tree.leaves(updates["method"]["adaptation_layers"])
    assert own
    assert all(np.allclose(leaf, scale * rate) for leaf in own)
    others = jax.tree.leaves({name: tree for name, tree in updates.items() if name != "method"})
    assert all(np.allclose(leaf, rate) for leaf in others)


def test_learning_rate_drops_at_the_milestones():
    rate = learning_rate(tiny_config(), steps=1000)
    values = [float(rate(s)) for s in (0, 499, 500, 749, 750, 999)]
    np.testing.assert_allclose(values, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("temperature", 0.0, "be above 0"),
        ("temperature", -2.0, "be above 0"),
        ("temperature", float("nan"), "be a finite number"),
        ("beta", -0.1, "not be negative"),
        ("ensemble_weights", "unifrom", "be one of uniform, learned, gated; did you mean 'uniform'?"),
        ("base_gradient", "none", "be one of all, pseudo_teacher"),
    ],
)
def test_impossible_knobs(knob, value, message):
    with pytest.raises(UserError) as error:
        tiny_config(**{f"method__{knob}": value})
    assert str(error.value) == f"config.method.{knob}={value!r} must {message}"


def knobs():
    """All knobs of all methods."""
    return [(name, field, own) for name in METHODS for field, own in knobs_of(METHODS[name]).items()]


def test_every_knob_has_a_meaning_and_an_allowed_default():
    for name, field, own in knobs():
        assert own.meaning.endswith("."), f"{name}: {field} has no meaning"
        own.check(field, own.default)
        assert own.default == getattr(METHODS[name](), field)


def test_a_changed_default_keeps_meaning_and_rule():
    """Both those of a field without `knob`, and those of the base class of a method from outside."""
    temperature = knobs_of(WithKDLoss)["temperature"]

    class Warm(METHODS["dml"]):
        temperature: float = 7.0
        extra: int = 3

    for method, default in ((METHODS["oem"], 2.0), (METHODS["dml"], 1.0), (Warm, 7.0)):
        assert knobs_of(method)["temperature"] == dataclasses.replace(temperature, default=default)
    assert knobs_of(Warm)["extra"].default == 3
    with pytest.raises(UserError, match="^method.temperature=0.0 must be above 0$"):
        Warm(temperature=0.0)


def test_registering_a_method(monkeypatch):
    """It can be named at once, in a configuration and in lists; a name is given once."""
    monkeypatch.setitem(METHODS, "codistillation", None)  # the entry is removed again after the test
    del METHODS["codistillation"]

    class Codistillation(METHODS["dml"]):
        burn_in_epochs: float = knob(5.0, "Epochs before students learn from each other.")

    methods.register_method("codistillation", Codistillation)
    assert tiny_config("codistillation").method.burn_in_epochs == 5.0
    assert methods.list_methods("cod*") == ["codistillation"]
    with pytest.raises(UserError, match="there is a method 'codistillation' already, Codistillation"):
        methods.register_method("codistillation", Codistillation)
    with pytest.raises(UserError, match="there is a method 'oem' already, OEM"):
        methods.register_method("oem", Codistillation)
    with pytest.raises(UserError, match="method 'loss': .* must be a subclass of .*Method"):
        methods.register_method("loss", methods.register_method)

    class Incomplete(Method):
        burn_in_epochs: float

    with pytest.raises(UserError, match="its field 'burn_in_epochs' must have a default"):
        methods.register_method("incomplete", Incomplete)
    assert "incomplete" not in METHODS


def test_lists_leave_out_what_only_plans_use():
    listed = methods.list_methods()
    assert listed == sorted(listed)
    assert METHODS.keys() - set(listed) == {"blockwise_search", "srm_dictionaries", "srm_initialize"}
    assert methods.list_methods("srm*") == ["srm"]


def test_the_worked_example_of_the_docs(batch, monkeypatch):
    """docs/methods.md: codistillation is DML against the mean of the others, after its burn-in."""
    text = (ROOT / "docs/methods.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert code.count("\n") < 60
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))
    module = {"__name__": "codistillation"}
    exec(code, module)
    assert methods.METHODS["codistillation"] is module["Codistillation"]
    networks = build_networks(tiny_config("dml", model__students=STUDENTS), 10, SHAPE)
    variables = init_variables(networks, 0)
    outputs, _ = forward(networks.ensemble, network_variables(variables), batch[0], train=True)
    for epoch, share in ((4.0, 0.0), (5.0, 1.0)):
        given = Batch(batch[1], jnp.asarray(epoch))
        loss, terms = module["Codistillation"]().apply({}, outputs, given)
        expected, dml = METHODS["dml"](target="mean_probabilities").apply({}, outputs, given)
        kd = sum(dml[f"student_{i}/loss_kd"] for i in (1, 2, 3))
        assert float(loss) == pytest.approx(float(expected - (1 - share) * kd), rel=1e-6)
        assert terms.keys() == dml.keys()


def test_students_of_the_same_width_may_begin_alike():
    """PCL's do, and no others'."""
    for name, alike in (("pcl", True), ("oem", False)):
        config = tiny_config(name, model__students=(0.5, 0.5, 0.25))
        variables = init_variables(build_networks(config, 10, SHAPE), 0)
        students = variables["params"]["students"]
        one, two, three = (students[i]["head"]["linear"]["kernel"] for i in "123")
        assert np.array_equal(one, two) == alike
        assert three.shape != one.shape
