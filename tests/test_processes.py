"""Several processes that train together, for real: each with two virtual devices, over gloo."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, Started, command, latest_state, one_device, plain_environment, tiny_flags

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.common.watch import TRY_AGAIN
from ekd_jax.runs.checkpoint import open_checkpoints
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.training import single

STEADY = {"optimizer__learning_rate": 1e-4}  # so that rounding stays rounding: docs/decisions.md


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def processes(number, path, each=None, devices=2, timeout=60, **changes):
    """So many processes of one run; `each` changes knobs of single ones. Ends them with the block."""
    xla_flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    port = free_port()
    started = []
    for i in range(number):
        flags = [*tiny_flags(**changes | (each or {}).get(i, {})), f"--workdir={path}", f"--process_id={i}"]
        flags += [f"--coordinator=localhost:{port}", f"--num_processes={number}"]
        flags += [f"--coordinator_timeout={timeout}"]
        started.append(Started("main", *flags, environment={"XLA_FLAGS": xla_flags}))
    try:
        yield started
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.ended()


def ended(started):
    """Exit codes and what was printed, of all of them."""
    done = [process.ended(200) for process in started]
    return [each.returncode for each in done], [each.stdout + each.stderr for each in done]


def wait_for_records(path, number, process):
    deadline = time.monotonic() + 120
    while not (path / "metrics.jsonl").exists() or len(read_metrics(path)) < number:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def assert_same_run(path, other, rtol):
    """The same records but for times, and the same parameters, up to rounding."""
    ours, theirs = read_metrics(path), read_metrics(other)
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        losses = [name for name in a if "loss" in name or "nll" in name]
        assert losses
        np.testing.assert_allclose([a[n] for n in losses], [b[n] for n in losses], rtol=rtol)
    a, b = (latest_state(folder)["params"] for folder in (path, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


RUNS = {
    "oem": {"train__fsdp": 4},
    "streamed": {"data__placement": "stream", "data__workers": 0},
    "sharded": {"data__placement": "sharded", "train__accumulation_steps": 2},
    # normalization over few channels would multiply rounding
    "one": {"method__name": "one", "model__students": (1, 0.5)},
    "kd": {"method__name": "kd", "model__students": (0.25,)},
}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param("oem", 2, marks=pytest.mark.slow),  # as preempted ones below
        pytest.param("oem", 4, marks=pytest.mark.slow),
        *(pytest.param(n, 2, marks=pytest.mark.slow) for n in RUNS if n != "oem"),
        *(pytest.param(n, 4, marks=pytest.mark.slow) for n in ("streamed", "one", "kd")),
    ],
)
def test_as_one_process_with_as_many_devices(name, number, tmp_path, request):
    """Training, evaluation and checkpoints; process 0 alone reports and writes."""
    changes = RUNS[name] | STEADY
    if name == "kd":
        changes |= {"method__teachers": (str(request.getfixturevalue("finished")[0]),)}
    with processes(number, tmp_path / "several", **changes) as started:
        codes, printed = ended(started)
    assert codes == [0] * number, printed
    assert f"{2 * number} x cpu" in printed[0]
    assert "everything is in" in printed[0]
    for text in printed[1:]:
        assert not own_lines(text)
    mesh = parallel.make_mesh(jax.devices()[: 2 * number])
    single.run(load_run(tmp_path / "several").config, tmp_path / "one", mesh)
    assert_same_run(tmp_path / "several", tmp_path / "one", rtol=1e-5)


def test_preempted_and_restored_by_another_number_of_processes(tmp_path):
    """SIGTERM to one: all save and end. One process with one device then goes on from there."""
    path = tmp_path / "several"
    frequent = {"train__log_every_steps": 1, **STEADY}
    with processes(2, path, **frequent, train__fsdp=2) as started:
        wait_for_records(path, 3, started[0])
        started[1].send_signal(signal.SIGTERM)
        codes, printed = ended(started)
    assert codes == [128 + signal.SIGTERM] * 2, printed
    step = int(re.search(r"interrupted at step (\d+), saved in", printed[0])[1])
    with open_checkpoints(path) as checkpoints:
        assert checkpoints.choose() == step < 19
    config = load_run(path).config
    single.run(config, path, one_device())
    single.run(config, tmp_path / "one", one_device())
    assert_same_run(path, tmp_path / "one", rtol=1e-5)


def own_lines(printed):
    """What a process printed itself, without what Gloo prints about its connections."""
    lines = [line.partition("[Gloo]")[0] for line in printed.splitlines()]
    return [
        line for line in lines if line and not line.isdigit()
    ]  # its threads write into each other's lines


IN_SHORT = """
import contextlib, os, sys, time

from ekd_jax import cli
from ekd_jax.common import parallel, watch
from ekd_jax.common.errors import UserError

number, port, does = int(sys.argv[1]), sys.argv[2], sys.argv[3]
watch.TICK, watch.SILENT, watch.GRACE = 0.2, 25, 1.0


def main():
    parallel.start(f"localhost:{port}", 3, number, 60)
    parallel.gathered(number)
    os.write(1, b"joined\\n")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        while does == "computes" or (does == "fails" and number != 1):
            parallel.gathered(number)
        if does == "fails":
            time.sleep(0.5)
            raise UserError("a knob is wrong")
        if does == "sleeps":
            time.sleep(60)


