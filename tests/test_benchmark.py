"""How fast students run, and which one fits: measured in processes of their own, kept, and noticed when out of date."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import command, fresh_student, one_device, tiny_config
from test_export import needs

import ekd_jax
from ekd_jax.common.errors import UserError
from ekd_jax.common.machine import usable_cpus
from ekd_jax.common.records import as_json
from ekd_jax.runs import choosing
from ekd_jax.runs.benchmarking import as_text, keep, kept_measurement, read_benchmark, subjects
from ekd_jax.runs.choosing import Limits, choose, extract
from ekd_jax.runs.run import load_run
from ekd_jax.students.formats import timing
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.formats.onnx_file import UnwritableError
from ekd_jax.students.formats.registry import FORMATS
from ekd_jax.students.formats.request import Request
from ekd_jax.students.formats.stablehlo import write_program
from ekd_jax.students.formats.timing import (
    Conditions,
    Subject,
    benchmark_student,
    chosen_runtimes,
    conditions,
)
from ekd_jax.students.formats.timing_process import peak_memory
from ekd_jax.students.student import write_student
from ekd_jax.training import single

onnxruntime = pytest.importorskip("onnxruntime")
QUICK = ["--seconds=0.01", "--rounds=1"]
NOW = Conditions("onnxruntime", "1.0", "0.1.0", "a CPU", "cpu", 4, 1, (0,))


@pytest.fixture
def path(finished, tmp_path):
    """Return the directory of a complete run, to write to."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def measured(finished):
    """Return measurements of all networks of a run."""
    found = [conditions("onnxruntime", 1)]
    return timing.measure(subjects(load_run(finished[0])), found, (1, 3), seconds=0.02, rounds=2)


@pytest.fixture
def benchmarked(path, measured):
    """Return the directory of a complete run that was benchmarked, so that nothing is measured again."""
    assert keep(path, measured)
    return path


def test_a_measurement(measured, finished):
    assert [(m.network, m.batch_size) for m in measured] == [
        (name, size) for name in ("student_1", "student_2", "ensemble") for size in (1, 3)
    ]
    for own in measured:
        assert own.step == 19
        assert own.calls >= 6
        assert 0 < own.p10_ms <= own.median_ms <= own.p90_ms
        assert len(own.rounds_ms) == 2
        assert own.images_per_second == pytest.approx(1000 * own.batch_size / own.median_ms)
        assert own.load_seconds > 0
        assert 0 < own.runtime_bytes < own.peak_bytes
        assert own.peak_bytes < peak_memory(), "of its own process, not of this one, which has loaded JAX"
    files = FORMATS["onnx"].write(Request((exportable_student(load_run(finished[0]).student(2)),)))
    assert measured[2].file_bytes == sum(map(len, files.values()))


@pytest.mark.parametrize("runtime", ["jax", "onnxruntime", "openvino"])
def test_every_runtime_keeps_to_its_cpus(runtime):
    """Threads are limited by the CPUs that a process may use, which it was told before the runtime started."""
    needs(runtime)
    (own,) = benchmark_student(fresh_student(("a", "b")), [runtime], [2], 1, seconds=0.1, rounds=1)
    assert own.conditions.cpus == usable_cpus()[:1]
    assert own.busy_cpus < 1.05
    last = usable_cpus()[-1]
    found = timing._result({"runtime": runtime, "threads": 1, "cpus": [last]}, "")
    assert found["cpus"] == [last]


def test_only_the_runtime_is_loaded():
    code = "import sys, ekd_jax.students.formats.timing_process as t; t.STARTS['onnxruntime'](1); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "msgspec", "openvino"} & set(done.stdout.split())


def test_jax_runs_what_jit_would_compile():
    student = fresh_student(("a", "b", "c"))
    network = exportable_student(student)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    program = jax.export.deserialize(bytearray(write_program(network, 3, "cpu")))
    np.testing.assert_allclose(program.call(network.inputs(images)), student.logits(images), atol=1e-6)
    assert jax.export.deserialize(bytearray(write_program(network, 3, "cuda"))).platforms == ("cuda",)


def test_a_runtime_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(timing, "written", lambda *_: {"student.onnx": b"no network"})
    with pytest.raises(UserError, match="student_1 in onnxruntime, batch 1 fails: .*") as error:
        benchmark_student(fresh_student(("a", "b")), ["onnxruntime"])
    assert "\n" not in str(error.value)


def test_a_network_that_onnx_cannot_say():
    network = Exportable("mine", lambda x: jax.numpy.sort(x.mean((1, 2))), (4, 4, 3), ("a",), None, {})
    with pytest.raises(
        UnwritableError, match="mine cannot be written as ONNX: .*; --runtime=jax takes every network"
    ):
        timing.written(Subject("mine", network, 0, ""), NOW, 1)


