"""Where the files of a data set may lie, and how they are fetched where they do not."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from surefoot.lab.errors import UserError

ENVIRONMENT = "SUREFOOT_DATA"
"""The environment variable that names a data folder where ``--data`` does not."""

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""Images uint8 ``[N, height, width]`` (grey) or ``[N, height, width, 3]`` (RGB), and labels uint8 ``[N]``."""


@dataclass(frozen=True)
class Images:
    """Both splits of a data set, as its makers made them."""

    train: Split
    test: Split


@dataclass(frozen=True, kw_only=True)
class DataSet(ABC):
    """Images with a label each, split by their makers."""

    name: str
    packaged: Path | None = None
    """The folder in which a package of an operating system installs it."""

    @abstractmethod
    def load(self, places: Places) -> Images:
        """Both splits, from the first of the places that has them.

        Raises:
            UserError: a file is missing, damaged, not of this data set, or cannot be downloaded.
        """


@dataclass(frozen=True)
class Places:
    """Where the files of one data set are looked for, in this order."""

    name: str
    """Of the data set: in each folder, one of that name is looked into first."""
    folders: tuple[Path, ...]
    cache: Path
    """The data set's own folder for what was downloaded or took long to unpack."""
    asked: Path | None = None
    """The only folder, where the user named one: so that it is never passed over, nothing is downloaded either."""

    def find(self, files: Iterable[str]) -> Path | None:
        """The first of these files, each a name that will do, in the first folder that has one."""
        names = tuple(files)
        places = (place for folder in self.folders for place in (folder / self.name, folder))
        return next((path for place in places for name in names if (path := place / name).exists()), None)

    def download(self, url: str, md5: str, missing: str) -> Path:
        """Fetch a file, or find it whole from last time; ``missing`` is what a folder that was asked for lacks.

        pooch moves a download into place only when its hash agrees.
        """
        if self.asked is not None:
            raise UserError(
                f"--data {self.asked} holds no {missing} of {self.name}, neither itself nor in {self.name}/."
            )
        import pooch

        file = url.rpartition("/")[2]
        try:
            return Path(pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=self.cache))
        except ValueError:
            reason = "what came is not the published file"
        except OSError as error:  # the network's errors are OSErrors too
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"the server answered {status}" if status else error.strerror or type(error).__name__
        raise UserError(
            f"{url} cannot be downloaded to {self.cache} ({reason}); "
            f"put the files of {self.name} into a folder and name it with --data."
        )


def load_images(
    source: DataSet,
    folder: Path | None = None,
    *,
    cache: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Images:
    """A data set from ``folder``; without one from where ``SUREFOOT_DATA`` says, the system's package, or the network.

    In a folder, ``<folder>/<data set>/<file>`` and ``<folder>/<file>`` are tried. Files that had to be downloaded are
    kept in ``cache`` (default: the user's cache folder), and so is what took long to decode.

    Raises:
        UserError: a file is missing, damaged, not of this data set, or cannot be downloaded.
    """
    if folder is not None:
        folders = [_existing(folder, "--data")]
    else:
        named = environment.get(ENVIRONMENT)
        folders = [_existing(Path(named), ENVIRONMENT)] if named else []
        if source.packaged is not None:
            folders.append(source.packaged)
    return source.load(
        Places(source.name, tuple(folders), (cache or _users_cache()) / source.name, asked=folder)
    )


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def _users_cache() -> Path:
    import pooch

    return Path(pooch.os_cache("surefoot"))


def _existing(folder: Path, origin: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{origin} names {folder}, which is not a folder.")
    return folder
