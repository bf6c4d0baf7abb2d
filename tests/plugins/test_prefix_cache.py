"""prefix-cache: prompts that begin alike share KV within a limit of bytes, and the plain run's tokens come."""

import itertools

import numpy as np
import pytest
from tests.models import RECIPES, VOCAB, write_model
from tests.prefixes import ALIKE, LONG, SEEDED, cached, plain, report
from tests.toy import MODEL, PROMPT, Copies, Repeats, Sees, Together, answer, run

from cmr import PluginError, Session, discovery, open_model
from cmr.testing import check


@pytest.mark.parametrize("options", [{}, SEEDED])
@pytest.mark.parametrize("chunk", [512, 7, 1])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_tokens_are_those_of_the_plain_run(options, chunk, block):
    session = Session.open(MODEL, [f"prefix-cache:block={block}"], chunk=chunk)
    for prompt in ALIKE:
        assert cached(session, prompt, **options)[0] == plain(prompt, **options)
    figures = report(session)
    assert figures["reused_tokens"] == 51 + 20 + 63 + 64 + len(LONG) + 52 + 1 and figures["hits"] == 7


@pytest.mark.parametrize("recipe", ["llama", "gemma3", "sizes-by-layer"])
def test_restored_kv_is_bit_for_bit_what_the_prompt_computes(tmp_path, recipe, device):
    model = open_model(write_model(tmp_path / "m.gguf", RECIPES[recipe]), device=device)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, 150).tolist()
    caching = Session.open(model, ["prefix-cache:block=32"])
    answer(caching, tokens, max_tokens=9)
    for shared, more in ((150, 0), (149, 3), (100, 40), (64, 1), (33, 20)):
        prompt = tokens[:shared] + rng.integers(0, VOCAB, more).tolist()
        seqs = []
        for session in (Session.open(model), caching):
            seqs.append(session.add(session.request(prompt, max_tokens=6, temp=0.0, ignore_eos=True)))
            while session.step():
                pass
        alone, again = seqs
        assert again.new == alone.new and again.notes["prefix-cache"].startswith(
            f"{min(shared, len(prompt) - 1)} "
        )
        for ours, theirs in zip(again.caches, alone.caches):
            for a, b in zip(ours.view(), theirs.view()):
                assert np.array_equal(a, b)
    model.close()


def test_generated_tokens_are_not_stored_since_other_kernels_computed_them():
    session = Session.open(MODEL, ["prefix-cache:block=4"])
    first = session.text(PROMPT, max_tokens=16, temp=0.0)
    "".join(first)
    turn = first.seq.tokens + MODEL.tokenizer.encode(" and then")
    tokens, said = cached(session, turn)
    assert tokens == run(prompt=turn, max_tokens=12)
    assert said == f"{len(PROMPT)} of {len(turn)} reused: nothing stored further at token {len(PROMPT)}"


def test_a_sequence_that_goes_on_stores_only_what_was_prompt_from_the_start():
    session = Session.open(MODEL, ["prefix-cache:block=4"])
    first = session.text(PROMPT, max_tokens=16, temp=0.0)
    "".join(first)
    turn = first.seq.tokens + MODEL.tokenizer.encode(" and then")
    "".join(session.text(turn, max_tokens=4, temp=0.0, after=first.seq))
    assert sum(len(node.tokens) for node in session.plan.plugins["prefix-cache"].tree.nodes.values()) == len(
        PROMPT
    )
    assert cached(session, turn)[0] == run(prompt=turn, max_tokens=12)


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize("options", [{}, SEEDED])
def test_with_answers_a_turn_reads_what_is_new_and_goes_on_as_in_the_same_session(block, options):
    """Which is the measure: a chat in one session keeps its KV too, with the roles in which it was computed."""
    more = MODEL.tokenizer.encode(" and then")
    session, chat = Session.open(MODEL, [f"prefix-cache:block={block},answers"]), Session.open(MODEL)
    assert not session.plan.exact
    turn, last = PROMPT, None
    for number in range(4):
        tokens, said = cached(session, turn, **options)
        text = chat.text(turn, after=last, **{"max_tokens": 12, "temp": 0.0} | options)
        "".join(text)
        assert tokens == text.seq.new
        if number:
            assert said.startswith(f"{len(turn) - len(more) - 1} of {len(turn)} reused")
        last, turn = text.seq, text.seq.tokens + more
    fed = len(PROMPT) + 3 * (1 + len(more))
    assert session.report()["prompt_tokens"] == fed == chat.report()["prompt_tokens"]


def test_with_answers_drafts_and_batches_do_not_show():
    plain = None
    for plugins in ([], [Copies()], [Together(rows=3)]):
        session = Session.open(MODEL, ["prefix-cache:block=4,answers", *plugins])
        first = session.text(PROMPT, max_tokens=24, temp=0.0)
        "".join(first)
        tokens, said = cached(session, first.seq.tokens + [3, 4, 5])
        plain = plain or tokens
        assert tokens == plain and said.startswith(f"{len(PROMPT) + 23} of ")


