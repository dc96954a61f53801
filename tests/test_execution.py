"""Separate, stacked and packed branches give one result, and the fastest mode is chosen."""

import signal
from functools import partial

import jax
import numpy as np
import pytest
from conftest import one_device, tiny_config
from jax.extend.core import jaxprs_in_params
from test_processes import STEADY, assert_same_run

from ekd_jax import models
from ekd_jax.common.errors import Interrupted, UserError
from ekd_jax.common.files import user_cache
from ekd_jax.config.resolve import fingerprint, resolve
from ekd_jax.models import resnet
from ekd_jax.models.family import Family
from ekd_jax.runs.metrics import MetricWriter, read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import init_state
from ekd_jax.training import single
from ekd_jax.training.autotune import choose_execution
from ekd_jax.training.setup import prepare

# As wide_resnet50_2, with fewer blocks.
BOTTLENECKS = Family(partial(resnet.resnet, block=resnet.wide, blocks=(1, 1, 1, 2)), stages=4, shared=3)
CASES = {
    # Student 1 has no projection in the first block of stage 1.
    "resnet8": ((1, 0.5), {"dropout": 0.5}),
    # Together the students have as many channels as the base block: packed, the shortcut would be the identity.
    "resnet14_a": ((0.5, 0.5), {}),
    "bottlenecks": ((0.125, 0.0625), {}),
    "wrn_16_1": ((1, 0.5), {"shared_stages": 2}),
    "vgg8": ((0.0625, 0.03125), {}),
    "resnet14": ((1, 0.6, 0.3), {}),
    "resnet8x4": ((0.25, 0.125), {"shared_stages": 1}),
    "resnet18": ((0.0625, 0.03125), {}),
    "resnet110_bottleneck": ((1, 0.5), {"shared_stages": 2}),
}
SLOW = ("bottlenecks", "wrn_16_1", "resnet14", "resnet8x4", "resnet18", "resnet110_bottleneck")


def build(name, students, mode, dtype="float64", **options):
    return models.build_ensemble(name, students, 4, dtype=dtype, execution=mode, **options)


def variables_of(ensemble, size=8, dtype=np.float64):
    """Return variables away from initial values, so that no two channels are equal."""
    generator = np.random.default_rng(0)
    moved = lambda x: x * generator.uniform(0.7, 1.3, x.shape) + generator.uniform(0, 0.1, x.shape)
    return jax.tree.map(lambda x: moved(x).astype(dtype), ensemble.trace((size, size, 3)).init(0))


def everything(ensemble, variables, images):
    """Return outputs, new batch statistics and gradients in training, and outputs in evaluation."""

    def loss(params):
        given = {**variables, "params": params}
        outputs, stats = ensemble.apply(given, images, train=True, key=jax.random.key(1))
        generator = np.random.default_rng(1)  # every output is a term of the loss
        parts = [(x * generator.normal(size=x.shape)).sum() for x in jax.tree.leaves(outputs)]
        evaluated, same = ensemble.apply(given, images, train=False)
        assert jax.tree.structure(same) == jax.tree.structure(stats)
        return sum(parts), (outputs, stats, evaluated)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def images_of(size=8, views=1, dtype=np.float64):
    images = np.random.default_rng(2).normal(size=(views, 4, size, size, 3)).astype(dtype)
    return tuple(images) if views > 1 else images[0]


