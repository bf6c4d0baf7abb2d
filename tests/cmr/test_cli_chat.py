"""The chat through a pipe and on a terminal: turns, commands, Ctrl-C, and KV that is kept."""

import json
import os

import pytest
from tests.cli_runs import CHAT, Terminal, bundled, run

from cmr.chat import NAMED, ChatTemplate
from cmr.cli.conversation import Conversation
from cmr.errors import RequestError

FLAGS = (*CHAT, "--temp", "0", "-n", "8")
on_terminal = pytest.mark.skipif(os.name != "posix", reason="terminals of one's own are a POSIX thing")


@pytest.fixture(scope="module")
def model():
    return bundled()


def test_a_turn_is_the_template_around_the_message(model):
    import cmr

    opened = cmr.open_model(model)
    text = ChatTemplate(NAMED["chatml"]).render(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    )
    tokens = opened.tokenizer.encode(text, special=True, bos=True)
    found = json.loads(run(model, *FLAGS, "-st", "-sys", "Be kind.", "-p", "Hello", "--json").stdout)
    assert found["prompt_tokens"] == tokens
    assert found["text"] == "".join(cmr.Session.open(opened).text(tokens, max_tokens=8, temperature=0.0))


def test_piped_lines_are_turns_and_keep_the_cache(model):
    one, two = "Hello there, my friend.\n", "And you?\n"
    result = run(model, *FLAGS, "-cnv", typed=one + two)
    first = run(model, *FLAGS, "-cnv", typed=one)
    assert result.returncode == first.returncode == 0
    assert result.stdout.startswith(first.stdout)
    fed = int(result.stderr.split("prompt ")[1].split()[0])
    fed_first = int(first.stderr.split("prompt ")[1].split()[0])
    assert fed < 2 * fed_first + 8  # the second turn does not feed the first one again


def test_template_variables_reach_the_template(model):
    source = "{{ bos_token }}{{ mood }}: {{ messages[-1].content }}"
    flags = (
        "--chat-template",
        source,
        "--chat-template-kwargs",
        '{"mood": "glad"}',
        "-st",
        "-p",
        "Hi",
        "-n",
        "1",
    )
    found = json.loads(run(model, *flags, "-n", "1", "--json").stdout)
    import cmr

    assert "glad: Hi" in cmr.open_tokenizer(model).decode(found["prompt_tokens"])


def test_a_template_comes_from_a_file_too(model, tmp_path):
    (tmp_path / "t.jinja").write_text(NAMED["chatml"])
    flags = ("-st", "-p", "Hello", "--temp", "0", "-n", "8")
    assert (
        run(model, *flags, "--chat-template-file", str(tmp_path / "t.jinja")).stdout
        == run(model, *flags, *CHAT).stdout
    )
    missing = run(model, *flags, "--chat-template-file", str(tmp_path / "none"))
    assert missing.returncode == 2 and "cannot be read" in missing.stderr


def test_a_refusal_of_the_template_ends_a_piped_chat(model):
    result = run(model, "-cnv", "--chat-template", "{{ raise_exception('never') }}", typed="Hello\n")
    assert result.returncode == 2
    assert result.stderr == "cmr-run: the chat template refused the conversation: never\n"


@on_terminal
def test_a_chat_on_a_terminal(model):
    terminal = Terminal(model, *FLAGS)
    terminal.wait_for("/exit leaves")
    terminal.wait_for("> ")
    terminal.type("Hello \\\n")
    terminal.wait_for(". ")
    terminal.type("there\n")
    terminal.wait_for("> ")
    terminal.type("/help\n")
    terminal.wait_for("Ctrl-C ends an answer")
    terminal.type("/clear\n")
    terminal.wait_for("the conversation is forgotten")
    terminal.type("/nothing\n")
    terminal.wait_for("there is no /nothing")
    terminal.type('"""one\ntwo"""\n')
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert "tok/s" in terminal.seen


