"""Spaces: what is written is what is searched, every optimizer takes both ends of its own, and nonsense is told in a sentence."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surefoot.lab import spaces
from surefoot.lab.catalogue import CATALOGUE, resolve
from surefoot.lab.errors import UserError
from surefoot.lab.plan import MethodRequest, parse_optimizers
from surefoot.lab.spaces import SPACES, Choices, Range, parse_dimension, read_space

DEFAULTS = {
    "window": 50,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "undo": "exact",
    "amsgrad": False,
    "horizon": None,
}


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "name", "dimension"),
        [
            ("rate=1e-5:1e1:log", "rate", Range(1e-5, 10.0, log=True)),
            (" rate = 1e-5 : 1e1 : log ", "rate", Range(1e-5, 10.0, log=True)),
            ("momentum=0:0.9", "momentum", Range(0, 0.9)),
            ("momentum=0:0.9:linear:4", "momentum", Range(0, 0.9, points=4)),
            ("momentum=0:0.9:4", "momentum", Range(0, 0.9, points=4)),
            ("window=10:1000:log:3", "window", Range(10, 1000, log=True, points=3)),
            ("window=50|600", "window", Choices((50, 600))),
            ("undo=exact", "undo", Choices(("exact",))),
            ("betas=0.9:0.99|0.8:0.9", "betas", Choices(((0.9, 0.99), (0.8, 0.9)))),
            ("growth=inf|2|none|true", "growth", Choices((math.inf, 2, None, True))),
            ("betas.0=0.5:0.99", "betas.0", Range(0.5, 0.99)),
        ],
    )
    def test_a_range(self, text, name, dimension):
        assert parse_dimension(text) == (name, dimension)

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("rate", "name=low:high"),
            ("=1:2", "name=low:high"),
            ("rate=", "name=low:high"),
            ("rate=2:1", "the first must be the smaller"),
            ("rate=1:1", "the first must be the smaller"),
            ("rate=0:1:log", "must begin above 0"),
            ("rate=-1:1:log", "must begin above 0"),
            ("rate=1:inf", "finite"),
            ("rate=1:nan", "nan"),
            ("rate=a:b", "'a' where a finite number"),
            ("rate=true:2", "'true' where a finite number"),
            ("rate=1:2:cubic", "'cubic' where"),
            ("rate=1:2:log:1", "has 1 points"),
            ("rate=1:2:log:2.5", "has 2.5 points"),
            ("rate=1:2:log:1001", "from 2 to 1000"),
            ("rate=1:2:3:4", "more than low:high:log:points"),
            ("window=50|50", "the value 50 twice"),
            ("window=50||60", "neither a number"),
        ],
    )
    def test_nonsense(self, text, names):
        with pytest.raises(UserError) as caught:
            parse_dimension(text)
        assert names in sentence(caught)


class TestFile:
    def write(self, tmp_path, text):
        path = tmp_path / "space.toml"
        path.write_text(text)
        return path

    def test_all_that_a_file_can_say(self, tmp_path):
        path = self.write(
            tmp_path,
            """
            rate = {low = 1e-5, high = 10, scale = "log"}
            momentum = {low = 0, high = 0.9, points = 4}
            window = [50, 600]
            betas = [[0.9, 0.99], "0.8:0.9"]
            growth = ["none", inf]
            undo = "exact"
            etas.0 = {low = 0.3, high = 0.9}
            "etas.1" = 1.2
            """,
        )
        assert read_space(path) == {
            "rate": Range(1e-5, 10, log=True),
            "momentum": Range(0, 0.9, points=4),
            "window": Choices((50, 600)),
            "betas": Choices(((0.9, 0.99), (0.8, 0.9))),
            "growth": Choices((None, math.inf)),
            "undo": Choices(("exact",)),
            "etas.0": Range(0.3, 0.9),
            "etas.1": Choices((1.2,)),
        }

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("rate = ", "no TOML"),
            ("[adam]\nrate = 1", "needs low and high"),
            ("rate = {low = 1}", "needs low and high"),
            ("rate = {low = 1, high = 2, step = 1}", "needs low and high"),
            ('rate = {low = 1, high = "a"}', "finite number"),
            ('rate = {low = 1, high = 2, scale = "cubic"}', "must be log or linear"),
            ("rate = []", "no values"),
            ("rate = 2020-01-01", "neither a number nor"),
            ("rate = [1, 1]", "twice"),
        ],
    )
    def test_nonsense(self, tmp_path, text, names):
        with pytest.raises(UserError) as caught:
            read_space(self.write(tmp_path, text))
        assert names in sentence(caught)
        assert "--space" in str(caught.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_space(tmp_path / "nowhere.toml")


class TestTyped:
    def test_ranges_are_over_whole_numbers_where_the_setting_is_one(self):
        space = {
            "window": Range(10, 100.0, log=True),
            "batch": Range(8, 64),
            "horizon": Range(1, 5),
            "eps": Range(1, 2),
        }
        typed = spaces.typed(space, DEFAULTS)
        assert [typed[name].whole for name in space] == [True, True, True, False]
        assert isinstance(typed["eps"].low, float)  # written as 1 or 1.0, it is the same search

    def test_unknown_names_are_left_for_the_catalogue_to_refuse(self):
        assert spaces.typed({"windw": Range(1, 2)}, DEFAULTS) == {"windw": Range(1, 2)}

    @pytest.mark.parametrize(
        ("space", "names"),
        [
            ({"window": Range(1.5, 3)}, "window takes whole numbers"),
            ({"undo": Range(0, 1)}, "undo is no number"),
            ({"amsgrad": Range(0, 1)}, "amsgrad is no number"),
            ({"betas": Range(0, 1)}, "betas is no number"),
            ({"betas.2": Range(0, 1)}, "there is betas.0, betas.1"),
            ({"betas.x": Range(0, 1)}, "there is betas.0, betas.1"),
            ({"window.0": Range(0, 1)}, "there is only window itself"),
            ({"rate": Range(0, 1)}, "a rate of 0; it must be a number above 0"),
            ({"rate": Choices((True,))}, "a rate of true"),
            ({"rate": Choices(("x",))}, "a rate of x"),
            ({"batch": Range(0, 8)}, "a batch of 0; it must be a whole number of at least 1"),
            ({"batch": Choices((1.5,))}, "a batch of 1.5"),
        ],
    )
    def test_what_cannot_be(self, space, names):
        with pytest.raises(UserError) as caught:
            spaces.typed(space, DEFAULTS)
        assert names in sentence(caught)

    @pytest.mark.parametrize(
        ("space", "fixed", "names"),
        [
            ({"window": Range(1, 2)}, ["window"], "window is given a value and window a range"),
            ({"betas.0": Range(0, 1)}, ["betas"], "betas is given a value and betas.0 a range"),
            ({"rate": Range(0, 1)}, ["rate"], "rate is given a value"),
            ({"betas": Choices(()), "betas.0": Range(0, 1)}, [], "betas and betas.0 cannot both"),
        ],
    )
    def test_nothing_is_given_twice(self, space, fixed, names):
        with pytest.raises(UserError) as caught:
            spaces.check(space, fixed)
        assert names in sentence(caught)


class TestPoints:
    def test_a_grid_has_the_decades_of_a_logarithmic_range_exactly(self):
        assert Range(1e-5, 10.0, log=True).grid().values == (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)

    def test_a_grid_has_as_many_points_as_asked_for(self):
        assert Range(0.0, 0.9, points=4).grid().values == (0.0, 0.3, 0.6, 0.9)
        assert Range(0.0, 1.0).grid().values == (0.0, 0.25, 0.5, 0.75, 1.0)
        assert Range(10, 1000, log=True, whole=True, points=3).grid().values == (10, 100, 1000)

    def test_a_grid_of_few_whole_numbers_has_each_once(self):
        assert Range(1, 3, whole=True, points=10).grid().values == (1, 2, 3)

    def test_all_points_each_once(self):
        space = {"a": Choices((1, 2)), "b": Range(5, 7, whole=True), "c": Choices(("x",))}
        found = list(spaces.points(space))
        assert spaces.size(space) == len(found) == 6
        assert {(p["a"], p["b"], p["c"]) for p in found} == {(a, b, "x") for a in (1, 2) for b in (5, 6, 7)}
        assert spaces.size({**space, "d": Range(0.0, 1.0)}) == math.inf

    def test_ends_have_both_ends_and_every_choice(self):
        found = spaces.ends({"a": Choices((1, 2, 3)), "b": Range(0.1, 0.2)})
        assert {p["a"] for p in found} == {1, 2, 3}
        assert {p["b"] for p in found} == {0.1, 0.2}

    @given(low=st.floats(1e-9, 1e6), width=st.floats(1e-3, 1e6), share=st.floats(0, 1), log=st.booleans())
    def test_what_is_rounded_stays_in_the_range_and_moves_little(self, low, width, share, log):
        dimension = Range(low, low + width, log=log)
        value = low + share * width
        rounded = dimension.rounded(value)
        assert dimension.low <= rounded <= dimension.high
        assert abs(rounded - value) <= 1.01e-3 * (value if log else width)
        assert dimension.rounded(rounded) == rounded  # or a setting would not be the same after it was stored

    def test_whole_numbers_stay_whole(self):
        dimension = Range(10, 1000, log=True, whole=True)
        assert [dimension.rounded(value) for value in (9.2, 17.4, 2000)] == [10, 17, 1000]
        assert isinstance(dimension.rounded(17.4), int)


class TestRequest:
    base = MethodRequest("adam[eps=1e-6]", "adam", {"eps": 1e-6}, None, None)

    def test_a_setting_is_put_into_the_optimizer(self):
        request = spaces.request(
            self.base, DEFAULTS, {"rate": 0.01, "betas.1": 0.9, "batch": 8, "undo": "none"}
        )
        assert request.settings == {"eps": 1e-6, "betas": (0.9, 0.9), "undo": "none"}
        assert (request.rate, request.batch_size) == (0.01, 8)

    def test_two_entries_of_a_tuple(self):
        request = spaces.request(self.base, DEFAULTS, {"rate": 1.0, "betas.0": 0.5, "betas.1": 0.6})
        assert request.settings["betas"] == (0.5, 0.6)

    def test_its_label_asks_for_the_same_on_the_command_line(self):
        request = spaces.request(
            self.base,
            DEFAULTS,
            {"rate": 3.14e-5, "betas.1": 0.9, "batch": 8, "amsgrad": True, "horizon": None},
        )
        (parsed,) = parse_optimizers(request.label)
        assert parsed == request


class TestCatalogue:
    def test_every_optimizer_has_a_space_and_every_space_an_optimizer(self):
        assert SPACES.keys() == CATALOGUE.keys()

    @pytest.mark.parametrize("optimizer", SPACES)
    def test_an_optimizer_takes_both_ends_and_every_choice(self, optimizer):
        base = MethodRequest(optimizer, optimizer, {}, None, 1e-3)
        defaults = resolve(base)
        space = spaces.typed(SPACES[optimizer], defaults)
        for point in [*spaces.ends(space), *spaces.ends(spaces.gridded(space))]:
            settings = resolve(spaces.request(base, defaults, point))
            assert settings.keys() >= {name.partition(".")[0] for name in point} - {"rate"}

    @pytest.mark.parametrize("optimizer", SPACES)
    def test_a_range_of_more_than_a_decade_is_searched_by_its_logarithm(self, optimizer):
        for name, dimension in SPACES[optimizer].items():
            if isinstance(dimension, Range) and dimension.low > 0:
                assert dimension.log == (dimension.high / dimension.low > 10), name
            elif isinstance(dimension, Choices):
                assert all(a < b for a, b in pairwise(dimension.values))
