"""Training EAGLE-3 heads: `train(model, tokenizer, folder)`, on the command line `eagle-fast train`.

The rule: the target is the only source. It writes the texts, and its features and distributions are computed when they
are needed and never stored.

In reading order:

run, command      from a target to a head that is written, measured and described; the same as a subcommand
options, setting  what a user can set; the target and the sizes that fit the machine
trainer           the target writes texts, the head learns from them for a few passes, and again
writer, completer, chat, openings   the texts: questions and answers that the target writes, many at a time
pool, teacher     the texts of the moment in batches; what the target says about them
learn, rollout, loss, optimizer     one lesson: the head run as drafting runs it, its loss, the update
fresh, vocabulary a head to begin with, and the tokens that it can propose
evaluate, card, progress            how it does in decoding, its card, the lines that are printed
"""

from typing import TYPE_CHECKING

from eagle_fast.lazy import names_on_demand as _names_on_demand
from eagle_fast.train.options import TrainOptions

if TYPE_CHECKING:
    from eagle_fast.train.run import Result, train
else:  # when they are asked for: the command's help needs the options alone
    __getattr__ = _names_on_demand(__name__, dict.fromkeys(("Result", "train"), "eagle_fast.train.run"))

__all__ = ["Result", "TrainOptions", "train"]
