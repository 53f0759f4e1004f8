"""Runs on Ray: the same numbers as here, nothing lost with a worker, and one sentence for what is wrong with a cluster."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress

import pytest

from surefoot.lab import cluster
from surefoot.lab.cluster import RayCluster, Shipment, cluster_address
from surefoot.lab.errors import UserError
from surefoot.lab.executor import LocalProcesses
from surefoot.lab.plan import parse_optimizers, specs
from surefoot.lab.store import Store

TASK = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from surefoot.lab.tasks import Task
from shapes import INPUTS

MARKS = Path({marks!r})

def die(mark):
    if (MARKS / mark).exists():
        if mark == "once":
            (MARKS / mark).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

class Model(nn.Linear):
    def forward(self, x):
        if self.training:
            die("once")
            die("always")
        if (MARKS / "error").exists():
            raise KeyError("x")
        return super().forward(x)

def task():
    if (MARKS / "unmade").exists():
        raise ValueError("no data")
    x = torch.randn(40, INPUTS, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1, keepdim=True)
    return Task("own", lambda: Model(INPUTS, 1), (x, y), (x, y), nn.functional.mse_loss, batch_size=8, epochs=2)
"""


@pytest.fixture
def marks(tmp_path):
    """A folder that the task's file looks into, wherever it is run."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def reference(tmp_path, marks):
    """A task of one's own, which imports a module of one's own."""
    (tmp_path / "shapes.py").write_text("INPUTS = 3\n")
    (tmp_path / "own.py").write_text(TASK.format(marks=str(marks)))
    return f"{tmp_path / 'own.py'}:task"


def alone(runs):
    """Each run a batch of its own."""
    return [[run] for run in runs]


def planned(pool, optimizers="sgd,srprop[window=3]", rates=(0.01, 0.1), seeds=(0, 1)):
    info, methods = pool.prepare(parse_optimizers(optimizers), rates)
    return specs(info, methods, info.epochs, seeds)


def numbers(results):
    """By key, what must not depend on the place."""
    timed = ("seconds", "step_seconds", "environment")
    return {r.spec.key: {n: v for n, v in r.to_dict().items() if n not in timed} for r in results}


class TestAddress:
    def test_a_local_one_or_that_of_a_head(self, monkeypatch):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert cluster_address("ray") is None
        assert cluster_address("ray://head.example:10001") == "ray://head.example:10001"

    def test_a_program_that_ray_has_started_stays_in_its_cluster(self, monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        assert cluster_address("ray") == "10.0.0.1:6379"
        assert cluster_address("ray://head.example:10001") == "ray://head.example:10001"

    @pytest.mark.parametrize(
        "on", ["", "slurm", "ray://", "ray://head", "ray://head:port", "ray:10001", "Ray"]
    )
    def test_anything_else_is_refused(self, on):
        with pytest.raises(UserError, match=rf"^--on is '{on}'; it must be ray, .* or ray://HOST:PORT\.$"):
            cluster_address(on)

    def test_without_ray_one_sentence_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(cluster, "find_spec", lambda name: None)
        said = r"^--on ray needs the Python package ray; install it by: pip install 'surefoot\[ray\]'\.$"
        with pytest.raises(UserError, match=said):
            cluster_address("ray")

    def test_a_ray_that_cannot_be_imported(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=r"^Ray cannot be imported .*pip install 'surefoot\[ray\]'\.$"):
            RayCluster(None, "digits").__enter__()


class TestShipment:
    def files(self, folder, contents):
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return set(Shipment.of(f"{folder / 'own.py'}:task", None, "cpu").files)

    def test_a_task_of_surefoots_has_no_files(self, tmp_path):
        shipment = Shipment.of("digits", tmp_path, "cuda")
        room = shipment.unpack(tmp_path / "elsewhere")
        assert (room.task_ref, room.data, room.device) == ("digits", tmp_path, "cuda")
        assert not (tmp_path / "elsewhere").exists()

    def test_what_the_file_imports_from_its_folder_goes_along(self, tmp_path):
        own = "import torch, helper\nfrom parts.model import Net\ndef task():\n    import late\n"
        contents = {
            "own.py": own,
            "helper.py": "from deeper import x",
            "deeper.py": "import own",
            "late.py": "",
            "parts/__init__.py": "",
            "parts/model.py": "import beside",
            "parts/inner/more.py": "",
            "beside.py": "",
        }
        unused = {"other.py": "", "helper.txt": "", "more/parts.py": "", "inner.py": ""}
        assert self.files(tmp_path, contents | unused) == contents.keys()

    @pytest.mark.parametrize("own", ["def task(:\n", "import \0", "from . import x\n"])
    def test_a_file_that_python_cannot_read_goes_alone(self, tmp_path, own):
        assert self.files(tmp_path, {"own.py": own, "x.py": ""}) == {"own.py"}

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(
            UserError, match=r"^Task file .*own\.py cannot be read: No such file or directory\.$"
        ):
            Shipment.of(f"{tmp_path / 'own.py'}:task", None, "cpu")

    @pytest.mark.slow
    def test_it_is_the_same_task_where_it_arrives(self, reference, tmp_path):
        from surefoot.lab.tasks import describe, load

        room = Shipment.of(reference, None, "cpu").unpack(tmp_path / "elsewhere")
        assert room.task_ref == f"{tmp_path / 'elsewhere' / 'own.py'}:task"
        assert room.info == describe(load(reference))

    def test_messages_name_the_files_as_the_user_does(self, reference, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for written in ("own.py:task", reference):
            shipment = Shipment.of(written, None, "cpu")
            there = f"Task file {tmp_path}/there/own.py is wrong"
            assert shipment.as_written(there, tmp_path / "there") == f"Task file {written[:-5]} is wrong"


class TestRoom:
    NODES = ({"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 3.5}, {})

    def room(self, device, workers=None):
        pool = RayCluster("ray://h:1", "digits", device=device, workers=workers)
        needs = pool._needs(self.NODES)
        return needs, pool._room_for(needs, self.NODES)

    def test_a_worker_takes_a_core_and_where_it_needs_one_a_gpu(self):
        assert self.room("cpu") == ({"num_cpus": 1}, 4 + 1 + 3)
        assert self.room("cuda") == ({"num_cpus": 1, "num_gpus": 1}, 2 + 1)
        assert self.room("cuda", 5) == ({"num_cpus": 1, "num_gpus": 1}, 2 + 1)

    @pytest.mark.parametrize(("workers", "share"), [(6, 1), (7, 1 / 2), (12, 1 / 2), (13, 1 / 3)])
    def test_more_workers_than_gpus_share_them(self, workers, share):
        assert self.room("cuda", workers)[0]["num_gpus"] == share

    def test_none_at_all(self):
        pool = RayCluster("ray://h:1", "digits", device="cuda")
        said = r"^The Ray cluster at ray://h:1 has no machine with a GPU for a worker; .*--workers how far\.$"
        with pytest.raises(UserError, match=said):
            pool._room_for(pool._needs([{"CPU": 8.0}]), [{"CPU": 8.0}])

    def test_one_particular_gpu_is_nothing_to_ask_a_cluster_for(self):
        with pytest.raises(UserError, match=r"^--device is 'cuda:1', but on Ray .* use --device cuda\.$"):
            RayCluster(None, "digits", device="cuda:1")


@pytest.fixture(scope="module")
def ray():
    """A local cluster of two cores, which this program is connected to."""
    before = dict(os.environ)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=uuid.uuid4().hex)
    import ray

    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
    )
    yield ray
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
class TestRuns:
    def test_numbers_are_those_of_processes_here_bit_for_bit(self, reference, ray):
        with RayCluster(None, reference) as pool:
            assert pool.workers == 2
            wanted = planned(pool, seeds=range(6))
            estimates = pool.estimate(wanted)
            there = list(pool.run(pool.arrange(wanted)))  # short ones, several at a time
            one = list(pool.run(alone(wanted[:1])))
        assert ray.is_initialized()  # it was not this pool that connected
        with LocalProcesses(reference, workers=2) as pool:
            assert planned(pool, seeds=range(6)) == wanted
            here = list(pool.run(alone(wanted)))
        assert len(there) == len(wanted) == len(estimates) == 24
        assert numbers(there) == numbers(here)
        assert numbers(one).items() <= numbers(here).items()
        assert {result.environment["threads"] for result in there} == {1}
        assert min(estimates) > 0

    def test_more_workers_than_there_is_room_for_are_not_waited_for(self, reference):
        with RayCluster(None, reference, workers=9) as pool:
            assert pool.workers == 9
            wanted = planned(pool, seeds=range(6))
            assert numbers(pool.run(alone(wanted))).keys() == {spec.key for spec in wanted}
            assert numbers(pool.run(alone(wanted[:3]))).keys() == {spec.key for spec in wanted[:3]}

    def test_of_nothing_give_nothing(self, reference):
        with RayCluster(None, reference) as pool:
            assert list(pool.run([])) == []

    def test_a_worker_that_is_killed_is_replaced_and_its_runs_are_done_again(self, reference, marks):
        with RayCluster(None, reference) as pool:
            wanted = planned(pool)
            (marks / "once").touch()
            results = list(pool.run(alone(wanted)))
        assert not (marks / "once").exists()
        assert {result.spec.key for result in results} == {spec.key for spec in wanted}
        assert {result.status for result in results} == {"finished"}

    def test_a_run_that_kills_every_worker_is_named(self, reference, marks):
        with RayCluster(None, reference, workers=1) as pool:
            wanted = planned(pool, "sgd", rates=(0.5,), seeds=(7,))
            (marks / "always").touch()
            said = (
                r"^Its process died 4 times during the run of sgd at rate 0\.5 with seed 7 \(as if ended by SIGKILL\); "
                r"is there enough memory\?$"
            )
            with pytest.raises(UserError, match=said):
                list(pool.run(alone(wanted)))

    def test_errors_are_told_as_of_processes_here(self, reference, marks):
        (marks / "unmade").touch()
        said = rf"^Task {reference} failed: ValueError: no data \(own\.py, line 28\)\.$"
        with RayCluster(None, reference, workers=1) as pool, pytest.raises(UserError, match=said):
            planned(pool)
        (marks / "unmade").unlink()
        with RayCluster(None, reference, workers=1) as pool:
            wanted = planned(pool, "sgd", rates=(0.5,), seeds=(7,))
            (marks / "error").touch()
            said = r"^An error ended the run of sgd at rate 0\.5 with seed 7: KeyError: 'x' \(own\.py, line 23\)\.$"
            with pytest.raises(UserError, match=said):
                list(pool.run(alone(wanted)))

    def test_a_data_folder_must_be_there_where_the_workers_are(self, tmp_path):
        said = r"^--data is '.*/nowhere', which is no folder for the Ray worker on .*; the same path must be good "
        with RayCluster(None, "mnist", tmp_path / "nowhere") as pool, pytest.raises(UserError, match=said):
            planned(pool)

    def test_another_surefoot_on_the_cluster(self, reference, monkeypatch):
        with RayCluster(None, reference) as pool:
            monkeypatch.setattr(cluster, "__version__", "99.0")
            with pytest.raises(
                UserError, match=r"^There is surefoot 99\.0 here, but .* for the Ray worker on "
            ):
                planned(pool)

    def test_a_python_without_surefoot(self, reference, monkeypatch):
        class Elsewhere:
            def __init__(self, shipment):
                raise ModuleNotFoundError("No module named 'surefoot'")

            def begin(self, surefoot):
                pass

        monkeypatch.setattr(cluster, "_Actor", Elsewhere)
        said = r"^No worker can be started on the Ray cluster; is surefoot\[ray\] .* \(.*No module named 'surefoot'\)$"
        with RayCluster(None, reference) as pool, pytest.raises(UserError, match=said):
            planned(pool)


COMPARE = "compare digits-mlp --optimizers sgd --rates 1e-2:1e0 --seeds 3 --epochs 40 --engine separate"
RUNS = 9


def environment(**changes):
    token = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": "a" * 32, "OMP_NUM_THREADS": "1"}
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **token, **changes}


def surefoot(arguments, folder, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "surefoot", *shlex.split(arguments)], cwd=folder, env=environment(**changes),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def stored(folder):
    path = folder / "surefoot-out" / "runs.sqlite"
    if not path.exists():
        return {}
    with Store(path) as store:
        return {result.spec.key: result for result in store.all()}


def wait_until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def under_way(process, folder):
    """Waits until some of the runs are there, but not all."""
    wait_until(lambda: len(stored(folder)) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
class TestForReal:
    @pytest.mark.parametrize(
        ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
    )
    def test_a_command_that_is_stopped_goes_on_from_there(self, tmp_path, number, expected):
        process = surefoot(f"{COMPARE} --on ray", tmp_path)
        under_way(process, tmp_path)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == expected
        assert "Traceback" not in errors
        if number != signal.SIGKILL:
            assert errors.rstrip().endswith("--on ray --engine separate")
        before = stored(tmp_path)
        assert 2 <= len(before) < RUNS
        process = surefoot(COMPARE, tmp_path)  # here: the place is no part of what a run is
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert f"{RUNS} runs, {len(before)} of them in " in out
        after = stored(tmp_path)
        assert len(after) == RUNS
        assert {key: after[key] for key in before} == before

    @pytest.fixture
    def head(self, tmp_path):
        """A cluster of its own, with an address to come to."""
        port, client = (free_port() for _ in range(2))
        command = (
            f"start --head --block --num-cpus=2 --port={port} --ray-client-server-port={client} "
            "--include-dashboard=false --object-store-memory=100000000 --disable-usage-stats"
        )
        program = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
        log = (tmp_path / "head.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-c", program, *command.split()], stdout=log, stderr=log, cwd=tmp_path,
            # gRPC's handling of forks now and then ends the process that is to serve a client.
            env=environment(RAY_AUTH_MODE="token", GRPC_ENABLE_FORK_SUPPORT="0"), start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: answers(client) or process.poll() is not None)
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            yield process, f"ray://127.0.0.1:{client}"
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.close()

    def test_by_the_address_of_a_head(self, head, tmp_path):
        process = surefoot(f"{COMPARE} --on {head[1]}", tmp_path, RAY_AUTH_MODE="token")
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert out.splitlines()[-1] == "Report: surefoot-out/report.html"
        results = stored(tmp_path)
        assert len(results) == RUNS
        with LocalProcesses("digits-mlp", workers=1) as pool:
            (spec,) = [r.spec for r in results.values() if (r.spec.rate, r.spec.seed) == (0.1, 2)]
            assert numbers(pool.run(alone([spec]))) == numbers([results[spec.key]])

    def test_a_head_that_is_lost_costs_no_finished_run(self, head, tmp_path):
        process = surefoot(
            f"{COMPARE} --on {head[1]}",
            tmp_path,
            RAY_AUTH_MODE="token",
            RAY_CLIENT_RECONNECT_GRACE_PERIOD="1",
        )
        under_way(process, tmp_path)
        os.killpg(head[0].pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2
        assert errors.splitlines()[-1] == (
            f"error: The connection to the Ray cluster at {head[1]} is lost ({len(stored(tmp_path))} runs finished before "
            "that and kept in surefoot-out/runs.sqlite)."
        )

    def test_a_head_that_is_not_there(self, tmp_path):
        on = f"ray://127.0.0.1:{free_port()}"
        soon = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
        process = surefoot(f"{COMPARE} --on {on}", tmp_path, **soon)
        out, errors = process.communicate(timeout=300)
        assert (process.returncode, out) == (2, "")
        assert errors.startswith(f"error: The Ray cluster at {on} cannot be used: ")
        assert len(errors.splitlines()) == 1
        assert not (tmp_path / "surefoot-out").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port):
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.slow
def test_the_driver_never_imports_torch(reference, ray):
    program = (
        "import sys\n"
        "from surefoot.lab.cluster import RayCluster\n"
        "from surefoot.lab.plan import parse_optimizers, specs\n"
        f"with RayCluster({ray.get_runtime_context().gcs_address!r}, {reference!r}) as pool:\n"
        "    info, methods = pool.prepare(parse_optimizers('sgd'), (0.1,))\n"
        "    (result,) = pool.run([specs(info, methods, 1, [0])])\n"
        "assert result.status == 'finished'\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
