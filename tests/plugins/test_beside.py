"""A prompt that is read once for several answers gives each the tokens it has alone, whatever plugins are there."""

import pytest
from tests.beside import tiny
from tests.toy import MODEL, PROMPTS, Copies, Preempts, Sees, Together

from cmr import PluginError, Session, discovery, hookimpl

LONG = PROMPTS[-1]
SEEDS = (3, 4, 5, 6)
# What a plugin needs to have something to do on the toy; of the others those with required options are left out.
OPTIONS = {
    "kv-quant": "bits=4,recent=16",
    "kv-evict": "budget=48,policy=snapkv",
    "kv-tiers": "f16=16,q8=32",
    "attn-window": "window=16,sinks=2",
    "attn-pages": "size=16,top=2,first=0,recent=2",
    "attn-extend": "group=2,window=32",
    "context": "policy=shift",
    "budget": "answer=9",
    "stop-loop": "times=2,span=8,least=6",
    "prefix-cache": "block=8",
}
NAMES = [
    f"{name}:{OPTIONS[name]}" if name in OPTIONS else name
    for name in discovery.BUILTIN
    if not any(option.required for option in discovery.describe(name).options)
]


def opened(*plugins, model=MODEL, **limits):
    """A session with these plugins, skipped where one of them does not run on the model."""
    try:
        made = [plugin if isinstance(plugin, str) else plugin() for plugin in plugins]
        return Session.open(model, made, **limits)
    except PluginError as error:
        pytest.skip(f"refused by name: {error}")


def together(session, prompts, **options):
    """The tokens of answers to prompts, the first prompt read for all, and the prompt tokens that were fed."""
    seqs = []
    for prompt, seed in prompts:
        request = session.request(prompt, **{"max_tokens": 14, "temp": 1.0, "seed": seed} | options)
        seqs.append(session.add(request, beside=seqs[0] if seqs else None))
    while session.step():
        pass
    return [seq.new for seq in seqs], session.report()["prompt_tokens"]


def alone(session, prompts, **options):
    return [together(session, [prompt], **options)[0][0] for prompt in prompts]


SAME = [(LONG, seed) for seed in SEEDS]


@pytest.mark.parametrize("scheduler", [None, "batching", "batching:width=2", Together, Preempts])
@pytest.mark.parametrize("chunk", [512, 7])
def test_a_prompt_is_read_once_for_all_that_have_it(scheduler, chunk):
    schedulers = [scheduler] if scheduler else []
    found, fed = together(opened(*schedulers, chunk=chunk), SAME)
    assert found == alone(Session.open(MODEL), SAME) and len({tuple(tokens) for tokens in found}) == 4
    assert fed == len(LONG) + 3 or scheduler is Preempts and fed >= len(LONG) + 3


@pytest.mark.parametrize("other", [name for name in NAMES if name != "batching"] + [Copies, Sees], ids=str)
@pytest.mark.parametrize("scheduler", ["batching", Together])
@pytest.mark.parametrize("model", [lambda: MODEL, tiny], ids=["toy", "bundled"])
def test_beside_every_plugin_tokens_are_those_of_the_plugin_alone(model, other, scheduler):
    prompts = [(model().tokenizer.encode(LONG), seed) for seed in SEEDS]
    session = opened(other, scheduler, model=model(), chunk=16)
    found, fed = together(session, prompts)
    assert found == alone(opened(other, model=model()), prompts)
    once, each = len(prompts[0][0]) + 3, 4 * len(prompts[0][0])
    # Old tokens of kv-tiers cannot always be taken back to one token before.
    assert fed == once if session.plan.copies and "kv-tiers" not in str(other) else fed in (once, each)


def test_another_prompt_takes_as_much_as_is_the_same():
    prompts = [(LONG, 3), (LONG[:60] + "QQQ", 4), ("Q", 5), (LONG[:60], 6), (LONG + "more", 7)]
    for plugins in ([], ["batching"]):
        found, fed = together(Session.open(MODEL, plugins), prompts)
        assert found == alone(Session.open(MODEL), prompts)
        assert fed == len(LONG) + 3 + 1 + 1 + 4


def test_what_was_generated_is_not_copied_since_other_kernels_computed_it():
    session = Session.open(MODEL)
    first = session.add(session.request("abc", max_tokens=20, temp=0.0))
    while session.step():
        pass
    turn = first.tokens + MODEL.tokenizer.encode(" and")
    second = session.add(session.request(turn, max_tokens=12, temp=0.0), beside=first)
    while session.step():
        pass
    assert second.new == alone(Session.open(MODEL), [(turn, 0)], temp=0.0, max_tokens=12)[0]
    assert session.report()["prompt_tokens"] == 3 + len(turn) - 3 and len(first.caches[0]) == first.cached


def test_plugins_that_follow_the_prompt_and_change_tokens_are_not_led_astray():
    class Counts:
        """Writes what depends on how many steps it saw of a sequence."""

        exact = False

        @hookimpl
        def on_step(self, step):
            for part in step.parts:
                part.seq.notes["seen"] = part.seq.notes.get("seen", 0) + len(part.tokens)

        @hookimpl
        def on_logits(self, seq, draft, logits):
            logits[:, seq.notes.get("seen", 0) % 7] += 30

    found, fed = together(opened(Counts, "batching"), SAME)
    assert found == alone(opened(Counts), SAME) and fed == 4 * len(LONG)


def test_the_first_may_end_or_fail_before_the_others_begin():
    session = Session.open(MODEL, ["batching:width=1"])
    first = session.add(session.request(LONG, max_tokens=14, temp=1.0, seed=3))
    second = session.add(session.request(LONG, max_tokens=14, temp=1.0, seed=4), beside=first)
    session.cancel(first)
    while session.step():
        pass
    assert second.new == alone(Session.open(MODEL), SAME[1:2])[0]


def test_patterns_of_long_prompts_are_copied_with_their_keys():
    plugin, prompts = (
        "attn-block:vertical=1,slash=1,dense=512",
        [(LONG * 6 + "and", seed) for seed in SEEDS[:3]],
    )
    found, fed = together(opened(plugin, "batching"), prompts)
    assert found == alone(opened(plugin), prompts) != alone(opened(), prompts)
    assert fed == len(LONG * 6) + 3 + 2
