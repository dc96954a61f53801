"""The training step of `step_time.py` in plain PyTorch, which is timed alongside ours.

    python benchmarks/step_time.py --models=resnet20 --torch=eager,compile --json=out.json

It has the same ensemble of CIFAR ResNets, the same loss (ekd_jax/methods/oem.py), optimizer and augmentation,
and images that stay on the device; tests/test_torch_reference.py compares losses, gradients and parameters with
ours. It is written to be fast: order, crop and flip are one gather from images padded in advance, the optimizer
is PyTorch's fused one, and nothing waits for the device before the last step. Ours also sums up accuracies and
loss terms, which this one does not.

On a GPU, float32 is computed in TF32, as JAX does by default: for convolutions that is PyTorch's default, for
matrix products the precision "high" enables it. cuDNN tries several algorithms (`cudnn.benchmark`). On a CPU,
float32 is float32. The settings are printed with the results.

PyTorch caches compiled kernels on disk unless TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 is set. On a CPU its threads
wait for each other all the time, so that it becomes several times slower when another program runs. On some
CPUs PyTorch 2.13 computes wrong weight gradients in NHWC for strided 1x1 convolutions of 3 to 6 channels: use
NHWC variants for timing only.
"""

import itertools
import math
import sys
import time
from collections import OrderedDict
from typing import Any, NamedTuple

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.config.recipes import DATA
from ekd_jax.models.resnet_cifar import CHANNELS, DEPTHS

try:
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import Tensor, nn
except ImportError:
    sys.exit('error: PyTorch is not installed: pip install "ekd_jax[parity]"')

SHAPE, CLASSES, EXAMPLES = (32, 32, 3), 100, 10_000
PADDING, MEAN, STD = 4, DATA["cifar100"].mean, DATA["cifar100"].std
ALPHA, BETA, GAMMA, TEMPERATURE = 0.7, 0.15, 0.15, 2.0
RATE, ADAPTATION_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.05, 0.9, 1e-4
FIRST_STEPS = 3  # CUDA graphs are warmed up, recorded and replayed


class Variant(NamedTuple):
    """A way to run the same step.

    Attributes:
        meaning: description.
        channels_last: whether arrays are NHWC in memory.
        mode: mode of `torch.compile`; empty: not compiled.
        amp: whether to use bfloat16 autocast.
    """

    meaning: str
    channels_last: bool = True
    mode: str = ""
    amp: bool = False


VARIANTS = {
    "eager": Variant("operation by operation, NCHW", channels_last=False),
    "channels_last": Variant("the same in NHWC"),
    "compile": Variant("NHWC, forward, loss and backward by torch.compile", mode="default"),
    "graphs": Variant("the same in CUDA graphs; on a CPU the same as compile", mode="reduce-overhead"),
    "amp": Variant("NHWC, bfloat16 autocast", amp=True),
    "compile_amp": Variant("compile and amp", mode="default", amp=True),
    "graphs_amp": Variant("graphs and amp", mode="reduce-overhead", amp=True),
}


