"""Every attention plugin beside every plugin that stores or evicts KV: it works in chunks too, or is refused."""

import pytest
from tests.beside import STORY, alone, beside, tiny

import cmr

ATTENTION = (
    "attn-window:window=48",
    "attn-pattern:kind=strided,width=16",
    "attn-pages:top=3,size=16,recent=2,first=1",
    "attn-block:vertical=1,slash=1,dense=512",
    "attn-extend:group=4,window=96",
)
STORED = ("kv-quant:k=q8_0,v=q8_0", "kv-tiers:f16=64,q8=0", "kv-tiers:f16=64,q8=128,disk=128")
EVICT = "kv-evict:policy=recent,budget=100"
PAGE = "context:policy=page"
LONG = (STORY * 3, STORY + "The cat " * 60)
WORKS = {(ATTENTION[0], stored) for stored in STORED} | {(ATTENTION[1], STORED[0])}


@pytest.mark.parametrize("stored", [*STORED, EVICT, PAGE])
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_pair_works_or_is_refused_by_name(attention, stored):
    names = [text.partition(":")[0] for text in (attention, stored)]
    try:
        session = cmr.Session.open(tiny(), [attention, stored])
    except cmr.PluginError as error:
        assert (attention, stored) not in WORKS
        assert all(name in str(error) for name in names), error
        return
    session.close()
    assert stored == EVICT or (attention, stored) in WORKS
    found = alone([attention, stored], LONG, max_tokens=12)
    assert [len(tokens) for tokens in found] == [12, 12]
    if (attention, stored) in WORKS:  # what evicts decides by what it has seen
        assert beside("chunks", [attention, stored], LONG, max_tokens=12) == found
