"""Runs on a Ray cluster, or on a local one that is started for the while.

Ray is imported when a cluster is entered, and not before. Specifications travel to the workers and results back, as bytes;
the driver alone writes the store.
"""

from __future__ import annotations

import ast
import os
import pickle
import platform
import re
import signal
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from surefoot._version import __version__
from surefoot.lab import worker
from surefoot.lab.engines import SEPARATE
from surefoot.lab.errors import UserError
from surefoot.lab.executor import Executor, Pool, usable_cores
from surefoot.lab.runs import NUMERICS
from surefoot.lab.worker import Job, Reply, Room

_INSTALL = "install it by: pip install 'surefoot[ray]'"
_OBJECT_STORE = 100 * 2**20
"""Bytes, near the least that Ray takes: results are small, and Ray would set aside a third of the memory."""


def cluster_address(on: str) -> str | None:
    """The address of the cluster that ``--on`` names; ``None``: a local one is to be started.

    ``ray`` is the cluster that ``RAY_ADDRESS`` names, as Ray does for the programs that it starts, or else a local one.

    Raises:
        UserError: it names no cluster, or Ray is not installed.
    """
    if not re.fullmatch(r"ray(://[^/\s]+:[0-9]+)?", on):
        raise UserError(f"--on is {on!r}; it must be ray, for a local cluster, or ray://HOST:PORT.")
    if find_spec("ray") is None:
        raise UserError(f"--on {on} needs the Python package ray; {_INSTALL}.")
    return on if on != "ray" else os.environ.get("RAY_ADDRESS") or None


