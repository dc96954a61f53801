"""Every family computes what the same network computes in PyTorch, from the same weights.

Logits in evaluation and in training mode, batch statistics after a step and all gradients, in float64,
where nothing but the order of additions differs; and logits in float32. The PyTorch networks
(torch_networks.py) were written from the libraries' code, and checked against it, apart from ours.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import student_from_torch

from ekd_jax import models
from ekd_jax.common.errors import UserError
from ekd_jax.models import densenet, efficientnet, resnet
from ekd_jax.models.blocks import Bottleneck
from ekd_jax.models.family import Family
from ekd_jax.students.convert import Request, convert
from ekd_jax.students.state_dict import read_state_dict
from ekd_jax.students.torch_names import sources

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[parity]'")
theirs = pytest.importorskip("torch_networks")

CLASSES = 7
DENSENET_CIFAR = (
    (r"^stem\.", "conv1."),
    (r"^stage(\d)\.layer(\d+)_", r"denseblock\1.denselayer\2."),
    (r"^stage(\d)\.transition_", r"transition\1."),
    (r"(layer\d+\.|transition\d\.)bn", r"\1norm"),
    (r"^head\.before\.bn", "norm"),
    (r"^head\.linear", "classifier"),
)


def rules_of(name, library=""):
    return next(s.rules for s in sources(name) if library in s.library)


RESNEXT = partial(Bottleneck, groups=32, base_width=4)
EFFICIENTNET = partial(efficientnet.efficientnet, width="0.5", depth="0.3", dropout=0.0)
# Beside whole networks of every family shallow ones, of blocks that the family's members share.
SHALLOW = {
    "resnext": (
        Family(lambda w, o: resnet.resnet(w, o, block=RESNEXT, blocks=(1, 2, 1, 1)), 4, 1),
        lambda: theirs.ResNet(theirs.Bottleneck, (1, 2, 1, 1), CLASSES, groups=32, width_per_group=4),
        rules_of("resnext50_32x4d"),
    ),
    "bottleneck": (
        Family(lambda w, o: resnet.resnet(w, o, block=Bottleneck, blocks=(2, 1, 1, 2)), 4, 1),
        lambda: theirs.ResNet(theirs.Bottleneck, (2, 1, 1, 2), CLASSES),
        rules_of("resnet50"),
    ),
    "densenet": (
        Family(lambda w, o: densenet.densenet_imagenet(w, o, layers=(2, 1, 2, 1)), 4, 1),
        lambda: theirs.DenseNet(layers=(2, 1, 2, 1), num_classes=CLASSES),
        rules_of("densenet121"),
    ),
    "densenet_cifar": (
        Family(lambda w, o: densenet.densenet_cifar(w, o, growth=12, depth=22), 3),
        lambda: theirs.DenseNetCifar(layers_per_block=3, num_classes=CLASSES),
        DENSENET_CIFAR,
    ),
    "efficientnet": (  # one setting of two blocks; whole networks: test_export_torch.py
        Family(lambda w, o: EFFICIENTNET(w, dataclasses.replace(o, padding="even")), 3),
        lambda: theirs.EfficientNet(0.5, 0.3, CLASSES),
        rules_of("efficientnet_b0", "torchvision"),
    ),
}
SIZES = {"densenet_cifar": 32, "resnext": 24, "efficientnet": 48}  # float64 is slow, grouped even more so
NAMED = {
    "resnet18": 64,
    "resnet8x4": 16,
    "resnet20_a": 16,
    "wrn_16_1": 16,
    "vgg8": 32,
    "vgg13": 32,
    "mobilenet_v2": 64,
    "mobilenet_v2_cifar": 32,
    "shufflenet_v1_cifar": 16,
    "shufflenet_v2_cifar": 16,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
}


def randomize(network, seed=0):
    """Move weights, batch norms and running statistics away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith("running_mean") or (value.ndim == 1 and name.endswith("bias")):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        elif value.ndim == 1 and name.endswith("weight"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return network.double()


def case(name):
    """Return our network by dtype, PyTorch's, the rules and the size of the images."""
    options = {"stochastic_depth": 0.0, "dropout": 0.0}
    if name in SHALLOW:
        family, network, rules = SHALLOW[name]
        models.MODELS[name] = family
        try:
            build = lambda dtype: models.build_ensemble(name, 1, CLASSES, dtype=dtype, **options)
            ours = {dtype: build(dtype) for dtype in ("float64", "float32")}
        finally:
            del models.MODELS[name]
        return ours, network(), rules, SIZES.get(name, 64)
    source = sources(name)[0] if name != "mobilenet_v2" else sources(name)[1]
    options |= source.options
    build = lambda dtype: models.build_ensemble(name, 1, CLASSES, dtype=dtype, **options)
    ours = {dtype: build(dtype) for dtype in ("float64", "float32")}
    return ours, theirs.NETWORKS[name](num_classes=CLASSES), source.rules, NAMED[name]


quickly_compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# Of a family that another one stands for.
SECOND = {"resnet18", "bottleneck", "vgg13", "mobilenet_v2", "shufflenet_v2_cifar", "efficientnet_b0"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SECOND)) for n in (*SHALLOW, *NAMED)]
)
def test_forward_statistics_and_gradients(name):
    torch.manual_seed(0)
    ours, network, rules, size = case(name)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    randomize(network)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(6, size, size, 3))
    labels = generator.integers(CLASSES, size=6)
    theirs_images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    with jax.enable_x64(True):
        ensemble = ours["float64"]
        like_all = ensemble.trace(images.shape[1:]).init(None)
        like = ensemble.student_variables(like_all, 1)
        before = student_from_torch(like, state_of(network), rules, np.float64)

        @quickly_compiled
        def everything(variables):
            evaluated = ensemble.student(1).logits(variables, images)

            def loss(params):
                full = ensemble.with_student_variables(like_all, 1, variables | {"params": params})
                outputs, stats = ensemble.apply(full, images, train=True)
                logits = outputs.logits_SxBxK[0]
                mean = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()
                return mean, (logits, stats)

            (_, (trained, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            return evaluated, trained, stats, gradients

        evaluated, trained, stats, gradients = everything(before)
    network.eval()
    with torch.no_grad():
        np.testing.assert_allclose(evaluated, network(theirs_images), rtol=1e-9, atol=1e-9)
        alone = quickly_compiled(ours["float32"].student(1).logits)
        single = alone(jax.tree.map(np.float32, before), np.float32(images))
        np.testing.assert_allclose(single, network(theirs_images), rtol=1e-4, atol=1e-4)
    network.train()
    logits = network(theirs_images)
    np.testing.assert_allclose(trained, logits.detach(), rtol=1e-9, atol=1e-9)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    with jax.enable_x64(True):
        after = student_from_torch(like, state_of(network), rules, np.float64)
        slopes = {n: p.grad for n, p in network.named_parameters()}
        slopes |= {n: v for n, v in state_of(network).items() if n not in slopes}
        expected = student_from_torch(like, slopes, rules, np.float64)["params"]
    compare(
        ensemble.student_variables({"batch_stats": stats}, 1)["batch_stats"], after["batch_stats"], 1e-9
    )
    compare(gradients, expected, 1e-7)


def test_an_efficientnet_with_tensorflows_padding(monkeypatch):
    """At 97 pixels maps have 49, 25, 13, 7 and 4, so odd sizes are padded otherwise than even ones."""
    build = partial(efficientnet.efficientnet, width="0.5", depth="0.1", dropout=0.0)
    monkeypatch.setitem(models.MODELS, "shallow", Family(build, stages=3))
    network = randomize(theirs.EfficientNet(0.5, 0.1, CLASSES, padding="same")).float().eval()
    ensemble = models.build_ensemble("shallow", 1, CLASSES, padding="same")
    like = ensemble.student_variables(ensemble.trace((97, 97, 3)).init(None), 1)
    variables = student_from_torch(like, state_of(network), rules_of("efficientnet_b0", "torchvision"))
    images = np.random.default_rng(0).normal(size=(2, 97, 97, 3)).astype(np.float32)
    logits = quickly_compiled(ensemble.student(1).logits)(variables, images)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def compare(found, expected, tolerance):
    """Assert that arrays agree up to `tolerance` times the largest element."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        atol = tolerance * max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def state_of(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_pth_files_become_students(tmp_path, wrap):
    """PyTorch saves them bare, or in a training checkpoint of a DataParallel network."""
    torch.manual_seed(0)
    network = randomize(theirs.NETWORKS["resnet8x4"](num_classes=CLASSES)).float().eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(wrap(state), tmp_path / "network.pth")
    state = read_state_dict(tmp_path / "network.pth").arrays
    found = convert(Request("resnet8x4", (32, 32, 3)), state)
    assert found.network.num_classes == CLASSES
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    ours = models.build_ensemble("resnet8x4", 1, CLASSES).student(1).logits(found.variables, images)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "broken.pth").write_bytes((tmp_path / "network.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"broken.pth cannot be read"):
        read_state_dict(tmp_path / "broken.pth")
