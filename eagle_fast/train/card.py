"""The card that goes with a head: what it is for, how it was trained, how it does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from eagle_fast.head.config import HeadConfig
from eagle_fast.train.options import TrainOptions
from eagle_fast.train.progress import amount

TEMPLATE = """# EAGLE-3 draft head for {target}

For speculative decoding of {target}; the text stays the target's own.

    from eagle_fast import EaModel
    model = EaModel.from_pretrained(base_model_path="{target}", ea_model_path="{folder}")

{parameters:.1f} M parameters in bf16, SafeAILab/SpecForge format. One decoder layer (hidden size {hidden}, MLP
{intermediate}, {heads} query and {kv_heads} key heads), draft vocabulary of {draft_vocab} of the target's {vocab}
tokens, which cover {coverage:.2f} % of its answers. It reads the inputs of the target's layers {layers}.

## Training

`eagle-fast train` of eagle_fast. All answers are the target's own ({greedy:.0f} % greedy, the others at temperature 1);
the questions are {questions}. {updates} updates over {tokens} answer tokens (repeated passes counted) in
{minutes:.0f} minutes, writing the texts included. Training-time test of {steps} steps with weights {decay}^j,
cross-entropy to the target's distribution over the draft vocabulary, AdamW with peak learning rate {rate:g}, cosine.

## Figures

On texts held out, given the right tokens so far, the head's most likely token is the target's:

| drafted token | {columns} |
| --- |{rule}
| agreement | {agreement} |

{decoding}
"""
DECODING = """Decoding held-out prompts with a tree of 60 nodes, depth 7 and top-k 10, tokens per round (tau, with the
one of the target): {taus}. By depth, the share of its tokens that are accepted where all before them
were: {acceptance}. `acceptance` in config.json has it by depth and rank; eagle_fast chooses the first trees by it.
"""


class Training(NamedTuple):
    """What the card says of a run."""

    target: str
    config: HeadConfig
    options: TrainOptions
    num_parameters: int
    coverage: float
    num_prompts: int
    updates: int
    num_tokens: int
    seconds: float
    agreement: list[float]
    taus: dict[float, float]
    acceptance: dict[float, list[float]]  # by temperature and depth


def write_card(folder: Path, training: Training) -> None:
    """Write README.md beside the head."""
    config, options = training.config, training.options
    own = "the target's own, written from its chat template"
    given = f"from a file of {training.num_prompts} prompts"
    if training.num_prompts and options.prompt_share < 1:
        given += f" ({100 * options.prompt_share:.0f} %) and {own}"
    taus = ", ".join(f"{tau:.2f} at temperature {temperature:g}" for temperature, tau in training.taus.items())
    acceptance = "; ".join(
        f"{', '.join(f'{share:.2f}' for share in shares)} at temperature {temperature:g}"
        for temperature, shares in training.acceptance.items()
    )
    text = TEMPLATE.format(
        target=training.target,
        folder=folder.name,
        parameters=training.num_parameters / 1e6,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        draft_vocab=config.draft_vocab_size,
        vocab=config.vocab_size,
        coverage=100 * training.coverage,
        layers=", ".join(str(layer) for layer in config.feature_layers),
        greedy=100 * options.greedy_share,
        questions=given if training.num_prompts else own,
        updates=training.updates,
        tokens=amount(training.num_tokens),
        minutes=training.seconds / 60,
        steps=options.steps,
        decay=options.decay,
        rate=options.learning_rate,
        columns=" | ".join(str(step + 1) for step in range(len(training.agreement))),
        rule=" --- |" * len(training.agreement),
        agreement=" | ".join(f"{share:.3f}" for share in training.agreement),
        decoding=DECODING.format(taus=taus, acceptance=acceptance) if taus else "",
    )
    (folder / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")
