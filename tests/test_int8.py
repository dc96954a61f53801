"""Files that compute in 8-bit integers: calibrated, chosen and measured on images apart, refused if they cost much."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import command, tiny_config
from test_export import calibrated, exported, needs

from ekd_jax.common.errors import UserError
from ekd_jax.data.opening import open_data
from ekd_jax.runs.exporting import quantization_images, trained_with
from ekd_jax.runs.run import load_run
from ekd_jax.students.formats.int8 import RECIPES, Recipe, quantized
from ekd_jax.students.formats.onnx_file import run_onnx, write_onnx
from ekd_jax.students.formats.request import Labeled, Options, QuantizationImages

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def labeled(network, number, seed):
    """Return the random images that the network in float32 is least sure of, labeled with what it takes them for."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (10 * number, *network.input_shape), dtype=np.uint8)
    outputs = network.expected(images)
    second, first = np.sort(outputs)[:, -2:].T
    least = np.argsort(first - second)[:number]
    return Labeled(images[least], outputs[least].argmax(1), f"images of seed {seed}")


@pytest.fixture(scope="module")
def network():
    return calibrated("resnet8", 16)


@pytest.fixture(scope="module")
def images(network):
    return QuantizationImages(*(labeled(network, n, seed) for seed, n in enumerate((32, 40, 60))))


@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_what_int8_costs_is_what_the_file_does(network, images, tmp_path, format_):
    needs(format_)
    options = Options(quantize="int8", max_loss=100)
    record = exported(network, [format_], tmp_path / "out", options=options, quantization=images)
    (written,) = record.exported
    cost = written.quantization
    assert (cost.correct_in_float32, cost.images) == (60, 60)
    assert 20 <= cost.correct < 60
    assert [each.correct for each in cost.tried] == sorted((t.correct for t in cost.tried), reverse=True)
    assert {each.recipe for each in cost.tried} == {str(recipe) for recipe in RECIPES}
    assert written.dtype == "int8"
    assert 1e-4 < written.difference < 2
    assert min(cost.latency_ms, cost.latency_ms_in_float32) > 0
    if format_ == "onnx":
        content = (tmp_path / "out" / "student.onnx").read_bytes()
        found = np.concatenate(run_onnx(content, [network.inputs(images.test.images)]))
        assert (found.argmax(1) == images.test.labels).sum() == cost.correct
        assert written.bytes < 0.7 * cost.bytes_in_float32
        model = onnx.load_from_string(content)
        facts = {p.key for p in model.metadata_props}
        assert {"class_names", "preprocessing", "provenance"} <= facts
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_what_costs_too_much_is_not_written(network, images, tmp_path):
    options = Options(quantize="int8", max_loss=0)
    with pytest.raises(
        UserError, match=r"costs .* points of top-1, 100.00 -> .* --max_loss=0: nothing was"
    ) as error:
        exported(network, ["onnx"], tmp_path / "out", options=options, quantization=images)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_quantizes_what_it_says(network, images, recipe):
    content = write_onnx(network)
    model = onnx.load_from_string(
        quantized(content, [network.inputs(images.calibration.images[:16])], recipe)
    )
    produced = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    in_integers = [
        all(produced[i].op_type == "DequantizeLinear" for i in node.input[:2] if i in produced)
        and node.input[1] in produced
        for node in products
    ]
    expected = [True] * len(products)
    if not recipe.ends:
        expected[0] = expected[-1] = False
    assert in_integers == expected
    scales = {
        i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("_scale")
    }
    kernel = produced[products[1].input[1]]
    assert (scales[kernel.input[1]].ndim == 1) == recipe.per_channel


def test_images_are_those_of_the_run_and_do_not_overlap(finished):
    """A student's directory says what was held out; calibration, choice and measurement have their own images."""
    student = load_run(finished[0]).student(2)
    own = dataclasses.replace(
        student.description.provenance,
        settings={**student.description.provenance.settings, "data.validation_examples": 100},
        seed=7,
    )
    held_out = dataclasses.replace(
        student, description=dataclasses.replace(student.description, provenance=own)
    )
    for each, name in (
        (student, "training images of digits that do not calibrate"),
        (held_out, "validation"),
    ):
        found = quantization_images(trained_with(each), (8, 8, 1), each.class_names)
        assert name in found.validation.name
        sets = [
            {image.tobytes() for image in part.images}
            for part in (found.calibration, found.validation, found.test)
        ]
        assert not sets[0] & sets[1]
        assert len(sets[2]) > 800
    data = open_data(tiny_config(seed=7, data__validation_examples=100))
    expected = {np.asarray(data.validation[i].image).tobytes() for i in range(100)}
    assert {image.tobytes() for image in found.validation.images} == expected
    trained = {np.asarray(data.train[i].image).tobytes() for i in range(len(data.train))}
    assert {image.tobytes() for image in found.calibration.images} <= trained


def test_labels_count_in_the_students_classes(finished):
    student = load_run(finished[0]).student(2)
    names = student.class_names[::-1]
    found = quantization_images(trained_with(student), (8, 8, 1), names)
    usual = quantization_images(trained_with(student), (8, 8, 1), student.class_names)
    np.testing.assert_array_equal(found.test.labels, 9 - usual.test.labels)


def test_the_command_shows_what_it_costs(finished, tmp_path):
    flags = [f"--workdir={finished[0]}", "--student=1", "--format=onnx", "--with_preprocessing"]
    done = command("export", *flags, "--quantize=int8", "--max_loss=100", f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    cost = json.loads((tmp_path / "out" / "export.json").read_text())["exported"][0]["quantization"]
    assert cost["measured_on"] == "898 test images of digits"
    printed = dict(line.split()[:2] for line in done.stdout.splitlines() if len(line.split()) == 4)
    assert printed["int8"] == f"{100 * cost['correct'] / 898:.2f}"
    assert printed["float32"] == f"{100 * cost['correct_in_float32'] / 898:.2f}"
    assert f"recipe: {cost['tried'][0]['recipe']}; the best of {len(RECIPES)}" in done.stdout


MISTAKES = [
    ({"quantize": "int4"}, ["onnx"], "--quantize=int4 must be int8"),
    ({"quantize": "int8"}, ["stablehlo"], "--format=stablehlo has no --quantize: onnx and openvino have"),
    ({"quantize": "int8"}, ["onnx", "stablehlo"], "--format=stablehlo has no --quantize"),
    ({"quantize": "int8", "dtype": "float16"}, ["onnx"], "choose one of them"),
    ({"quantize": "int8", "max_loss": -1.0}, ["onnx"], "--max_loss=-1.0 must be 0 to 100"),
    ({"quantize": "int8", "max_loss": float("nan")}, ["onnx"], "--max_loss=nan must be 0 to 100"),
]


@pytest.mark.parametrize(("options", "names", "message"), MISTAKES)
def test_mistakes(network, images, options, names, message, tmp_path):
    with pytest.raises(UserError, match=message):
        exported(network, names, tmp_path / "out", options=Options(**options), quantization=images)
    assert not (tmp_path / "out").exists()


def test_a_network_without_products_is_refused(network):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["images"], ["logits"], name="logits")],
        "nothing",
        [onnx.helper.make_tensor_value_info("images", 1, ["batch", 3])],
        [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 3])],
    )
    content = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    with pytest.raises(UserError, match="finds nothing in this network"):
        quantized(content.SerializeToString(), [np.zeros((1, 3), np.float32)], Recipe("MinMax"))
