"""A target over ranks, each with a part of every layer: what `Target` is to a model on one device or over layer shards.

B sequences, T tree nodes, C tokens of a prompt chunk, R rows, H hidden size, F feature width, V vocabulary, n ranks.

The residual stream is the same on all ranks. Each computes its heads and its part of the MLP; the sum over ranks is in
the launch that adds the residual and computes the next norm (`layers/links.py`). One thread runs the ranks in turn,
from one such sum to the next. Rank 0 has the logits, and the draft head and its tree where no rank has a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from eagle_fast_kernels.rms_norm import rms_norm
from torch import Tensor
from transformers import PreTrainedModel

from eagle_fast.layers.attention import PrefillStep, Step, TreeStep
from eagle_fast.layers.linear import RowOrder
from eagle_fast.layers.links import Links
from eagle_fast.layers.peer_links import PeerLinks
from eagle_fast.layers.transfers import Transfers, distinct
from eagle_fast.target.anatomy import Anatomy, UnsupportedModel
from eagle_fast.target.exactness import UNMEASURED, Exactness
from eagle_fast.target.features import FINAL
from eagle_fast.target.interface import AttentionContext, LayerBinding
from eagle_fast.target.rank_cache import RankedCache, RankedSlab
from eagle_fast.target.ranks import Rank
from eagle_fast.target.sound import check_shapes
from eagle_fast.target.target import Verified
from eagle_fast.target.turns import Turns
from eagle_fast.target.twin import hooks_of
from eagle_fast.target.watch import Portrait, noted, portrait

CHANGED = (
    "base_model was changed ({what}), and its weights are cut over {ranks} ranks (tensor_parallel), which cannot "
    "follow: undo it, or load the model without tensor_parallel"
)


def links_between(devices: Sequence[torch.device], hidden_size: int) -> Links:
    """The ways between ranks: GPUs reach each other's memory, and on a CPU one thread adds up."""
    if devices[0].type == "cuda" and len(devices) > 1:
        return PeerLinks(devices, hidden_size)
    return Links(devices)


