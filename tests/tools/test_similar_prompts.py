"""similar_prompts: pairs by rule ask what the rule says, the table has a row for each measure and threshold."""

import json
import random
from pathlib import Path

import pytest
from tests.cli_runs import bundled
from tests.tool_files import load_tool

pairs, tool = load_tool("prompt_pairs"), load_tool("similar_prompts")
PROMPTS = (
    "Write a poem about the blue river near Oslo in 3 lines.",
    "Explain how trains are better than planes for travel, and do not mention Paris.",
    "List five animals and plants of the Sahara that live from night to morning.",
)


@pytest.fixture
def folder(tmp_path):
    """The four data sets, of three prompts each."""
    for name, line in {
        "mt-bench": lambda p: {"turns": [p, "again"]},
        "ifeval": lambda p: {"prompt": p},
        "arena-hard-v0.1": lambda p: {"prompt": p},
        "sgd-dialogues-dev": lambda p: {
            "services": ["Trips_1"],
            "messages": [{"role": "user", "content": p}],
        },
    }.items():
        lines = [json.dumps(line(f"{prompt} {name.split('-')[0]}")) for prompt in PROMPTS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_rules_change_what_they_say():
    same = dict(pairs.same(PROMPTS[0], random.Random(0)))
    assert same["Please ..."] == "Please write a poem about the blue river near Oslo in 3 lines."
    assert same["synonym"] == PROMPTS[0].replace("Write", "Compose") and same["short forms"] == PROMPTS[0]
    other = dict(pairs.other(PROMPTS[0], random.Random(0), ["Oslo", "Rome"], ["river", "house"]))
    assert other["number"].endswith("in 4 lines.") and other["name"] == PROMPTS[0].replace("Oslo", "Rome")
    assert other["word"] == PROMPTS[0].replace("river", "house")
    other = dict(pairs.other(PROMPTS[2], random.Random(0), ["Sahara"], []))
    assert "from morning to night" in other["from and to"] and "animals or plants" in other["and, or"]
    assert other["number word"] == PROMPTS[2].replace("five", "six")


def test_natural_pairs_are_two_prompts_of_one_kind(folder):
    data, services = pairs.read(folder)
    found = pairs.natural(data, services)
    assert len(found) == 12 and all(
        pair.a != pair.b and pair.a.split()[-1] == pair.b.split()[-1] for pair in found
    )


def test_the_table_has_a_row_for_each_measure_and_threshold(folder):
    lines = list(tool.curves(folder, Path(bundled()), 0))
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 7 * 5 and rows[-1].startswith("| words that carry meaning | 1 |")
    assert rows[-1].endswith("| 0.0% | 0.0% | 0.0% |") and "Please ... 12 of 12" in lines[-3]


def test_finding_is_timed_among_so_many(folder):
    reading, finding, size = tool.timing(folder, 50)
    assert (
        reading.startswith("reading: ")
        and finding.startswith("finding: ")
        and size.endswith("for 50 prompts")
    )
