"""Whole runs: what they write, that they resume bit for bit, and that devices do not matter."""

import errno
import fcntl
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, Started, one_device, plain_environment, tiny_config, tiny_flags

from ekd_jax.common import parallel
from ekd_jax.common.errors import Interrupted, UserError
from ekd_jax.common.log import logger
from ekd_jax.common.records import as_json
from ekd_jax.config.build import build_networks
from ekd_jax.data.augment import normalize
from ekd_jax.data.resident import ResidentEvaluation
from ekd_jax.runs import workdir
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.runs.evaluation import make_evaluator, measure, results
from ekd_jax.runs.metrics import MEASURED, METRICS, MetricWriter, read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.runs.state import init_variables
from ekd_jax.training import single

NAMES = ["student_1", "student_2", "ensemble"]


def parameters(path):
    """All variables in the latest checkpoint of a run, by name, and its step."""
    config = tiny_config()
    like = init_variables(build_networks(config, 10, (8, 8, 1)), 0)
    with open_checkpoints(path) as checkpoints:
        step = checkpoints.choose()
        variables, _ = checkpoints.restore_variables(like, step)
    return step, {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(variables)}


def assert_equal_runs(a, b):
    (step_a, found), (step_b, expected) = parameters(a), parameters(b)
    assert step_a == step_b
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    timeless = [
        [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(p)] for p in (a, b)
    ]
    assert timeless[0] == timeless[1]


def test_what_a_run_writes(finished):
    path, summary = finished
    records = read_metrics(path)
    assert [r["step"] for r in records if r["split"] == "train"] == [4, 8, 12, 16, 19]
    assert [r["step"] for r in records if r["split"] == "test"] == [6, 12, 19]
    for record in records:
        assert record["epoch"] == pytest.approx(record["step"] * 32 / 200, abs=1e-4)
        wanted = {f"{n}/{m}" for n in NAMES for m in ("top1", "top5", "nll")}
        if record["split"] == "train":
            wanted = {f"{n}/top1" for n in NAMES} | {"loss", *MEASURED}
            wanted |= {f"student_{i}/loss_{t}" for i in (1, 2) for t in ("ce", "intermediate", "kd")}
        assert wanted <= record.keys()
    assert json.loads(json.dumps(as_json(summary))) == json.loads((path / "summary.json").read_text())
    assert summary.seed == 0
    assert summary.seconds.keys() == {"read", "compile", "train", "evaluate"}
    tests = [r for r in records if r["split"] == "test"]
    for row, name in zip([*summary.students, summary.ensemble], NAMES, strict=True):
        assert row.top1_last == tests[-1][f"{name}/top1"]
        assert row.top1_best == max(r[f"{name}/top1"] for r in tests)
    assert summary.students[1].channels == (2, 4, 8)
    assert json.loads((path / "config.json").read_text())["train"]["batch_size"] == 32
    assert json.loads((path / "environment.json").read_text())[0]["jax"] == jax.__version__
    assert list((path / "tensorboard").glob("events*"))


def test_losses_add_up_and_fall(finished):
    """The logged loss is the weighted sum of the logged terms."""
    records = [r for r in read_metrics(finished[0]) if r["split"] == "train"]
    for r in records:
        total = lambda term, r=r: sum(r[f"student_{i}/{term}"] for i in (1, 2))
        expected = 0.7 * total("loss_ce") + 0.15 * total("loss_intermediate") + 0.15 * total("loss_kd")
        assert r["loss"] == pytest.approx(expected, rel=1e-5)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert records[-1]["ensemble/top1"] > records[0]["ensemble/top1"] + 5


def test_a_complete_run_is_only_reported(finished, caplog):
    path, summary = finished
    before = (path / METRICS).read_bytes()
    with caplog.at_level("INFO", "ekd_jax"):
        assert single.run(tiny_config(), path, one_device()) == summary
    assert "complete" in caplog.text
    assert (path / METRICS).read_bytes() == before


