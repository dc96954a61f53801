"""Files that resize: what ONNX Runtime makes of an image of any size is what Pillow makes of it."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import command, fresh_student
from PIL import Image
from test_export import calibrated, exported

from ekd_jax.common.errors import UserError
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import Reader
from ekd_jax.students.description import Preprocessing
from ekd_jax.students.formats import onnx_resizing
from ekd_jax.students.formats.onnx_file import run_onnx
from ekd_jax.students.formats.onnx_resizing import with_resizing
from ekd_jax.students.formats.request import Options
from ekd_jax.students.student import LoadedStudent, write_student

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def pixels_file(shape):
    """Return an ONNX file that gives the pixels that it takes."""
    helper, proto = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=proto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["pixels"]),
        ],
        "pixels",
        [helper.make_tensor_value_info("images", proto.UINT8, ["batch", *shape])],
        [helper.make_tensor_value_info("pixels", proto.FLOAT, ["batch", int(np.prod(shape))])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


# fit, size of the network, size of the image
SIZES = [
    ("stretch", (16, 16), (37, 53)),
    ("stretch", (16, 16), (16, 16)),
    ("stretch", (33, 17), (100, 20)),
    ("stretch", (32, 32), (8, 8)),
    ("stretch", (8, 8), (1, 1)),
    ("crop", (16, 16), (37, 53)),
    ("crop", (16, 16), (53, 37)),
    ("crop", (16, 16), (40, 40)),
    ("crop", (16, 16), (16, 16)),
    ("crop", (15, 15), (5, 90)),
    ("crop", (32, 32), (333, 500)),
    ("crop", (33, 33), (301, 200)),
]


@pytest.mark.parametrize(("fit", "size", "image_size"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_pillows(fit, size, image_size, channels):
    shape = (*size, channels)
    images = np.random.default_rng(0).integers(0, 256, (2, *image_size, channels), dtype=np.uint8)
    (found,) = run_onnx(with_resizing(pixels_file(shape), shape, fit), [images])
    read = Reader(shape, fit)
    expected = np.stack([read(Example(image, 0, "")) for image in images])
    off = np.abs(found.reshape(expected.shape) - expected)
    assert off.max() <= 1
    assert (off > 0).mean() < 0.25  # its weights are float32, Pillow's float64


@pytest.mark.parametrize("fit", ["native", "stretch", "crop"])
def test_a_file_that_resizes(fit, tmp_path):
    network = dataclasses.replace(
        calibrated("resnet8", 16), with_preprocessing=True, preprocessing=Preprocessing((0.4,), (0.2,), fit)
    )
    generator = np.random.default_rng(2)
    originals = [
        generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 31), (16, 90), (9, 9))
    ]
    options = Options(with_resizing=True)
    record = exported(network, ["onnx"], tmp_path / "out", options=options, originals=originals)
    found = record.exported[0].resizing
    assert (found.fit, found.images) == ("crop" if fit == "crop" else "stretch", 3)
    assert found.difference < 3e-2
    model = onnx.load(tmp_path / "out" / "student.onnx")
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim][:3] == [
        "batch",
        "height",
        "width",
    ]
    assert {"class_names", "preprocessing"} <= {p.key for p in model.metadata_props}


def test_what_resizes_otherwise_is_not_written(tmp_path, monkeypatch):
    """A file that stretches where Pillow crops gives other classes."""
    real = with_resizing
    monkeypatch.setattr(
        onnx_resizing, "with_resizing", lambda content, shape, fit: real(content, shape, "stretch")
    )
    network = dataclasses.replace(
        calibrated("resnet8", 16),
        with_preprocessing=True,
        preprocessing=Preprocessing((0.4,), (0.2,), "crop"),
    )
    originals = [np.random.default_rng(n).integers(0, 256, (20, 80, 3), dtype=np.uint8) for n in range(4)]
    with pytest.raises(UserError, match="resizes otherwise than Pillow: up to .* another class for"):
        exported(
            network, ["onnx"], tmp_path / "out", options=Options(with_resizing=True), originals=originals
        )
    assert not (tmp_path / "out").exists()


def test_the_command_takes_photos_of_any_size(tmp_path):
    student = fresh_student(("a", "b"), (8, 8, 3))
    own = dataclasses.replace(student.description, preprocessing=Preprocessing((0.5,), (0.5,), "crop", 8))
    student = LoadedStudent(own, student.variables)
    write_student(tmp_path / "student", student)
    for number, size in enumerate(((30, 20), (20, 30), (8, 8))):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    flags = [
        f"--student_dir={tmp_path}/student",
        f"--verify_with={tmp_path}/photos",
        f"--output={tmp_path}/out",
    ]
    done = command("export", *flags, "--format=onnx", "--with_resizing")
    assert done.returncode == 0, done.stderr
    assert "resized inside (crop): 3 of 3 images in the same class" in done.stdout
    assert (
        json.loads((tmp_path / "out" / "export.json").read_text())["exported"][0]["resizing"]["images"] == 3
    )


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["stablehlo"], {}, "--with_resizing is for --format=onnx alone"),
        (["onnx", "stablehlo"], {}, "--with_resizing is for --format=onnx alone"),
        (["onnx"], {"dtype": "float16"}, "--with_resizing is for --format=onnx alone, in float32"),
        (["onnx"], {}, "--with_resizing needs --with_preprocessing"),
    ],
)
def test_mistakes(names, options, message, tmp_path):
    network = calibrated("resnet8", 16)
    with pytest.raises(UserError, match=message):
        exported(network, names, tmp_path / "out", options=Options(with_resizing=True, **options))