def test_a_folder_with_answers_serves_nobody_who_did_not_ask_for_them(tmp_path):
    texts = []
    for answers in (True, False, True):
        session = Session.open(MODEL, [f"prefix-cache:block=8,dir={tmp_path},answers={answers}"])
        texts.append(cached(session))
    reused = [said for _, said in texts]
    assert reused == ["0 of 52 reused: empty", "0 of 52 reused: other layout", "51 of 52 reused"]


def exact_plugins():
    """Every official exact plugin that needs no option, and ours of the tests."""
    for name in discovery.BUILTIN:
        found = discovery.describe(name)
        if found.exact and name != "prefix-cache" and not any(option.required for option in found.options):
            yield name
    yield from (Copies, Sees, Together, Repeats)


@pytest.mark.parametrize("other", list(exact_plugins()))
@pytest.mark.parametrize("first", [True, False])
def test_tokens_stay_the_same_beside_other_plugins(other, first):
    def plugins(*more):
        made = other if isinstance(other, str) else other()
        return [*more, made] if first else [made, *more]

    try:
        session = Session.open(MODEL, plugins("prefix-cache:block=8"), chunk=16)
    except PluginError as error:
        pytest.skip(f"refused by name: {error}")
    for prompt, options in itertools.product(ALIKE, ({}, SEEDED)):
        wanted = answer(Session.open(MODEL, plugins()), prompt, max_tokens=12, **options)
        assert answer(session, prompt, max_tokens=12, **options) == wanted
    assert report(session)["hits"] >= 7


def test_requests_under_way_together_share_what_earlier_ones_stored():
    session = Session.open(MODEL, ["prefix-cache:block=8", Together(rows=5)])
    for _ in range(2):
        requests = [session.request(prompt, max_tokens=12, temp=0.0) for prompt in ALIKE]
        found = {id(request): [] for request in requests}
        for request, token in session.stream(requests):
            found[id(request)].append(token)
        for prompt, request in zip(ALIKE, requests):
            assert found[id(request)] == plain(prompt)
    assert report(session)["hits"] >= len(ALIKE) - 1


# -- limits of memory --


def held(session):
    """The bytes of all arrays of the tree, as they are."""
    nodes = session.plan.plugins["prefix-cache"].tree.nodes.values()
    return sum(node.data.nbytes + node.tokens.nbytes for node in nodes if node.data is not None)


@pytest.mark.parametrize("limit", [0, 1000, 5000, 20000, 10**6])
def test_the_limit_of_memory_holds(limit):
    session = Session.open(MODEL, [f"prefix-cache:block=8,memory={limit}"])
    rng = np.random.default_rng(limit)
    for _ in range(20):
        prompt = ALIKE[rng.integers(len(ALIKE))][: rng.integers(1, 200)] + "xyz"[: rng.integers(4)]
        assert cached(session, prompt, max_tokens=3)[0] == run(prompt=prompt, max_tokens=3)
        assert held(session) == report(session)["memory_bytes"] <= limit
    assert limit < 5000 or report(session)["hits"] > 5


def test_the_least_used_blocks_leave_children_before_parents():
    session = Session.open(MODEL, ["prefix-cache:block=8,memory=100400"])  # 64 blocks of 8 tokens
    for prompt in (PROMPT, "b" * 100, PROMPT, "c" * 300, "d" * 120):  # 7, 13, 7, 38 and 15 blocks
        cached(session, prompt, max_tokens=1)
    assert cached(session)[1] == "51 of 52 reused"
    assert cached(session, "b" * 100)[1] == "40 of 100 reused: evicted at token 40"
    tree = session.plan.plugins["prefix-cache"].tree
    roots = {store.root for store in session.plan.plugins["prefix-cache"].stores.values()}
    assert all(node.parent in tree.nodes or node.parent in roots for node in tree.nodes.values())


def test_a_prompt_larger_than_memory_keeps_its_beginning():
    session = Session.open(MODEL, ["prefix-cache:block=8,memory=8K"])
    cached(session, "e" * 400)
    reused = int(cached(session, "e" * 400)[1].split()[0])
    assert 8 <= reused <= 8000 // (3 * 2 * 2 * 8 * 2) and report(session)["last"].endswith(
        f"no room at token {reused}"
    )


def test_mistakes_in_options_are_refused():
    for option in ("memory=lots", "disk=-1", "block=0", "block=5000"):
        with pytest.raises(PluginError, match=f"prefix-cache: {option.partition('=')[0]} is "):
            Session.open(MODEL, [f"prefix-cache:{option}"])


@pytest.mark.parametrize("options", ["block=64", "block=3,memory=5K"])
def test_the_contracts_hold(options):
    assert [finding for finding in check(f"prefix-cache:{options}") if not finding.holds] == []
