"""Runs of several seeds: bit-equal to single ones, resumable, and their statistics."""

import json
import os
import shutil
import signal
import statistics
import time

import jax
import numpy as np
import pytest
from conftest import command, one_device, tiny_config
from killing import assert_same_run
from scipy import stats

from ekd_jax.api import train, train_seeds
from ekd_jax.common import parallel
from ekd_jax.common.errors import Interrupted, UserError
from ekd_jax.runs.checkpoint import Checkpoints, saved_steps
from ekd_jax.runs.history import Permit
from ekd_jax.runs.run import load_run
from ekd_jax.runs.status import read_status
from ekd_jax.runs.teachers import load_teacher
from ekd_jax.runs.workdir import seed_runs
from ekd_jax.training import comparison, interrupt, seeds, several, single
from ekd_jax.training.comparison_table import as_markdown, as_text, compare, paired
from ekd_jax.training.dry_run import dry_run

ONE_DEVICE = one_device()
SHORT = {"model__students": (0.25,), "data__train_examples": 100, "train__epochs": 2.0}


def config(asked=(), **changes):
    return tiny_config(**SHORT | changes, seeds=tuple(asked))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the directory of the runs of seeds 3 and 1, and their statistics."""
    path = tmp_path_factory.mktemp("seeds") / "run"
    return path, seeds.run(config((3, 1)), path, ONE_DEVICE)


@pytest.fixture
def copied(folder, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(folder[0], path)
    return path


def test_the_run_of_a_seed_is_the_one_that_is_trained_alone(folder, tmp_path):
    path, found = folder
    alone = tmp_path / "alone"
    summary = single.run(config(seed=1), alone, ONE_DEVICE)
    assert_same_run(path / "seed1", alone)
    assert (path / "seed1" / "config.json").read_text() == (alone / "config.json").read_text()
    row = found.labels["run"]
    assert row.seeds == (3, 1)
    assert row.ensemble.top1[1] == summary.ensemble.top1_last


def test_the_summary_of_the_folder(folder):
    path, found = folder
    each = [json.loads((path / f"seed{k}" / "summary.json").read_text()) for k in (3, 1)]
    top1 = [summary["students"][0]["top1_last"] for summary in each]
    written = json.loads((path / "seeds.json").read_text())["labels"]["run"]
    assert written["students"][0]["top1"] == top1
    assert written["students"][0]["mean"] == pytest.approx(np.mean(top1))
    assert written["students"][0]["std"] == pytest.approx(np.std(top1, ddof=1))
    shown = f"{statistics.mean(top1):.2f} +- {statistics.stdev(top1):.2f}"
    assert shown in as_text(found)
    assert shown.replace("+-", "±") in (path / "seeds.md").read_text()
    status = read_status(path)
    assert [(part.seed, part.state) for part in status.parts] == [(1, "complete"), (3, "complete")]


def test_complete_seeds_are_not_trained_again_and_more_can_be_added(copied, monkeypatch):
    shutil.rmtree(copied / "seed1")
    times = {file: file.stat().st_mtime_ns for file in (copied / "seed3").rglob("*")}
    (copied / "seed5").mkdir()  # killed before anything was written
    found = seeds.run(config((1, 5)), copied, ONE_DEVICE)
    assert sorted(found.labels["run"].seeds) == [1, 3, 5], "all that are in the folder"
    assert {file: file.stat().st_mtime_ns for file in (copied / "seed3").rglob("*")} == times
    trained = []
    monkeypatch.setattr(several.plans, "run", lambda *given: trained.append(given))
    seeds.run(config((1, 3, 5)), copied, ONE_DEVICE)
    assert not trained


def test_side_by_side_they_are_the_same_runs(folder, tmp_path, caplog, monkeypatch):
    """Also if a signal ends them on the way."""
    path = tmp_path / "run"
    mesh = parallel.make_mesh(jax.devices()[:2])
    usual = Checkpoints.save

    def save(self, *given):
        usual(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)
        while not interrupt._handling[-1].signal:
            time.sleep(0.01)

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(interrupt.Interrupt, "_end_at_the_second", lambda *_: None)  # each run may send one
    with pytest.raises(
        Interrupted, match="interrupted; all runs are saved: run the same command to continue"
    ):
        seeds.run(config((3, 1)), path, mesh, at_once=2)
    monkeypatch.undo()
    assert len(list(path.rglob("summary.json"))) < 2, "the first that saved has ended there"
    with caplog.at_level("INFO", "ekd_jax"):
        found = seeds.run(config((3, 1)), path, mesh, at_once=2)
    for name in ("seed3", "seed1"):
        assert_same_run(path / name, folder[0] / name)
    assert found.labels["run"].students == folder[1].labels["run"].students
    assert any(": resuming from step 3 of 6" in line for line in caplog.messages)


def test_a_tracker_follows_one_run_at_a_time(tmp_path):
    with pytest.raises(UserError, match=r"at_once=2: train.tracker=wandb follows one run at a time"):
        seeds.run(config((0, 1), train__tracker="wandb"), tmp_path / "new", at_once=2)


def test_side_by_side_one_that_fails_ends_the_others(tmp_path, monkeypatch):
    path, train_one = tmp_path / "run", several.plans.run

    def run(own, directory, *rest):
        if own.seed == 3:
            while not saved_steps(path / "seed1"):
                time.sleep(0.01)
            raise UserError("the disk is full")
        return train_one(own, directory, *rest)

    monkeypatch.setattr(several.plans, "run", run)
    with pytest.raises(UserError, match=r"seed 3: the disk is full"):
        seeds.run(config((1, 3, 5)), path, parallel.make_mesh(jax.devices()[:2]), at_once=2)
    assert saved_steps(path / "seed1")
    assert not (path / "seed1" / "summary.json").exists()
    assert not (path / "seed5").exists()


@pytest.mark.parametrize(("at_once", "nearest"), [(0, 1), (3, 2), (16, 8)])
def test_how_many_at_once_is_not_possible(at_once, nearest, tmp_path):
    with pytest.raises(UserError, match=f"at_once={at_once} .*; nearest: {nearest}$"):
        train_seeds(config((0, 1)), tmp_path / "new", at_once=at_once)
    assert not (tmp_path / "new").exists()


def test_the_configuration_must_be_the_same_for_all_seeds(copied):
    with pytest.raises(UserError, match=r"optimizer.momentum: 0.9 there, 0.5 now"):
        seeds.check(config((7,), optimizer__momentum=0.5), copied)
    permit = Permit("--extend")
    assert len(seeds.check(config((7,), optimizer__momentum=0.5), copied, permit)) == 3
    assert not (copied / "seed7").exists()


def test_folders_that_hold_something_else(folder, tmp_path):
    with pytest.raises(UserError, match="holds a run of one seed"):
        seeds.check(config((0, 1)), folder[0] / "seed1")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds other files \(mine.txt\)"):
        seeds.check(config((0, 1)), tmp_path)
    one = r"holds runs of the seeds 1, 3: name the directory of one, such as .*/seed1$"
    for reads in (
        load_run,
        lambda path: single.run(config(), path, ONE_DEVICE),
        lambda path: load_teacher(f"{path}:1", tmp_path),
    ):
        with pytest.raises(UserError, match=one):
            reads(folder[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((1, 1), "different whole numbers"),
        ((-1, 0), "none negative"),
        ((0.5,), "type int"),
        (("a",), "int"),
    ],
)
def test_seeds_that_are_not_possible(asked, message):
    with pytest.raises(UserError, match=message):
        config(asked)


def test_from_python_and_in_a_dry_run(folder, tmp_path):
    with pytest.raises(UserError, match="train_seeds trains several seeds"):
        train(config((0, 1)), tmp_path / "new")
    with pytest.raises(UserError, match="seeds is empty"):
        train_seeds(config(), tmp_path / "new")
    assert train_seeds(config((3, 1)), folder[0], verbose=False).n == 2
    text = dry_run(config((8, 9)), tmp_path / "new")
    assert text.endswith("/new/seed8; nothing was trained; then the same in seed9")
    assert not (tmp_path / "new").exists()


def test_flags_for_one_run_are_refused(tmp_path):
    flags = ["--config=configs/digits.py", "--config.seeds=(0,1)", f"--workdir={tmp_path}/run"]
    for flag in ("--replay_step=3", "--from_run=somewhere"):
        result = command("main", *flags, flag)
        assert result.returncode == 2
        assert f"{flag.partition('=')[0]} is for one run, not for config.seeds=(0, 1)" in result.stderr
        assert result.stderr.count("\n") == 1


# --- statistics, and `compare --runs` ---------------------------------------------------------------


@pytest.mark.parametrize("differences", [[1.0, 2.5, -0.5, 3.0, 0.2], [0.5, 0.7], [2.0, 2.0, 2.0]])
def test_paired_differences_have_the_intervals_of_scipy(differences):
    found = paired(differences)
    assert found["difference"] == pytest.approx(np.mean(differences))
    constant = len(set(differences)) == 1  # for which scipy gives nan
    expected = (2.0, 2.0) if constant else stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx(tuple(expected))
    assert paired(differences[:1]) == {"difference": differences[0]}
    assert paired([]) == {}


def pretend(folder, changes, top1):
    """Write complete runs that were never trained: seed -> top-1 of the only student."""
    for seed, value in top1.items():
        path = folder / f"seed{seed}"
        shutil.copytree(changes["like"], path, ignore=shutil.ignore_patterns("checkpoints"))
        stored = json.loads((path / "config.json").read_text()) | {"seed": seed}
        stored["optimizer"]["momentum"] = changes["momentum"]
        stored["train"]["epochs"] = changes.get("epochs", stored["train"]["epochs"])
        (path / "config.json").write_text(json.dumps(stored))
        summary = json.loads((path / "summary.json").read_text()) | {"seed": seed}
        summary["students"][0]["top1_last"] = summary["ensemble"]["top1_last"] = value
        (path / "summary.json").write_text(json.dumps(summary))


def test_folders_of_seeds_are_compared_by_seed(folder, tmp_path):
    like = folder[0] / "seed1"
    base, better, longer = tmp_path / "base", tmp_path / "better", tmp_path / "longer"
    pretend(base, {"like": like, "momentum": 0.9}, {0: 90.0, 1: 92.0, 2: 91.0})
    pretend(better, {"like": like, "momentum": 0.8}, {2: 92.5, 0: 91.0, 1: 92.0, 7: 10.0})
    pretend(longer, {"like": like, "momentum": 0.9, "epochs": 9.0}, {0: 90.0})
    runs = comparison.existing([base, better])
    found = compare(runs, str(base))
    student = found.labels[str(better)].students[0]
    assert student.difference == pytest.approx(2.5 / 3), "seed 7 has no partner"
    expected = stats.ttest_rel([91.0, 92.0, 92.5], [90.0, 92.0, 91.0]).confidence_interval()
    assert student.interval == pytest.approx(tuple(expected))
    shown = f"+0.83 [{expected[0]:+.2f}, {expected[1]:+.2f}]"
    assert shown in as_text(found)
    assert shown in as_markdown(found, "the command")

    apart = comparison.existing([base / "seed0", base / "seed2", better])
    assert [run.label for run in apart] == [str(base / "seed0")] * 2 + [str(better)] * 4
    for paths, message in [
        ([base, base / "seed0"], "the same configuration and the same seed, 0"),
        ([base, longer], "has train.epochs=9.0, and .* has 2.0: .*--allow=train.epochs"),
        ([base, tmp_path], "has no complete run|is not the directory of a run"),
        ([base, tmp_path / "none"], "is not the directory of a run"),
    ]:
        with pytest.raises(UserError, match=message):
            comparison.existing(paths)
    assert len(comparison.existing([base, longer], ["train.epochs"])) == 4

    students = better / "seed7" / "students.json"
    text = students.read_text()
    digits = json.loads(text)["data"]["fingerprint"]
    students.write_text(text.replace(digits, "0" * 64))
    with pytest.raises(UserError, match=r"seed7 does not have the data of"):
        comparison.existing([base, better])

    assert seed_runs(base) == {k: base / f"seed{k}" for k in (0, 1, 2)}
    result = command("compare", f"--runs={base}", f"--baseline={longer}", "--allow=train.epochs", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["baseline"] == str(longer)
    for flags, message in [
        ([f"--baseline={base}"], "--baseline is for --runs"),
        ([f"--runs={base}", "--seeds=3"], "--seeds is for a comparison that is trained"),
        ([f"--runs={base}", "--allow=train.epoch"], "did you mean 'train.epochs'"),
        (["--allow=train.epochs"], "--allow is for --runs"),
    ]:
        result = command("compare", *flags)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
