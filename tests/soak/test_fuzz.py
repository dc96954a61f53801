"""Inputs that are changed at random for some time: each is taken, or refused in one line.

`EKD_JAX_SOAK_SECONDS` says how long for each kind of input. What fails is told with the number of its input, and
`EKD_JAX_SOAK_SEED` begins there again.
"""

import collections
import json
import math
import os
import shutil
import signal
import time
import traceback

import numpy as np
import pytest
from conftest import fresh_student, one_device, tiny_config
from test_images import mutated, seeds
from test_prepare import MAKERS, vouch

from ekd_jax.common.errors import UserError
from ekd_jax.config.knobs import all_knobs
from ekd_jax.config.resolve import fingerprint, resolve, to_dict
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import CorruptImageError, Reader
from ekd_jax.data.tfds import records as prepared
from ekd_jax.methods import list_methods
from ekd_jax.models import list_models
from ekd_jax.runs.metrics import read_metrics
from ekd_jax.runs.run import load_run
from ekd_jax.students.state_dict import read_state_dict
from ekd_jax.students.student import load_student, write_student
from ekd_jax.training import single

SECONDS = float(os.environ.get("EKD_JAX_SOAK_SECONDS", 60))
SEED = int(os.environ.get("EKD_JAX_SOAK_SEED", 0))
LONGEST = 30  # seconds that one input may take


def fuzz(attempt):
    """Call `attempt(generator)` with one seed after the other; collect what is neither taken nor refused."""
    outcomes, failures = collections.Counter(), {}
    until, number = time.monotonic() + SECONDS, SEED
    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        while time.monotonic() < until or number == SEED:
            signal.alarm(LONGEST)
            try:
                attempt(np.random.default_rng(number))
                outcomes["taken"] += 1
            except (UserError, CorruptImageError) as error:
                said = str(error)
                outcomes["refused"] += 1
                if "\n" in said or not 0 < len(said) < 1500 or "object at 0x" in said:
                    failures.setdefault(said[:60], f"input {number}: {said}")
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {place.filename}:{place.lineno}"
                failures.setdefault(kind, f"input {number}:\n{traceback.format_exc()}")
            signal.alarm(0)
            number += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    print(f"{number - SEED} inputs: {dict(outcomes)}, {len(failures)} kinds of failure")
    assert not failures, "\n\n".join(failures.values())
    assert min(outcomes["taken"], outcomes["refused"]) > 0


def too_long(*_):
    raise TimeoutError(f"an input took more than {LONGEST} s")


# --- configurations ---------------------------------------------------------------------------------

ODD = (0, -1, 1, 2, 3, 2**31, 10**23, 0.5, 0.1, 1e-300, 1e300, math.inf, -math.inf, math.nan, None, True, False,
       "", "²", "none", "auto", "nan", "1/0", "vgg8:1/2", "\n", "\0", "../..", "~nobody", (), (1,), (1, 0.5), [[]],
       {}, ((1, 2),), ("",), b"\xff")  # fmt: skip


def random_value(generator, knob, knobs):
    """Return a value that a knob may have, often; else one of another knob, or none that makes sense."""
    match generator.integers(4):
        case 0 if knob.rule.choices:
            return str(generator.choice(knob.rule.choices()))
        case 1:
            return knobs[sorted(knobs)[generator.integers(len(knobs))]].default
        case 2:
            return ODD[generator.integers(len(ODD))]
    default = knob.default
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return type(default)(
            generator.choice([default * 2, default + 1, default / 2, generator.integers(100)])
        )
    return default


def test_configurations():
    """Several knobs at once, of any method and network; what is taken says the same after it was stored."""

    def attempt(generator):
        method = list_methods()[generator.integers(len(list_methods()))]
        knobs = all_knobs(method)
        asked = {"method": {"name": method}, "data": {"name": "digits"}}
        if generator.random() < 0.5:
            asked["model"] = {"name": list_models()[generator.integers(len(list_models()))]}
        for name in generator.choice(sorted(knobs), size=generator.integers(1, 7)):
            section, _, own = name.rpartition(".")
            value = random_value(generator, knobs[name], knobs)
            (asked.setdefault(section, {}) if section else asked)[own] = value
        config = resolve(asked)
        assert fingerprint(resolve(json.loads(json.dumps(to_dict(config))))) == fingerprint(config)

    fuzz(attempt)