cli.guarded(main)
"""


@pytest.mark.parametrize(
    ("does", "sent", "lost", "said"),
    [
        (
            "computes",
            signal.SIGKILL,
            [0],
            r"process 0 on \S+ was lost \(its connection broke\): run the same ",
        ),
        (
            "sleeps",
            signal.SIGSTOP,
            [1],
            r"process 1 on \S+ was lost \(no sign of life for 5 s\): run the same ",
        ),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("sleeps", signal.SIGKILL, [0], r"process 0 on \S+ was lost \(its connection broke\)"),
                ("sleeps", signal.SIGSTOP, [0], r"process 0 on \S+ was lost \(no sign of life for 5 s\)"),
                ("sleeps", signal.SIGKILL, [1], r"process 1 on \S+ was lost \(its connection broke\)"),
                (
                    "computes",
                    signal.SIGKILL,
                    [1, 2],
                    r"process (1|2) on .* and process (1|2) on \S+ was lost",
                ),
                ("fails", 0, [1], r"process 1 on \S+ ended with exit code 2: its own output says why"),
                ("ends", 0, [], ""),
            )
        ),
    ],
)
def test_one_is_lost(does, sent, lost, said, tmp_path):
    """Every survivor ends soon, with one line that names the lost ones; an orderly end is no loss."""
    port = str(free_port())
    read = lambda: [(tmp_path / str(i)).read_text() for i in range(3)]
    with contextlib.ExitStack() as stack:
        started = []
        for i in range(3):
            output = stack.enter_context((tmp_path / str(i)).open("w"))
            command = [sys.executable, "-c", IN_SHORT, str(i), port, does]
            environment = plain_environment() | {"JAX_PLATFORMS": "cpu"}
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            )
            stack.callback(started[i].wait)
            stack.callback(started[i].kill)
        deadline = time.monotonic() + 120
        while any("joined" not in text for text in read()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in lost if sent else ():
            started[number].send_signal(sent)
        since = time.monotonic()
        survivors = [number for number in range(3) if number not in lost]
        codes = [started[number].wait(timeout=60) for number in survivors]
        assert time.monotonic() - since < 20  # 5 s unless the machine is slow
        if not sent:
            assert [process.wait(timeout=60) for process in started][:2] == [codes[0], 2 if lost else 0]
    assert codes == [{"fails": 2, "ends": 0}.get(does, TRY_AGAIN)] * len(survivors), read()
    for number in survivors:
        lines = own_lines(read()[number])[1:]
        assert len(lines) == (1 if said else 0), lines
        assert not said or re.match(f"error: process {number}: {said}", lines[0])
    if does == "fails":
        assert own_lines(read()[1])[1:] == ["error: process 1: a knob is wrong"]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """While it compiles, reads, trains and saves, now one process and now the other; the bits stay the same."""
    frequent = {"train__log_every_steps": 1, "train__checkpoint_every_epochs": 0.2}
    frequent |= {"data__placement": "stream", "data__workers": 1}
    for who, records in ((1, None), (0, None), (0, 4), (1, 9)):
        with processes(2, tmp_path / "killed", **frequent) as started:
            if records is None:  # it compiles
                while "training from step" not in "".join(started[0].printed()):
                    assert started[0].poll() is None, started[0].ended()
                    time.sleep(0.02)
                time.sleep(random.uniform(0, 2))
            else:
                wait_for_records(tmp_path / "killed", records, started[0])
            started[who].send_signal(signal.SIGKILL)
            codes, printed = ended(started)
        assert codes[who] == -signal.SIGKILL
        assert codes[1 - who] == TRY_AGAIN, printed
        *progress, line = own_lines(printed[1 - who])
        assert line.startswith(f"error: process {1 - who}: process {who} on "), printed
        assert line.endswith("run the same command in all processes to resume")
        if who == 0:
            assert not progress
        assert not [line for line in progress if not re.match("(train|test|resum|step)", line.strip())]
    for name in ("killed", "whole"):
        with processes(2, tmp_path / name, **frequent) as started:
            codes, printed = ended(started)
        assert codes == [0, 0], printed
        assert ("resuming from step" in printed[0]) == (name == "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole", rtol=0)


def test_processes_that_disagree(tmp_path):
    with processes(2, tmp_path / "run", {1: {"optimizer__learning_rate": 0.2}}) as started:
        codes, printed = ended(started)
    assert 2 in codes
    assert any("the configuration of process 1 is not that of process 0" in text for text in printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_nobody_answers(number, tmp_path):
    """One line with the address and the time that it waited."""
    port = free_port()
    address = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
    failed = command("main", *tiny_flags(), *address, "--coordinator_timeout=2")
    assert failed.returncode == TRY_AGAIN
    (line,) = failed.stderr.splitlines()
    what = f"waited 2 s at localhost:{port}" if number == 0 else f"at localhost:{port}, in 2 s"
    assert line.startswith("error: process ")
    assert what in line


def slurm(number, job):
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": number,
        "SLURM_LOCALID": number,
    }


def open_mpi(number, job):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": number,
        "OMPI_COMM_WORLD_LOCAL_RANK": number,
    }


JOIN = """
import jax
from ekd_jax.common import parallel
parallel.start(None, None, None, 60)
numbers = parallel.gathered(jax.process_index())
print(parallel.who(), parallel.is_main(), jax.process_count(), int(numbers.sum()))
"""


@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_clusters_are_recognized(cluster):
    """By what they tell every process; without any of it a process is alone."""
    job = str(random.randrange(1, 4096) << 12 | random.randrange(4096))  # the port follows from it
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            cwd=ROOT,
            env=plain_environment() | cluster(str(number), job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    printed = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    for number, text in enumerate(printed):
        assert text.splitlines()[-1] == f"process {number}:  {number == 0} 2 1"


def test_alone():
    said = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, env=plain_environment(), capture_output=True, text=True
    )
    assert said.stdout == " True 1 0\n", said.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, None), "--coordinator and --process_id missing"),
        (("host", 2, 0), "--coordinator=host must be HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 must be from 0 to 1"),
    ],
)
def test_wrong_flags(given, message):
    with pytest.raises(UserError, match=message):
        parallel.start(*given, 1)
