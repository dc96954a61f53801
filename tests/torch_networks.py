"""Networks in plain PyTorch, under their libraries' state-dict names: references for parity tests.

Written from the published definitions. `NETWORKS` builds them by name; published.py has their sizes.
"""

import math
from collections import OrderedDict
from functools import partial
from itertools import chain, count

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class Named(nn.Sequential):
    """Layers one after another, under the given names."""

    def __init__(self, **layers):
        super().__init__(OrderedDict(layers))


class GlobalPool(nn.Module):
    """Mean over the positions."""

    def forward(self, x):
        return x.mean((2, 3))


class SameConv2d(nn.Conv2d):
    """Pad as TensorFlow's "SAME" does."""

    def forward(self, x):
        k, s = self.kernel_size[0], self.stride[0]
        columns, rows = (max((math.ceil(n / s) - 1) * s + k - n, 0) for n in (x.shape[3], x.shape[2]))
        return super().forward(F.pad(x, (columns // 2, -(-columns // 2), rows // 2, -(-rows // 2))))


def conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def same_conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def conv_bn(inputs, outputs, kernel=1, stride=1, groups=1, act=nn.ReLU, conv=conv):
    """Return convolution, batch norm and, unless `act` is None, the activation as a list of layers."""
    layers = [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs)]
    return [*layers, act()] if act else layers


def rounded(channels, multiplier):
    """Return channels times the multiplier as a multiple of 8, at least 90 % of it."""
    if multiplier == 1:
        return channels
    width = max(8, int(channels * multiplier + 4) // 8 * 8)
    return width + 8 * (width < 0.9 * channels * multiplier)


def shuffle(x, groups):
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


# Residual networks: torchvision's, and He et al.'s for CIFAR as in akamaster/pytorch_resnet_cifar10


class Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)). The shortcut comes with its name; None is the identity."""

    def add_shortcut(self, **shortcut):
        self.path = tuple(shortcut)
        for name, layer in shortcut.items():
            self.add_module(name, layer)

    def forward(self, x):
        out = self.body(x)
        for name in self.path:
            x = getattr(self, name)(x)
        return F.relu(out + x)


class BasicBlock(Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs, planes, stride=1, **shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, planes, 3, stride, act=None)
        self.conv2, self.bn2 = conv_bn(planes, planes, 3, act=None)
        self.add_shortcut(**shortcut)

    def body(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Residual):
    """1x1, 3x3 with the stride and the groups, 1x1 to four times the planes."""

    expansion = 4

    def __init__(self, inputs, planes, stride=1, groups=1, width_per_group=64, **shortcut):
        super().__init__()
        width = int(planes * (width_per_group / 64)) * groups
        self.conv1, self.bn1 = conv_bn(inputs, width, act=None)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride, groups, act=None)
        self.conv3, self.bn3 = conv_bn(width, 4 * planes, act=None)
        self.add_shortcut(**shortcut)

    def body(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))


class PaddedShortcut(nn.Module):
    """Option A: every stride-th position, zero channels on both sides."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.missing, self.stride = outputs - inputs, stride

    def forward(self, x):
        before = self.missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))


def projection(inputs, outputs, stride):
    """Option B: 1x1 convolution and batch norm."""
    return nn.Sequential(*conv_bn(inputs, outputs, 1, stride, act=None))


def residual_stages(block, inputs, planes, layers, name, shortcut, **options):
    """Return layer1, layer2, ... of a residual network; shortcuts where shapes change are called `name`."""
    stages = {}
    for i, (width, repeats) in enumerate(zip(planes, layers, strict=True)):
        blocks, outputs = [], width * block.expansion
        for stride in [2 if i else 1] + [1] * (repeats - 1):
            change = stride != 1 or inputs != outputs
            path = {name: shortcut(inputs, outputs, stride)} if change else {}
            blocks.append(block(inputs, width, stride, **options, **path))
            inputs = outputs
        stages[f"layer{i + 1}"] = nn.Sequential(*blocks)
    return stages


class ResNet(Named):
    """torchvision's ResNet, ResNeXt and wide ResNet."""

    def __init__(
        self, block, layers, num_classes=1000, groups=1, width_per_group=64, planes=(64, 128, 256, 512)
    ):
        # options of the bottleneck; a basic block has none
        options = {"groups": groups, "width_per_group": width_per_group} if block is Bottleneck else {}
        super().__init__(
            conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, 2, 1),
            **residual_stages(block, 64, planes, layers, "downsample", projection, **options),
            avgpool=GlobalPool(),
            fc=nn.Linear(planes[-1] * block.expansion, num_classes),
        )


