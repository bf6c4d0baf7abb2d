"""kv-evict: what stays, that no chunk, batch, draft or preemption shows, bytes, refusals, and recall beside random."""

from itertools import zip_longest

import numpy as np
import pytest
from tests.planted import Pairs, recall, write_recaller
from tests.toy import MODEL, Copies, Preempts, Together, answer, run

from cmr import PluginError, Session, hookimpl, open_model
from cmr.testing import check
from cmr_plugins.kv_evict.policies import POLICIES

LONG = "a long story about a fox and a hen and a barn and " * 6
PROMPTS = (LONG, "abc", LONG[7:], LONG[:120])
SMALL = "budget=96,recent=16,every=8,window=12"
KINDS = [
    *(f"policy={policy}" for policy in POLICIES),
    "policy=h2o,heads",
    "policy=snapkv,heads",
    "policy=tova,pyramid=1.5",
    "policy=keydiff,heads,pyramid=1.5",
    "policy=snapkv,chunk=50",
]


def plugin(kind):
    return f"kv-evict:{kind},{SMALL}"


def answers(session, prompts=PROMPTS, n=40, **options):
    texts = [session.text(prompt, max_tokens=n, **{"temp": 0.0} | options) for prompt in prompts]
    for _ in zip_longest(*texts):
        pass
    return [text.seq.new for text in texts]


@pytest.fixture(scope="module")
def alone():
    """The tokens of each request alone, by kind."""
    return {kind: [run(plugin(kind), prompt=prompt, max_tokens=40) for prompt in PROMPTS] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_chunk_batch_or_draft_shows(alone, kind):
    assert answers(Session.open(MODEL, [plugin(kind)], chunk=7)) == alone[kind]
    for others in (
        [Copies()],
        [Together()],
        [Copies(), Together(rows=5)],
        ["spec-lookup"],
        ["batching:tokens=20"],
    ):
        assert answers(Session.open(MODEL, [plugin(kind), *others])) == alone[kind], others


@pytest.mark.parametrize("kind", KINDS)
def test_a_preempted_sequence_comes_to_the_same_tokens(alone, kind):
    for other in (Preempts(), Preempts(rows=3)):
        assert answers(Session.open(MODEL, [plugin(kind), other])) == alone[kind]


def test_it_changes_tokens_only_once_something_was_evicted():
    short = run(plugin("policy=recent"), prompt="abc", max_tokens=60)
    assert short == run(prompt="abc", max_tokens=60)
    assert run(plugin("policy=recent"), prompt=LONG, max_tokens=40) != run(prompt=LONG, max_tokens=40)


class Held:
    """Keep what the caches hold after each step."""

    exact = True

    def __init__(self):
        self.steps = []

    @hookimpl
    def on_step(self, step):
        for part in step.parts:
            held = [[c.head_positions(h).tolist() for h in range(c.kv_heads)] for c in part.seq.caches]
            self.steps.append((part.seq.cached, held, sum(c.nbytes for c in part.seq.caches)))


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_last_positions_stay_and_no_layer_holds_more(kind):
    held = Held()
    session = Session.open(MODEL, [plugin(kind), held])
    answer(session, LONG, 40, ignore_eos=True)
    limits = session.report()["kv-evict"]["limits"]
    after = [step for step in held.steps if step[0] >= len(LONG)]
    assert session.report()["kv-evict"]["evicted"] > 0 and len(after) == 40
    for cached, layers, _ in after:
        for limit, heads in zip(limits, layers):
            for positions in heads:
                assert len(positions) <= limit
                assert positions[:4] == [0, 1, 2, 3]
                assert positions[-16:] == list(range(cached - 16, cached))
                assert (np.diff(positions) > 0).all()
    if "heads" in kind:
        assert any(heads[0] != heads[1] for _, layers, _ in after for heads in layers)
    else:
        assert all(heads[0] == heads[1] for _, layers, _ in after for heads in layers)


@pytest.mark.parametrize(
    "kind", ["policy=snapkv", "policy=h2o,heads", "policy=recent", "policy=tova,chunk=32"]
)
def test_a_budget_in_bytes_bounds_what_is_allocated(kind):
    held = Held()
    token = sum(make().token_bytes for make in Session.open(MODEL, [plugin(kind)]).plan.caches)
    budget = 140 * token
    session = Session.open(MODEL, [f"kv-evict:{kind},budget={budget}B,recent=16,every=8,window=12", held])
    assert session.report()["kv-evict"]["limits"] == [128, 128, 128]
    answer(session, LONG, 60, ignore_eos=True)
    after = [size for cached, _, size in held.steps if cached >= len(LONG)]
    assert max(after) <= budget
    assert "chunk" in kind or session.report()["kv-evict"]["freed_bytes"] > 0


def test_chunks_of_a_prompt_bound_what_it_takes():
    held = Held()
    session = Session.open(MODEL, [plugin("policy=recent,chunk=32"), held])
    answer(session, LONG * 2, 4)
    assert max(len(heads[0]) for _, layers, _ in held.steps for heads in layers) <= 96
    assert max(cached for cached, _, _ in held.steps) > 600


def test_recent_keeps_the_latest():
    held = Held()
    answer(Session.open(MODEL, ["kv-evict:policy=recent,budget=64,every=8", held]), LONG, 9)
    at_end = next(layers for cached, layers, _ in held.steps if cached == len(LONG))
    assert at_end[0][0] == [0, 1, 2, 3, *range(len(LONG) - 52, len(LONG))]


def test_a_pyramid_gives_the_first_layers_more():
    session = Session.open(MODEL, ["kv-evict:budget=100,pyramid=3,every=4,recent=8"])
    assert session.report()["kv-evict"]["limits"] == [150, 100, 50]


@pytest.mark.parametrize("policy", ["recent", "random", "keydiff"])
def test_a_stored_prefix_is_whole_and_comes_to_the_same_tokens(alone, policy):
    kind = f"policy={policy}"
    session = Session.open(MODEL, [plugin(kind), "prefix-cache:block=16"])
    for _ in range(2):
        assert answers(session) == alone[kind]
    assert session.report()["prefix-cache"]["reused_tokens"] > 600


@pytest.mark.parametrize("policy", ["h2o", "tova", "snapkv"])
def test_a_stored_prefix_is_refused_where_its_attention_would_be_missed(policy):
    with pytest.raises(PluginError, match="prefix-cache cannot run beside kv-evict, which follows attention"):
        Session.open(MODEL, [plugin(f"policy={policy}"), "prefix-cache"])
    with pytest.raises(
        PluginError, match="kv-evict and prefix-cache cannot run together: .* leave chunk out"
    ):
        Session.open(MODEL, [plugin("policy=recent,chunk=64"), "prefix-cache"])


@pytest.mark.parametrize("kind", ["policy=h2o", "policy=snapkv,heads", "policy=recent"])
def test_a_conversation_goes_on_only_where_nothing_is_missing(kind):
    session = Session.open(MODEL, [plugin(kind)])
    first = session.text(LONG, max_tokens=20, temp=0.0)
    "".join(first)
    tokens = first.seq.tokens
    go_on = session.request([*tokens[:-1], 5, 6, 7], max_tokens=12, temp=0.0, after=first.seq)
    continued = list(session.generate(go_on))
    other = [*tokens[: len(LONG) - 40], 5, 6, 7]
    second = session.text(LONG, max_tokens=20, temp=0.0)
    "".join(second)
    changed = session.request(other, max_tokens=12, temp=0.0, after=second.seq)
    assert list(session.generate(changed)) == run(plugin(kind), prompt=other, max_tokens=12)
    chunked = Session.open(MODEL, [plugin(kind)], chunk=3)
    again = chunked.text(LONG, max_tokens=20, temp=0.0)
    "".join(again)
    assert continued == list(
        chunked.generate(chunked.request([*tokens[:-1], 5, 6, 7], max_tokens=12, temp=0.0, after=again.seq))
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("policy=h20", "policy is one of recent, h2o"),
        ("every=0", "every, window and pyramid 1 or more"),
        ("recent=-1", "recent is 0 or more"),
        ("budget=20", "a budget of 20 leaves layer 0 20 tokens; .* it needs 23"),
        ("budget=lots", "kv-evict: 'lots' is not a size"),
        ("budget=50%", "not a share"),
        ("budget=10KB", "a budget of 10KB leaves layer 0"),
    ],
)
def test_refusals_are_polite(options, why):
    with pytest.raises(PluginError, match=why):
        Session.open(MODEL, [f"kv-evict:{options}"])


