"""The built-in tasks are what they say; a user's own is found, checked and told apart, or refused in one sentence."""

import gzip
import hashlib
import importlib
import math
import os
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from surefoot.lab.data import CIFAR10, IdxFile, IdxSet, Images
from surefoot.lab.errors import UserError
from surefoot.lab.tasks import TASKS, Task, describe, explain, images, load

EMBEDDED = ["digits", "digits-mlp", "regression"]


def sentence(error):
    """The message, which must be one sentence."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


class TestEmbedded:
    @pytest.mark.parametrize("name", EMBEDDED)
    def test_is_usable_and_quick_to_read(self, name):
        task = load(name)
        info = describe(task)
        assert info.name == task.name == name
        assert info.train_patterns == len(task.train[0])
        assert info.validation_patterns == len(task.validation[0])
        assert info.metric_name == (None if name == "regression" else "accuracy")
        for tensor in (*task.train, *task.validation):
            assert tensor.is_contiguous()
            assert tensor.dtype in (torch.float32, torch.int64)

    @pytest.mark.parametrize("name", EMBEDDED)
    def test_data_and_version_do_not_depend_on_any_random_state(self, name):
        versions = set()
        for seed in range(2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            versions.add(describe(load(name)).version)
        assert len(versions) == 1

    def test_digits_are_split_without_overlap(self):
        task = load("digits")
        train, validation = task.train[0].flatten(1), task.validation[0].flatten(1)
        assert (len(train), len(validation)) == (1440, 357)
        assert torch.cdist(train, validation).min() > 0
        assert torch.bincount(task.train[1]).min() > 130
        assert torch.bincount(task.validation[1]).min() > 25
        assert (train.min(), train.max()) == (0, 1)

    def test_regression_is_standardised_by_its_training_split(self):
        task = load("regression")
        for tensor in task.train:
            torch.testing.assert_close(tensor.mean(dim=0), torch.zeros(tensor.shape[1]), atol=1e-6, rtol=0)
            torch.testing.assert_close(tensor.std(dim=0, correction=0), torch.ones(tensor.shape[1]))
        assert task.validation[0].mean(dim=0).abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("name", "parameters"), [("digits", 1898), ("digits-mlp", 2410), ("regression", 193)]
    )
    def test_sizes_are_those_of_the_documentation(self, name, parameters):
        assert describe(load(name)).parameters == parameters
        assert f"{parameters:,}" in TASKS[name].__doc__


class TestPaperNetwork:
    def test_is_the_papers(self):
        torch.manual_seed(0)
        model = images.paper_cnn()
        assert sum(p.numel() for p in model.parameters()) == 21840
        kinds = [type(layer).__name__ for layer in model]
        assert kinds == [
            *("Conv2d", "MaxPool2d", "ReLU") * 2,
            *("Flatten", "Linear", "ReLU", "Linear", "LogSoftmax"),
        ]
        assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
            (10, 1, 5, 5),
            (20, 10, 5, 5),
            (50, 320),
            (10, 50),
        ]
        outputs = model(torch.rand(3, 1, 28, 28))
        torch.testing.assert_close(outputs.exp().sum(dim=1), torch.ones(3))


@pytest.fixture
def small_mnist(tmp_path):
    """Four training and two test images in MNIST's format, in a folder, and what registers them."""
    arrays = {
        "train-images": np.zeros((4, 28, 28), dtype=np.uint8),
        "train-labels": np.array([3, 1, 4, 1], dtype=np.uint8),
        "test-images": np.full((2, 28, 28), 255, dtype=np.uint8),
        "test-labels": np.array([5, 9], dtype=np.uint8),
    }
    files = []
    for name, array in arrays.items():
        shape = b"".join(length.to_bytes(4, "big") for length in array.shape)
        raw = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
        files.append(IdxFile(name, hashlib.sha256(raw).hexdigest(), md5=""))
    return tmp_path, IdxSet(
        name="small", url="http://127.0.0.1:9/", train=(files[0], files[1]), test=(files[2], files[3])
    )