class CifarResNet(Named):
    """He et al.'s ResNet for CIFAR with n blocks per stage and akamaster's names."""

    def __init__(self, block, n, num_classes=10, channels=(16, 16, 32, 64), option="A"):
        shortcut = {"A": PaddedShortcut, "B": projection}[option]
        super().__init__(
            conv1=conv(3, channels[0], 3),
            bn1=nn.BatchNorm2d(channels[0]),
            relu=nn.ReLU(),
            **residual_stages(block, channels[0], channels[1:], [n] * 3, "shortcut", shortcut),
            avgpool=GlobalPool(),
            linear=nn.Linear(channels[-1] * block.expansion, num_classes),
        )


# Wide residual networks of CIFAR: RepDistiller's


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and relu, which a projection shares."""

    def __init__(self, inputs, outputs, stride, dropout):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1, self.bn2 = conv_bn(inputs, outputs, 3, stride, act=None)
        self.conv2 = conv(outputs, outputs, 3)
        self.convShortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None
        self.dropout = dropout

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.convShortcut(out) if self.convShortcut else x
        out = F.dropout(F.relu(self.bn2(self.conv1(out))), self.dropout, self.training)
        return self.conv2(out) + shortcut


class WideResNet(Named):
    """RepDistiller's WRN-depth-k."""

    def __init__(self, depth, k, num_classes=100, dropout=0.0):
        inputs, stages = 16, {}
        for i, outputs in enumerate((16 * k, 32 * k, 64 * k)):
            blocks = []
            for stride in [2 if i else 1] + [1] * ((depth - 4) // 6 - 1):
                blocks.append(WideBlock(inputs, outputs, stride, dropout))
                inputs = outputs
            stages[f"block{i + 1}"] = Named(layer=nn.Sequential(*blocks))
        super().__init__(
            conv1=conv(3, 16, 3),
            **stages,
            bn1=nn.BatchNorm2d(inputs),
            relu=nn.ReLU(),
            avgpool=GlobalPool(),
            fc=nn.Linear(inputs, num_classes),
        )


# Densely connected networks: torchvision's, and DenseNet-BC for CIFAR


class DenseLayer(Named):
    """The input and, after it, `growth` more channels."""

    def __init__(self, inputs, growth):
        super().__init__(
            norm1=nn.BatchNorm2d(inputs),
            relu1=nn.ReLU(),
            conv1=conv(inputs, 4 * growth),
            norm2=nn.BatchNorm2d(4 * growth),
            relu2=nn.ReLU(),
            conv2=conv(4 * growth, growth, 3),
        )

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class Transition(Named):
    """Half the channels and half the size."""

    def __init__(self, inputs):
        super().__init__(
            norm=nn.BatchNorm2d(inputs),
            relu=nn.ReLU(),
            conv=conv(inputs, inputs // 2),
            pool=nn.AvgPool2d(2),
        )


def dense_blocks(inputs, growth, layers):
    """Return denseblock1, transition1, denseblock2, ... and the channels of the last."""
    blocks = {}
    for b, (rate, repeats) in enumerate(zip(growth, layers, strict=True), 1):
        dense = {f"denselayer{i + 1}": DenseLayer(inputs + i * rate, rate) for i in range(repeats)}
        blocks[f"denseblock{b}"] = Named(**dense)
        inputs += repeats * rate
        if b < len(layers):
            blocks[f"transition{b}"] = Transition(inputs)
            inputs //= 2
    return blocks, inputs


class DenseNet(Named):
    """torchvision's DenseNet, a growth rate for every block."""

    def __init__(self, growth=(32, 32, 32, 32), layers=(6, 12, 24, 16), init_features=64, num_classes=1000):
        blocks, outputs = dense_blocks(init_features, growth, layers)
        features = Named(
            conv0=nn.Conv2d(3, init_features, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(init_features),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
            **blocks,
            norm5=nn.BatchNorm2d(outputs),
        )
        classifier = nn.Linear(outputs, num_classes)
        super().__init__(features=features, relu=nn.ReLU(), avgpool=GlobalPool(), classifier=classifier)


class DenseNetCifar(Named):
    """DenseNet-BC for CIFAR, of three blocks."""

    def __init__(self, growth=(12, 12, 12), layers_per_block=16, first=24, num_classes=10):
        blocks, outputs = dense_blocks(first, growth, [layers_per_block] * 3)
        super().__init__(
            conv1=conv(3, first, 3),
            **blocks,
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
            avgpool=GlobalPool(),
            classifier=nn.Linear(outputs, num_classes),
        )


# Inverted residuals: torchvision's EfficientNet and MobileNetV2, RepDistiller's MobileNetV2


class Inverted(nn.Module):
    """Layers as the child `name`, the input added to their output where `residual`."""

    def __init__(self, name, layers, residual):
        super().__init__()
        self.name, self.residual = name, residual
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x):
        out = getattr(self, self.name)(x)
        return x + out if self.residual else out


class SqueezeExcite(nn.Module):
    """Scale channels by a sigmoid computed from their means."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class EfficientNet(Named):
    """torchvision's EfficientNet; `widths` multiply settings 1-3, 4-5, and 6-7 with the head."""

    SETTINGS = (  # expansion, channels, blocks, stride, kernel, place in `widths`
        (1, 16, 1, 1, 3, 0),
        (6, 24, 2, 2, 3, 0),
        (6, 40, 2, 2, 5, 0),
        (6, 80, 3, 2, 3, 1),
        (6, 112, 3, 1, 5, 1),
        (6, 192, 4, 2, 5, 2),
        (6, 320, 1, 1, 3, 2),
    )

    def __init__(self, width, depth, num_classes=1000, padding="even", dropout=0.2, widths=None):
        widths = widths or (1, 1, 1)
        layers = partial(conv_bn, conv={"even": conv, "same": same_conv}[padding])
        inputs, head = rounded(32, width), rounded(1280, width * widths[2])
        features = [nn.Sequential(*layers(3, inputs, 3, 2, act=nn.SiLU))]
        for expand, channels, repeats, first, kernel, place in self.SETTINGS:
            outputs, blocks = rounded(channels, width * widths[place]), []
            for stride in [first] + [1] * (math.ceil(depth * repeats) - 1):
                hidden = inputs * expand
                block = [layers(inputs, hidden, act=nn.SiLU)] if expand != 1 else []
                block.append(layers(hidden, hidden, kernel, stride, hidden, act=nn.SiLU))
                block = [nn.Sequential(*part) for part in (*block, layers(hidden, outputs, act=None))]
                block.insert(-1, SqueezeExcite(hidden, max(1, inputs // 4)))
                blocks.append(Inverted("block", block, stride == 1 and inputs == outputs))
                inputs = outputs
            features.append(nn.Sequential(*blocks))
        features.append(nn.Sequential(*layers(inputs, head, act=nn.SiLU)))
        super().__init__(
            features=nn.Sequential(*features),
            avgpool=GlobalPool(),
            classifier=nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes)),
        )


def mobile_stages(inputs, width, second_stride, flat):
    """Return MobileNetV2's inverted residuals, one list per setting; RepDistiller's are `flat`."""
    settings = [  # expansion, channels, blocks, stride
        (1, 16, 1, 1),
        (6, 24, 2, second_stride),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    layers = partial(conv_bn, act=nn.ReLU if flat else nn.ReLU6)
    stages = []
    for expand, channels, repeats, first in settings:
        stages.append([])
        outputs = int(channels * width) if flat else rounded(channels, width)
        for stride in [first] + [1] * (repeats - 1):
            hidden = inputs * expand
            parts = [layers(inputs, hidden)] if flat or expand != 1 else []
            parts.append(layers(hidden, hidden, 3, stride, hidden))
            block = [*chain(*parts)] if flat else [nn.Sequential(*part) for part in parts]
            block += conv_bn(hidden, outputs, act=None)
            stages[-1].append(Inverted("conv", block, stride == 1 and inputs == outputs))
            inputs = outputs
    return stages, inputs


class MobileNetV2(Named):
    """torchvision's MobileNetV2."""

    def __init__(self, num_classes=1000, width=1.0):
        first, head = rounded(32, width), rounded(1280, max(1.0, width))
        stages, outputs = mobile_stages(first, width, 2, flat=False)
        stem = nn.Sequential(*conv_bn(3, first, 3, 2, act=nn.ReLU6))
        top = nn.Sequential(*conv_bn(outputs, head, act=nn.ReLU6))
        super().__init__(
            features=nn.Sequential(stem, *chain(*stages), top),
            avgpool=GlobalPool(),
            classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(head, num_classes)),
        )


class MobileNetV2Cifar(Named):
    """RepDistiller's MobileNetV2; a width of .5 is its `mobile_half`."""

    def __init__(self, num_classes=100, width=0.5):
        first, head = int(32 * width), int(1280 * max(1.0, width))
        stages, outputs = mobile_stages(first, width, 1, flat=True)
        super().__init__(
            conv1=nn.Sequential(*conv_bn(3, first, 3, 2)),
            blocks=nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages)),
            conv2=nn.Sequential(*conv_bn(outputs, head)),
            avgpool=GlobalPool(),
            classifier=nn.Sequential(nn.Linear(head, num_classes)),
        )


# ShuffleNets: torchvision's second, RepDistiller's both


class ShuffleV2Block(nn.Module):
    """Half of the input, or all of it downsampled, and three convolutions of the rest; then a shuffle."""

    def __init__(self, inputs, outputs, stride, flat=False):
        super().__init__()
        half = outputs // 2
        depthwise = lambda channels: conv_bn(channels, channels, 3, stride, channels, act=None)
        left = [*depthwise(inputs), *conv_bn(inputs, half)] if stride == 2 else []
        right = [*conv_bn(inputs if stride == 2 else half, half), *depthwise(half), *conv_bn(half, half)]
        self.stride, self.branches = stride, (nn.Sequential(*left), nn.Sequential(*right))
        if flat:  # RepDistiller's names: conv1, bn1, conv2, ... through both branches
            names = chain.from_iterable((f"conv{i}", f"bn{i}") for i in count(1))
            layers = (layer for layer in left + right if not isinstance(layer, nn.ReLU))
            for layer, name in zip(layers, names, strict=False):
                self.add_module(name, layer)
        else:
            self.branch1, self.branch2 = self.branches

    def forward(self, x):
        halves = (x, x) if self.stride == 2 else x.chunk(2, 1)
        out = [branch(half) for branch, half in zip(self.branches, halves, strict=True)]
        return shuffle(torch.cat(out, 1), 2)


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; with a stride appended to the pooled input."""

    def __init__(self, inputs, outputs, stride, groups=3):
        super().__init__()
        outputs -= inputs if stride == 2 else 0
        middle = outputs // 4
        self.stride, self.groups = stride, 1 if inputs == 24 else groups
        self.conv1, self.bn1 = conv_bn(inputs, middle, groups=self.groups, act=None)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride, middle, act=None)
        self.conv3, self.bn3 = conv_bn(middle, outputs, groups=groups, act=None)

    def forward(self, x):
        out = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x)


def shuffle_stages(block, name, start, channels, repeats):
    """Stages called `name` and a number from `start`; `channels` begins with those of the stem."""
    stages = {}
    for i, blocks in enumerate(repeats):
        others = [block(channels[i + 1], channels[i + 1], 1) for _ in range(blocks - 1)]
        stages[f"{name}{start + i}"] = nn.Sequential(block(channels[i], channels[i + 1], 2), *others)
    return stages


class ShuffleNetV2(Named):
    """torchvision's ShuffleNetV2."""

    def __init__(self, stages_repeats=(4, 8, 4), channels=(24, 116, 232, 464, 1024), num_classes=1000):
        super().__init__(
            conv1=nn.Sequential(*conv_bn(3, channels[0], 3, 2)),
            maxpool=nn.MaxPool2d(3, 2, 1),
            **shuffle_stages(ShuffleV2Block, "stage", 2, channels, stages_repeats),
            conv5=nn.Sequential(*conv_bn(channels[3], channels[4])),
            avgpool=GlobalPool(),
            fc=nn.Linear(channels[4], num_classes),
        )


class ShuffleNetV2Cifar(Named):
    """RepDistiller's ShuffleV2."""

    def __init__(self, num_classes=100, channels=(24, 116, 232, 464, 1024)):
        super().__init__(
            conv1=conv(3, channels[0]),
            bn1=nn.BatchNorm2d(channels[0]),
            relu1=nn.ReLU(),
            **shuffle_stages(partial(ShuffleV2Block, flat=True), "layer", 1, channels, (4, 8, 4)),
            conv2=conv(channels[3], channels[4]),
            bn2=nn.BatchNorm2d(channels[4]),
            relu2=nn.ReLU(),
            avgpool=GlobalPool(),
            linear=nn.Linear(channels[4], num_classes),
        )


class ShuffleNetV1Cifar(Named):
    """RepDistiller's ShuffleV1."""

    def __init__(self, num_classes=100, channels=(240, 480, 960)):
        super().__init__(
            conv1=conv(3, 24),
            bn1=nn.BatchNorm2d(24),
            relu=nn.ReLU(),
            **shuffle_stages(ShuffleV1Block, "layer", 1, (24, *channels), (4, 8, 4)),
            avgpool=GlobalPool(),
            linear=nn.Linear(channels[-1], num_classes),
        )


# VGG: RepDistiller's


class Vgg(nn.Module):
    """RepDistiller's VGG with batch norm, `cfg` the channels of five blocks."""

    def __init__(self, cfg, num_classes=100):
        super().__init__()
        inputs = 3
        for b, block in enumerate(cfg):
            layers = []
            for outputs in block:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            self.add_module(f"block{b}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x):
        pools = 4 if x.shape[2] == 64 else 3
        for b in range(5):
            x = F.relu(getattr(self, f"block{b}")(x))
            if b < pools:
                x = F.max_pool2d(x, 2)
        return self.classifier(x.mean((2, 3)))


def vgg(*counts):
    """Return `cfg` for these numbers of convolutions in the five blocks."""
    return [[width] * count for width, count in zip((64, 128, 256, 512, 512), counts, strict=True)]


EFFICIENTNETS = {  # width, depth, dropout
    "efficientnet_b0": (1.0, 1.0, 0.2),
    "efficientnet_b1": (1.0, 1.1, 0.2),
    "efficientnet_b2": (1.1, 1.2, 0.3),
    "efficientnet_b3": (1.2, 1.4, 0.3),
    "efficientnet_b4": (1.4, 1.8, 0.4),
    "efficientnet_b5": (1.6, 2.2, 0.4),
    "efficientnet_b6": (1.8, 2.6, 0.5),
    "efficientnet_b7": (2.0, 3.1, 0.5),
}
# By name, with the number of classes of PARAMETERS by default.
X4 = {"channels": (32, 64, 128, 256), "option": "B", "num_classes": 100}
NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": partial(ResNet, Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": partial(ResNet, Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
    "wide_resnet50_2": partial(ResNet, Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": partial(ResNet, Bottleneck, (3, 4, 23, 3), width_per_group=128),
    "densenet121": DenseNet,
    "mobilenet_v2": MobileNetV2,
    "shufflenet_v2_x0_5": partial(ShuffleNetV2, channels=(24, 48, 96, 192, 1024)),
    "shufflenet_v2_x1_0": ShuffleNetV2,
    "shufflenet_v2_x1_5": partial(ShuffleNetV2, channels=(24, 176, 352, 704, 1024)),
    "shufflenet_v2_x2_0": partial(ShuffleNetV2, channels=(24, 244, 488, 976, 2048)),
    "resnet8x4": partial(CifarResNet, BasicBlock, 1, **X4),
    "resnet32x4": partial(CifarResNet, BasicBlock, 5, **X4),
    "vgg8": partial(Vgg, vgg(1, 1, 1, 1, 1)),
    "vgg11": partial(Vgg, vgg(1, 1, 2, 2, 2)),
    "vgg13": partial(Vgg, vgg(2, 2, 2, 2, 2)),
    "vgg16": partial(Vgg, vgg(2, 2, 3, 3, 3)),
    "vgg19": partial(Vgg, vgg(2, 2, 4, 4, 4)),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "mobilenet_v2_cifar": MobileNetV2Cifar,
    "shufflenet_v1_cifar": ShuffleNetV1Cifar,
    "shufflenet_v2_cifar": ShuffleNetV2Cifar,
    "wrn_28_10": partial(WideResNet, 28, 10, num_classes=10),
    "densenet_bc_12_100": DenseNetCifar,
    **{f"resnet{6 * n + 2}_a": partial(CifarResNet, BasicBlock, n) for n in (3, 5, 7, 9, 18)},
    **{
        name: partial(EfficientNet, width, depth, dropout=dropout)
        for name, (width, depth, dropout) in EFFICIENTNETS.items()
    },
}
