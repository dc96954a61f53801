"""Networks as files for other runtimes: they compute what JAX does, whatever the family, or are not written."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command, fresh_student, one_device, tiny_config
from jax import lax
from PIL import Image

import ekd_jax
from ekd_jax import models
from ekd_jax.common.errors import UserError
from ekd_jax.models.platform import ANY, platform, tracing_for
from ekd_jax.runs.exporting import exportable_ensemble
from ekd_jax.runs.run import load_run
from ekd_jax.students.description import NetworkDescription, Preprocessing, Provenance, StudentDescription
from ekd_jax.students.formats import registry
from ekd_jax.students.formats.export import export
from ekd_jax.students.formats.exportable import Exportable, exportable_student
from ekd_jax.students.formats.onnx_file import write_onnx
from ekd_jax.students.formats.onnx_graph import Graph
from ekd_jax.students.formats.registry import FORMATS
from ekd_jax.students.formats.request import Options, Request
from ekd_jax.students.student import LoadedStudent, write_student
from ekd_jax.training import single

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
CLASSES, PLAIN = tuple("abcdefghij"), Options()
SLOW = pytest.mark.slow
# name, size of the images, with preprocessing
NETWORKS = [
    ("resnet8", 8, False),
    ("resnet8", 8, True),
    ("resnet44", 16, False),  # stages that are scanned elsewhere
    ("resnet20_a", 32, False),
    pytest.param("resnet18", 64, False, marks=SLOW),
    ("resnext50_32x4d", 32, False),
    pytest.param("wide_resnet50_2", 64, False, marks=SLOW),
    ("densenet_bc_12_100", 16, False),
    pytest.param("densenet121", 64, False, marks=SLOW),
    ("efficientnet_b0", 32, False),
    pytest.param("efficientnet_b3", 65, False, marks=SLOW),
    ("mobilenet_v2", 32, False),
    pytest.param("mobilenet_v2_cifar", 32, False, marks=SLOW),
    ("shufflenet_v1_cifar", 32, False),
    pytest.param("shufflenet_v2_cifar", 32, False, marks=SLOW),
    ("shufflenet_v2_x1_0", 32, False),
    ("wrn_16_2", 32, False),
    ("vgg8", 32, False),
]


def statistic(path, new, old):
    """Return a running statistic of one batch; variances near 0 would blow rounding up."""
    return (np.asarray(new) - 0.9 * old) / 0.1 + 1e-3 * (path[-1].key == "var")


def needs(module):
    """Skip a test without a module; to import it as `importorskip` does would start OpenVINO's telemetry."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -e '.[parity]'")


@functools.cache
def calibrated(name, size, width=0.5, **options):
    """Make a student whose running statistics are those of a batch, as if it had been trained."""
    ensemble, shape = models.build_ensemble(name, (width,), 10, **options), (size, size, 3)
    full = ensemble.trace(shape).init(0)
    images = np.random.default_rng(0).normal(size=(16, *shape)).astype(np.float32)
    run = jax.jit(lambda v: ensemble.apply(v, images, train=True, key=jax.random.key(0))[1])
    of_batch = jax.tree_util.tree_map_with_path(statistic, run(full), full["batch_stats"])
    description = StudentDescription(
        network=NetworkDescription(
            name, tuple(map(str, ensemble.widths[0])), 10, shape, "float32", options
        ),
        student=1,
        parameters=0,
        macs=0,
        class_names=CLASSES,
        preprocessing=Preprocessing((0.4,), (0.2,)),
        provenance=Provenance("arrays"),
    )
    variables = ensemble.student_variables({"params": full["params"], "batch_stats": of_batch}, 1)
    return exportable_student(LoadedStudent(description, variables))


def pictures(network, number=8):
    return np.random.default_rng(1).integers(0, 256, (number, *network.input_shape), dtype=np.uint8)


def exported(network, names, output, images=None, options=PLAIN, **more):
    """Export a network, compared on random pixels if no images are given; return the record."""
    images = pictures(network) if images is None else images
    return export(Request((network,), images, options, **more), names, output, "random pixels")


