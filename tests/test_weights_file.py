"""Files of PyTorch weights of every kind: all that hold the arrays are read, all others are refused in one line."""

import argparse
import collections
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from ekd_jax.common.errors import UserError
from ekd_jax.students.state_dict import read_state_dict

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[parity]'")


class Attributes(dict):
    """A dictionary of a class of the user's."""


class Settings:
    """An object of a class of the user's."""

    def __init__(self):
        self.rate = 0.1


class Network(torch.nn.Module):
    """A convolution, batch norm and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Network()


def state():
    return network().state_dict()


def prefixed(prefix, shift=0):
    return {prefix + name: value + shift for name, value in state().items()}


def optimizer_state():
    trained = network()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9)
    trained(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def cast(dtype):
    return {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in state().items()
    }


READ = {
    "bare.pth": state,
    "bare.pt": state,
    "hub.bin": state,
    "imagenet.pth.tar": lambda: {
        "epoch": 3, "arch": "resnet18", "state_dict": prefixed("module."), "best_acc1": torch.tensor(76.1),
        "optimizer": optimizer_state(),
    },
    "lightning.ckpt": lambda: {
        "state_dict": prefixed("model."), "hyper_parameters": Attributes(net=Settings()),
        "optimizer_states": [optimizer_state()], "lr_schedulers": [], "global_step": 5,
    },
    "kuangliu.t7": lambda: {"net": prefixed("module."), "acc": 93.1, "epoch": 2},
    "args.tar": lambda: {"model": state(), "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"))},
    "numbers.pt": lambda: {"model_state": state(), "best": np.float64(3), "mean": np.zeros(3, np.float32)},
    "random.pt": lambda: {"model_state_dict": state(), "rng_state": torch.get_rng_state()},
    "deep.pt": lambda: {"checkpoint": {"model": {"state_dict": state()}}},
    "meters.pt": lambda: {"state_dict": state(), "meters": collections.defaultdict(list, loss=[1.0])},
    "settings.pt": lambda: {"state_dict": state(), "settings": Settings()},
    "compiled.pt": lambda: prefixed("_orig_mod.module."),
    "compiled_inside.pt": lambda: prefixed("module.student._orig_mod."),
    "half.pt": lambda: cast(torch.float16),
    "bfloat16.pt": lambda: cast(torch.bfloat16),
    "double.pt": lambda: cast(torch.float64),
    "parameters.pt": lambda: dict(network().named_parameters()) | dict(network().named_buffers()),
    "averaged.pt": lambda: torch.optim.swa_utils.AveragedModel(network()).state_dict(),
    "strided.pt": lambda: {n: v.mT.contiguous().mT if v.ndim > 1 else v for n, v in state().items()},
    "arrays.pt": lambda: {name: value.numpy() for name, value in state().items()},
    "plain_and_ema.pt": lambda: {"state_dict": state(), "state_dict_ema": prefixed("", 1)},
    "only_ema.pt": lambda: {"model_ema": prefixed("module.")},
    "teacher.pt": lambda: {"model": prefixed("module.student.") | prefixed("module.teacher.", 1)},
}  # fmt: skip
WORDS = {"half.pt": 1e-3, "bfloat16.pt": 1e-2}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("name", READ)
def test_read(tmp_path, name, zipped):
    torch.save(READ[name](), tmp_path / name, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / name).arrays
    for name_of_array, value in state().items():
        if value.is_floating_point():
            assert found[name_of_array].dtype in (np.float32, np.float64)
            np.testing.assert_allclose(
                found[name_of_array], value, rtol=WORDS.get(name, 0), atol=WORDS.get(name, 0)
            )
    beside = found.keys() - state().keys()
    assert beside <= {"n_averaged"}, "nothing else is taken"


def test_a_network_beside_the_arrays_is_left_alone(tmp_path):
    torch.save({"state_dict": state(), "criterion": torch.nn.MSELoss()}, tmp_path / "criterion.pt")
    assert read_state_dict(tmp_path / "criterion.pt").arrays.keys() == state().keys()


def test_averaged_weights_are_taken_when_asked_for(tmp_path):
    torch.save({"model": state(), "model_ema": prefixed("module.", 1)}, tmp_path / "both.pt")
    plain, averaged = (read_state_dict(tmp_path / "both.pt", ema) for ema in (False, True))
    np.testing.assert_array_equal(plain.arrays["fc.bias"] + 1, averaged.arrays["fc.bias"])
    assert plain.notes == ("plain weights were taken; --ema takes the averaged ones",)
    assert averaged.notes == ("averaged (EMA) weights were taken; the plain ones are there, too",)


class Exploit:
    """An object that runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def quantized():
    return {"conv1.weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)}


REFUSED = {
    "network.pt": (
        network,
        "holds a whole network, a test_weights_file.Network, and loading it would run code",
    ),
    "network_inside.pt": (lambda: {"model": network(), "epoch": 1}, "holds a whole network"),
    "list.pt": (lambda: list(network().parameters()), "holds no named arrays"),
    "tensor.pt": (lambda: torch.zeros(3), "holds no named arrays"),
    "empty.pt": (dict, "holds no named arrays"),
    "optimizer.pt": (optimizer_state, "holds no named arrays"),
    "two.pt": (
        lambda: {"net": state(), "best_net": prefixed("", 1)},
        "net.conv1.weight and best_net.conv1.weight differ",
    ),
    "unreadable.pt": (
        lambda: {"net": state(), "log": collections.deque([1])},
        "cannot be read: Can only append to lists",
    ),
    "expanded.pt": (
        lambda: state() | {"bomb.weight": torch.zeros(1).expand(10**6, 10**6)},
        "bomb.weight claims the shape (1000000, 1000000)",
    ),
    "expanded_half.pt": (
        lambda: state() | {"bomb.weight": torch.zeros(1).half().expand(10**6, 10**6)},
        "bomb.weight claims the shape (1000000, 1000000)",
    ),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name, zipped):
    make, message = REFUSED[name]
    torch.save(make(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        read_state_dict(tmp_path / name)
    assert (message if zipped else message.split(",")[0]) in str(error.value)
    assert "torch.save(model.state_dict(), 'weights.pth')" in str(error.value) or "save one" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 1000)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    with pytest.raises(
        UserError, match=r"its entries claim 4,000,\d+ bytes, and the file has .* compressed"
    ):
        read_state_dict(tmp_path / "bomb.pt")


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"state_dict": state(), "more": Exploit(tmp_path / "run")}, tmp_path / "file.pt")
    assert read_state_dict(tmp_path / "file.pt").arrays
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Exploit(tmp_path / "run")))
    with pytest.raises(UserError, match="neither a PyTorch nor a safetensors file"):
        read_state_dict(tmp_path / "plain.pt")
    assert not (tmp_path / "run").exists()