class TestPaperTasks:
    @pytest.mark.parametrize(
        ("name", "registered", "mean", "std"),
        [("mnist", "MNIST", 0.1307, 0.3081), ("fashion-mnist", "FASHION_MNIST", 0.2860, 0.3530)],
    )
    def test_are_prepared_as_in_the_paper(self, small_mnist, monkeypatch, name, registered, mean, std):
        folder, source = small_mnist
        monkeypatch.setattr(images, registered, source)
        monkeypatch.setattr(images, "_PAPER_BATCH", 4)
        task = load(name, folder)
        black, white = (0 - mean) / std, (1 - mean) / std
        torch.testing.assert_close(task.train[0], torch.full((4, 1, 28, 28), black))
        torch.testing.assert_close(task.validation[0], torch.full((2, 1, 28, 28), white))
        assert task.train[1].tolist() == [3, 1, 4, 1]
        assert task.validation[1].tolist() == [5, 9]
        assert (task.epochs, task.block) == (5, 3000)
        assert describe(task).parameters == 21840

    def test_their_batch_is_that_of_most_of_the_papers_rows(self):
        assert images._PAPER_BATCH == 25

    def test_a_damaged_file_is_named(self, small_mnist, monkeypatch):
        folder, source = small_mnist
        monkeypatch.setattr(images, "MNIST", source)
        (folder / "test-images.gz").write_bytes(b"damaged")
        with pytest.raises(UserError, match=r"test-images\.gz"):
            load("mnist", folder)


def small_batch(**fields):
    """A task whose batch is no larger than the few patterns of these tests."""
    return Task(**{**fields, "batch_size": 2})


class TestReportNetwork:
    def test_is_the_reports(self, small_mnist, monkeypatch):
        folder, source = small_mnist
        monkeypatch.setattr(images, "MNIST", source)
        monkeypatch.setattr(images, "Task", small_batch)
        task = load("mnist-sigmoid", folder)
        assert (task.train[0].unique().tolist(), task.validation[0].unique().tolist()) == ([0], [1])
        assert task.train[1].tolist() == [3, 1, 4, 1]
        assert describe(task).parameters == 397510
        assert "397,510" in TASKS["mnist-sigmoid"].__doc__
        torch.manual_seed(0)
        model = task.model()
        assert [type(layer).__name__ for layer in model] == [
            "Flatten",
            "Linear",
            "Sigmoid",
            "Linear",
            "LogSoftmax",
        ]
        for weight, inputs in ((model[1].weight, 784), (model[3].weight, 500)):
            assert 0.99 * inputs**-0.5 < weight.abs().max() <= inputs**-0.5


class TestLossgradNetwork:
    def test_is_the_papers(self):
        torch.manual_seed(0)
        model = images.lossgrad_cnn()
        assert sum(p.numel() for p in model.parameters()) == 189230
        shapes, x = [], torch.rand(2, 3, 32, 32)
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                shapes.append(tuple(x.shape[1:]))
        assert shapes == [(30, 28, 28), (40, 10, 10), (50, 3, 3), (250,), (100,), (10,)]
        weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
        assert abs(weights.mean()) < 1e-3
        assert abs(weights.std() - 0.05) < 1e-3
        assert all((p == 0.2).all() for p in model.parameters() if p.ndim == 1)

    def test_its_images_are_centred_with_their_channels_first(self, monkeypatch):
        pixels = np.zeros((3, 32, 32, 3), dtype=np.uint8)
        pixels[1, 2, 3] = (0, 51, 255)
        splits = (
            (pixels, np.array([0, 7, 9], dtype=np.uint8)),
            (pixels[:2], np.array([4, 2], dtype=np.uint8)),
        )
        monkeypatch.setattr(images, "load_images", lambda source, folder: {CIFAR10: Images(*splits)}[source])
        monkeypatch.setattr(images, "Task", small_batch)
        task = load("cifar10")
        assert task.train[0].shape == (3, 3, 32, 32)
        torch.testing.assert_close(task.train[0][1, :, 2, 3], torch.tensor([-0.5, -0.3, 0.5]))
        assert (task.train[0] != -0.5).sum() == 2
        assert (task.train[1].tolist(), task.validation[1].tolist()) == ([0, 7, 9], [4, 2])
        assert task.epochs == 60
        assert f"{describe(task).parameters:,}" in TASKS["cifar10"].__doc__