def test_packages_that_are_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )
    assert chosen_runtimes([]) == ["jax", "onnxruntime"]
    with pytest.raises(UserError, match=re.escape("pip install 'ekd_jax[openvino]'")):
        chosen_runtimes(["openvino"])


# --- the record ----------------------------------------------------------------------------------


def test_the_record_is_kept_and_replaced(measured, path):
    assert keep(path, measured)
    assert read_benchmark(path) == measured
    elsewhere = dataclasses.replace(
        measured[0], conditions=dataclasses.replace(measured[0].conditions, device="another CPU")
    )
    later = dataclasses.replace(measured[0], step=20)
    assert keep(path, [elsewhere, later])
    assert read_benchmark(path) == (*measured[1:], elsewhere, later)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"step": 18}, "measured at step 18, now at step 19"),
        ({"weights": "0" * 64}, "measured with other weights"),
        ({"network": "student_1"}, "not measured in onnxruntime at batch 3 before"),
        ({"batch_size": 1}, "not measured in onnxruntime at batch 3 before"),
        ({"conditions.runtime": "jax"}, "not measured in onnxruntime at batch 3 before"),
        ({"conditions.device": "another CPU"}, "measured on another CPU, now on a CPU"),
        ({"conditions.threads": 4}, "measured with threads=4, now with threads=1"),
        ({"conditions.version": "0.9"}, "measured with onnxruntime 0.9, now with onnxruntime 1.0"),
        ({"conditions.ekd_jax": "0.0.9"}, "measured with ekd_jax 0.0.9, now with ekd_jax 0.1.0"),
    ],
)
def test_what_is_out_of_date_is_noticed(measured, change, why):
    subject = Subject("student_2", None, 19, measured[2].weights)
    inner = {name.partition(".")[2]: value for name, value in change.items() if "." in name}
    outer = {name: value for name, value in change.items() if "." not in name}
    kept = dataclasses.replace(measured[3], **{"conditions": dataclasses.replace(NOW, **inner), **outer})
    assert kept_measurement([kept], subject, NOW, 3) == (None if why else kept, why)


@pytest.mark.parametrize("damage", ["{", "[]", '{"measurements": [{}]}', "negative"])
def test_a_record_that_is_damaged_counts_for_nothing(measured, path, damage, caplog):
    keep(path, measured)
    if damage == "negative":
        record = json.loads((path / "benchmark.json").read_text())
        record["measurements"][0]["median_ms"] = -1
        damage = json.dumps(record)
    (path / "benchmark.json").write_text(damage)
    assert read_benchmark(path) == ()
    assert "what was measured before is ignored" in caplog.text
    assert keep(path, measured)
    assert read_benchmark(path) == measured


def test_a_record_that_cannot_be_kept(measured, path, caplog):
    (path / "benchmark.json").mkdir()
    assert not keep(path, measured)
    assert "cannot be kept with the run" in caplog.text


def test_the_table(measured):
    lines = as_text(measured).splitlines()
    assert [line.split()[:2] for line in lines[3:6]] == [
        [name, "onnxruntime"] for name in ("1", "2", "ensemble")
    ]
    assert lines[7] == "batch 3"
    assert max(map(len, lines[:13])) <= 80


# --- choosing ------------------------------------------------------------------------------------


def write_metrics(path, *records):
    """Write evaluations: split, and top-1 of both students."""
    lines = [
        {"step": 19, "epoch": 3, "split": split, "student_1/top1": first, "student_2/top1": second}
        for split, first, second in records
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("records", "order"),
    [
        ([("test", 90.0, 80.0)], [1, 2]),
        ([("test", 80.0, 90.0)], [2, 1]),
        ([("test", 90.0, 90.0)], [2, 1]),  # the one that costs less
        ([("test", 99.0, 80.0), ("test", 80.0, 90.0)], [2, 1]),  # the last one decides, not the best
        ([("validation", 80.0, 90.0), ("test", 99.0, 80.0)], [2, 1]),
        ([("train", 80.0, 90.0)], [1, 2]),  # not evaluated: the largest
    ],
)
def test_the_best_is_first(records, order, benchmarked):
    write_metrics(benchmarked, *records)
    found = choose(load_run(benchmarked), Limits(), conditions("onnxruntime", 1))
    assert [each.student for each in found.candidates] == order
    assert found.split == {"train": ""}.get(records[0][0], records[0][0])
    text = choosing.as_text(found)
    assert ("not evaluated" in text) == (not found.split)
    assert ("test images" in text) == (found.split == "test")
    assert ("test top-1" in text) == (found.split == "validation")


