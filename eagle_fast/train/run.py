"""One call from a target to a head that is written, measured and described."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from eagle_fast.head import DraftHead
from eagle_fast.head.checkpoint import note_acceptance
from eagle_fast.loading import load_head
from eagle_fast.train.card import Training, write_card
from eagle_fast.train.evaluate import acceptance_table, measure_decoding
from eagle_fast.train.options import TrainOptions
from eagle_fast.train.progress import duration
from eagle_fast.train.setting import Setting
from eagle_fast.train.trainer import Trainer

WORTH = 1.5  # tokens per round; with fewer, rounds cost about what they bring
TAU_PROMPTS = {"cuda": (32, 128), "cpu": (4, 32)}  # held-out prompts, new tokens


class Result(NamedTuple):
    folder: Path
    agreement: list[float]  # with the target's most likely token, on held-out texts, for each step
    taus: dict[float, float]  # temperature -> tokens per round, on held-out prompts
    finished: bool  # False where the run was paused


def train(
    model: PreTrainedModel,
    tokenizer,
    folder: str | Path,
    options: TrainOptions | None = None,
    *,
    prompts: Sequence[Any] = (),
    initial: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Train an EAGLE-3 head for `model` and write it to `folder`, in SafeAILab's format with a card.

    prompts: users' texts or lists of messages; without any the target writes questions from its own chat template.
    initial: a head of this target to begin with. resume: go on with the run that `folder` holds, if it holds one.
    Raises ValueError for what does not fit together, UnsupportedModel for a target that cannot be decoded exactly.
    """
    options = (options or TrainOptions()).for_device(model.device)
    setting = Setting(model, tokenizer, options, prompts)
    trainer = Trainer(setting, folder, None if initial is None else load_initial(initial, model))
    if setting.num_too_long:
        trainer.log.say(f"{setting.num_too_long} prompts are too long to be answered, and left out")
    if trainer.resumable:
        if not resume:
            raise ValueError(f"{folder} holds a run that was begun: resume it, or choose another folder")
        trainer.resume()
        trainer.log.say(f"resumed after {trainer.budget.updates} updates")
    trainer.run()
    if not trainer.budget.updates:
        raise ValueError(
            f"no update was made in {trainer.budget.seconds:.0f} s, all of which went into writing texts and making a "
            f"head ready, so there is nothing to use: give it more minutes (it had {options.minutes:g}), a GPU or a "
            "smaller model, and another folder or --resume"
        )
    return finish(trainer)


def load_initial(path: str | Path, model: PreTrainedModel) -> DraftHead:
    """A head to go on with. Raises ValueError for one that the rollout and the loss have no form for."""
    head = load_head(str(path), model, use_eagle3=True)
    lacks = {
        "sliding windows": any(head.config.sliding_windows),
        "an lm_head with a bias": head.config.lm_head_bias,
        "no fc": not head.config.has_fc,
    }
    found = [what for what, there in lacks.items() if there]
    if found:
        raise ValueError(f"--initial {path}: a head with {', '.join(found)} cannot be trained; begin with a fresh one")
    return head


def finish(trainer: Trainer) -> Result:
    """Write the head, measure it on what was held out, describe it."""
    setting, head, budget = trainer.setting, trainer.head, trainer.budget
    assert head is not None
    finished, seconds = budget.fraction >= 1, budget.seconds
    trainer.export()
    _, agreement = trainer.measure_held_out()
    number, length = TAU_PROMPTS[setting.device.type]
    asked = [text.tokens[: text.start].tolist() for text in trainer.held_out[:number]]
    measured = measure_decoding(
        setting.model, trainer.folder, asked, max_new_tokens=length, seconds=budget.left_for_the_end
    )
    taus = {temperature: done.tau for temperature, done in measured.items()}
    note_acceptance(trainer.folder, {t: acceptance_table(done.drafts) for t, done in measured.items()})
    trainer.log.record("finished" if finished else "paused", agreement=agreement, taus=list(taus.values()))
    trainer.log.say(
        f"wrote {trainer.folder} after {duration(budget.seconds)}: "
        + ", ".join(
            f"{done.tau:.2f} tokens per round at T={t:g} ({done.rounds} rounds)" for t, done in measured.items()
        )
    )
    if finished and max(taus.values()) < WORTH:
        trainer.log.say("few of its drafts are right: --resume with more --minutes (or --updates) goes on from here")
    name = getattr(setting.model, "name_or_path", "") or type(setting.model).__name__
    write_card(
        trainer.folder,
        Training(
            target=Path(name).name if Path(name).is_dir() else name,
            config=head.config,
            options=trainer.options,
            num_parameters=sum(parameter.numel() for parameter in head.parameters()),
            coverage=trainer.coverage,
            num_prompts=len(setting.prompts),
            updates=budget.updates,
            num_tokens=trainer.num_tokens,
            seconds=seconds,
            agreement=agreement,
            taus=taus,
            acceptance={temperature: done.acceptance for temperature, done in measured.items()},
        ),
    )
    return Result(trainer.folder, agreement, taus, finished)