def task(**changes):
    """A small task that has nothing wrong with it but the changes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 3, generator=generator)
    targets = inputs.sum(dim=1, keepdim=True)
    plain = Task(
        name="plain",
        model=lambda: nn.Linear(3, 1),
        train=(inputs[:15], targets[:15]),
        validation=(inputs[15:], targets[15:]),
        loss=nn.functional.mse_loss,
        batch_size=5,
    )
    return replace(plain, **changes)


def changed(pair, part=0):
    """The pair with one entry of one of its tensors changed."""
    tensors = [tensor.clone() for tensor in pair]
    tensors[part].view(-1)[3] += 1
    return tuple(tensors)


def holed(pair, part=0, hole=math.nan):
    """The pair with one number lost in the last pattern but one of one of its tensors."""
    tensors = [tensor.clone() for tensor in pair]
    tensors[part][-2, -1] = hole
    return tuple(tensors)


class Buffered(nn.Linear):
    def __init__(self, name="offset", **options):
        super().__init__(3, 1)
        self.register_buffer(name, torch.zeros(1, **options))


class TestVersion:
    @pytest.mark.parametrize(
        "changes",
        [
            {"train": changed(task().train)},
            {"train": changed(task().train, part=1)},
            {"validation": changed(task().validation)},
            {"validation": changed(task().validation, part=1)},
            {"train": (task().train[0].double(), task().train[1].double()), "model": lambda: nn.Linear(3, 1).double()},
            {"model": lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))},
            {"model": lambda: nn.Linear(3, 1, bias=False)},
            {"block": 10},
            {"version": "2"},
            {"metric": nn.functional.l1_loss},
            {"model": Buffered},
        ],
        ids=[
            *("input", "target", "validation input", "validation target", "type", "deeper", "bias"),
            *("block", "version", "metric", "buffer"),
        ],
    )  # fmt: skip
    def test_changes_with_what_decides_the_numbers(self, changes):
        double = changes.get("train", task().train)[0].dtype == torch.float64
        if double:
            changes = {**changes, "validation": tuple(t.double() for t in task().validation)}
        assert describe(task(**changes)).version != describe(task()).version

    @pytest.mark.parametrize("changes", [{"name": "other"}, {"batch_size": 3}, {"epochs": 9}])
    def test_leaves_out_what_a_runs_key_holds_anyway(self, changes):
        assert describe(task(**changes)).version == describe(task()).version

    def test_the_same_numbers_in_another_shape_are_other_data(self):
        flat = task(train=(torch.ones(4, 3), torch.ones(4, 1)), batch_size=4)
        other = task(
            train=(torch.ones(4, 3), torch.ones(4, 1, 1)), batch_size=4, loss=lambda o, t: o.mean() + t.mean()
        )
        assert describe(flat).version != describe(other).version

    def test_a_metric_of_another_name_is_another(self):
        def described(name):
            return describe(task(metric=nn.functional.l1_loss, metric_name=name))

        assert described("error").version != described("distance").version
        assert describe(task(metric_name="unused")).version == describe(task()).version

    def test_buffers_count_with_name_and_type_and_parameters_with_their_type(self):
        models = [
            Buffered,
            lambda: Buffered("shift"),
            lambda: Buffered(dtype=torch.float64),
            lambda: nn.Sequential(Floats(torch.float64), nn.Linear(3, 1).double(), Floats()),
            lambda: nn.Sequential(Floats(), nn.Linear(3, 1), Floats()),
        ]
        assert len({describe(task(model=model)).version for model in models}) == len(models)

    def test_layers_of_another_width_are_another_model(self):
        def described(width):
            return describe(task(model=lambda: nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))))

        assert described(4).version != described(5).version
        assert described(4).version == described(4).version

    def test_every_type_of_tensor_can_be_hashed(self):
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64):
            inputs = torch.ones(6, 3).to(dtype)
            description = describe(
                task(
                    model=lambda: nn.Sequential(Floats(), nn.Linear(3, 1)),
                    train=(inputs, torch.ones(6, 1)),
                    validation=(inputs.t().contiguous().t(), torch.ones(6, 1)),  # not contiguous
                )
            )
            assert len(description.version) == 64

    def test_describing_leaves_the_random_state_alone(self):
        np.random.seed(1)
        random.seed(1)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        describe(task())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]

    def test_describing_leaves_the_data_alone(self):
        class InPlace(nn.Linear):
            def forward(self, x):
                return super().forward(x.mul_(2))

        plain = task()
        before = [tensor.clone() for tensor in (*plain.train, *plain.validation)]
        describe(replace(plain, model=lambda: InPlace(3, 1)))
        for tensor, copy in zip((*plain.train, *plain.validation), before, strict=True):
            assert torch.equal(tensor, copy)


class Floats(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def drawn(draw):
    """A model function whose weights are ``draw``'s."""

    def model():
        made = nn.Linear(3, 1)
        with torch.no_grad():
            made.weight.mul_(draw())
        return made

    return model


