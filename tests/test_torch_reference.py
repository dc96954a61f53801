"""The PyTorch reference of the step-time benchmark computes what our training step computes."""

import copy
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, plain_environment, student_from_torch, tiny_config

from ekd_jax import models
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import Networks, build_method
from ekd_jax.methods.base import Batch
from ekd_jax.runs.state import TrainState, init_variables, method_variables, network_variables
from ekd_jax.students.torch_names import sources
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.step import make_step, objective

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[parity]'")
theirs = importlib.import_module("torch_reference")
compare = importlib.import_module("test_parity").compare

STUDENTS, CLASSES, SHAPE, BATCH = 3, 10, (16, 16, 3), 6  # stages of 16, 10 and 5 channels


def make(variant="eager", students=STUDENTS):
    return theirs.Reference("resnet8", students, BATCH, variant, SHAPE, CLASSES, examples=20, device="cpu")


def batch(dtype):
    """Images (B, H, W, C) and labels."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(BATCH, *SHAPE)).astype(dtype), generator.integers(CLASSES, size=BATCH)


def in_torch(images, labels):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)


def as_ours(ensemble, like, values):
    """Return values (or gradients) of the reference network, given by name, as our variables."""
    part = lambda start: {n.removeprefix(start): v for n, v in values.items() if n.startswith(start)}
    variables = like
    for i in range(STUDENTS):
        own = part("base.") | part(f"students.{i}.")
        own = student_from_torch(
            ensemble.student_variables(like, i + 1), own, sources("resnet8")[0].rules, np.float64
        )
        variables = ensemble.with_student_variables(variables, i + 1, own)
    layers = {}
    for name in like["params"]["method"]["adaptation_layers"]:
        block, student = (int(word[-1]) for word in name.split("_"))
        layer = part(f"adaptation.{student - 2}.{block - 1}.")
        layers[name] = {"kernel": layer["weight"][:, :, 0, 0].T.numpy(), "bias": layer["bias"].numpy()}
    variables["params"]["method"] = {"adaptation_layers": layers}
    return variables


def test_losses_gradients_and_two_steps():
    """In float64, from random parameters, because the initial 0 and 1 of batch norm would hide mistakes."""
    reference = make()
    network = reference.network.double()
    with torch.no_grad():
        for value in network.parameters():
            value += 0.1 * torch.randn_like(value)
    images, labels = batch(np.float64)

    config = tiny_config(model__students=STUDENTS)
    method = build_method(config)
    optimizer = make_optimizer(config, method, steps=1_000_000)
    ensemble = models.build_ensemble("resnet8", STUDENTS, CLASSES, dtype="float64")
    networks = Networks(method, ensemble, SHAPE)
    with jax.enable_x64(True):
        like = init_variables(networks, None)
    ours = lambda values: as_ours(ensemble, like, {n: v.detach().clone() for n, v in values.items()})
    begin = ours(network.state_dict())

    alone = copy.deepcopy(network)
    losses = theirs.losses(alone, *in_torch(images, labels))
    losses.total.backward()
    slopes = ours(alone.state_dict() | {name: p.grad for name, p in alone.named_parameters()})["params"]
    for _ in range(2):
        reference.update(*in_torch(images, labels))
    end = ours(network.state_dict())

    def loss_of(params):
        full = begin | {"params": params}
        outputs, _ = ensemble.apply(network_variables(full), images, train=True)
        loss, (terms, _) = objective(method, method_variables(full), outputs, Batch(labels, jnp.zeros(())))
        return loss, terms

    with jax.enable_x64(True):
        gradients, terms = jax.jit(jax.grad(loss_of, has_aux=True))(begin["params"])
        state = TrainState(
            jnp.zeros((), jnp.int32), **begin, opt_state=optimizer.init(begin["params"]), copies={}
        )
        step = jax.jit(make_step(networks, optimizer))
        for _ in range(2):
            state, _ = step(state, images, labels)

    expected = {"loss": losses.total}
    for i in range(STUDENTS):
        expected[f"student_{i + 1}/loss_ce"] = losses.ce[i]
        expected[f"student_{i + 1}/loss_kd"] = losses.kd[i]
        for b in range(3):
            intermediate = losses.intermediate[i - 1, b] if i else torch.zeros(())
            expected[f"student_{i + 1}/loss_intermediate_block{b + 1}"] = intermediate
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value.item(), rtol=1e-10, err_msg=name)
    compare(gradients, slopes, 1e-9)
    compare({"params": state.params, "batch_stats": state.batch_stats}, end, 1e-9)


@pytest.mark.parametrize(("variant", "tolerance"), [("channels_last", 1e-5), ("amp", 0.02)])
def test_variants_agree(variant, tolerance):
    """The loss before and after a step is the same.

    Two students have 8 channels and more: for fewer, NHWC gradients of PyTorch are wrong on some CPUs.
    """
    given = in_torch(*batch(np.float32))

    def two_losses(name):
        reference = make(name, students=2)
        before = reference.loss(*given).item()
        reference.update(*given)
        return [before, reference.loss(*given).item()]

    np.testing.assert_allclose(two_losses(variant), two_losses("eager"), rtol=tolerance)
    make(variant).run(2)


def test_crops_are_mirrored_parts_of_the_padded_images():
    images = torch.randint(1, 256, (3, 6, 10, 2), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, (0, 0, 4, 4, 4, 4))
    numbers = torch.arange(300) % 3
    found = theirs.crops(padded, numbers, torch.Generator().manual_seed(0)).numpy()
    seen = set()
    for number, image in zip(numbers, found, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(padded[number].numpy(), (6, 10), (0, 1))
        windows = windows.transpose(0, 1, 3, 4, 2)
        both = np.stack([windows, windows[:, :, :, ::-1]])
        places = np.argwhere((both == image).all((3, 4, 5)))
        assert len(places) == 1
        seen.add(tuple(places[0]))
    assert {place[0] for place in seen} == {0, 1}
    assert {place[1] for place in seen} == {place[2] for place in seen} == set(range(9))


def test_an_epoch_has_every_image_once():
    reference = make()
    reference.labels = torch.arange(20)  # 3 batches of 6
    epochs = [torch.cat([reference.batch()[1] for _ in range(3)]).tolist() for _ in range(2)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 18
    assert epochs[0] != epochs[1]
    images, _ = reference.batch()
    pixels = 255 * (images.permute(0, 2, 3, 1) * torch.tensor(theirs.STD) + torch.tensor(theirs.MEAN))
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "resnet9"}, "model resnet9 is unknown to the PyTorch reference; did you mean 'resnet8'"),
        ({"variant": "chanels_last"}, "variant .*; did you mean 'channels_last'"),
        ({"students": 1}, "students=1: an ensemble needs at least two"),
    ],
)
def test_unknown_settings(changed, message):
    with pytest.raises(UserError, match=message):
        theirs.Reference(
            **({"model": "resnet8", "students": 2, "batch_size": 4, "variant": "eager"} | changed)
        )


def test_step_time_times_both(tmp_path):
    """One run of step_time.py times our step and PyTorch's."""
    asked = [
        "--models=resnet8",
        "--students=2",
        "--batch_sizes=4",
        "--torch=eager",
        "--steps=1",
        "--rounds=2",
    ]
    command = [sys.executable, ROOT / "benchmarks" / "step_time.py", *asked, f"--json={tmp_path}/out.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["float32 separate oem", "torch eager"]
    assert report["rows"][0]["to_first"] == 1
    assert report["environment"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in done.stdout


def test_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch_reference")
    with pytest.raises(SystemExit, match=r'PyTorch is not installed: pip install "ekd_jax\[parity\]"'):
        importlib.import_module("torch_reference")
