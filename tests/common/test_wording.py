"""Words of messages."""

from fastddpm.common.wording import named


def test_an_error_is_named_once():
    assert named(ValueError("too small\nby 3")) == "ValueError: too small"
    assert named(KeyError()) == "KeyError"
    assert named(ValueError("x" * 300), 10) == "ValueError: " + "x" * 10
