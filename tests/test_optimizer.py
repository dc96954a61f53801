"""The optimizer against formulas in float64, its schedule, and names that other libraries give to knobs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_method, build_networks
from ekd_jax.config.knobs import KNOBS, all_knobs
from ekd_jax.config.other_names import OTHER_NAMES, find_knob
from ekd_jax.config.resolve import resolve
from ekd_jax.runs.describe import memory
from ekd_jax.runs.state import init_state
from ekd_jax.training.optimizer import make_optimizer, make_schedule
from ekd_jax.training.step import make_step

NAMES = ("sgd", "adam", "rmsprop", "adamw", "lamb", "lion")
RATE, DECAY = 0.1, 0.03


def a_tree(seed):
    """Return parameters, or gradients, as a network and a method name them."""
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.normal(size=shape)
    part = {"conv": {"kernel": draw(3, 4)}, "bn": {"scale": draw(4), "bias": draw(4)}}
    return {"base": part, "method": {"layer": {"kernel": draw(2, 2), "bias": draw(2)}}}


def one_step(name, g, p, slots, t, decay):
    """Return an update in float64 and the new slots, as PyTorch's and the papers' formulas have them."""
    m, v = slots
    if name == "sgd":  # Nesterov, as PyTorch
        g = g + decay * p
        m = 0.9 * m + g
        return -RATE * (g + 0.9 * m), (m, v)
    if name == "rmsprop":
        g = g + decay * p
        v = 0.9 * v + 0.1 * g * g
        m = 0.9 * m + RATE * g / np.sqrt(v + 1e-3)
        return -m, (m, v)
    if name == "lion":
        step = np.sign(0.9 * m + 0.1 * g) + decay * p
        return -RATE * step, (0.99 * m + 0.01 * g, v)
    g = g + decay * p if name == "adam" else g
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + (1e-6 if name == "lamb" else 1e-8))
    if name != "adam":
        step = step + decay * p
    if name == "lamb":
        step = step * np.linalg.norm(p) / np.linalg.norm(step)
    return -RATE * step, (m, v)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("all_decay", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_the_formulas(name, all_decay, clip_norm):
    """Three steps: the clipped gradient, L2 or decoupled decay with and without norms and biases."""
    config = tiny_config(
        "baseline",
        optimizer__name=name,
        optimizer__learning_rate=RATE,
        optimizer__weight_decay=DECAY,
        optimizer__decay_norm_and_bias=all_decay,
        optimizer__clip_norm=clip_norm,
    )
    optimizer = make_optimizer(config, build_method(config), 1000)
    params = a_tree(0)
    found = jax.tree.map(jnp.float32, params)
    state, update = optimizer.init(found), jax.jit(optimizer.update)
    slots = jax.tree.map(lambda p: (np.zeros_like(p), np.zeros_like(p)), params)
    for t in (1, 2, 3):
        gradients = a_tree(t)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        assert norm > 2
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0

        def one(path, g, p, own, t=t, scale=scale):
            decays = all_decay or path[-1].key not in ("scale", "bias")
            return one_step(name, scale * g, p, own, t, DECAY if decays else 0.0)

        is_slots = lambda x: isinstance(x, tuple)
        both = jax.tree_util.tree_map_with_path(one, gradients, params, slots, is_leaf=is_slots)
        params = jax.tree.map(lambda p, own: p + own[0], params, both, is_leaf=is_slots)
        slots = jax.tree.map(lambda own: own[1], both, is_leaf=is_slots)
        updates, state = update(jax.tree.map(jnp.float32, gradients), state, found)
        found = optax.apply_updates(found, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, params)


def test_decay_rates_and_epsilon_can_be_chosen():
    changes = {"optimizer__b1": 0.5, "optimizer__b2": 0.75, "optimizer__epsilon": 0.1}
    config = tiny_config("baseline", optimizer__name="adamw", optimizer__weight_decay=0.0, **changes)
    optimizer = make_optimizer(config, build_method(config), 10)
    tree = {"method": {}, "w": jnp.full((), 2.0)}
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    assert float(updates["w"]) == pytest.approx(-0.1 * 2 / (2 + 0.1), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_begins_with_zeros_and_is_counted(name):
    """`init_state` writes zeros instead of compiling `init`; the estimate of memory counts the slots."""
    config = tiny_config(
        optimizer__name=name, optimizer__clip_norm=1.0, optimizer__decay_norm_and_bias=False
    )
    networks = build_networks(config, 10, (8, 8, 1))
    optimizer = make_optimizer(config, networks.method, 100)
    state = init_state(networks, optimizer, 0)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, optimizer.init(state.params))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    slots = {"sgd": 1, "lion": 1}.get(name, 2)
    found = memory(networks, optimizer, config, (), 0)["state"]
    assert found == 4 * (2 + slots) * parameters  # parameters, gradients and slots
    averaged = tiny_config(train__ema_decay=0.9)
    found = memory(build_networks(averaged, 10, (8, 8, 1)), optimizer, averaged, (), 0)["state"]
    assert found == 4 * (3 + slots) * parameters


def test_only_students_that_learn_count_for_the_norm():
    """With alternating updates the gradients of the others are no part of it."""
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    plain = {"optimizer__momentum": 0.0, "optimizer__nesterov": False, "optimizer__weight_decay": 0.0}
    config = tiny_config("dml", **plain, method__update="alternating", optimizer__clip_norm=1e-3)
    networks = build_networks(config, 10, (8, 8, 1))
    optimizer = make_optimizer(config, networks.method, 100)
    before = init_state(networks, optimizer, 0)
    after, _ = jax.jit(make_step(networks, optimizer))(before, images, np.arange(8))
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), after.params, before.params)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(moved["students"]["1"])))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-2)
    assert not any(leaf.any() for leaf in jax.tree.leaves(moved["students"]["2"]))


# --- the schedule ----------------------------------------------------------------------------------


def test_warm_up_with_cosine_is_optaxs():
    """The cosine is over the steps after the warm-up, down to the final learning rate."""
    asked = {"optimizer__schedule": "cosine", "optimizer__warmup_epochs": 5.0, "train__epochs": 20.0}
    final = {"optimizer__final_learning_rate": 0.01}
    steps = np.arange(41)
    for changes, expected in (
        (asked, optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 40)),
        (asked | final, optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 40, 0.01)),
        (
            asked | final | {"optimizer__reference_batch_size": 16},
            optax.warmup_cosine_decay_schedule(0.1, 0.2, 10, 40, 0.02),
        ),
        (asked | {"optimizer__warmup_epochs": 0.0}, optax.cosine_decay_schedule(0.1, 40)),
    ):
        config = tiny_config("baseline", **changes)
        found = jax.vmap(make_schedule(config, build_method(config), 40))(steps)
        np.testing.assert_allclose(found, jax.vmap(expected)(steps), rtol=1e-6, atol=1e-9)
    t = np.arange(10, 41)
    np.testing.assert_allclose(
        jax.vmap(make_schedule(tiny_config("baseline", **asked | final), build_method(config), 40))(t),
        0.01 + (0.1 - 0.01) * (1 + np.cos(np.pi * (t - 10) / 30)) / 2,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__warmup_epochs": 3.0}, "warmup_epochs=3 leaves no epoch .* below train.epochs=3"),
        ({"optimizer__final_learning_rate": 0.2}, "final_learning_rate=0.2 must not be above .*=0.1"),
    ],
)
def test_impossible_schedules(changes, message):
    config = tiny_config("baseline", optimizer__schedule="cosine", **changes)
    with pytest.raises(UserError, match=message):
        make_optimizer(config, build_method(config), 100)


# --- names of other libraries ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("train.weight-decay", "optimizer.weight_decay"),
        ("train.nesterov", "optimizer.nesterov"),
        ("batch_size", "train.batch_size"),
        ("data.batch_size", "train.batch_size"),
        ("num_epochs", "train.epochs"),
        ("train.amp", "train.dtype"),
        ("train.clip_grad", "optimizer.clip_norm"),
        ("opt", "optimizer.name"),
        ("optimizer.sched", "optimizer.schedule"),
        ("warmup_steps", "optimizer.warmup_epochs"),
        ("train.label_smoothing", "data.label_smoothing"),
        ("mixup_alpha", "data.mixup"),
        ("dataset", "data.name"),
        ("arch", "model.name"),
        ("train.alpha", "method.alpha"),
        ("temperature", "method.temperature"),
        ("num_workers", "data.workers"),
        ("train.num-workers", "data.workers"),
    ],
)
def test_names_of_other_libraries_are_known(theirs, ours):
    section, _, name = theirs.rpartition(".")
    with pytest.raises(UserError) as error:
        resolve({section: {name: 1}} if section else {name: 1})
    assert str(error.value) == f"unknown knob config.{theirs}; did you mean {ours!r}?"


@pytest.mark.parametrize("name", ["gpu", "train.device", "output_dir", "resume", "num_classes"])
def test_what_is_no_knob_is_explained(name):
    with pytest.raises(UserError, match=r"unknown knob config.\S+; .*(devices|workdir|classes)"):
        resolve({name: 1})


def test_every_name_leads_to_one_knob_that_there_is():
    """No name stands in two rows, and none hides a knob of ours."""
    known = all_knobs("oem")
    names = [name for row in OTHER_NAMES.values() for name in row.split()]
    assert sorted(names) == sorted(set(names))
    for knob, row in OTHER_NAMES.items():
        assert knob in known | all_knobs("kd"), knob
        assert all(find_knob(name, KNOBS | {knob: None}) for name in row.split()), knob