class TestModelFunction:
    @pytest.mark.parametrize("shared", ["model", "parameter", "memory"])
    def test_that_returns_the_same_weights_each_time_is_refused(self, shared):
        kept = nn.Linear(3, 1)

        def model():
            made = nn.Linear(3, 1)
            if shared == "parameter":
                made.weight = kept.weight
            if shared == "memory":
                made.weight = nn.Parameter(kept.weight.detach())
            return kept if shared == "model" else made

        with pytest.raises(UserError, match=r"returns the same model .* each time; make a new one") as error:
            describe(task(model=model))
        assert "Task plain" in sentence(error)

    @pytest.mark.parametrize(
        "draw", [random.random, np.random.rand, torch.rand(()).uniform_], ids=["python", "numpy", "torch"]
    )
    def test_may_draw_from_any_global_random_state(self, draw):
        assert describe(task(model=drawn(draw))) == describe(task())

    def test_that_draws_from_elsewhere_is_refused(self):
        generator = np.random.default_rng(0)
        with pytest.raises(UserError, match="other weights from the same seed") as error:
            describe(task(model=drawn(generator.random)))
        sentence(error)

    def test_may_tie_weights_and_leave_shapes_to_the_first_batch(self):
        def tied():
            made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LazyLinear(1))
            made[1].weight = made[0].weight
            return made

        assert describe(task(model=tied)).parameters == 9 + 3 + 3 + 3 + 1


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"name": ""}, "name"),
            ({"model": nn.Linear(3, 1).weight}, "its model must be a function"),
            ({"loss": None}, "its loss must be a function"),
            ({"metric": "accuracy"}, "its metric must be a function"),
            ({"train": torch.ones(3, 3)}, "train data must be two tensors"),
            ({"train": ([1.0], [2.0])}, "train data must be two tensors"),
            ({"train": (torch.tensor(1.0), torch.tensor(1.0))}, "train data must be two tensors"),
            ({"train": (torch.ones(7, 3), torch.ones(6, 1))}, "7 inputs but 6 targets"),
            ({"validation": (torch.ones(7, 3), torch.ones(8, 1))}, "validation data have 7 inputs but 8"),
            ({"validation": (torch.ones(0, 3), torch.ones(0, 1))}, "validation data are empty"),
            ({"train": (torch.ones(0, 3), torch.ones(0, 1))}, "train data are empty"),
            ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
            ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, not 2.5"),
            ({"batch_size": 16}, "batch_size 16 is more than its 15 training patterns"),
            ({"epochs": True}, "epochs must be"),
            ({"block": -1}, "block must be"),
        ],
    )  # fmt: skip
    def test_when_loaded(self, monkeypatch, changes, said):
        monkeypatch.setitem(TASKS, "own", lambda: task(**changes))
        with pytest.raises(UserError, match=said) as error:
            load("own")
        assert "own" in sentence(error)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model": lambda: 1 / 0}, "model cannot be made: ZeroDivisionError"),
            ({"model": lambda: "network"}, "returned str, not a torch Module"),
            ({"model": lambda: nn.Flatten()}, "no parameters to train"),
            ({"model": lambda: nn.Linear(4, 1)}, r"train data \(inputs \(5, 3\) and targets \(5, 1\)\) fails"),
            ({"validation": (torch.ones(5, 2), torch.ones(5, 1))}, r"validation data \(inputs \(5, 2\)"),
            ({"loss": lambda o, t: (o - t) ** 2}, r"its loss must be a scalar .* of shape \(5, 1\)"),
            ({"metric": lambda o, t: (o > t).sum()}, "its metric must be a scalar tensor of a floating-point type, .* int64"),
            ({"metric": lambda o, t: (o > t).all()}, "its metric must be a scalar tensor of a floating-point type, .* bool"),
            ({"loss": lambda o, t: 1.0}, "its loss must be a scalar tensor .* not float"),
            ({"metric": lambda o, t: o == t}, "its metric must be a scalar"),
            ({"loss": lambda o, t: t.mean()}, "does not depend on the model"),
            ({"loss": lambda o, t: o.mean() * float("nan")}, "its loss on the first train data is nan"),
            ({"loss": lambda o, t: o.mean() / 0}, "its loss on the first train data is -?inf"),
            ({"train": holed(task().train)}, r"its train inputs hold NaN or infinity, first in pattern 13 .* of 15"),
            ({"train": holed(task().train, part=1)}, "its train targets hold NaN"),
            ({"validation": holed(task().validation, hole=-math.inf)}, "its validation inputs hold NaN or infinity, first in pattern 3 "),
            ({"validation": holed(task().validation, part=1)}, "its validation targets hold NaN"),
            ({"validation": tuple(t.flatten()[:5] for t in holed(task().validation, part=1))}, "targets .* first in pattern 3 "),
            ({"metric": lambda o, t: o.mean() * float("nan")}, "its metric on the first train data is nan"),
        ],
    )  # fmt: skip
    def test_when_tried(self, changes, said):
        with pytest.raises(UserError, match=said) as error:
            describe(task(**changes))
        assert "Task plain" in sentence(error)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("digit", "did you mean digits"),
            ("minst", "did you mean mnist"),
            ("qqqq", "the tasks are digits, digits-mlp, mnist, .*, regression, or"),
            ("", "the tasks are"),
            ("digits:task", "There is no task 'digits:task'"),
        ],
    )
    def test_an_unknown_name(self, name, said):
        with pytest.raises(UserError, match=said) as error:
            load(name)
        sentence(error)

    def test_a_data_folder_that_nothing_reads(self, tmp_path):
        with pytest.raises(UserError, match="leave out --data") as error:
            load("digits", tmp_path)
        sentence(error)


