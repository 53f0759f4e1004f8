"""The language of --optimizers and --rates, and the runs that follow from them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surefoot.lab.errors import UserError
from surefoot.lab.plan import MOST_RUNS, MethodRequest, check_size, parse_optimizers, parse_rates, specs
from surefoot.lab.runs import Method, TaskInfo

TASK = TaskInfo("digits", "v1", 1437, 360, 5000, "accuracy", 100, 5)


def refused(parse, text):
    """The sentence with which ``text`` is refused: one line, ended by a full stop."""
    with pytest.raises(UserError) as caught:
        parse(text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


class TestOptimizers:
    def test_names_keep_their_order(self):
        assert [request.label for request in parse_optimizers("srprop,adam, sgd-upd")] == [
            "srprop",
            "adam",
            "sgd-upd",
        ]

    def test_a_bare_name_has_no_settings(self):
        assert parse_optimizers("adam") == [MethodRequest("adam", "adam", {}, None, None)]

    def test_the_issues_example(self):
        requests = parse_optimizers("adam,adam-upd[window=600],srprop[etas=0.5:1.2|0.7375:1.2]")
        assert [(request.label, request.settings) for request in requests] == [
            ("adam", {}),
            ("adam-upd[window=600]", {"window": 600}),
            ("srprop[etas=0.5:1.2]", {"etas": (0.5, 1.2)}),
            ("srprop[etas=0.7375:1.2]", {"etas": (0.7375, 1.2)}),
        ]

    def test_alternatives_multiply_out_the_last_one_fastest(self):
        labels = [request.label for request in parse_optimizers("srprop[window=50|600,undo=exact|none]")]
        assert labels == [
            "srprop[window=50,undo=exact]",
            "srprop[window=50,undo=none]",
            "srprop[window=600,undo=exact]",
            "srprop[window=600,undo=none]",
        ]

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("600", 600),
            ("-3", -3),
            ("1e-3", 1e-3),
            (".5", 0.5),
            ("5.", 5.0),
            ("+2", 2),
            ("true", True),
            ("False", False),
            ("none", None),
            ("exact", "exact"),
            ("inf", math.inf),
            ("-inf", -math.inf),
            ("1e-6:inf", (1e-6, math.inf)),
            ("0.7:none:true", (0.7, None, True)),
        ],
    )
    def test_values(self, text, value):
        (request,) = parse_optimizers(f"x[a={text}]")
        assert request.settings == {"a": value}
        assert type(request.settings["a"]) is type(value)

    def test_batch_and_rate_are_reserved(self):
        (request,) = parse_optimizers("sgd[batch=25,momentum=0.9,rate=1e-3]")
        assert request == MethodRequest(
            "sgd[batch=25,momentum=0.9,rate=1e-3]", "sgd", {"momentum": 0.9}, 25, 1e-3
        )

    def test_alternatives_of_the_rate_are_methods_of_their_own(self):
        assert [request.rate for request in parse_optimizers("sgd[rate=1|0.1]")] == [1.0, 0.1]

    def test_spaces_do_not_make_another_label(self):
        spaced = parse_optimizers("  srprop [ window = 50 | 600 , etas = 0.5 : 1.2 ] ,\n adam ")
        assert spaced == parse_optimizers("srprop[window=50|600,etas=0.5:1.2],adam")

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("", "empty name"),
            (" ", "empty name"),
            ("adam,,sgd", "empty name"),
            ("adam,", "empty name"),
            ("adam[window=1", "'[' without a ']'"),
            ("adam]", "']' without a '['"),
            ("adam[a=[1]]", "'[' inside brackets"),
            ("adam[a=1]x", "adam[a=1]x"),
            ("adam[a=1][b=2]", "adam[a=1][b=2]"),
            ("adam sgd", "adam sgd"),
            ("[a=1]", "[a=1]"),
            ("3adam", "3adam"),
            ("adam;sgd", "adam;sgd"),
            ("adam[]", "setting is wanted"),
            ("adam[a=1,]", "setting is wanted"),
            ("adam[window]", "'window'"),
            ("adam[=1]", "'=1'"),
            ("adam[1a=1]", "'1a=1'"),
            ("adam[a=]", "empty value"),
            ("adam[a=1|]", "empty value"),
            ("adam[a=1:]", "empty value"),
            ("adam[a=1,a=2]", "a twice"),
            ("adam[a=1|1]", "the value 1 twice"),
            ("adam[a=1=2]", "1=2"),
            ("adam[a=nan]", "nan"),
            ("adam[a=1e999]", "too large"),
            ("adam[a=1:1e999]", "too large"),
            ("adam[a=12345678901234567890]", "64 bits"),
            ("adam[a=1_000]", "1_000"),
            ("adam[a=$x]", "$x"),
            ("adam[batch=0]", "at least 1"),
            ("adam[batch=2.5]", "at least 1"),
            ("adam[batch=true]", "at least 1"),
            ("adam[batch=1:2]", "at least 1"),
            ("adam[rate=0]", "above 0"),
            ("adam[rate=-1]", "above 0"),
            ("adam[rate=inf]", "above 0"),
            ("adam[rate=fast]", "above 0"),
            ("adam[rate=true]", "above 0"),
            ("adam,adam", "'adam' twice"),
            ("adam[a=1|2],adam[a= 2]", "'adam[a=2]' twice"),
        ],
    )
    def test_what_is_refused(self, text, names):
        assert names in refused(parse_optimizers, text)

    names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
    keys = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(
        lambda key: key not in ("batch", "rate")
    )
    scalars = st.one_of(
        st.integers(-(10**17), 10**17),
        st.floats(allow_nan=False),
        st.sampled_from(["true", "false", "none", "exact", "a.b-c"]),
    ).map(str)
    values = st.lists(scalars, min_size=1, max_size=3).map(":".join)
    alternatives = st.lists(values, min_size=1, max_size=2, unique=True).map("|".join)
    settings = st.dictionaries(keys, alternatives, min_size=1, max_size=3).map(
        lambda given: "[" + ",".join(f"{key}={texts}" for key, texts in given.items()) + "]"
    )
    items = st.tuples(names, st.one_of(st.just(""), settings)).map("".join)

    @given(
        st.lists(items, min_size=1, max_size=3, unique_by=lambda item: item.partition("[")[0]).map(",".join)
    )
    def test_the_labels_mean_the_same_requests_again(self, text):
        requests = parse_optimizers(text)
        assert parse_optimizers(",".join(request.label for request in requests)) == requests

    @given(st.text(alphabet="ad[]=,|:1.e- nf", max_size=30))
    def test_any_text_is_parsed_or_refused_in_a_sentence(self, text):
        try:
            requests = parse_optimizers(text)
        except UserError:
            return
        assert requests
        json.dumps([request.settings for request in requests])


class TestRates:
    @pytest.mark.parametrize(
        ("text", "rates"),
        [
            ("1e-5:1e1", (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)),
            ("1e-3", (1e-3,)),
            ("1e-3:1e-3", (1e-3,)),
            ("3e-3,1e-3", (1e-3, 3e-3)),
            ("1e-3,0.001", (1e-3,)),
            ("3e-4:0.3", (3e-4, 3e-3, 3e-2, 3e-1)),
            (" 1e-2 : 1 , 0.5 ", (1e-2, 1e-1, 0.5, 1.0)),
        ],
    )
    def test_rates(self, text, rates):
        assert parse_rates(text) == rates  # exactly: the rate is part of a run's key

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("", "empty entry"),
            ("1,,2", "empty entry"),
            ("1e1:1e-5", "is empty"),
            ("1:2:3", "more than one ':'"),
            (":1", "''"),
            ("fast", "'fast'"),
            ("0", "above 0"),
            ("-1", "above 0"),
            ("0:1", "above 0"),
            ("nan", "above 0"),
            ("inf", "above 0"),
            ("1e-3:inf", "above 0"),
            ("1e400", "above 0"),
            ("1e-400", "above 0"),
            ("1e999999999999999999999", "not a number"),
            ("1e-3:5", "decades"),
        ],
    )
    def test_what_is_refused(self, text, names):
        assert names in refused(parse_rates, text)

    @given(st.integers(-30, 30), st.integers(0, 12))
    def test_a_range_of_decades_is_what_python_writes_them_as(self, first, count):
        expected = tuple(float(f"1e{exponent}") for exponent in range(first, first + count + 1))
        assert parse_rates(f"1e{first}:1e{first + count}") == expected

    @given(st.lists(st.floats(min_value=1e-300, max_value=1e300), min_size=1, max_size=6))
    def test_any_list_comes_back_sorted_and_exact(self, rates):
        assert parse_rates(",".join(map(repr, rates))) == tuple(sorted(set(rates)))

    @given(st.text(alphabet="01e-.:,+ inf", max_size=12))
    def test_any_text_is_parsed_or_refused_in_a_sentence(self, text):
        try:
            rates = parse_rates(text)
        except UserError:
            return
        assert rates
        assert all(0 < rate < math.inf for rate in rates)


class TestSpecs:
    def test_every_method_rate_and_seed_once_seeds_outermost(self):
        methods = [
            Method("sgd", "sgd", {}, 100, (0.1, 1.0)),
            Method("srprop[window=5,batch=25]", "srprop", {"window": 5}, 25, (1e-2,)),
        ]
        runs = specs(TASK, methods, epochs=3, seeds=[0, 1])
        assert [(run.seed, run.optimizer, run.rate, run.batch_size) for run in runs] == [
            (0, "sgd", 0.1, 100),
            (0, "sgd", 1.0, 100),
            (0, "srprop", 1e-2, 25),
            (1, "sgd", 0.1, 100),
            (1, "sgd", 1.0, 100),
            (1, "srprop", 1e-2, 25),
        ]
        assert {(run.task, run.task_version, run.epochs) for run in runs} == {("digits", "v1", 3)}
        assert runs[2].settings == {"window": 5}

    def test_two_labels_for_the_same_settings_share_their_runs(self):
        methods = [Method(label, "adam", {"eps": 1e-8}, 100, (0.1,)) for label in ("adam", "adam[eps=1e-8]")]
        assert len(specs(TASK, methods, epochs=1, seeds=[0, 1])) == 2


class TestSize:
    """More runs than anybody trains are refused before memory is filled with them."""

    REQUESTS = parse_optimizers("adam[rate=1e-3],sgd")

    def test_runs_are_counted_over_seeds_optimizers_and_their_rates(self):
        rates = (0.1, 0.01, 0.001)  # four runs a seed
        check_size(self.REQUESTS, rates, MOST_RUNS // 4)
        with pytest.raises(
            UserError, match=f"has {MOST_RUNS + 4:,} runs and may have at most {MOST_RUNS:,};"
        ):
            check_size(self.REQUESTS, rates, MOST_RUNS // 4 + 1)

    def test_so_are_combinations_of_settings(self):
        values = "|".join(map(str, range(100)))
        text = ",".join(f"{letter}={values}" for letter in "abcdefgh")
        assert "asks for 10,000,000,000,000,000 combinations" in refused(parse_optimizers, f"x[{text}]")
