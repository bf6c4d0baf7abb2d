"""Every exact plugin and every pair of them gives the plain tokens, over prompts, chunks and batches."""

from itertools import combinations

import pytest
from tests.toy import MODEL, PROMPT, PROMPTS, Copies, Together, run

from cmr import PluginError, Session, discovery
from cmr.plan import spelled

# Options under which a plugin is exact and has something to do here; the others run with their defaults.
OPTIONS = {"budget": "answer=9", "stop-loop": "times=2,span=8,least=6", "prefix-cache": "answers=false"}
# test_file_pairs.py has those that need a file; two need windows or experts and have a test file each.
ELSEWHERE = ("expert-stream", "layer-stream", "spec-draft", "spec-exit", "kv-window")
EXACT = [name for name in discovery.BUILTIN if name in OPTIONS or discovery.describe(name).exact is True]
KINDS = [
    *(f"{name}:{OPTIONS[name]}" if name in OPTIONS else name for name in EXACT if name not in ELSEWHERE),
    Copies,
    Together,
]
OWN_REASONS = ("loop", "budget", "answered")
LENGTH = 20
GREEDY, SEEDED = {"temp": 0.0}, {"temp": 1.0, "seed": 3}
PLAIN = {
    (prompt, seed): run(prompt=prompt, max_tokens=LENGTH, **options)
    for prompt in PROMPTS
    for seed, options in ((0, GREEDY), (3, SEEDED))
}


def label(kind):
    return kind.partition(":")[0] if isinstance(kind, str) else kind.__name__.lower()


def opened(kinds, **limits):
    """A session with these plugins, or None where they refuse each other."""
    try:
        return Session.open(MODEL, [kind if isinstance(kind, str) else kind() for kind in kinds], **limits)
    except PluginError as error:
        assert len(kinds) > 2 or all(label(kind) in str(error) for kind in kinds), error
        return None


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize(
    "kinds",
    [*((kind,) for kind in KINDS), *combinations(KINDS, 2), tuple(KINDS)],
    ids=lambda kinds: "+".join(map(label, kinds)),
)
def test_tokens_are_the_plain_runs(kinds, chunk):
    session = opened(kinds, chunk=chunk)
    if session is None:
        return
    assert session.plan.exact, [spelled(*pair) for pair in session.plan.plugins.items()]
    for seed, options in ((0, GREEDY), (3, SEEDED)):
        texts = [session.text(prompt, max_tokens=LENGTH, **options) for prompt in (*PROMPTS, PROMPT)]
        rest = list(texts)
        while rest:
            rest = [text for text in rest if next(text, None) is not None]
        for text in texts:
            plain = PLAIN[text.seq.request.prompt, seed]
            sooner = text.stop in OWN_REASONS
            assert text.seq.new == (plain[: text.seq.n_new] if sooner else plain)
