"""Averaged weights, early stopping, frozen stages, class weights and the balanced sampler."""

import contextlib
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import latest_state, one_device, tiny_config
from jax.interpreters import partial_eval

from ekd_jax.common import parallel
from ekd_jax.common.errors import Interrupted, UserError
from ekd_jax.config.build import build_networks
from ekd_jax.config.resolve import result_fields, to_dict
from ekd_jax.data.arrays import from_arrays
from ekd_jax.data.dataset import Example, Facts, Subset
from ekd_jax.data.feed import training_feed
from ekd_jax.data.labels import labels_of, make_class_weights
from ekd_jax.data.opening import open_data
from ekd_jax.data.order import Sampler
from ekd_jax.methods import losses
from ekd_jax.runs.metrics import MetricWriter, read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import batch_shapes, init_state, method_variables
from ekd_jax.runs.teachers import load_teacher
from ekd_jax.training import plans, single
from ekd_jax.training.comparison import Entry
from ekd_jax.training.comparison_table import as_text, compare
from ekd_jax.training.dry_run import dry_run
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.report import summary_table
from ekd_jax.training.step import make_step, objective

SHAPE = (8, 8, 1)
EVERYTHING = {  # with one network, as compiling is what takes time
    "model__students": (0.25,),
    "train__epochs": 2.0,
    "train__log_every_steps": 2,
    "train__ema_decay": 0.9,
    "train__class_weights": ("balanced",),
    "train__patience_epochs": 50.0,
    "data__validation_examples": 100,
    "data__sampler": "balanced",
    "model__frozen_stages": 1,
    "optimizer__name": "adamw",
    "optimizer__learning_rate": 1e-4,  # so that rounding stays rounding
    "optimizer__clip_norm": 0.5,
}