def assert_equal(found, expected, tolerance=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype
        scale = max(1.0, np.abs(np.asarray(b, np.float64)).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale,
            np.asarray(b, np.float64) / scale,
            rtol=0,
            atol=tolerance,
            err_msg=jax.tree_util.keystr(path),
        )


def compare(name, students, *modes, images=None, **options):
    with jax.enable_x64(True):
        images = images_of() if images is None else images
        reference = build(name, students, "separate", **options)
        variables = variables_of(reference)
        expected = everything(reference, variables, images)
        for mode in modes:
            assert mode in reference.executions
            assert_equal(everything(build(name, students, mode, **options), variables, images), expected)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_packed_computes_what_separate_does(name, monkeypatch):
    """Outputs, gradients and statistics of every packable family agree, dropout before heads included."""
    monkeypatch.setitem(models.MODELS, "bottlenecks", BOTTLENECKS)
    students, options = CASES[name]
    compare(name, students, "packed", **options)


def test_students_that_part_one_by_one():
    """Some branches of a tree read the same map and others do not."""
    compare("resnet8", (1, 1, 1, 1), "stacked", "packed", sharing="tree", base_gradients="mean")


@pytest.mark.slow  # the cases above pack whole branches, too
def test_students_that_share_nothing():
    compare("resnet8", (1, 0.5), "packed", sharing="none")


def test_packed_with_a_view_per_student_batch_norm_groups_and_rematerialization():
    options = {"shared_stages": 2, "batch_norm_groups": 2, "rematerialize": True}
    options["base_gradients"] = "pseudo_teacher"
    compare("resnet14", (0.5, 0.5), "packed", images=images_of(views=2), **options)


@pytest.mark.slow  # stacked runs are among the cases above
def test_equal_students_of_any_network_run_stacked():
    """This network cannot be packed, as it drops between convolutions. The other student runs in turn."""
    compare("wrn_10_1", (0.5, 1, 0.5), "stacked", shared_stages=2, dropout=0.5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), pytest.param("bfloat16", 0.05, marks=pytest.mark.slow)]
)
def test_packed_in_lower_precision(dtype, tolerance):
    found = {}
    for mode in ("separate", "packed"):
        ensemble = build("resnet8", (0.5, 0.5), mode, dtype, shared_stages=2)
        variables = variables_of(ensemble, dtype=np.float32)
        (_, aside), gradients = everything(ensemble, variables, images_of(dtype=np.float32))
        assert aside[0].features[0][1].dtype == dtype
        found[mode] = aside, gradients
    assert_equal(found["packed"], found["separate"], tolerance)


def test_packed_and_stacked_need_fewer_convolutions():
    """A unit that ran separately by mistake would go unnoticed otherwise."""

    def count(jaxpr):
        within = sum(count(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))
        return within + sum(eqn.primitive.name == "conv_general_dilated" for eqn in jaxpr.eqns)

    def convolutions(students, mode):
        ensemble = build("resnet14", students, mode, "float32")
        variables = ensemble.trace((8, 8, 3)).init(0)
        run = lambda v, x: ensemble.apply(v, x, train=True)[0].logits_SxBxK
        return count(jax.make_jaxpr(run)(variables, images_of(dtype=np.float32)).jaxpr)

    base = 1
    assert convolutions((1, 0.6, 0.3), "separate") == base + (2 + 2 + 5 + 5) + 2 * (5 + 5 + 5)
    assert convolutions((1, 0.6, 0.3), "packed") == base + (2 + 3 + 3) + 2 + 5 + 5
    assert convolutions((0.5,) * 3, "packed") == base + 5 + 5 + 5
    assert convolutions((0.5,) * 3, "stacked") == base + 5 + 5 + 5


@pytest.mark.parametrize(
    ("name", "students", "changes", "message"),
    [
        ("resnext50_32x4d", (1, 0.5), {}, "ResNeXt's groups of channels: use separate"),
        ("densenet_bc_12_100", (1, 1), {}, "append channels.*: use stacked"),
        ("shufflenet_v2_cifar", (1, 0.5), {}, "shuffle"),
        ("shufflenet_v1_cifar", (1, 0.5), {}, "shuffle"),
        ("mobilenet_v2", (1, 0.5), {}, "which of its inverted residuals add their input"),
        ("efficientnet_b0", (1, 0.5), {}, "which of its inverted residuals add their input"),
        ("wrn_16_2", (1, 0.5), {"model": {"dropout": 0.3}}, "model.dropout.* per student"),
        ("resnet8", (1, "vgg8"), {"model": {"sharing": "none"}}, "different networks"),
    ],
)
def test_networks_that_cannot_be_packed(name, students, changes, message):
    """The error follows from the configuration alone, before any data is opened."""
    asked = {"model": {"name": name, "students": students, **changes.get("model", {})}}
    asked |= {"method": {"name": "dml"}}
    for mode in ("auto", "separate", "stacked"):
        resolve(asked | {"train": {"execution": mode}})
    with pytest.raises(UserError, match=f"train.execution=packed: .*{message}") as error:
        resolve(asked | {"train": {"execution": "packed"}})
    assert "\n" not in str(error.value)


def test_one_student_runs_separately():
    """Earlier runs of a plan may train a single network with the same settings."""
    for mode in ("stacked", "packed"):
        assert build("densenet_bc_12_100", (1,), mode).executions == ["separate"]


