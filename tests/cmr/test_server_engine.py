"""The engine's thread: clients that leave, fail or dawdle concern nobody else, and it sleeps when nothing runs."""

import asyncio
import json
import threading
import time

import pytest
from tests.serving import Served, events, streamed
from tests.toy import MODEL

from cmr import RequestError, Session, hookimpl

LONG = {"prompt": "abc", "temperature": 0, "max_tokens": 900, "ignore_eos": True}


class Gate:
    """Lets a number of steps pass, then holds each until it is opened."""

    exact = True

    def __init__(self, steps: int = 0) -> None:
        self.steps, self.opened, self.held = steps, threading.Event(), threading.Event()

    @hookimpl
    def on_step(self, step):
        self.steps -= 1
        if self.steps < 0 and not self.opened.is_set():
            self.held.set()
            assert self.opened.wait(20)


class Client:
    """One request to an application by hand: it can leave, and it takes what is sent only when it wants to."""

    def __init__(self, app, body, path="/v1/completions"):
        self.app, self.sent = app, []
        self.left, self.takes, self.some = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.takes.set()
        self.scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "server": ("t", 80), "client": ("t", 1), "root_path": "",
        }  # fmt: skip
        self.body = json.dumps(body).encode()
        self.task = asyncio.ensure_future(app(self.scope, self.receive, self.send))

    async def receive(self):
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.takes.wait()
        self.sent.append(message)
        self.some.set()

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def text(self):
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()


async def until(what, seconds=20.0):
    for _ in range(int(seconds / 0.005)):
        if what():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never happened")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer_at_once(stream):
    gate = Gate(steps=4)
    with Served("batching", gate) as served:

        async def leave():
            client = Client(served.app, LONG | {"stream": stream})
            await until(gate.held.is_set)
            client.left.set()
            await asyncio.wait_for(client.task, 20)  # while a step is under way: nobody waits for the engine

        asyncio.run(leave())
        gate.opened.set()
        assert served.settled()
        assert served.engine.tally.ended == {"cancelled": 1}
        assert served.session.report()["tokens"] == 5  # the step under way was the last
        assert served.engine.load()["kv_bytes"] == 0
        assert served.complete(prompt="abc", max_tokens=3).status_code == 200


def test_one_that_leaves_while_it_waits_is_never_begun():
    gate = Gate()
    with Served("batching:width=1", gate) as served:

        async def leave():
            first = Client(served.app, LONG | {"max_tokens": 5})
            await until(gate.held.is_set)
            second = Client(served.app, LONG)
            await until(lambda: served.engine._live == 2)
            second.left.set()
            await asyncio.wait_for(second.task, 20)
            gate.opened.set()
            await asyncio.wait_for(first.task, 20)
            assert first.status == 200

        asyncio.run(leave())
        assert served.settled()
        assert served.engine.tally.ended == {"cancelled": 1, "length": 1}
        assert served.session.report()["tokens"] == 5


def test_a_client_that_takes_nothing_stalls_nobody(monkeypatch):
    expected = "".join(Session.open(MODEL).text("abc", max_tokens=900, temp=0.0, ignore_eos=True))
    with Served() as served:

        async def dawdle():
            slow = Client(served.app, LONG | {"stream": True})
            await slow.some.wait()
            slow.takes.clear()
            await until(
                lambda: served.engine.tally.ended["length"] == 1
            )  # its answer is complete all the same
            other = Client(served.app, LONG | {"max_tokens": 5})
            await asyncio.wait_for(other.task, 20)
            assert other.status == 200
            before = len(slow.sent)
            slow.takes.set()
            await asyncio.wait_for(slow.task, 20)
            assert streamed(slow.text) == expected
            assert len(slow.sent) <= before + 4  # what had piled up came in one piece

        asyncio.run(dawdle())


def test_a_client_that_takes_nothing_for_long_is_given_up(monkeypatch):
    monkeypatch.setattr("cmr.server.app.STALLED", 0.05)
    gate = Gate(steps=3)
    with Served("batching", gate) as served:

        async def dawdle():
            slow = Client(served.app, LONG | {"stream": True})
            slow.takes.clear()
            await asyncio.wait_for(slow.task, 20)
            gate.opened.set()

        asyncio.run(dawdle())
        assert served.settled()
        assert served.engine.tally.ended == {"cancelled": 1}


def test_a_full_queue_is_said_and_empties():
    gate = Gate()
    with Served("batching:width=1", gate, most=2) as served:

        async def fill():
            clients = [Client(served.app, LONG | {"max_tokens": 3}) for _ in range(2)]
            await until(lambda: served.engine._live == 2)
            refused = Client(served.app, LONG)
            await asyncio.wait_for(refused.task, 20)
            assert refused.status == 503
            assert (b"retry-after", b"1") in refused.sent[0]["headers"]
            error = json.loads(refused.text)["error"]
            assert error["code"] == "queue_full" and "2 is the most" in error["message"]
            gate.opened.set()
            for client in clients:
                await asyncio.wait_for(client.task, 20)
                assert client.status == 200

        asyncio.run(fill())
        assert served.complete(prompt="a", max_tokens=1).status_code == 200


