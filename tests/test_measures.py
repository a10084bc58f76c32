"""Files of measures: what is written comes back, and nothing else is taken."""

import pytest

from circuitkit.comparisons import Overlap
from circuitkit.errors import FormatError
from circuitkit.measures import Completeness, HypothesisTest, Knockout

TEST = HypothesisTest("equivalence", "they are equal", 0.25, 0.01, 0.05, "they differ", 12, {"wins": 3.0}, ("a->b",))


def test_a_file_comes_back_and_says_what_it_is(tmp_path):
    TEST.save(tmp_path / "equal.json")
    assert HypothesisTest.load(tmp_path / "equal.json") == TEST
    assert '"schema": "circuitkit.test/1"' in (tmp_path / "equal.json").read_text()
    assert TEST.rejected and not HypothesisTest("x", "y", 0.0, 0.06, 0.05, "", 2).rejected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("circuitkit.test/1", "circuitkit.test/9"), "newer circuitkit"),
        (lambda text: text.replace("circuitkit.test/1", "circuitkit.overlap/1"), "not a test file"),
        (lambda text: text.replace('"alpha": 0.05', '"alpha": "0.05"'), "alpha"),
        (lambda text: text.replace('"alpha"', '"beta"'), "unknown fields: beta"),
        (lambda text: text[:-20], "truncated"),
        (lambda text: "[1]", "expected an object"),
    ],
)
def test_anything_else_is_refused(change, message):
    with pytest.raises(FormatError, match=message):
        HypothesisTest.from_json(change(TEST.to_json()))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FormatError, match="could not read"):
        Overlap.load(tmp_path / "none.json")


def test_the_worst_knock_out_and_the_means():
    points = (
        Knockout((), "nothing", 1.0, 2.0),
        Knockout(("m0",), "random", 0.0, 3.0),
        Knockout((), "random", 1.0, 0.0),
    )
    found = Completeness("t", "logit-diff", "zero", 2.0, 0.0, 1.0, points, 3, 4)
    assert (found.worst, found.mean("random")) == (points[1], 2.0)
