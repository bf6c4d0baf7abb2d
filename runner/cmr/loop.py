"""The token loop: pick, draft, forward, verify, accept; what is not cached yet is fed, nothing else."""

from __future__ import annotations

from operator import index
from time import perf_counter
from typing import Any

import numpy as np

from cmr.errors import PluginError
from cmr.plan import Plan
from cmr.sequence import Part, Sequence, Step
from cmr.stats import Figures


class Loop:
    """Advances sequences of at most `context` tokens through a model under a plan, without pluggy."""

    def __init__(self, model: Any, plan: Plan, context: int) -> None:
        self.model, self.plan, self.scheduler, self.context = model, plan, plan.scheduler, context
        own = plan.owners["scheduler"] == ("built in",)  # which neither fails nor needs to be checked
        self._pick = plan.scheduler.pick if own else self._picked
        self._drafts = plan.drafter is not None
        self._numbers = np.arange(context, dtype=np.int32)  # of which positions are stretches
        self._numbers.flags.writeable = False
        self.running: dict[Sequence, None] = {}
        self.figures = Figures()
        self.stepping = False

    def add(self, seq: Sequence) -> None:
        """Hand a sequence to the scheduler."""
        seq.times["added"] = perf_counter()
        self.running[seq] = None
        with self.plan.blame:
            self.scheduler.add(seq)

    def cancel(self, seq: Sequence) -> None:
        """End a sequence now, or after the step that is under way."""
        seq.stop = seq.stop or "cancelled"
        if seq in self.running and not self.stepping:
            self.finish(seq)

    def step(self) -> None:
        """Run one step; a failure ends the sequences it concerns and is kept as their `error`."""
        began = perf_counter()
        parts = []
        picked = self._pick()
        for seq, limit in picked:
            if seq.beside is not None and self._awaits(seq.beside, picked):
                continue
            try:
                parts.append(self._part(seq, limit))
            except Exception as error:
                self._end([seq], error)
        if not parts:
            return
        step = Step(parts)
        self.stepping = True
        try:
            forward = perf_counter()
            logits = iter(self.model.forward(self.plan, step))
            step.seconds = perf_counter() - forward
            for part in step.parts:
                self._accept(part, next(logits))
            for hook in self.plan.on_step:
                hook(step)
        except BaseException as error:  # Ctrl-C leaves every sequence as it was before or after
            for part in parts:
                self._trim(part.seq, part.seq.cached)
            if not isinstance(error, Exception):
                raise
            self._fail(parts, error)
        finally:
            self.stepping = False
        self.figures.count(step, perf_counter() - began)
        for part in parts:
            if part.seq.stop is not None and part.seq in self.running:
                self.finish(part.seq)

    def _fail(self, parts: list[Part], error: Exception) -> None:
        """Mark the sequences of these parts as failed; the first failure counts."""
        named = self.plan.blame.named(error)
        for part in parts:
            part.seq.error, part.seq.stop = part.seq.error or named, "error"

    def _end(self, seqs: list[Sequence], error: Exception) -> None:
        """End sequences that failed before the step."""
        named = self.plan.blame.named(error)
        for seq in seqs:
            seq.error, seq.stop = named, "error"
            self.finish(seq)

    # -- before the forward pass --

    def _picked(self) -> list[tuple[Sequence, int]]:
        """Ask the scheduler; if it fails or picks nothing that can run, all sequences end with its error."""
        try:
            picked = self.scheduler.pick()
            if not _sound(picked, self.running):
                owner = self.plan.owners["scheduler"][0]
                raise PluginError(
                    f"{owner}: pick returned {picked!r:.200} with {len(self.running)} sequences under way; "
                    "it returns pairs (seq, most rows to feed), each sequence once, one at least"
                )
            return picked
        except Exception as error:
            self._end(list(self.running), error)
            return []

    def _awaits(self, beside: Sequence, picked: list[tuple[Sequence, int]]) -> bool:
        """Whether a sequence lets this step pass, since the one whose prompt it is to copy is reading it there."""
        reading = beside.cached < beside.borders[0]
        return self.plan.copies and reading and any(seq is beside for seq, _ in picked)

    def _part(self, seq: Sequence, limit: int) -> Part:
        """What to feed: tokens of one role that are not cached yet, and a draft behind the last of them."""
        if not seq.started:  # as late as possible, so that what ended meanwhile can be used again
            self._start(seq)
        start = seq.cached
        prompt, end = seq.role(start)
        if end > start + limit:
            end = start + limit
        tokens, draft = seq.tokens[start:end], []
        want = 1 if end == len(seq.tokens) < seq.limit else 0
        if want and not prompt and self._drafts:
            draft = self._draft(seq, min(limit - len(tokens), seq.limit - end - 1))
            tokens, want = tokens + draft, 1 + len(draft)
        stop = start + len(tokens)
        # Where a plugin lets the context go on, positions do too.
        pos = self._numbers[start:stop] if stop <= self.context else np.arange(start, stop, dtype=np.int32)
        return Part(seq, np.array(tokens, np.int32), pos, draft, prompt, want)

    def _draft(self, seq: Sequence, room: int) -> list[int]:
        if room <= 0:
            return []
        guess = self.plan.drafter.propose(seq)
        if type(guess) is list and not guess:
            return guess
        try:
            draft = [index(token) for token in guess][:room]
        except TypeError:
            draft = [-1]
        if draft and not 0 <= min(draft) <= max(draft) < self.model.n_vocab:
            owner = self.plan.owners["drafter"][0]
            raise PluginError(
                f"{owner}: propose returned {guess!r:.200}; "
                f"it returns token ids of 0 to {self.model.n_vocab - 1}"
            )
        return draft

    def _start(self, seq: Sequence) -> None:
        """Give a sequence its caches: an earlier one's, or new ones with what another or a plugin has of its prompt."""
        seq.started, beside, seq.beside = True, seq.beside, None
        if seq.request.after is not None:
            seq.take_over(seq.request.after)
        if not seq.caches:
            seq.caches = [make() for make in self.plan.caches]
        if beside is not None and self.plan.copies and not seq.cached:
            seq.copy(beside)
        if seq.cached:
            return
        for name, hook in zip(self.plan.names["restore_prefix"], self.plan.restore_prefix):
            count = hook(seq)
            if count is None:
                continue
            if not isinstance(count, int) or not 0 <= count < len(seq.tokens):
                raise PluginError(
                    f"{name} returned {count!r} from restore_prefix; "
                    f"it returns how many tokens the caches hold, {len(seq.tokens) - 1} at most, or None"
                )
            seq.cached = count
            return

    # -- after the forward pass --

    def _accept(self, part: Part, logits: np.ndarray) -> None:
        """Sample what follows; keep drafted tokens as long as they are the sampled ones."""
        seq, draft = part.seq, part.draft
        seq.cached += len(part.tokens)
        if not part.want:
            if seq.cached == len(seq.tokens):
                seq.stop = seq.stop or "length"
            return
        try:
            plain = None if seq.chances is None else logits.copy()  # hooks and the sampler edit in place
            for hook in self.plan.on_logits:
                hook(seq, draft, logits)
            row = 0
            while True:
                token = seq.sampler.sample(logits[row], seq.tokens, len(seq.tokens) - seq.n_prompt)
                part.accepted.append(token)
                if plain is not None:
                    seq.chances.add(plain[row], token, 0 if seq.text is None else seq.text.length)
                if self._take(seq, token) or row == len(draft) or token != draft[row]:
                    return
                row += 1
        except Exception as error:
            self._fail([part], error)
        finally:
            if seq.cached >= len(seq.tokens):
                self._trim(seq, len(seq.tokens) - 1)

    def _take(self, seq: Sequence, token: int) -> str | None:
        """Append one token; why it is the last, or None."""
        tokens, text, reason = seq.tokens, seq.text, None
        if len(tokens) == seq.n_prompt:
            seq.times["first"] = perf_counter()
            self.figures.time_to_first_token = seq.times["first"] - seq.times["added"]
        tokens.append(token)
        seq.out.append(token)
        if token in seq.stop_ids:
            reason = "eos"
        elif text is not None and text.push(token):
            reason = "stop"
        if self.plan.on_token:
            said = self._told(seq, token)
            reason = reason or said
        if reason is None and len(tokens) >= seq.limit:
            reason = "context" if seq.limit == self.context else "length"
        seq.stop = seq.stop or reason
        return seq.stop

    def _told(self, seq: Sequence, token: int) -> str | None:
        """Tell plugins of a token; the first reason to stop that one of them gives."""
        reason = None
        for place, hook in enumerate(self.plan.on_token):
            said = hook(seq, token)
            if said is not None and type(said) is not str:
                name = self.plan.names["on_token"][place]
                raise PluginError(
                    f"{name} returned {said!r:.200} from on_token; it returns a reason (str) or None"
                )
            reason = reason or said
        return reason

    def _trim(self, seq: Sequence, pos: int) -> None:
        """Forget what is cached from pos on; caches that cannot, or fail to, are made anew and fed again."""
        try:
            seq.rollback(pos if all(cache.can_rollback_to(pos) for cache in seq.caches) else 0)
        except Exception:
            seq.caches, seq.cached = [make() for make in self.plan.caches], 0

    def finish(self, seq: Sequence) -> None:
        """Let a sequence go that has a reason to stop, and tell the plugins; a failure becomes its error."""
        scheduled = self.running.pop(seq, seq) is None
        seq.times["ended"] = perf_counter()
        held = [cache for one in (seq, *self.running) for cache in one.caches]
        self.figures.kv_bytes = max(self.figures.kv_bytes, sum(cache.nbytes for cache in held))
        if seq.text is not None:
            seq.text.finish()
        try:
            with self.plan.blame:
                if scheduled:
                    self.scheduler.remove(seq)
                self._tell(seq)
        except Exception as error:
            seq.error = seq.error or error
        if seq.error is not None:
            seq.caches, seq.cached = [], 0

    def _tell(self, seq: Sequence) -> None:
        if seq.error is None and seq.cached:
            for hook in self.plan.store_prefix:
                hook(seq)
        for hook in self.plan.finish_request:
            hook(seq.request, seq.new, seq.stop)


def _sound(picked: Any, running: dict[Sequence, None]) -> bool:
    """Whether a scheduler answered with (sequence under way, rows), each sequence once, one at least."""
    try:
        for seq, limit in picked:
            if seq not in running or limit < 1:
                return False
        return len(picked) == 1 or len({id(seq) for seq, _ in picked}) == len(picked) > 0
    except (TypeError, ValueError):
        return False