def limits_and_reasons(summary, measured):
    """Return limits that student 1 misses by a half, and what is said of it."""
    own = summary.students[0]
    size = measured[0].file_bytes
    return {
        "max_parameters": (own.parameters / 1.5, f"its {own.parameters:,} parameters are 50 % above"),
        "max_macs": (own.macs / 1.5, f"its {own.macs:,} multiply-accumulates are 50 % above"),
        "max_megabytes": (size / 1.5e6, f"its {size:,} bytes are 50 % above"),
        "max_latency_ms": (measured[0].median_ms / 1.5, "ms are 50 % above"),
        "min_top1": (85.5, "its top-1 of 80.00 % is 5.5 below"),
    }


@pytest.mark.parametrize(
    "name", ["max_parameters", "max_macs", "max_megabytes", "max_latency_ms", "min_top1"]
)
def test_limits(name, finished, path, measured):
    write_metrics(path, ("test", 80.0, 90.0))
    fast = dataclasses.replace(measured[2], median_ms=measured[0].median_ms / 2)
    keep(path, [measured[0], fast])
    limit, why = limits_and_reasons(finished[1], measured)[name]
    now = measured[0].conditions
    found = choose(load_run(path), Limits(**{name: limit}), now)
    assert [each.student for each in found.fitting] == [2]
    assert found.winner.latency_ms == fast.median_ms, "as it was kept"
    (missed,) = found.candidates[1].misses
    assert why in missed
    assert f"--{name}={limit:.10g}" in missed
    assert f"student 1: {missed}" in choosing.as_text(found)
    exactly = limit if name == "min_top1" else 1.5 * limit * (1 + 1e-12)
    assert len(choose(load_run(path), Limits(**{name: exactly}), now).fitting) == 2 - (name == "min_top1")


def test_none_fits(benchmarked):
    found = choose(
        load_run(benchmarked), Limits(max_parameters=10, max_macs=1e9), conditions("onnxruntime", 1)
    )
    with pytest.raises(
        UserError, match=r"no student of .* fits: student 2 is closest, but its .* parameters"
    ):
        _ = found.winner


def test_what_was_not_evaluated_has_no_accuracy(benchmarked):
    write_metrics(benchmarked)
    with pytest.raises(UserError, match="--min_top1=50: the run in .* was not evaluated yet"):
        choose(load_run(benchmarked), Limits(min_top1=50), conditions("onnxruntime", 1))


def test_nothing_is_left_of_an_extraction_that_fails(benchmarked, tmp_path, monkeypatch):
    usual = FORMATS["onnx"]
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(usual, run=lambda files, batches: 1 / 0))
    found = choose(load_run(benchmarked), Limits(), conditions("onnxruntime", 1))
    with pytest.raises(UserError, match="does not run in onnxruntime"):
        extract(found, tmp_path / "new" / "out", ["onnx"])
    assert os.listdir(tmp_path) == ["run"]


# --- the commands --------------------------------------------------------------------------------


