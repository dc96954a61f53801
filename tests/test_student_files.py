"""A student's directory from elsewhere: whatever is in it, it loads as it was written or is refused in one line."""

import hashlib
import json
import os
import pathlib
import re
import struct

import numpy as np
import pytest
import safetensors.numpy
from conftest import fresh_student
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekd_jax.common.errors import UserError
from ekd_jax.students.student import load_student, write_student


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The description and the weights of a student."""
    path = tmp_path_factory.mktemp("original") / "student"
    write_student(path, fresh_student(("cat", "dog", "cow")))
    return json.loads((path / "student.json").read_text()), (path / "weights.safetensors").read_bytes()


def write(path: pathlib.Path, description, weights: bytes) -> pathlib.Path:
    """Write a directory whose SHA-256 is right."""
    path.mkdir(exist_ok=True)
    if isinstance(description, dict) and "weights_sha256" in description:
        description = {**description, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    text = description if isinstance(description, str | bytes) else json.dumps(description)
    (path / "student.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (path / "weights.safetensors").write_bytes(weights)
    return path


def refused(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        load_student(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_what_was_written_loads(original, tmp_path):
    loaded = load_student(write(tmp_path / "student", *original))
    assert loaded.class_names == ("cat", "dog", "cow")
    assert loaded.predict(np.zeros((1, 8, 8, 1), np.uint8)).shape == (1, 3)


def changed(description, path, value):
    """A description with another value at a dotted path; the value `...` removes the key."""
    new = json.loads(json.dumps(description))
    *above, last = path.split(".")
    place = new
    for key in above:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return new


FIELDS = [
    ("network", ..., "missing required field `network`"),
    ("class_names", ..., "class_names"),
    ("network.name", "resnet9", "there is no network 'resnet9'; did you mean"),
    ("network.name", 5, "Expected `str`"),
    ("network.name", "resnet14", "does not fit .*: it lacks 'batch_stats/stage1/rest"),
    ("network.widths", ["1/0", "1", "1"], "width '1/0' is not a number above 0"),
    ("network.widths", ["1", "nan", "1"], "width 'nan' is not a number"),
    ("network.widths", ["1e999999999"] * 3, "is not a number"),
    ("network.widths", ["-1"] * 3, "is not a number above 0"),
    ("network.widths", ["1/4"] * 2, "width"),
    ("network.widths", [], "network.widths is empty"),
    (
        "by_class",
        {"zebra": {"images": 1, "recall": 0.0, "precision": 0.0, "f1": 0.0}},
        "by_class has 'zebra', which is no class",
    ),
    ("network.widths", ["1/2"] * 3, "bn1/mean is float32 4, its network needs float32 8"),
    ("network.num_classes", 1, "network.num_classes is 1, not 2 to"),
    ("network.num_classes", 10**12, "network.num_classes is 1000000000000"),
    ("network.num_classes", 4, "class_names has 3 names, network.num_classes is 4"),
    ("network.dtype", "float31", "network.dtype is 'float31', not one of float32"),
    ("network.input_shape", [1000, 1000, 1], "its network has"),
    ("network.input_shape", [10**6, 10**6, 1], "not H x W x 1 or 3 of at most 4096x4096"),
    ("network.input_shape", [0, 8, 1], "network.input_shape is 0x8x1"),
    ("network.input_shape", [8, 8, 2], "network.input_shape is 8x8x2"),
    ("network.input_shape", [8, 8, 3], "does not fit"),
    ("network.input_shape", [8, 8], "input_shape"),
    ("network.input_shape", [8.5, 8, 1], "Expected `int`"),
    ("network.options", {"dropout": 2}, "network.options has dropout=2"),
    ("network.options", {"padding": "odd"}, "padding='odd'"),
    ("network.options", {"num_classes": 5}, "network.options has 'num_classes', which this version does not know"),
    ("network.options", {"batch_norm_epsilon": 0}, "batch_norm_epsilon=0"),
    ("network.imports", ["no_such_module_there"], "needs the module 'no_such_module_there'"),
    ("network.imports", ["os; import x"], "which is not the name of a module"),
    ("class_names", ["a"] * 9, "class_names has 9 names, network.num_classes is 3"),
    ("class_names", ["a", "a", "b"], "the same name twice"),
    ("class_names", ["a", "", "b"], "an empty name"),
    ("class_names", "abc", "Expected `array`"),
    ("preprocessing.std", [0.0], "preprocessing.std is .0.0.: it must be above 0"),
    ("preprocessing.std", [float("nan")], "not 1 or 1 finite numbers"),
    ("preprocessing.mean", [0.1, 0.2], "not 1 or 1 finite numbers"),
    ("preprocessing.mean", [], "not 1 or 1 finite numbers"),
    ("preprocessing.fit", "shrink", "preprocessing.fit is 'shrink', not one of native"),
    ("preprocessing.image_size", 224, "preprocessing.image_size is 224, network.input_shape 8x8x1"),
    ("preprocessing.image_size", -8, "preprocessing.image_size is -8"),
    ("student", 0, "student and parameters must be at least 1"),
    ("parameters", 17, "states 17 parameters"),
    ("macs", 17, "17 multiply-accumulates"),
    ("metrics", {"top1": float("inf")}, "metrics has a value that is not finite"),
    ("metrics", {"top1": "high"}, "Expected `float`"),
    ("format", 4, "has format 4, this version reads 6: extract the student again"),
    ("format", "5", "Expected `int`"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), FIELDS, ids=lambda v: str(v)[:30])
def test_descriptions_that_cannot_be_right(original, tmp_path, path, value, message):
    description, weights = original
    said = refused(write(tmp_path / "student", changed(description, path, value), weights))
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "Expected `object`"),
        ("null", "Expected `object`"),
        ('"student"', "Expected `object`"),
        ("", "is damaged"),
        ("{", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"network":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
    ],
    ids=range(8),
)
def test_files_that_are_no_description(original, tmp_path, text, message):
    assert message in refused(write(tmp_path / "student", text, original[1]))


def tampered_header(weights: bytes, change) -> bytes:
    """The file with a changed header, whose length is right."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + length :]


