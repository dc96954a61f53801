"""The npm package onnxruntime-web: the runtime that a page has inside."""

import dataclasses
import json
import os
import pathlib

from ekd_jax.common.errors import UserError, reason

NAME = "onnxruntime-web"
DIRECTORY = pathlib.Path("node_modules") / NAME
INSTALL = f"npm install {NAME}"
# The build for CPUs alone is a third of the others' size.
SCRIPT, WASM = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"


@dataclasses.dataclass(frozen=True)
class WebRuntime:
    """The files of onnxruntime-web that a page needs.

    Attributes:
        version: of the package.
        script: a JavaScript module.
        wasm: the program that it runs.
    """

    version: str
    script: bytes
    wasm: bytes


def find_onnxruntime_web(directory: str | os.PathLike[str] | None = None) -> WebRuntime:
    """Read onnxruntime-web from the directory of the npm package.

    Args:
        directory: `node_modules/onnxruntime-web` if not given.

    Raises:
        UserError: it is not there, is another package, or lacks a file.
    """
    path = DIRECTORY if directory is None else pathlib.Path(directory)
    where = f"--onnxruntime_web={path}"
    if not (path / "package.json").is_file():
        if (path / DIRECTORY).is_dir():
            raise UserError(f"{where} is not the package itself; did you mean {path / DIRECTORY}?")
        elsewhere = "" if directory is None else ", or leave the flag out"
        raise UserError(f"--format=html needs {NAME}, which is not in {path}: {INSTALL}{elsewhere}")
    try:
        package = json.loads((path / "package.json").read_bytes())
        name, version = package.get("name"), str(package.get("version"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'package.json'} cannot be read ({reason(error)}): {INSTALL}") from error
    if name != NAME:
        raise UserError(f"{where} is the package {name}, not {NAME}: {INSTALL}")
    try:
        script, wasm = ((path / file).read_bytes() for file in (SCRIPT, WASM))
    except OSError as error:
        raise UserError(
            f"{path} (version {version}) has no {pathlib.Path(str(error.filename)).relative_to(path)} "
            f"({error.strerror}): {INSTALL}@latest"
        ) from error
    if not wasm.startswith(b"\0asm") or b"InferenceSession" not in script:
        raise UserError(f"{path} (version {version}) is damaged: {INSTALL}")
    return WebRuntime(version, script, wasm)
