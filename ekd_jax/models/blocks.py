"""The parts that several families share: stems, heads, stages of equal blocks, and the blocks.

A `Part` makes a module when it is given a name. Whoever combines parts names them, and thereby their
variables.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
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
from ekd_jax.models.platform import ANY, platform

UNROLLED_BLOCKS = 4  # up to this many equal blocks run without a loop: docs/performance.md
Part = Callable[..., nn.Module]  # takes name=
Block = Callable[..., nn.Module]  # takes name= and stride=


def run_part(module: nn.Module, x: Array, mode: Mode, in_loop: bool = False) -> Array:
    """Return `module(x, mode)`. With `mode.rematerialize` the backward pass keeps only x of a block.

    Args:
        module: a block, or a stage (`Chain`, `Stage`) that calls this function for its blocks.
        x: (B, H, W, C).
        mode: how layers compute.
        in_loop: whether this is the body of a scan, where XLA needs no barriers that prevent it from
            merging the recomputation with the forward pass.
    """
    if not mode.rematerialize or isinstance(module, Chain | Stage):
        return module(x, mode)
    return nn.remat(lambda module, x: module(x, mode), prevent_cse=not in_loop)(module, x)


def in_evaluation(mode: Mode) -> Mode:
    """Return the mode in which a part uses and keeps its running statistics, and drops nothing."""
    return dataclasses.replace(mode, train=False)


class Chain(nn.Module):
    """Parts that run one after the other; the first `frozen` of them always in evaluation mode."""

    parts: tuple[tuple[str, Part], ...]
    frozen: int = 0

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        for i, (name, part) in enumerate(self.parts):
            x = run_part(part(name=name), x, mode if i >= self.frozen else in_evaluation(mode))
        return x


class Stage(nn.Module):
    """A stage of blocks of one width.

    The block `first` may change width and resolution. The equal blocks after it are stored stacked in
    `rest`, every leaf (blocks - 1, ...), and scanned, so that one block is traced and compiled. A few
    blocks are unrolled, because a loop has to copy everything that the backward pass needs.

    Attributes:
        block: the block.
        blocks: number of blocks.
        stride: stride of the first block.
        parts: which of "first" and "rest" to run.
    """

    block: Block
    blocks: int
    stride: int = 1
    parts: tuple[str, ...] = ("first", "rest")

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        if "first" in self.parts:
            x = run_part(self.block(stride=self.stride, name="first"), x, mode)
        if "rest" in self.parts and self.blocks > 1:
            equal = self.blocks - 1
            if platform() == ANY:
                return self._written_out(x, mode)
            in_loop = equal > UNROLLED_BLOCKS
            x, _ = nn.scan(
                lambda block, x, _: (run_part(block, x, mode, in_loop), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=equal,
                unroll=1 if in_loop else equal,
            )(self.block(stride=1, name="rest"), x, None)
        return x

    def _written_out(self, x: Array, mode: Mode) -> Array:
        """Run the equal blocks one by one: a file for another runtime has no loops."""
        block = self.block(stride=1, name="rest")
        for i in range(self.blocks - 1):
            x = nn.map_variables(
                lambda block, x: run_part(block, x, mode),
                ("params", "batch_stats"),
                partial(jax.tree.map, lambda leaf, i=i: leaf[i]),
            )(block, x)
        return x


class Stem(ConvNorm):
    """A convolution, batch norm and an activation, with pool=True followed by 3x3/2 max pooling."""

    pool: bool = False

    def __call__(self, x: Array, mode: Mode) -> Array:
        x = super().__call__(x, mode)
        return max_pool(x, 3, 2) if self.pool else x


class NormRelu(nn.Module):
    """Batch norm and ReLU, with which networks of pre-activation blocks end."""

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        return relu(BatchNorm(name="bn")(x, mode))


class Head(nn.Module):
    """A classifier from (B, H, W, C) to logits (B, K) float32 and the map (B, H, W, C') that it pools.

    Attributes:
        num_classes: number of classes K.
        before: a part to run before pooling.
        dropout: dropout rate after pooling.
        kernel_init, bias_init: initializers of the linear layer.
    """

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
    """A residual block, ReLU(body(x) + shortcut(x)), of He et al. 2015 (arXiv 1512.03385).

    The shortcut is x where shapes agree. Otherwise it is a 1x1 convolution with batch norm (option B).
    With shortcut="pad" it is every stride-th pixel, with zero channels added on both sides (option A) or,
    for a narrower block, the outer channels removed.
    """

    features: int
    stride: int = 1
    shortcut: str = "project"
    kernel_init: Initializer = kaiming_fan_out

    def body(self, x: Array, mode: Mode) -> Array:
        """Return the residual that is added to the shortcut."""
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
                for axis in (1, 2):
                    x = lax.slice_in_dim(x, 0, None, stride, axis)
                x = lax.pad(x, zero, [(0, 0, 0)] * 3 + [(low, more - low, 0)])
            else:
                x = Conv(width, 1, stride, kernel_init=self.kernel_init, name="shortcut_conv")(x, mode)
                x = BatchNorm(name="shortcut_bn")(x, mode)
        return relu(x + y)


class BasicBlock(Residual):
    """A residual block of two 3x3 convolutions with `features` channels."""

    def body(self, x: Array, mode: Mode) -> Array:
        y = Conv(self.features, 3, self.stride, kernel_init=self.kernel_init, name="conv1")(x, mode)
        y = relu(BatchNorm(name="bn1")(y, mode))
        y = Conv(self.features, 3, kernel_init=self.kernel_init, name="conv2")(y, mode)
        return BatchNorm(name="bn2")(y, mode)


class Bottleneck(Residual):
    """A residual block of a 1x1, a 3x3 (with stride and groups) and a 1x1 convolution.

    It has 4 * features channels outside and int(features * base_width / 64) * groups in the middle. That is
    `features` for a ResNet, twice as many for Wide-ResNet-2 (Zagoruyko, Komodakis 2016) and, as in the
    official code, a constant number of narrower groups for the students of a ResNeXt (Xie et al. 2017).
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
    """Multiply each channel by a gate computed from the mean over pixels (Hu et al. 2018)."""

    features: int  # channels of the hidden layer

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        zero = constant(0.0)
        conv: Any = lambda features, name: Conv(features, 1, bias_init=zero, name=name)  # noqa: E731
        y = global_pool(x)[:, None, None].astype(x.dtype)
        y = nn.silu(conv(self.features, "reduce")(y, mode))
        return x * nn.sigmoid(conv(x.shape[-1], "expand")(y, mode))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to `expand` times the channels, a depthwise one, and a linear 1x1 to `features`.

    It is the block of MobileNetV2 (Sandler et al. 2018) and, with squeeze and excite, the MBConv of MnasNet
    and EfficientNet. Where shapes agree the input is added, after stochastic depth.

    Attributes:
        features, stride, expand, size: channels, stride, expansion and kernel size.
        squeeze: squeeze and excite has max(1, inputs // squeeze) hidden channels; 0 means none.
        activation: the activation, not used after the last convolution.
        padding: padding of the depthwise convolution, see `convolution`.
        stochastic_depth: rate at which an example skips the block.
        always_expand: whether the first convolution exists for expand=1, too, as in some implementations.
        kernel_init: initializer of the convolutions.
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
        return x + Dropout(self.stochastic_depth, whole_examples=True, name="drop")(y, mode)