# --- training ---------------------------------------------------------------------------------------

RUN = {
    "model__students": (0.25, 0.25),
    "model__shared_stages": 1,
    "train__epochs": 1,
    "train__log_every_steps": 1,
    **STEADY,
}


def test_a_run_may_resume_in_another_mode(tmp_path, monkeypatch, capsys):
    """Packed until it is interrupted, then stacked: records and checkpoint are those of a separate run."""
    write = MetricWriter.write

    def interrupted(self, step, epoch, split, values):
        write(self, step, epoch, split, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    single.run(tiny_config(**RUN), tmp_path / "separate", one_device())
    assert "branches run" not in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(MetricWriter, "write", interrupted)
        with pytest.raises(Interrupted):
            single.run(tiny_config(**RUN, train__execution="packed"), tmp_path / "run", one_device())
    assert 1 < max(r["step"] for r in read_metrics(tmp_path / "run")) < 6
    single.run(tiny_config(**RUN, train__execution="stacked"), tmp_path / "run", one_device())
    assert_same_run(tmp_path / "run", tmp_path / "separate", rtol=1e-5)
    configs = [load_run(tmp_path / name).config for name in ("run", "separate")]
    assert fingerprint(configs[0]) == fingerprint(configs[1])


def setup_of(method="oem", **changes):
    setup = prepare(tiny_config(method, **RUN | {"train__batch_size": 4} | changes), one_device())
    return setup, init_state(setup.networks, setup.optimizer, 0, setup.taught)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return user_cache()


def test_the_fastest_mode_is_measured_and_kept(cache):
    setup, state = setup_of()
    networks, said = choose_execution(setup, state, measured=True)
    chosen = networks.ensemble.execution
    assert said.startswith(f"branches run {chosen} (")
    assert "measured on cpu" in said
    (kept,) = cache.glob("*")
    seconds = dict(np.load(kept))
    assert seconds.keys() == {"separate", "stacked", "packed"}
    assert chosen == min(seconds, key=seconds.get)
    # From now on the kept figures decide for every run that trains the same, with any seed.
    setup, state = setup_of(seed=1)
    for fast in seconds:
        np.savez(kept, **{mode: 0.001 if mode == fast else 0.02 for mode in seconds})
        networks, said = choose_execution(setup, state, measured=True)
        assert networks.ensemble.execution == fast
        assert said.startswith(f"branches run {fast} (1 ms per step; ")
        assert said.endswith(" 20; measured before on cpu)")


def test_a_damaged_cache_is_measured_again_and_an_unwritable_one_is_no_error(cache):
    setup, state = setup_of(
        "baseline", model__students=(0.5, 0.25), model__shared_stages=2, model__sharing="base"
    )
    for damaged in (False, True):
        if damaged:
            (kept,) = cache.glob("*")
            kept.write_bytes(kept.read_bytes()[:200])
        _, said = choose_execution(setup, state, measured=True)
        assert "measured on cpu" in said
        (kept,) = cache.glob("*")
        assert dict(np.load(kept)).keys() == {"separate", "packed"}
    kept.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    assert "measured on cpu" in choose_execution(setup, state, measured=True)[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pcl", "dckd"])
def test_every_method_can_be_measured(cache, method, finished):
    """PCL has a view per student and copies of the networks, DCKD frozen teachers."""
    changes = (
        {"train__accumulation_steps": 2} if method == "pcl" else {"method__teachers": (str(finished[0]),)}
    )
    setup, state = setup_of(method, **changes)
    assert "measured on cpu" in choose_execution(setup, state, measured=True)[1]


def test_a_mode_that_is_asked_for_is_used(cache):
    for mode in ("separate", "stacked", "packed"):
        setup, state = setup_of(train__execution=mode)
        networks, said = choose_execution(setup, state, measured=True)
        assert (networks.ensemble.execution, said) == (mode, "")
    setup, state = setup_of()
    networks, said = choose_execution(setup, state)
    assert (networks.ensemble.execution, said) == ("separate", ""), "on CPU nothing is measured"
    networks, said = choose_execution(setup, state, before="packed", measured=True)
    assert (networks.ensemble.execution, said) == ("packed", ""), "a run that is resumed keeps its mode"
    assert not list(cache.glob("execution-*"))
