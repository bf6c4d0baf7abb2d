"""The same exactness on a real model: what shares a step, or was given up and fed again, changes no token."""

import tracemalloc
from contextlib import closing

import pytest
from tests.cli_runs import bundled
from tests.models import RECIPES, write_model
from tests.toy import Copies, Drafts, Together

import cmr
from cmr import Session, hookimpl

PROMPTS = (
    "Once upon a time",
    "Tom and Lily had a ball. Tom and Lily had a",
    "The dog",
    "One day a bird " * 6,
)


class Preempts:
    exact = True

    @hookimpl
    def on_step(self, step):
        for part in step.parts:
            if part.seq.n_new == 7 and "done" not in part.seq.notes:
                part.seq.notes["done"] = True
                part.seq.rollback(0)


@pytest.fixture(scope="module")
def models(shared):
    """An open model for each device, opened once."""
    opened = {}

    def get(device):
        if device not in opened:
            opened[device] = cmr.open_model(shared / "models" / "stories260K-f32.gguf", device=device)
        return opened[device]

    yield get
    for model in opened.values():
        model.close()


def answers(session, **options):
    """The tokens of an answer to each prompt, all asked for at once."""
    requests = [session.request(prompt, max_tokens=16, **options) for prompt in PROMPTS]
    got = {id(request): [] for request in requests}
    for request, token in session.stream(requests):
        got[id(request)].append(token)
    return [got[id(request)] for request in requests]


def test_threads_can_change_between_answers_and_within_them(models, device):
    model = models(device)
    before = model.ops.threads, model.ops.prompt_threads
    plain = answers(Session.open(model), temp=0.0)
    session = Session.open(model, [Copies()], threads=1, threads_batch=before[1])
    found = []
    for prompt in PROMPTS:
        seq = session.add(session.request(prompt, max_tokens=16, temp=0.0))
        while session.step():
            model.ops.use(1 + len(seq.new) % before[0], 1)
        found.append(seq.new)
    model.ops.use(*before)
    assert found == plain


def test_no_more_threads_than_the_model_was_opened_with():
    pytest.importorskip("numba")
    with closing(cmr.open_model(bundled(), threads=2)) as model:
        assert Session.open(model, threads=1) and (model.ops.threads, model.ops.prompt_threads) == (1, 1)
        assert Session.open(model, threads_batch=2) and (model.ops.threads, model.ops.prompt_threads) == (
            1,
            2,
        )
        with pytest.raises(cmr.ModelError, match="3 threads were asked for, and the model was opened with 2"):
            Session.open(model, threads=3)
        with pytest.raises(cmr.RequestError, match="threads is 0; it must be a whole number of at least 1"):
            Session.open(model, threads=0)


@pytest.mark.parametrize("options", [{"temp": 0.0}, {"temp": 0.8, "seed": 5}], ids=["greedy", "seeded"])
def test_steps_put_together_otherwise_give_the_same_tokens(models, device, options):
    model = models(device)
    plain = answers(Session.open(model), **options)
    assert len({tuple(tokens) for tokens in plain}) == len(PROMPTS)
    for plugins, limits in [
        ((), {"chunk": 5}),
        ((Copies(),), {}),
        ((Together(rows=6),), {}),
        ((Together(), Copies()), {}),
        ((Preempts(), Copies()), {"chunk": 3}),
        ((Preempts(), Together(rows=4)), {}),
        ((Drafts(lambda seq: [1, 2, 3]), "stop-loop", "telemetry", "answer-cache"), {}),
    ]:
        assert answers(Session.open(model, plugins, **limits), **options) == plain, plugins


def test_an_interrupted_step_is_undone(models, device):
    class Interrupts:
        exact = True
        calls = 0

        @hookimpl
        def on_attention(self, seq, layer, q, cache):
            self.calls += 1
            if self.calls in (3, 17):
                raise KeyboardInterrupt

    model = models(device)
    session = Session.open(model, [Interrupts()])
    seq = session.add(session.request(PROMPTS[0], max_tokens=16, temp=0.0))
    interrupted = 0
    while seq.stop is None:
        try:
            session.step()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 2
    assert seq.new == answers(Session.open(model), temp=0.0)[0]


def test_tokens_allocate_nothing_but_their_numbers():
    """After warm-up, 30 tokens take less memory at any moment, their numbers included, than two rows of activations."""
    model = cmr.open_model(bundled(), threads=2)
    request = cmr.Request(list(range(1, 17)), 200, cmr.SamplerSettings(temp=0.0), stop_ids=frozenset())
    tokens = Session.open(model).generate(request)
    for _ in range(60):
        next(tokens)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(30):
        next(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens.close()
    model.close()
    assert peak - before < 2 * 4 * max(model.config.n_ff)


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
@pytest.mark.parametrize(
    "plugins",
    [["batching"], ["spec-lookup"], [Together(4)], ["layer-stream:budget=90%"]],
    ids=["batching", "spec-lookup", "together", "layer-stream"],
)
def test_mixtures_of_experts_give_the_same_tokens(tmp_path_factory, device, name, plugins):
    path = write_model(tmp_path_factory.mktemp("experts") / "m.gguf", RECIPES[name])
    prompts = [[5, 9, 9, 33] * count for count in (1, 4, 7)]

    def tokens(plugins):
        model = cmr.open_model(path, device=device, threads=2)
        with Session.open(model, plugins) as session:
            requests = [session.request(prompt, max_tokens=24, temp=0.0) for prompt in prompts]
            got = {id(request): [] for request in requests}
            for request, token in session.stream(requests):
                got[id(request)].append(token)
        model.close()
        return list(got.values())

    assert tokens(plugins) == tokens([])
