"""The names of our parameters in PyTorch libraries.

One of our names becomes a library's name by substitutions that are applied in turn. Every family takes a few
lines, and nothing is listed twice.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from ekd_jax import models
from ekd_jax.models.efficientnet import SETTINGS

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Substitutions of our names, such as "stage1.0.conv1.kernel"; blocks are numbered from 0.
_LEAVES: Rules = (
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.mean$", ".running_mean"),
    (r"\.var$", ".running_var"),
)
_RESNET: Rules = (
    (r"^stem\.conv", "conv1"),
    (r"^stem\.bn", "bn1"),
    (r"^stage", "layer"),
)
_CIFAR_RESNET: Rules = (
    *_RESNET,
    (r"shortcut_conv", "shortcut.0"),
    (r"shortcut_bn", "shortcut.1"),
    (r"^head\.linear", "linear"),
)
_TORCHVISION_RESNET: Rules = (
    *_RESNET,
    (r"shortcut_conv", "downsample.0"),
    (r"shortcut_bn", "downsample.1"),
    (r"^head\.linear", "fc"),
)
_DENSENET: Rules = (
    (r"^stem\.conv", "features.conv0"),
    (r"^stem\.bn", "features.norm0"),
    (r"^stage(\d)\.layer(\d+)_", r"features.denseblock\1.denselayer\2."),
    (r"^stage(\d)\.transition_", r"features.transition\1."),
    (r"(layer\d+\.|transition\d\.)bn", r"\1norm"),
    (r"^head\.before\.bn", "features.norm5"),
    (r"^head\.linear", "classifier"),
)
_DENSENET_OLD: Rules = ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),)  # torchvision before 0.3
_OFFICIAL_DENSENET: Rules = (
    (r"^stem\.", "conv1."),
    (
        r"^stage(\d)\.layer(\d+)_",  # layers are numbered from 0
        lambda found: f"dense{found[1]}.{int(found[2]) - 1}.",
    ),
    (r"^stage(\d)\.transition_(bn|conv)", r"trans\1.\g<2>1"),
    (r"^head\.before\.bn", "bn1"),
    (r"^head\.linear", "fc"),
)
_SEQUENCE: Rules = (  # a convolution and its batch norm as .0 and .1
    (r"\.conv\.(weight|bias)$", r".0.\1"),
    (r"\.bn\.", ".1."),
)
_EFFICIENTNET: Rules = (
    (r"^stem", "features.0"),
    (r"^stage\d\.mb(\d)\.(\d+)\.", r"features.\1.\2.block."),
    (r"^(features\.1\.\d+\.block)\.depthwise", r"\1.0"),  # the first ones do not expand
    (r"^(features\.1\.\d+\.block)\.squeeze", r"\1.1"),
    (r"^(features\.1\.\d+\.block)\.project", r"\1.2"),
    (r"block\.expand\.(conv|bn)", r"block.0.\1"),
    (r"block\.depthwise", "block.1"),
    (r"block\.squeeze", "block.2"),
    (r"block\.project", "block.3"),
    (r"\.reduce\.", ".fc1."),
    (r"\.expand\.", ".fc2."),
    (r"^head\.before", "features.8"),
    *_SEQUENCE,
    (r"^head\.linear", "classifier.1"),
)
_TIMM: Rules = (  # EfficientNet and MobileNetV2; blocks.0 does not expand
    (r"^stem\.conv", "conv_stem"),
    (r"^stem\.bn", "bn1"),
    (r"^head\.before\.conv", "conv_head"),
    (r"^head\.before\.bn", "bn2"),
    (r"^stage\d\.mb(\d)\.", lambda found: f"blocks.{int(found[1]) - 1}."),
    (r"^(blocks\.0\.\d+)\.depthwise\.bn", r"\1.bn1"),
    (r"^(blocks\.0\.\d+)\.project\.conv", r"\1.conv_pw"),
    (r"^(blocks\.0\.\d+)\.project\.bn", r"\1.bn2"),
    (r"\.squeeze\.reduce", ".se.conv_reduce"),
    (r"\.squeeze\.expand", ".se.conv_expand"),
    (r"\.expand\.conv", ".conv_pw"),
    (r"\.expand\.bn", ".bn1"),
    (r"\.depthwise\.conv", ".conv_dw"),
    (r"\.depthwise\.bn", ".bn2"),
    (r"\.project\.conv", ".conv_pwl"),
    (r"\.project\.bn", ".bn3"),
    (r"^head\.linear", "classifier"),
)
_MOBILENET: Rules = (
    (r"^stem", "features.0"),
    (r"^head\.before", "features.18"),
    (r"^head\.linear", "classifier.1"),
    (r"^stage\d\.mb1\.0\.depthwise", "features.1.conv.0"),
    (r"^stage\d\.mb1\.0\.project\.conv", "features.1.conv.1"),
    (r"^stage\d\.mb1\.0\.project\.bn", "features.1.conv.2"),
    (
        r"^stage\d\.mb(\d)\.(\d+)\.",  # blocks are numbered through
        lambda found: f"features.{(0, 0, 2, 4, 7, 11, 14, 17)[int(found[1])] + int(found[2])}.conv.",
    ),
    (r"\.expand\.", ".0."),
    (r"\.depthwise\.", ".1."),
    (r"\.project\.conv", ".2"),
    (r"\.project\.bn", ".3"),
    *_SEQUENCE,
)
_SHUFFLENET_V2: Rules = (
    (r"^stem", "conv1"),
    (r"^stage(\d)", lambda found: f"stage{int(found[1]) + 1}"),
    (r"\.left_depthwise\.conv", ".branch1.0"),
    (r"\.left_depthwise\.bn", ".branch1.1"),
    (r"\.left_expand\.conv", ".branch1.2"),
    (r"\.left_expand\.bn", ".branch1.3"),
    (r"\.reduce\.conv", ".branch2.0"),
    (r"\.reduce\.bn", ".branch2.1"),
    (r"\.depthwise\.conv", ".branch2.3"),
    (r"\.depthwise\.bn", ".branch2.4"),
    (r"\.expand\.conv", ".branch2.5"),
    (r"\.expand\.bn", ".branch2.6"),
    (r"^head\.before", "conv5"),
    *_SEQUENCE,
    (r"^head\.linear", "fc"),
)
_WIDE_RESNET: Rules = (
    (r"^stem\.", "conv1."),
    (r"^stage(\d)", r"block\1.layer"),
    (r"shortcut_conv", "convShortcut"),
    (r"^head\.before\.bn", "bn1"),
    (r"^head\.linear", "fc"),
)
_VGG: Rules = (
    (r"^stem", "block0"),
    (r"^stage", "block"),
    (r"\.conv(\d)", lambda found: f".{3 * int(found[1]) - 3}"),
    (r"\.bn(\d)", lambda found: f".{3 * int(found[1]) - 2}"),
    (r"^head\.linear", "classifier"),
)
_MOBILENET_CIFAR: Rules = (
    (r"^stem", "conv1"),
    (r"^head\.before", "conv2"),
    (r"^head\.linear", "classifier.0"),
    (r"^stage\d\.mb(\d)\.(\d+)", lambda found: f"blocks.{int(found[1]) - 1}.{found[2]}.conv"),
    (r"\.expand\.conv", ".0"),
    (r"\.expand\.bn", ".1"),
    (r"\.depthwise\.conv", ".3"),
    (r"\.depthwise\.bn", ".4"),
    (r"\.project\.conv", ".6"),
    (r"\.project\.bn", ".7"),
    *_SEQUENCE,
)
_SHUFFLENET_V1_CIFAR: Rules = (
    *_RESNET,
    (r"\.reduce\.(conv|bn)", r".\g<1>1"),
    (r"\.depthwise\.(conv|bn)", r".\g<1>2"),
    (r"(layer\d\.\d+)\.(conv|bn)\.", r"\1.\g<2>3."),
    (r"^head\.linear", "linear"),
)
_SHUFFLENET_V2_CIFAR: Rules = (
    *_RESNET,
    (r"^(layer\d\.0)\.left_depthwise\.(conv|bn)", r"\1.\g<2>1"),  # the first block has two paths
    (r"^(layer\d\.0)\.left_expand\.(conv|bn)", r"\1.\g<2>2"),
    (r"^(layer\d\.0)\.reduce\.(conv|bn)", r"\1.\g<2>3"),
    (r"^(layer\d\.0)\.depthwise\.(conv|bn)", r"\1.\g<2>4"),
    (r"^(layer\d\.0)\.expand\.(conv|bn)", r"\1.\g<2>5"),
    (r"\.reduce\.(conv|bn)", r".\g<1>1"),
    (r"\.depthwise\.(conv|bn)", r".\g<1>2"),
    (r"\.expand\.(conv|bn)", r".\g<1>3"),
    (r"^head\.before\.(conv|bn)", r"\g<1>2"),
    (r"^head\.linear", "linear"),
)


def _numbered(depth: str, places: Iterable[str], start: int = 0) -> dict[str, int]:
    """Return the first number of every "mb1", "mb2", ... of an EfficientNet whose blocks are numbered through."""
    blocks = [math.ceil(Fraction(depth) * row[2]) for rows in SETTINGS for row in rows]
    starts = {}
    for place in places:
        starts[place], start = start, start + blocks[int(place) - 1]
    return starts


def _efficientnet_pytorch(depth: str) -> Rules:
    """Return the rules of EfficientNet-PyTorch, which numbers all blocks through."""
    starts = _numbered(depth, "1234567")
    return (
        (r"^stem\.conv", "_conv_stem"),
        (r"^stem\.bn", "_bn0"),
        (r"^head\.before\.conv", "_conv_head"),
        (r"^head\.before\.bn", "_bn1"),
        (r"^stage\d\.mb(\d)\.(\d+)", lambda found: f"_blocks.{starts[found[1]] + int(found[2])}"),
        (r"\.squeeze\.(reduce|expand)", r"._se_\1"),
        (r"\.expand\.conv", "._expand_conv"),
        (r"\.expand\.bn", "._bn0"),
        (r"\.depthwise\.conv", "._depthwise_conv"),
        (r"\.depthwise\.bn", "._bn1"),
        (r"\.project\.conv", "._project_conv"),
        (r"\.project\.bn", "._bn2"),
        (r"^head\.linear", "_fc"),
    )


def _official_efficientnet(depth: str) -> Rules:
    """Return the rules of the official code, which numbers the blocks of a stage through."""
    starts = {**_numbered(depth, "123"), **_numbered(depth, "45"), **_numbered(depth, "67")}
    last = starts["7"] + math.ceil(Fraction(depth) * SETTINGS[-1][-1][2])
    return (
        (r"^stem", "features"),
        (r"^head\.before", f"features_stage_3.{last}"),
        (
            r"^stage\d\.mb1\.(\d+)\.(depthwise|squeeze|project)",  # the first ones do not expand
            lambda found: (
                f"features_stage_1.{found[1]}.conv.{['depthwise', 'squeeze', 'project'].index(found[2])}"
            ),
        ),
        (
            r"^stage(\d)\.mb(\d)\.(\d+)\.",
            lambda found: f"features_stage_{found[1]}.{starts[found[2]] + int(found[3])}.conv.",
        ),
        (r"\.conv\.expand\.(conv|bn)", r".conv.0.\1"),
        (r"\.conv\.depthwise", ".conv.1"),
        (r"\.conv\.squeeze", ".conv.2"),
        (r"\.conv\.project", ".conv.3"),
        (r"\.reduce\.", ".se.1."),
        (r"\.expand\.", ".se.3."),
        (r"(\.conv\.[23])\.conv\.", r"\1."),  # the last convolution and its batch norm are not wrapped
        (r"\.conv\.2\.bn\.", ".conv.3."),
        (r"\.conv\.3\.bn\.", ".conv.4."),
        (r"\.conv\.(weight|bias)$", r".1.\1"),
        (r"\.bn\.", ".2."),
        (r"^head\.linear", "classifier.1"),
    )


# A layer of every block of some kind of network, by which names of a library are recognized.
LAYERS = ("conv1", "layer1_conv1", "depthwise.conv")


class Source(NamedTuple):
    """The networks of a library.

    Attributes:
        models: regular expression for our names of the networks.
        library: name of the library.
        rules: substitutions that turn our names of parameters into those of the library.
        options: fields of `models.EnsembleSpec` that are needed to compute the same.
        older: substitutions that turn names of older versions of the library into those of today.
    """

    models: str
    library: str
    rules: Rules
    options: dict[str, Any] = {}
    older: Rules = ()


def _efficientnet_sources() -> Iterator[Source]:
    """Yield the libraries whose names of parameters depend on the depth of an EfficientNet."""
    tensorflow = {"padding": "same", "batch_norm_epsilon": 1e-3}
    for name, family in models.MODELS.items():
        if name.startswith("efficientnet_b"):
            depth = family.build.keywords["depth"]  # type: ignore[attr-defined]
            yield Source(name, "EfficientNet-PyTorch", _efficientnet_pytorch(depth), tensorflow)
            yield Source(name, "the official code", _official_efficientnet(depth), {"padding": "same"})


PACKAGES = ("torchvision", "timm")  # libraries that can be installed; of the others a user has a copy
_RESNETS = r"resnet(18|34|50|101|152)|resnext.*|wide_resnet.*"
SOURCES = (
    Source(_RESNETS, "torchvision and timm", _TORCHVISION_RESNET),
    Source("densenet121", "torchvision and timm", _DENSENET, older=_DENSENET_OLD),
    Source("densenet_bc_.*", "the official code", _OFFICIAL_DENSENET),
    Source("efficientnet_b[0-4]", "torchvision", _EFFICIENTNET, {"padding": "even"}),
    Source(
        "efficientnet_b[5-7]", "torchvision", _EFFICIENTNET, {"padding": "even", "batch_norm_epsilon": 1e-3}
    ),
    Source("efficientnet_b[0-7]", "timm", _TIMM, {"padding": "even"}),
    *_efficientnet_sources(),
    Source("mobilenet_v2", "timm", _TIMM),
    Source("mobilenet_v2", "torchvision", _MOBILENET),
    Source("shufflenet_v2_x.*", "torchvision", _SHUFFLENET_V2),
    Source(r"resnet\d+(_a|x4)?|resnet110_.*", "the official CIFAR code", _CIFAR_RESNET),
    Source(r"resnet\d+(x4)?", "RepDistiller", _TORCHVISION_RESNET),
    Source("wrn_.*", "RepDistiller", _WIDE_RESNET),
    Source(r"vgg\d+", "RepDistiller", _VGG),
    Source("mobilenet_v2_cifar", "RepDistiller", _MOBILENET_CIFAR),
    Source("shufflenet_v1_cifar", "RepDistiller", _SHUFFLENET_V1_CIFAR),
    Source("shufflenet_v2_cifar", "RepDistiller", _SHUFFLENET_V2_CIFAR),
)


def sources(model: str) -> list[Source]:
    """Return the libraries that weights of one of our networks may come from."""
    return [source for source in SOURCES if re.fullmatch(source.models, model)]


def libraries(model: str) -> dict[str, Source]:
    """Return the libraries that have one of our networks, by the short names that users type, such as "official"."""
    names = {name: source for source in sources(model) for name in source.library.split(" and ")}
    return {"official" if "official" in name else name: source for name, source in names.items()}


def torch_name(name: str, rules: Rules) -> str:
    """Return the library's name for one of ours such as "stage1.0.conv1.kernel"."""
    return _replaced(name, (*_LEAVES, *rules))


