"""State dicts of students are run in the real networks of torchvision and timm, and in a user's copy of others."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import command, plain_environment
from PIL import Image
from test_export import calibrated, exported

from ekd_jax.common.errors import UserError
from ekd_jax.models.cost import count_parameters
from ekd_jax.students.convert import Request, convert
from ekd_jax.students.formats.request import Options
from ekd_jax.students.state_dict import read_state_dict
from ekd_jax.students.student import write_student

for package in ("torch", "torchvision", "timm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[parity]'", allow_module_level=True)
SLOW = pytest.mark.slow
# name, size of the images, width, options, library, what makes the network if the library is no package
NETWORKS = [
    pytest.param("resnet18", 64, 1, {}, "torchvision", "", marks=SLOW),
    ("resnext50_32x4d", 64, 0.5, {}, "timm", ""),
    pytest.param("resnet50", 64, 1, {}, "timm", "", marks=SLOW),
    pytest.param("wide_resnet50_2", 64, 0.5, {}, "torchvision", "", marks=SLOW),
    pytest.param("densenet121", 64, 0.5, {}, "timm", "", marks=SLOW),
    pytest.param("mobilenet_v2", 64, 0.5, {}, "torchvision", "", marks=SLOW),
    pytest.param("mobilenet_v2", 64, 1, {}, "timm", "", marks=SLOW),
    ("shufflenet_v2_x1_0", 64, 0.5, {}, "torchvision", ""),
    ("efficientnet_b0", 65, 0.5, {"padding": "even"}, "torchvision", ""),
    ("efficientnet_b0", 65, 0.5, {"batch_norm_epsilon": 1e-3}, "timm", ""),
    pytest.param("efficientnet_b1", 65, 1, {"padding": "even"}, "timm", "", marks=SLOW),
    ("resnet20_a", 32, (1, 0.5, 0.5), {}, "official", "copied:resnet20"),
    pytest.param(
        "wrn_16_1",
        32,
        (1, 0.5, 0.5),
        {},
        "RepDistiller",
        "copied:wrn_16_1",
        marks=SLOW,
    ),
    ("vgg8", 32, 0.5, {}, "RepDistiller", "copied:vgg8()"),
    pytest.param(
        "shufflenet_v1_cifar",
        32,
        0.5,
        {},
        "RepDistiller",
        "copied:ShuffleNetV1Cifar(10)",
        marks=SLOW,
    ),
]


COPIED = """
from torch_networks import BasicBlock, CifarResNet, ShuffleNetV1Cifar, Vgg, WideResNet, vgg

def resnet20():
    return CifarResNet(BasicBlock, 3, channels=(16, 16, 16, 32))  # a narrower one: its shortcuts pad

def resnet8(num_classes):
    return CifarResNet(BasicBlock, 1, num_classes, option="B")

def even():
    import timm
    return timm.create_model("efficientnet_b0", num_classes=10)

def wrn_16_1():
    return WideResNet(16, 1, num_classes=10)

def vgg8():
    return Vgg(vgg(1, 1, 1, 1, 1), num_classes=10)
"""


# A registry may have PyTorch for CPUs alone, and torchvision only for GPUs: its operators for boxes then do not load,
# and torchvision cannot be imported. No classifier uses them.
WITHOUT_OPERATORS = """
import glob, importlib.util, torch
(folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
try:
    for file in glob.glob(f"{folder}/_C*.so"):
        torch.ops.load_library(file)
except OSError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Put a user's copy of libraries that are no packages where Python finds it; see test_parity.py."""
    (tmp_path / "copied.py").write_text(COPIED)
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_OPERATORS)
    tests = str(pathlib.Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), tests]))


@pytest.mark.parametrize(("name", "size", "width", "options", "library", "made_by"), NETWORKS)
def test_the_librarys_network_computes_the_same(
    name, size, width, options, library, made_by, tmp_path, copied
):
    network = calibrated(name, size, width, **options)
    choice = Options(library=library, torch_network=made_by)
    (written,) = exported(network, ["torch"], tmp_path / "out", options=choice).exported
    assert written.images == written.same_class == 8
    assert written.difference < 1e-4
    assert written.layout == "NCHW"
    back = convert(
        Request(name, network.input_shape, options, (width,)),
        read_state_dict(tmp_path / "out" / "student.pth").arrays,
    )
    jax.tree.map(np.testing.assert_array_equal, back.variables, network.student.variables)


