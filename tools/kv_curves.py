"""Measure every policy of kv-evict against its budget: divergence at a depth, recall on a planted text, bytes.

python tools/kv_curves.py --text story.txt [--model models/tiny-q8_0.gguf] [--depth 512] [--budgets 64,128,256]

Divergence is KL against the full f16 KV, on tokens that are fed as if generated. Recall is the share of right answers
of a model built by hand, which with the full KV answers all: of keys asked for before the prompt ends (asked), and
only after it (unasked). A policy is worth its name where it beats `random` by either measure, and beside `recent`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins"), str(ROOT)]

from tests.planted import Pairs, recall, write_recaller  # noqa: E402

from cmr import Session, open_model  # noqa: E402
from cmr.eval import divergence_at_depth  # noqa: E402
from cmr_plugins.kv_evict.policies import POLICIES  # noqa: E402


def settings(policies: list[str], variants: list[str]) -> Iterator[str]:
    """Yield options of the plugin: the control with as many late slots as any policy protects, then each policy.

    Each comes alone and with each variant, none twice.
    """
    found = [f"policy=random,recent={late:g}" for late in sorted({POLICIES[name].late for name in policies})]
    for name in policies:
        if name != "random":
            found += [f"policy={name}", *(f"policy={name},{variant}" for variant in variants)]
    found += [f"policy=random,{variant}" for variant in variants]
    yield from dict.fromkeys(found)


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the figures of each setting under all budgets."""
    model = open_model(args.model, threads=args.threads)
    tokens = model.tokenizer.encode(Path(args.text).read_text("utf-8")[: args.characters])
    with tempfile.TemporaryDirectory() as folder:
        recaller = open_model(write_recaller(Path(folder) / "recaller.gguf"), threads=1)

        def figures(setting: str, budget: str) -> dict[str, Any]:
            plugin = f"kv-evict:{setting},budget={budget},{args.common}".rstrip(",")
            found = divergence_at_depth(model, [plugin], tokens, args.depth, args.n, stretches=args.stretches)
            return {
                "setting": setting.removeprefix("policy="),
                "budget": budget,
                "bytes a token": found.kv_bytes,
                "full": found.base_kv_bytes,
                "KL": found.divergence.mean,
                "+-": found.divergence.stderr,
                "same top": found.divergence.same_top,
                "asked": recalled(recaller, plugin, True),
                "unasked": recalled(recaller, plugin, False),
            }

        for setting in settings(args.policies, args.variants):
            yield [figures(setting, budget) for budget in args.budgets]
        recaller.close()
    model.close()


def recalled(model: Any, plugin: str, hint: bool, texts: int = 4) -> float:
    """Return the share of right answers over some texts of 600 tokens with 32 pairs, 12 of them asked for."""
    pairs = [Pairs(600, 32, 12, hint, seed) for seed in range(texts)]
    return sum(recall(Session.open(model, [plugin]), one) for one in pairs) / texts


def row(values: list[Any]) -> str:
    """Write a line of a Markdown table."""
    return "| " + " | ".join(values) + " |"


def head(budgets: list[str]) -> str:
    """Write the head of the table: KL and both kinds of recall, each under every budget."""
    names = [f"{what} {budget}" for what in ("KL at", "asked,", "unasked,") for budget in budgets]
    return f"{row(['policy', *names])}\n{row(['---', *['---:'] * len(names)])}"


def text_of(found: list[dict[str, Any]]) -> str:
    """Write a setting's figures under all budgets as a line of the table."""
    cells = [f"{one['KL']:.3f} ± {one['+-']:.3f}" for one in found]
    cells += [f"{one[kind]:.0%}" for kind in ("asked", "unasked") for one in found]
    return row([f"`{found[0]['setting']}`", *cells])


def main() -> None:
    """Print the table as it comes, and write the figures where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny-q8_0.gguf"))
    parser.add_argument("--text", required=True, help="a text of the kind that the model was trained on")
    parser.add_argument("--characters", type=int, default=60000, help="how much of it is read")
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--n", type=int, default=48, help="tokens compared in each stretch")
    parser.add_argument("--stretches", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["64", "128", "256"])
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(POLICIES))
    parser.add_argument("--variants", type=lambda text: text.split("+"), default=[],
                        help="further options, separated by +")  # fmt: skip
    parser.add_argument("--common", default="every=8")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.variants = [variant for variant in args.variants if variant]
    print(head(args.budgets), flush=True)
    found = []
    for figures in measure(args):
        found += figures
        print(text_of(figures), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
