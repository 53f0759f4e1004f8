"""What came out: every finished run in one table of one database, SQLite by default, any SQLAlchemy URL otherwise."""

from __future__ import annotations

import json
import math
import os.path
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult

SCHEMA = 1
"""Raised when the tables change; a store of another schema is refused, never converted behind the user's back."""

_CHUNK = 500  # keys in one query: databases limit the number of parameters
_NOT_FINITE = "$float"  # JSON knows no infinity: {"$float": "inf"}; no setting can be named so

_metadata = sa.MetaData()
_schema = sa.Table("surefoot_schema", _metadata, sa.Column("version", sa.Integer, nullable=False))
_runs = sa.Table(
    "surefoot_runs",
    _metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("task", sa.String(255), nullable=False, index=True),
    sa.Column("optimizer", sa.String(255), nullable=False),
    sa.Column("rate", sa.Double, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("saved", sa.DateTime(timezone=True), nullable=False),
    sa.Column("record", sa.Text, nullable=False),  # all of the RunResult, as JSON
)

_SENTENCES = {  # what SQLite says, in lower case: what the user reads after the store's name
    "not a database": "is not a store, for the file is no SQLite database",
    "malformed": "is damaged; restore it from a copy, or give --store another file",
    "locked": "is locked by another program; close that program, or give --store another file",
    "readonly": "cannot be written, for it is read-only; give --store another file",
    "unable to open": "cannot be opened; check that its folder exists and may be written",
    "disk is full": "cannot grow, for the disk is full; what it holds is kept",
    "disk i/o error": "cannot be read or written, for its disk reports an error",
}


class Store:
    """The finished runs in one database, each under its key.

    Opening reads what is there and never writes: a file that does not exist yet is an empty store, made by
    :meth:`create` or by the first :meth:`save`.

    Args:
        url: a SQLAlchemy URL, or a path, which is taken as a SQLite file.
        timeout: seconds to wait for a SQLite file that another process is writing.

    Raises:
        UserError: (here and in every method) the database cannot be used; one sentence says why and where.
    """

    def __init__(self, url: str | Path, *, timeout: float = 20.0) -> None:
        self.name, parsed = _parse(url)
        """The store as a person reads it: the path, or the URL without its password."""
        self._file = _sqlite_file(parsed)
        self.lasting = not _vanishes(parsed)
        """Whether the runs are there after :meth:`close`; SQLite can hold a database in memory."""
        arguments = {"timeout": timeout} if parsed.get_backend_name() == "sqlite" else {}
        try:
            self._engine = sa.create_engine(parsed, connect_args=arguments)
        except ArgumentError:
            raise UserError(
                f"The store {self.name} names a kind of database that SQLAlchemy does not know."
            ) from None
        except ImportError as error:
            raise UserError(
                f"The store {self.name} needs the Python package {error.name}; install it."
            ) from None
        if parsed.get_backend_name() == "sqlite":
            _take_over_transactions(self._engine)
        self._exists = False
        with self._closed_on_failure():
            self._look()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    def create(self) -> None:
        """Makes the database and its tables where they are missing, and makes sure that they can be written now."""
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"The folder of the store {self.name} cannot be made: {error.strerror}."
                ) from None
        with self._writing() as connection:
            if self._has_tables(connection):  # looked up again: another process may have made them
                connection.execute(_schema.update().values(version=SCHEMA))  # a read-only database refuses it
            else:
                _metadata.create_all(connection)
                connection.execute(_schema.insert().values(version=SCHEMA))
        self._exists = True

    def save(self, result: RunResult) -> None:
        """Stores a run in one transaction. A key that is there already keeps what it has."""
        if result.status not in ("finished", "diverged"):
            raise ValueError(
                f"only runs that came to their end are stored, not one that is {result.status!r}"
            )
        if not self._exists:
            self.create()
        spec = result.spec
        row = {
            "key": spec.key,
            "task": spec.task,
            "optimizer": spec.optimizer,
            "rate": spec.rate,
            "seed": spec.seed,
            "status": result.status,
            "saved": datetime.now(timezone.utc),
            "record": json.dumps(_encode(result.to_dict()), allow_nan=False, separators=(",", ":")),
        }
        try:
            with self._writing() as connection:
                connection.execute(_runs.insert().values(row))
        except IntegrityError:  # the key: someone else ran it meanwhile, and its numbers are as good
            if spec.key not in self:
                raise

    def __contains__(self, key: str) -> bool:
        return bool(self.keys([key]))

    def keys(self, among: Iterable[str] | None = None) -> set[str]:
        """The keys that are stored: all of them, or those of ``among``."""
        return {key for (key,) in self._select([_runs.c.key], among)}

    def load(self, keys: Iterable[str]) -> dict[str, RunResult]:
        """The runs of those of ``keys`` that are stored, by key."""
        return {
            key: self._decode(key, record)
            for key, record in self._select([_runs.c.key, _runs.c.record], keys)
        }

    def all(self, task: str | None = None) -> list[RunResult]:
        """Every stored run, or those of one task, by optimizer, rate and seed."""
        where = [] if task is None else [_runs.c.task == task]
        query = sa.select(_runs.c.key, _runs.c.record).where(*where)
        query = query.order_by(_runs.c.task, _runs.c.optimizer, _runs.c.rate, _runs.c.seed, _runs.c.key)
        return [self._decode(key, record) for key, record in self._rows(query)]

    def _select(self, columns: list[sa.Column[Any]], keys: Iterable[str] | None) -> Iterator[tuple[Any, ...]]:
        if keys is None:
            yield from self._rows(sa.select(*columns))
            return
        remaining = iter(keys)
        while chunk := list(islice(remaining, _CHUNK)):
            yield from self._rows(sa.select(*columns).where(_runs.c.key.in_(chunk)))

    def _rows(self, query: sa.Executable) -> list[tuple[Any, ...]]:
        if not self._exists and not self._look():  # another process may have made it since
            return []
        with self._sentences(), self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def _look(self) -> bool:
        """Whether there are tables; refuses what is not a store of this schema."""
        if self._file is not None and self._file.is_dir():
            raise UserError(f"The store {self.name} is a folder; name a file in it.")
        if self._file is not None and not os.path.exists(self._file):  # unlike Path.exists, never raises
            return False  # connecting would make an empty file
        with self._sentences(), self._engine.connect() as connection:
            self._exists = self._has_tables(connection)
        return self._exists

    def _has_tables(self, connection: sa.Connection) -> bool:
        names = set(sa.inspect(connection).get_table_names())
        if _schema.name not in names:
            if _runs.name in names:
                raise UserError(
                    f"The store {self.name} has a table {_runs.name} of unknown origin; give --store another."
                )
            return False
        version = connection.scalar(sa.select(_schema.c.version))
        if version != SCHEMA:
            raise UserError(
                f"The store {self.name} has schema {version} and this surefoot reads schema {SCHEMA}; "
                "use the release that wrote it, or give --store another file."
            )
        return True

    def _decode(self, key: str, record: str) -> RunResult:
        try:
            plain = json.loads(record, object_hook=_decode_object)
            settings = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in plain["spec"]["settings"].items()
            }
            return RunResult.from_dict({**plain, "spec": {**plain["spec"], "settings": settings}})
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"The store {self.name} is damaged at run {key}; restore it, or give --store another."
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._sentences(), self._engine.execution_options(surefoot_write=True).begin() as connection:
            yield connection

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turns what the database complains of into one sentence for the user."""
        try:
            yield
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            for symptom, sentence in _SENTENCES.items():
                if symptom in reason.lower():
                    raise UserError(f"The store {self.name} {sentence}.") from error
            raise UserError(f"The store {self.name} cannot be used: {reason.rstrip('.')}.") from error


def _parse(url: str | Path) -> tuple[str, sa.URL]:
    """What a person reads and what SQLAlchemy opens."""
    text = str(url)
    if not text.strip():
        raise UserError(
            "--store is empty; give a file, or a database URL such as postgresql://user@host/name."
        )
    if "://" not in text:
        return text, sa.URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        parsed = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise UserError(
            "--store is no database URL; write it as sqlite:///runs.sqlite or postgresql://user@host/name."
        ) from None
    return parsed.render_as_string(hide_password=True), parsed


def _sqlite_file(url: sa.URL) -> Path | None:
    """The file behind a SQLite URL; ``None`` for a database in memory or of another kind."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return None if url.database.startswith("file:") else Path(url.database)


def _vanishes(url: sa.URL) -> bool:
    """Whether SQLite drops the database when it is closed: it is in memory, or a temporary file without a name."""
    if url.get_backend_name() != "sqlite":
        return False
    if not url.database or url.database == ":memory:":
        return True
    return url.database.startswith("file:") and (
        url.database.startswith("file::memory:") or "memory" in (url.query.get("mode"), url.query.get("vfs"))
    )


def _take_over_transactions(engine: sa.Engine) -> None:
    """Has SQLite transactions begin where SQLAlchemy says so, and those that write take their lock at once.

    Python's sqlite3 begins them late and around some statements only, so that two processes could both find the
    tables missing, or wait for each other's lock until one of them is refused.
    """

    @event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("surefoot_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: repr(value)}
    return value


def _decode_object(record: dict[str, Any]) -> Any:
    if record.keys() == {_NOT_FINITE}:
        return float(record[_NOT_FINITE])
    return record
