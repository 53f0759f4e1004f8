"""What TensorBoard and Weights & Biases are given of a run, as their own readers see it, and what happens when they fail."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from surefoot.lab import tracking
from surefoot.lab.errors import UserError
from surefoot.lab.runs import TaskInfo
from surefoot.lab.tracking import Tracking

TASK = TaskInfo("made-up", "v1", 1000, 200, 21840, "accuracy", 100, 2)
SETTINGS = {
    "window": 50,
    "etas": (0.5, 1.2),
    "growth": None,
    "undo": "exact",
    "amsgrad": False,
    "limit": float("inf"),
}
STARTED = "2026-01-02T03:04:05+00:00"
SECONDS_THEN = 1767323045.0


@pytest.fixture
def run(make_run):
    def make(loss=0.5, **changes):
        return make_run(loss, settings=SETTINGS, environment={"started": STARTED, "threads": 1}, **changes)

    return make


def folder_of(out, result, label="adam"):
    name = f"rate={result.spec.rate:g} seed={result.spec.seed} {result.spec.key[:8]}"
    return out / "tensorboard" / "made-up" / label / name


class TestChoice:
    def test_none(self, tmp_path, run):
        nothing = Tracking(None, tmp_path)
        nothing.open()
        nothing.log(run())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("log", ["", "mlflow", "tensorboard,", "TensorBoard"])
    def test_a_tool_that_there_is_not(self, tmp_path, log):
        with pytest.raises(UserError, match=rf"^--log is '{log}'; it must be tensorboard or wandb, or both"):
            Tracking(log, tmp_path)

    @pytest.mark.parametrize("name", ["tensorboard", "wandb"])
    def test_a_tool_that_is_not_installed(self, tmp_path, name, monkeypatch):
        monkeypatch.setattr(tracking, "find_spec", lambda wanted: None)
        said = rf"^--log {name} needs the Python package {name}; install it by: pip install 'surefoot\[{name}\]'\.$"
        with pytest.raises(UserError, match=said):
            Tracking(name, tmp_path)


class TestFailure:
    def test_is_told_once_and_ends_neither_the_runs_nor_the_other_tool(self, tmp_path, run):
        (tmp_path / "tensorboard").write_text("in the way")
        told, logged = [], []
        both = Tracking("tensorboard", tmp_path, told.append)

        class Other(tracking._Tool):
            def open(self):
                pass

            def log(self, result, label, metric):
                logged.append(result.spec.seed)

        both._tools.append(Other(tmp_path))
        for seed in range(3):
            both.log(run(seed=seed))
        (sentence,) = told
        assert sentence.startswith("--log tensorboard cannot write to ")
        assert sentence.endswith("The runs go on, and are kept, but no more of them is logged there.")
        assert "\n" not in sentence
        assert logged == [0, 1, 2]


class TestTensorBoard:
    @pytest.fixture
    def log(self, tmp_path):
        pytest.importorskip("tensorboard")
        return Tracking("tensorboard", tmp_path)

    def read(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return events

    def hparams(self, folder):
        from tensorboard.plugins.hparams import metadata

        content = self.read(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
        found = metadata.parse_session_start_info_plugin_data(content)
        kinds = {"bool_value", "number_value", "string_value"}
        return found, {
            name: next(getattr(value, kind) for kind in kinds if value.HasField(kind))
            for name, value in found.hparams.items()
        }

    def test_curves_by_patterns_seen_at_the_times_of_the_run(self, log, tmp_path, run):
        result = run()
        log.describe(TASK, {})
        log.open()
        log.log(result)
        events = self.read(folder_of(tmp_path, result))
        curves = {
            "train/loss": result.train_loss,
            "validation/loss": result.validation_loss,
            "validation/accuracy": result.validation_metric,
            "rate/mean": result.rate_mean,
            "rate/std": result.rate_std,
            "rate/min": result.rate_min,
            "rate/max": result.rate_max,
        }
        assert set(events.Tags()["scalars"]) == curves.keys()
        for tag, curve in curves.items():
            points = events.Scalars(tag)
            assert [point.step for point in points] == result.patterns
            assert [point.value for point in points] == pytest.approx(
                curve, rel=1e-6
            )  # they are kept in float32
        times = [point.wall_time - SECONDS_THEN for point in events.Scalars("train/loss")]
        assert times == pytest.approx([result.seconds * part / 4 for part in (1, 2, 3, 4)], abs=1e-5)

    def test_settings_with_defaults_and_how_it_ended(self, log, tmp_path, run):
        result = run(seed=3, rate=0.1)
        log.log(result)
        start, hparams = self.hparams(folder_of(tmp_path, result))
        assert hparams == {
            "window": 50,
            "etas": "(0.5, 1.2)",
            "growth": "None",
            "undo": "exact",
            "amsgrad": False,
            "limit": float("inf"),
            "task": "made-up",
            "optimizer": "adam",
            "rate": 0.1,
            "batch_size": 100,
            "epochs": 2,
            "seed": 3,
            "status": "finished",
        }
        assert start.start_time_secs == SECONDS_THEN

    def test_a_diverged_run_has_what_it_came_to(self, log, tmp_path, run):
        result = run(float("inf"))
        log.log(result)
        folder = folder_of(tmp_path, result)
        assert [point.step for point in self.read(folder).Scalars("train/loss")] == result.patterns == [500]
        assert self.hparams(folder)[1]["status"] == "diverged"

    def test_no_metric_no_curve_of_one(self, log, tmp_path, run):
        result = run(metric=())
        log.log(result)
        assert "validation/metric" not in self.read(folder_of(tmp_path, result)).Tags()["scalars"]

    def test_each_run_is_in_a_folder_of_its_own_by_the_label_that_the_reader_knows(self, log, tmp_path, run):
        results = [run(seed=seed, rate=rate) for seed in (0, 1) for rate in (0.1, 0.01)]
        label = 'adam[a=1|2,path="x/y"]'
        log.describe(TASK, {results[0].spec.key: label})
        for result in results:
            log.log(result)
        folders = [folder_of(tmp_path, r) for r in results]
        folders[0] = folder_of(tmp_path, results[0], "adam[a=1_2,path=_x_y_]")
        assert {path.parent for path in tmp_path.rglob("*tfevents*")} == set(folders)
        assert len({self.hparams(folder)[0].group_name for folder in folders}) == 4

    def test_the_machine_is_not_named(self, log, tmp_path, run):
        log.log(run())
        (path,) = tmp_path.rglob("*tfevents*")
        assert os.uname().nodename not in path.name

    def test_needs_no_torch(self, tmp_path):
        pytest.importorskip("tensorboard")
        program = (
            "import sys\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "from pathlib import Path\n"
            "from conftest import _make_run\n"
            "from surefoot.lab.tracking import Tracking\n"
            "tracking = Tracking('tensorboard', Path(sys.argv[1]))\n"
            "tracking.open()\n"
            "tracking.log(_make_run(0.5))\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run(
            [sys.executable, "-c", program, tmp_path, Path(__file__).parent], check=True, timeout=60
        )
        assert list(tmp_path.rglob("*tfevents*"))


@pytest.mark.slow
class TestWandB:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch, tmp_path):
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("HOME", str(tmp_path))  # whose login it must not find
        for name in ("WANDB_API_KEY", "WANDB_PROJECT", "NETRC"):
            monkeypatch.delenv(name, raising=False)

    def records(self, folder):
        """What a run's file holds, by kind of record: pieces of records in blocks of 32 KiB, as LevelDB writes its log."""
        from wandb.proto.wandb_internal_pb2 import Record

        (path,) = folder.glob("*.wandb")
        content, position = path.read_bytes(), 7  # after the name and version of the format
        found, whole = {}, b""
        while position < len(content):
            if 32768 - position % 32768 < 7:  # no room for another piece in this block
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack("<IHB", content[position : position + 7])
            whole += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # all of a record, or the last piece of one
                record = Record.FromString(whole)
                name, whole = record.WhichOneof("record_type"), b""
                found.setdefault(name, []).append(getattr(record, name))
        return found

    def test_curves_settings_and_names(self, tmp_path, run):
        import wandb

        results = [run(seed=0), run(seed=1)]
        log = Tracking("wandb", tmp_path)
        log.describe(TASK, {result.spec.key: "adam[window=50]" for result in results})
        log.open()
        for result in results:
            log.log(result)
        wandb.teardown()  # as at a process's end: a run's file is written some milliseconds after the run has finished
        for result in results:
            (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{result.spec.key[:16]}")
            records = self.records(folder)
            (described, *_) = records["run"]
            assert (described.project, described.host) == ("surefoot", "")
            assert described.run_group == "adam[window=50]"
            assert described.display_name == (
                f"adam[window=50] rate=0.001 seed={result.spec.seed} {result.spec.key[:8]}"
            )
            config = {item.key: json.loads(item.value_json) for item in described.config.update}
            assert config["etas"] == [0.5, 1.2]
            assert config["growth"] is None
            assert (config["rate"], config["seed"], config["status"]) == (0.001, result.spec.seed, "finished")
            assert config["environment"] == {"started": STARTED, "threads": 1}
            rows = [
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
                for row in records["history"]
            ]
            assert [row["_step"] for row in rows] == result.patterns
            assert [row["train/loss"] for row in rows] == result.train_loss
            assert [row["validation/accuracy"] for row in rows] == result.validation_metric
            assert [row["rate/max"] for row in rows] == result.rate_max

    def test_nobody_logged_in_is_told_before_anything_is_run(self, tmp_path):
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from surefoot.lab.errors import UserError\n"
            "from surefoot.lab.tracking import Tracking\n"
            "try:\n"
            "    Tracking('wandb', Path(sys.argv[1])).open()\n"
            "except UserError as error:\n"
            "    print('said:', error)\n"
        )
        told = subprocess.run(
            [sys.executable, "-c", program, tmp_path],
            env={**os.environ, "WANDB_MODE": "online"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        sentence = told.stdout.splitlines()[-1]
        assert sentence.startswith("said: --log wandb fails: ")
        assert sentence.endswith("; WANDB_MODE=offline does without a server.")
