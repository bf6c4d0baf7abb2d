"""The tools that print the tables of lossy settings: what they name is there, and a line says what it should."""

import argparse

import numpy as np
import pytest
from tests.beside import STORY, tiny
from tests.planted import write_recaller
from tests.tool_files import load_tool

import cmr

pytest.importorskip("numba")
table, attention, curves = load_tool("lossy_table"), load_tool("bench_attention"), load_tool("kv_curves")
EVERY = {*table.SETTINGS, *(setting for settings in attention.TABLES.values() for setting in settings)}


@pytest.mark.parametrize("setting", sorted(EVERY))
def test_settings_run_on_the_bundled_model(setting):
    cmr.Session.open(tiny(), setting.split("+")).close()


def test_a_line_has_bytes_divergence_and_recall(tmp_path):
    args = argparse.Namespace(depth=64, n=8, stretches=1)
    share, far, same = table._quality(args, tiny(), tiny().tokenizer.encode(STORY), "kv-quant:bits=4")
    assert share.endswith("(29%)") and far.startswith("0.0") and same.endswith("%")
    recaller = cmr.open_model(write_recaller(tmp_path / "recaller.gguf"), threads=1)
    assert table._recall(recaller, "kv-quant:bits=8") == ["100%"] * 3
    asked, later, last = table._recall(recaller, "attn-window:window=64")
    assert asked != "100%" != last
    assert table._tried(3, table._recall, recaller, "early-exit:sure=0.7") == ["–"] * 3


def test_every_policy_stands_beside_the_control_with_as_many_late_slots():
    found = list(curves.settings(["h2o", "keydiff", "random"], ["recent=0.25"]))
    assert found == list(dict.fromkeys(found))
    assert {f"policy=random,recent={late}" for late in (0.125, 0.25, 0.5)} < set(found)
    assert "policy=h2o,recent=0.25" in found


def test_perplexity_at_a_depth_is_that_of_what_follows():
    tokens = tiny().tokenizer.encode(STORY, bos=True)[:40]
    lost = attention.losses(cmr.Session.open(tiny()), tokens, 30)
    rows = tiny().logits(tokens)[29:-1].astype(np.float64)
    expected = [np.logaddexp.reduce(row) - row[token] for row, token in zip(rows, tokens[30:], strict=True)]
    assert lost == pytest.approx(expected, abs=0.1)  # generated tokens go through other kernels than prompts
