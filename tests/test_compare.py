"""Comparisons: which runs there are, their table, going on, and mistakes found before training."""

import importlib.util
import json
import shutil
import statistics

import jax
import pytest
from conftest import ROOT, TINY, command, one_device
from ml_collections import ConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError
from ekd_jax.config.knobs import default_config
from ekd_jax.config.recipes import every_method
from ekd_jax.config.resolve import identity, resolve, to_dict
from ekd_jax.methods import list_methods
from ekd_jax.training import comparison, comparison_table, several

ONE_DEVICE = one_device()
LABELS = {
    "baseline": {"method.name": "baseline"},
    "kd": {"method.name": "kd", "method.teachers": ("{baseline}:1",)},
}


def common():
    """A narrow student on 100 digits, six steps."""
    config = default_config("oem")
    changes = TINY | {
        "model.students": (0.25,),
        "data.train_examples": 100,
        "train.epochs": 2.0,
        "train.evaluate_every_epochs": 2.0,
        "train.checkpoint_every_epochs": 2.0,
    }
    for name, value in changes.items():
        section, _, knob = name.rpartition(".")
        config[section][knob] = value
    return config


def asked(methods=None, **parts):
    """What the file of a comparison gives."""
    labels = LABELS if methods is None else methods
    return ConfigDict({"common": common(), "seeds": 2, "methods": labels, **parts}, convert_dict=False)