@pytest.mark.parametrize(("name", "size", "with_preprocessing"), NETWORKS)
def test_onnx_runtime_computes_the_same(name, size, with_preprocessing, tmp_path):
    """Logits, or probabilities of the images themselves, for one image and for several."""
    network = dataclasses.replace(calibrated(name, size), with_preprocessing=with_preprocessing)
    record = exported(network, ["onnx"], tmp_path / "out")
    (written,) = record.exported
    assert written.images == written.same_class == 8
    assert written.difference < 1e-4
    assert network.expected(pictures(network)).std(0).mean() > 1e-3, "otherwise nothing was compared"
    model = onnx.load(tmp_path / "out" / "student.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert not {"Loop", "Scan", "If", "Gather"} & kinds.keys()
    if name not in ("densenet_bc_12_100", "densenet121", "wrn_16_2", "efficientnet_b0", "efficientnet_b3"):
        assert not kinds["Mul"], "batch norm is part of the convolutions"
    (images,), (output,) = model.graph.input, model.graph.output
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == [
        "batch",
        size,
        size,
        3,
    ]
    assert output.name == ("probabilities" if with_preprocessing else "logits")
    facts = {p.key: p.value for p in model.metadata_props}
    assert json.loads(facts["class_names"]) == list(CLASSES)
    assert json.loads(facts["preprocessing"])["in_the_file"] is with_preprocessing


def test_padding_of_pytorch(tmp_path):
    """On maps of even size it differs from that of TensorFlow, which is tested above."""
    network = calibrated("efficientnet_b0", 32, padding="even")
    exported(network, ["onnx"], tmp_path / "out")


def test_stablehlo_runs_without_this_package(tmp_path):
    network = calibrated("resnet20_a", 16)
    record = exported(network, ["stablehlo"], tmp_path / "out")
    assert record.exported[0].difference < 1e-5
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "student.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    images = network.inputs(pictures(network, 3))
    np.testing.assert_allclose(program.call(images), network.expected(pictures(network, 3)), atol=1e-4)


def test_openvino_computes_the_same(tmp_path):
    needs("openvino")
    network = calibrated("shufflenet_v1_cifar", 32)
    record = exported(network, ["openvino"], tmp_path / "out")
    assert record.exported[0].files == ("student.xml", "student.bin")
    assert record.exported[0].difference < 1e-4


def test_half_precision(tmp_path):
    network = calibrated("resnet8", 16)
    sizes = {}
    for dtype in ("float32", "float16"):
        record = exported(network, ["onnx"], tmp_path / dtype, options=Options(dtype))
        sizes[dtype] = record.exported[0].bytes
    assert 1e-5 < record.exported[0].difference < 1e-2
    assert sizes["float16"] < 0.6 * sizes["float32"]


@pytest.mark.parametrize(
    "method",
    ["oem", *(pytest.param(name, marks=SLOW) for name in ("one", "okddip", "snapshot", "kdcl", "pcl"))],
)
def test_the_ensemble_of_a_run(method, tmp_path):
    cycles = {"method__cycles": 1} if method == "snapshot" else {}
    single.run(tiny_config(method, train__epochs=1, **cycles), tmp_path / "run", one_device())
    run = load_run(tmp_path / "run")
    network = exportable_ensemble(run, with_preprocessing=True)
    images = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    exported(network, ["onnx"], tmp_path / "out", images)
    np.testing.assert_allclose(network.expected(images), run.predict(images)["ensemble"], atol=1e-5)


def test_a_network_is_traced_for_no_platform():
    """No loop, no work-around for CPUs, and the same numbers."""
    network = calibrated("resnext50_32x4d", 32)
    kinds: Counter[str] = Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            kinds[equation.primitive.name] += 1
            for value in equation.params.values():
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    count(inner)

    count(network.trace().jaxpr)
    assert kinds["conv_general_dilated"] == 53
    assert kinds["dot_general"] == 1
    assert not {"scan", "while", "optimization_barrier", "gather"} & kinds.keys()
    before = platform()
    with tracing_for(ANY):
        assert platform() == ANY
    assert platform() == before


def test_only_a_convolution_with_one_reader_is_folded():
    graph = Graph()
    kernel = np.ones((2, 1, 1, 1), np.float32)
    factor = np.array([2.0, 3.0], np.float32).reshape(1, 2, 1, 1)
    first = graph.add("Conv", "images", graph.constant(kernel))
    folded = graph.add("Add", graph.add("Mul", first, graph.constant(factor)), graph.constant(factor))
    second = graph.add("Conv", folded, graph.constant(np.ones((2, 2, 1, 1), np.float32)))
    twice = graph.add("Mul", second, graph.constant(factor))
    last = graph.add("Add", second, twice)
    graph.fold(last)
    assert [node.op for node in graph.nodes] == ["Conv", "Conv", "Mul", "Add"]
    own, bias = (graph.constants[name] for name in graph.nodes[0].inputs[1:])
    np.testing.assert_array_equal(own.ravel(), [2, 3])
    np.testing.assert_array_equal(bias, [2, 3])


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        (lambda x: jnp.sort(x.mean((1, 2))), "the operation sort of JAX has no counterpart here"),
        (lambda x: jnp.cumsum(x.mean((1, 2)), 1), "the operation cumsum of JAX has no counterpart here"),
        (lambda x: (x - x.sum(0)).mean((1, 2)), "with a sum over images"),
        (lambda x: (x > 0).sum((1, 2)).astype(jnp.float32), "used with integers"),
        (lambda x: x.mean((1, 2)) - jnp.ones((x.shape[0], 3)).sum(0), "reduce_sum over all images"),
        (lambda x: x.mean((1, 2)) - x.mean(), "with the number of images as a value"),
        (
            lambda x: jnp.broadcast_to(lax.slice_in_dim(x, 0, 1, axis=1), x.shape).sum((1, 2)),
            "a value that is repeated",
        ),
    ],
)
def test_what_onnx_cannot_say_is_one_line(logits, why, tmp_path):
    network = Exportable("mine", logits, (4, 4, 3), tuple("abc"), Preprocessing((0.5,), (0.5,)), {})
    with pytest.raises(
        UserError, match=f"mine cannot be written as ONNX: .*{why}.*--format=stablehlo"
    ) as error:
        exported(network, ["onnx"], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def attention(x):
    """One head over the pixels, after layer norm, with a bias for each pair."""
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / jnp.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    scores = jnp.einsum("bnc,bmc->bnm", tokens, tokens) + np.arange(16.0, dtype=np.float32)
    return jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(scores), tokens)[:, ::1].mean(1)


