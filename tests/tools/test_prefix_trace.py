"""The trace replay: its bound, what prefix-cache's index saves of it, limits, and the same with a model."""

import json

import pytest
from tests.tool_files import load_tool
from tests.toy import answer

from cmr import Session
from cmr.testing import ToyModel

tool = load_tool("prefix_trace")


@pytest.fixture
def small(tmp_path):
    """Five requests: new, the same, longer, another behind one block, another altogether."""
    path = tmp_path / "trace.jsonl"
    lines = [(1000, [0, 1]), (1000, [0, 1]), (1500, [0, 1, 2]), (600, [0, 3]), (512, [4])]
    path.write_text("\n".join(json.dumps({"input_length": n, "hash_ids": ids}) for n, ids in lines))
    return path


def test_the_bound_counts_what_earlier_prompts_began_with(small):
    requests = list(tool.prompts(small, 500, 512))
    assert [len(tokens) for tokens, _ in requests] == [1000, 1000, 1500, 600, 512]
    assert tool.bound(requests, 512) == [0, 999, 1024, 512, 0]
    counts, tree, _ = tool.replay(requests, 1 << 40, 64)
    assert counts == [0, 999, 1000, 512, 0]  # of the third, 24 tokens of a block were never computed before
    assert tree.nbytes == 5 * (1500 + 88 + 512)


def test_the_table_says_it_for_each_limit(small):
    lines = list(tool.table(list(tool.prompts(small, 500, 8)), 8, 4))
    assert len(lines) == 5 + len(tool.SHARES) and lines[4].startswith("| none |")


@pytest.mark.parametrize("scale, block", [(8, 64), (8, 16), (32, 64)])
def test_the_mooncake_trace_is_used_up_to_its_bound(shared, scale, block):
    trace = shared / "data" / "traces" / "mooncake-conversation.jsonl"
    requests = list(tool.prompts(trace, 500, scale))
    most = tool.bound(requests, scale)
    counts, tree, _ = tool.replay(requests, 1 << 40, block)
    assert sum(map(min, zip(counts, most))) >= 0.99 * sum(most) > 0
    saved = [sum(map(min, zip(tool.replay(requests, tree.nbytes // n, block)[0], most))) for n in (1, 2, 8)]
    assert saved[0] >= 0.99 * sum(most) and saved == sorted(saved, reverse=True)


def test_with_a_model_the_trace_gives_plain_tokens_and_the_same_savings(shared):
    trace = shared / "data" / "traces" / "mooncake-conversation.jsonl"
    requests = [pair for pair in tool.prompts(trace, 60, 4) if len(pair[0]) < 120][:25]
    model = ToyModel()
    caching, plain = Session.open(model, ["prefix-cache:block=8"]), Session.open(model)
    for tokens, _ in requests:
        prompt = (tokens % 95).tolist()
        assert answer(caching, prompt, max_tokens=3) == answer(plain, prompt, max_tokens=3)
    assert caching.report()["prefix-cache"]["reused_tokens"] >= sum(tool.bound(requests, 4))
