"""Print the table of all lossy settings: bytes of KV a token, divergence, recall, tokens a second at a depth.

python tools/lossy_table.py --text story.txt [--fast models/random-llama-3.2-1b-q4_0.gguf] [SETTING ...]

Bytes and KL from the plain run are of generated tokens of --model behind --depth tokens of the text. Recall is of the
model built by hand (tests/planted.py): keys asked for before the prompt ends, keys asked for only later, and keys asked
for by the prompt's last token, which sparse prompts may miss. Speed is that of --fast, steps taking turns with plain
ones, behind a prompt of --far tokens; without --fast that part is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT / "plugins"), str(ROOT), str(ROOT / "tools")]

from kv_curves import recalled, row  # noqa: E402
from tests.planted import ASK, Pairs, write_recaller  # noqa: E402

from cmr import Session, open_model  # noqa: E402
from cmr.errors import CMRError  # noqa: E402
from cmr.eval import Following, divergence_at_depth  # noqa: E402
from cmr_plugins.kv_evict.policies import POLICIES  # noqa: E402

SETTINGS = (
    "kv-quant:bits=8",
    "kv-quant:k=q8_0,v=q4_0",
    "kv-quant:bits=5",
    "kv-quant:bits=4",
    "kv-quant:bits=4,recent=64",
    "kv-quant:bits=2",
    "kv-tiers:q8=256",
    *(f"kv-evict:policy={policy},budget=256" for policy in POLICIES),
    "attn-window:window=256",
    "attn-pages:size=16,top=8,first=0",
    "attn-pages:top=24",
    "attn-block:dense=512",
    "attn-pattern:kind=strided,width=128,step=8",
    "attn-extend:group=4,window=256",
    "early-exit:sure=0.7",
)
RECALL = ("asked first", "asked later", "asked last")
TEXT, QUESTIONS = 1500, 12  # tokens before a question, and how many are asked


def main() -> None:
    """Print a line for each setting, as soon as it is measured."""
    args = _arguments()
    names = ["setting", "KV bytes a token", f"KL at {args.depth}", "same token", *RECALL]
    speeds = _Speeds(args) if args.fast else None
    names += [f"tok/s at {args.far}", "of plain"] if speeds else []
    print(row(names), row(["---", *["---:"] * (len(names) - 1)]), sep="\n", flush=True)
    model = open_model(args.model, threads=args.threads)
    tokens = model.tokenizer.encode(args.text.read_text("utf-8")[: args.characters], bos=True)
    with tempfile.TemporaryDirectory() as folder, closing(model):
        with closing(open_model(write_recaller(Path(folder) / "recaller.gguf"), threads=1)) as recaller:
            for setting in args.settings or SETTINGS:
                cells = [f"`{setting}`", *_tried(3, _quality, args, model, tokens, setting)]
                cells += _tried(3, _recall, recaller, setting)
                cells += _tried(2, speeds.of, setting) if speeds else []
                print(row(cells), flush=True)


def _tried(count: int, measure: Callable[..., list[str]], *args: Any) -> list[str]:
    """Return cells, or dashes where a setting does not go with a model."""
    try:
        return measure(*args)
    except CMRError as error:
        print(error, file=sys.stderr)
        return ["–"] * count


def _quality(args: argparse.Namespace, model: Any, tokens: Sequence[int], setting: str) -> list[str]:
    """Bytes of KV a token with their share of the plain run's, KL, agreement."""
    found = divergence_at_depth(
        model, setting.split("+"), tokens, args.depth, args.n, stretches=args.stretches
    )
    held, far = found.kv_bytes, found.divergence
    share = f"{held:.0f} ({held / found.base_kv_bytes:.0%})"
    return [share, f"{far.mean:.4f} ± {far.stderr:.4f}", f"{far.same_top:.1%}"]


def _recall(model: Any, setting: str) -> list[str]:
    """The shares of right answers to questions of each kind."""
    with Session.open(model, setting.split("+")) as session:
        pairs = Pairs(TEXT, 32, QUESTIONS, False)
        right = sum(_answer(session, [*pairs.tokens, ASK + key]) == value for key, value in pairs.questions)
    return [f"{share:.0%}" for share in (*(recalled(model, setting, hint) for hint in (True, False)),
                                         right / QUESTIONS)]  # fmt: skip


def _answer(session: Any, prompt: list[int]) -> int:
    """The likeliest token behind a prompt."""
    with closing(Following(session, [*prompt, 0], len(prompt))) as following:
        return int(following.next_row().argmax())


class _Speeds:
    """Generated tokens behind a long prompt, each setting's by turns with plain ones."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.n, self.far = args.n_fast, args.far
        rounds = len(args.settings or SETTINGS)
        # Plain goes on from setting to setting, so that its prompt is read once.
        context = self.far + self.n * (rounds + 1) + 8
        self.model = open_model(args.fast, threads=args.threads, context=context)
        self.text = [token % self.model.n_vocab for token in range(1, context - 1)]
        self.plain = Following(Session.open(self.model), self.text, self.far)
        self.plain.next_row()

    def of(self, setting: str) -> list[str]:
        """Tokens a second, and the time of a token over a plain one's."""
        with Session.open(self.model, setting.split("+")) as session:
            with closing(Following(session, self.text[: self.far + self.n + 1], self.far)) as other:
                other.next_row()
                for _ in range(self.n):
                    self.plain.next_row(), other.next_row()
                ours, plain = (median(side.seconds[-self.n :]) for side in (other, self.plain))
        return [f"{1 / ours:.1f}", f"{ours / plain:.2f}"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*", help="plugins with options, joined by + (default: all lossy)")
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny-q8_0.gguf"))
    parser.add_argument(
        "--text", type=Path, required=True, help="a text of the kind that the model was trained on"
    )
    parser.add_argument("--characters", type=int, default=60000, help="how much of it is read")
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--n", type=int, default=32, help="tokens compared in each stretch")
    parser.add_argument("--stretches", type=int, default=4)
    parser.add_argument("--fast", help="a model whose speed is measured")
    parser.add_argument("--far", type=int, default=4096, help="tokens of its prompt")
    parser.add_argument("--n-fast", type=int, default=24, help="tokens of it that are timed")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
