"""What came out: every finished run in one table of one database, SQLite by default, any SQLAlchemy URL otherwise.

Beside them: the trials of every search, and who is at which run (:mod:`surefoot.lab.leases`).
"""

from __future__ import annotations

import json
import math
import os.path
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult, SearchSpec, Trial, Value

SCHEMA = 1
"""Raised when a table changes; a store of another schema is refused, never converted behind the user's back. Tables that
are new in a release are added to a store that has none of them, and older releases do not mind them."""

_CHUNK = 500  # keys in one query: databases limit the number of parameters
_AWAY = 60.0  # seconds: a server that is started again takes no longer
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

_searches = sa.Table(
    "surefoot_searches",
    _metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("optimizer", sa.String(255), nullable=False),
    sa.Column("begun", sa.DateTime(timezone=True), nullable=False),
    sa.Column("record", sa.Text, nullable=False),  # all of the SearchSpec, as JSON
)
_trials = sa.Table(
    "surefoot_trials",
    _metadata,
    sa.Column("search", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("setting", sa.Text, nullable=False),  # name: value, as JSON
    sa.Column("digest", sa.String(64), nullable=False),  # of the setting: no search tries one twice
    sa.Column("seeds", sa.Integer, nullable=False),
    sa.Column("pruned", sa.Boolean, nullable=False),
    sa.UniqueConstraint("search", "digest"),
)
_leases = sa.Table(
    "surefoot_leases",
    _metadata,
    sa.Column("key", sa.String(64), primary_key=True),  # of the run
    sa.Column("owner", sa.String(64), nullable=False, index=True),
    sa.Column("until", sa.Double, nullable=False),  # seconds since 1970
)
_ADVISORY_LOCK = 0x50FEF007  # PostgreSQL's locks have numbers; any that nobody else uses

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
        on_server = parsed.get_backend_name() != "sqlite"
        arguments = {} if on_server else {"timeout": timeout}
        try:
            self._engine = sa.create_engine(parsed, connect_args=arguments, pool_pre_ping=on_server)
        except ArgumentError:
            raise UserError(
                f"The store {self.name} names a kind of database that SQLAlchemy does not know."
            ) from None
        except ImportError as error:
            raise UserError(
                f"The store {self.name} needs the Python package {error.name}; install it."
            ) from None
        if on_server:
            _outlast_restarts(self._engine)
        else:
            _take_over_transactions(self._engine)
        self._found: frozenset[str] = frozenset()  # our tables, as far as they are known to be there
        with self._closed_on_failure():
            self._look()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    @property
    def exists(self) -> bool:
        """Whether there is a store already, maybe an empty one."""
        self._look()
        return bool(self._found)

    @property
    def url(self) -> str:
        """The database's URL, with its password."""
        return self._engine.url.render_as_string(hide_password=False)

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
            new = not self._tables(connection)  # looked up again: another process may have made them
            _metadata.create_all(connection)  # those that are missing
            if new:
                connection.execute(_schema.insert().values(version=SCHEMA))
            else:
                connection.execute(_schema.update().values(version=SCHEMA))  # a read-only database refuses it
        self._found = frozenset(_metadata.tables)

    def save(self, result: RunResult) -> None:
        """Stores a run and ends its lease, in one transaction. A key that is there already keeps what it has."""
        if result.status not in ("finished", "diverged"):
            raise ValueError(
                f"only runs that came to their end are stored, not one that is {result.status!r}"
            )
        self._make_ready()
        spec = result.spec
        row = {
            "key": spec.key,
            "task": spec.task,
            "optimizer": spec.optimizer,
            "rate": spec.rate,
            "seed": spec.seed,
            "status": result.status,
            "saved": datetime.now(timezone.utc),
            "record": _json(result.to_dict()),
        }
        try:
            with self._writing() as connection:
                connection.execute(_runs.insert().values(row))
                connection.execute(_leases.delete().where(_leases.c.key == spec.key))
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
        return [self._decode(key, record) for key, record in self._rows(query, _runs)]

    def take(
        self,
        keys: Iterable[str],
        owner: str,
        seconds: float,
        is_dead: Callable[[str], bool] = lambda owner: False,
    ) -> set[str]:
        """Leases runs to ``owner`` for so many seconds: those of ``keys`` that are not stored and nobody else is at.

        Args:
            keys: of the runs.
            owner: who is going to make them; what it has already is leased to it anew.
            seconds: until others may take them; :meth:`renew` prolongs it.
            is_dead: told of another owner, whether it is known to have ended, and its leases with it.
        """
        self._make_ready()
        wanted, taken = list(keys), set()
        with self._writing() as connection:
            now = _now(connection)
            others = connection.scalars(sa.select(_leases.c.owner).where(_leases.c.owner != owner).distinct())
            gone = [other for other in others.all() if is_dead(other)]
            over = sa.or_(_leases.c.until < now, _leases.c.owner.in_(gone))
            connection.execute(_leases.delete().where(over))
            for chunk in _chunks(wanted):
                mine = _leases.c.owner == owner, _leases.c.key.in_(chunk)
                connection.execute(_leases.delete().where(*mine))
                unavailable: set[str] = set()
                for table in (_runs, _leases):
                    unavailable.update(
                        connection.scalars(sa.select(table.c.key).where(table.c.key.in_(chunk)))
                    )
                free = [key for key in dict.fromkeys(chunk) if key not in unavailable and key not in taken]
                if free:
                    rows = [{"key": key, "owner": owner, "until": now + seconds} for key in free]
                    connection.execute(_leases.insert(), rows)
                taken.update(free)
        return taken

    def renew(self, owner: str, seconds: float) -> None:
        """Prolongs all leases of ``owner`` to so many seconds from now."""
        with self._writing() as connection:
            until = _now(connection) + seconds
            connection.execute(_leases.update().where(_leases.c.owner == owner).values(until=until))

    def release(self, owner: str) -> None:
        """Ends all leases of ``owner``."""
        with self._writing() as connection:
            connection.execute(_leases.delete().where(_leases.c.owner == owner))

    def trials(self, search: SearchSpec) -> list[Trial]:
        """The trials of a search, by number."""
        columns = (_trials.c.number, _trials.c.setting, _trials.c.seeds, _trials.c.pruned)
        query = sa.select(*columns).where(_trials.c.search == search.key).order_by(_trials.c.number)
        return [
            Trial(number, _setting(setting), seeds, pruned)
            for number, setting, seeds, pruned in self._rows(query, _trials)
        ]

    def begin_trials(
        self, search: SearchSpec, settings: Iterable[Mapping[str, Value]], seeds: int, most: int
    ) -> None:
        """Adds a trial for each of ``settings`` that the search does not have yet, as long as it has fewer than ``most``.

        Each begins with so many ``seeds``.
        """
        self._make_ready()
        with self._writing() as connection:
            _insert_search(connection, _search_row(search))
            known = _known_trials(connection, search.key)
            for setting in settings:
                trial = Trial(len(known), setting, seeds)
                if len(known) < most and trial.digest not in known:
                    connection.execute(_trials.insert().values(_trial_row(search.key, trial)))
                    known[trial.digest] = trial

    def grant(self, search: SearchSpec, trial: Trial, seeds: int) -> None:
        """Lets a trial go on to so many seeds, unless what is to become of it has been decided meanwhile."""
        self._decide(search, trial, seeds=seeds)

    def prune(self, search: SearchSpec, trial: Trial) -> None:
        """Gives a trial up with the seeds that it has, unless what is to become of it has been decided meanwhile."""
        self._decide(search, trial, pruned=True)

    def add(self, other: Store) -> None:
        """Takes in what another store has and this one has not: runs as they are, and the trials of every search.

        A trial that both have is as far as either is.
        """
        self._make_ready()
        for chunk in _chunks(other.keys() - self.keys()):
            rows = other._records(_runs, _runs.c.key.in_(chunk))
            with self._writing() as connection:
                there = set(connection.scalars(sa.select(_runs.c.key).where(_runs.c.key.in_(chunk))))
                new = [{**row, "saved": _utc(row["saved"])} for row in rows if row["key"] not in there]
                if new:
                    connection.execute(_runs.insert(), new)
        for search in other._records(_searches):
            rows = other._records(_trials, _trials.c.search == search["key"])
            with self._writing() as connection:
                _insert_search(connection, {**search, "begun": _utc(search["begun"])})
                known = _known_trials(connection, search["key"])
                for row in rows:
                    mine = known.get(row["digest"])
                    if mine is None:
                        connection.execute(_trials.insert().values({**row, "number": len(known)}))
                        known[row["digest"]] = Trial(len(known), {}, row["seeds"], row["pruned"])
                    else:
                        further = {
                            "seeds": max(mine.seeds, row["seeds"]),
                            "pruned": mine.pruned and row["pruned"],
                        }
                        where = _trials.c.search == search["key"], _trials.c.number == mine.number
                        connection.execute(_trials.update().where(*where).values(further))

    def _decide(self, search: SearchSpec, trial: Trial, **decision: Value) -> None:
        undecided = (
            _trials.c.search == search.key,
            _trials.c.number == trial.number,
            _trials.c.seeds == trial.seeds,
            _trials.c.pruned.is_(False),
        )
        with self._writing() as connection:
            connection.execute(_trials.update().where(*undecided).values(decision))

    def _make_ready(self) -> None:
        if not self._found.issuperset(_metadata.tables):
            self.create()

    def _select(self, columns: list[sa.Column[Any]], keys: Iterable[str] | None) -> Iterator[tuple[Any, ...]]:
        if keys is None:
            yield from self._rows(sa.select(*columns), _runs)
            return
        for chunk in _chunks(keys):
            yield from self._rows(sa.select(*columns).where(_runs.c.key.in_(chunk)), _runs)

    def _rows(self, query: sa.Executable, table: sa.Table) -> list[tuple[Any, ...]]:
        """What a query of one of the tables gives: nothing where there is no such table."""
        if table.name not in self._found:  # another process may have made it since
            self._look()
        if table.name not in self._found:
            return []
        with self._sentences(), self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def _records(self, table: sa.Table, *where: sa.ColumnElement[bool]) -> list[dict[str, Any]]:
        """Whole rows of a table, in the order of its primary key."""
        query = sa.select(table).where(*where).order_by(*table.primary_key)
        return [dict(zip(table.columns.keys(), row, strict=True)) for row in self._rows(query, table)]

    def _look(self) -> None:
        """Sees which tables there are; refuses what is not a store of this schema."""
        if self._file is not None and self._file.is_dir():
            raise UserError(f"The store {self.name} is a folder; name a file in it.")
        if self._file is not None and not os.path.exists(self._file):  # unlike Path.exists, never raises
            return  # connecting would make an empty file
        with self._sentences(), self._engine.connect() as connection:
            self._found = self._tables(connection)

    def _tables(self, connection: sa.Connection) -> frozenset[str]:
        """The names of those of our tables that are there."""
        names = frozenset(sa.inspect(connection).get_table_names()) & _metadata.tables.keys()
        if not names:
            return names
        if _schema.name not in names:
            raise UserError(
                f"The store {self.name} has a table {min(names)} of unknown origin; give --store another."
            )
        version = connection.scalar(sa.select(_schema.c.version))
        if version != SCHEMA:
            raise UserError(
                f"The store {self.name} has schema {version} and this surefoot reads schema {SCHEMA}; "
                "use the release that wrote it, or give --store another file."
            )
        return names

    def _decode(self, key: str, record: str) -> RunResult:
        try:
            plain = json.loads(record, object_hook=_decode_object)
            settings = _tuples(plain["spec"]["settings"])
            return RunResult.from_dict({**plain, "spec": {**plain["spec"], "settings": settings}})
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"The store {self.name} is damaged at run {key}; restore it, or give --store another."
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction; those of all processes take turns, so that nothing changes between what one reads and writes."""
        with self._sentences(), self._engine.execution_options(surefoot_write=True).begin() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's begin does it
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
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


def _outlast_restarts(engine: sa.Engine) -> None:
    """Has a server that has been there before, and is away, given some time to come back."""
    seen = False

    @event.listens_for(engine, "do_connect")
    def _(dialect: Any, record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
        nonlocal seen
        deadline = time.monotonic() + (_AWAY if seen else 0.0)
        while time.monotonic() < deadline:
            with suppress(dialect.loaded_dbapi.OperationalError):
                return dialect.connect(*arguments, **options)
            time.sleep(0.5)
        connection = dialect.connect(*arguments, **options)
        seen = True
        return connection


def _now(connection: sa.Connection) -> float:
    """Seconds since 1970: of the server's clock, where machines that share it may differ."""
    if connection.dialect.name == "postgresql":
        query = sa.select(sa.extract("epoch", sa.func.clock_timestamp()))
        return float(connection.execute(query).scalar_one())
    return time.time()


def _utc(moment: datetime) -> datetime:
    """A time as it was read: SQLite keeps no time zone."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


def _insert_search(connection: sa.Connection, row: Mapping[str, Any]) -> None:
    """Unless it is there."""
    if not connection.scalar(sa.select(_searches.c.key).where(_searches.c.key == row["key"])):
        connection.execute(_searches.insert().values(row))


def _known_trials(connection: sa.Connection, search: str) -> dict[str, Trial]:
    """By the digest of their settings, which are left out."""
    columns = _trials.c.digest, _trials.c.number, _trials.c.seeds, _trials.c.pruned
    rows = connection.execute(sa.select(*columns).where(_trials.c.search == search))
    return {digest: Trial(number, {}, seeds, pruned) for digest, number, seeds, pruned in rows}


def _search_row(search: SearchSpec) -> dict[str, Any]:
    return {
        "key": search.key,
        "task": search.task,
        "optimizer": search.optimizer,
        "begun": datetime.now(timezone.utc),
        "record": _json(asdict(search)),
    }


def _trial_row(search: str, trial: Trial) -> dict[str, Any]:
    return {
        "search": search,
        "number": trial.number,
        "setting": _json(trial.setting),
        "digest": trial.digest,
        "seeds": trial.seeds,
        "pruned": trial.pruned,
    }


def _setting(record: str) -> dict[str, Value]:
    return _tuples(json.loads(record, object_hook=_decode_object))


def _tuples(settings: Mapping[str, Any]) -> dict[str, Value]:
    """JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(keys)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(_encode(dict(record)), allow_nan=False, separators=(",", ":"))


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
