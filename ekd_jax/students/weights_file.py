"""Files of PyTorch weights, read without running any code in them."""

import pathlib
import pickletools
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
import safetensors

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.zipped import check_stored

EXTENSIONS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".tar", ".t7")
SAVE_IT = "torch.save(model.state_dict(), 'weights.pth')"
MOST_EXPANDED = 2**30  # bytes of all arrays that have more values than are stored
DEPTH = 8  # dictionaries in dictionaries beyond this hold no weights
_FIRST_BYTES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes: only PyTorch's weights can be converted"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
)
_WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")
_SAFETENSORS_DTYPES: dict[str, Any] = {
    **{"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "BOOL": np.bool_},
    **{
        f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}".lower()) for kind in "IU" for bits in (8, 16, 32, 64)
    },
}
Arrays = dict[str, np.ndarray]


def read_arrays(path: pathlib.Path) -> Arrays:
    """Read all arrays of a file, each under its keys joined by dots, such as "state_dict.conv1.weight".

    The contents tell whether it is a PyTorch or a safetensors file. Lists, and dictionaries with other keys
    than strings (the states of optimizers), are left out.

    Args:
        path: a file with one of `EXTENSIONS`.

    Returns:
        NumPy arrays; bfloat16, half and 8-bit floats as float32.

    Raises:
        UserError: there is no such file, it is something else, it is damaged, it holds no arrays, or PyTorch
            is needed and not installed.
    """
    head = _first_bytes(path)
    torch_file = head.startswith((b"PK", b"\x80"))
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and not torch_file):
        return _read_safetensors(path)
    return _read_torch(path)


def _first_bytes(path: pathlib.Path) -> bytes:
    """Return how the file begins.

    Raises:
        UserError: it cannot be read, or is known to be something else.
    """
    if path.is_dir():
        raise UserError(
            f"--weights={path} is a directory: give a file, or a directory with BaseNet.pth and student_<i>.pth"
        )
    if not path.name.lower().endswith(EXTENSIONS):
        raise UserError(f"--weights={path} must be a file that ends with {', '.join(EXTENSIONS)}")
    if path.exists() and not path.is_file():
        raise UserError(f"--weights={path} is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    if not head:
        raise UserError(f"--weights={path} is empty: download or copy it again")
    if head.lstrip().lower().startswith(_WEB_PAGES):
        raise UserError(f"--weights={path} is a web page, not weights: download the file itself")
    for beginning, meaning in _FIRST_BYTES:
        if head.startswith(beginning):
            raise UserError(f"--weights={path} {meaning}")
    return head


# --- safetensors ---------------------------------------------------------------------------------


def _read_safetensors(path: pathlib.Path) -> Arrays:
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    arrays = {}
    for name, tensor in tensors:
        kind = tensor["dtype"]
        if kind not in _SAFETENSORS_DTYPES:
            raise UserError(f"--weights={path}: {name} has the type {kind}: save it as float32")
        array = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[kind]).reshape(tensor["shape"])
        arrays[name] = array.astype(np.float32) if kind == "BF16" else array
    if not arrays:
        raise UserError(f"--weights={path} holds no arrays")
    return arrays


# --- PyTorch -------------------------------------------------------------------------------------


class _StandIn:
    """In place of every class and function that a file names: an empty dictionary is made, nothing is imported.

    It takes the items of dictionaries, and the attributes of other objects.
    """

    kind = ""

    def __new__(cls, *args: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        """Take any arguments."""
        made: OrderedDict[str, Any] = OrderedDict()
        vars(made)["kind"] = cls.kind
        return made


class _NumpyType:
    """A NumPy data type as it is pickled, such as "f4"."""

    def __init__(self, code: Any, *args: Any):
        """Take its code; what follows says nothing about numbers."""
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _NumpyArray:
    """A NumPy array as it is pickled. NumPy's own functions can crash on damaged files."""

    state: Any = None

    def __init__(self, *args: Any):
        """Take any arguments: the values follow."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Return the array; it raises many kinds of errors if the file is damaged."""
        _, shape, kind, is_fortran, data = self.state
        dtype = np.dtype(kind.code).newbyteorder(kind.order)
        return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


_NUMPY: dict[str, type] = {
    "numpy.dtype": _NumpyType,
    "numpy.ndarray": _NumpyArray,
    "numpy.core.multiarray._reconstruct": _NumpyArray,  # of NumPy 1
    "numpy._core.multiarray._reconstruct": _NumpyArray,  # of NumPy 2
}


def _is_network(value: Any) -> bool:
    return isinstance(value, OrderedDict) and "_modules" in vars(value)


def _read_torch(path: pathlib.Path) -> Arrays:
    try:
        names = _global_names(path)
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"--weights={path} cannot be read: {reason(error)}") from error
    try:
        import torch
    except ImportError:
        raise UserError(
            f"--weights={path}: reading it needs PyTorch (pip install torch); or save it as .safetensors"
        ) from None
    try:
        known = [(_NUMPY.get(name) or type(name, (_StandIn,), {"kind": name}), name) for name in names]
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(known),
        ):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(_leaves(loaded, torch.Tensor))
        _check_sizes(found)
        arrays = {name: _as_numpy(value) for name, value in found.items() if not _is_network(value)}
    except Exception as error:  # pickle, zip and torch raise many kinds
        if any(name.startswith("torch.nn.modules.") for name in names):
            raise _whole_network(path) from error
        why = _torch_reason(error)
        raise UserError(
            f"--weights={path} cannot be read: {why}: save it again in PyTorch: {SAVE_IT}"
        ) from error
    if not arrays and found:
        raise _whole_network(path, f", a {vars(next(iter(found.values())))['kind']}")
    if not arrays:
        raise UserError(f"--weights={path} holds no named arrays: save them in PyTorch: {SAVE_IT}")
    return arrays


