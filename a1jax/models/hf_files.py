"""Safetensors on disk: headers, rows of a tensor, shards with their index. The format is a JSON header and the raw bytes behind it
(https://huggingface.co/docs/safetensors); numpy's side of the safetensors library has no bfloat16 and maps whole files, whose pages
count as memory, so both directions are done here with plain reads and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np

from a1jax.config import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
CHUNK = 8 << 20  # bytes read or written at a time
LARGEST_HEADER = 100_000_000  # of the format


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file."""

    name: str
    file: pathlib.Path
    dtype: str  # as the format spells it: F32, BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    start: int  # byte of the file where it begins
    size: int  # bytes

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows [n, ...]) from row begin up to end, CHUNK bytes at a time. An array is good until the next one is asked for."""
        width = self.size // self.shape[0]
        step = max(1, CHUNK // width)
        buffer = bytearray(min(step, end - begin) * width)
        with open(self.file, "rb", buffering=0) as file:
            for row in range(begin, end, step):
                n = min(step, end - row)
                self._read(file, memoryview(buffer)[: n * width], row * width)
                yield row, np.frombuffer(buffer, DTYPES[self.dtype], n * width // DTYPES[self.dtype].itemsize).reshape(n, *self.shape[1:])

    def raw(self) -> Iterator[memoryview]:
        """Its bytes, CHUNK at a time, whatever they mean."""
        buffer = memoryview(bytearray(min(CHUNK, self.size)))
        with open(self.file, "rb", buffering=0) as file:
            for offset in range(0, self.size, CHUNK):
                part = buffer[: min(CHUNK, self.size - offset)]
                self._read(file, part, offset)
                yield part

    def _read(self, file, into: memoryview, offset: int) -> None:
        file.seek(self.start + offset)
        done = 0
        while done < len(into):
            got = file.readinto(into[done:])
            if not got:
                raise ConfigError(f"{self.file}: ends inside {self.name}; the file is cut off, fetch it again")
            done += got


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file by name. Raises ConfigError where it is not a safetensors file or is cut off."""
    broken = f"{file}: not a safetensors file (no header)"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            raise ConfigError(broken)
        if 8 + length > size:
            raise ConfigError(f"{file}: cut off in its header ({size} of at least {8 + length} bytes); fetch it again")
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = Stored(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(broken) from None
    needed = max((tensor.start + tensor.size for tensor in found.values()), default=0)
    if needed > size:
        raise ConfigError(f"{file}: cut off ({size} of {needed} bytes); fetch it again")
    for tensor in found.values():
        if tensor.dtype in DTYPES and math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize != tensor.size:
            raise ConfigError(f"{file}: {tensor.name} of {tensor.dtype} {list(tensor.shape)} does not have {tensor.size} bytes")
    return found


def read_folder(folder: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder by name, in the order they lie in. Reads headers only.

    Raises ConfigError where there is no checkpoint, a shard is missing or cut off, or the index and the shards tell different stories.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ConfigError(f"{folder}: neither {INDEX} nor {SINGLE} in it; weights are read from safetensors only")
        return _in_order(read_header(folder / SINGLE))
    try:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(places.values()))
        outside = [file for file in files if pathlib.PurePath(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder / INDEX}: no index of shards (a JSON object with weight_map: name -> file)") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or outside:
        raise ConfigError(f"{folder}: {INDEX} names files that are not there: {', '.join(outside or missing)}")
    found: dict[str, Stored] = {}
    wrong = []
    for file in files:
        header = read_header(folder / file)
        wrong += [f"{name} is not in {file}" for name, place in places.items() if place == file and name not in header]
        wrong += [f"{name} of {file} is not in the index" for name in header if name not in places]
        found.update({name: tensor for name, tensor in _in_order(header).items() if places.get(name) == file})
    if wrong:
        raise ConfigError(f"{folder}: {INDEX} does not fit its shards: {'; '.join(wrong)}")
    return found


def _in_order(header: dict[str, Stored]) -> dict[str, Stored]:
    return dict(sorted(header.items(), key=lambda item: item[1].start))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor to be written: ``data()`` gives its bytes in pieces, row-major and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    data: Callable[[], Iterable]


def write_folder(folder: pathlib.Path, entries: list[Entry], shard_bytes: int) -> None:
    """Writes the entries in shards of at most ``shard_bytes`` of weights (one larger tensor is a shard alone), and their index."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.size
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        places.update(dict.fromkeys((entry.name for entry in shard), file))
    index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: pathlib.Path, shard: list[Entry]) -> None:
    width = {entry.name: entry.size // max(1, math.prod(entry.shape)) for entry in shard}
    shard = sorted(shard, key=lambda entry: -width[entry.name])  # wide types first: every tensor is aligned to its own width
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # readers of torch ask for it
    offset = 0
    for entry in shard:
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size]}
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shard:
            for part in entry.data():
                file.write(part)


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, whose content becomes ``path`` when all went well and is gone when not, with the parents that were made
    for it: nothing half-written stays. A ``path`` that exists stays the folder it is: someone may be in it, a disk mounted on it.

    Raises ConfigError where ``path`` is a file or holds something, or where no folder can be made.
    """
    made = _begin(path)
    try:
        yield made[-1]
        _put(made[-1], path.resolve())
    except BaseException:
        _take_back(made)
        raise


def check_new(path: pathlib.Path) -> None:
    """Raises ConfigError where new_folder would, and leaves nothing: for those who have much to do before they write."""
    _take_back(_begin(path))


def _begin(path: pathlib.Path) -> list[pathlib.Path]:
    """Makes the folder to write into: inside ``path`` where that exists, else beside it. Returns all that it made, that folder last."""
    made: list[pathlib.Path] = []
    try:
        place = path.resolve()  # "." has no name, and a link is not to be replaced
        name = f".{place.name}.part"
        if place.exists() and (not place.is_dir() or any(child.name != name for child in place.iterdir())):
            raise ConfigError(f"{path}: exists and is not an empty folder; choose another or remove it")
        shutil.rmtree(place.parent / name, ignore_errors=True)  # of a killed process
        shutil.rmtree(place / name, ignore_errors=True)
        part = (place if place.exists() else place.parent) / name
        for folder in (*reversed(part.parents), part):
            if not folder.is_dir():
                folder.mkdir()
                made.append(folder)
    except OSError as error:
        _take_back(made)
        raise ConfigError(f"{path}: no folder can be made there ({error.filename}: {error.strerror}); choose another") from None
    return made


def _put(part: pathlib.Path, path: pathlib.Path) -> None:
    if part.parent != path:
        part.rename(path)
        return
    for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".json"):  # last what makes the others a model
        file.rename(path / file.name)
    part.rmdir()


def _take_back(made: list[pathlib.Path]) -> None:
    """Removes what _begin made; of the parents only those that nobody else uses by now."""
    for folder in made[-1:]:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for folder in reversed(made[:-1]):
            folder.rmdir()
