"""A copy of a search in Optuna's own tables of the same database, for ``optuna-dashboard`` and other readers of such studies.

It is written from the store and never read by us: where it says something else, it is written anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from surefoot.lab.report.words import count
from surefoot.lab.runs import SearchSpec
from surefoot.lab.search import Outcome, optuna_trial, quietly
from surefoot.lab.spaces import Space

_NUMBER = "trial"  # the attribute with our number, for Optuna numbers as they come in
_TIMEOUT = 20.0  # seconds to wait for a SQLite file that another process is writing


class Mirror:
    """The copy of one search. That it fails is told once and ends nothing; what is missing comes with the next update.

    Args:
        url: of the database, with its password.
        search: whose copy it is.
        space: the search's.
        tell: says something to the user.
    """

    def __init__(self, url: str, search: SearchSpec, space: Space, tell: Callable[[str], object]) -> None:
        self._url, self._space, self._tell = url, space, tell
        halving = "" if search.halving is None else f", halving {search.halving}"
        self.name = (
            f"{search.task}, {search.optimizer} by {search.sampler}, {count(search.epochs, 'epoch')}, "
            f"{count(search.seeds, 'seed')}{halving} ({search.key[:8]})"
        )
        """What Optuna knows the study by."""
        self._told = False
        self._storage: Any = None
        self._written: dict[int, str] = {}

    def close(self) -> None:
        """Lets go of the database."""
        if self._storage is not None:
            self._storage.engine.dispose()

    def update(self, outcomes: Sequence[Outcome]) -> None:
        """Copies the trials that have come to their end."""
        try:
            with quietly():
                self._write([outcome for outcome in outcomes if outcome.state != "open"])
        except Exception as error:  # whatever a database, or another release's tables, may raise
            if self._told:
                return
            self._told = True
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            self._tell(
                f"The copy of the search for optuna-dashboard cannot be written: {reason}. The runs go on, and are kept."
            )

    def _write(self, outcomes: Sequence[Outcome]) -> None:
        import optuna

        wanted = {outcome.trial.number: self._trial(outcome) for outcome in outcomes}
        content = {number: _content(trial) for number, trial in wanted.items()}
        if content == self._written:
            return
        if self._storage is None:
            options = {"connect_args": {"timeout": _TIMEOUT}} if self._url.startswith("sqlite") else {}
            self._storage = optuna.storages.RDBStorage(self._url, engine_kwargs=options)
        try:
            study = self._study()
            found = study.get_trials(deepcopy=False)
            there = {trial.user_attrs.get(_NUMBER): _content(trial) for trial in found}
            if len(there) < len(found) or not there.items() <= content.items():
                optuna.delete_study(study_name=self.name, storage=self._storage)
                study, there = self._study(), {}
            study.add_trials([trial for number, trial in wanted.items() if number not in there])
            self._written = content
        finally:
            self._storage.remove_session()

    def _study(self) -> Any:
        import optuna

        return optuna.create_study(
            study_name=self.name, storage=self._storage, direction="minimize", load_if_exists=True
        )

    def _trial(self, outcome: Outcome) -> Any:
        """Failed is one of which a run diverged: it has no value."""
        setting, loss = outcome.trial.setting, outcome.loss
        attributes: dict[str, float] = {_NUMBER: outcome.trial.number, "seeds": len(outcome.runs)}
        if outcome.diverged:
            attributes["diverged"] = outcome.diverged
            return optuna_trial(self._space, setting, None, "FAIL", user_attrs=attributes)
        if not math.isnan(loss.sd):
            attributes["s.d. over seeds"] = loss.sd
        if outcome.state == "pruned":
            means = {len(outcome.runs): loss.mean}
            return optuna_trial(
                self._space, setting, loss.mean, "PRUNED", user_attrs=attributes, intermediate_values=means
            )
        return optuna_trial(self._space, setting, loss.mean, user_attrs=attributes)


def _content(trial: Any) -> str:
    """What is to be the same in the copy."""
    return repr((trial.state, trial.value, sorted(trial.params.items()), sorted(trial.user_attrs.items())))
