"""Real data come whole and as published, or not at all: one sentence says which file is wrong."""

import gzip
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from serving import served

from surefoot.lab import data
from surefoot.lab.data import IdxFile, IdxSet, load_images, read_idx
from surefoot.lab.errors import UserError


def idx(array):
    """The bytes of an IDX file."""
    shape = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


ARRAYS = {
    "train-images": pixels(6, 4, 3),
    "train-labels": pixels(6),
    "test-images": pixels(2, 4, 3, seed=1),
    "test-labels": pixels(2, seed=1),
}
PACKED = {name: gzip.compress(idx(array), mtime=0) for name, array in ARRAYS.items()}


def tiny(url="http://127.0.0.1:9/", packaged=None):
    """A data set of eight small images; nothing answers at its address."""
    files = {
        name: IdxFile(name, hashlib.sha256(idx(array)).hexdigest(), hashlib.md5(PACKED[name]).hexdigest())
        for name, array in ARRAYS.items()
    }
    return IdxSet(
        name="tiny",
        url=url,
        train=(files["train-images"], files["train-labels"]),
        test=(files["test-images"], files["test-labels"]),
        packaged=packaged,
    )


def fill(folder, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ARRAYS.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(PACKED[name] if packed else idx(array))
    return folder


def assert_whole(images):
    for found, name in zip((*images.train, *images.test), ARRAYS, strict=True):
        np.testing.assert_array_equal(found, ARRAYS[name])


def sentence(error):
    """The message, which must be one sentence."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


class TestReadIdx:
    @pytest.mark.parametrize("shape", [(7,), (0, 2), (3, 4), (5, 2, 3), (2, 1, 2, 3)])
    @pytest.mark.parametrize("packed", [True, False])
    def test_gives_back_what_was_written_whatever_the_name(self, tmp_path, shape, packed):
        array = pixels(*shape)
        path = tmp_path / ("unpacked.gz" if not packed else "packed")
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        found = read_idx(path)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, array)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "not an IDX file"),
            (b"\0\0\x08", "not an IDX file"),
            (b"\x01" + idx(pixels(3))[1:], "not an IDX file"),
            (b"\0\0\x0d\x01" + idx(pixels(3))[4:], "not an IDX file"),  # 0x0d: floats
            (b"<!DOCTYPE html><html></html>", "not an IDX file"),
            (idx(pixels(3, 4))[:9], "half-downloaded"),
            (idx(pixels(3, 4))[:-1], "half-downloaded"),
            (idx(pixels(3, 4)) + b"\0", "half-downloaded"),
            (gzip.compress(idx(pixels(3, 4)), mtime=0)[:-9], "half-downloaded"),
            (gzip.compress(idx(pixels(300, 4)), mtime=0)[:100], "half-downloaded"),
            (gzip.compress(idx(pixels(30)), mtime=0)[:15] + bytes(20), "damaged"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path, content, said):
        path = tmp_path / "some-images"
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            read_idx(path)
        assert str(path) in sentence(error)

    def test_one_wrong_byte_is_seen(self, tmp_path):
        array = pixels(3, 4)
        wrong = array.copy()
        wrong[1, 2] ^= 1
        path = tmp_path / "some-images"
        path.write_bytes(idx(wrong))
        with pytest.raises(UserError, match="not the published one") as error:
            read_idx(path, sha256=hashlib.sha256(idx(array)).hexdigest())
        assert str(path) in sentence(error)

    def test_a_file_that_was_packed_again_is_as_good(self, tmp_path):
        array = pixels(50, 4)
        path = tmp_path / "some-images.gz"
        digest = hashlib.sha256(idx(array)).hexdigest()
        for level, time in ((1, 0), (9, 1e9)):
            path.write_bytes(gzip.compress(idx(array), compresslevel=level, mtime=time))
            np.testing.assert_array_equal(read_idx(path, sha256=digest), array)

    def test_what_cannot_be_read_is_named(self, tmp_path):
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(UserError, match="cannot be read") as error:
                read_idx(path)
            assert str(path) in sentence(error)


class TestFolders:
    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("inside", ["", "tiny"])
    def test_a_folder_may_hold_one_data_set_or_several(self, tmp_path, packed, inside):
        fill(tmp_path / inside, packed)
        assert_whole(load_images(tiny(), tmp_path, environment={}))
        assert_whole(load_images(tiny(), environment={data.ENVIRONMENT: str(tmp_path)}))

    def test_the_data_sets_own_folder_comes_first(self, tmp_path):
        fill(tmp_path / "tiny")
        for name in ARRAYS:
            (tmp_path / name).write_bytes(b"another data set's")
        assert_whole(load_images(tiny(), tmp_path, environment={}))

    def test_the_folder_asked_for_is_never_passed_over(self, tmp_path):
        elsewhere = fill(tmp_path / "elsewhere")
        asked = tmp_path / "asked"
        asked.mkdir()
        with pytest.raises(UserError, match="holds no train-images") as error:
            load_images(tiny(packaged=elsewhere), asked, environment={data.ENVIRONMENT: str(elsewhere)})
        assert str(asked) in sentence(error)

    def test_the_systems_package_comes_after_the_environment(self, tmp_path):
        packaged = fill(tmp_path / "packaged")
        assert_whole(load_images(tiny(packaged=packaged), environment={}))
        named = fill(tmp_path / "named")
        (named / "train-images.gz").write_bytes(b"damaged")
        with pytest.raises(UserError, match="named"):
            load_images(tiny(packaged=packaged), environment={data.ENVIRONMENT: str(named)})

    def test_the_environment_may_name_a_folder_for_other_data(self, tmp_path):
        packaged = fill(tmp_path / "packaged")
        assert_whole(load_images(tiny(packaged=packaged), environment={data.ENVIRONMENT: str(tmp_path)}))

    @pytest.mark.parametrize("origin", ["--data", data.ENVIRONMENT])
    def test_a_folder_that_is_none_is_named_with_its_origin(self, tmp_path, origin):
        absent = tmp_path / "absent"
        folder, environment = (absent, {}) if origin == "--data" else (None, {origin: str(absent)})
        with pytest.raises(UserError, match="not a folder") as error:
            load_images(tiny(), folder, environment=environment)
        assert origin in sentence(error)
        assert str(absent) in sentence(error)

    def test_a_file_of_another_data_set_is_refused(self, tmp_path):
        fill(tmp_path)
        (tmp_path / "test-labels.gz").write_bytes(gzip.compress(idx(pixels(2, seed=5))))
        with pytest.raises(UserError, match=r"test-labels.gz .*not the published one"):
            load_images(tiny(), tmp_path, environment={})


def as_published(file):
    packed = PACKED[file.removesuffix(".gz")]
    return 200, len(packed), packed


class TestDownload:
    def test_comes_once_and_is_kept(self, tmp_path):
        with served(as_published) as (url, asked):
            for _ in range(2):
                assert_whole(load_images(tiny(url), cache=tmp_path, environment={}))
            assert sorted(asked) == sorted(f"/{name}.gz" for name in ARRAYS)
        # and from then on without a network
        assert_whole(load_images(tiny(), cache=tmp_path, environment={}))

    def test_a_kept_file_that_was_damaged_comes_again(self, tmp_path):
        with served(as_published) as (url, asked):
            load_images(tiny(url), cache=tmp_path, environment={})
            (tmp_path / "tiny" / "train-labels.gz").write_bytes(b"damaged")
            assert_whole(load_images(tiny(url), cache=tmp_path, environment={}))
            assert asked.count("/train-labels.gz") == 2

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (lambda _: (200, 7, b"changed"), "not the published file"),
            (
                lambda file: (200, len(as_published(file)[2]), as_published(file)[2][:20]),
                "--data",
            ),  # the connection breaks off
            (lambda _: (404, 0, b""), "answered 404"),
            (lambda _: (503, 0, b""), "answered 503"),
        ],
        ids=["changed", "half", "absent", "overloaded"],
    )
    def test_what_goes_wrong_is_said_and_leaves_nothing(self, tmp_path, answer, said):
        with served(answer) as (url, _), pytest.raises(UserError, match=said) as error:
            load_images(tiny(url), cache=tmp_path, environment={})
        assert f"{url}train-images.gz cannot be downloaded" in sentence(error)
        assert "--data" in sentence(error)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_without_a_network_the_way_out_is_named(self, tmp_path):
        with pytest.raises(
            UserError, match="put the files of tiny into a folder and name it with --data"
        ) as error:
            load_images(tiny(), cache=tmp_path, environment={})
        sentence(error)

    def test_a_published_file_that_holds_something_else_is_refused(self, tmp_path):
        # An md5 can be forged and is checked for the packed file only: the content has the last word.
        source = tiny()
        forged = gzip.compress(idx(pixels(6, 4, 3, seed=9)))
        images, labels = source.train
        images = replace(images, md5=hashlib.md5(forged).hexdigest())
        with (
            served(lambda _: (200, len(forged), forged)) as (url, _),
            pytest.raises(UserError, match="not the published one"),
        ):
            load_images(replace(source, url=url, train=(images, labels)), cache=tmp_path, environment={})


@pytest.mark.parametrize("source", [data.MNIST, data.FASHION_MNIST], ids=lambda source: source.name)
def test_the_published_data_sets(source, tmp_path):
    """Checksums and shapes of the real thing, where SUREFOOT_DATA or a package has it."""
    offline = replace(source, url="http://127.0.0.1:9/")
    try:
        images = load_images(offline, cache=tmp_path)
    except UserError as error:
        if "cannot be downloaded" in str(error):
            pytest.skip(f"{source.name} is not on this machine")
        raise
    assert [array.shape for array in (*images.train, *images.test)] == [
        (60000, 28, 28),
        (60000,),
        (10000, 28, 28),
        (10000,),
    ]
    assert set(images.train[1]) == set(range(10))