def _whole_network(path: pathlib.Path, kind: str = "") -> UserError:
    return UserError(
        f"--weights={path} holds a whole network{kind}, and loading it would run code in it: save its arrays "
        f"alone in PyTorch: {SAVE_IT}"
    )


def _torch_reason(error: Exception) -> str:
    """Return what PyTorch says is wrong, without its advice."""
    cause = re.search(
        r"WeightsUnpickler error:\s*(.*?)\.?\s*(?:Please use|Check the documentation|$)",
        str(error),
        re.DOTALL,
    )
    return reason(ValueError(cause[1])) if cause else reason(error).rstrip(".")


def _global_names(path: pathlib.Path) -> set[str]:
    """Return the names of all classes and functions that loading the file would import.

    Raises:
        ValueError: it is not a PyTorch file.
        UserError: it is an archive of something else.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            try:  # magic number, version and system, in files of PyTorch before 1.6; then the object
                return set().union(*(_named(file) for _ in range(4)))
            except ValueError as error:
                raise ValueError(
                    "it is neither a PyTorch nor a safetensors file, or it is cut off"
                ) from error
    if not zipfile.is_zipfile(path):
        raise ValueError("it is cut off or damaged: download or copy it again")
    with zipfile.ZipFile(path) as archive:
        members = {pathlib.PurePosixPath(name).name: name for name in archive.namelist()}
        if "constants.pkl" in members:
            raise UserError(
                f"--weights={path} is a TorchScript archive, which is a program: save its arrays alone in PyTorch: "
                f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pth')"
            )
        if "data.pkl" not in members:
            raise ValueError("it is a zip archive, but not one that torch.save wrote")
        check_stored(archive, path)  # only now: the program in a TorchScript archive is compressed
        with archive.open(members["data.pkl"]) as file:
            return _named(file)


def _named(file: IO[bytes]) -> set[str]:
    """Return the names in the pickle at the file's position, and move behind it."""
    names = (
        str(argument).replace(" ", ".")
        for opcode, argument, _ in pickletools.genops(file)
        if opcode.name == "GLOBAL"
    )
    # torch.save writes the names that modules have in Python 2, and PyTorch reads them as those of Python 3
    return {name.replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.") for name in names}


def _leaves(tree: Any, tensor: type) -> Iterator[tuple[str, Any]]:
    """Yield keys, joined by dots, and values of all arrays and networks in nested dictionaries."""
    level = {"": tree}
    for _ in range(DEPTH):
        below: dict[str, Any] = {}
        for name, value in level.items():
            if _is_network(value):
                yield name, value
            elif isinstance(value, Mapping):
                keys = (key for key in value if isinstance(key, str))
                below |= {f"{name}.{key}" if name else key: value[key] for key in keys}
            elif name and isinstance(value, tensor | _NumpyArray):
                yield name, value
        level = below


def _check_sizes(found: Mapping[str, Any]) -> None:
    """Raise ValueError if tensors have far more values than are stored: one value can be expanded to any shape."""
    expanded = 0
    for name, value in found.items():
        if not hasattr(value, "numel"):
            continue
        claimed = value.numel() * value.element_size()
        stored = 0 if value.is_sparse else value.untyped_storage().nbytes()
        expanded += claimed if claimed > stored else 0
        if expanded > MOST_EXPANDED:
            raise ValueError(
                f"{name} claims the shape {tuple(value.shape)}, and few of its values are stored"
            )


def _as_numpy(value: Any) -> np.ndarray:
    """Return a tensor, or an array, as an array of a type that NumPy has."""
    if isinstance(value, _NumpyArray):
        return value.array()
    value = value.detach()
    if value.is_quantized:
        value = value.int_repr()
    if value.is_sparse:
        value = value.to_dense()
    if value.is_floating_point() and value.element_size() < 4:
        value = value.float()
    array: np.ndarray = value.numpy()
    return array
