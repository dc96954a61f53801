"""Names of a network's arrays in any wrapping, safetensors files, files that are something else, and class names."""

import json
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from ekd_jax.common.errors import UserError
from ekd_jax.students.class_names import known_class_names, read_class_names
from ekd_jax.students.state_dict import read_state_dict, unwrap

KERNEL = np.arange(4, dtype=np.float32).reshape(2, 2)


@pytest.mark.parametrize(
    "name",
    [
        "layer1.0.conv1.weight",
        "state_dict.layer1.0.conv1.weight",
        "module.layer1.0.conv1.weight",
        "model.module.layer1.0.conv1.weight",
        "module.model.student.net.backbone.layer1.0.conv1.weight",
        "_orig_mod.module.layer1.0.conv1.weight",
        "module._orig_mod.module.layer1.0.conv1.weight",
        "layer1._orig_mod.0.conv1.weight",
        "_fsdp_wrapped_module.layer1._fsdp_wrapped_module.0._checkpoint_wrapped_module.conv1.weight",
        "checkpoint.model_state_dict.module.layer1.0.conv1.weight",
        "net_weights.layer1.0.conv1.weight",
        "best-model.layer1.0.conv1.weight",
    ],
)
def test_wrappers_are_no_part_of_a_name(name):
    assert unwrap({name: KERNEL}).arrays.keys() == {"layer1.0.conv1.weight"}


@pytest.mark.parametrize(
    "name", ["features.0.weight", "blocks.0.conv.weight", "classifier.1.weight", "module_list.0.weight"]
)
def test_names_of_networks_stay(name):
    assert unwrap({name: KERNEL}).arrays.keys() == {name}


@pytest.mark.parametrize(
    "prefix",
    [
        "ema.", "model_ema.module.", "ema_model.", "state_dict_ema.", "ema_state_dict.", "state.ema.", "swa_model.",
        "shadow_params.",
    ],
)  # fmt: skip
def test_averaged_weights_are_chosen_by_a_flag(prefix):
    arrays = {"model.fc.weight": KERNEL, f"{prefix}fc.weight": 2 * KERNEL, "ema.decay": np.array(0.9)}
    plain, averaged = unwrap(arrays), unwrap(arrays, ema=True)
    np.testing.assert_array_equal(plain.arrays["fc.weight"], KERNEL)
    assert "--ema takes the averaged ones" in plain.notes[0]
    np.testing.assert_array_equal(averaged.arrays["fc.weight"], 2 * KERNEL)
    assert "the plain ones are there, too" in averaged.notes[0]
    alone = unwrap({f"{prefix}fc.weight": KERNEL})
    assert "there are no others" in alone.notes[0]
    with pytest.raises(ValueError, match="--ema: it holds no averaged weights"):
        unwrap({"model.fc.weight": KERNEL}, ema=True)


def test_several_networks():
    teacher = {"module.teacher.fc.weight": 2 * KERNEL, "module.teacher.fc.bias": KERNEL[0]}
    found = unwrap({"module.student.fc.weight": KERNEL} | teacher)
    np.testing.assert_array_equal(found.arrays["fc.weight"], KERNEL)
    assert found.notes == ("2 arrays of a teacher were left out",)
    assert unwrap(teacher).arrays.keys() == {"fc.weight", "fc.bias"}
    assert unwrap({"net.fc.weight": KERNEL, "model.fc.weight": KERNEL}).arrays.keys() == {"fc.weight"}
    with pytest.raises(ValueError, match=r"net.fc.weight and model.fc.weight differ"):
        unwrap({"net.fc.weight": KERNEL, "model.fc.weight": 2 * KERNEL})
    with pytest.raises(ValueError, match="no weights of a network, only epoch"):
        unwrap({"epoch": np.array(3)})


def test_what_lies_beside_a_wrapped_network_is_no_part_of_it():
    arrays = {"state_dict.fc.weight": KERNEL, "rng_state": np.zeros(9, np.uint8), "confusion": KERNEL}
    assert unwrap(arrays).arrays.keys() == {"fc.weight"}
    assert unwrap({"fc.weight": KERNEL, "scale": KERNEL}).arrays.keys() == {"fc.weight", "scale"}


