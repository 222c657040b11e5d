"""Training EAGLE-3 heads: `train(model, tokenizer, folder)`, on the command line `eagle-fast train`."""

from eagle_fast.train.options import TrainOptions
from eagle_fast.train.run import Result, train

__all__ = ["Result", "TrainOptions", "train"]