# --- files ------------------------------------------------------------------------------------------


def changing_one_file(folder, work, use):
    """Return an attempt that copies a directory, mutates one of its files, and uses the copy."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    files = sorted(path.relative_to(folder) for path in found)

    def attempt(generator):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        file = files[generator.integers(len(files))]
        if generator.random() < 0.95:
            (work / file).write_bytes(mutated((folder / file).read_bytes(), generator))
        use(work)

    return attempt


def test_student_folders(tmp_path):
    write_student(tmp_path / "student", fresh_student(("cat", "dog", "cow")))

    def use(path):
        student = load_student(path)
        student.predict(np.zeros((1, 8, 8, 1), np.uint8))

    fuzz(changing_one_file(tmp_path / "student", tmp_path / "work", use))


@pytest.mark.filterwarnings("ignore")
def test_images():
    files = list(seeds().values())

    def attempt(generator):
        content = mutated(files[generator.integers(len(files))], generator)
        fit = ("stretch", "crop")[generator.integers(2)]
        Reader((8, 8, 3), fit, max_pixels=10**5)(Example(content, 0, "a/b.jpg"), None)

    fuzz(attempt)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"imagenet2012"}))
@pytest.mark.parametrize("vouched", [True, False])
def test_archives(name, vouched, tmp_path):
    """What was changed is refused, unless the user vouches for it; then a set is read, or refused."""
    (tmp_path / "archives").mkdir()
    MAKERS[name](tmp_path / "archives", np.random.default_rng(0))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "archives").iterdir()}
    vouch(tmp_path / "archives")

    def use(path):
        if vouched:
            vouch(path)
        sets = prepared.open_set(name, str(tmp_path / "tfds"), str(path), False, "")
        try:
            for example in list(sets.train)[:3]:
                assert np.asarray(example.image) is not None
        finally:
            shutil.rmtree(tmp_path / "tfds", ignore_errors=True)
        changed = [file for file, data in whole.items() if (path / file).read_bytes() != data]
        assert vouched or not changed, changed

    fuzz(changing_one_file(tmp_path / "archives", tmp_path / "work", use))


def test_files_of_weights(tmp_path):
    import safetensors.numpy

    (tmp_path / "weights").mkdir()
    arrays = {"fc.weight": np.ones((2, 2), np.float32), "fc.bias": np.ones(2, np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "weights" / "arrays.safetensors")
    np.savez(tmp_path / "weights" / "arrays.npz", **arrays)
    try:
        import torch
    except ImportError:
        kinds = ()
    else:
        tensors = {"state_dict": {name: torch.tensor(value) for name, value in arrays.items()}, "epoch": 3}
        kinds = ("zipped.pt", "old.pt")
        for kind in kinds:
            file = tmp_path / "weights" / kind
            torch.save(tensors, file, _use_new_zipfile_serialization=kind == "zipped.pt")
    for kind in ("arrays.safetensors", *kinds):
        assert read_state_dict(tmp_path / "weights" / kind)

    def use(path):
        for file in sorted(path.iterdir()):
            if file.read_bytes() != (tmp_path / "weights" / file.name).read_bytes():
                read_state_dict(file)

    fuzz(changing_one_file(tmp_path / "weights", tmp_path / "work", use))


@pytest.mark.filterwarnings("ignore")
def test_directories_of_runs(tmp_path):
    """A student is loaded from a run's directory; so are its records."""
    single.run(tiny_config(train__epochs=1), tmp_path / "run", one_device())

    def use(path):
        read_metrics(path)
        load_run(path).student(1)

    fuzz(changing_one_file(tmp_path / "run", tmp_path / "work", use))