@pytest.fixture(scope="module")
def efficientnet():
    """Return a small EfficientNet that pads as TensorFlow does."""
    return calibrated("efficientnet_b0", 32)


REFUSED = [
    ({}, "needs --library=, whose names the arrays get: torchvision, timm, EfficientNet-PyTorch, official"),
    ({"library": "timn"}, "--library=timn: efficientnet_b0 is known of .*did you mean 'timm'"),
    (
        {"library": "RepDistiller"},
        "efficientnet_b0 is known of torchvision, timm, EfficientNet-PyTorch, official",
    ),
    (
        {"library": "torchvision"},
        "its efficientnet_b0 pads evenly, this one as TensorFlow does: use --library=timm",
    ),
    (
        {"library": "official"},
        "is no package that could be installed: pass .*--torch_network=MODULE:FUNCTION",
    ),
    ({"library": "timm", "torch_network": "resnet20"}, "must be MODULE:FUNCTION"),
    ({"library": "timm", "torch_network": "a b:c()"}, "must be MODULE:FUNCTION"),
    ({"library": "timm", "torch_network": "os:system('x').y"}, "must be MODULE:FUNCTION"),
    ({"library": "timm", "torch_network": "nowhere:net"}, "No module named 'nowhere'"),
    (
        {"library": "timm", "torch_network": "copied:vgg8"},
        "does not run in torch .*Error|fails in a process",
    ),
    # Every name and shape fits, padding does not.
    (
        {"library": "timm", "torch_network": "copied:even"},
        "torch computes something else from the torch file",
    ),
]


@pytest.mark.parametrize(("choice", "message"), REFUSED)
def test_what_does_not_fit_is_one_line(efficientnet, choice, message, tmp_path, copied):
    with pytest.raises(UserError, match=message) as error:
        exported(efficientnet, ["torch"], tmp_path / "out", options=Options(**choice))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not (tmp_path / "out").exists()


def test_only_plain_students_have_a_state_dict(efficientnet, tmp_path):
    choice = Options(library="timm")
    for changed, message in (
        (dataclasses.replace(efficientnet, student=None, name="the ensemble"), "not of the ensemble"),
        (dataclasses.replace(efficientnet, with_preprocessing=True), "leave out --with_preprocessing"),
    ):
        with pytest.raises(UserError, match=message):
            exported(changed, ["torch"], tmp_path / "out", options=choice)
    with pytest.raises(UserError, match="--library belongs to --format=torch"):
        exported(efficientnet, ["onnx"], tmp_path / "out", options=choice)


def test_the_command_and_the_program_that_it_writes(tmp_path, copied):
    """A student becomes a file that loads in PyTorch, in a folder that has nothing of this package."""
    student = calibrated("resnet8", 8, (1, 0.5, 0.5)).student
    own = student.description
    costs = count_parameters(student.variables["params"]), student.ensemble.trace((8, 8, 3)).cost(1).macs
    student = dataclasses.replace(
        student, description=dataclasses.replace(own, parameters=costs[0], macs=costs[1])
    )
    write_student(tmp_path / "student", student)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(
        tmp_path / "image.png"
    )
    done = command(
        "export",
        f"--student_dir={tmp_path}/student",
        "--format=torch",
        "--library=official",
        "--torch_network=copied:resnet8(num_classes=10)",
        f"--verify_with={tmp_path}/image.png",
        f"--output={tmp_path}/out",
    )
    assert done.returncode == 0, done.stderr
    assert "student_torch.py" in done.stdout
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["exported"][0]["files"] == ["student.pth", "student_torch.py"]
    program = "import student_torch, torch; print(student_torch.load()(torch.zeros(2, 3, 8, 8)).tolist())"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "out",
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = student.network.logits(student.variables, np.zeros((2, 8, 8, 3), np.float32))
    np.testing.assert_allclose(json.loads(printed), expected, atol=1e-5)