# --- network, with the names of the official code ------------------------------------------------


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution with padding that keeps the resolution, or divides it by the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def norm(features: int) -> nn.BatchNorm2d:
    """Return batch norm without its unused counter of batches, which saves one kernel per layer."""
    layer = nn.BatchNorm2d(features)
    layer.num_batches_tracked = None
    return layer


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a projection where shapes differ (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), norm(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*[] if same else [conv(inputs, outputs, 1, stride), norm(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Student(nn.Module):
    """Three stages and a classifier: feature map of the base block -> logits, feature maps of the stages."""

    def __init__(self, widths: list[int], blocks: int, classes: int):
        super().__init__()
        for stage, (inputs, outputs) in enumerate(itertools.pairwise([CHANNELS[0], *widths]), 1):
            first = Block(inputs, outputs, stride=1 if stage == 1 else 2)
            rest = [Block(outputs, outputs, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = [x := stage(x) for stage in (self.layer1, self.layer2, self.layer3)]
        return self.linear(x.mean((2, 3))), maps


class Ensemble(nn.Module):
    """Base block, students of width 1, (S - 1)/S, ..., 1/S, and their adaptation layers."""

    def __init__(self, depth: int, students: int, classes: int):
        super().__init__()
        widths = [[c * own // students for c in CHANNELS[1:]] for own in range(students, 0, -1)]
        stem = {"conv1": conv(3, CHANNELS[0], 3), "bn1": norm(CHANNELS[0]), "relu": nn.ReLU(inplace=True)}
        self.base = nn.Sequential(OrderedDict(stem))
        self.students = nn.ModuleList(Student(own, (depth - 2) // 6, classes) for own in widths)
        pairs = [zip(own, widths[0], strict=True) for own in widths[1:]]
        self.adaptation = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(narrow, full, 1) for narrow, full in own) for own in pairs
        )
        for layer in [*self.base.modules(), *self.students.modules()]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(layer.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
        """Return logits (S, B, K), adapted feature maps of students 2 to S, and those of the pseudo teacher."""
        x = self.base(images)
        logits, maps = zip(*(student(x) for student in self.students), strict=True)
        adapted = [
            [layer(x) for layer, x in zip(layers, own, strict=True)]
            for layers, own in zip(self.adaptation, maps[1:], strict=True)
        ]
        return torch.stack(logits), adapted, maps[0]


class Losses(NamedTuple):
    """Unweighted losses: cross entropies (S,), intermediate losses (S - 1, blocks), KD losses (S,)."""

    ce: Tensor
    intermediate: Tensor
    kd: Tensor

    @property
    def total(self) -> Tensor:
        return ALPHA * self.ce.sum() + BETA * self.intermediate.sum() + GAMMA * self.kd.sum()


def losses(network: nn.Module, images: Tensor, labels: Tensor) -> Losses:
    """Return the losses of a batch of normalized images (B, C, H, W)."""
    logits, adapted, targets = network(images)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    students, batch, _ = logits.shape
    ce = F.cross_entropy(logits.flatten(0, 1), labels.repeat(students), reduction="none")
    targets = [target.detach() for target in targets]
    mse = [F.mse_loss(x, target) for own in adapted for x, target in zip(own, targets, strict=True)]
    teacher = F.log_softmax(logits.detach().mean(0) / TEMPERATURE, -1).expand_as(logits)
    log_p = F.log_softmax(logits / TEMPERATURE, -1)
    kd = F.kl_div(log_p, teacher, reduction="none", log_target=True).sum(-1).mean(-1)
    return Losses(
        ce.view(students, batch).mean(-1),
        torch.stack(mse).view(students - 1, len(targets)),
        TEMPERATURE**2 * kd,
    )


# --- training ------------------------------------------------------------------------------------


def crops(padded: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Return random crops of some images, half of them mirrored.

    Args:
        padded: all images, padded, (N, H + 2 PADDING, W + 2 PADDING, C) uint8.
        numbers: indices of the images to crop, (B,).
        generator: a generator on the same device.

    Returns:
        Images (B, H, W, C) uint8.
    """
    own = {"generator": generator, "device": padded.device}
    height, width = (size - 2 * PADDING for size in padded.shape[1:3])
    top, left = torch.randint(2 * PADDING + 1, (2, len(numbers), 1), **own)
    x = torch.arange(width, device=padded.device)
    mirrored = torch.rand(len(numbers), 1, **own) < 0.5
    rows = top + torch.arange(height, device=padded.device)
    columns = left + torch.where(mirrored, width - 1 - x, x)
    return padded[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]


class Reference:
    """A network with its optimizer and random images on the device.

    Raises:
        UserError: the model or variant is unknown, or there are fewer than two students.
    """

    def __init__(
        self,
        model: str,
        students: int,
        batch_size: int,
        variant: str,
        shape: tuple[int, int, int] = SHAPE,
        classes: int = CLASSES,
        examples: int = EXAMPLES,
        device: str = "",
    ):
        depths = {f"resnet{depth}": depth for depth in DEPTHS}
        for kind, name, known in (("model", model, depths), ("variant", variant, VARIANTS)):
            if name not in known:
                raise UserError(f"{kind} {name} is unknown to the PyTorch reference{nearest(name, known)}")
        if students < 2:
            raise UserError(f"students={students}: an ensemble needs at least two")
        self.name = {
            "model": model,
            "students": students,
            "batch": batch_size,
            "variant": f"torch {variant}",
        }
        self.batch_size, self.variant = batch_size, VARIANTS[variant]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        self.layout = torch.channels_last if self.variant.channels_last else torch.contiguous_format

        torch.manual_seed(0)
        network = Ensemble(depths[model], students, classes)
        self.network = network.to(self.device, memory_format=self.layout)
        rates = {"base": RATE, "students": RATE, "adaptation": ADAPTATION_RATE}
        groups = [{"params": part.parameters(), "lr": rates[n]} for n, part in network.named_children()]
        rule = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "nesterov": True}
        self.optimizer = torch.optim.SGD(groups, **rule, fused=True)
        self.loss = self._loss
        if self.variant.mode:
            # One program per setting: none for batches of any size, and no silent fallback to eager mode.
            torch._dynamo.config.cache_size_limit = 1000
            self.loss = torch.compile(self._loss, mode=self.variant.mode, fullgraph=True, dynamic=False)

        self.generator = torch.Generator(self.device).manual_seed(0)
        own = {"generator": self.generator, "device": self.device}
        images = torch.randint(256, (examples, *shape), dtype=torch.uint8, **own)
        self.padded = F.pad(images, (0, 0, *[PADDING] * 4))
        self.labels = torch.randint(classes, (examples,), **own)
        self._shuffle()
        mean, std = torch.tensor(MEAN, device=self.device), torch.tensor(STD, device=self.device)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.first_seconds = math.nan

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the next images (B, C, H, W), augmented and normalized, and their labels."""
        if self.position + self.batch_size > len(self.order):
            self._shuffle()
        numbers = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        images = (crops(self.padded, numbers, self.generator) * self.scale).add_(self.shift)
        return images.permute(0, 3, 1, 2).contiguous(memory_format=self.layout), self.labels[numbers]

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Take one step on normalized images (B, C, H, W)."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(images, labels).backward()
        self.optimizer.step()

    def run(self, steps: int) -> None:
        """Take `steps` steps and wait for their end."""
        for _ in range(steps):
            self.update(*self.batch())
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prepare(self) -> None:
        """Take the first steps, which compile and choose algorithms."""
        began = time.perf_counter()
        self.run(FIRST_STEPS)
        self.first_seconds = time.perf_counter() - began

    def _shuffle(self) -> None:
        """Begin a new epoch."""
        examples = len(self.labels)
        self.order = torch.randperm(examples, generator=self.generator, device=self.device)
        self.position = 0

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.amp):
            return losses(self.network, images, labels).total


def torch_environment() -> dict[str, Any]:
    """Return version, device and precision of float32."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "torch_device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch_threads": torch.get_num_threads(),
        "torch_float32": "TF32" if cuda and torch.backends.cudnn.allow_tf32 else "float32",
        "torch_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }
