"""Progress of long tasks on terminals and in logs, and results that are cached for the next run."""

import io
import logging
import os
import sys

import numpy as np
import pytest

from ekd_jax.common import log, progress
from ekd_jax.common.cache import Cache
from ekd_jax.common.files import user_cache
from ekd_jax.common.progress import Progress

# --- progress --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: `clock.now`."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_terminal_shows_one_line_that_renews_itself(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    with log.shown():
        reading = Progress("reading", 2000, unit="images")
        for _ in range(1024):
            clock.now += 1 / 64
            reading.add(1)
        shown = sys.stderr.getvalue()
        assert "\n" not in shown
        whole = "reading: 1,024 of 2,000 images, 64 images a second, 0:00:15 left"
        assert shown.split("\r")[-1] == whole[:59], "a line that wraps cannot be renewed"
        assert shown.count("\r") == 32, "twice a second"
        reading.finish()
    last = sys.stderr.getvalue().split("\r")[-1]
    assert last == "reading: 1,024 of 2,000 images\n"


def test_a_dumb_terminal_has_plain_lines(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with log.shown():
        reading = Progress("reading", 100, table=lambda *_: "a table")
        for _ in range(70):
            clock.now += 1
            reading.update(reading.done + 1, "text")
        reading.record("a record")
    lines = sys.stderr.getvalue().splitlines()
    assert lines == ["reading: 60 of 100 steps, text, 0:00:40 left", "a record"]


def test_a_table_renews_itself_below_lines_that_are_logged(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with log.shown():
        task = Progress("task", 1000, table=lambda own, doing, columns, lines: f"{doing} {own.done}")
        task.update(0, "compiling")
        for _ in range(100):
            clock.now += 0.01
            task.update(task.done + 1, "running")
        task.record("not shown")
        log.logger.warning("a warning")
        task.clear()
    shown = sys.stderr.getvalue()
    assert shown.startswith("compiling 0\x1b[K\n\x1b[J")
    assert shown.count("running") == 4, "four times a second"
    assert shown.endswith("\x1b[1F\x1b[Ja warning\n"), "it is wiped before a line, and once"
    assert "not shown" not in shown


def test_a_log_has_a_line_a_minute(clock, caplog):
    """As do notebooks: no line begins anew."""
    caplog.set_level(logging.INFO, "ekd_jax")
    verifying = Progress("verifying a.tar", 10_000_000_000, unit="bytes")
    for _ in range(150):
        clock.now += 1
        verifying.add(20_000_000)
    assert caplog.messages == [
        "verifying a.tar: 1,200 MB of 10,000 MB, 20 MB a second, 0:07:20 left",
        "verifying a.tar: 2,400 MB of 10,000 MB, 20 MB a second, 0:06:20 left",
    ]
    assert "\r" not in caplog.text


def test_no_extra_lines_where_the_task_itself_logs(clock, caplog, capfd):
    caplog.set_level(logging.INFO, "ekd_jax")
    training = Progress("training", 1000, done=100)
    clock.now = 50
    training.restart_clock()
    for step in range(101, 201):
        clock.now += 2
        training.update(step, "epoch 1")
        if step % 20 == 0:
            training.line(f"step {step}, {training.remaining()} left")
    assert caplog.messages[0] == "training: 105 of 1,000 steps, epoch 1, 0:29:50 left", (
        "a minute after the start"
    )
    assert caplog.messages[1:] == [
        f"step {step}, 0:{2 * (1000 - step) // 60:02}:{2 * (1000 - step) % 60:02} left"
        for step in range(120, 201, 20)
    ]
    assert capfd.readouterr() == ("", ""), "a library prints nothing"


# --- cache -----------------------------------------------------------------------------------


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_arrays_come_back_from_the_cache(home):
    cache, arrays = Cache("numbers"), {"a": np.arange(5), "words": np.array(["one", "three"])}
    assert cache.load("key") is None
    cache.store("key", arrays)
    found = cache.load("key")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert cache.load("another key") is None
    assert Cache("letters").load("key") is None
    assert not list(user_cache().glob(".*")), "nothing partial is left"


def test_a_damaged_entry_counts_as_missing(home):
    cache = Cache("numbers")
    cache.store("key", {"a": np.arange(1000)})
    (entry,) = user_cache().glob("*")
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:500], bytes(flipped), b"no archive"):
        entry.write_bytes(damaged)
        assert cache.load("key") is None
    cache.store("key", {"a": np.arange(1000)})
    assert cache.load("key") is not None


def test_the_least_recently_used_entries_are_deleted(home):
    cache = Cache("numbers", max_bytes=3 * 1300)
    for age, key in enumerate("cba"):
        cache.store(key, {"a": np.arange(128)})
        newest = max(user_cache().glob("*"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (age, age))
    assert cache.load("c") is not None  # the oldest is used again
    cache.store("d", {"a": np.arange(128)})
    assert [key for key in "abcd" if cache.load(key)] == ["a", "c", "d"]


def test_a_cache_that_cannot_be_written_is_no_error(home):
    user_cache().write_text("a file where the directory would be")
    Cache("numbers").store("key", {"a": np.arange(5)})
    assert Cache("numbers").load("key") is None