def leaves(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(found, expected):
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def random_batch(size=16):
    generator = np.random.default_rng(0)
    return generator.normal(size=(size, *SHAPE)).astype(np.float32), np.arange(size) % 10


def state_and_step(config):
    networks = build_networks(config, 10, SHAPE)
    optimizer = make_optimizer(config, networks.method, 100)
    return networks, init_state(networks, optimizer, 0), jax.jit(make_step(networks, optimizer))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The directory and the summary of a run with all options, on one device."""
    path = tmp_path_factory.mktemp("everything") / "run"
    return path, single.run(tiny_config("baseline", **EVERYTHING), path, one_device())


def test_options_do_not_depend_on_devices(everything, tmp_path):
    """Eight devices, each with a fourth of the state, get the losses and the averages of one."""
    single.run(
        tiny_config("baseline", **EVERYTHING, train__fsdp=4), tmp_path / "eight", parallel.make_mesh(fsdp=4)
    )
    one, eight = (
        [r for r in read_metrics(p) if r["split"] == "train"] for p in (everything[0], tmp_path / "eight")
    )
    assert len(one) == 6
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in eight], rtol=1e-5)
    averages = [leaves(latest_state(p)["copies"]) for p in (everything[0], tmp_path / "eight")]
    for name, leaf in averages[0].items():
        np.testing.assert_allclose(leaf, averages[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_options_resume_with_the_same_bits(everything, tmp_path, monkeypatch):
    write = MetricWriter.write

    def signaled(self, step, epoch, split, values):
        write(self, step, epoch, split, values)
        if (step, split) == (6, "train"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", signaled)
    with pytest.raises(Interrupted):
        single.run(tiny_config("baseline", **EVERYTHING), tmp_path / "run", one_device())
    monkeypatch.undo()
    summary = single.run(tiny_config("baseline", **EVERYTHING), tmp_path / "run", one_device())
    assert summary.ensemble == everything[1].ensemble
    assert_same_bits(latest_state(tmp_path / "run"), latest_state(everything[0]))


# --- averaged weights ------------------------------------------------------------------------------


def test_the_average_is_that_of_the_formula():
    """d = min(decay, (1 + t) / (10 + t)), of parameters, statistics and the method's own layers."""
    _, state, step = state_and_step(tiny_config("one", train__ema_decay=0.3))
    batch = random_batch()
    expected = {k: np.float64(v) for k, v in leaves([state.params, state.batch_stats]).items()}
    for t in range(1, 5):
        state, _ = step(state, *batch)
        d = min(0.3, (1 + t) / (10 + t))
        now = leaves([state.params, state.batch_stats])
        expected = {k: d * v + (1 - d) * np.float64(now[k]) for k, v in expected.items()}
    found = leaves([state.copies["1"]["params"], state.copies["1"]["batch_stats"]])
    assert any("method" in name for name in found)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_average_is_evaluated_extracted_and_taught_from(everything):
    path, summary = everything
    run = load_run(path)
    last = [r for r in read_metrics(path) if r["split"] == "test"][-1]
    found = run.evaluate()
    recorded = {name: value for name, value in last.items() if "/" in name}
    assert {name: found[name] for name in recorded} == pytest.approx(recorded, rel=1e-5)
    assert run.names == ["student_1", "ensemble"]
    assert summary.ensemble.top1_last == last["ensemble/top1"]
    state = latest_state(path)
    of_average, raw = (
        tree["students"]["1"]["head"] for tree in (state["copies"]["1"]["params"], state["params"])
    )
    assert_same_bits(run.student(1).variables["params"]["head"], of_average)
    assert_same_bits(load_teacher(f"{path}:1", path).variables["params"]["head"], of_average)
    assert (of_average["linear"]["kernel"] != raw["linear"]["kernel"]).any()


@pytest.mark.parametrize("method", ["snapshot", "pcl"])
def test_methods_with_copies_of_their_own_are_not_averaged(method):
    with pytest.raises(UserError, match=f"train.ema_decay=0.9: {method} keeps copies of its own"):
        tiny_config(method, train__ema_decay=0.9)


# --- early stopping --------------------------------------------------------------------------------

STOPS = {
    "train__epochs": 8.0,
    "train__evaluate_every_epochs": 1.0,
    "train__patience_epochs": 2.0,
    "data__validation_examples": 100,
    "optimizer__learning_rate": 1e-30,  # nothing changes, and accuracy does not rise
    "method__name": "baseline",
    "model__students": (0.25,),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    path = tmp_path_factory.mktemp("stopped") / "run"
    config = tiny_config("baseline", **{k: v for k, v in STOPS.items() if k != "method__name"})
    return path, config, single.run(config, path, one_device())


def test_a_run_stops_when_validation_does_not_rise(stopped):
    """An epoch has 6 steps; the first evaluation is the best one."""
    path, _, summary = stopped
    assert (summary.stopped.step, summary.stopped.best_step, summary.stopped.planned_steps) == (18, 6, 50)
    assert (summary.steps, summary.epochs, summary.best_on) == (18, pytest.approx(2.88), "validation")
    records = read_metrics(path)
    assert [r["step"] for r in records if r["split"] == "validation"] == [6, 12, 18]
    assert [r["step"] for r in records if r["split"] == "test"] == [18]
    assert [r["step"] for r in records if r["split"] == "train"] == [4, 8, 12, 16, 18]
    assert (
        "stopped early at step 18 of 50: the ensemble's top-1 on the validation set was best at step 6"
        in (summary_table(summary))
    )


def test_a_stopped_run_is_complete(stopped, tmp_path):
    """For the same command, for plans, for comparisons; and if it was killed before its summary was written."""
    path, config, summary = stopped
    assert plans.run(config, path, one_device()) == summary
    entry = Entry("early", path, config, {})
    assert entry.complete
    assert "runs that stopped early: early 1 of 1" in as_text(compare([entry]))
    (path / "summary.json").rename(tmp_path / "kept.json")
    again = single.run(config, path, one_device())
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert again.stopped == summary.stopped
    assert json.loads((path / "summary.json").read_text())["ensemble"] == kept["ensemble"]


def test_evaluations_decide_when_a_run_stops(stopped):
    """So they may not change when it is resumed; without early stopping they may."""
    knob = "train.evaluate_every_epochs"
    assert knob in result_fields(to_dict(stopped[1]))
    assert knob not in result_fields(to_dict(tiny_config()))


def test_early_stopping_is_never_on_the_test_set(tmp_path):
    with pytest.raises(UserError, match=r"patience_epochs=3 needs images .*validation_examples=1000"):
        tiny_config(train__patience_epochs=3.0)
    with pytest.raises(UserError, match="srm_dictionaries does not train the networks"):
        tiny_config("srm_dictionaries", train__patience_epochs=3.0, data__validation_examples=9)
    own = {"train__patience_epochs": 3.0, "data__validation_examples": 9, "method__cycles": 2}
    with pytest.raises(UserError, match="snapshot has a learning rate schedule of its own"):
        dry_run(tiny_config("snapshot", **own), tmp_path / "run")


# --- frozen stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "students", "stages", "frozen"),
    [
        ("oem", (1, 0.5), 0, {"base": {"stem"}}),
        ("baseline", (1,), 2, {"students": {"stem", "stage1", "stage2"}}),
    ],
)
def test_frozen_stages_do_not_change(method, students, stages, frozen):
    """Neither weights, decayed or averaged, nor statistics; all else does."""
    config = tiny_config(
        method, model__students=students, model__frozen_stages=stages, train__ema_decay=0.5
    )
    networks, before, step = state_and_step(config)
    images, labels = random_batch()
    after = before
    for _ in range(2):
        after, _ = step(after, images, labels)

    def is_frozen(name):
        parts = name.replace("']", "").split("['")
        return any(section in parts and owned & set(parts) for section, owned in frozen.items())

    kinds = lambda s: [s.params, s.batch_stats, s.copies["1"]["params"], s.copies["1"]["batch_stats"]]
    old, new = leaves(kinds(before)), leaves(kinds(after))
    assert sum(map(is_frozen, old)) >= 2 * 5 * (stages + 1) / 2
    for name, leaf in old.items():
        assert is_frozen(name) == np.array_equal(leaf, new[name]), name
    slots = sum(leaf.size for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim)
    learned = sum(leaf.size for name, leaf in leaves(before.params).items() if not is_frozen(name))
    assert slots == learned  # momentum of what learns, and of nothing else

    @jax.jit
    def outputs(images):
        variables = {"params": before.params, "batch_stats": before.batch_stats}
        return [networks.ensemble.apply(variables, images, train=train)[0] for train in (True, False)]

    training, evaluating = outputs(images)
    maps = (
        (training.base, evaluating.base)
        if method == "oem"
        else (training.features[1][0], evaluating.features[1][0])
    )
    np.testing.assert_allclose(*maps, rtol=1e-5, atol=1e-5)  # the stage that is frozen last
    assert not np.allclose(training.logits_SxBxK, evaluating.logits_SxBxK, atol=1e-2)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "oem",
            {"model__frozen_stages": 3},
            "frozen_stages=3: the 2 students share a stem and 0 stages: at most 0",
        ),
        (
            "oem",
            {"model__frozen_stages": 3, "model__shared_stages": 2},
            "the 2 students share a stem and 2 stages: at most 2",
        ),
        (
            "baseline",
            {"model__frozen_stages": 4, "model__students": (1,)},
            "the network has a stem and 3 stages: at most 3",
        ),
        ("dml", {"model__frozen_stages": 0}, "2 students that share nothing have no stage in common"),
        ("oem", {"model__frozen_stages": -2}, "must be -1, or not negative"),
    ],
)
def test_stages_that_cannot_be_frozen(method, changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(method, **changes)


def test_frozen_random_weights_are_mentioned(tmp_path):
    said = dry_run(tiny_config(model__frozen_stages=0), tmp_path / "run")
    assert "the stem and 0 stages do not learn (model.frozen_stages); they keep random values" in said


# --- class weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [False, True])
def test_weighted_cross_entropy_is_a_weighted_mean(shares):
    """For integers as torch.nn.CrossEntropyLoss(weight=w): sum_i w_y l_i / sum_i w_y."""
    generator = np.random.default_rng(0)
    z, y, w = generator.normal(size=(2, 6, 4)), generator.integers(0, 4, 6), generator.uniform(0.1, 3, 4)
    given = generator.dirichlet(np.ones(4), 6) if shares else np.eye(4)[y]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -(given * w * log_p).sum((-2, -1)) / (given * w).sum()
    labels = jnp.asarray(given, jnp.float32) if shares else jnp.asarray(y)
    found = losses.cross_entropy(jnp.float32(z), labels, jnp.float32(w))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    equal = losses.cross_entropy(jnp.float32(z), labels, jnp.full(4, 7.0))
    np.testing.assert_allclose(equal, losses.cross_entropy(jnp.float32(z), labels), rtol=1e-5)
    assert not losses.cross_entropy(jnp.float32(z), labels, jnp.zeros(4)).any()


@pytest.mark.parametrize(
    "name", ["oem", "one", "dml", "okddip", "cl_ilr", "kdcl", "ffl", "pcl", "byot", "snapshot"]
)
def test_the_cross_entropy_of_every_method_is_weighted(name):
    """Every term `loss_ce` depends on the weights, as its program shows, and no other term does."""
    students = {"cl_ilr": (1, 1), "byot": (1,), "snapshot": (1,)}.get(name, (1, 0.5))
    changes = {"method__cycles": 2} if name == "snapshot" else {}
    networks = build_networks(tiny_config(name, model__students=students, **changes), 10, SHAPE)
    outputs, batch = batch_shapes(networks)
    variables = method_variables(
        init_state(networks, make_optimizer(tiny_config(), networks.method, 9), 0).variables
    )
    weights = jax.ShapeDtypeStruct((10,), jnp.float32)

    def terms(weights, outputs, batch):
        given = batch.replace(class_weights=weights)
        return objective(networks.method, variables, outputs, given)[1][0]

    closed, shapes = jax.make_jaxpr(terms, return_shape=True)(weights, outputs, batch)
    found = {}
    for i, term in enumerate(sorted(shapes)):
        used = [j == i for j in range(len(shapes))]
        found[term] = partial_eval.dce_jaxpr(closed.jaxpr, used)[1][0]
    assert any(term.endswith("/loss_ce") for term in found)
    for term, depends in found.items():
        assert depends == (term == "loss" or "/loss_ce" in term), term


def uneven(counts=(40, 8, 2), name="arrays"):
    """Return a set in memory whose classes have so many training images."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.random.default_rng(1).integers(0, 255, (len(labels), *SHAPE), dtype=np.uint8)
    return from_arrays(images, labels, [f"class {i}" for i in range(len(counts))], images, labels, name)


def uneven_config(**changes):
    few = {"data__name": "arrays", "data__train_examples": 0, "train__batch_size": 16}
    return tiny_config(**few | changes)


def test_balanced_weights_are_scikit_learns():
    config = uneven_config(train__class_weights=("balanced",))
    weights = make_class_weights(config, open_data(config, uneven()))
    np.testing.assert_allclose(weights, [50 / (3 * n) for n in (40, 8, 2)], rtol=1e-6)
    held_out = uneven_config(train__class_weights=("balanced",), data__validation_examples=10)
    data = open_data(held_out, uneven())
    counts = np.bincount([data.train[i].label for i in range(40)], minlength=3)
    np.testing.assert_allclose(make_class_weights(held_out, data), 40 / (3 * counts), rtol=1e-6)


def test_weights_belong_to_names():
    config = uneven_config(train__class_weights=("class 2=5", "class 0=0.5"))
    found = make_class_weights(config, open_data(config, uneven()))
    assert found.tolist() == [0.5, 1.0, 5.0]
    assert make_class_weights(uneven_config(), open_data(uneven_config(), uneven())) is None


@pytest.mark.parametrize(
    "asked", [("class 1",), ("class 1=-1",), ("class 1=nan",), ("class 1=inf",), ("balanced", "class 1=2")]
)
def test_what_is_no_weight(asked):
    with pytest.raises(UserError, match="class_weights=.* must be balanced, or classes with weights"):
        uneven_config(train__class_weights=asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("class 3=1",), "there is no class 'class 3'; did you mean 'class"),
        (("class 1=1", "class 1=2"), "names the class 'class 1' twice"),
        (("balanced",), "class 'class 2' has no training example"),
    ],
)
def test_weights_that_do_not_fit_the_classes(asked, message):
    config = uneven_config(train__class_weights=asked)
    data = open_data(config, uneven((40, 8, 0)))
    with pytest.raises(UserError, match=message):
        make_class_weights(config, data)


def test_unknown_classes_are_found_before_anything_runs(tmp_path):
    config = tiny_config(train__class_weights=("ten=2",))
    with pytest.raises(UserError, match=r"no class 'ten'; did you mean 'seven'|no class 'ten'"):
        dry_run(config, tmp_path / "run")
    with pytest.raises(UserError, match="no class 'ten'"):
        single.run(config, tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


class Unlabeled:
    """Examples that say their labels one by one."""

    def __init__(self, labels):
        self.own, self.read, self.fingerprint = labels, 0, f"unlabeled {labels}"

    def __len__(self):
        return len(self.own)

    def __getitem__(self, index):
        self.read += 1
        return Example(np.zeros(SHAPE, np.uint8), self.own[index], f"example {index}")


def test_labels_are_read_once_where_the_set_does_not_know_them():
    facts, examples = Facts("mine", SHAPE, ("a", "b", "c"), 4, 4), Unlabeled([2, 0, 1, 2])
    assert labels_of(examples, facts).tolist() == labels_of(examples, facts).tolist() == [2, 0, 1, 2]
    assert examples.read == 4
    assert labels_of(Subset(Subset(uneven().train, np.arange(5)), np.array([4, 0])), facts).tolist() == [
        uneven().train[4].label,
        uneven().train[0].label,
    ]
    with pytest.raises(UserError, match="the label of example 3 is 2, but mine has 2 classes"):
        labels_of(Unlabeled([0, 1, 0, 2]), Facts("mine", SHAPE, ("a", "b"), 4, 4))


# --- the balanced sampler --------------------------------------------------------------------------


def test_every_class_is_equally_likely():
    """And every example of a class, with replacement; a function of seed and epoch."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [3000, 900, 100]))  # none of class 2
    sampler = Sampler(5, 4000, labels)
    drawn = sampler.epoch(3)
    counts = np.bincount(labels[drawn], minlength=4)
    assert counts[2] == 0
    assert np.abs(counts[[0, 1, 3]] - 4000 / 3).max() < 4 * np.sqrt(4000 * 2 / 9)
    of_last = np.bincount(drawn[labels[drawn] == 3], minlength=4000)[labels == 3]
    assert of_last.min() >= 1  # of 100 examples that are drawn 13 times each
    assert of_last.max() < 40
    assert drawn.tolist() == Sampler(5, 4000, labels).epoch(3).tolist()
    others = (sampler.epoch(4), Sampler(6, 4000, labels).epoch(3))
    assert all((drawn != other).mean() > 0.9 for other in others)
    assert sorted(Sampler(5, 4000).epoch(3)) == list(range(4000))
    assert Sampler(7, 6, np.array([0, 0, 0, 0, 0, 1])).epoch(2).tolist() == [3, 0, 0, 5, 5, 1]


@pytest.mark.parametrize("step", [0, 2, 7])
def test_balanced_batches_are_the_same_everywhere(step):
    """Whole, divided or streamed, on one device or eight."""
    found = []
    for placement, devices in (("replicated", 1), ("sharded", 8), ("stream", 1), ("stream", 8)):
        config = uneven_config(data__sampler="balanced", data__placement=placement)
        data, mesh = open_data(config, uneven()), parallel.make_mesh(jax.devices()[:devices])
        with contextlib.closing(training_feed(config, data, mesh, 10)) as feed:
            picked = jax.jit(feed.select_batch)(feed.load(step), 0)
            found.append([np.asarray(x).tolist() for x in picked])
    assert all(batch == found[0] for batch in found)
    assert len(set(found[0][2])) < 16  # class 2 has two images
    _, labels, numbers = found[0]
    assert labels == [uneven().train[n].label for n in numbers]
