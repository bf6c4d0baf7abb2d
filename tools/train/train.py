"""The training loop: a run lives in a folder and goes on exactly from its last checkpoint."""

import csv
import math
import os
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tools.train.export import read_gguf
from tools.train.model import Llama, Shape
from tools.train.optim import optimizers


@dataclass
class Plan:
    """How long and how fast to train: after a warm-up the rate is constant, then falls over `decay` steps."""

    steps: int = 800
    decay: int = 200
    warmup: int = 60
    batch: int = 4096
    lr: float = 0.015
    weight_decay: float = 0.05
    exit_weight: float = 0.3
    ema: float = 0.99
    seed: int = 0
    save_every: int = 50
    stages: tuple = ((0.0, 256), (0.6, 512), (0.85, 1024))
    growth: tuple = ((0.0, 0.5), (0.4, 1.0))

    def rate(self, step):
        """Return the share of `lr` at `step`."""
        left = (self.steps - step) / max(1, self.decay)
        return min(1.0, (step + 1) / self.warmup, max(0.05, left))

    def length(self, step, context):
        """Return the row length at `step`: rows grow as training goes on."""
        return min(context, max(n for start, n in self.stages if step >= start * self.steps))

    def depth(self, step, layers):
        """Return how many layers train at `step`: the upper ones, which begin as identities, join later."""
        return math.ceil(layers * max(share for start, share in self.growth if step >= start * self.steps))


