"""`cmr serve` as its users start it: a process that listens, streams, notices who leaves, and ends at a signal."""

import re
import signal

import pytest
from tests.cli_runs import bundled, run, start
from tests.serving import events, httpx, streamed

import cmr
from cmr.cli import serve
from cmr.errors import CMRError

STORY = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 24}
ENDLESS = {"prompt": "Once", "max_tokens": -1, "ignore_eos": True, "n": 40, "stream": True}


class Process:
    """A server in a process of its own, on a free port, ended in the end whatever happens."""

    def __init__(self, *flags):
        self.process = start("serve", bundled(), "--port", "0", "-c", "1024", *flags, command="main")
        self.first = self.process.stderr.readline()
        found = re.search(r"http://[\w.:]+", self.first)
        assert found, self.first + self.process.stderr.read()
        self.client = httpx.Client(base_url=found[0], timeout=120)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.client.close()
        self.process.kill()
        self.process.communicate()

    def end(self, number):
        """Send a signal; return the exit status and what was written since the first line."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        assert out == ""
        return self.process.returncode, err

    def figure(self, name):
        """A figure of /metrics, 0 where it is not there yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.M)
        return float(found[1]) if found else 0


def test_it_serves_what_the_session_writes_and_ends_at_ctrl_c():
    session = cmr.Session.open(cmr.open_model(bundled()))
    expected = "".join(session.text(STORY["prompt"], max_tokens=24, temperature=0.0))
    with Process() as server:
        assert re.fullmatch(r"tiny\S* is served at http://127.0.0.1:\d+; Ctrl-C ends it\n", server.first)
        assert server.client.get("/health").json() == {"status": "ok"}
        whole = server.client.post("/v1/completions", json=STORY).json()
        assert whole["choices"][0]["text"] == expected
        stream = server.client.post("/v1/completions", json=STORY | {"stream": True})
        assert stream.headers["transfer-encoding"] == "chunked" and streamed(stream.text) == expected
        chat = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8, "seed": 3}
        said = server.client.post("/v1/chat/completions", json=chat).json()
        streamed_chat = server.client.post("/v1/chat/completions", json=chat | {"stream": True})
        assert streamed(streamed_chat.text) == said["choices"][0]["message"]["content"] != ""
        assert server.end(signal.SIGINT) == (130, "")


def test_a_connection_that_breaks_off_ends_its_answers():
    with Process("--metrics", "-np", "1") as server:
        with server.client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
        for _ in range(200):
            if server.figure('cmr:answers_total{reason="cancelled"}'):
                break
        assert server.figure("cmr:requests_processing") == server.figure("cmr:requests_deferred") == 0
        assert server.figure('cmr:answers_total{reason="cancelled"}') > 30
        assert server.figure("cmr:tokens_predicted_total") < 10 * 1024
        assert server.client.post("/v1/completions", json=STORY).status_code == 200


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_answers_under_way_with_a_sentence(number, status):
    with Process("-np", "1") as server:
        with server.client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
            lines = answer.iter_lines()
            text = next(lines) + "\n"
            server.process.send_signal(number)
            text += "".join(line + "\n" for line in lines)
        *_, error, done = events(text)
        assert done == "[DONE]" and error["error"]["message"] == "the server is shutting down"
        assert server.process.wait(60) == status
        assert server.process.stderr.read() == ""


def test_keys_come_from_a_file_too(tmp_path):
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    with Process("--api-key-file", str(tmp_path / "keys"), "--api-key", "three", "-v") as server:
        assert server.client.get("/v1/models").status_code == 401
        for key in ("one", "two", "three"):
            answer = server.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        status, err = server.end(signal.SIGTERM)
    assert status == 0
    assert [line.split(" ")[:3] for line in err.splitlines()] == [
        ["GET", "'/v1/models'", code] for code in ("401", "200", "200", "200")
    ]


