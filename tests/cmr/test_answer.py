"""Text that is safe to show while a stop string may still be forming."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmr.answer import Answer


class Letters:
    """A decoder whose tokens are texts."""

    def push(self, token):
        return token

    def flush(self):
        return ""


def shown(tokens, *stops):
    """What is shown after each token, and at the end."""
    answer, pieces = Answer(Letters(), stops), []
    for token in tokens:
        ended = answer.push(token)
        pieces.append("".join(answer.pieces))
        answer.pieces.clear()
        if ended:
            break
    answer.finish()
    return [*pieces, "".join(answer.pieces)]


@pytest.mark.parametrize(
    ("tokens", "stops", "pieces"),
    [
        (["a", "b"], (), ["a", "b", ""]),
        (["a", "x", "y", "b"], ("xy",), ["a", "", "", ""]),
        (["a", "x", "b"], ("xy",), ["a", "", "xb", ""]),
        (["a", "x"], ("xy",), ["a", "", "x"]),
        (["axyb"], ("xy",), ["a", ""]),
        (["aaab"], ("aab",), ["a", ""]),
        (["\nU", "ser", ":", "no"], ("\nUser:",), ["", "", "", ""]),
        (["\nU", "sual"], ("\nUser:",), ["", "\nUsual", ""]),
        (["one two"], ("two", "one"), ["", ""]),
    ],
)
def test_pieces(tokens, stops, pieces):
    assert shown(tokens, *stops) == pieces


@given(
    st.lists(st.text("ab", min_size=0, max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4)),
)
def test_what_is_shown_is_the_text_up_to_the_first_stop_string(tokens, stops):
    text = ""
    for token in tokens:
        text += token
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            text = text[: min(places)]
            break
    assert "".join(shown(tokens, *stops)) == text


def test_an_unfinished_character_is_shown_at_the_end():
    class Half(Letters):
        def flush(self):
            return "\ufffd"

    answer = Answer(Half(), ())
    answer.push("a")
    answer.finish()
    assert "".join(answer.pieces) == "a\ufffd"