def test_from_measuring_to_a_file(path, tmp_path):
    """Benchmark, choose from what was kept, notice that the run went on, extract and export the winner."""
    done = command("benchmark", f"--workdir={path}", "--runtime=onnxruntime", "--batch_sizes=1", *QUICK)
    assert done.returncode == 0, done.stderr
    assert f"kept in {path}/benchmark.json" in done.stderr
    rows = [line.split()[:2] for line in done.stdout.splitlines()[3:6]]
    assert rows == [[name, "onnxruntime"] for name in ("1", "2", "ensemble")]
    times = {each.network: each.median_ms for each in read_benchmark(path)}
    ask = ["choose", f"--workdir={path}", "--max_latency_ms=1000", "--runtime=onnxruntime"]
    done = command(*ask, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = {f"student_{each['student']}": each["latency_ms"] for each in json.loads(done.stdout)}
    assert found == {name: time for name, time in times.items() if name != "ensemble"}
    record = as_json(read_benchmark(path))
    record[1]["step"] = 18
    (path / "benchmark.json").write_text(json.dumps({"measurements": record}))
    flags = [f"--extract={tmp_path}/student", "--format=onnx", "--max_parameters=3000"]
    done = command(*ask, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "measuring student 2: measured at step 18, now at step 19\n"
    assert [each.step for each in read_benchmark(path)] == [19, 19, 19]
    assert f"student 2 -> {tmp_path}/student\n" in done.stdout
    student = ekd_jax.load_student(tmp_path / "student")
    assert student.description.student == 2
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "student" / "exported" / "student.onnx")
    (logits,) = session.run(None, {"images": exportable_student(student).inputs(images)})
    np.testing.assert_allclose(logits, student.logits(images), atol=1e-4)
    assert (tmp_path / "student" / "exported" / "export.json").exists()


def test_students_of_their_own(tmp_path):
    write_student(tmp_path / "a", fresh_student(("a", "b")))
    flags = [f"--student_dir={tmp_path}/a", "--batch_sizes=2", f"--output={tmp_path}/found.json", "--json"]
    done = command("benchmark", *flags, "--runtime=onnxruntime", *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "found.json").read_text())
    (own,) = json.loads(done.stdout)["measurements"]
    assert (own["network"], own["batch_size"]) == (f"{tmp_path}/a", 2)
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", "student.json", "weights.safetensors"]


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("benchmark", [], "pass --workdir=RUN, or --student_dir=DIR"),
        ("benchmark", ["--workdir={}", "--student_dir={}"], "pass --workdir=RUN, or --student_dir=DIR"),
        ("benchmark", ["--student_dir={}"], "is not a student's directory"),
        ("benchmark", ["--student_dir={}", "--student=1"], "--student belongs to --workdir"),
        ("benchmark", ["--workdir=nowhere"], "is not the directory of a run"),
        ("benchmark", ["--workdir={}", "--student=3"], "has students 1 to 2"),
        (
            "benchmark",
            ["--workdir={}", "--student=x"],
            "must be the number of a student, from 1, or ensemble",
        ),
        ("benchmark", ["--workdir={}", "--step=5"], "--step=5: the steps kept are"),
        ("benchmark", ["--workdir={}", "--runtime=onnx"], "not known; did you mean 'onnxruntime'?"),
        ("benchmark", ["--workdir={}", "--batch_sizes=1,0"], "'0' is not a number of images"),
        ("benchmark", ["--workdir={}", "--threads=0"], "--threads=0 must be from 1 to"),
        ("benchmark", ["--workdir={}", "--threads=100000"], "the CPUs that can be used here"),
        ("benchmark", ["--workdir={}", "--seconds=0"], "--seconds"),
        ("benchmark", ["--workdir={}", "--rounds=0"], "--rounds"),
        ("benchmark", ["--workdir={}", "--output=x.txt"], "must end in .json"),
        ("choose", ["--workdir=nowhere"], "is not the directory of a run"),
        ("choose", ["--workdir={}", "--max_latency_ms=0"], "--max_latency_ms=0 must be above 0"),
        ("choose", ["--workdir={}", "--max_parameters=-5"], "--max_parameters=-5 must be above 0"),
        ("choose", ["--workdir={}", "--max_macs=nan"], "--max_macs=nan must be a finite number"),
        ("choose", ["--workdir={}", "--min_top1=0.95"], "--min_top1=0.95 is in per cent"),
        ("choose", ["--workdir={}", "--runtime=torch"], "--runtime=torch is not known"),
        ("choose", ["--workdir={}", "--format=onnx"], "--format needs --extract=DIR"),
        ("choose", ["--workdir={}", "--extract={}"], "--extract={} exists and is not an empty directory"),
        ("choose", ["--workdir={}", "--extract={}/x", "--format=tflite"], "--format=tflite is not known"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_mistakes_get_one_line(module, flags, message, finished):
    done = command(module, *(flag.format(finished[0]) for flag in flags))
    assert (done.returncode, done.stdout) == (2, "")
    assert message.format(finished[0]) in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_run_of_which_none_fits_is_noticed_by_scripts(benchmarked):
    done = command("choose", f"--workdir={benchmarked}", "--max_parameters=100")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no student of ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.startswith("student  width  parameters")


def test_a_full_disk_leaves_nothing(benchmarked, tmp_path):
    flags = [f"--workdir={benchmarked}", f"--extract={tmp_path}/out", "--format=onnx"]
    done = command("choose", *flags, largest_file=4096)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write --extract={tmp_path}/out: File too large")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        pytest.param("baseline", ["student_1"], marks=pytest.mark.slow),
        pytest.param(
            "snapshot", ["student_1", "student_2", "student_3", "ensemble"], marks=pytest.mark.slow
        ),
    ],
)
def test_runs_of_other_methods(method, names, tmp_path):
    """A single student has no ensemble beside it; copies are students."""
    more = {"method__cycles": 3} if method == "snapshot" else {}
    single.run(
        tiny_config(method, model__students=(0.125,), train__dtype="bfloat16", **more),
        tmp_path / "run",
        one_device(),
    )
    run = load_run(tmp_path / "run")
    networks = subjects(run)
    assert [each.name for each in networks] == names
    found = timing.measure(networks, [conditions("onnxruntime", 1)], [1], seconds=0.01, rounds=1)
    assert [each.network for each in found] == names
    choice = choose(run, Limits(max_latency_ms=1000), conditions("onnxruntime", 1))
    assert len(choice.candidates) == len([name for name in names if name != "ensemble"])
