"""Training a head: the target writes texts, the head learns from them for a few passes, and again.

Memory is bounded however long it runs: only the latest texts are kept, the target's features and distributions are
computed for each batch anew, and logits exist for a block of rows at a time.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from eagle_fast.head import DraftHead
from eagle_fast.head.config import HeadConfig
from eagle_fast.train.fresh import Measured, empty_head, head_config, measure, scaled_fc, start_from_target
from eagle_fast.train.learn import Learned, learn
from eagle_fast.train.optimizer import MasterAdamW, learning_rate
from eagle_fast.train.pool import Batch, collate, load_texts, plan, save_texts
from eagle_fast.train.progress import Budget, Log, amount
from eagle_fast.train.setting import Setting
from eagle_fast.train.teacher import Teacher
from eagle_fast.train.vocabulary import choose_tokens
from eagle_fast.train.writer import Text

MEASURED_TOKENS = 4096
END_SECONDS, END_SHARE = 60.0, 0.1  # of the minutes, at most: kept for writing and measuring the head at the end
LAST_WRITING = 0.85  # of training: what is left is not spent on new texts


class Place(NamedTuple):
    """Where training stands in its texts: how often they were written, passes over them, batches of this pass."""

    writing: int = 0
    passed: int = 0
    batch: int = 0


class Trainer:
    """One run in `folder`: the head goes there, what a resumed run needs into its folder `training`.

    initial: a head of the same target to begin with instead of a fresh one; it brings its draft vocabulary.
    """

    def __init__(self, setting: Setting, folder: str | Path, initial: DraftHead | None = None):
        self.setting, self.options = setting, setting.options
        self.folder, self.kept = Path(folder), Path(folder) / "training"
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"no folder {self.kept} can be made ({error.strerror}): choose another one") from error
        self.budget, self.log = Budget(self.options), Log(self.kept)
        self.budget.reserve = min(END_SECONDS, END_SHARE * 60 * self.options.minutes)
        self.initial = initial
        if initial is None:
            self._config(setting.target.vocab_size)  # what cannot be built is refused before texts are written
        self.place = Place()
        self.texts: list[Text] = []
        self.held_out: list[Text] = []
        self.head: DraftHead | None = None
        self.coverage = 1.0
        self.num_tokens = 0  # of answers, learned from
        self.saved = self.budget.seconds
        self._measured_last: tuple[int, tuple[list[float], list[float]]] | None = None  # after so many updates

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is spent, and save then; on an exception too, so that the run can be resumed."""
        try:
            if self.head is None:
                self._write()
                self._begin()
            while not self.budget.spent:
                if self.place.passed >= self.options.passes and self.budget.fraction < LAST_WRITING:
                    self._write()
                self._pass()
        finally:
            if self.head is not None:
                self.save()

    def _write(self) -> None:
        """Have the target write new texts in place of those there are."""
        options, clock = self.options, self.budget.clock
        started, told = clock(), 0.0
        limit = 60 * options.minutes * options.writing_share if not options.updates else float("inf")

        def enough(count: int) -> bool:
            nonlocal told
            passed = clock() - started
            if passed - told > options.log_seconds:
                told = passed
                share = f", {100 * min(1.0, passed / limit):.0f} % of its time" if limit < float("inf") else ""
                self.log.say(f"writing: {amount(count)} tokens of answers, {amount(count / passed)}/s{share}")
            late = passed > limit and (count > 0 or self.budget.spent)
            return count >= options.pool_tokens or late

        wanted = self.setting.writer.write(enough)
        passed = clock() - started
        if not self.held_out and len(wanted) < 2:
            raise ValueError(
                f"{len(wanted)} answers were finished in {passed:.0f} s, too few to learn from: give it more minutes, "
                f"or shorter texts (max_answer is {options.max_answer}, max_question {options.max_question})"
            )
        if not self.held_out:
            order = np.random.default_rng(options.seed).permutation(len(wanted))  # what is done first is short
            number = min(options.held_out, len(wanted) // 2)
            self.held_out, wanted = [wanted[i] for i in order[:number]], [wanted[i] for i in order[number:]]
            save_texts(self.kept / "held_out.npz", self.held_out)
        self.texts = wanted
        save_texts(self.kept / "texts.npz", self.texts)
        self.place = Place(self.place.writing + 1)
        if self.head is not None:
            self.save()  # where it stands in the old texts means nothing in the new ones
        count = sum(len(text.tokens) - text.start for text in wanted)
        self.log.record(
            "written", texts=len(wanted), tokens=count, seconds=passed, dropped=self.setting.writer.num_dropped
        )
        self.log.say(
            f"wrote {len(wanted)} texts with {amount(count)} tokens of answers in {passed:.0f} s "
            f"({amount(count / passed)}/s)"
        )

    def _begin(self) -> None:
        """The draft vocabulary from the first texts, and a head for it."""
        setting, model = self.setting, self.setting.model
        vocab_size = setting.target.vocab_size
        if self.initial is None:
            ids, self.coverage = choose_tokens(self.texts, vocab_size, self.options.draft_vocab, setting.special_ids)
            ids = None if ids is None else ids.to(setting.device)
            config = self._config(vocab_size if ids is None else len(ids))
            head = empty_head(model, config, ids, self.options.seed)
        else:
            head, ids = self.initial.requires_grad_(True), self.initial.token_ids
        measured = self._measured(head.config.feature_layers)
        if self.initial is None:
            start_from_target(head, model, measured)
        else:
            scaled_fc(head, 1 / measured.scale)
        self._set_up(head, measured.scale)
        count = sum(parameter.numel() for parameter in head.parameters())
        self.log.say(
            f"head of {count / 1e6:.1f}M parameters, draft vocabulary {head.config.draft_vocab_size} "
            f"({100 * self.coverage:.2f} % of the answers' tokens)"
        )

    def _config(self, draft_vocab: int) -> HeadConfig:
        """Of a fresh head."""
        options = self.options
        return head_config(
            self.setting.model, draft_vocab, options.intermediate, options.kv_heads, options.share_lm_head
        )

    def _measured(self, feature_layers: tuple[int, ...]) -> Measured:
        """Measure activations on whole texts, cut to one length."""
        width = int(np.median([len(text.tokens) for text in self.texts]))
        long_enough = [text.tokens[:width] for text in self.texts if len(text.tokens) >= width]
        tokens = np.stack(long_enough[: max(1, MEASURED_TOKENS // width)])
        return measure(self.setting.model, feature_layers, torch.from_numpy(tokens).long().to(self.setting.device))

    def _set_up(self, head: DraftHead, scale: torch.Tensor) -> None:
        self.head = head
        self.teacher = Teacher(self.setting.target, head.token_ids, scale)
        self.optimizer = MasterAdamW(list(head.parameters()))
        self.tables = head.rope_table(self.options.batch_tokens + self.options.steps)

    def _pass(self) -> None:
        """The rest of this pass over the texts."""
        options, clock = self.options, self.budget.clock
        seed = [options.seed, self.place.writing, self.place.passed]
        batches = plan(self.texts, options.batch_tokens, np.random.default_rng(seed))
        since, tokens, last = clock(), 0, len(batches)
        for number in range(self.place.batch, last):
            figures, count, rate = self._update(batches[number])
            self.place = self.place._replace(batch=number + 1)
            tokens += count
            if clock() - since >= options.log_seconds or self.budget.spent:
                losses, agreement = figures.tolist()
                self.log.update(self.budget, rate, losses, agreement, tokens / (clock() - since))
                since, tokens = clock(), 0
            if self.budget.seconds - self.saved > 60 * options.save_minutes:
                self.save()
            if self.budget.spent:
                break
        if self.place.batch == last:
            self.place = Place(self.place.writing, self.place.passed + 1)
        self.log.held_out(self.budget, *self.measure_held_out())

    def _update(self, indices: list[int]) -> tuple[torch.Tensor, int, float]:
        """One step of the optimizer: ([losses, agreement] [2, J] on the device, tokens learned from, learning rate)."""
        options = self.options
        batch = collate([self.texts[index] for index in indices], options.steps, self.setting.device, self._whole)
        learned = self._learn(batch)
        learned.loss.backward()
        rate = learning_rate(options.learning_rate, self.budget.updates, self.budget.fraction)
        self.optimizer.step(rate)
        self.budget.updates += 1
        self.num_tokens += len(batch.asked)
        return torch.stack([learned.losses, learned.agreement]), len(batch.asked), rate

    def _learn(self, batch: Batch) -> Learned:
        assert self.head is not None
        options = self.options
        return learn(self.head, self.teacher.teach(batch, options.steps), options.steps, options.decay, self.tables)

    @property
    def _whole(self) -> bool:
        """Without turns there are no answers: every token is learned from."""
        return self.setting.chat.suffix is None

    @torch.no_grad()
    def measure_held_out(self) -> tuple[list[float], list[float]]:
        """Losses and agreement of each step on the texts held out, over all their tokens; measured once a state."""
        if self._measured_last is not None and self._measured_last[0] == self.budget.updates:
            return self._measured_last[1]
        options, total, count = self.options, torch.zeros(2, self.options.steps), 0
        for indices in plan(self.held_out, options.batch_tokens, np.random.default_rng(0)):
            batch = collate([self.held_out[i] for i in indices], options.steps, self.setting.device, self._whole)
            learned = self._learn(batch)
            total += len(batch.asked) * torch.stack([learned.losses, learned.agreement]).cpu()
            count += len(batch.asked)
        losses, agreement = (total / count).tolist()
        self._measured_last = self.budget.updates, (losses, agreement)
        return losses, agreement

    # -- what is kept ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what `resume` needs, complete or not at all."""
        assert self.head is not None
        state = {
            "config": asdict(self.head.config),
            "token_ids": self.head.token_ids,
            "scale": self.teacher.scale,
            "optimizer": self.optimizer.state_dict(),
            "place": tuple(self.place),
            "updates": self.budget.updates,
            "seconds": self.budget.seconds,
            "coverage": self.coverage,
            "num_tokens": self.num_tokens,
            "schedule": (self.options.steps, self.options.batch_tokens, self.options.passes, self.options.seed),
        }
        temporary = self.kept / ".state.pt"
        torch.save(state, temporary)
        temporary.replace(self.kept / "state.pt")
        self.saved = self.budget.seconds

    @property
    def resumable(self) -> bool:
        return (self.kept / "state.pt").is_file()

    def resume(self) -> None:
        """Go on where `save` was called last. Texts that were being written then are lost."""
        device = self.setting.device
        state = torch.load(self.kept / "state.pt", map_location=device, weights_only=True)
        now = (self.options.steps, self.options.batch_tokens, self.options.passes, self.options.seed)
        if tuple(state["schedule"]) != now:
            raise ValueError(
                f"{self.kept}: begun with (steps, batch_tokens, passes, seed) = {tuple(state['schedule'])}, not {now}; "
                "resume with the same, or begin anew in another folder with this head as the initial one"
            )
        self.texts, self.held_out = load_texts(self.kept / "texts.npz"), load_texts(self.kept / "held_out.npz")
        head = empty_head(self.setting.model, HeadConfig(**state["config"]), state["token_ids"])
        self._set_up(head, state["scale"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.place = Place(*state["place"])
        self.budget.updates, self.budget.earlier = state["updates"], state["seconds"]
        self.coverage, self.num_tokens = state["coverage"], state["num_tokens"]
        self.saved = self.budget.seconds
        self.setting.earlier_writings = self.place.writing

    def export(self) -> None:
        """Write the head in bf16 for use, from the fp32 weights, with the features' scale taken into `fc`."""
        assert self.head is not None
        head = copy.deepcopy(self.head, {id(self.head.embedding): self.head.embedding})
        for parameter, master in zip(head.parameters(), self.optimizer.masters, strict=True):
            parameter.data = master.detach().clone()
        scaled_fc(head, self.teacher.scale)
        for parameter in head.parameters():
            parameter.data = parameter.data.bfloat16()
        head.export(self.folder)