def _replaced(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# A linear classifier under its usual names, alone or in a sequence: "fc", "fc.1", "classifier.1", "head.fc", "_fc".
_HEAD = re.compile(
    r"(?:head\.)?_?(?:fc|linear|last_linear|classif|classifier|cls|head|logits|output)(?:\.(?:\d+|fc|linear))?\.weight"
)


def head_weight(rules: Rules) -> str:
    """Return the library's name for the kernel of the classifier."""
    return torch_name("head.linear.kernel", rules)


def todays_names(source: Source, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the name that a library has today for every name in a file.

    They differ in files of older versions of the library, and where the classifier was replaced by another one:
    by "fc.1" in place of "fc". It is recognized if the file has exactly one array that can be it.

    Args:
        source: the library.
        shapes: name -> shape of every array of the file.
    """
    names = {name: new if (new := _replaced(name, source.older)) not in shapes else name for name in shapes}
    wanted = head_weight(source.rules)
    heads = [name for name, shape in shapes.items() if len(shape) > 1 and _HEAD.fullmatch(name)]
    if wanted not in names.values() and len(heads) == 1:
        old, new = heads[0].removesuffix("weight"), wanted.removesuffix("weight")
        names |= {f"{old}{part}": f"{new}{part}" for part in ("weight", "bias") if f"{old}{part}" in names}
    return names
