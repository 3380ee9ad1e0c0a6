"""The weights of an export in safetensors files: written one tensor at a time, read by name.

Up to MAX_FILE_BYTES the weights are one file, model.safetensors. Larger weights are several files, such as
model-00001-of-00003.safetensors, and model.safetensors.index.json, which maps each tensor to its file; the layout is that of
Hugging Face's models.
The index is removed before the files are replaced and written after them, so an index always fits its files.

The safetensors library writes a file only from a dict of all its tensors. This module writes the same bytes tensor by tensor,
so that the memory of rank 0 does not have to hold the model.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hpc import dist
from hpc.run.rundir import atomic_write, fsync_dir

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 4 * 10**9


def write(
    folder: Path, shapes: dict[str, torch.Size], tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes tensors as fp32. Rank 0 writes; the other ranks only take part in making the tensors. Collective.

    Args:
        folder: The folder; earlier weights in it are replaced.
        shapes: Name → shape of each tensor.
        tensors: (name, tensor), in the order of sorted(shapes). Each tensor is used before the next is asked for.
        max_bytes: Largest size of one file's tensors.

    Raises:
        OSError: On rank 0, a file cannot be written. The other ranks raise LeaderFailed.
    """
    files = _divide(shapes, max_bytes)
    writer = _Writer(folder, shapes, files) if dist.rank() == 0 else None
    error: OSError | None = None
    for name, tensor in tensors:
        if writer and not error:
            # The other ranks wait for rank 0 in the next gather, so rank 0 goes through all tensors even if the disk is full.
            try:
                writer.add(name, tensor)
            except OSError as raised:
                error = raised
    dist.run_on_leader(_finish, writer, error)


def _divide(shapes: dict[str, torch.Size], max_bytes: int) -> dict[str, list[str]]:
    """Divides the tensors among files. Returns file name → names of its tensors, sorted."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes):
        number = 4 * math.prod(shapes[name])
        if parts[-1] and size + number > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += number
    if len(parts) == 1:
        return {ONE_FILE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


class _Writer:
    """Writes the tensors into temporary files; commit() gives the files their names."""

    def __init__(self, folder: Path, shapes: dict[str, torch.Size], files: dict[str, list[str]]):
        self.folder, self.shapes, self.files = folder, shapes, files
        self.file_of = {name: file for file, names in files.items() for name in names}
        self.open: str | None = None  # the file that is being written
        self.stream = None

    def _temporary(self, file: str) -> Path:
        return self.folder / f".{file}.tmp"

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor to its file."""
        if self.file_of[name] != self.open:
            self.close()
            self.open = self.file_of[name]
            self.folder.mkdir(parents=True, exist_ok=True)
            self.stream = open(self._temporary(self.open), "wb")  # noqa: SIM115 — closed by close()
            self.stream.write(_header({name: self.shapes[name] for name in self.files[self.open]}))
        assert tensor.shape == self.shapes[name], f"{name} is {tuple(tensor.shape)}, not {tuple(self.shapes[name])}"
        self.stream.write(tensor.detach().float().cpu().contiguous().numpy().data)

    def close(self) -> None:
        """Flushes the file that is being written to the disk."""
        if self.stream:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
            self.stream = None

    def commit(self) -> None:
        """Replaces the earlier weights by the new files."""
        self.close()
        (self.folder / INDEX).unlink(missing_ok=True)
        for file in self.files:
            os.replace(self._temporary(file), self.folder / file)
        for path in self.folder.glob("model*.safetensors"):
            if path.name not in self.files:
                path.unlink()
        fsync_dir(self.folder)
        if len(self.files) > 1:
            size = sum(4 * math.prod(shape) for shape in self.shapes.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self.file_of.items()))}
            atomic_write(self.folder / INDEX, json.dumps(index, indent=1).encode() + b"\n")

    def remove(self) -> None:
        """Removes the temporary files."""
        for file in self.files:
            self._temporary(file).unlink(missing_ok=True)


def _header(shapes: dict[str, torch.Size]) -> bytes:
    """Returns the first bytes of a safetensors file: the length of the JSON, and the JSON padded to 8 bytes."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _finish(writer: _Writer, error: OSError | None) -> None:
    if error:
        writer.remove()
        raise error
    writer.commit()


def files(folder: Path) -> list[Path]:
    """Returns the files that hold the weights, in order. Raises FileNotFoundError if the folder holds no complete weights."""
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    if not (folder / ONE_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no weights: neither {ONE_FILE} nor {INDEX}")
    return [folder / ONE_FILE]


def read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and value of each tensor. The value is mapped from the file, and read when it is used."""
    for path in files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 — safe_open is no dict
                yield name, file.get_tensor(name)


def load_into(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """Builds a module from weights, without memory for other weights. The weights are mapped from the files.

    Args:
        build: Builds the module.
        folder: The folder of the weights.

    Raises:
        RuntimeError: The weights do not fit the module.
    """

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)
    try:
        module = build()
    finally:
        hook.remove()
    module.load_state_dict(dict(read(folder)), assign=True)
    return module


def total_bytes(folder: Path) -> int:
    """Returns the size of the weights in bytes."""
    return sum(path.stat().st_size for path in files(folder))


def sha256(folder: Path) -> str:
    """Returns the SHA-256 of the files' contents, one after the other, in hex."""
    digest = hashlib.sha256()
    for path in files(folder):
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()
