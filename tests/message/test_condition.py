"""Conditions on topics: what Google takes is taken, all else is refused where it goes wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gocm_lib.message import condition
from gocm_lib.message.bad_request import BadRequest

pytestmark = pytest.mark.short
atoms = st.sampled_from(["'a' in topics", "'B-1_.~%20' in  topics"])
conditions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", " || "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("!({})".format),
    ),
    max_leaves=5,
)


@given(conditions)
def test_whatever_the_grammar_makes_is_taken(text):
    condition.check(text)
    condition.check(f" {text} ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "'a'",
        "'a' in topic",
        "'a' in topicsx",
        '"a" in topics',
        "'a b' in topics",
        "'' in topics",
        "'a' in topics &&",
        "&& 'a' in topics",
        "'a' in topics 'b' in topics",
        "'a' in topics & 'b' in topics",
        "'a' in topics and 'b' in topics",
        "('a' in topics",
        "'a' in topics)",
        ")'a' in topics(",
        "()",
        "!",
        "'a' in topics ! 'b' in topics",
        "'a' in topics && || 'b' in topics",
        " && ".join(["'a' in topics"] * 6),
        "(" * 5000,
    ],
)
def test_what_google_would_refuse_is_refused(text):
    with pytest.raises(BadRequest) as caught:
        condition.check(text)
    assert caught.value.field == "condition" and caught.value.status == 400


@given(st.text(alphabet="'a in topics&|!()", max_size=40))
def test_anything_is_taken_or_refused(text):
    try:
        condition.check(text)
    except BadRequest as problem:
        assert problem.error


def test_a_condition_nests_so_deep_and_no_deeper():
    for most, sign in ((16, "!"), (16, "(")):
        text = sign * most + "'a' in topics" + ")" * (most if sign == "(" else 0)
        condition.check(text)
        with pytest.raises(BadRequest, match="deeper"):
            condition.check(text.replace(sign, sign * 2, 1) + ")" * (sign == "("))