def recipe(name):
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a comparison that was trained, its runs, and what was printed meanwhile."""
    path = tmp_path_factory.mktemp("comparison") / "run"
    runs = comparison.entries(asked(), path)
    comparison.check_existing(runs)
    comparison.check(runs)
    several.train_all(runs, parallel.make_mesh(jax.devices()[:2]), at_once=2)
    return path, runs


# --- the runs -----------------------------------------------------------------------------------


def test_every_label_comes_once_with_each_seed(tmp_path):
    methods = {
        "oem": {"method.name": "oem", "method.temperature": 3.0},
        "same": {},
        "kd": {"method.name": "kd", "method.teachers": ("{oem}", "{same}:2", "elsewhere")},
    }
    given = asked(methods)
    given.common.seed, given.common.method.temperature = 4, 5.0
    runs = comparison.entries(given, tmp_path)
    assert [(r.label, r.config.seed) for r in runs] == [
        ("oem", 4), ("same", 4), ("kd", 4), ("oem", 5), ("same", 5), ("kd", 5),
    ]  # fmt: skip
    assert [r.path for r in runs[:2]] == [tmp_path / "oem" / "seed4", tmp_path / "same" / "seed4"]
    assert [r.config.method.temperature for r in runs[:3]] == [3.0, 5.0, 4.0]  # own, common's, default
    assert runs[5].config.method.teachers == (
        f"{tmp_path}/oem/seed5", f"{tmp_path}/same/seed5:2", "elsewhere",
    )  # fmt: skip
    assert runs[5].needs == {"oem": tmp_path / "oem" / "seed5", "same": tmp_path / "same" / "seed5"}
    assert len(comparison.entries(given, tmp_path, seeds=3)) == 9
    expected = to_dict(resolve(given.common))
    assert to_dict(runs[1].config) == expected
    assert [r.label for r in comparison.selected(runs[:3], ["kd"])] == ["oem", "same", "kd"]
    assert [r.label for r in comparison.selected(runs[:3], ["same"])] == ["same"]


def test_every_method_is_in_the_comparisons_of_the_configs(tmp_path):
    for name in ("compare_digits", "compare_cifar10"):
        module = recipe(name)
        assert f"--config=configs/{name}.py" in module.__doc__
        runs = comparison.entries(module.get_config(), tmp_path, seeds=1)
        assert {run.config.method.name for run in runs} == set(list_methods())
        assert {run.config.train.epochs for run in runs} == {module.get_config().common.train.epochs}
    comparison.check(comparison.entries(recipe("compare_digits").get_config(), tmp_path, seeds=1))
    found = recipe("compare_cifar10").get_config("epochs=30,model=resnet20")
    assert found.common.model.name == "resnet20"
    assert found.methods["one"]["method.rampup_epochs"] == 8.0
    assert not any(tmp_path.iterdir())


def test_digits_are_compared_by_the_recipe_for_digits():
    ours, theirs = (
        to_dict(resolve(config, ["method.name"]))
        for config in (recipe("compare_digits").get_config().common, recipe("digits").get_config())
    )
    assert ours["data"] == theirs["data"]
    assert ours["optimizer"] == theirs["optimizer"]
    assert ours["train"] == theirs["train"] | {"epochs": 30.0}
    assert ours["model"] == theirs["model"] | {"students": [1, 0.6, 0.2]}


# --- the table ------------------------------------------------------------------------------------


def test_the_table_is_of_the_runs(done):
    path, runs = done
    found = comparison_table.compare(runs)
    assert found.labels.keys() == LABELS.keys()
    for label, row in found.labels.items():
        summaries = [json.loads((path / label / f"seed{k}" / "summary.json").read_text()) for k in (0, 1)]
        assert (row.method, row.n, row.seeds) == (label, 2, (0, 1))
        assert row.students[0].top1 == tuple(s["students"][0]["top1_last"] for s in summaries)
        assert row.students[0].parameters == summaries[0]["students"][0]["parameters"]
        assert row.ensemble.top1 == tuple(s["ensemble"]["top1_last"] for s in summaries)
        assert row.seconds == tuple(round(sum(s["seconds"].values()), 1) for s in summaries)
    base, kd = (found.labels[label].students[0] for label in ("baseline", "kd"))
    assert kd.difference == pytest.approx(statistics.mean(kd.top1) - statistics.mean(base.top1))


def result(top1):
    return {"top1_last": top1, "top1_best": top1, "best_step": 1}


def pretend(path, config, parameters=(1000,), top1=(90,), ensemble=90, others=None, seconds=60.0):
    """Write the summary of a run that was never trained."""
    sizes = {"channels": [16], "macs": 1, "activations": 1, "ratio": 1.0}
    students = [
        {"student": i, "network": "resnet8", "width": "1", "parameters": size, **sizes, **result(value)}
        for i, (size, value) in enumerate(zip(parameters, top1, strict=True), 1)
    ]
    summary = {
        **identity(config),
        **{"steps": 6, "epochs": 2.0, "best_on": "test", "method_parameters": 0},
        "seconds": {"train": seconds - 10.0, "compile": 10.0},
        "students": students,
        "ensemble": result(ensemble),
        "others": {name: result(value) for name, value in (others or {}).items()},
    }
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps(summary))


def test_means_deviations_and_differences(tmp_path):
    methods = {label: {"method.name": "baseline"} for label in ("baseline", "more", "other")}
    runs = comparison.entries(asked(methods), tmp_path)
    for run, up in zip(runs, (0, 0, 0, 2, 1, 4), strict=True):
        match run.label:
            case "baseline":
                pretend(run.path, run.config, [1000, 500], [90 + up, 80], 91)
            case "more":
                pretend(
                    run.path,
                    run.config,
                    [1000, 400, 400],
                    [92 + up, 70 + up, 60],
                    94,
                    {"shallow_1": 50 + up},
                )
            case "other":
                pretend(run.path, run.config, [1000], [80 + up], 80)
    found = comparison_table.compare(runs)
    base, more, other = found.labels.values()
    assert [s.mean for s in base.students] == [91, 80]
    assert [s.difference for s in (*base.students, base.ensemble)] == [None] * 3
    assert base.students[0].std == pytest.approx(2**0.5)
    assert [s.mean for s in more.students] == [92.5, 70.5, 60]
    assert [s.difference for s in more.students] == [1.5, None, None], "the others are of other sizes"
    assert more.ensemble.difference == 3
    assert more.others["shallow_1"].mean == 50.5
    assert other.students[0].difference == -9

    lines = comparison_table.as_text(found).splitlines()
    cells = [[cell for cell in line.split("  ") if cell] for line in lines]
    assert [c.strip() for c in cells[0]] == [
        "n = 2", "student 1", "student 2", "student 3", "ensemble", "parameters",
    ]  # fmt: skip
    assert [c.strip() for c in cells[3]] == [
        "more", "92.50 +- 0.71 (+1.50)", "70.50 +- 0.71", "60.00 +- 0.00", "94.00 +- 0.00 (+3.00)",
        "1.0k 400 400",
    ]  # fmt: skip
    markdown = comparison_table.as_markdown(found, "the command").splitlines()
    assert "| other | 82.00 ± 2.83 (-9.00) |  |  | 80.00 ± 0.00 (-11.00) | 1.0k |" in markdown
    assert markdown[-1] == "| other | -9.00 [-21.71, +3.71] |  |  | -11.00 [-11.00, -11.00] |"
    assert [line.count("|") for line in markdown if line.startswith("|")] == [7] * 5 + [6] * 4
    assert "the command" in markdown

    # two of one label, one of another: no deviation of one, and how many there are is said of each
    found = comparison_table.compare([runs[0], runs[1], runs[3]])
    assert found.labels["more"].students[0].std is None
    assert found.labels["more"].students[0].difference == 2, "to the baseline's run of the same seed"
    text = comparison_table.as_text(found)
    assert "baseline (n = 2)" in text
    assert "more (n = 1)      92.00 (+2.00)" in text
    text = comparison_table.as_text(comparison_table.compare(runs[:1]))
    assert text.startswith("n = 1")
    assert "+-" not in text
    assert "in brackets" not in text

    shutil.rmtree(runs[4].path)
    assert several.seconds_left(runs) == 60
    shutil.rmtree(runs[1].path)
    assert several.seconds_left(runs) == 120
    pretend(runs[2].path / "earlier" / "first", runs[2].config, seconds=120.0)
    assert runs[2].seconds() == 180
    assert several.seconds_left(runs) == pytest.approx(2 * (60 + 120) / 2), "of other labels, their mean"
    assert several.seconds_left(comparison.entries(asked(), tmp_path / "new")) == 0


def test_the_students_of_a_run_learn_from_the_same_seed(done):
    path, _ = done
    for seed in (0, 1):
        students = json.loads((path / "kd" / f"seed{seed}" / "students.json").read_text())
        assert students["teachers"][0]["source"] == f"{path}/baseline/seed{seed}:1"


def test_nothing_complete_is_no_table(tmp_path):
    with pytest.raises(UserError, match=f"no run in {tmp_path} is complete"):
        comparison_table.compare(comparison.entries(asked(), tmp_path))


# --- going on --------------------------------------------------------------------------------------


def test_only_what_is_missing_is_trained(done, monkeypatch, capsys, caplog):
    path, runs = done
    before = comparison_table.compare(runs)
    shutil.rmtree(runs[0].path)
    times = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    monkeypatch.setattr(parallel, "make_mesh", lambda *_, **__: ONE_DEVICE)
    comparison.check_existing(runs)
    comparison.check(runs)
    with caplog.at_level("INFO", "ekd_jax"):
        several.train_all(runs)
    out, errors = capsys.readouterr()[0], caplog.text
    assert out == ""
    assert errors.count("run 1 of 4: baseline, seed 0, about 0:00:") == 1
    assert "run 2 of 4" not in errors
    for file, time in times.items():
        assert file.stat().st_mtime_ns == time, file
    after = comparison_table.compare(runs)
    for label, row in after.labels.items():
        assert row.students == before.labels[label].students


def test_a_folder_with_runs_of_another_configuration(done):
    changed = {**LABELS, "baseline": {"method.name": "baseline", "optimizer.learning_rate": 0.2}}
    runs = comparison.entries(asked(changed), done[0])
    with pytest.raises(UserError, match=r"label baseline: .*optimizer.learning_rate: 0.1 there, 0.2 now"):
        comparison.check_existing(runs)


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "parts", "message"),
    [
        ({"a": {"method.nme": "oem"}}, {}, "label a: unknown knob config.method.nme"),
        ({"a": {"method.name": "omm"}}, {}, "label a: .*did you mean 'oem'"),
        ({"a": {"method.name": "kd", "method.temprature": 2.0}}, {}, "did you mean 'method.temperature'"),
        ({"a": {"method.name": "kd", "method.temperature": 0.0}}, {}, "label a: .*above 0"),
        ({"a": {"model.students": (1, 0.01)}}, {}, "label a: .*smallest usable width"),
        (
            {"base": {}, "a": {"method.name": "kd", "method.teachers": ("{bse}:1",)}},
            {},
            "did you mean 'base'",
        ),
        (
            {"a": {"method.name": "kd", "method.teachers": ("{b}",)}, "b": {}},
            {},
            "label a: {b}: b comes later",
        ),
        ({"a": {"method.name": "kd", "method.teachers": ("{a}",)}}, {}, "a comes later"),
        ({"a": {"data.flip": True}}, {}, "label a: data.flip=True would make the comparison unfair"),
        ({"a": {"data.train_examples": 50}}, {}, "the others have 100"),
        ({"a": {"train.epochs": 3.0}}, {}, "train.epochs=3.0 would make the comparison unfair"),
        ({"a": {"seed": 7}}, {}, "seed=7 would make the comparison unfair"),
        ({"a": {"model.name": "resnet20"}}, {}, "model.name=resnet20 would make the comparison unfair"),
        ({"a": {"data.flip": True}}, {"allow": ("model.name",)}, "data.flip=True would make"),
        ({"a": {}}, {"allow": ("model.nme",)}, "allow: 'model.nme' .*did you mean 'model.name'"),
        ({"a": {}}, {"allow": ("seed",)}, "allow: 'seed' is not"),
        ({}, {}, "methods of the comparison is empty"),
        ({"a/b": {}}, {}, "label 'a/b' names a directory"),
        ({"a": {}}, {"seeds": 0}, "seeds=0 .*at least 1"),
        ({"a": {}}, {"seed": 3}, "unknown part 'seed' of a comparison; did you mean 'seeds'"),
    ],
)
def test_mistakes_are_found_when_the_runs_are_planned(methods, parts, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        comparison.entries(asked(methods, **parts), tmp_path)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": {"method.name": "kd"}}, "label a: method.teachers is empty"),
        ({"a": {"method.name": "kd", "method.teachers": ("nowhere",)}}, "label a: .*no directory nowhere"),
        (
            {"base": {}, "a": {"method.name": "kd", "method.teachers": ("{base}:2",)}},
            "label a: .*label base has students 1 to 1",
        ),
        ({"a": {"train.batch_size": 128}}, "label a: .*above the 100 training examples"),
        (
            {"a": {"method.name": "snapshot", "method.cycles": 9}},
            "label a: .*method.cycles=9 needs at least 9 epochs",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(methods, message, tmp_path):
    runs = comparison.entries(asked({"first": {}, **methods}), tmp_path)
    with pytest.raises(UserError, match=message):
        comparison.check(runs)
    assert not any(tmp_path.iterdir())


def test_what_is_allowed_may_differ(tmp_path):
    runs = comparison.entries(
        asked({"a": {}, "b": {"model.name": "resnet20"}}, allow=("model.name",)), tmp_path, seeds=1
    )
    assert [run.config.model.name for run in runs] == ["resnet8", "resnet20"]


def test_unknown_labels_on_the_command_line(tmp_path):
    with pytest.raises(UserError, match="--methods: there is no label 'kdd'; did you mean 'kd'"):
        comparison.selected(comparison.entries(asked(), tmp_path), ["kd", "kdd"])


# --- the command -------------------------------------------------------------------------------------

FILE = """
from ml_collections import ConfigDict
from ekd_jax.config.knobs import default_config