class RankedTarget:
    """A model over ranks, prepared for tree decoding; see `Target`, whose attributes and methods it has.

    model: the skeleton that the ranks' weights belong to. order: that of all their products.
    """

    rope_switch = max_positions = None
    offloaded = False

    def __init__(
        self, model: PreTrainedModel, ranks: Sequence[Rank], order: RowOrder, feature_layers: tuple[int, ...] = ()
    ):
        self.stock, self.ranks, self.row_order = model, list(ranks), order
        self.anatomy = Anatomy(model)
        self.device = self.input_device = self.draft_device = ranks[0].device
        self.links = links_between([rank.device for rank in ranks], self.anatomy.hidden_size)
        self.devices = distinct(rank.device for rank in ranks)
        self.shapes = [[layer.shape for layer in rank.layers] for rank in ranks]
        self.layer_shapes = [shape for shapes in self.shapes for shape in shapes]
        check_shapes(self.layer_shapes)
        self.bindings = [LayerBinding(AttentionContext(), layer.window) for rank in ranks for layer in rank.layers]
        self.vocab_size, self.dtype = ranks[-1].share.vocabulary.stop, ranks[0].dtype
        self.transfers, self.turn = Transfers(), Turns(self.devices)
        self.boundaries = feature_layers or (FINAL,)
        wrong = [each for each in feature_layers if not 0 <= each <= self.anatomy.num_layers]
        if wrong:
            raise ValueError(f"feature layer {wrong[0]}: the target has boundaries 0 to {self.anatomy.num_layers}")
        self.exactness: Exactness = UNMEASURED
        self._portrait = portrait(model)

    # -- each call -------------------------------------------------------------------------------------------------

    def is_current(self) -> bool:
        """True; UnsupportedModel, which names the change, where the skeleton is not what it was: ranks do not follow.

        What its generation config and its config say of tokens is read for each call, and may change.
        """
        what = self._change(portrait(self.stock))
        if what is not None:
            raise UnsupportedModel(CHANGED.format(what=what, ranks=len(self.ranks)))
        return True

    def _change(self, now: Portrait) -> str | None:
        before, named = self._portrait, list(self.stock.named_modules())
        if now.parts != before.parts:
            for what, module in named:
                if hooks_of(module) or "forward" in vars(module):
                    return f"{'a hook on' if hooks_of(module) else 'a forward put on'} {what or 'the model'}"
            return "its modules, tensors or code"
        inside = {id(module) for what, module in named if what}
        changed = {name for key, name in noted(before, now) if key in inside}
        for old, new in zip(before.configs, now.configs, strict=True):
            pairs = dict(old), dict(new)
            changed |= {key for key in pairs[0].keys() | pairs[1].keys() if pairs[0].get(key) != pairs[1].get(key)}
        left = sorted(name for name in changed if not name.endswith(("token_id", "token_ids")))
        return f"{left[0]} of a module or config" if left else None

    def leave_out_notes(self) -> None:
        """See `Target`, here and below."""

    def edits(self) -> int:
        return 0

    def new_cache(self, batch: int, capacity: int) -> RankedCache:
        return RankedCache(RankedSlab.empty(self.shapes, batch, capacity, self.links))

    def choose_frequencies(self, cache: RankedCache, lengths: Tensor) -> None:
        pass

    def check(self) -> None:
        """After a round was read: OutOfStepError where a rank waited for another in vain."""
        self.links.check()

    @torch.no_grad()
    def prefill(self, tokens: Tensor, start: int, cache: RankedCache) -> Tensor:
        """Run tokens [B, C] at positions start.. into the cache; returns features [B, C, F]."""
        return self._prefill(tokens, start, cache, 1)[0]

    @torch.no_grad()
    def prefill_everywhere(self, tokens: Tensor, start: int, cache: RankedCache) -> list[Tensor]:
        """`prefill`; the features are every rank's own."""
        return self._prefill(tokens, start, cache, len(self.ranks))

    def _prefill(self, tokens: Tensor, start: int, cache: RankedCache, keeping: int) -> list[Tensor]:
        batch, count = tokens.shape
        sent = [each for (each,) in self.links.send("prompt", tokens)]
        steps = [PrefillStep(start, count) for _ in self.ranks]
        positions = [torch.arange(start, start + count, device=rank.device).expand(batch, count) for rank in self.ranks]
        self.row_order.kept = False
        with self.links.forward():
            features = self._run(sent, positions, steps, cache, keeping)[1]
        return [each.view(batch, count, -1) for each in features]

    @torch.no_grad()
    def verify(self, tokens: Tensor, step: TreeStep, cache: RankedCache) -> Verified:
        """Run tree nodes [B, T], which write their K and V after the prefix. Until the next verify, the logits stay."""
        sent = self.links.send("tree", tokens, step.lengths, step.ancestors, step.depths)
        steps = [TreeStep(lengths, ancestors, depths, step.first) for _, lengths, ancestors, depths in sent]
        logits, (features,) = self._verify([each[0] for each in sent], steps, cache, 1)
        return Verified(logits, features)

    @torch.no_grad()
    def verify_everywhere(
        self, tokens: Sequence[Tensor], steps: Sequence[TreeStep], cache: RankedCache
    ) -> tuple[Tensor, list[Tensor]]:
        """`verify` of what every rank has; the features are every rank's own."""
        return self._verify(tokens, steps, cache, len(self.ranks))

    def _verify(
        self, tokens: Sequence[Tensor], steps: Sequence[TreeStep], cache: RankedCache, keeping: int
    ) -> tuple[Tensor, list[Tensor]]:
        positions = [each.positions(each.lengths.device) for each in steps]
        self.row_order.kept = True
        try:
            with self.links.forward():
                normed, features = self._run(tokens, positions, steps, cache, keeping)
                logits = self.links.gather(
                    "logits", [rank.lm_head(rows) for rank, rows in zip(self.ranks, normed, strict=True)]
                )
        finally:
            self.row_order.kept = False
        shape = tokens[0].shape
        return logits.view(*shape, -1), [each.view(*shape, -1) for each in features]

    def read(self, tokens: Tensor) -> Verified:
        raise UnsupportedModel("training reads a target on one GPU or over layer shards: leave tensor_parallel out")

    # -- behind them -----------------------------------------------------------------------------------------------

    def _run(
        self, tokens: Sequence[Tensor], positions: Sequence[Tensor], steps: Sequence[Step], cache: RankedCache,
        keeping: int = 1,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """(rows [R, H] after the final norm on every rank, features [R, F] on the first so many) of tokens [B, T]."""
        ranks, slabs = self.ranks, cache.ranked.parts
        rows = [rank.embed(each) for rank, each in zip(ranks, tokens, strict=True)]
        rotations = [rank.rotation(*each) for rank, *each in zip(ranks, rows, positions, strict=True)]
        taken = {0: rows[:keeping]}
        first = [rank.layers[0].input_norm for rank in ranks]
        normed = [rms_norm(each, *norm) for each, norm in zip(rows, first, strict=True)]
        for index in range(self.anatomy.num_layers):
            layers = [rank.layers[index] for rank in ranks]
            products = [
                layer.attend(*each) for layer, *each in zip(layers, normed, rotations, steps, slabs, strict=True)
            ]
            normed, rows = self._sum(products, rows, [layer.post_norm for layer in layers])
            products = [layer.mlp(each) for layer, each in zip(layers, normed, strict=True)]
            last = index + 1 == self.anatomy.num_layers
            following = [rank.norm if last else rank.layers[index + 1].input_norm for rank in ranks]
            normed, rows = self._sum(products, rows, following)
            if index + 1 in self.boundaries:
                taken[index + 1] = rows[:keeping]
        taken[FINAL] = normed[:keeping]
        features = zip(*(taken[boundary] for boundary in self.boundaries), strict=True)
        return normed, [torch.cat(each, -1) if len(each) > 1 else each[0] for each in features]

    def _sum(self, products: list[Tensor], rows: list[Tensor], norms: list) -> tuple[list[Tensor], list[Tensor]]:
        return self.links.add_rms_norm(products, rows, [norm.weight for norm in norms], norms[0].eps)
