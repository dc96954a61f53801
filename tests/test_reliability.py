"""What a run survives: losses that are not finite, damaged checkpoints and files, changes, signals."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import ROOT, command, latest_state, one_device, plain_environment, tiny_config, tiny_flags

import ekd_jax
from ekd_jax.common.errors import Interrupted, UserError
from ekd_jax.runs import history
from ekd_jax.runs.checkpoint import Checkpoints, open_checkpoints, saved_steps
from ekd_jax.runs.history import Permit, read_history
from ekd_jax.runs.metrics import MEASURED, METRICS, read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import TrainState
from ekd_jax.training import loop, single
from ekd_jax.training import step as training_step
from ekd_jax.training.interrupt import Interrupt
from ekd_jax.training.replay import replay
from ekd_jax.training.tally import NEVER, Tally, skip_nonfinite

ANY = Permit("--extend")


def train(path, permit=None, **changes):
    return single.run(tiny_config(**changes), path, one_device(), permit=permit)


def assert_same_state(one, other):
    jax.tree.map(np.testing.assert_array_equal, latest_state(one), latest_state(other))


# --- losses that are not finite ---------------------------------------------------------------


def test_a_tally_knows_the_first_step_and_the_metrics_that_were_not_finite():
    tally = Tally.of({"loss": 0.0, "a": 0.0, "b": 0.0})
    values = [(1.0, 1.0, 1.0), (np.inf, 1.0, np.nan), (np.nan, np.nan, np.nan), (2.0, 2.0, 2.0)]
    for skips, sums in ((False, np.nan), (True, 3.0)):
        found = tally
        for step, row in enumerate(values, 1):
            found = found.add(
                np.int32(step), dict(zip(tally.sums, map(np.float32, row), strict=True)), skips
            )
        assert found.first_broken == (2, ["loss", "b"])
        assert int(found.broken["a"]) == 3
        np.testing.assert_equal(float(found.sums["loss"]), sums)
        assert int(found.skipped) == 2 * skips
    assert tally.first_broken is None
    assert int(tally.broken["a"]) == NEVER


STATE = TrainState(
    step=np.int32(4),
    params={
        "base": {"w": np.ones(2, np.float32)},
        "students": {"1": {"w": np.ones(3, np.float32)}},
        "method": {},
    },
    batch_stats={"base": {}, "students": {}, "method": {}},
    opt_state=(np.zeros(2, np.float32), np.int32(4)),
    copies={},
)


@pytest.mark.parametrize("broken", ["", "loss", "base", "students", "opt_state"])
def test_a_step_is_skipped_if_anything_new_is_not_finite(broken):
    """Then all is as before but the number of the step; otherwise nothing is changed by looking."""

    def step(state, amount):
        worse = {name: np.inf if name == broken else amount for name in ("base", "students", "opt_state")}
        params = {
            name: jax.tree.map(lambda leaf, name=name: leaf + worse[name], tree) if name in worse else tree
            for name, tree in state.params.items()
        }
        momentum, count = state.opt_state
        new = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=(momentum + worse["opt_state"], count + 1)
        )
        return new, {"loss": np.float32(np.nan if broken == "loss" else 1.0)}

    expected, _ = step(STATE, 3.0)
    new, metrics = jax.jit(skip_nonfinite(step))(STATE, 3.0)
    if broken:
        expected = dataclasses.replace(STATE, step=np.int32(5))
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    finite = {name for name, value in metrics.items() if np.isfinite(value)}
    names = {"loss": "loss", "base": "base/update_norm", "students": "student_1/update_norm"}
    assert metrics.keys() - finite == ({names.get(broken, "optimizer/update_norm")} if broken else set())
    if not broken:
        assert float(metrics["student_1/update_norm"]) == pytest.approx(3 * 3**0.5)


def nonfinite_at(number, step):
    """Make a training step whose parameters are not finite at one step."""

    def broken(state, *given):
        new, metrics = step(state, *given)
        factor = jax.numpy.where(new.step == number, np.nan, 1.0).astype(np.float32)
        return dataclasses.replace(
            new, params=jax.tree.map(lambda leaf: leaf * factor, new.params)
        ), metrics

    return broken


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, caplog):
    """The state stays as it was at step 6, training goes on, and the run says so; also after a resume."""
    usual = training_step.make_step
    monkeypatch.setattr(training_step, "make_step", lambda *given: nonfinite_at(6, usual(*given)))
    path = tmp_path / "run"
    with caplog.at_level("WARNING", "ekd_jax"):
        summary = train(path, train__nonfinite="skip")
    assert summary.steps == 19
    assert "at step 6: the step is skipped (1 of at most 10 steps so far)" in caplog.text
    assert "'base/update_norm'" in caplog.text
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(latest_state(path)))
    records = {r["step"]: r for r in read_metrics(path) if r["split"] == "train"}
    assert [records[number]["skipped"] for number in (4, 8, 12)] == [0, 1, 0]
    assert all(np.isfinite(r["student_1/loss_ce"]) for r in records.values())


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """Step 3, of which a checkpoint is due, breaks the parameters; its loss was computed before and is finite."""
    usual = training_step.make_step
    monkeypatch.setattr(training_step, "make_step", lambda *given: nonfinite_at(3, usual(*given)))
    with pytest.raises(
        UserError, match="the new values of .*'base', .* are not finite at step 3; no check"
    ):
        train(tmp_path / "run")
    assert saved_steps(tmp_path / "run") == []


def test_too_many_skipped_steps_stop_the_run(tmp_path):
    changes = {"optimizer__learning_rate": 1e9, "train__nonfinite": "skip", "train__nonfinite_limit": 2}
    with pytest.raises(UserError, match=r"steps had to be skipped; train.nonfinite_limit=2 is reached"):
        train(tmp_path / "run", **changes)


def test_a_run_is_rewound_with_a_smaller_learning_rate(tmp_path, caplog):
    """A rate that is far too high is divided by 1000 until the loss stays finite; the history tells."""
    path = tmp_path / "run"
    changes = {"optimizer__learning_rate": 3e5, "train__nonfinite": "rewind", "train__rewind_factor": 1e-3}
    with caplog.at_level("WARNING", "ekd_jax"):
        assert train(path, **changes).steps == 19
    entries = read_history(path)
    assert [entry.how for entry in entries] == [history.REWIND] * len(entries)
    assert history.rewinds(path) == len(entries) >= 1
    assert entries[-1].knobs["learning rate factor"][1] == pytest.approx(1e-3 ** len(entries))
    assert "rewound 1 of at most 10 times" in caplog.text


def test_a_step_is_replayed_and_its_first_array_named(tmp_path):
    path, changes = tmp_path / "run", {"optimizer__learning_rate": 1e9}
    with pytest.raises(UserError, match=r"--replay_step=(\d+) shows where it begins") as error:
        train(path, **changes)
    number = int(str(error.value).split("--replay_step=")[1].split()[0])
    said = replay(tiny_config(**changes), path, number, one_device())
    assert f"step {number} of {path}, replayed from the start" in said
    while "it began earlier" in said:  # an update may overflow while the loss is still finite
        number -= 1
        assert f"--replay_step={number} shows the step before" in said
        said = replay(tiny_config(**changes), path, number, one_device())
    assert "state before the step: all finite" in said
    assert "the first that is not finite is" in said
    before = replay(tiny_config(**changes), path, 1, one_device())
    assert "everything is finite" in before
    with pytest.raises(UserError, match=r"not finite at step \d+: replay that step"):
        replay(tiny_config(**changes), path, number + 3, one_device())


# --- damaged checkpoints ------------------------------------------------------------------------


def damage(checkpoint: pathlib.Path, how: str) -> None:
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "flipped":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif how == "emptied":
        for file in checkpoint.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    else:
        shutil.rmtree(checkpoint / "state")


def test_a_checkpoint_holds_the_values_of_its_step(tmp_path):
    """Values that change while they are written in the background are saved as they were."""
    numbers = [0.0] * 1_000_000  # long enough for the change to come before its end is written
    state = TrainState(step=np.int32(1), params={"a": np.zeros(3)}, batch_stats={}, opt_state=(), copies={})
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, {"log": {"numbers": numbers}}, None)
        numbers[-1] = 1.0
        checkpoints.wait()
        assert checkpoints.restore(state, 1)[1]["log"]["numbers"][-1] == 0.0


def test_runs_of_one_process_save_at_the_same_time(tmp_path):
    def save(number):
        with contextlib.closing(Checkpoints(tmp_path / f"run{number}")) as checkpoints:
            for step in range(1, 21):
                params = {"a": np.full(3, number, np.float32)}
                state = TrainState(
                    step=np.int32(step), params=params, batch_stats={}, opt_state=(), copies={}
                )
                checkpoints.save(state, {"number": number}, None)
            checkpoints.wait()
            restored, run = checkpoints.restore(state, 20)
            return restored.params["a"][0], run["number"]

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(save, range(3))] == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("how", ["flipped", "removed"])  # and every file in every way: soak/test_damage.py
def test_a_damaged_latest_checkpoint_is_set_aside(copy, finished, how, caplog):
    """Training goes on from the one before, says so, and ends with the same bits."""
    damage(copy / "checkpoints" / "19", how)
    with caplog.at_level("WARNING", "ekd_jax"):
        train(copy)
    assert f"moved to {copy / 'damaged' / '19'}, going on from step 18" in caplog.text
    assert saved_steps(copy) == [18, 19]
    assert_same_state(copy, finished[0])


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(copy):
    for step in saved_steps(copy):
        damage(copy / "checkpoints" / str(step), "emptied")
    with pytest.raises(UserError, match="all checkpoints in .* are damaged .*put back a copy"):
        train(copy)
    assert saved_steps(copy) == [18, 19]


# --- files of a run -------------------------------------------------------------------------------


CONTENTS = {
    "empty": b"",
    "torn": b'{"model": {"na',
    "null": b"null",
    "list": b"[1, 2]",
    "binary": b"\x80\xff\x00",
}


DAMAGED = [
    (name, content) for name in ("config.json", "students.json", "summary.json") for content in CONTENTS
]


@pytest.mark.parametrize(("name", "content"), [*DAMAGED, ("environment.json", "torn")])
def test_damaged_files_of_a_run_get_one_line(finished, tmp_path, name, content, caplog):
    """All who read the file name it; what is only a log is begun anew, with a warning."""
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    (path / name).write_bytes(CONTENTS[content])
    if name == "environment.json":
        (path / "summary.json").unlink()
        with caplog.at_level("WARNING", "ekd_jax"):
            train(path)
        assert "environment.json is begun anew" in caplog.text
        assert len(json.loads((path / name).read_text())) == 1
        return
    readers = [lambda: train(path)]
    if name != "summary.json":
        readers.append(lambda: load_run(path))
    if name == "students.json":
        (path / "summary.json").unlink()
    for reader in readers:
        with pytest.raises(UserError, match=name) as error:
            reader()
        assert "\n" not in str(error.value)
    assert (path / name).read_bytes() == CONTENTS[content]


def test_damaged_lines_of_metrics_are_left_out(copy, finished, caplog):
    """A torn tail, binary lines and records of something else are left out by every reader, and counted."""
    good = read_metrics(finished[0])
    lines = (copy / METRICS).read_bytes().splitlines(keepends=True)
    foreign = [b"\x80\x81\n", b"null\n", b"[" * 100_000 + b"\n", b'{"a": 1}\n', b'{"step": 3, "epo']
    (copy / METRICS).write_bytes(b"".join([*lines[:3], *foreign[:4], *lines[3:], foreign[4]]))
    with caplog.at_level("WARNING", "ekd_jax"):
        assert read_metrics(copy) == good
    assert f"4 of {len(lines) + 5} lines are damaged and left out" in caplog.text
    train(copy)
    assert read_metrics(copy) == good


def test_training_goes_on_without_tensorboard(copy, caplog):
    """Its files repeat metrics.jsonl; one that cannot be written ends nothing."""
    shutil.rmtree(copy / "tensorboard")
    (copy / "tensorboard").write_text("in the way")
    with caplog.at_level("WARNING", "ekd_jax"):
        assert train(copy, ANY, train__epochs=4).steps == 25
    assert "training goes on without TensorBoard" in caplog.text
    assert read_metrics(copy)[-1]["step"] == 25


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/cat/1.jpg"), "had to end: .*'/data/cat/1.jpg'"),
        (OSError(errno.EIO, "Input/output error"), "had to end: .*Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write to --workdir="),
    ],
)
def test_what_failed_while_training_is_named(copy, monkeypatch, error, message):
    """A disk of images is not called the directory of the run."""
    monkeypatch.setattr(single, "_train", raising(error))
    with pytest.raises(UserError, match=f"{message}.*what was saved before is intact"):
        train(copy)


def raising(error):
    def fail(*given):
        raise error

    return fail


def test_wrong_initial_weights_are_found_before_the_directory_is_claimed(finished, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(UserError, match="model.initial_weights"):
        train(path, model__initial_weights=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="this network .* take a student of the same network and width"):
        train(path, model__initial_weights=f"{finished[0]}:2", model__students=(0.25,))
    assert not path.exists()


# --- changes of a run -------------------------------------------------------------------------------


def test_a_run_is_extended(copy, finished, tmp_path, caplog):
    """It goes on from its state, optimizer and records included, as a run would that had been interrupted."""
    shutil.copy(finished[0] / "summary.json", copy)
    with caplog.at_level("INFO", "ekd_jax"):
        summary = train(copy, ANY, train__epochs=4)
    assert summary.steps == 25
    assert "--extend, from step 19 on: train.epochs=4.0 (was 3.0)" in caplog.text
    (entry,) = read_history(copy)
    assert (entry.step, entry.knobs) == (19, {"train.epochs": (3.0, 4.0)})
    assert json.loads((copy / "summary-19.json").read_text())["steps"] == 19
    assert [r["step"] for r in read_metrics(copy) if r["split"] == "test"] == [6, 12, 19, 25]
    assert train(copy, ANY, train__epochs=4) == summary, "the same command again has nothing to do"
    with pytest.raises(UserError, match=r"changed at step 19 with --extend: pass the same again"):
        train(copy)


def test_a_branch_leaves_the_run_as_it_is(finished, tmp_path):
    before = {p: p.read_bytes() for p in finished[0].rglob("*") if p.is_file()}
    for path in (tmp_path / "one", tmp_path / "two"):
        ekd_jax.train(
            tiny_config(train__epochs=4, optimizer__learning_rate=0.01),
            path,
            from_run=finished[0],
            verbose=False,
        )
    assert {p: p.read_bytes() for p in finished[0].rglob("*") if p.is_file()} == before
    assert [entry.how for entry in read_history(path)] == ["--from_run", "extend"]
    assert read_history(path)[0].source == str(finished[0])
    assert_same_state(tmp_path / "one", tmp_path / "two")
    with pytest.raises(UserError, match="is not empty and no branch of"):
        history.branch(finished[0], copy_of_nothing(tmp_path))


def copy_of_nothing(tmp_path):
    path = tmp_path / "other"
    path.mkdir()
    (path / "file").touch()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"model__students": (0.25, 0.5)}, "model.students"),
        ({"train__batch_size": 16}, "train.batch_size"),
        ({"train__epochs": 2}, "has taken 19 steps, and with these changes it would have 12"),
        ({"optimizer__name": "adam", "train__epochs": 4}, "its state would have other arrays"),
    ],
)
def test_changes_that_are_not_possible(copy, changes, message):
    before = (copy / "config.json").read_text()
    with pytest.raises(UserError, match=message):
        train(copy, ANY, **changes)
    assert (copy / "config.json").read_text() == before
    assert not (copy / "history.json").exists()


def test_resume_with_changes_one_knob(copy):
    rate = "optimizer.learning_rate=0.01"
    flags = [*tiny_flags(data__mean=(0.0,), data__std=(1.0,)), f"--workdir={copy}"]
    for asked, message in (
        ([f"--config.{rate}"], f"--resume_with={rate}"),
        (["--resume_with=seed=3"], "seed cannot change once a run has started"),
        (["--resume_with=0.01"], "must be KNOB=VALUE"),
        (["--resume_with=optimizer.rate=1"], "unknown knob config.optimizer.rate"),
        ([f"--resume_with={rate}", "--extend"], "pass one of --resume_with and --extend"),
    ):
        done = command("main", *flags, *asked)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = command("main", *flags, f"--resume_with={rate}", "--resume_with=train.epochs=4.0")
    assert done.returncode == 0, done.stderr
    assert "learning rate=0.0001 (was 0.001)" in done.stderr, "both milestones are over at step 19"
    assert read_history(copy)[-1].knobs["learning rate"] == (1e-3, 1e-4)
    assert load_run(copy).config.optimizer.learning_rate == 0.01
    assert saved_steps(copy)[-1] == 25


# --- signals ------------------------------------------------------------------------------------------


START = """
import sys
from conftest import tiny_config, one_device
import pathlib, ekd_jax.training.single as single
from ekd_jax import cli
from ekd_jax.common.log import shown
with shown():
    cli.guarded(lambda: single.run(tiny_config(train__epochs=400), pathlib.Path(sys.argv[1]), one_device()))
