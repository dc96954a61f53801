"""Every file of a run, damaged in each way in turn: no wrong number is restored, and nothing is lost."""

import re
import shutil

import jax
import numpy as np
import pytest
from conftest import latest_state, one_device, tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.runs.checkpoint import FOLDER, Checkpoints, open_checkpoints, saved_steps
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.training import single
from ekd_jax.training.setup import prepare

CONFIG = tiny_config(train__ema_decay=0.9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the directory of a complete run whose summary is missing."""
    path = tmp_path_factory.mktemp("whole") / "run"
    single.run(CONFIG, path, one_device())
    (path / "summary.json").unlink()
    return path


@pytest.fixture(scope="module")
def first(whole):
    return single.first_state(prepare(CONFIG, one_device(), whole), whole)


@pytest.fixture(scope="module")
def states(whole, first):
    with open_checkpoints(whole) as checkpoints:
        return {step: checkpoints.restore(first, step) for step in saved_steps(whole)}


def flip(data, place):
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def with_a_digit_changed(data):
    """Change the digit nearest to the middle: JSON stays JSON."""
    places = [found.start() for found in re.finditer(rb"[0-8]", data)]
    if not places:
        return data
    place = min(places, key=lambda at: abs(at - len(data) // 2))
    return data[:place] + bytes([data[place] + 1]) + data[place + 1 :]


DAMAGES = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a bit at the start": lambda data: flip(data, 0),
    "a bit in the middle": lambda data: flip(data, len(data) // 2),
    "a bit at the end": lambda data: flip(data, len(data) - 1),
    "a digit": lambda data: with_a_digit_changed(data),
    "zeros": lambda data: bytes(len(data)),
    "doubled": lambda data: data * 2,
}


def damaged(whole, files, tmp_path):
    """Yield copies of a run, in each of which one of these files is damaged or missing, and say which and how."""
    for file in files:
        data = file.read_bytes()
        for how in (*DAMAGES, "missing"):
            content = DAMAGES[how](data or b"\0") if how in DAMAGES else None
            if content == data:
                continue
            path = tmp_path / "run"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(whole, path)
            place = path / file.relative_to(whole)
            if content is None:
                place.unlink()
            else:
                place.write_bytes(content)
            yield path, f"{file.relative_to(whole)}, {how}"


def files_of(whole, inside):
    """Return the files of a run's checkpoints, or its other files."""
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    return [path for path in files if (path.relative_to(whole).parts[0] == FOLDER) == inside]


def assert_same(found, expected):
    """The arrays have the same bits, and what the run remembered is the same."""
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    assert found[1] == expected[1]


def check_message(error, part, case):
    assert "\n" not in str(error), case
    assert part in str(error), case


@pytest.mark.filterwarnings("ignore")  # Orbax leaves coroutines behind when a file is damaged
def test_every_file_of_every_checkpoint(whole, first, states, tmp_path):
    """Training goes on from a state that was saved, and readers get what was saved, or one line."""
    cases = fell_back = refused = 0
    latest = max(states)
    for path, case in damaged(whole, files_of(whole, True), tmp_path):
        cases += 1
        with open_checkpoints(path) as checkpoints:
            for step in saved_steps(path):
                try:
                    found = checkpoints.restore(first, step)
                except UserError as error:
                    refused += 1
                    check_message(error, str(step), case)
                else:
                    assert_same(found, states[step])
        checkpoints = Checkpoints(path)
        try:
            found = checkpoints.recover(first)
        finally:
            checkpoints.close()
        step = int(found[0].step)
        assert_same(found, states[step])
        fell_back += step != latest
    assert refused
    assert fell_back
    print(f"{cases} damages: {refused} times refused by a reader, {fell_back} times fallen back")


@pytest.mark.filterwarnings("ignore")
def test_every_other_file_of_a_run(whole, tmp_path):
    """The same command ends with the same state and records, or with one line that says what to do."""
    cases = refused = 0
    expected, records = latest_state(whole), read_metrics(whole)
    for path, case in damaged(whole, files_of(whole, False), tmp_path):
        cases += 1
        try:
            single.run(CONFIG, path, one_device())
        except UserError as error:
            refused += 1
            check_message(error, str(path), case)
            continue
        jax.tree.map(np.testing.assert_array_equal, latest_state(path), expected)
        if "metrics.jsonl" not in case:
            assert read_metrics(path) == records, case
    print(f"{cases} damages: {refused} refused in one line")