OPERATIONS = {
    "leaky ReLU": lambda x: nn.leaky_relu(x).mean((1, 2)),
    "ELU": lambda x: nn.elu(x).mean((1, 2)),
    "softplus": lambda x: jnp.log1p(jnp.exp(x)).mean((1, 2)),
    "GELU": lambda x: nn.gelu(x, approximate=False).sum((1, 2)),
    "tanh of GELU": lambda x: nn.gelu(x).max((1, 2)),
    "hard swish": lambda x: nn.hard_swish(x).mean((1, 2)),
    "logarithm of a sum": lambda x: jax.nn.logsumexp(x, (1, 2)),
    "finite": lambda x: jnp.isfinite(1 / jnp.maximum(x, 0)).astype(jnp.float32).mean((1, 2)),
    "powers": lambda x: (abs(x) ** 1.5 + x**3).mean((1, 2)),
    "attention": attention,
    "a sum that is read twice": lambda x: (lambda total: total * 2 + total)(x.sum((1, 2))),
    "constants": lambda x: (x + jnp.cumsum(jnp.ones((4, 4, 3)), 0)).mean((1, 2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_other_networks(name, tmp_path):
    network = Exportable(name, OPERATIONS[name], (4, 4, 3), tuple("abc"), Preprocessing((0.5,), (0.3,)), {})
    record = exported(network, ["onnx"], tmp_path / "out")
    assert record.exported[0].difference < 1e-5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda found: found + 0.1, "computes something else .* up to 0"),
        (lambda found: found[:, ::-1], "another class for [1-8] of 8 images"),
        (lambda found: found * np.nan, "computes something else .* up to nan"),
        (lambda found: 1 / 0, "does not run in onnxruntime"),
    ],
)
def test_a_runtime_that_differs_stops_the_export(change, why, tmp_path, monkeypatch):
    usual = FORMATS["onnx"]
    changed = dataclasses.replace(usual, run=lambda *given: list(map(change, usual.run(*given))))
    monkeypatch.setitem(registry.FORMATS, "onnx", changed)
    network = calibrated("resnet8", 8)
    with pytest.raises(UserError, match=f"{why}.*nothing was written"):
        exported(network, ["onnx"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_trained_in_bfloat16_is_exported_in_float32(tmp_path):
    student = fresh_student(("a", "b", "c"))
    own = student.description
    half = dataclasses.replace(
        student,
        description=dataclasses.replace(own, network=dataclasses.replace(own.network, dtype="bfloat16")),
    )
    a, b = (write_onnx(exportable_student(each)) for each in (student, half))
    tensors = [onnx.load_from_string(content).graph.initializer for content in (a, b)]
    assert [t.raw_data for t in tensors[0]] == [t.raw_data for t in tensors[1]]


def test_from_python(tmp_path):
    student = fresh_student(("a", "b", "c"))
    images = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    record = ekd_jax.export_student(student, tmp_path / "out", images=images, with_preprocessing=True)
    assert record.compared_on == "images that were passed in Python"
    session = onnxruntime.InferenceSession(tmp_path / "out" / "student.onnx")
    (found,) = session.run(None, {"images": images})
    np.testing.assert_allclose(found, student.predict(images), atol=1e-6)


@pytest.mark.parametrize(
    "images", [np.zeros((0, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 1))]
)
def test_images_that_do_not_fit_are_refused(images, tmp_path):
    with pytest.raises(UserError, match="pass uint8 images Nx8x8x1, at least one, not"):
        ekd_jax.export_student(fresh_student(("a", "b")), tmp_path / "out", images=images)


def test_the_data_of_a_run_is_where_the_run_had_it(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    config = json.loads((run / "config.json").read_text())
    classes = json.loads((run / "students.json").read_text())["class_names"]
    for number, name in enumerate(sorted(classes)):
        for split in ("train", "test"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / split / name / "1.png")
    config["data"] |= {
        "name": "folder",
        "data_dir": str(tmp_path / "photos"),
        "fit": "stretch",
        "image_size": 8,
    }
    (run / "config.json").write_text(json.dumps(config))
    done = command("export", f"--workdir={run}", "--student=2", "--format=onnx", f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "10 of 10 images in the same class" in done.stdout


def test_the_command(tmp_path):
    student = fresh_student(tuple("0123456789"))
    of_digits = dataclasses.replace(student.description, provenance=Provenance("digits"))
    write_student(tmp_path / "student", dataclasses.replace(student, description=of_digits))
    flags = [f"--student_dir={tmp_path}/student", f"--output={tmp_path}/new/out"]
    done = command("export", *flags, "--format=onnx,stablehlo", "--with_preprocessing")
    assert done.returncode == 0, done.stderr
    assert "50 of 50 images in the same class by onnxruntime" in done.stdout
    record = json.loads((tmp_path / "new" / "out" / "export.json").read_text())
    assert record["compared_on"] == "test images of digits"
    assert [(e["format"], e["files"]) for e in record["exported"]] == [
        ("onnx", ["student.onnx"]),
        ("stablehlo", ["student.stablehlo"]),
    ]
    assert record["facts"]["output"] == "probabilities (batch, 10)"
    again = command("export", *flags, "--format=onnx")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists and is not an empty directory" in again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onn"], "--format=onn is not known; did you mean 'onnx'?"),
        (["--format=stablehlo", "--dtype=float16"], "--format=stablehlo has no --dtype=float16"),
        (["--format=onnx", "--dtype=int4"], "--dtype=int4 must be one of float32, float16"),
        (["--format=onnx", "--student=1"], "--student belongs to --workdir"),
        (["--format=onnx", "--best"], "--best belongs to --workdir"),
        (["--format=onnx", "--verify_with=nowhere.png"], "nowhere.png"),
        (["--format=onnx", "--workdir=run"], "pass --student_dir=DIR, or --workdir=RUN"),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_written(flags, message, tmp_path):
    write_student(tmp_path / "student", fresh_student(tuple("0123456789")))
    done = command("export", f"--student_dir={tmp_path}/student", f"--output={tmp_path}/out", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--format=openvino needs the package onnx: pip install 'ekd_jax\[openvino\]'"
    ):
        registry.check_formats(["openvino"], Options())
