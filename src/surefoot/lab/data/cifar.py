"""CIFAR-10: its makers' pickles (folder, archive or download), or sheets of lossless JPEG XL, half the size.

The pickles carry published checksums, each of which is compared before anything is unpickled. The sheets' checksums are
of the decoded arrays: the training split is that of the pickles, in their order; the test split is in an order of its own
(image i is of class i mod 10) and 20 of its 10,000 images are lossy copies, so it has a checksum of its own, and losses on
it differ from those on the pickles' by what 20 images can do.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surefoot.lab.data.places import DataSet, Images, Places, Split, read_bytes
from surefoot.lab.errors import UserError

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batch:
    """One of the makers' pickles: a dictionary with ``data``, uint8 ``[N, 3 * side * side]``, and ``labels``."""

    name: str
    md5: str


@dataclass(frozen=True)
class Sheets:
    """One split as JPEG XL: square sheets of images, row by row; their labels are an array of ``labels.npz``."""

    name: str
    """Of the array; the sheets are ``<name>_00.jxl`` and so on."""
    number: int
    pixels: str
    """sha256 of the decoded images."""
    labels: str
    """sha256 of the labels."""


@dataclass(frozen=True, kw_only=True)
class CifarSet(DataSet):
    """A data set of small square RGB images, in either form."""

    url: str
    """Of the archive with the makers' pickles."""
    md5: str
    """Of that archive: only what a download is checked against."""
    folder: str
    """In the archive."""
    train: tuple[Batch, ...]
    test: tuple[Batch, ...]
    train_sheets: Sheets
    test_sheets: Sheets
    side: int = 32
    """Pixels along an image's side."""
    across: int = 50
    """Images along a sheet's side."""

    def load(self, places: Places) -> Images:
        archive = self.url.rpartition("/")[2]
        pickled, sheet = self.train[0].name, f"{self.train_sheets.name}_00.jxl"
        found = places.find((f"{self.folder}/{pickled}", pickled, archive, sheet))
        if found is not None and found.name == sheet:
            return self._from_sheets(found.parent, places.cache)
        if found is not None and found.name == pickled:
            return self._from_pickles(lambda name: read_bytes(found.parent / name), found.parent)
        missing = f"{self.folder}/, {archive} or {sheet}"
        path = found or places.download(self.url, self.md5, missing=missing)
        members = _members(path, [f"{self.folder}/{batch.name}" for batch in (*self.train, *self.test)])
        return self._from_pickles(lambda name: members[f"{self.folder}/{name}"], path)

    def _from_pickles(self, content: Callable[[str], bytes], origin: Path) -> Images:
        def split(batches: Sequence[Batch]) -> Split:
            parts = [self._unpickled(batch, content(batch.name), origin) for batch in batches]
            return np.concatenate([pixels for pixels, _ in parts]), np.concatenate(
                [kept for _, kept in parts]
            )

        return Images(train=split(self.train), test=split(self.test))

    def _unpickled(self, batch: Batch, raw: bytes, origin: Path) -> Split:
        """One batch: red, green and blue planes become pixels."""
        damaged = UserError(
            f"{origin} is damaged or another data set's: the content of {batch.name} is not the published one."
        )
        if hashlib.md5(raw, usedforsecurity=False).hexdigest() != batch.md5:
            raise damaged
        kept = read_plain(raw, f"{batch.name} of {origin}")
        try:
            planes = np.asarray(kept[b"data"]).reshape(-1, 3, self.side, self.side)
            labels = np.asarray(kept[b"labels"], dtype=np.uint8)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise damaged from None
        if planes.dtype != np.uint8 or labels.shape != planes.shape[:1]:
            raise damaged
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels

    def _from_sheets(self, folder: Path, cache: Path) -> Images:
        path = folder / "labels.npz"
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
                kept = {part.name: arrays[part.name] for part in (self.train_sheets, self.test_sheets)}
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: it does not hold the labels of both splits.") from None

        def split(part: Sheets) -> Split:
            labels = kept[part.name]
            if _sha256(labels) != part.labels:
                raise UserError(
                    f"{path} is damaged or another data set's: its labels are not the published ones."
                )
            return self._pixels(part, folder, cache), labels

        return Images(train=split(self.train_sheets), test=split(self.test_sheets))

    def _pixels(self, part: Sheets, folder: Path, cache: Path) -> Bytes:
        """The images of a split, decoded once: the cache holds them under their checksum."""
        path = cache / f"{part.name}-{part.pixels[:16]}.npy"
        try:
            pixels = np.load(path, allow_pickle=False)
            if _sha256(pixels) == part.pixels:
                return pixels
        except (OSError, ValueError, EOFError):
            pass  # not there, or cut off
        sheets = [folder / f"{part.name}_{i:02d}.jxl" for i in range(part.number)]
        pixels = np.concatenate([self._decoded(sheet) for sheet in sheets])
        if _sha256(pixels) != part.pixels:
            raise UserError(
                f"{folder} is damaged or another data set's: {sheets[0].name} to {sheets[-1].name} do not hold the "
                f"published images of {self.name}."
            )
        _keep(pixels, path)
        return pixels

    def _decoded(self, sheet: Path) -> Bytes:
        try:
            from imagecodecs import jpegxl_decode
        except ImportError:
            raise UserError(
                f"{sheet} is a JPEG XL image, which needs the package imagecodecs: pip install 'surefoot[jxl]'."
            ) from None
        across, side = self.across, self.side
        try:
            tiles = jpegxl_decode(read_bytes(sheet)).reshape(across, side, across, side, 3)
        except (OSError, ValueError, RuntimeError):
            raise UserError(
                f"{sheet} is damaged: it is no sheet of {across} x {across} images of {side} x {side} pixels."
            ) from None
        return tiles.swapaxes(1, 2).reshape(-1, side, side, 3)