@on_terminal
def test_ctrl_c_ends_the_answer_and_not_the_chat(model):
    terminal = Terminal(model, *CHAT, "--seed", "1", "--ignore-eos", "-n", "100000", "-c", "100000")
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello\r\n")
    terminal.wait_for_words()  # of the answer
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-C again or /exit leaves")
    terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "tok/s" in terminal.seen and "Traceback" not in terminal.seen


@on_terminal
def test_ctrl_c_right_behind_the_message_is_heeded(model):
    terminal = Terminal(model, *CHAT, "--seed", "1", "--ignore-eos", "-n", "100000", "-c", "100000")
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello\r\n")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


@on_terminal
def test_the_end_of_the_input_leaves(model):
    terminal = Terminal(model, *FLAGS)
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@on_terminal
def test_a_person_sees_the_prompt_before_the_text(model):
    terminal = Terminal(model, "-p", "Once upon a time", "-n", "4")
    terminal.wait_for("Once upon a time")
    assert terminal.end() == 0
    hidden = Terminal(model, "-p", "Once upon a time", "-n", "4", "--no-display-prompt")
    assert hidden.end() == 0
    assert "Once upon a time" not in hidden.seen


class Letters:
    """A tokenizer of letters, in which <e> is the end of a turn."""

    bos = None

    def encode(self, text, special=False, bos=False):
        return [ord(letter) for letter in text]

    def stream(self, special=False):
        return self

    def push(self, token):
        return chr(token)

    def flush(self):
        return ""


def test_a_conversation_begins_with_the_tokens_it_had():
    talk = Conversation(ChatTemplate(NAMED["chatml"]), Letters())
    first = talk.ask("Hi")
    talk.answered("Yes", [ord(letter) for letter in "Yes"])
    second = talk.ask("And?")
    assert second[: len(first) + 3] == first + [ord(letter) for letter in "Yes"]


def test_a_conversation_keeps_the_models_own_spelling():
    talk = Conversation(ChatTemplate("{{ messages | map(attribute='content') | join('|') }}|"), Letters())
    talk._tokens, talk._text = [7, 7], "ab"  # as if the model had written "ab" with other tokens
    talk.messages = [{"role": "user", "content": "ab"}]
    assert talk.ask("c") == [7, 7, *map(ord, "|c|")]


def test_a_conversation_forgets_what_it_is_told_to():
    talk = Conversation(ChatTemplate(NAMED["chatml"]), Letters(), system="Be brief.")
    alone = talk.ask("Hi")
    talk.take_back()
    assert talk.ask("Hi") == alone
    talk.answered("Yes", list(map(ord, "Yes")))
    talk.clear()
    assert talk.ask("Hi") == alone


def test_a_message_that_the_template_refuses_is_not_kept():
    talk = Conversation(ChatTemplate("{{ raise_exception('no') }}"), Letters())
    with pytest.raises(RequestError):
        talk.ask("Hi")
    assert talk.messages == []


def test_a_message_in_other_words_is_answered_from_the_folder_and_that_is_said(model, tmp_path):
    def told(message, *more):
        plugin = ("--plugin", f"answer-similar:path={tmp_path}")
        result = run(model, *FLAGS, "-st", "-p", message, "--json", *plugin, *more)
        return json.loads(result.stdout), result.stderr

    first, _ = told("Tell me a story about a red bird.")
    again, figures = told("Hi! Could you please tell me a story about a red bird?")
    said = "answered from 'Tell me a story about a red bird.', similarity 1"
    assert first["notes"] == {} and again["notes"] == {"answer-similar": said} and said in figures
    assert again["tokens"] == first["tokens"] and again["stop"] == "answered"
    for other in (
        ("Tell me a story about a blue bird.",),
        ("Tell me a story about a red bird.", "-sys", "Be kind."),
    ):
        assert told(*other)[0]["notes"] == {}
