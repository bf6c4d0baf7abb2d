"""attn-extend: Self-Extend in float64, in chunks, batches and drafts, and beyond the trained length."""

import numpy as np
import pytest
from tests.beside import BESIDE, STORY, alone, beside, tiny
from tests.toy import PROMPTS, run

import cmr
from cmr.eval import Following, divergence_at_depth
from cmr.testing import ToyModel, check
from cmr_plugins.attn_extend import AttnExtend, ExtendCache

LONG = (STORY * 6, STORY * 2 + "The cat " * 60)
SMALL = "attn-extend:group=4,window=96"
TOY = ToyModel()


def rotated(x, pos, inv_freq, pairing):
    """Rotate x [n, heads, dim] to positions, in float64."""
    x, half = np.array(x, np.float64), len(inv_freq)
    angles = np.asarray(pos)[:, None, None] * inv_freq
    first, second = (
        (slice(0, half), slice(half, 2 * half))
        if pairing == "neox"
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first], x[..., second] = (
        a * np.cos(angles) - b * np.sin(angles),
        a * np.sin(angles) + b * np.cos(angles),
    )
    return x


def reference(q, k, v, rows, group, window, inv_freq, pairing):
    """Self-Extend in float64 from keys and queries that are not rotated: scores one by one, by relative position."""
    heads, width = q.shape[1], q.shape[1] // k.shape[1]
    out = np.zeros((len(rows), heads, v.shape[2]))
    for i, p in enumerate(rows):
        border = max(0, (p - window) // 64 * 64)
        pos = np.arange(p + 1)
        far = pos < border
        distance = np.where(far, p // group + window - window // group - pos // group, p - pos)
        keys = np.repeat(rotated(k[: p + 1], -distance, inv_freq, pairing), width, axis=1)
        scores = np.einsum("hd,shd->hs", q[i].astype(np.float64), keys) / np.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        values = np.repeat(v[: p + 1].astype(np.float64), width, axis=1)
        out[i] = np.einsum("hs,shd->hd", weights / weights.sum(1, keepdims=True), values)
    return out


@pytest.mark.parametrize("pairing, rot", [("neox", 32), ("norm", 32), ("norm", 16)])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
@pytest.mark.parametrize("device", ["cpu", "portable"])
def test_attention_is_self_extends(pairing, rot, prompt, device):
    from cmr.ops import open_ops

    rng = np.random.default_rng(0)
    inv_freq = 10000.0 ** -(np.arange(0, rot, 2) / rot)
    made = ExtendCache(
        open_ops(device, 1), 2, 32, dtype=np.float32, inv_freq=inv_freq, pairing=pairing, group=4, window=100
    )
    n = 600
    k, v = rng.standard_normal((2, n, 2, 32)).astype(np.float32)
    q = rng.standard_normal((n, 4, 32)).astype(np.float32)
    pos = np.arange(n, dtype=np.int32)
    turned_k, turned_q = (rotated(x, pos, inv_freq, pairing).astype(np.float32) for x in (k, q))
    for rows in (slice(0, 250), slice(250, 251), slice(251, n)):
        made.append(turned_k[rows], v[rows], pos[rows])
    rows = np.array([n - 9, n - 1]) if not prompt else np.r_[60:64, 163:166, 228:230, 590:600]
    out = np.empty((len(rows), 4, 32), np.float32)
    made.attend(turned_q[rows], pos[rows], cmr.AttnRule(), out, prompt)
    wanted = reference(q[rows], k, v, rows, 4, 100, inv_freq, pairing)
    np.testing.assert_allclose(out, wanted, atol=3e-5)


def test_within_the_window_tokens_are_the_plain_runs():
    assert alone(["attn-extend:group=2,window=900"], LONG) == alone([], LONG)
    tokens = tiny().tokenizer.encode(LONG[0], bos=True)
    assert divergence_at_depth(tiny(), [SMALL], tokens, 256, 32).divergence.mean > 1e-4


@pytest.mark.parametrize("other", BESIDE)
def test_beside(other):
    assert beside(other, [SMALL], LONG) == alone([SMALL], LONG)


def perplexity(plugins, tokens, start, context):
    session = cmr.Session.open(tiny(context), plugins)
    follower = Following(session, tokens, start)
    logs = []
    for token in tokens[start:]:
        row = follower.row().astype(np.float64)
        logs.append(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
    follower.close()
    return np.exp(-np.mean(logs))


def test_beyond_the_trained_length_text_stays_readable(shared):
    text = next((shared / "data" / "text").glob("tinystories-val*")).read_text("utf-8")
    tokens = tiny().tokenizer.encode(text[:12000], bos=True)[:2048]
    plain = perplexity([], tokens, 1500, 2048)
    extended = perplexity(["attn-extend:group=4,window=512"], tokens, 1500, 2048)
    assert extended < 0.97 * plain


def test_a_context_out_of_reach_is_refused():
    with pytest.raises(
        cmr.PluginError, match=r"group=2,window=512 reaches \d+ .* 1024, and the context is 4096"
    ):
        cmr.Session.open(tiny(4096), ["attn-extend:group=2"])
    with pytest.raises(cmr.PluginError, match="group is at least 2"):
        cmr.Session.open(TOY, ["attn-extend:group=1"])


@pytest.mark.parametrize("group, window", [(2, 512), (4, 512), (8, 256), (16, 0)])
def test_within_reach_no_distance_is_longer_than_in_training(group, window):
    plugin = AttnExtend(group=group, window=window)
    near, reach = plugin.near(tiny()), plugin.reach(tiny())
    assert (reach - 1) // group + near - near // group < 1024
    assert reach > 1024


def test_memory_is_that_of_keys_twice():
    kinds = [cmr.Session.open(tiny(), plugins).plan.memory.kv_token for plugins in ([], [SMALL])]
    assert kinds[1] - 24 == pytest.approx(1.5 * (kinds[0] - 24))


def test_contracts():
    found = check(lambda: AttnExtend(group=2, window=64), ToyModel())
    assert [finding for finding in found if not finding.holds] == []
    long = PROMPTS[-1]
    assert run("attn-extend:group=2,window=32", prompt=long) != run(prompt=long)
