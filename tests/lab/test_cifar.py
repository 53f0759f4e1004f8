"""CIFAR comes whole from pickles, archive, download or sheets, or one sentence says what is wrong; no pickle runs code."""

import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from serving import served

from surefoot.lab.data import CIFAR10, Batch, CifarSet, Sheets, load_images
from surefoot.lab.data.cifar import read_plain
from surefoot.lab.errors import UserError

SIDE, ACROSS = 8, 3
TRAIN, TEST = 2 * ACROSS**2, ACROSS**2
"""Two sheets of training images and one of test images; as pickles, two batches and one."""


def drawn(count, seed):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8), draw.integers(0, 10, count, np.uint8)


SPLITS = {"train": drawn(TRAIN, 0), "test": drawn(TEST, 1)}


def python2_string(value):
    return b"T" + struct.pack("<i", len(value)) + value


def python2_pickle(pixels, labels):
    """A batch as its makers pickled it, byte by byte: Python 2, protocol 2, NumPy's names and flags of that time."""
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    dtype = b"cnumpy\ndtype\n" + python2_string(b"u1") + b"K\x00K\x01\x87R"  # align, copy: 0 and 1
    dtype += b"(K\x03" + python2_string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"".join(b"M" + struct.pack("<H", length) for length in planes.shape) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2_string(b"b") + b"\x87R"
    )
    array += b"(K\x01" + shape + dtype + b"\x89" + python2_string(planes.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = python2_string(b"data") + array + python2_string(b"labels") + numbers
    return b"\x80\x02}(" + entries + b"u."


BATCHES = {
    "data_batch_1": tuple(part[: TRAIN // 2] for part in SPLITS["train"]),
    "data_batch_2": tuple(part[TRAIN // 2 :] for part in SPLITS["train"]),
    "test_batch": SPLITS["test"],
}
PICKLES = {name: python2_pickle(*batch) for name, batch in BATCHES.items()}


def archived(pickles=PICKLES, folder="tiny-py"):
    """The bytes of the archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, raw in {"readme.html": b"<p>", **pickles}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return buffer.getvalue()


def tiny(pickles=PICKLES, url="http://127.0.0.1:9/", archive=b""):
    """The data set of those 27 images; nothing answers at its address."""
    batches = [Batch(name, hashlib.md5(raw).hexdigest()) for name, raw in pickles.items()]
    sheets = {
        name: Sheets(name, len(pixels) // ACROSS**2, sha256(pixels), sha256(labels))
        for name, (pixels, labels) in SPLITS.items()
    }
    return CifarSet(
        name="tiny",
        url=f"{url}tiny.tar.gz",
        md5=hashlib.md5(archive).hexdigest(),
        folder="tiny-py",
        train=tuple(batches[:2]),
        test=tuple(batches[2:]),
        train_sheets=sheets["train"],
        test_sheets=sheets["test"],
        side=SIDE,
        across=ACROSS,
    )


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def fill_pickles(folder, pickles=PICKLES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in pickles.items():
        (folder / name).write_bytes(raw)


def fill_sheets(folder):
    imagecodecs = pytest.importorskip("imagecodecs", reason="imagecodecs is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, _) in SPLITS.items():
        for i, tiles in enumerate(pixels.reshape(-1, ACROSS, ACROSS, SIDE, SIDE, 3)):
            sheet = tiles.swapaxes(1, 2).reshape(ACROSS * SIDE, ACROSS * SIDE, 3)
            (folder / f"{name}_{i:02d}.jxl").write_bytes(imagecodecs.jpegxl_encode(sheet, lossless=True))
    np.savez(folder / "labels.npz", **{name: labels for name, (_, labels) in SPLITS.items()})


def loaded(folder, cache, source=None):
    return load_images(source or tiny(), folder, cache=cache, environment={})


def assert_whole(images):
    for found, made in zip((*images.train, *images.test), (*SPLITS["train"], *SPLITS["test"]), strict=True):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, made)


def sentence(error):
    """The message, which must be one sentence."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


class TestPickles:
    @pytest.mark.parametrize("inside", ["tiny/tiny-py", "tiny-py", "tiny", ""])
    def test_are_found_in_any_of_the_usual_folders(self, tmp_path, cache, inside):
        fill_pickles(tmp_path / inside)
        assert_whole(loaded(tmp_path, cache))

    @pytest.mark.parametrize("inside", ["tiny", ""])
    def test_are_read_out_of_their_archive(self, tmp_path, cache, inside):
        (tmp_path / inside).mkdir(exist_ok=True)
        (tmp_path / inside / "tiny.tar.gz").write_bytes(archived())
        assert_whole(loaded(tmp_path, cache))
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"tiny.tar.gz"}

    def test_one_wrong_byte_is_seen(self, tmp_path, cache):
        raw = bytearray(PICKLES["data_batch_2"])
        raw[len(raw) // 2] ^= 1
        fill_pickles(tmp_path, {**PICKLES, "data_batch_2": bytes(raw)})
        with pytest.raises(UserError, match="data_batch_2 is not the published one") as error:
            loaded(tmp_path, cache)
        sentence(error)

    def test_a_batch_that_is_missing_is_named(self, tmp_path, cache):
        fill_pickles(tmp_path)
        (tmp_path / "test_batch").unlink()
        with pytest.raises(UserError, match="test_batch cannot be read") as error:
            loaded(tmp_path, cache)
        sentence(error)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (archived()[:200], "cannot be unpacked"),
            (b"<!DOCTYPE html>", "cannot be unpacked"),
            (archived(folder="other-py"), "holds no tiny-py/data_batch_1"),
        ],
        ids=["half", "page", "another"],
    )
    def test_a_damaged_archive_is_named(self, tmp_path, cache, content, said):
        path = tmp_path / "tiny.tar.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            loaded(tmp_path, cache)
        assert str(path) in sentence(error)

    @pytest.mark.parametrize(
        "kept",
        [
            {b"data": np.zeros((2, 3 * SIDE**2), np.uint8)},
            {b"data": np.zeros((2, 3 * SIDE**2 + 1), np.uint8), b"labels": [1, 2]},
            {b"data": np.zeros((2, 3 * SIDE**2)), b"labels": [1, 2]},
            {b"data": np.zeros((2, 3 * SIDE**2), np.uint8), b"labels": [1, 2, 3]},
            [1, 2],
        ],
        ids=["labels", "length", "type", "number", "list"],
    )
    def test_what_is_no_batch_is_refused_even_with_the_right_checksum(self, tmp_path, cache, kept):
        pickles = {**PICKLES, "data_batch_1": pickle.dumps(kept, protocol=3)}
        fill_pickles(tmp_path, pickles)
        with pytest.raises(UserError, match="data_batch_1 is not the published one") as error:
            loaded(tmp_path, cache, tiny(pickles))
        sentence(error)


class Harmful:
    """Its pickle, read as pickles usually are, would leave a mark in this module."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


marks = []


def mark(*_):
    marks.append("ran")


class TestReadPlain:
    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_gives_plain_values_and_arrays_back(self, protocol):
        made = {"numbers": [1, 2.5, None, True], "array": np.arange(6, dtype=np.int16).reshape(2, 3)}
        if protocol == 2:
            made["array"] = [1]  # Python 3 writes an array's bytes there with the help of codecs
        found = read_plain(pickle.dumps(made, protocol), "it")
        assert str(found) == str(made)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("call", [mark, os.getcwd, sys.exit, eval], ids=lambda call: call.__name__)
    def test_runs_nothing(self, protocol, call):
        raw = pickle.dumps({"data": Harmful(call, *(["1"] if call is not os.getcwd else []))}, protocol)
        with pytest.raises(UserError, match="batch is damaged, or holds more") as error:
            read_plain(raw, "batch")
        sentence(error)
        assert not marks

    def test_would_have_run_in_a_plain_unpickler(self):
        """So that the test above can fail."""
        pickle.loads(pickle.dumps(Harmful(mark)))
        assert marks.pop() == "ran"

    @pytest.mark.parametrize("raw", [b"", b"\x80\x02}(", b"hello", PICKLES["test_batch"][:300]])
    def test_what_is_no_pickle_is_told(self, raw):
        with pytest.raises(UserError, match="damaged") as error:
            read_plain(raw, "batch")
        sentence(error)


class TestSheets:
    @pytest.mark.parametrize("inside", ["tiny", ""])
    def test_hold_the_same_images(self, tmp_path, cache, inside):
        fill_sheets(tmp_path / inside)
        assert_whole(loaded(tmp_path, cache))

    def test_are_decoded_once(self, tmp_path, cache):
        fill_sheets(tmp_path)
        loaded(tmp_path, cache)
        for path in tmp_path.glob("*.jxl"):
            path.write_bytes(b"")
        assert_whole(loaded(tmp_path, cache))

    def test_a_damaged_cache_is_made_again(self, tmp_path, cache):
        fill_sheets(tmp_path)
        loaded(tmp_path, cache)
        whole, cut = sorted(cache.rglob("*.npy"))
        kept = {path: path.read_bytes() for path in (whole, cut)}
        whole.write_bytes(kept[whole][:-1] + bytes([kept[whole][-1] ^ 1]))
        cut.write_bytes(kept[cut][:50])
        assert_whole(loaded(tmp_path, cache))
        assert {path: path.read_bytes() for path in cache.rglob("*.*")} == kept

    def test_a_cache_that_cannot_be_written_costs_only_time(self, tmp_path, cache):
        fill_sheets(tmp_path)
        cache.write_text("no folder")
        assert_whole(loaded(tmp_path, cache))

    def test_pickles_come_first(self, tmp_path, cache):
        fill_pickles(tmp_path)
        (tmp_path / "train_00.jxl").write_bytes(b"damaged")
        assert_whole(loaded(tmp_path, cache))

    def test_a_damaged_sheet_is_named(self, tmp_path, cache):
        fill_sheets(tmp_path)
        (tmp_path / "train_01.jxl").write_bytes(b"damaged")
        with pytest.raises(
            UserError, match=r"train_01.jxl is damaged: it is no sheet of 3 x 3 images"
        ) as error:
            loaded(tmp_path, cache)
        sentence(error)

    def test_a_missing_sheet_is_named(self, tmp_path, cache):
        fill_sheets(tmp_path)
        (tmp_path / "test_00.jxl").unlink()
        with pytest.raises(UserError, match=r"test_00.jxl cannot be read") as error:
            loaded(tmp_path, cache)
        sentence(error)

    def test_sheets_in_another_order_are_seen_and_not_kept(self, tmp_path, cache):
        fill_sheets(tmp_path)
        first, second = (tmp_path / f"train_0{i}.jxl" for i in range(2))
        raw = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(raw)
        with pytest.raises(
            UserError, match=r"train_00.jxl to train_01.jxl do not hold the published"
        ) as error:
            loaded(tmp_path, cache)
        sentence(error)
        assert not list(cache.rglob("*"))

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            ({"train": SPLITS["train"][1]}, "does not hold the labels"),
            (
                {"train": SPLITS["train"][1][::-1], "test": SPLITS["test"][1]},
                "labels are not the published ones",
            ),
            (None, "does not hold the labels"),
        ],
        ids=["half", "another order", "no archive"],
    )
    def test_damaged_labels_are_named(self, tmp_path, cache, labels, said):
        fill_sheets(tmp_path)
        path = tmp_path / "labels.npz"
        if labels is None:
            path.write_bytes(b"damaged")
        else:
            np.savez(path, **labels)
        with pytest.raises(UserError, match=said) as error:
            loaded(tmp_path, cache)
        assert str(path) in sentence(error)

    def test_without_the_package_the_extra_is_named(self, tmp_path, cache, monkeypatch):
        fill_sheets(tmp_path)
        monkeypatch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(UserError, match=r"pip install 'surefoot\[jxl\]'") as error:
            loaded(tmp_path, cache)
        sentence(error)


class TestElsewhere:
    def test_a_folder_without_any_form_is_told_what_it_lacks(self, tmp_path, cache):
        with pytest.raises(
            UserError, match=r"holds no tiny-py/, tiny.tar.gz or train_00.jxl of tiny"
        ) as error:
            loaded(tmp_path, cache)
        sentence(error)

    def test_the_archive_is_fetched_and_kept(self, cache):
        archive = archived()
        with served(lambda _: (200, len(archive), archive)) as (url, asked):
            for _ in range(2):
                assert_whole(loaded(None, cache, tiny(url=url, archive=archive)))
        assert asked == ["/tiny.tar.gz"]

    def test_an_archive_that_is_another_is_refused(self, cache):
        other = archived(folder="other")
        with (
            served(lambda _: (200, len(other), other)) as (url, _),
            pytest.raises(UserError, match="what came is not the published file") as error,
        ):
            loaded(None, cache, tiny(url=url, archive=archived()))
        sentence(error)


def test_the_published_data_set():
    """Checksums, shapes and classes of the real thing, where SUREFOOT_DATA has it."""
    offline = replace(CIFAR10, url="http://127.0.0.1:9/cifar-10-python.tar.gz")
    try:
        images = load_images(offline)
    except UserError as error:
        if "cannot be downloaded" in str(error) or "imagecodecs" in str(error):
            pytest.skip("cifar10 is not on this machine, or cannot be read there")
        raise
    assert images.train[0].shape == (50000, 32, 32, 3)
    assert images.test[0].shape == (10000, 32, 32, 3)
    assert np.bincount(images.train[1]).tolist() == [5000] * 10
    assert np.bincount(images.test[1]).tolist() == [1000] * 10
    mean = images.train[0].mean(axis=(0, 1, 2)) / 255  # the published one
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-7)