def test_flags_are_defaults_that_requests_override():
    with Process("-n", "5", "--temp", "0", "-a", "gpt", "-a", "other") as server:
        first = server.client.post("/v1/completions", json={"prompt": "Once upon a time"}).json()
        second = server.client.post(
            "/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 7}
        ).json()
        assert first["model"] == "gpt" and first["usage"]["completion_tokens"] == 5
        assert second["choices"][0]["text"].startswith(first["choices"][0]["text"])
        assert second["usage"]["completion_tokens"] == 7
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["gpt", "other"]


MISTAKES = {
    "no model": ("", "a model is needed, as in: cmr serve model.gguf --port 8080"),
    "port": ("MODEL --port 99999999", "127.0.0.1 port 99999999 cannot be listened on"),
    "host": ("MODEL --host 203.0.113.1 --port 0", "203.0.113.1 port 0 cannot be listened on"),
    "flag": ("MODEL --parralel 4", "there is no option '--parralel'; did you mean '--parallel'?"),
    "of another command": ("MODEL -p hello", "there is no option '-p'"),
    "key file": ("MODEL --api-key-file nowhere", "--api-key-file nowhere cannot be read"),
    "key": ("MODEL --api-key=", "--api-key wants a key without spaces around it"),
    "width twice": ("MODEL -np 4 --plugin batching:width=2", "both -np and --plugin batching:width"),
    "template": ("MODEL --chat-template chatmll", "there is no chat template called 'chatmll'"),
    "setting": ("MODEL --top-p 2", "top_p is 2.0; it must be a number between 0 and 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_sentence_before_it_listens(case):
    line, said = MISTAKES[case]
    result = run("serve", *line.replace("MODEL", bundled()).split(), command="main")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("cmr serve: ") and said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_in_use_is_said():
    with Process() as server:
        port = str(server.client.base_url.port)
        result = run("serve", bundled(), "--port", port, command="main")
    assert result.returncode == 2 and f"127.0.0.1 port {port} cannot be listened on" in result.stderr


def test_explain_shows_the_plan_and_stops():
    result = run("serve", bundled(), "-np", "3", "--plugin", "prefix-cache", "--explain", command="main")
    assert result.returncode == 0 and "batching:width=3" in result.stdout and "prefix-cache" in result.stdout


SCHEDULER = '''
from cmr import hookimpl
class Mine:
    """Schedules."""
    @hookimpl
    def scheduler(self, model): ...
'''


def test_batching_schedules_unless_another_plugin_does(tmp_path):
    def plugins(*flags):
        return serve.with_scheduler(serve.parser().parse(["model.gguf", *flags]))

    (tmp_path / "mine.py").write_text(SCHEDULER)
    (tmp_path / "profile.toml").write_text("[plugins.batching]\nwidth = 2\n")
    mine = f"{tmp_path}/mine.py:Mine"
    assert plugins() == ["batching"]
    assert plugins("--plugin", "stop-loop", "-np", "3") == ["stop-loop", "batching:width=3"]
    assert plugins("--plugin", "batching:kv=1GB", "-np", "3") == ["batching:kv=1GB", "batching:width=3"]
    assert plugins("--profile", f"{tmp_path}/profile.toml") == ["batching"]
    assert plugins("--plugin", mine) == [mine]
    assert plugins("--plugin", "tuner") == ["tuner", "batching"]  # which only wraps who schedules
    with pytest.raises(CMRError, match="-np is for the plugin batching, and .*Mine schedules"):
        plugins("--plugin", mine, "-np", "3")


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CMRError, match=r"pip install 'cmr-runner\[server\]'"):
        serve.main([bundled()])


def test_help_lists_the_flags():
    result = run("serve", "--help", command="main")
    assert result.returncode == 0
    for flag in (
        "--host",
        "--port",
        "--parallel",
        "--api-key",
        "--metrics",
        "--plugin",
        "--temp",
        "--ctx-size",
    ):
        assert flag in result.stdout
    assert "serve " in run("--help", command="main").stdout