class Run:
    """A model in training with everything a checkpoint holds."""

    def __init__(self, folder, shape, plan, rows, device="cpu", teacher=None, bf16=False):
        torch.manual_seed(plan.seed)
        self.folder, self.plan, self.rows, self.device, self.step = Path(folder), plan, rows, device, 0
        self.shape, self.bf16 = shape, bf16 or device.startswith("cuda")
        self.model = Llama(shape).to(device)
        self.teacher = read_gguf(teacher)[0].to(device).eval() if teacher else None
        if teacher:
            self.model.begin_like(self.teacher)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizers = optimizers(self.model, plan.lr, plan.weight_decay)
        self.exit_loss = exit_loss
        self.folder.mkdir(parents=True, exist_ok=True)

    def compile(self):
        """Let torch.compile fuse the blocks and the loss: about 1.6 times as fast on a CPU."""
        for block in self.model.blk:
            block.compile(dynamic=False)
        self.exit_loss = torch.compile(exit_loss, dynamic=False)

    def start_from(self, paths):
        """Begin with the mean of the weights of GGUFs with this run's vocabulary; all layers train from here on."""
        sentencepiece = self.rows.vocabulary.model
        wanted = [sentencepiece.id_to_piece(i) for i in range(len(self.rows.vocabulary))]
        states = []
        for path in paths:
            model, pieces = read_gguf(path)
            if pieces != wanted:
                raise SystemExit(f"{path} has another vocabulary than this run")
            states.append(model.state_dict())
        self.model.load_state_dict({k: sum(state[k] for state in states) / len(states) for k in states[0]})
        self.plan = replace(self.plan, growth=((0.0, 1.0),))
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}

    def train_step(self):
        """Do one step and return its loss."""
        plan, length = self.plan, self.plan.length(self.step, self.shape.context)
        tokens, weights = self.rows.batch(max(1, plan.batch // length), length)
        tokens, weights = torch.from_numpy(tokens).to(self.device), torch.from_numpy(weights).to(self.device)
        with self._precision():
            loss, shown = self._loss(tokens, weights, random.Random(plan.seed * 1_000_003 + self.step))
        loss.backward()
        self._update()
        self.step += 1
        return shown.item()

    def _loss(self, tokens, weights, rng):
        """Return the loss to descend, one early exit in turn among it, and that of the last layer."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        depth = self.plan.depth(self.step, self.shape.layers)
        exits = [e for e in self.shape.exits if e < depth]
        early = exits[self.step % len(exits)] if exits else None
        skip = self.model.skips(rng) | set(range(depth, self.shape.layers))
        hidden = self.model.hidden(inputs, (early,), skip)
        head = (self.model.output_norm, self.model.token_embd, self.shape.eps)
        last = self.exit_loss(hidden[self.shape.layers], *head, targets, weights)
        loss = last
        if early:
            half = slice(0, max(1, len(tokens) // 2))
            extra = self.exit_loss(hidden[early][half], *head, targets[half], weights[half])
            loss = loss + self.plan.exit_weight * extra
        if self.teacher:
            loss = 0.3 * loss + self._distance(inputs, hidden[self.shape.layers])
        return loss, last.detach()

    def _distance(self, inputs, hidden):
        """Return the KL divergence of the student's next-token distribution from the teacher's."""
        with torch.no_grad():
            goal = F.softmax(self.teacher(inputs).float(), -1).flatten(0, 1)
        found = F.log_softmax(self.model.head(hidden).float(), -1).flatten(0, 1)
        return F.kl_div(found, goal, reduction="batchmean")

    def _precision(self):
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16) if self.bf16 else nullcontext()

    def _update(self):
        rate = self.plan.rate(self.step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, factor in zip(self.optimizers, (1.0, 0.15), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr * factor * rate
            optimizer.step()
            optimizer.zero_grad()
        keep = min(self.plan.ema, self.step / (self.step + 10))
        now = self.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [now[k] for k in self.average], 1 - keep)

    def save(self):
        """Write the checkpoint; a crash while writing leaves the old one."""
        state = {
            "step": self.step,
            "shape": self.shape.as_dict(),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rows": self.rows.state(),
        }
        torch.save(state, self.folder / "next.pt")
        os.replace(self.folder / "next.pt", self.folder / "checkpoint.pt")

    def resume(self):
        """Go on from the folder's checkpoint; return whether there was one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=False)
        if Shape(**state["shape"]) != self.shape:
            raise SystemExit(f"{path} holds a model of other sizes: {state['shape']}")
        self.step, self.average = state["step"], state["average"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rows.restore(state["rows"])
        return True


def exit_loss(hidden, norm, embedding, eps, targets, weights):
    """Return the weighted mean cross-entropy of hidden [rows, length, width] through the shared head."""
    logits = F.linear(F.rms_norm(hidden, hidden.shape[-1:], norm, eps), embedding).flatten(0, 1).float()
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)


def train(run, validate, log_every=20):
    """Train to the end of the plan; write checkpoints, and a line of log.csv every `log_every` steps."""
    began, first, recent = time.time(), run.step, []
    with open(run.folder / "log.csv", "a", newline="") as file:
        log = csv.writer(file)
        if not file.tell():
            log.writerow(["step", "tokens", "seconds", "train_loss", "held_out_loss"])
        while run.step < run.plan.steps:
            recent.append(run.train_step())
            if run.step % run.plan.save_every == 0 or run.step == run.plan.steps:
                run.save()
            if run.step % log_every == 0 or run.step == run.plan.steps:
                held_out = validate(run) if run.step % 100 == 0 or run.step == run.plan.steps else math.nan
                seconds = time.time() - began
                loss = sum(recent) / len(recent)
                row = [run.step, run.step * run.plan.batch, round(seconds), loss, held_out]
                log.writerow([f"{x:.4f}" if isinstance(x, float) else x for x in row])
                file.flush()
                _say(run, row, (run.step - first) / seconds)
                recent = []


def _say(run, row, speed):
    left = (run.plan.steps - run.step) / speed / 60
    held_out = "" if math.isnan(row[4]) else f", held out {row[4]:.3f}"
    line = f"step {run.step}/{run.plan.steps}: loss {row[3]:.3f}{held_out}, "
    line += f"{speed * run.plan.batch:.0f} tok/s, {left:.0f} min left"
    print(line, file=sys.stderr, flush=True)
