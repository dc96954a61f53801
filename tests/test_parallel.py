"""What several devices share, and what fits batches and networks that are too large: each by option."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import one_device, tiny_config
from program import Program

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import build_method, build_networks
from ekd_jax.runs.describe import memory
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.state import init_state
from ekd_jax.training import single
from ekd_jax.training.dry_run import dry_run
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.setup import check_batches
from ekd_jax.training.step import make_step

SHAPE = (8, 8, 1)


def state_and_step(config, groups=1, accumulate=1, classes=10):
    networks, sgd = build_networks(config, classes, SHAPE, groups), optax.sgd(1.0)
    step = make_step(networks, sgd, accumulation_steps=accumulate)
    return init_state(networks, sgd, 0), jax.jit(step)


def batch(size=12):
    generator = np.random.default_rng(0)
    return generator.normal(size=(size, *SHAPE)).astype(np.float32), np.arange(size) % 10


@pytest.mark.parametrize(
    ("method", "parts"), [("oem", 3), *(pytest.param(m, 2, marks=pytest.mark.slow) for m in ("pcl", "oem"))]
)
def test_accumulated_gradients_are_those_of_the_parts(method, parts):
    """Part j of a batch are examples j, j + parts, ...: what batch norm does with these as its groups."""
    images, labels = batch()
    state, accumulated = state_and_step(tiny_config(method), accumulate=parts)
    apart = tiny_config(method, model__batch_norm="local")
    _, grouped = state_and_step(apart, groups=parts)
    order = np.concatenate([np.arange(len(images))[j::parts] for j in range(parts)])
    views = (images,) * 2 if method == "pcl" else images
    ordered = jax.tree.map(lambda x: x[order], views)
    found, metrics = accumulated(state, views, labels)
    expected, others = grouped(state, ordered, labels[order])
    # gradients, at a rate of 1, up to the order of sums
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.params, expected.params
    )
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(others[name]), rel=1e-5, abs=1e-5), name


def test_running_statistics_see_every_part():
    """m parts move them m times, each by its own mean."""
    images, labels = batch()
    state, step = state_and_step(tiny_config(), accumulate=2)
    _, whole = state_and_step(tiny_config())
    found = step(state, images, labels)[0].batch_stats["base"]["stem"]["bn"]["mean"]
    first, second = (
        whole(state, images[j::2], labels[j::2])[0].batch_stats["base"]["stem"]["bn"]["mean"] / 0.1
        for j in range(2)
    )
    np.testing.assert_allclose(found, 0.9 * 0.1 * first + 0.1 * second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet14", pytest.param("vgg8", marks=pytest.mark.slow)])
def test_what_is_computed_again_is_the_same(name):
    images, labels = batch(4)
    key = jax.random.key(0)
    changes = {"model__name": name, "model__students": (0.5,), "model__dropout": 0.1}
    state, plain = state_and_step(tiny_config(**changes))
    _, again = state_and_step(tiny_config(**changes, train__rematerialize=True))
    (a, m), (b, n) = plain(state, images, labels, key), again(state, images, labels, key)
    assert float(m["loss"]) == pytest.approx(float(n["loss"]), rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.params, b.params)


def test_what_is_computed_again_is_not_kept():
    """Of every block the backward pass keeps what goes in; and the estimate of memory knows."""
    kept, estimated = {}, {}
    images, _ = batch(8)
    for what in (False, True):
        config = tiny_config(model__name="resnet56", model__students=(1,), train__rematerialize=what)
        built = build_networks(config, 10, SHAPE)
        state = init_state(built, optax.sgd(1.0), 0)

        def loss(params, state=state, ensemble=built.ensemble):
            networks = {"params": params, "batch_stats": state.batch_stats}
            return ensemble.apply(networks, jnp.asarray(images), train=True)[0].logits_SxBxK.sum()

        networks = {name: tree for name, tree in state.params.items() if name != "method"}
        _, backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p), networks)
        both = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (backward, networks)]
        kept[what] = both[0] - both[1]  # beside the parameters
        estimated[what] = memory(built, optax.sgd(1.0), config, (), 0)["activations"]
    assert kept[True] < kept[False] / 4
    assert estimated[True] < estimated[False] / 2


def test_memory_is_that_of_a_device():
    """Each has its part of the batch, and with fsdp its part of the state."""
    config = tiny_config(train__fsdp=4)
    networks, sgd = build_networks(config, 10, SHAPE), optax.sgd(1.0, momentum=0.9)
    alone, shared = (memory(networks, sgd, tiny_config(), (), 7, devices) for devices in (1, 8))
    cut = memory(networks, sgd, config, (), 7, 8)
    assert shared == {**alone, "activations": alone["activations"] // 8}
    parameters = alone["state"] // 3  # beside gradients and momentum
    assert cut == {**shared, "state": 2 * parameters // 4 + 2 * parameters}


def test_the_state_is_cut_over_the_second_axis():
    """Arrays of the state take a fourth of each device; batches are still shared by all eight."""
    program = Program(tiny_config(train__fsdp=4, model__students=(1, 0.5)), classes=10)
    after, *_ = program.lower().compile()(*program.arguments())
    cut = 0
    for leaf, began in zip(jax.tree.leaves(after), jax.tree.leaves(program.state), strict=True):
        here = leaf.addressable_shards[0].data.size
        assert here == leaf.size // (4 if leaf.size >= parallel.SMALLEST_SHARDED else 1)
        cut += here < leaf.size
        assert leaf.shape == np.shape(began)
    assert cut >= 4  # parameters and momentum of both students' widest convolutions
    whole = parallel.fetch(after)
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"train__fsdp": 4}, {"train__fsdp": 8, "train__accumulation_steps": 2}]
)
def test_a_run_does_not_depend_on_how_the_state_is_kept(changes, tmp_path):
    """And goes on with any other number of devices to a copy."""
    config = tiny_config(**changes, optimizer__learning_rate=1e-4)
    plain = tiny_config(**changes | {"train__fsdp": 1}, optimizer__learning_rate=1e-4)
    single.run(config, tmp_path / "cut")
    single.run(plain, tmp_path / "whole", parallel.make_mesh())
    cut, whole = ([r for r in read_metrics(tmp_path / name)] for name in ("cut", "whole"))
    for a, b in zip(cut, whole, strict=True):
        assert {k: a[k] for k in a if "loss" in k} == pytest.approx(
            {k: b[k] for k in b if "loss" in k}, rel=1e-5
        )
    assert single.run(plain, tmp_path / "cut", one_device()).steps == 19  # the same run


def test_batches_and_devices_that_do_not_fit():
    mesh = parallel.make_mesh()
    with pytest.raises(UserError, match=r"train.fsdp=3 does not divide the 8 devices; nearest: 2"):
        parallel.make_mesh(fsdp=3)
    check_batches(tiny_config(train__batch_size=64, train__accumulation_steps=4), mesh, None)
    message = (
        r"train.batch_size=40 cannot be split over 8 devices x train.accumulation_steps=2; nearest: 32 or"
    )
    with pytest.raises(UserError, match=message):
        check_batches(tiny_config(train__batch_size=40, train__accumulation_steps=2), mesh, None)
    with pytest.raises(UserError, match="train.accumulation_steps=0 must be above 0"):
        tiny_config(train__accumulation_steps=0)


def rates(steps, **changes):
    """The learning rate of each step, seen in what plain SGD does to a parameter with gradient 1."""
    config = tiny_config("baseline", optimizer__momentum=0.0, optimizer__nesterov=False, **changes)
    tree = {"method": {}, "w": jnp.zeros(())}
    optimizer = make_optimizer(config, build_method(config), steps)
    state, found = optimizer.init(tree), []
    for _ in range(steps):
        updates, state = optimizer.update({"method": {}, "w": jnp.ones(())}, state, tree)
        found.append(-float(updates["w"]))
    return found


PLAIN = {
    "optimizer__weight_decay": 0.0,
    "optimizer__learning_rate": 0.1,
    "train__batch_size": 256,
    "train__epochs": 20.0,
}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [0.1] * 8),
        ({"optimizer__reference_batch_size": 64}, [0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.4, 0.4]),
        ({"optimizer__reference_batch_size": 64, "optimizer__warmup_epochs": 0.0}, [0.4] * 8),
        ({"optimizer__reference_batch_size": 512}, [0.05] * 8),
        ({"optimizer__warmup_epochs": 2.5}, [0.0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_the_rate_is_scaled_only_when_asked_for(asked, expected):
    """Goyal et al. 2017: times the batch over the reference, reached in equal steps over 5 epochs."""
    assert rates(16, **PLAIN, **asked)[:8] == pytest.approx(expected, rel=1e-5)


def test_the_drops_stay_where_they_are():
    found = rates(16, **PLAIN, optimizer__reference_batch_size=64)
    assert found[7:] == pytest.approx([0.4, *[0.04] * 4, *[0.004] * 4], rel=1e-5)


def test_a_scaled_rate_is_printed(tmp_path):
    asked = {"optimizer__reference_batch_size": 8, "optimizer__learning_rate": 0.05}
    said = dry_run(tiny_config(**asked), tmp_path / "run")
    assert "learning rate 0.2 = 0.05 x 32 / 8 (optimizer.reference_batch_size)" in said
    assert "warm-up from 0.05 over 5 epochs" in said
    assert "learning rate" not in dry_run(tiny_config(), tmp_path / "run")
