"""Cleaning of captions: its rules one by one, any text at all, and no text that takes long."""

import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from rear_jax.text import cleaning
from rear_jax.text.cleaning import clean, clean_once

EVERY = st.text(st.characters(), max_size=60)  # halves of characters (surrogates) as well
ADDRESSES = ["http:", "https:/", "www:", ".com", ".co", ".org/", "x.it", "@a", "192.168.1.1"]
NUMBERS = ["#12", "#12345", "1234567", "a1b2", "30x40", "1.5\u00d72.", "page", "7", "%", "%20"]
MARKUP = ["<b>", "</b>", "<style>", "<rt>", "</rt>", "<!--", "-->", "<![cdata[", "]]>", "<![", "<!doctype"]
SIGNS = ['"', "'", ".", "..", ",", ":", ";", "-", "_", "/", "\\n", "\n", "+", "“", "—", "\x85", "\x00"]
NAMED = ["&#", "&#65;", "&amp;", "&lt;"]
WORDS = ["a", "é", "北京", "Ã©", "a.png", "eps", "free", "shipping", "download"]
PARTS = st.sampled_from(ADDRESSES + NUMBERS + MARKUP + SIGNS + NAMED + WORDS)
MIXED = st.lists(PARTS, max_size=12).flatmap(lambda parts: st.sampled_from(["", " "]).map(lambda gap: gap.join(parts)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A  Photo of\ta CAT ", "a photo of a cat"),
        ("blue%20sky+at%20night", "blue sky at night"),
        ("<person> and <b>dog</b>", "person and dog"),
        ("a fox <style>p {}</style> runs", "a fox runs"),
        ("a <rt>ruby</b></rt> sign", "a sign"),  # an end tag without a start closes nothing
        ("at http://x.com/y now", "at now"),
        ("x.com-y.net and y", "and y"),
        ("me@mail.com", "me"),
        ("see x.com/foo.bar.com", "see"),
        ("cafe.com@home", "cafe. com"),  # no address before @; the name of a user goes
        ("AT&T;", "at t"),
        ("a &lt;pad&gt; b", "a b"),
        ("&#65;bc", "abc"),
        ("30x40 rug", "rug"),
        ("20.5\u044530.5 rug", "rug"),
        ("11111111_x1", "11111111_x1"),
        ("epsilon", "ilon"),
        ("a_b_c_d_e", "a b c d e"),
        ("a_b_c_d", "a_b_c_d"),
        ("", ""),
        ("...", ""),
    ],
)
def test_rules_by_hand(text, wanted):
    assert clean(text) == wanted


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.one_of(EVERY, MIXED))
def test_every_text_is_taken(text):
    found = clean(text)
    assert found == found.strip()
    assert not re.search(r"\s\s|[\n\t]", found)
    assert len(found) <= 4 * len(text)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.text("ab1é_@ ./-:ctomhtpw", max_size=30), st.sampled_from([0, 1]))
def test_addresses_are_those_of_the_plain_expression(text, which):
    """The one that takes the square of the time."""
    text = text.replace("t", ".com").replace("h", "http:").replace("w", "www:")
    scheme = ("https?", "www")[which]
    plain = rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{cleaning.HOST})"
    assert cleaning._without_addresses(text, *cleaning.ADDRESSES[which]) == re.sub(plain, "", text)


@pytest.mark.parametrize(
    ("rules", "start", "plain", "alphabet"),
    [
        (cleaning.SIGNS, r"(?<!\S)\S+\.", rf"\S+\.(?:{cleaning.ENDINGS})", ["a", ".", ".png", ".jpg", " ", "/"]),
        (cleaning.SIGNS, r"(?<!\s)\s++\.", r"\s+\.\s+", [" ", "\n", ".", "a"]),
        (cleaning.WORDS, r"\b\d*[a-zA-Z]+", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", ["1", "a", "é", "_", " "]),
        (cleaning.WORDS, r"\b\d++", r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ["1", "2", ".", "x", "é", " "]),  # noqa: RUF001
    ],
)
def test_possessive_expressions_are_the_plain_ones(rules, start, plain, alphabet):
    ((ours, new),) = [(one, new) for one, new in rules if one.pattern.startswith(start)]

    @hypothesis.settings(deadline=None, max_examples=200)
    @hypothesis.given(st.lists(st.sampled_from(alphabet), max_size=14).map("".join))
    def check(text):
        assert ours.sub(new, text) == re.sub(plain, new, text)

    check()


def test_what_breaks_the_parser_stays():
    assert clean_once("a <![foo b") == "a <! foo b"
    assert clean_once("<![cdata[a fox]]> runs") == "a fox runs"
    digits = "1" * 5000  # more than Python converts to a number
    assert clean_once(f"a &#{digits}x b").startswith("a ")
    full_width = "\uff06\uff03" + "\uff11" * 5000  # &# and digits once ftfy has seen them
    assert clean_once(f"a {full_width}x b").endswith("b")


SLOW = [  # (beginning, what is repeated): each makes some plain expression, or the parser, take the square of the time
    ("", "a."),
    ("", "a.com/"),
    ("", "a"),
    ("", " "),
    ("a1a", "1"),
    ("1x", "1"),
    ("7:45", " "),
    ("worldwide", " "),
    ("", "<a "),
    ("", "<b><!--"),
    ("", "&amp;"),
    ("", "&lt;"),
    ("", "%25"),
    ("", "Ã©"),
    ("", "\x1b["),
    ("", "\ud800"),
    ("", "\""),
]  # fmt: skip


@pytest.mark.parametrize(("start", "part"), SLOW)
@pytest.mark.parametrize("end", ["", "é"])
def test_no_text_takes_long(start, part, end):
    text = start + part * (10_000 // len(part)) + end
    since = time.process_time()
    clean(text)
    assert time.process_time() - since < 1