CIFAR10 = CifarSet(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train=(
        Batch("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        Batch("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        Batch("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        Batch("data_batch_4", "634d18415352ddfa80567beed471001a"),
        Batch("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=(Batch("test_batch", "40351d587109b95175f43aff81a1287e"),),
    train_sheets=Sheets(
        "train",
        20,
        pixels="47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        labels="2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    ),
    test_sheets=Sheets(
        "test",
        4,
        pixels="b861820f36f7b5f96222a6719786bf679428cb6edb65bd1d62c46f47b52dd8aa",
        labels="f24756e9fc27107597cd054b9df7247b4e5ab61780d1e5d55e7b1015307573de",
    ),
)


def read_plain(raw: bytes, what: str) -> Any:
    """Unpickle dictionaries, lists, numbers, bytes and NumPy arrays, and nothing that could run code.

    Python 2's strings come as bytes. ``what`` is named in the error.

    Raises:
        UserError: it is no pickle, or one of something else.
    """
    try:
        return _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception:  # a damaged pickle can fail in any way
        raise UserError(f"{what} is damaged, or holds more than arrays and plain values.") from None


def _dtype(kind: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """Old pickles have 0 and 1 for the two flags, which NumPy no longer likes."""
    return np.dtype(kind, align=bool(align), copy=bool(copy))


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # NumPy's own function, wherever this version keeps it
_PLAIN = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}
"""All that a pickle may name."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not plain") from None


def _members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Files of a packed archive, in memory: nothing is written where an archive says."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in names else None
                if file is not None:
                    found[member.name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        raise UserError(f"{path} is damaged or half-downloaded: it cannot be unpacked.") from None
    for name in names:
        if name not in found:
            raise UserError(f"{path} is damaged or another data set's: it holds no {name}.")
    return found


def _sha256(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _keep(array: npt.NDArray[Any], path: Path) -> None:
    """Into the cache in one piece; a cache that can't be written costs time, not the run."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