def get_config(argument=None):
    config = default_config("baseline")
    config.model.name, config.model.students = "resnet8", (0.25,)
    config.data.name, config.data.train_examples, config.data.crop_padding = "digits", 100, 0
    config.data.flip = False
    config.train.batch_size, config.train.epochs = 32, 1.0
    methods = {"z": {"method.name": "baseline"}, "a": {"optimizer.momentum": 0.5}}
    return ConfigDict({"common": config, "methods": methods}, convert_dict=False)
"""


def test_the_command(tmp_path):
    """Trains, reports, and says mistakes in one line."""
    file, path = tmp_path / "c.py", tmp_path / "run"
    file.write_text(FILE)
    flags = [f"--config={file}", f"--workdir={path}"]
    result = command("compare", *flags, "--seeds=1", "--methods=z", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((path / "comparison.json").read_text())
    assert found["labels"].keys() == {"z"}
    assert "run 1 of 1: z, seed 0\ntraining from step 0" in result.stderr
    assert (path / "comparison.md").read_text().count("| z |") == 1

    result = command("compare", *flags, "--report", "--config.common.train.epochs=2")
    assert result.returncode == 2
    assert "label z: " in result.stderr
    assert "train.epochs: 1.0 there, 2.0 now" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/compare_digit.py"], "compare_digit.py"),
        (["--config=configs/digits.py"], "is not the config of a comparison"),
    ],
)
def test_mistakes_get_one_line(flags, message):
    result = command("compare", *flags)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_labels_of_every_method_have_their_own_share_of_training():
    for epochs in (3.0, 300.0):
        labels = every_method(epochs)
        assert labels["pcl"]["method.rampup_epochs"] == pytest.approx(80 * epochs / 300)
        assert labels["kd_dkd"]["method.dkd_warmup_epochs"] == pytest.approx(20 * epochs / 240)
