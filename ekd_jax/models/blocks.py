"""What several families are built of: stems, heads, stages of equal blocks, and the blocks themselves.

A `Part` is a module without its name: whoever puts parts together names them, and so the variables.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from ekd_jax.models.initializers import Initializer, constant, kaiming_fan_out, torch_default
from ekd_jax.models.layers import (
    Activation,
    Array,
    BatchNorm,
    Conv,
    ConvNorm,
    Dropout,
    Linear,
    Mode,
    global_pool,
    max_pool,
    relu,
)

WRITTEN_OUT = 4  # equal blocks that are put one after the other, not in a loop: docs/performance.md
Part = Callable[..., nn.Module]
Block = Callable[..., nn.Module]  # a part that takes stride=


def call(module: nn.Module, x: Array, mode: Mode, in_loop: bool = False) -> Array:
    """`module(x, mode)`; with `mode.rematerialize` the backward pass keeps, of a block, `x` alone.

    Args:
        module: a stage (`Chain`, `Stage`), which keeps what its blocks do, or a block.
        x: (B, H, W, C).
        mode: of the network.
        in_loop: of a scan, where XLA needs no barriers to keep what is computed again apart.
    """
    if not mode.rematerialize or isinstance(module, Chain | Stage):
        return module(x, mode)
    return nn.remat(lambda module, x: module(x, mode), prevent_cse=not in_loop)(module, x)


class Chain(nn.Module):
    """Parts one after the other."""

    parts: tuple[tuple[str, Part], ...]

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        for name, part in self.parts:
            x = call(part(name=name), x, mode)
        return x


class Stage(nn.Module):
    """Blocks of one width. `first` may change width and resolution; the equal ones after it are stored
    stacked in `rest`, (blocks - 1, ...) a leaf, and scanned: one block to trace and to compile. A few
    are written out, as a loop has to copy everything that the backward pass wants."""

    block: Block
    blocks: int
    stride: int = 1
    parts: tuple[str, ...] = ("first", "rest")  # what of it runs

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        if "first" in self.parts:
            x = call(self.block(stride=self.stride, name="first"), x, mode)
        if "rest" in self.parts and self.blocks > 1:
            equal = self.blocks - 1
            in_loop = equal > WRITTEN_OUT
            x, _ = nn.scan(
                lambda block, x, _: (call(block, x, mode, in_loop), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=equal,
                unroll=1 if in_loop else equal,
            )(self.block(stride=1, name="rest"), x, None)
        return x


class Stem(ConvNorm):
    """(B, H, W, C) images -> convolution, batch norm, activation and, if asked for, 3x3/2 max pooling."""

    pool: bool = False

    def __call__(self, x: Array, mode: Mode) -> Array:
        x = super().__call__(x, mode)
        return max_pool(x, 3, 2) if self.pool else x


class Norm(nn.Module):
    """Batch norm and ReLU: what networks of pre-activation blocks end with."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        return relu(BatchNorm(name="bn")(x, mode))


class Head(nn.Module):
    """(B, H, W, C) -> logits (B, K) float32, and the map (B, H, W, C') that is pooled for them."""

    num_classes: int
    before: Part | None = None
    dropout: float = 0.0
    kernel_init: Initializer = torch_default
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> tuple[Array, Array]:
        if self.before is not None:
            x = self.before(name="before")(x, mode)
        pooled = Dropout(self.dropout, name="drop")(global_pool(x), mode)
        return Linear(self.num_classes, self.kernel_init, self.bias_init, name="linear")(pooled), x


class Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)) after He et al. 2015 (arXiv 1512.03385).

    The shortcut is x where shapes agree. Otherwise it is a 1x1 convolution with batch norm (option B),
    or, with shortcut="pad", every stride-th pixel, with channels of zeros added on both sides
    (option A) or, for a narrower block, outer channels left out.
    """

    features: int
    stride: int = 1
    shortcut: str = "project"
    kernel_init: Initializer = kaiming_fan_out

    def body(self, x: Array, mode: Mode) -> Array:
        """What is added to the shortcut."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        y = self.body(x, mode)
        if x.shape != y.shape:
            width, stride = y.shape[-1], self.stride
            if self.shortcut == "pad":
                more = width - x.shape[-1]
                low = more // 2
                zero = jnp.zeros((), x.dtype)
                x = lax.pad(x[:, ::stride, ::stride], zero, [(0, 0, 0)] * 3 + [(low, more - low, 0)])
            else:
                x = Conv(width, 1, stride, kernel_init=self.kernel_init, name="shortcut_conv")(x, mode)
                x = BatchNorm(name="shortcut_bn")(x, mode)
        return relu(x + y)