class Fails:
    """Fails on requests whose prompt begins with a letter: by mistake, by the request's, or for good."""

    exact = True

    @hookimpl
    def prepare_request(self, request):
        if request.tokens[0] == MODEL.tokenizer.encode("r")[0]:
            raise RequestError("this plugin takes no r")

    @hookimpl
    def on_logits(self, seq, draft, logits):
        if seq.tokens[0] == MODEL.tokenizer.encode("x")[0] and seq.n_new == 3:
            raise ZeroDivisionError("by accident")
        if seq.tokens[0] == MODEL.tokenizer.encode("!")[0]:
            raise SystemExit("out of everything")


def test_a_failure_answers_its_request_alone():
    with Served("batching", Fails()) as served:
        words = {"temperature": 0, "max_tokens": 12}
        bodies = [{"prompt": p} | words for p in ("abc", "xyz", "rst", "bcd")] + [
            {"prompt": "xyz", "stream": True} | words
        ]
        good, failed, refused, other, stream = served.send(*(("/v1/completions", body) for body in bodies))
        for answer, prompt in ((good, "abc"), (other, "bcd")):
            expected = "".join(Session.open(MODEL).text(prompt, max_tokens=12, temp=0.0))
            assert answer.json()["choices"][0]["text"] == expected
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert "failed in on_logits: ZeroDivisionError: by accident" in failed.json()["error"]["message"]
        assert refused.status_code == 400 and "takes no r" in refused.json()["error"]["message"]
        *chunks, error, done = events(stream.text)
        assert stream.status_code == 200 and done == "[DONE]"
        assert error["error"]["message"] == failed.json()["error"]["message"]
        assert len(served.said) == 2 and all("by accident" in line for line in served.said)
        assert served.engine.tally.ended == {"length": 2, "error": 3}
        assert served.complete(prompt="abc", **words).status_code == 200


def test_an_engine_that_failed_takes_no_more_and_says_so():
    with Served("batching", Fails()) as served:
        answer = served.complete(prompt="!", max_tokens=3)
        assert (
            answer.status_code == 500 and "SystemExit: out of everything" in answer.json()["error"]["message"]
        )
        assert "the engine has failed" in served.said[0]
        assert served.get("/health").status_code == 503
        assert served.complete(prompt="abc").status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_stopping_ends_what_is_under_way(stream):
    gate = Gate(steps=3)
    served = Served("batching", gate)

    async def stop():
        client = Client(served.app, LONG | {"stream": stream})
        await until(gate.held.is_set)
        gate.opened.set()
        await asyncio.to_thread(served.engine.stop)
        await asyncio.wait_for(client.task, 20)
        return client

    with served:
        client = asyncio.run(stop())
        assert client.status == (200 if stream else 503)
        error = events(client.text)[-2] if stream else json.loads(client.text)
        assert error["error"]["message"] == "the server is shutting down"
        assert served.get("/health").status_code == 503
        assert served.get("/v1/models").status_code == 200
    assert served.session.loop.running == {}


class Idles:
    """Counts its chances for background work, and fails at one of them."""

    exact = True

    def __init__(self, fails_at: int = -1) -> None:
        self.count, self.fails_at = 0, fails_at

    @hookimpl
    def run_idle(self, session):
        self.count += 1
        if self.count == self.fails_at:
            raise OSError("the disk is full")


def test_plugins_work_in_the_background_while_nothing_runs():
    idles, failing = Idles(), Idles(fails_at=2)
    with Served("batching", idles) as served:
        served.complete(prompt="abc", max_tokens=3)
        before = idles.count
        time.sleep(0.5)
        assert 2 <= idles.count - before <= 12  # every 50 ms, not as often as it can
    with Served("batching", failing) as served:
        time.sleep(0.3)
        assert served.said == ["background work failed: idles failed in run_idle: OSError: the disk is full"]
        assert served.complete(prompt="abc", max_tokens=3).status_code == 200
        assert failing.count == 2


def test_it_sleeps_while_nothing_runs():
    with Served() as served:
        served.complete(prompt="abc", max_tokens=3)
        assert served.settled()
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1


def test_an_answer_of_a_plugin_is_an_answer():
    with Served("batching", "answer-cache") as served:
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 6}
        first, second = (served.complete(**body).json() for _ in range(2))
        assert served.session.report()["answer-cache"]["hits"] == 1
        assert first["choices"] == second["choices"] and first["usage"] == second["usage"]
        stream = served.complete(stream=True, **body)
        assert streamed(stream.text) == first["choices"][0]["text"]
