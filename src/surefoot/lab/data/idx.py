"""MNIST and Fashion-MNIST: arrays of bytes behind a short header (IDX), packed with gzip or not."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from surefoot.lab.data.places import DataSet, Images, Places, Split, read_bytes
from surefoot.lab.errors import UserError

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTES = 0x08  # the only entry type that these data sets use


@dataclass(frozen=True)
class IdxFile:
    """One file of a data set, under its unpacked name."""

    name: str
    sha256: str
    """Of the unpacked bytes."""
    md5: str
    """Of the packed file (``name`` + ".gz") as its makers publish it: only what a download is checked against."""


@dataclass(frozen=True, kw_only=True)
class IdxSet(DataSet):
    """A data set of four files: images and labels of both splits."""

    url: str
    """Where ``IdxFile.name`` + ".gz" can be had, with the closing slash."""
    train: tuple[IdxFile, IdxFile]
    """Images and labels."""
    test: tuple[IdxFile, IdxFile]

    def load(self, places: Places) -> Images:
        def read(file: IdxFile) -> npt.NDArray[np.uint8]:
            path = places.find((file.name, f"{file.name}.gz")) or places.download(
                f"{self.url}{file.name}.gz", file.md5, missing=f"{file.name}[.gz]"
            )
            return read_idx(path, sha256=file.sha256)

        def split(files: tuple[IdxFile, IdxFile]) -> Split:
            return read(files[0]), read(files[1])

        return Images(train=split(self.train), test=split(self.test))


MNIST = IdxSet(
    name="mnist",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    train=(
        IdxFile(
            "train-images-idx3-ubyte",
            sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            md5="f68b3c2dcbeaaa9fbdd348bbdeb94873",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            md5="d53e105ee54ea40749a09fcbcd1e9432",
        ),
    ),
    test=(
        IdxFile(
            "t10k-images-idx3-ubyte",
            sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            md5="9fb629c4189551a2d022fa330f9573f3",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            md5="ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
)

FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    train=(
        IdxFile(
            "train-images-idx3-ubyte",
            sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            md5="8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            md5="25c81989df183df01b3e8a0aad5dffbe",
        ),
    ),
    test=(
        IdxFile(
            "t10k-images-idx3-ubyte",
            sha256="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            md5="bef4ecab320f06d8554ea6380940ec79",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            sha256="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            md5="bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    packaged=Path("/usr/share/datasets/fashion-mnist"),  # Debian's dataset-fashion-mnist
)


def read_idx(path: Path, sha256: str | None = None) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, packed with gzip or not, as an array of the shape that its header gives.

    The header is two zero bytes, the entry type, the number of axes, and each axis's length as 32 bits, big-endian.

    Raises:
        UserError: the file cannot be read, is damaged or cut off, is no IDX file of bytes, or has another ``sha256``.
    """
    raw = _unpacked(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTES:
        raise UserError(f"{path} is not an IDX file of bytes.")
    header = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:header], dtype=">u4") if len(raw) >= header else np.zeros(0, dtype=">u4")
    entries = math.prod(int(length) for length in shape)
    if len(shape) != raw[3] or len(raw) != header + entries:
        raise UserError(f"{path} is damaged or half-downloaded: its length does not agree with its header.")
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(
            f"{path} is damaged or another data set's file: its content is not the published one."
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape([int(length) for length in shape])


def _unpacked(path: Path) -> bytes:
    raw = read_bytes(path)
    try:
        # By content, not by name: browsers and proxies unpack files without renaming them.
        return gzip.decompress(raw) if raw.startswith(_GZIP_MAGIC) else raw
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path} is damaged or half-downloaded: it cannot be unpacked.") from None
