"""A search over knobs: its space, the trials, resuming, other searches and other files, and several processes."""

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT, command, one_device, plain_environment, tiny_config, tiny_flags
from killing import compiled_once

from ekd_jax.common.errors import UserError
from ekd_jax.config.resolve import to_dict
from ekd_jax.config.space import Choices, Range, check_space, read_space, with_values
from ekd_jax.runs.checkpoint import saved_steps
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.training import search, search_database, search_found, single
from ekd_jax.training.search import PrunedError
from ekd_jax.training.search_found import COMPLETE, FAILED, PRUNED, Search, Trial
from ekd_jax.training.search_table import as_markdown, as_text, train_command

optuna = pytest.importorskip("optuna")

SHORT = {"data__train_examples": 100, "data__validation_examples": 40, "train__epochs": 2.0}
RATE = "optimizer.learning_rate"


def config(**changes):
    return tiny_config(**SHORT | changes)


def a_search(path, space=None, **fields):
    own = fields.pop("config", config())
    return Search(path, own, check_space(space or {RATE: [0.05, 0.2]}, own), **fields)


# --- the space ------------------------------------------------------------------------------------


def test_values_have_the_types_of_their_knobs():
    found = check_space(
        {
            RATE: {"low": 1e-3, "high": 1, "log": True},
            "train.batch_size": {"low": 16, "high": 64, "step": 16},
            "optimizer.momentum": {"low": 0, "high": 0.9, "step": 0.3},
            "model.students": [[1, 0.5], 2, (1, (0.5, 0.5, 0.25))],
            "data.flip": [True, False],
        },
        config(),
    )
    assert found == {
        RATE: Range(1e-3, 1.0, log=True),
        "train.batch_size": Range(16, 64, step=16),
        "optimizer.momentum": Range(0.0, 0.9, step=0.3),
        "model.students": Choices(((1, 0.5), 2, (1, (0.5, 0.5, 0.25)))),
        "data.flip": Choices((True, False)),
    }
    assert isinstance(found[RATE].high, float)
    assert found["train.batch_size"].listed() == [16, 32, 48, 64]
    assert found[RATE].listed() == []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        drawn = {knob: values.suggest(trial, knob) for knob, values in found.items()}
        assert 1e-3 <= drawn[RATE] <= 1
        assert drawn["train.batch_size"] in (16, 32, 48, 64)
        assert type(drawn["train.batch_size"]) is int
        assert drawn["model.students"] in found["model.students"].values
        with_values(config(), drawn)
        for knob, values in found.items():  # as they are read back from a database
            assert values.restored(trial.params[knob]) == drawn[knob] == values.suggest(trial, knob)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "with at least one"),
        ([RATE], "must return a dict"),
        ({5: [1, 2]}, "must be the name of a knob"),
        ({"train.lr": [0.1, 0.2]}, "did you mean 'optimizer.learning_rate'"),
        ({"optimizer.learning_rat": [0.1, 0.2]}, "did you mean 'optimizer.learning_rate'"),
        ({RATE: [0.1, -1]}, "must be above 0"),
        ({RATE: {"low": 0, "high": 1}}, "must be above 0"),
        ({RATE: ["0.1", 1]}, "must be of type float"),
        ({RATE: 0.1}, "must be a list of choices, or a range"),
        ({RATE: [0.1]}, "needs at least two choices"),
        ({RATE: []}, "needs at least two choices"),
        ({RATE: [0.1, 1, 1.0]}, "the same choice twice"),
        ({RATE: {"low": 1, "high": 0.1}}, "low=1 must be below high=0.1"),
        ({RATE: {"low": 0.1}}, "has no 'high'"),
        ({RATE: {"low": 0.1, "max": 1}}, "unknown part 'max'"),
        ({RATE: {"low": 0.1, "high": 1, "stp": 1}}, "did you mean 'step'"),
        ({RATE: {"low": 0.1, "high": 1, "log": 10}}, "must be True or False"),
        ({RATE: {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "has log and step"),
        ({RATE: {"low": 0.1, "high": 1, "step": 0.4}}, "must divide high - low"),
        ({RATE: {"low": 0.1, "high": 1, "step": 0}}, "must be a number above 0"),
        ({RATE: {"low": float("nan"), "high": 1}}, "must be a finite number"),
        ({"optimizer.weight_decay": {"low": 0, "high": 1, "log": True}}, "must be above 0 with log=True"),
        ({"train.batch_size": {"low": 16, "high": 64.0}}, "must be of type int"),
        ({"train.batch_size": {"low": 16, "high": 64, "step": 1.5}}, "must be a whole number"),
        ({"model.dropout": {"low": -1, "high": 0.5}}, "must be -1, or at least 0"),
        ({"data.flip": {"low": False, "high": True}}, "is not a number: give a list of choices"),
        ({"data.policy": {"low": "none", "high": "randaugment"}}, "is not a number"),
        ({"data.policy": ["none", "randaugmint"]}, "did you mean 'randaugment'"),
        ({"model.students": [(1, 0.5), (1, 0.01)]}, "smallest usable width"),
        ({"seed": [0, 1]}, "the best seed is luck"),
        ({"seeds": [(0, 1), (2, 3)]}, "the best seed is luck"),
        ({"data.validation_examples": [40, 50]}, "chooses the images"),
        ({"train.execution": ["packed", "separate"]}, "does not change the result"),
        (
            {"method.name": ["oem", "baseline"], "method.temperature": [1, 2]},
            "unknown knob config.method.temp",
        ),
        ({"train.epochs": [2, 3]}, "in --space and on the command line"),
    ],
    ids=str,
)
def test_a_space_that_is_not_possible_gets_one_line(space, message):
    with pytest.raises(UserError) as error:
        check_space(space, config(), ["train.epochs"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function get_space"),
        ("def get_space(:", "line 1: invalid syntax"),
        ("def get_space():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
    ids=range(4),
)
def test_files_that_fail_get_one_line(tmp_path, text, message):
    file = tmp_path / "space.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_space(str(file))
    assert str(file) in str(error.value)


def test_a_space_is_read_from_a_file_or_the_command_line(tmp_path):
    file = ROOT / "configs" / "spaces" / "digits.py"
    asked = read_space(str(file))
    assert check_space(asked, config()).keys() == asked.keys()
    assert read_space(str({RATE: [0.1, 1]})) == {RATE: [0.1, 1]}
    with pytest.raises(UserError, match="must be a Python dict"):
        read_space("{x: 1}")
    with pytest.raises(UserError, match="did you mean '.*spaces/digits.py'"):
        read_space(str(file.with_name("digit.py")))


def test_another_method_takes_its_own_defaults():
    own = config(method__temperature=7.0)
    assert with_values(own, {RATE: 0.3}).method.temperature == 7.0
    assert with_values(own, {"method.name": "dml"}, []).method.name == "dml"
    assert with_values(own, {"method.name": "oem"}, []).method.temperature != 7.0
    assert with_values(own, {"method.name": "oem"}, ["method.temperature"]).method.temperature == 7.0


# --- trials that are trained ----------------------------------------------------------------------

GRID = {"train.batch_size": [32, 4096], RATE: [0.05, 1e30]}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A search of four trials, of which one is complete, and what it found."""
    path = tmp_path_factory.mktemp("search") / "run"
    own = a_search(path, GRID, sampler="grid")
    return own, search.run(own, mesh=one_device())


@pytest.fixture
def copied(done, tmp_path):
    shutil.copytree(done[0].path, tmp_path / "run")
    return dataclasses.replace(done[0], path=tmp_path / "run")


def test_the_objective_is_of_the_last_evaluation_on_validation_images(done):
    own, found = done
    records = [r for r in read_metrics(own.path / "trial0") if r["split"] == "validation"]
    last = records[-1]
    assert last["epoch"] == pytest.approx(2.0, abs=0.5)
    assert found.best.top1 == {
        name: last[f"{name}/top1"] for name in ("student_1", "student_2", "ensemble")
    }
    assert found.best.objective == statistics.mean(last[f"student_{k}/top1"] for k in (1, 2))
    assert found.best.objective * 40 / 100 == pytest.approx(
        round(found.best.objective * 80 / 100) / 2
    )  # of 40 images
    assert search.score("ensemble", found.best.top1) == last["ensemble/top1"]
    assert search.score("student_2", found.best.top1) == last["student_2/top1"]


def test_a_trial_is_a_run_with_its_values(done):
    own, found = done
    stored = json.loads((own.path / "trial0" / "config.json").read_text())
    assert stored == to_dict(with_values(own.config, found.best.values))
    assert found.best.values == {"train.batch_size": 32, RATE: 0.05}
    assert load_run(own.path / "trial0").config == with_values(own.config, found.best.values)


def test_trials_whose_values_are_to_blame_fail_and_the_search_goes_on(done):
    own, found = done
    assert [(t.number, t.state) for t in found.trials] == [
        (0, COMPLETE),
        (1, FAILED),
        (2, FAILED),
        (3, FAILED),
    ]
    diverged, *too_large = found.trials[1:]
    assert diverged.values == {"train.batch_size": 32, RATE: 1e30}
    assert "not finite at step" in diverged.reason
    assert "same command" not in diverged.reason
    assert all("train.batch_size=4096 is above the" in trial.reason for trial in too_large)
    assert not (own.path / "trial2").exists()


def test_the_database_is_one_that_optuna_reads(done):
    own, found = done
    (name,) = optuna.get_all_study_names(f"sqlite:///{own.path}/search.db")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{own.path}/search.db")
    assert study.best_params == found.best.values
    assert study.best_value == found.best.objective
    assert study.trials[0].intermediate_values.keys() == {1}  # the last is its value


def test_the_same_again_trains_nothing(copied, done):
    shutil.rmtree(copied.path / "trial0")
    assert search.run(copied) == done[1]
    assert not (copied.path / "trial0").exists()


def test_tables(done):
    _, found = done
    train = train_command(found, "configs/x.py", {"model.students": (1, 0.5)}, "runs/best")
    assert train == (
        "python -m ekd_jax.main --config=configs/x.py '--config.model.students=(1, 0.5)' "
        "--config.train.batch_size=32 --config.optimizer.learning_rate=0.05 --workdir=runs/best"
    )
    best = Trial(4, COMPLETE, {"train.batch_size": 64, RATE: 0.1}, 99.0, {}, 0.5, 1.0)
    more = dataclasses.replace(found, trials=(best, *found.trials), seeds=(0, 1), importance={RATE: 0.75})
    text = as_text(more, train)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["trial", "mean", "batch_size", "learning_rate"]
    assert lines[2] == ["4", "99.00", "(0.50)", "64", "0.1"]
    assert lines[3] == ["0", f"{found.best.objective:.2f}", "32", "0.05"]
    assert "per cent of 40 validation images, mean of 2 seeds" in text
    assert "trial 1 failed (train.batch_size=32, optimizer.learning_rate=1e+30): " in text
    assert "importance for the best quarter (PED-ANOVA): optimizer.learning_rate 75%" in text
    document = as_markdown(more, "python -m ekd_jax.search", train)
    assert "| 4 | 99.00 (0.50) | 64 | 0.1 |" in document
    assert train in document
    nothing = dataclasses.replace(found, trials=found.trials[1:])
    assert train_command(nothing, "x.py", {}, "y") == ""
    assert "highest" not in as_text(nothing, "")


# --- resuming and drawing, with a formula in place of training ------------------------------------

FORMULA = {RATE: {"low": 1e-3, "high": 1, "log": True}, "method.temperature": {"low": 1, "high": 6}}


def by_formula(ended_at=None):
    """Return what gives a result without training; a trial number that is interrupted once."""
    left = [] if ended_at is None else [ended_at]

    def train(own, study, trial, values, mesh, source):
        if trial.number in left:
            left.remove(trial.number)
            raise KeyboardInterrupt
        value = 90 - abs(values[RATE] - 0.1) - values["method.temperature"] / 10
        return Trial(trial.number, COMPLETE, values, value, {"ensemble": value}, None, 1.0)

    return train


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 12), ("random", 5)])
def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(
    tmp_path, monkeypatch, sampler, trials
):
    monkeypatch.setattr(search, "_train", by_formula())
    whole = search.run(a_search(tmp_path / "whole", FORMULA, sampler=sampler), trials)
    monkeypatch.setattr(search, "_train", by_formula(ended_at=trials - 1))  # TPE's first ten are random
    own = a_search(tmp_path / "killed", FORMULA, sampler=sampler)
    assert len(search.run(own, 2).trials) == 2
    with pytest.raises(KeyboardInterrupt):
        search.run(own, trials)
    found = search.run(own, trials)
    assert found == whole
    assert len({trial.values[RATE] for trial in found.trials}) == trials
    assert len(search.run(own, 3).trials) == trials  # fewer: nothing is trained, all are shown
    assert found.trials[0].objective == max(trial.objective for trial in found.trials)
    other = search.run(a_search(tmp_path / "seed", FORMULA, sampler=sampler, config=config(seed=1)), 1)
    assert {t.values[RATE] for t in other.trials}.isdisjoint({t.values[RATE] for t in found.trials})


def test_the_importance_is_that_of_the_knob_that_decides(tmp_path):
    own, study = a_search(tmp_path / "run", FORMULA), optuna.create_study(direction="maximize")
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    for _ in range(search_found.IMPORTANCE_TRIALS):
        trial = study.ask()
        values = {knob: asked.suggest(trial, knob) for knob, asked in own.space.items()}
        assert search_found.found(own, study).importance == {}
        study.tell(trial, -values["method.temperature"] + 0.01 * values[RATE])
    importance = search_found.found(own, study).importance
    assert next(iter(importance)) == "method.temperature"
    assert importance["method.temperature"] > 0.8
    assert sum(importance.values()) == pytest.approx(1, abs=1e-3)


def test_a_trial_that_another_process_trains_is_left_to_it(tmp_path, monkeypatch):
    own = a_search(tmp_path / "run", FORMULA)
    order = []

    def train(own, study, trial, *rest):
        order.append(trial.number)
        if trial.number == 0:  # as if another process came while this one trains
            search.run(own, 3)
        return by_formula()(own, study, trial, *rest)

    monkeypatch.setattr(search, "_train", train)
    found = search.run(own, 3)
    assert order == [0, 1, 2]
    assert sorted(trial.number for trial in found.in_state(COMPLETE)) == [0, 1, 2]
    assert not list(own.path.glob(".trial*"))


def test_hopeless_trials_are_pruned_in_their_second_half(tmp_path, monkeypatch):
    """Accuracy rises with the epochs; the first five trials reach more than the sixth."""
    said = []

    def train(own, study, trial, values, mesh, source):
        watch, top = search._watch(own, study, trial, own.config), 50 - 10 * (trial.number > 4)
        for epoch in range(1, 8):
            said.append((trial.number, epoch))
            try:
                watch(epoch, {f"student_{k}/top1": top + epoch for k in (1, 2)})
            except PrunedError as error:
                return Trial(trial.number, PRUNED, values, reason=str(error))
        return Trial(trial.number, COMPLETE, values, top + 8.0, {}, None, 1.0)

    monkeypatch.setattr(search, "_train", train)
    own = a_search(tmp_path / "run", FORMULA, prune=True, config=config(train__epochs=8.0))
    found = search.run(own, 6)
    assert [t.number for t in found.in_state(PRUNED)] == [5]
    assert found.trials[-1].reason.startswith("44.00 at epoch 4")
    assert [epoch for number, epoch in said if number == 5] == [1, 2, 3, 4]
    kept = search.run(dataclasses.replace(own, prune=False), 7)
    assert [t.number for t in kept.in_state(COMPLETE)] == [0, 1, 2, 3, 4, 6]


def test_what_watches_a_run_may_end_it(tmp_path):
    seen = []

    def watch(epoch, evaluation):
        seen.append((round(epoch), evaluation["ensemble/top1"]))
        if len(seen) == 1:
            raise PrunedError

    own = config(train__epochs=3.0, model__students=(0.25,))
    with compiled_once(tmp_path / "cache"):
        with pytest.raises(PrunedError):
            single.run(own, tmp_path / "run", one_device(), watch=watch)
        single.run(own, tmp_path / "run", one_device(), watch=watch)
    assert [epoch for epoch, _ in seen] == [1, 1, 2]  # again, because nothing was saved; not the last
    assert seen[0] == seen[1]


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": config(train__epochs=4.0)}, "train.epochs: 2.0 there, 4.0 now"),
        ({"config": config(data__validation_examples=30)}, "data.validation_examples: 40 there, 30 now"),
        ({"objective": "ensemble"}, "objective: mean there, ensemble now"),
        ({"sampler": "tpe"}, "sampler: grid there, tpe now"),
        (
            {"space": {RATE: Choices((0.05, 1.0))}},
            "space of train.batch_size: [32, 4096] there, absent now",
        ),
        ({"config": config(seeds=(0, 1))}, "seeds: [] there, [0, 1] now"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_search_in_the_directory_is_refused(done, changes, message):
    with pytest.raises(UserError) as error:
        search.check(dataclasses.replace(done[0], **changes))
    assert message in str(error.value)
    assert "choose another --workdir" in str(error.value)


def test_knobs_that_change_no_result_may_change_and_newer_ones_may_be_missing(done):
    own, _ = done
    search.check(dataclasses.replace(own, config=config(train__log_every_steps=2)))
    older = own.settings()
    del older["config"]["train.ema_decay"]
    search_database.check_settings(
        types.SimpleNamespace(user_attrs={"settings": older}), own.settings(), own.path
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"config": config(data__validation_examples=0)},
            "hold some out, as in --config.data.validation_examples",
        ),
        ({"objective": "student_3"}, "there are students 1 to 2"),
        ({"objective": "students"}, "must be mean, ensemble, or student_1"),
        (
            {"space": FORMULA, "sampler": "grid"},
            "needs a list of choices or a step for optimizer.learning_rate",
        ),
        ({"prune": True, "config": config(seeds=(0, 1))}, "--prune compares evaluations"),
        ({"config": config(train__batch_size=800)}, "above the"),
        ({"config": config(data__name="folder", data__data_dir="nowhere")}, "nowhere"),
        (
            {"objective": "student_2", "space": {"model.students": [(1,), (1, 0.5)]}},
            "students 1 to 1 with model.students=(1,)",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_searched_gets_one_line_and_nothing_is_written(tmp_path, fields, message):
    with pytest.raises(UserError) as error:
        search.run(a_search(tmp_path / "run", **fields))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    own = a_search(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'ekd_jax\[search\]'"):
        search.check(own)


def damaged(path, how):
    """Damage a database in one of several ways."""
    data = path.read_bytes()
    if how in ("another program's", "another study"):
        path.unlink()
        if how == "another study":
            optuna.create_study(storage=f"sqlite:///{path}", study_name="theirs")
            return
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE recipes (name TEXT)")
        return
    garbage = {"empty": b"", "cut": data[: len(data) // 2], "no database": b"hello " * 1000}
    path.write_bytes(garbage[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no database", "it is damaged (file is not a database)"),
        ("cut", "it is damaged"),
        ("empty", "holds no search of ekd_jax"),
        ("another program's", "holds no search of ekd_jax"),
        ("another study", "holds studies of another program (theirs)"),
    ],
)
def test_a_database_that_is_not_ours_gets_one_line(copied, how, message):
    path = copied.path / "search.db"
    damaged(path, how)
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        search.run(copied)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_other_files_in_the_directory_are_refused(copied, tmp_path):
    (copied.path / "search.db").unlink()
    for path in (copied.path, copied.path / "trial0"):
        with pytest.raises(UserError, match=r"holds other files \(.*\) and no search.db"):
            search.run(dataclasses.replace(copied, path=path))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is not a directory"):
        search.run(dataclasses.replace(copied, path=file))


# --- the command ----------------------------------------------------------------------------------


TOO_LARGE = {"train.batch_size": [3000, 4000]}


def flags(path, trials, **changes):
    return [
        *tiny_flags(data__train_examples=100, data__validation_examples=40, **changes),
        "--space={'optimizer.learning_rate': {'low': 0.01, 'high': 0.2}}",
        f"--trials={trials}",
        f"--workdir={path}",
    ]


def test_the_command_shows_and_writes_what_was_found(copied):
    asked = [
        *(
            flag
            for flag in tiny_flags(data__mean=(0.0,), data__std=(1.0,), **SHORT)
            if "batch_size" not in flag
        ),
        f"--space={GRID}",
        "--sampler=grid",
        f"--workdir={copied.path}",
    ]
    result = command("search", *asked)
    assert (result.returncode, result.stdout.split()[:2]) == (0, ["trial", "mean"]), result.stderr
    assert "python -m ekd_jax.main" in result.stdout
    written = json.loads((copied.path / "search.json").read_text())
    assert written["trials"][0]["values"] == {"train.batch_size": 32, RATE: 0.05}
    assert written["train"] in result.stdout
    assert "test" not in {name.rpartition("/")[0] for name in written["trials"][0]["top1"]}
    assert "--sampler=grid" in (copied.path / "search.md").read_text()
    full = command("search", *asked, largest_file=100)
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1
    small = [flag for flag in asked if not flag.startswith(("--space", "--workdir"))]
    failed = command("search", *small, f"--space={TOO_LARGE}", f"--workdir={copied.path}2")
    assert failed.returncode == 2
    assert "no trial is complete, 2 failed; trial 0: " in failed.stderr.splitlines()[-1]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "ekd_jax.search", *arguments],
        cwd=ROOT,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_trial_that_was_killed_is_resumed_with_its_values(tmp_path, number):
    asked = flags(tmp_path / "run", 2, train__epochs=40.0, train__log_every_steps=2)
    with compiled_once(tmp_path / "cache"):
        process = start(*asked)
        deadline = time.monotonic() + 120
        while len(saved_steps(tmp_path / "run" / "trial0")) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.communicate()
        assert process.returncode == (-9 if number == signal.SIGKILL else 130)
        values = json.loads((tmp_path / "run" / "trial0" / "config.json").read_text())
        result = command("search", *asked)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stderr
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert sorted(trial["number"] for trial in found["trials"]) == [0, 1]
    assert {trial["state"] for trial in found["trials"]} == {COMPLETE}
    assert json.loads((tmp_path / "run" / "trial0" / "config.json").read_text()) == values


@pytest.mark.slow
def test_two_processes_share_the_trials(tmp_path):
    path = tmp_path / "run"
    with compiled_once(tmp_path / "cache"):
        processes = [start(*flags(path, 4)) for _ in range(2)]
        said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    trained = [{line.split()[1] for line in text.splitlines() if " begun" in line} for text in said]
    assert trained[0] | trained[1] == {"0", "1", "2", "3"}
    assert trained[0].isdisjoint(trained[1])
    assert all(trained)
    found = json.loads((path / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == [COMPLETE] * 4


@pytest.mark.slow
def test_with_several_seeds_the_objective_is_their_mean(tmp_path):
    own = a_search(tmp_path / "run", objective="student_2", config=config(seeds=(0, 1)), sampler="grid")
    found = search.run(own, 1, one_device())
    tops = [search.last_evaluation(own.path / "trial0" / f"seed{k}")["student_2"] for k in (0, 1)]
    assert (found.best.objective, found.best.std) == (statistics.mean(tops), statistics.stdev(tops))
    assert found.best.top1["student_2"] == statistics.mean(tops)
    shutil.rmtree(own.path / "trial0" / "seed1")
    assert search.run(own, 1) == found
