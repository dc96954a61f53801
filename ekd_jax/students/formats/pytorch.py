"""PyTorch: a state dict with the names of a library, and a program that loads it into the library's network.

A state dict that loads without a complaint may still be of another network: an EfficientNet that pads as TensorFlow
does fits one that pads evenly, name by name. So the network itself is run, by the program that users get.
"""

import ast
import importlib
import importlib.util
import io
import os
import re

import numpy as np

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.students.description import NetworkDescription, Preprocessing
from ekd_jax.students.formats.alone import run_alone
from ekd_jax.students.formats.request import Request
from ekd_jax.students.torch_arrays import state_dict
from ekd_jax.students.torch_names import PACKAGES, Source, libraries
from ekd_jax.version import __version__

WEIGHTS, LOADER = "student.pth", "student_torch.py"
PROGRAM = """
sys.path.insert(0, sys.argv[1])
import torch, student_torch
loaded = student_torch.load()
@torch.no_grad()
def network(images):
    return loaded(torch.from_numpy(images).permute(0, 3, 1, 2))
"""
LOADING = '''"""The network of {weights}: {call}, with these weights.

    from {module} import load
    logits = load()(images)

Images are (batch, {channels}, {height}, {width}) float32, {formula},
where mean is {mean} and std {std}. export.json has the names of the classes.
Written by ekd_jax {version}, which it does not need.
"""

import pathlib

import torch
{imported}

WEIGHTS = pathlib.Path(__file__).with_name("{weights}")


def load(weights=WEIGHTS):
    """Return the network with its weights, in evaluation mode."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    network = {call}
    fit(network, state)
    network.load_state_dict(state)
    return network.eval()


def fit(network, state):
    """Give layers the channels of their weights, which may be fewer than the network was made with."""
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = {epsilon}
        weight, old = state.get(f"{{name}}.weight"), getattr(layer, "weight", None)
        if weight is None or old is None or weight.shape == old.shape or weight.shape[2:] != old.shape[2:]:
            continue
        if isinstance(layer, torch.nn.Conv2d):
            if layer.groups == layer.in_channels > 1:  # depthwise
                layer.groups = len(weight)
            layer.out_channels, layer.in_channels = len(weight), layer.groups * weight.shape[1]
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.num_features = len(weight)
        elif isinstance(layer, torch.nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            old, new = getattr(layer, part, None), state.get(f"{{name}}.{{part}}")
            if old is not None and new is not None:
                new = torch.empty_like(new)
                setattr(layer, part, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new)
'''


def check_torch(asked: Request) -> None:
    """Raise UserError unless a network can be written as a state dict with the names of a library."""
    _builder(asked)


def write_torch(asked: Request) -> dict[str, bytes]:
    """Return the state dict of a student and the program that loads it, by name.

    Its options are `library`, whose names the arrays get: "torchvision", "timm", "EfficientNet-PyTorch",
    "RepDistiller" or "official"; and `torch_network`, what makes the network of a library that is no package:
    "module:function" or "module:function(num_classes=10)".

    Raises:
        UserError: no library has the network, or it is made otherwise than the student.
    """
    network = asked.network
    source, imported, call = _builder(asked)
    student = network.student
    assert student is not None
    own, shape = student.description.network, student.input_shape
    torch = importlib.import_module("torch")
    arrays = {
        name: torch.from_numpy(value.astype(np.float32))
        for name, value in state_dict(student.variables, source.rules).items()
    }
    file = io.BytesIO()
    torch.save(arrays, file)
    preprocessing: Preprocessing = network.preprocessing
    loading = LOADING.format(
        weights=WEIGHTS,
        module=LOADER.removesuffix(".py"),
        imported=imported,
        call=call,
        height=shape[0],
        width=shape[1],
        channels=shape[2],
        formula=preprocessing.formula,
        mean=", ".join(map(str, preprocessing.mean)),
        std=", ".join(map(str, preprocessing.std)),
        version=__version__,
        epsilon=own.options.get("batch_norm_epsilon", 1e-5),
    )
    return {WEIGHTS: file.getvalue(), LOADER: loading.encode()}


def run_torch(files: dict[str, bytes], batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return what PyTorch computes on batches of images, channels last, on a CPU, in a fresh process.

    Raises:
        UserError: the process fails, because arrays do not fit the library's network, say.
    """
    search = (os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    return run_alone(PROGRAM, files, batches, search)


def _builder(asked: Request) -> tuple[Source, str, str]:
    """Return the library, what the program imports, and the expression that makes the network."""
    network, library, torch_network = asked.network, asked.options.library, asked.options.torch_network
    if network.student is None:
        raise UserError(f"--format=torch: a state dict is of one student, not of {network.name}")
    if network.with_preprocessing:
        raise UserError(
            "--format=torch: a state dict holds no preprocessing; leave out --with_preprocessing"
        )
    own = network.student.description.network
    source, package = _source(own.name, library)
    if torch_network:
        return source, *_own_network(torch_network)
    if package not in PACKAGES:
        raise UserError(
            f"--library={package} is no package that could be installed: pass the function of your copy that makes "
            f"{own.name}, --torch_network=MODULE:FUNCTION, with MODULE in the working directory or in $PYTHONPATH"
        )
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--library={package} is not installed: pip install {package}")
    return source, f"import {package}", _call(package, own)


def _source(model: str, library: str) -> tuple[Source, str]:
    """Return the library that a flag names, and its name."""
    known = libraries(model)
    if not known:
        raise UserError(
            f"--format=torch: no library that is known has {model}; other formats take every network"
        )
    names = ", ".join(known)
    if not library:
        raise UserError(f"--format=torch needs --library=, whose names the arrays get: {names}")
    for name, source in known.items():
        if name.casefold() == library.casefold():
            return source, name
    raise UserError(f"--library={library}: {model} is known of {names}{nearest(library, known)}")


def _call(package: str, own: NetworkDescription) -> str:
    """Return the expression with which a package makes a network of full width."""
    pads_as_tensorflow = own.name.startswith("efficientnet") and own.options.get("padding") != "even"
    if package == "torchvision":
        if pads_as_tensorflow:
            raise UserError(
                f"--library=torchvision: its {own.name} pads evenly, this one as TensorFlow does: use --library=timm"
            )
        return f"torchvision.models.{own.name}(num_classes={own.num_classes})"
    name = {"mobilenet_v2": "mobilenetv2_100"}.get(own.name, own.name)
    return f'timm.create_model("{"tf_" * pads_as_tensorflow}{name}", num_classes={own.num_classes})'


def _own_network(text: str) -> tuple[str, str]:
    """Return import and expression of "module:function" or "module:function(arguments)"."""
    module, _, call = text.partition(":")
    try:
        tree = ast.parse(call.strip(), mode="eval").body
        function = tree.func if isinstance(tree, ast.Call) else tree
    except SyntaxError:
        function = None
    if not isinstance(function, ast.Name) or not re.fullmatch(r"\w+(\.\w+)*", module):
        raise UserError(
            f"--torch_network={text} must be MODULE:FUNCTION or MODULE:FUNCTION(ARGUMENTS), such as "
            f"models.resnet:resnet20(num_classes=100)"
        )
    return f"from {module} import {function.id}", ast.unparse(tree) + "()" * isinstance(tree, ast.Name)