@pytest.mark.parametrize("file_name", ["file.safetensors", "file.bin", "file.pth"])
def test_safetensors_of_every_type(tmp_path, file_name):
    """bfloat16 is the upper half of float32. The contents tell what the file is, not its name."""
    bits = (KERNEL.view(np.uint32) >> 16).astype(np.uint16)
    half, counts = KERNEL.astype(np.float16), np.arange(3)
    header = {
        "model.a.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "model.b.weight": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]},
        "model.c": {"dtype": "I64", "shape": [3], "data_offsets": [16, 40]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    data = bits.tobytes() + half.tobytes() + counts.tobytes()
    (tmp_path / file_name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = read_state_dict(tmp_path / file_name).arrays
    np.testing.assert_array_equal(found["a.weight"], KERNEL)
    assert found["a.weight"].dtype == np.float32
    np.testing.assert_array_equal(found["b.weight"], half)
    np.testing.assert_array_equal(found["c"], counts)


def zipped(member):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"x")

    return write


def content(data):
    return lambda path: path.write_bytes(data)


NO_WEIGHTS = {
    "missing.pth": (lambda path: None, "cannot be read"),
    "directory.pth": (lambda path: path.mkdir(), "is a directory: give a file, or a directory with BaseNet.pth"),
    "weights.h5": (content(b"\x89HDF\r\n"), "must be a file that ends with .safetensors, .pth"),
    "weights": (content(b"PK"), "must be a file that ends with"),
    "empty.pth": (content(b""), "is empty"),
    "empty.safetensors": (content(b""), "is empty"),
    "page.pth": (content(b"\n<!DOCTYPE html><html>"), "is a web page, not weights"),
    "page.safetensors": (content(b"<html>404</html>"), "is a web page, not weights"),
    "pointer.pth": (content(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "keras.pth": (content(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
    "packed.tar": (content(b"\x1f\x8b\x08"), "is compressed with gzip"),
    "cut.pth": (content(b"PK\x03\x04" + bytes(99)), "is cut off or damaged"),
    "cut.safetensors": (content(b"\x09" + bytes(7) + b"{"), "cannot be read"),
    "garbage.pth": (content(b"garbage" * 9), "neither a PyTorch nor a safetensors file"),
    "garbage.safetensors": (content(b"garbage" * 9), "cannot be read"),
    "arrays.pth": (zipped("a.npy"), "not one that torch.save wrote"),
    "script.pt": (zipped("script/constants.pkl"), "is a TorchScript archive"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_files_that_are_something_else(tmp_path, name):
    write, message = NO_WEIGHTS[name]
    write(tmp_path / name)
    with pytest.raises(UserError) as error:
        read_state_dict(tmp_path / name)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_safetensors_may_be_nested_by_name(tmp_path):
    safetensors.numpy.save_file(
        {"ema.fc.weight": KERNEL, "fc.weight": 2 * KERNEL}, tmp_path / "a.safetensors"
    )
    np.testing.assert_array_equal(
        read_state_dict(tmp_path / "a.safetensors", ema=True).arrays["fc.weight"], KERNEL
    )


NAMES = {
    "lines.txt": b"cat\ndog\n",
    "windows.txt": "\ufeffcat\r\ndog\r\n".encode(),
    "padded.txt": b"  cat\t\n dog",
    "list.json": b'["cat", "dog"]',
    "numbered.json": b'{"1": "dog", "0": "cat"}',
    "imagenet.json": b'{"0": ["cat", "the animal"], "1": ["dog", "the animal"]}',
    "class_to_idx.json": b'{"dog": 1, "cat": 0}',
    "json.txt": b' ["cat", "dog"]',
}


@pytest.mark.parametrize("name", NAMES)
def test_class_names_in_every_form(tmp_path, name):
    (tmp_path / name).write_bytes(NAMES[name])
    assert read_class_names(tmp_path / name) == ("cat", "dog")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat\n\ndog\n", "name 2 is empty"),
        (b"", "name 1 is empty"),
        (b"cat\ndog\ncat\n", "has 'cat' more than once"),
        (b"\xff\xfec\x00", "cannot be read"),
        (b'["cat", ', "cannot be read"),
        (b'["cat", 3]', "names must be strings"),
        (b'{"0": "cat", "2": "dog"}', "2 entries, but none for class 1"),
        (b'{"cat": 1, "dog": 1}', "none for class 0"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_class_names_that_cannot_be_right(tmp_path, data, message):
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_class_names(tmp_path / "names.txt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_class_names_of_well_known_sets():
    assert known_class_names("digits")[:2] == ("zero", "one")
    assert known_class_names("fashion_mnist")[3] == "Dress"
    assert known_class_names("imagenet2012")[:2] == ("n01440764", "n01443537")
    for unknown in ("mnist", "folder", "no_such_set", "a/b/c", ""):
        assert known_class_names(unknown) == ()