def test_integers_stay_integers(tmp_path):
    torch.save(quantized(), tmp_path / "quantized.pt")
    assert read_state_dict(tmp_path / "quantized.pt").arrays["conv1.weight"].dtype == np.int8


def test_torchscript_is_refused(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="is a TorchScript archive, which is a program"):
        read_state_dict(tmp_path / "script.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_damaged_files(tmp_path, zipped):
    torch.save(state(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.pt").read_bytes()
    for size in (len(data) // 2, len(data) - 5, 100, 10):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut.pt cannot be read") as error:
            read_state_dict(tmp_path / "cut.pt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_bytes_changed_anywhere(tmp_path, zipped):
    """A damaged file is read or refused; nothing else happens."""
    obj = {"state_dict": {"fc.weight": torch.ones(2, 2)}, "best": np.float64(1), "more": np.zeros(2)}
    torch.save(obj, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    data = np.frombuffer((tmp_path / "whole.pt").read_bytes(), np.uint8)
    generator, refused = np.random.default_rng(0), []
    for _ in range(150):
        damaged = data.copy()
        damaged[generator.integers(len(data), size=3)] = generator.integers(256, size=3)
        (tmp_path / "damaged.pt").write_bytes(damaged.tobytes())
        try:
            read_state_dict(tmp_path / "damaged.pt")
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in message for message in refused)