@pytest.mark.parametrize(
    "method", ["oem", *(pytest.param(m, marks=pytest.mark.slow) for m in ("one", "kd"))]
)
def test_one_and_eight_devices_give_equal_losses(method, tmp_path, request):
    changes = {"train__log_every_steps": 1, "train__evaluate_every_epochs": 3}
    # A small rate: with a large one training itself spreads any difference, on one device too when its
    # weights are changed by 1e-7 (docs/decisions.md).
    if method == "kd":
        changes["method__teachers"] = (f"{request.getfixturevalue('finished')[0]}:1",)
    config = tiny_config(method, **changes, optimizer__learning_rate=3e-5)
    for name, devices in (("one", 1), ("eight", 8)):
        single.run(config, tmp_path / name, parallel.make_mesh(jax.devices()[:devices]))
    one, eight = (
        [r for r in read_metrics(tmp_path / name) if r["split"] == "train"] for name in ("one", "eight")
    )
    assert len(one) == 19
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in eight], rtol=1e-5)


def test_a_signal_while_a_run_ends_is_not_lost(tmp_path, monkeypatch):
    """The run is complete, and nothing that was to follow it begins."""
    write = MetricWriter.write

    def signaled(self, step, epoch, split, values):
        write(self, step, epoch, split, values)
        if (step, split) == (19, "test"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", signaled)
    with pytest.raises(Interrupted) as ended:
        single.run(tiny_config(), tmp_path / "run", one_device())
    assert ended.value.signal == signal.SIGTERM
    assert single.run(tiny_config(), tmp_path / "run", one_device()).steps == 19


def flags_of(path, **changes):
    """Flags of a run that logs every step."""
    frequent = {"train__log_every_steps": 1, "train__checkpoint_every_epochs": 0.2, "train__epochs": 3}
    return [*tiny_flags(**(frequent | changes)), f"--workdir={path}"]


def start(path, **given):
    return Started("main", *flags_of(path), **given)


def finish_and_compare(path, uninterrupted):
    """The same command once more ends with the same bits and records; returns what it printed."""
    done = start(path).ended()
    assert done.returncode == 0, done.stderr
    assert_equal_runs(path, uninterrupted)
    return done.stderr


def wait_for_records(process, path, number):
    """Returns when metrics.jsonl has so many lines."""
    file, deadline = path / METRICS, time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.ended()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = start(path).ended()
    assert done.returncode == 0, done.stderr
    return path


def test_killed_runs_end_with_the_same_bits(uninterrupted, tmp_path):
    """SIGKILL at four moments, from the first file on and past an epoch's end; then once more."""
    path = tmp_path / "run"
    for file in ("config.json", "students.json"):
        process = start(path)
        while not (path / file).exists():
            assert process.poll() is None, process.ended()
        process.send_signal(signal.SIGKILL)
        process.ended()
    for records in (2, 9):
        process = start(path)
        wait_for_records(process, path, records)
        process.send_signal(signal.SIGKILL)
        process.ended()
    assert "resuming from step" in finish_and_compare(path, uninterrupted)
    assert len(json.loads((path / "environment.json").read_text())) >= 3


@pytest.mark.slow  # the same for SIGHUP: test_a_closed_terminal_ends_a_run_that_is_saved
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_and_say_how_to_go_on(uninterrupted, tmp_path, number):
    path = tmp_path / "run"
    process = start(path)
    wait_for_records(process, path, 5)
    process.send_signal(number)
    done = process.ended(60)
    assert done.returncode == 128 + number
    assert "run the same command to resume" in done.stderr
    assert "Traceback" not in done.stderr
    finish_and_compare(path, uninterrupted)


@pytest.mark.slow
def test_streamed_runs_end_with_the_same_bits(tmp_path):
    """Ctrl-C, which worker processes get, too; SIGKILL; and another number of workers each time."""
    path, streamed = tmp_path / "run", {"data__placement": "stream", "train__epochs": 4}

    def start(path, **changes):  # with resources of its own, which may be leaked
        return subprocess.Popen(
            [sys.executable, "-m", "ekd_jax.main", *flags_of(path, **changes)],
            cwd=ROOT,
            env=plain_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    whole = start(tmp_path / "whole", **streamed)
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out

    process = start(path, **streamed, data__workers=1)
    wait_for_records(process, path, 4)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT
    assert "run the same command to resume" in out
    assert "Traceback" not in out
    assert "leaked" not in out

    process = start(path, **streamed, data__workers=2)
    wait_for_records(process, path, 12)
    process.kill()
    process.communicate()
    process = start(path, **streamed)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "resuming from step" in out
    assert_equal_runs(path, tmp_path / "whole")


def test_only_one_process_at_a_time(tmp_path):
    path = tmp_path / "run"
    process = start(path)
    try:
        wait_for_records(process, path, 1)
        second = start(path).ended(60)
        assert second.returncode == 2
        assert "in use by another process" in second.stderr
    finally:
        process.send_signal(signal.SIGKILL)
        process.ended()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (errno.EAGAIN, "in use by another process"),
        (errno.EACCES, "in use by another process"),
        (errno.ENOLCK, None),
        (errno.EOPNOTSUPP, None),
        (errno.EINVAL, None),
        (errno.ENOSYS, None),
        (errno.EIO, "Input/output error"),
    ],
)
def test_locks_that_fail(code, what, tmp_path, monkeypatch, caplog):
    """A run in use is refused, a file system without locks is warned of, and any other error is named."""

    def fail(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(logger, "propagate", True)
    if what:
        with pytest.raises((UserError, OSError), match=what), workdir.locked(tmp_path):
            pass
        assert not caplog.text
    else:
        with workdir.locked(tmp_path):
            assert (
                f"the file system of {tmp_path} has no locks: nothing keeps a second run out" in caplog.text
            )


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write to --workdir=.* Is a directory: .*\.lock"):
        single.run(tiny_config(), tmp_path, one_device())
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__students": (0.25, 0.5)}, r"model.students: \[0.25, 0.125\] there, \[0.25, 0.5\] now"),
        ({"method__temperature": 3.0}, "method.temperature: 2.0 there, 3.0 now"),
        ({"train__batch_size": 16, "seed": 4}, "seed: 0 there, 4 now; train.batch_size: 32 there, 16 now"),
    ],
)
def test_another_configuration_in_the_same_folder(finished, changes, message):
    path, _ = finished
    before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))
    with pytest.raises(UserError, match=message):
        single.run(tiny_config(**changes), path, one_device())
    assert sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*")) == before


