"""The commands as a user types them, and their answers to mistakes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, command, plain_environment, tiny_flags

DIGITS = f"--config={ROOT}/configs/digits.py"


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("main", [], "--config=FILE is missing"),
        ("main", ["--config=configs/digit.py"], "did you mean 'configs/digits.py'"),
        ("main", [DIGITS, "--dry_rum"], "did you mean --dry_run?"),
        ("main", [DIGITS, "now"], "unexpected argument 'now'"),
        ("main", [DIGITS, "--config.model.nme=resnet8"], "did you mean 'model.name'"),
        ("main", [DIGITS, "--config.train.batch_size=many"], "train.batch_size=many"),
        ("main", [DIGITS, "--config.method.temperature=0"], "must be above 0"),
        ("main", [DIGITS, "--config.model.students=(1,0.01)"], "smallest usable width"),
        ("main", [DIGITS, "--config.train.batch_size=2000"], "above the 899 training examples"),
        ("main", [DIGITS, "--workdir=pyproject.toml"], "is not a directory"),
        ("main", [f"--config={ROOT}/configs/resnet_cifar100.py:dept=20"], "did you mean 'depth'"),
        ("describe", [DIGITS, "--num_classes=0"], "not an integer in the range [2,"),
        ("extract", ["--workdir=nowhere", "--output=x", "--student=1"], "is not the directory of a run"),
        ("extract", ["--workdir=nowhere", "--output=x"], "pass --student=N"),
        ("evaluate", [], "pass --workdir=RUN"),
        ("evaluate", ["--student_dir=nowhere"], "is not a student's directory"),
        ("evaluate", ["--student_dir="], "--student_dir= is empty"),
        ("evaluate", ["--student_dir=nowhere", "--split=validation"], "is for a run"),
        ("evaluate", ["--student_dir=nowhere", "--best"], "--best is for a run"),
        ("evaluate", ["--student_dir=nowhere", "--confusion=nowhere/x.csv"], "a directory that exists"),
        ("predict", ["--student_dir=nowhere", "--image=x.png"], "is not a student's directory"),
        ("compare", ["--config=configs/compare_digits.py", "--methods="], "--methods= is empty"),
        ("main", [DIGITS, "--workdir="], "--workdir= is empty"),
        ("main", [DIGITS, f"--workdir={'x' * 5000}"], "File name too long"),
        ("main", ["--config="], "--config= is empty"),
        ("main", ["--config=README.md"], "README.md"),
        ("main", [DIGITS, "--config.model.name=²"], "must be one of"),
        ("main", [DIGITS, "--config.train.epochs=inf"], "must be a finite number"),
        ("main", [DIGITS, f"--config.seed={10**23}"], "must be at most"),
        ("main", [DIGITS, "--config.model.students=('vgg8:1/0',)"], "is not a number above 0"),
        ("main", [DIGITS, "--config.model.students=1000000000"], "1 to 100 of them"),
        ("main", [DIGITS, "--config.model.sharing=", "--config.model.name="], "config.model.name=''"),
        ("main", [DIGITS, "--compilation_cache_gb=nan"], "must be a finite number"),
        ("describe", [DIGITS, "--num_classes=100000000000"], "not an integer in the range"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_mistakes_get_one_line(module, flags, message):
    result = command(module, *flags)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", ", line 1: invalid syntax"),
        ("x = 1", "get_config"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def get_config():\n    return 5", "must return a ConfigDict"),
        ("", "get_config"),
    ],
    ids=range(6),
)
def test_recipes_that_fail_get_one_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    result = command("main", f"--config={file}", f"--workdir={tmp_path}/run")
    assert (result.returncode, result.stdout) == (2, "")
    assert str(file) in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["digits", "resnet_cifar:data=svhn", "resnet_cifar100", "resnet_cifar100:depth=110"]
)
def test_dry_run_trains_nothing(name, tmp_path):
    file, _, argument = name.partition(":")
    config = f"--config={ROOT}/configs/{file}.py" + (f":{argument}" if argument else "")
    result = command("main", config, "--dry_run", f"--workdir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    for expected in (
        '"batch_size"',
        "student",
        "steps of",
        "memory",
        "nothing was trained",
    ):
        assert expected in result.stdout
    assert not (tmp_path / "run").exists()


def test_describe_as_json():
    result = command(
        "describe", f"--config={ROOT}/configs/resnet_cifar100.py", "--num_classes=10", "--json"
    )
    found = json.loads(result.stdout)
    assert [s["parameters"] for s in found["students"]] == [272474, 171536, 97018, 42231, 10773]
    assert found["base_parameters"] == 464
    assert found["method_parameters"] == 10976
    assert found["students"][4]["channels"] == [3, 6, 12]
    assert found["students"][4]["ratio"] == pytest.approx(0.039538, abs=1e-6)
    assert found["students"][0]["macs"] == macs_by_hand()


def macs_by_hand():
    """ResNet-20, width 1, 10 classes on 32 x 32."""
    total = 32 * 32 * 9 * 3 * 16
    size, inputs = 32, 16
    for channels in (16, 32, 64):
        for block in range(3):
            if block == 0 and channels != inputs:
                size //= 2
                total += size * size * inputs * channels  # shortcut
            total += size * size * 9 * (inputs + channels) * channels
            inputs = channels
    return total + 64 * 10


@pytest.mark.slow
def test_from_training_to_an_answer(tmp_path):
    """Train, extract by budget, evaluate, predict: the README's first command on a smaller network."""
    from PIL import Image

    run, student = tmp_path / "run", tmp_path / "student"
    result = command("main", *tiny_flags(train__epochs=6), f"--workdir={run}")
    assert result.returncode == 0, result.stderr
    assert "ensemble teacher" in result.stdout
    assert "left" in result.stderr, "plain lines with the time left"
    assert "\r" not in result.stderr
    result = command("extract", f"--workdir={run}", "--max_parameters=3000", f"--output={student}")
    assert result.stdout.startswith(f"student 2 of {run}"), result.stderr
    result = command("evaluate", f"--student_dir={student}", "--json")
    assert json.loads(result.stdout).keys() >= {f"student_2/{m}" for m in ("top1", "top5", "nll")}
    Image.new("L", (20, 20), 40).save(tmp_path / "image.png")
    result = command("predict", f"--student_dir={student}", f"--image={tmp_path}/image.png")
    assert result.stdout.count("%") == 3, result.stderr
    result = command("predict", f"--student_dir={student}", f"--image={run}/config.json")
    assert result.returncode == 2
    assert "cannot be read" in result.stderr


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_run(tmp_path):
    """Two runs at a time share the folder; a third compiles nothing anew and ends with the same numbers."""
    cache = tmp_path / "cache"
    flags = [*tiny_flags(train__epochs=0.5), f"--compilation_cache={cache}"]
    start = lambda name: subprocess.Popen(
        [sys.executable, "-m", "ekd_jax.main", *flags, f"--workdir={tmp_path}/{name}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=plain_environment(),
    )  # fmt: skip
    for process in [start("one"), start("two")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    programs = sorted(path.name for path in cache.rglob("*-cache"))
    assert programs
    result = command("main", *flags, f"--workdir={tmp_path}/three")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in cache.rglob("*-cache")) == programs
    summary = lambda name: json.loads((tmp_path / name / "summary.json").read_text())
    assert summary("one")["students"] == summary("two")["students"] == summary("three")["students"]
    result = command("main", *flags, f"--workdir={tmp_path}/four", "--compilation_cache=pyproject.toml/x")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --compilation_cache=pyproject.toml/x: ")
