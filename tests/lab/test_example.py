"""The worked example works: as a task, and as the documentation of one."""

from pathlib import Path

import pytest
import torch

from surefoot.lab.catalogue import resolve
from surefoot.lab.plan import MethodRequest
from surefoot.lab.runs import RunSpec
from surefoot.lab.tasks import describe, load
from surefoot.lab.train import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_task.py"


@pytest.fixture(scope="module")
def task():
    return load(f"{EXAMPLE}:task")


def test_every_wine_is_in_one_split(task):
    info = describe(task)
    assert (info.name, info.train_patterns + info.validation_patterns) == ("wine", 178)
    assert torch.cdist(task.train[0], task.validation[0]).min() > 0
    assert torch.bincount(task.validation[1]).min() > 5


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e-2), ("srprop", 1e-2)])
def test_it_learns(task, optimizer, rate):
    info = describe(task)
    settings = resolve(MethodRequest(optimizer, optimizer, {}, None, None))
    spec = RunSpec(info.name, info.version, optimizer, settings, rate, info.batch_size, info.epochs, seed=0)
    result = train(task, spec)
    assert result.status == "finished"
    assert result.min_train_loss < 0.1 * result.train_loss[0]
    assert result.final_validation_metric > 0.9


def test_it_names_the_command_that_runs_it():
    assert "surefoot compare examples/my_task.py:task" in EXAMPLE.read_text(encoding="utf8")