"""


def start(path, *before):
    """A run that compiles everything anew: a signal may come meanwhile."""
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.Popen(
        [*before, sys.executable, "-c", START, str(path)],
        env=plain_environment() | own,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until(process, text):
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"{text!r} did not come")


def test_a_closed_terminal_ends_a_run_that_is_saved(tmp_path):
    process = start(tmp_path / "run")
    lines_until(process, "step 4/")
    process.send_signal(signal.SIGHUP)
    said = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGHUP
    assert f"saved in {tmp_path / 'run'}: run the same command to resume" in said
    with open_checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.choose() >= 4


def test_a_signal_while_the_step_is_compiled_ends_the_run_at_once(tmp_path):
    process = start(tmp_path / "run")
    lines_until(process, "training from step 0")
    time.sleep(1.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert time.monotonic() - began < 10


def test_a_second_signal_acts_at_once():
    code = (
        "import os, signal, time\n"
        "from ekd_jax.training.interrupt import Interrupt\n"
        "Interrupt()\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "time.sleep(30)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain_environment(), capture_output=True, cwd=ROOT
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert b"killed by a second signal" in done.stderr
    assert time.monotonic() - began < 25


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt = Interrupt()
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        interrupt.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_at_an_evaluation_owes_it(finished, tmp_path, monkeypatch):
    """The state is saved without evaluating; the run that resumes evaluates first, and ends with the same bits."""
    path = tmp_path / "run"
    usual = loop.Loop._evaluate_and_save

    came = {12}

    def stopped(self):
        if self.step in came:
            return usual(self)
        came.add(self.step)
        self.record.interrupt.signal = signal.SIGTERM
        self._save(None)
        return signal.SIGTERM

    monkeypatch.setattr(loop.Loop, "_evaluate_and_save", stopped)
    for number in (6, 19):
        with pytest.raises(Interrupted, match=f"interrupted at step {number}"):
            train(path)
    summary = train(path)
    assert_same_state(path, finished[0])

    def without_times(record):
        return {k: v for k, v in record.items() if k not in MEASURED}

    assert [*map(without_times, read_metrics(path))] == [*map(without_times, read_metrics(finished[0]))]
    assert [s.top1_best for s in summary.students] == [s.top1_best for s in finished[1].students]
    assert saved_steps(path) == saved_steps(finished[0])


# --- the same bits ------------------------------------------------------------------------------------


def test_a_resume_says_what_is_different(copy, caplog):
    """Versions and devices, for then the last bits may differ; nothing if all is as before."""
    (*_, last) = environments = json.loads((copy / "environment.json").read_text())
    (copy / "environment.json").write_text(json.dumps([*environments[:-1], last | {"jax": "0.1.2"}]))
    for expected in (f"jax {last['jax']} (was 0.1.2)", ""):
        caplog.clear()
        with caplog.at_level("WARNING", "ekd_jax"):
            train(copy)
        assert (expected in caplog.text) if expected else ("last bits" not in caplog.text)
        (copy / "summary.json").unlink()


def test_deterministic_runs_tell_xla_and_do_not_measure(tmp_path):
    flags = [*tiny_flags(train__epochs=0.2), f"--workdir={tmp_path / 'run'}"]
    done = command("main", *flags, "--deterministic")
    assert done.returncode == 0, done.stderr
    (environment,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "--xla_gpu_deterministic_ops=true" in environment["xla_flags"]
    assert load_run(tmp_path / "run").config.train.execution == "separate"