class RayCluster(Pool):
    """A pool of Ray actors for one task, one thread in each; the numbers are those of runs here.

    An actor takes one of its machine's CPUs and, where the device is a GPU, one of its GPUs, or the share of one that
    lets as many run as ``workers`` asks for. Actors that the cluster has no room for yet are waited for while the others
    work; what was done on a machine that is lost is done again elsewhere.

    A task's file travels, with the modules that it imports from its own folder. Whatever else it needs, data included,
    must be found by the workers.

    Args:
        address: ``"ray://HOST:PORT"``, or any other address that ``ray.init`` takes; ``None``: a local cluster is started,
            and ended with the ``with`` statement. If the program is connected to Ray already, that connection is used.
        task_ref: a task's name, or ``"path/to/file.py:function"``.
        data: the folder of ``--data``, by a path that is good on every machine of the cluster.
        device: ``"cpu"`` or ``"cuda"``.
        workers: number of actors at most; ``None``: as many as the cluster has room for when it is entered.
        engine: how many runs are trained together, one of :data:`surefoot.lab.engines.ENGINES`.

    Raises:
        UserError: the task's file cannot be read, or the device is one particular GPU; in the ``with`` statement: Ray
            cannot be imported, or the cluster not be used.
    """

    tries = 4  # machines may be lost for reasons that have nothing to do with the run
    batch_seconds = 1.0  # each answer crosses a network

    def __init__(
        self,
        address: str | None,
        task_ref: str,
        data: Path | None = None,
        device: str = "cpu",
        workers: int | None = None,
        engine: str = SEPARATE,
    ) -> None:
        super().__init__(workers or usable_cores(), engine)
        if ":" in device:
            raise UserError(
                f"--device is {device!r}, but on Ray each worker is given its GPU; use --device cuda."
            )
        self._address = address
        self._wanted = workers
        self._gpu = device != "cpu"
        data = None if data is None else data.absolute()
        self._shipment = pickle.dumps(Shipment.of(task_ref, data, device))
        self._connected_here = False
        self._ray: ModuleType
        self._actor: Any

    def __enter__(self) -> Executor:
        try:
            import ray
        except ImportError as error:
            raise UserError(f"Ray cannot be imported ({error}); {_INSTALL}.") from error
        self._ray = ray
        try:
            if not ray.is_initialized():
                self._connect()
            with self._asking():
                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
                needs = self._needs(nodes)
                self.workers = self._wanted or self._room_for(needs, nodes)
                self._actor = ray.remote(max_restarts=0, max_task_retries=0, **needs)(_Actor)
        except BaseException:
            self.close()
            raise
        return super().__enter__()

    def close(self) -> None:
        """End every worker at once, and the connection, if it was made here."""
        super().close()
        if self._connected_here:
            self._connected_here = False
            with suppress(Exception):  # a cluster that is gone
                self._ray.shutdown()

    def _connect(self) -> None:
        options: dict[str, Any] = {"address": self._address, "log_to_driver": False, "logging_level": "ERROR"}
        if self._address is None:
            options["address"] = "local"
            options.update(num_cpus=self.workers, include_dashboard=False, object_store_memory=_OBJECT_STORE)
            # Nobody asked for a cluster that tells Ray's makers that it is there.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._connected_here = True
        hint = "; does it run there, and if it asks for a token, is RAY_AUTH_MODE=token set here?"
        sentences = self._sentences("." if self._address is None else hint)
        with sentences, _signal_handlers_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is raised, too
            self._ray.init(**options)

    def _needs(self, nodes: list[Mapping[str, float]]) -> dict[str, Any]:
        """What an actor takes of its machine, as options of Ray."""
        if not self._gpu:
            return {"num_cpus": 1}
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        to_each = -(-self._wanted // gpus) if self._wanted and gpus else 1  # so many workers share a GPU
        return {"num_cpus": 1, "num_gpus": 1 / to_each}

    def _room_for(self, needs: Mapping[str, Any], nodes: list[Mapping[str, float]]) -> int:
        """How many actors there is room for, as if nobody else used the cluster."""
        kinds = {"num_cpus": "CPU", "num_gpus": "GPU"}
        room = sum(min(int(node.get(kinds[of], 0) / share) for of, share in needs.items()) for node in nodes)
        if room == 0:
            raise UserError(
                f"The Ray cluster{self._at} has no machine with a {'GPU' if self._gpu else 'CPU'} for a worker; if it "
                "grows on demand, say by --workers how far."
            )
        return room

    def _start(self) -> _RayWorker:
        return _RayWorker(self)

    def _speaking(self, workers: Collection[_RayWorker]) -> Iterable[_RayWorker]:
        by_answer = {member.answer: member for member in workers}
        with self._asking():
            ready, _ = self._ray.wait(list(by_answer))
        return [by_answer[answer] for answer in ready]

    @property
    def _at(self) -> str:
        return "" if self._address is None else f" at {self._address}"

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """For what needs the connection, which Ray would not do without but make anew, to whatever cluster there is."""
        lost = f"The connection to the Ray cluster{self._at} is lost."
        if not self._ray.is_initialized():
            raise UserError(lost)
        with self._sentences():
            try:
                yield
            except ConnectionError as error:
                raise UserError(lost) from error

    @contextmanager
    def _sentences(self, end: str = ".") -> Iterator[None]:
        """Turns what Ray complains of into one sentence for the user."""
        try:
            yield
        except UserError:
            raise
        except (self._ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            if reason.endswith(":"):  # a traceback follows
                reason += f" {lines[-1]}"
            raise UserError(f"The Ray cluster{self._at} cannot be used: {reason.rstrip('.')}{end}") from error


class _RayWorker:
    """The driver's end of one actor."""

    def __init__(self, cluster: RayCluster) -> None:
        self.up = False
        self._cluster = cluster
        self._end = ""
        with cluster._asking():
            self._actor = cluster._actor.remote(cluster._shipment)
            self.answer = self._actor.begin.remote((__version__, NUMERICS))

    def send(self, job: Job) -> None:
        with self._cluster._asking():
            self.answer = self._actor.answer.remote(pickle.dumps(job))

    def receive(self) -> Reply | None:
        ray = self._cluster._ray
        gone = (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.OutOfMemoryError,
        )
        with self._cluster._asking():
            try:
                reply = pickle.loads(ray.get(self.answer))
            except gone as error:
                self._end = _death(str(error))
                if "creation task" in str(error):  # there was a machine for it, but no surefoot
                    raise UserError(
                        f"No worker can be started on the Ray cluster{self._cluster._at}; is surefoot[ray] {__version__} "
                        f"installed in its Python? ({self._end})"
                    ) from error
                return None
        self.up = True
        return reply

    def death(self) -> str:
        return self._end

    def kill(self) -> None:
        with suppress(Exception), self._cluster._asking():  # it may be gone, and the cluster with it
            self._cluster._ray.kill(self._actor)


def _death(text: str) -> str:
    """How an actor died, out of the many lines that Ray writes about it."""
    if "creation task" in text:
        return text.strip().splitlines()[-1]
    if "connection error code" in text:  # its connection broke: it had no time to say why
        return "as if ended by SIGKILL"
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.strip().partition("\n")[0].rstrip(".")


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """``ray.init`` takes SIGTERM for itself; a program's way to end is its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ what is shipped


@dataclass(frozen=True)
class Shipment:
    """What a worker on another machine is given to make its room of.

    Attributes:
        task_ref: the task as the user wrote it.
        files: contents by path, of the task's file, named first, and of its own modules; empty for a task of surefoot's.
        data: the folder of ``--data``, absolute.
        device: where the tensors live.
    """

    task_ref: str
    files: Mapping[str, bytes]
    data: Path | None
    device: str

    @classmethod
    def of(cls, task_ref: str, data: Path | None, device: str) -> Shipment:
        """Reads what is to be shipped.

        Raises:
            UserError: the task's file cannot be read.
        """
        path, _, _ = task_ref.rpartition(":")
        if not path.endswith(".py"):
            return cls(task_ref, {}, data, device)
        try:
            return cls(task_ref, _with_own_modules(Path(path)), data, device)
        except OSError as error:
            raise UserError(f"Task file {path} cannot be read: {error.strerror}.") from None

    def unpack(self, folder: Path) -> Room:
        """Writes the files into ``folder`` and makes a room of them."""
        if not self.files:
            return Room(self.task_ref, self.data, self.device)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        function = self.task_ref.rpartition(":")[2]
        return Room(f"{folder / next(iter(self.files))}:{function}", self.data, self.device)

    def as_written(self, message: str, folder: Path) -> str:
        """A message about files in ``folder`` with the names that they have for the user."""
        for name in self.files:
            message = message.replace(str(folder / name), str(Path(self.task_ref).parent / name))
        return message


def _with_own_modules(path: Path) -> dict[str, bytes]:
    """Contents, by path in its folder, of a file and of the modules there that it imports, and that they import.

    Told from the source: what is imported by a computed name is not found. Of a package, every module is taken.
    """
    folder = path.parent
    found = {path.name: path.read_bytes()}
    unread = [path.name]
    while unread:
        for name in _imported(found[unread.pop()]):
            package = folder / name
            for file in [folder / f"{name}.py", *sorted(package.rglob("*.py"))]:
                inside = str(file.relative_to(folder))
                if inside not in found and file.is_file():
                    found[inside] = file.read_bytes()
                    unread.append(inside)
    return found


def _imported(source: bytes) -> set[str]:
    """The first parts of the names of the modules that a source imports, but for those of its own package."""
    try:
        tree = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):  # the worker will say so
        return set()
    names: set[str] = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


# ---------------------------------------------------------------------------------------------------- the worker's side


class _Actor:
    """What Ray runs: a worker in a process of its own, somewhere."""

    def __init__(self, shipment: bytes) -> None:
        self._shipment: Shipment = pickle.loads(shipment)
        self._folder = _folder()
        self._room = self._shipment.unpack(self._folder)

    def begin(self, surefoot: tuple[str, int]) -> bytes:
        """Says that it can be given jobs, or why not."""
        return pickle.dumps(self._ready(surefoot))

    def answer(self, job: bytes) -> bytes:
        """Does a job."""
        kind, value = worker.answer(self._room, pickle.loads(job))
        if kind != "done":
            value = self._shipment.as_written(value, self._folder)
        return pickle.dumps((kind, value))

    def _ready(self, surefoot: tuple[str, int]) -> Reply:
        here = f"the Ray worker on {platform.node()}"
        if (__version__, NUMERICS) != surefoot:
            return "refused", f"There is surefoot {surefoot[0]} here, but {__version__} for {here}."
        if self._room.data is not None and not self._room.data.is_dir():
            where = "the same path must be good on every machine of the cluster"
            return "refused", f"--data is {str(self._room.data)!r}, which is no folder for {here}; {where}."
        try:
            worker.begin()
        except ImportError as error:
            return "refused", f"{here.capitalize()} cannot work: {error}; install surefoot[lab] there."
        return "done", None


def _folder() -> Path:
    """A new folder of this worker's, where the files of its cluster are, for it may end without a chance to remove it."""
    import ray

    context = ray.get_runtime_context()
    session = Path(context.get_temp_dir(), context.get_session_name())
    return Path(tempfile.mkdtemp(prefix="surefoot-", dir=session))