class BasicBlock(Residual):
    """Two 3x3 convolutions of `features` channels."""

    def body(self, x: Array, mode: Mode) -> Array:
        y = Conv(self.features, 3, self.stride, kernel_init=self.kernel_init, name="conv1")(x, mode)
        y = relu(BatchNorm(name="bn1")(y, mode))
        y = Conv(self.features, 3, kernel_init=self.kernel_init, name="conv2")(y, mode)
        return BatchNorm(name="bn2")(y, mode)


class Bottleneck(Residual):
    """1x1, 3x3 with the stride and `groups`, 1x1 to 4 * features channels.

    The middle is int(features * base_width / 64) * groups wide: `features` for a ResNet, twice that for
    Wide-ResNet-2 (Zagoruyko, Komodakis 2016) and, as in the official code, a constant number of ever
    narrower groups for ResNeXt (Xie et al. 2017) students.
    """

    groups: int = 1
    base_width: int = 64

    def body(self, x: Array, mode: Mode) -> Array:
        middle = self.features * self.base_width // 64 * self.groups
        y = Conv(middle, 1, kernel_init=self.kernel_init, name="conv1")(x, mode)
        y = relu(BatchNorm(name="bn1")(y, mode))
        y = Conv(middle, 3, self.stride, self.groups, kernel_init=self.kernel_init, name="conv2")(y, mode)
        y = relu(BatchNorm(name="bn2")(y, mode))
        y = Conv(4 * self.features, 1, kernel_init=self.kernel_init, name="conv3")(y, mode)
        return BatchNorm(name="bn3")(y, mode)


class SqueezeExcite(nn.Module):
    """x times a gate for each channel, from the mean over the image (Hu et al. 2018)."""

    features: int  # of the layer between

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        zero = constant(0.0)
        conv: Any = lambda features, name: Conv(features, 1, bias_init=zero, name=name)  # noqa: E731
        y = global_pool(x)[:, None, None].astype(x.dtype)
        y = nn.silu(conv(self.features, "reduce")(y, mode))
        return x * nn.sigmoid(conv(x.shape[-1], "expand")(y, mode))


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, depthwise, squeeze and excite, 1x1 to `features` (linear).

    MobileNetV2 (Sandler et al. 2018); with squeeze and excite MnasNet's and EfficientNet's MBConv. The
    input is added where shapes agree, after stochastic depth.

    Attributes:
        squeeze: the layer between of squeeze and excite has max(1, inputs // squeeze) channels; 0: none.
        always_expand: also for expand=1, as some implementations do.
    """

    features: int
    stride: int = 1
    expand: int = 6
    size: int = 3
    squeeze: int = 0
    activation: Activation = nn.relu6
    padding: str = "even"
    stochastic_depth: float = 0.0
    always_expand: bool = False
    kernel_init: Initializer = kaiming_fan_out

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        inputs = x.shape[-1]
        hidden, y = inputs * self.expand, x
        if self.expand != 1 or self.always_expand:
            y = ConvNorm(
                hidden, 1, kernel_init=self.kernel_init, activation=self.activation, name="expand"
            )(y, mode)
        y = ConvNorm(
            hidden,
            self.size,
            self.stride,
            hidden,
            self.padding,
            self.kernel_init,
            self.activation,
            name="depthwise",
        )(y, mode)
        if self.squeeze:
            y = SqueezeExcite(max(1, inputs // self.squeeze), name="squeeze")(y, mode)
        y = ConvNorm(
            self.features, 1, kernel_init=self.kernel_init, activation=lambda y: y, name="project"
        )(y, mode)
        if x.shape != y.shape:
            return y
        return x + Dropout(self.stochastic_depth, whole=True, name="drop")(y, mode)