def arrays_with(weights: bytes, **changes) -> bytes:
    arrays = safetensors.numpy.load(weights)
    for name, change in changes.items():
        full = next(key for key in arrays if key.endswith(name.replace("__", "/")))
        arrays[full] = change(arrays[full])
    return safetensors.numpy.save(arrays)


def with_value(value):
    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


KERNEL = "params/stem/conv/kernel"
WEIGHTS = {
    "empty": (lambda w: b"", "is damaged"),
    "text": (lambda w: b"<html>not found</html>", "is damaged"),
    "truncated": (lambda w: w[:-100], "is damaged"),
    "appended": (lambda w: w + b"0" * 100, "is damaged"),
    "header length": (lambda w: struct.pack("<Q", 2**62) + w[8:], "is damaged"),
    "header deep": (lambda w: struct.pack("<Q", 200_000) + b"[" * 200_000, "is damaged"),
    "shape": (lambda w: tampered_header(w, lambda h: h[KERNEL].update(shape=[3, 3, 1, 400])), "is damaged"),
    "dtype": (lambda w: tampered_header(w, lambda h: h[KERNEL].update(dtype="F17")), "is damaged"),
    "offsets": (lambda w: tampered_header(w, lambda h: h[KERNEL].update(data_offsets=[0, 1])), "is damaged"),
    "missing": (lambda w: _without(w, KERNEL), f"it lacks '{KERNEL}'"),
    "renamed": (lambda w: tampered_header(w, lambda h: h.update({"a": h.pop(KERNEL)})), f"it lacks '{KERNEL}'"),
    "two more": (lambda w: _with(w, "params/stem", "extra"), "it also has 'extra', 'params/stem'"),
    "reshaped": (lambda w: arrays_with(w, conv__kernel=lambda a: a.reshape(-1)), "its network needs float32"),
    "half": (lambda w: arrays_with(w, stem__conv__kernel=lambda a: a.astype(np.float16)), "is float16"),
    "integers": (lambda w: arrays_with(w, stem__conv__kernel=lambda a: a.astype(np.int32)), "is int32"),
    "NaN": (lambda w: arrays_with(w, head__linear__bias=with_value(np.nan)), "not finite"),
    "infinity": (lambda w: arrays_with(w, head__linear__kernel=with_value(-np.inf)), "not finite"),
    "variance": (lambda w: arrays_with(w, stem__bn__var=with_value(-1)), "negative variance"),
}  # fmt: skip


def _without(weights, name):
    arrays = safetensors.numpy.load(weights)
    del arrays[name]
    return safetensors.numpy.save(arrays)


def _with(weights, *names):
    return safetensors.numpy.save(
        safetensors.numpy.load(weights) | {name: np.zeros(1, np.float32) for name in names}
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_do_not_fit_though_their_digest_does(original, tmp_path, kind):
    change, message = WEIGHTS[kind]
    description, weights = original
    assert message in refused(write(tmp_path / "student", description, change(weights)))


@pytest.mark.parametrize("file", ["student.json", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device"])
def test_files_of_another_kind_do_not_hang(original, tmp_path, file, kind):
    path = write(tmp_path / "student", *original) / file
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    refused(path.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
EXAMPLES = int(os.environ.get("EKD_JAX_EXAMPLES", 60))  # of each property; more of them for a long search


def leaves(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from leaves(inner, (*path, key))


def refused_or_loaded(path: pathlib.Path) -> None:
    """Load a directory: it is refused in one line, or makes sense."""
    try:
        student = load_student(path)
    except UserError as error:
        said = str(error)
        assert said
        assert "\n" not in said
    else:
        assert len(student.class_names) == student.description.network.num_classes


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_descriptions(original, tmp_path, data):
    description, weights = original
    path = data.draw(st.sampled_from([p for p in leaves(description) if p]))
    new = changed(description, ".".join(path), data.draw(JSON))
    refused_or_loaded(write(tmp_path / "student", new, weights))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10**6), value=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_mutated_bytes(original, tmp_path, place, value, cut):
    description, weights = original
    for index, content in enumerate((json.dumps(description).encode(), weights)):
        at = place % (len(content) if index == 0 else 4000)
        new = content[:at] + value + (b"" if cut else content[at + len(value) :])
        files = [new, weights] if index == 0 else [description, new]
        refused_or_loaded(write(tmp_path / "student", *files))