FILE = """
import torch
from torch import nn
from surefoot.lab.tasks import Task

def task():
    x = torch.arange(12.0).view(6, 2)
    return Task("own", lambda: nn.Linear(2, 1), (x, x[:, :1]), (x, x[:, :1]), nn.functional.mse_loss, batch_size=2)
"""


@pytest.fixture
def own(tmp_path):
    """Writes a task file; returns its path."""

    def write(source, name="my_task.py"):
        path = tmp_path / name
        path.write_text(source)
        return path

    return write


class TestOwnFile:
    def test_is_loaded_by_its_path(self, own, monkeypatch):
        path = own(FILE)
        info = describe(load(f"{path}:task"))
        assert (info.name, info.train_patterns, info.parameters) == ("own", 6, 3)
        monkeypatch.chdir(path.parent)
        assert describe(load("my_task.py:task")) == info
        assert not (path.parent / "__pycache__").exists()

    def test_another_source_is_another_version_even_within_a_second(self, own):
        path = own(FILE)
        first = load(f"{path}:task")
        stat = path.stat()
        own(FILE.replace("batch_size=2", "batch_size=3"))  # as long as before
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        second = load(f"{path}:task")
        assert second.batch_size == 3
        assert describe(first).version != describe(second).version

    def test_two_files_of_one_name_are_two(self, own, tmp_path):
        (tmp_path / "other").mkdir()
        first = load(f"{own(FILE)}:task")
        second = load(f"{own(FILE.replace('own', 'two'), 'other/my_task.py')}:task")
        assert (first.name, second.name) == ("own", "two")

    def test_can_import_what_lies_beside_it(self, own):
        own("WIDTH = 2\n", "surefoot_test_neighbour.py")
        path = own(
            FILE.replace("import torch\n", "import torch\nfrom surefoot_test_neighbour import WIDTH\n")
        )
        assert load(f"{path}:task").name == "own"

    def test_another_function_of_a_file_is_another_version(self, own):
        path = own(FILE + "\n\nother = task\n")
        task, other, again = (describe(load(f"{path}:{name}")).version for name in ("task", "other", "task"))
        assert task == again != other

    def test_what_it_imports_is_part_of_its_version_and_read_anew(self, own, tmp_path):
        (tmp_path / "surefoot_test_package").mkdir()
        own("", "surefoot_test_package/__init__.py")
        own("from surefoot_test_package.deep import SIZE\n", "surefoot_test_neighbour.py")
        own("SIZE = 2\n", "surefoot_test_package/deep.py")
        path = own(
            FILE.replace(
                "import torch\n", "import torch\nfrom surefoot_test_neighbour import SIZE\n"
            ).replace("batch_size=2", "batch_size=SIZE")
        )
        first, same = load(f"{path}:task"), load(f"{path}:task")
        own("SIZE = 1 + 2\n", "surefoot_test_package/deep.py")
        edited = load(f"{path}:task")
        assert (first.batch_size, edited.batch_size) == (2, 3)
        assert first.version == same.version != edited.version

    def test_what_others_had_imported_from_its_folder_is_part_of_its_version(
        self, own, tmp_path, monkeypatch
    ):
        own("SIZE = 2\n", "surefoot_test_early.py")
        path = own(FILE.replace("import torch\n", "import torch\nimport surefoot_test_early\n"))
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module("surefoot_test_early")
        early = load(f"{path}:task").version
        assert sys.modules.pop("surefoot_test_early") is module
        assert load(f"{path}:task").version == early
        own("SIZE = 1 + 2\n", "surefoot_test_early.py")
        assert load(f"{path}:task").version != early

    def test_libraries_are_no_part_of_its_version(self, own):
        path = own(FILE.replace("import torch\n", "import torch\nimport this\n"))
        importlib.import_module("this")
        loaded_before = load(f"{path}:task").version
        del sys.modules["this"]
        assert load(f"{path}:task").version == loaded_before
        assert "this" in sys.modules

    def test_is_given_the_data_folder_if_it_asks(self, own, tmp_path):
        path = own(FILE.replace("task():", "task(data):").replace('"own"', "str(data)"))
        assert load(f"{path}:task", tmp_path).name == str(tmp_path)
        assert load(f"{path}:task").name == "None"

    def test_is_compiled_as_it_stands(self, own):
        path = own(FILE + "\n\ndef plain(x: int): ...\n\n\nassert plain.__annotations__['x'] is int\n")
        assert load(f"{path}:task").name == "own"

    def test_its_own_sentence_is_passed_on(self, own):
        path = own(
            "from surefoot.lab.errors import UserError\ndef task():\n    raise UserError('Feed me.')\n"
        )
        with pytest.raises(UserError, match=r"^Feed me\.$"):
            load(f"{path}:task")

    @pytest.mark.parametrize(
        ("source", "function", "said"),
        [
            (FILE, "tsk", r"has no function 'tsk'; did you mean task"),
            (FILE, "", r"has no function ''"),
            (FILE + "\nnumber = 3\n", "number", r"has no function 'number'"),
            ("def task(:\n", "task", r"cannot be imported: SyntaxError: .*\(my_task.py, line 1\)\.$"),
            ("import surefoot_absent\n", "task", r"ModuleNotFoundError: .* \(my_task.py, line 1\)"),
            ("import sys\nsys.exit(3)\n", "task", r"SystemExit: 3 \(my_task.py, line 2\)"),
            ("def task():\n    return {}['x']\n", "task", r"failed: KeyError: 'x' \(my_task.py, line 2\)"),
            ("import torch\ndef task():\n    torch.ones(2) @ torch.ones(3)\n", "task", r"\(my_task.py, line 3\)"),
            ("import json\ndef task():\n    json.loads('{')\n", "task", r"JSONDecodeError: .*\(my_task.py, line 3\)"),
            ("def task():\n    return 3\n", "task", r"returned int; it must return a surefoot.lab.tasks.Task"),
            ("def task(size):\n    return size\n", "task", r"TypeError"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_with_it_is_one_sentence(self, own, source, function, said):
        path = own(source)
        with pytest.raises(UserError, match=said) as error:
            load(f"{path}:{function}")
        assert str(path) in sentence(error)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read: No such file") as error:
            load(f"{tmp_path}/absent.py:task")
        sentence(error)

    def test_a_file_without_a_function(self, own):
        path = own(FILE)
        with pytest.raises(UserError, match=f"name the function .* {path}:task") as error:
            load(str(path))
        sentence(error)

    def test_the_search_path_is_left_as_it_was(self, own):
        before = list(sys.path)
        load(f"{own(FILE)}:task")
        with pytest.raises(UserError):
            load(f"{own('1 / 0')}:task")
        assert sys.path == before


def test_an_error_is_explained_on_one_line():
    try:
        raise ValueError("first\nsecond " + "x" * 1000)
    except ValueError as error:
        text = explain(error)
    assert text.startswith("ValueError: first second xxx")
    assert "test_tasks.py, line " in text
    assert len(text) < 400
    assert explain(KeyError()) == "KeyError"