def test_heads_of_their_own_are_refused_beside_an_attention_that_sees_all_alike():
    class Attends:
        exact = False

        @hookimpl
        def attention(self, layer):
            return lambda q, cache: q * 0 if cache.view() else q

    with pytest.raises(
        PluginError, match="kv-evict with heads cannot run beside attends, .* leave heads out"
    ):
        Session.open(MODEL, [Attends(), plugin("policy=recent,heads")])
    Session.open(MODEL, [Attends(), plugin("policy=recent")])
    with pytest.raises(
        PluginError, match="kv-evict needs window-weights from attention, and the attention of"
    ):
        Session.open(MODEL, [Attends(), plugin("policy=tova")])


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_the_contracts(kind):
    assert [finding for finding in check(plugin(kind)) if not finding.holds] == []


@pytest.fixture(scope="module")
def recaller(tmp_path_factory, device):
    model = open_model(write_recaller(tmp_path_factory.mktemp("planted") / "recaller.gguf"), device=device)
    yield model
    model.close()


def share(model, kind, hint, budget=128):
    texts = [Pairs(600, 32, 12, hint, seed) for seed in range(2)]
    name = f"kv-evict:{kind},budget={budget},every=8,window=16"
    return sum(recall(Session.open(model, [name]), text) for text in texts) / len(texts)


def test_the_planted_model_recalls_everything(recaller):
    for hint in (True, False):
        assert recall(Session.open(recaller), Pairs(600, 32, 12, hint)) == 1.0


@pytest.mark.parametrize(("policy", "budget"), [("snapkv", 128), ("h2o", 256), ("keydiff", 128)])
def test_what_was_asked_for_is_kept_where_random_and_recent_lose_it(recaller, policy, budget):
    for control in ("random", "recent"):
        assert share(recaller, f"policy={control},recent=16", True, budget) < 0.6
    assert share(recaller, f"policy={policy},recent=16", True, budget) > 0.75


def test_what_is_unlike_the_rest_is_kept_before_anybody_asks(recaller):
    assert share(recaller, "policy=keydiff", False) > 0.75
    assert share(recaller, "policy=random,recent=0.5", False) < 0.4
    assert share(recaller, "policy=snapkv", False) < 0.4