def test_what_does_not_change_the_result_may_change(finished):
    config = tiny_config(train__log_every_steps=2, evaluate__batch_size=64)
    assert single.run(config, finished[0], one_device()) == finished[1]


def test_knobs_that_are_newer_than_a_run_are_at_their_defaults(finished, tmp_path):
    """A run of an earlier version is still the run of its configuration, unless a new knob is used."""
    stored = json.loads((finished[0] / "config.json").read_text())
    del stored["train"]["ema_decay"], stored["optimizer"]["clip_norm"], stored["train"]["class_weights"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    workdir.check(tmp_path, tiny_config())
    with pytest.raises(UserError, match="optimizer.clip_norm: 0.0 there, 1.0 now"):
        workdir.check(tmp_path, tiny_config(optimizer__clip_norm=1.0))


def test_folders_that_are_not_for_runs(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        single.run(tiny_config(), tmp_path, one_device())
    with pytest.raises(UserError, match="not a directory"):
        single.run(tiny_config(), tmp_path / "precious.txt", one_device())
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    # Root may write everywhere, but not into /proc.
    path = pathlib.Path("/proc") if os.geteuid() == 0 else tmp_path
    with pytest.raises(UserError, match="not writable|cannot write"):
        single.run(tiny_config(), path / "run", one_device())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with 1.5 MB, less than the checkpoints of a run and the reserve that is kept."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_noticed_before_writing(uninterrupted, small_disk):
    path = small_disk / "run"
    out = start(path).ended().stderr
    assert "error: cannot write a checkpoint" in out
    assert "are free; make room and run the same command" in out
    assert "Traceback" not in out
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    finish_and_compare(path, uninterrupted)


@pytest.mark.slow
def test_a_write_that_fails_half_way_loses_nothing(uninterrupted, tmp_path):
    """No file may grow past 40 kB: the checkpoint cannot be written. Without the limit the run goes on."""
    path = tmp_path / "run"
    done = start(path, largest_file=40_000).ended()
    out = done.stderr
    assert done.returncode == 2, out
    assert out.splitlines()[-1].startswith("error: cannot write a checkpoint")
    assert "a file would exceed the limit on file sizes; make room and run the same command" in out
    assert "Traceback" not in out
    finish_and_compare(path, uninterrupted)


def test_missing_data_leaves_nothing_behind(tmp_path):
    manual = tmp_path / "manual"
    changes = {"data__name": "cifar10", "data__mean": (0.5,), "data__std": (0.2,)}
    config = tiny_config(**changes, data__data_dir=str(tmp_path / "tfds"), data__manual_dir=str(manual))
    with pytest.raises(UserError, match="holds no cifar-10-binary"):
        single.run(config, tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


def test_batches_that_devices_cannot_share(tmp_path):
    with pytest.raises(UserError, match=r"train.batch_size=36 .* 8 devices; nearest: 32 or 40"):
        single.run(tiny_config(train__batch_size=36), tmp_path / "run", parallel.make_mesh())
    with pytest.raises(UserError, match="above the 200 training examples"):
        single.run(tiny_config(train__batch_size=256), tmp_path / "run", one_device())
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(optimizer__learning_rate=1e9)
    with pytest.raises(
        UserError, match=r"'student_1/loss_ce'.* are not finite at step 3; .*--replay_step=3"
    ):
        single.run(config, tmp_path / "run", one_device())
    assert all(math.isfinite(r["loss"]) for r in read_metrics(tmp_path / "run") if "loss" in r)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_records_past_the_last_checkpoint_are_written_once(tmp_path):
    writer = MetricWriter(tmp_path, 0, 0)
    for step in (1, 2, 3):
        writer.write(step, step / 10, "train", {"loss": 1.0 / step})
    writer.close()
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 4, "epo')  # a kill in the middle of a line
    writer = MetricWriter(tmp_path, 2, 2)
    writer.write(3, 0.3, "train", {"loss": 7.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 7.0)]


# --- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_evaluation_counts_every_example_once(devices, batch_size):
    """Against NumPy, for batches that divide the test set and that do not."""
    config = tiny_config(evaluate__batch_size=batch_size)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (101, 4, 4, 1), dtype=np.uint8)
    labels = generator.integers(0, 10, 101).astype(np.int32)
    weights = generator.normal(size=(16, 10)).astype(np.float32)

    def predict(variables, x):
        return (x.reshape(len(x), -1) @ variables)[None]

    mesh = parallel.make_mesh(jax.devices()[:devices])
    evaluate = make_evaluator(predict, config, 101, mesh)
    placed = parallel.replicate(mesh, (weights, images, labels))
    scores_3xP = measure(evaluate, placed[0], ResidentEvaluation("test", 101, *placed[1:]), mesh)["scores"]
    found = results(scores_3xP, 101, ["student_1"])

    x = np.asarray(normalize(images, config.data.mean, config.data.std)).reshape(101, -1)
    logits = x.astype(np.float64) @ weights
    ranks = (-logits).argsort(1)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = {
        "student_1/top1": 100 * (ranks[:, 0] == labels).mean(),
        "student_1/top5": 100 * (ranks[:, :5] == labels[:, None]).any(1).mean(),
        "student_1/nll": -logp[np.arange(101), labels].mean(),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_evaluates_to_what_the_run_recorded(finished):
    path, summary = finished
    run = load_run(path)
    found = run.evaluate()
    last = [r for r in read_metrics(path) if r["split"] == "test"][-1]
    assert run.checkpoint.step == summary.steps
    recorded = {name: value for name, value in last.items() if "/" in name}
    assert {name: found[name] for name in recorded} == pytest.approx(recorded, rel=1e-5)
