"""Before a target is trusted: what its twin computes is held against what the user's model computes.

`rehearsal.py` runs the same few tokens through both, as a prompt, a tree, a compaction and a second tree. The user's
model, with its own attention, its hooks and whatever else it has, decodes both paths of the tree token by token. The
outputs of every layer are compared, and the logits. This is done twice: at the start of a text, and at position DEEP,
where windows, chunks, temperatures and rotary settings bite. Nobody computes the rows in front: they are made up, and
the same for both.

How far two results may be apart is measured: the rows run through the user's model once more in a wider precision, and
the twin may be twice as far from that as the user's model is. Some roundings are made much of by the layers behind, and
the model's own may not be among them: where the twin is farther than that, the model is run again, its layers' outputs
off by a rounding each, up to RUNS times, and the farthest counts.

Hooks and forwards that were put on the model are held against themselves in that precision, token by token and all rows
at once: there, no rounding hides what they look at.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eagle_fast.messages import warn_user
from eagle_fast.target.anatomy import UnsupportedModel, decoder_layers
from eagle_fast.target.bits import measured
from eagle_fast.target.exactness import Exactness
from eagle_fast.target.fused import FusedLayer
from eagle_fast.target.reference import in_precision
from eagle_fast.target.rehearsal import NODES, PARTS, PLACE, PROMPT, Outputs, Rehearsal, rows_at
from eagle_fast.target.sound import broken_tensor
from eagle_fast.target.target import Target
from eagle_fast.target.twin import evaluating

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-14}  # of a row's length, at least
ROUNDING[torch.float64] = ROUNDING[torch.float32]  # stock code computes norms and rotary tables in float32
RUNS = 32  # of the model at most, to measure its own error
WITHOUT_WIDER = 16  # roundings by which results may be apart where no wider precision can be computed


def checked_target(
    model: PreTrainedModel, feature_layers: tuple[int, ...], draft_device: torch.device, num_nodes: int
) -> Target:
    """A `Target` that passed `check_target`, in eval mode whatever the mode of the model.

    Its layers are fused, or all stock where only stock code computes what the model does.
    """
    for fuse in (True, False):
        target = Target(model, feature_layers, draft_device, fuse=fuse)
        target.model.eval()
        try:
            check_target(target, num_nodes)
        except UnsupportedModel as error:
            if not any(isinstance(layer, FusedLayer) for layer in target.decoder_layers):
                raise
            reason = str(error)
        else:
            break
    if not fuse:
        warn_user(f"layers are not fused, which is slower: {reason}")
    return target


def check_target(target: Target, num_nodes: int = NODES) -> None:
    """Raises UnsupportedModel, which names the module, where the twin of a target computes something else than the
    user's model does; else sets the target's `exactness`. num_nodes: how many each tree has; more than NODES change
    nothing but, maybe, the exactness. Not positive: not known yet.

    Offloaded models are not checked, whose every forward takes seconds.
    """
    if not target.offloaded:
        with torch.no_grad(), target.turn.lock, target.turn(), evaluating(target.stock):
            check = _Check(target, num_nodes)
            check.run()
            target.exactness = check.exactness(num_nodes)
            target.leave_out_notes()


class _Check:
    def __init__(self, target: Target, num_nodes: int):
        self.rehearsal = Rehearsal(target, num_nodes)
        self.model, self.routed, self.touched = self.rehearsal.model, self.rehearsal.routed, bool(target.touched)
        self.dtype = target.dtype
        found = decoder_layers(target.stock, target.anatomy.num_layers)
        assert found is not None, "a target was made of it"
        self.names = [f"{found[0]}.{index} ({type(layer).__name__})" for index, layer in enumerate(found[1])]
        self.names.append("what follows the layers")

    def run(self) -> None:
        """Both passes."""
        if self.touched:
            self._check_rows()
        runs, deep = self.rehearsal, self.rehearsal.deep
        stock = runs.of_the_model(self.model, 0, token_by_token=True)
        self._compare(runs.of_the_twin(0, stock), stock, 0)
        runs.make_up()
        stock = runs.of_the_model(self.model, deep)
        self._compare(runs.of_the_twin(deep, stock), stock, deep)

    def exactness(self, num_nodes: int) -> Exactness:
        """After `run`, whose rows deep in a text are real ones to make others up after."""
        runs = self.rehearsal
        return measured(runs.target, self.names, runs.cache.slab, runs.deep, num_nodes)

    # -- how far apart ---------------------------------------------------------------------------------------------

    def _compare(self, twin: Outputs, stock: Outputs, start: int) -> None:
        """UnsupportedModel where the twin is off by more than a rounding and by more than the model's own error."""
        found, rounding = self._distances(twin, stock), self._rounding(stock)
        bounds = [rounding] * len(found)
        runs = self._own_errors(stock, start, rounding)
        while any(self._excess(rows, start) > bound for rows, bound in zip(found, bounds, strict=True)):
            own = next(runs, None)
            if own is None:
                break
            # twice as far from the wider precision as the model itself: three times that from the model
            bounds = [max(bound, rounding + 3 * error) for bound, error in zip(bounds, own, strict=True)]
        for name, rows, bound in zip(self.names, found, bounds, strict=True):
            if self._excess(rows, start) > bound:
                self._refuse(name, rows, bound, start)

    def _refuse(self, name: str, rows: list[float], bound: float, start: int) -> None:
        broken = broken_tensor(self.model)
        if broken is not None:
            raise UnsupportedModel(
                f"{broken} of the model holds NaN or infinite numbers, so it has no text of its own: is the checkpoint "
                "damaged, or has its config.json impossible rope_parameters?"
            )
        if max(rows) == float("inf"):
            raise UnsupportedModel(
                f"{name} gives NaN or infinite numbers in a prompt or a tree where the model itself gives finite ones: "
                f"is the checkpoint damaged, or do its weights overflow {self.dtype} (load it with "
                "dtype=torch.float32), or is there a hook that looks at the number of rows?"
            )
        raise UnsupportedModel(_message(name, rows, bound, start))

    def _rounding(self, stock: Outputs) -> float:
        dtype = stock.layers[0].dtype
        tf32 = stock.logits.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return ROUNDING[torch.float16 if tf32 and dtype == torch.float32 else dtype]

    def _own_errors(self, stock: Outputs, start: int, rounding: float) -> Iterator[list[float]]:
        """How far the model's results, of each layer and then the logits, are from those of a wider precision: as they
        are, then of RUNS in which its layers' outputs are off by a rounding each."""
        if start == 0:  # that one was decoded token by token
            stock = self.rehearsal.of_the_model(self.model, start)
        try:
            wide = self.rehearsal.of_the_model(
                in_precision(self.model, WIDER[stock.layers[0].dtype]), start, stock=stock
            )
        except (KeyError, RuntimeError, TypeError, ValueError):  # none is wider, packed weights, or no memory for it
            yield [rounding * WITHOUT_WIDER / 3] * len(self.names)
            return
        yield self._typical_of(stock, wide)
        generator = torch.Generator().manual_seed(0)
        for _ in range(RUNS):
            run = self.rehearsal.of_the_model(
                self.model, start, stock=stock, off_by=functools.partial(_off_by_a_rounding, generator)
            )
            yield self._typical_of(run, wide)

    def _check_rows(self) -> None:
        """UnsupportedModel where the user's own hooks and forwards make something else of rows that come together."""
        wide = in_precision(self.model, WIDER.get(self.dtype, torch.float64))
        try:
            alone, together = (self.rehearsal.of_the_model(wide, 0, token_by_token=each) for each in (True, False))
        except (RuntimeError, TypeError, ValueError):
            return  # what they do in the model's own precision was compared
        for name, rows in zip(self.names, self._distances(together, alone), strict=True):
            if max(rows) > ROUNDING[torch.float32]:
                raise UnsupportedModel(_message(name, rows, ROUNDING[torch.float32], 0))

    def _distances(self, ours: Outputs, theirs: Outputs) -> list[list[float]]:
        """Of each layer's rows and of the logits', relative to their length; nothing of rows that overflow."""
        pairs = [*zip(ours.layers, theirs.layers, strict=True)]
        pairs.append((ours.logits, theirs.logits))
        return [distance.tolist() for distance in [_distance(*pair) for pair in pairs]]

    def _excess(self, distances: list[float], start: int) -> float:
        """The largest distance. Where rows are routed to experts, a rounding may send one elsewhere: then the largest
        by which all rows of the prompt, of the tree, or behind it are off."""
        if not self.routed:
            return max(distances)
        by_row = dict(zip(rows_at(start)[-len(distances) :], distances, strict=True))
        parts = [[distance for row, distance in by_row.items() if row in part] for part in PARTS]
        return max(min(part) for part in parts if part)

    def _typical_of(self, run: Outputs, wide: Outputs) -> list[float]:
        """Of a run's errors in each layer the largest, or where rows are routed the median."""
        distances = [sorted(rows) for rows in self._distances(run, wide)]
        return [rows[len(rows) // 2 if self.routed else -1] for rows in distances]


def _off_by_a_rounding(generator: torch.Generator, hidden: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    noise = torch.randn(hidden.shape, generator=generator, dtype=wide).to(hidden.device)
    return (hidden * (1 + torch.finfo(hidden.dtype).eps / 2 * noise)).to(hidden.dtype)


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    theirs = theirs.double()
    apart = (ours.to(theirs.device).double() - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=float("inf")).where(theirs.isfinite().all(-1), 0.0)


def _message(name: str, rows: list[float], bound: float, start: int) -> str:
    worst = max(range(len(rows)), key=rows.__getitem__) - len(rows)
    row = rows_at(start)[worst]
    part = "a prompt" if row < PROMPT else "a tree" if row < PROMPT + NODES else "a tree after a compaction"
    return (
        f"{name} computes something else in {part} at position {start + PLACE[row]} than in the model itself: its "
        f"output is off by {rows[worst]:.2g} of its length, rounding explains {bound:.2g}. What a row becomes must "
        "depend on its own text and position alone: is there a hook, a forward or an attention function that looks "
        "at the number of rows, at the last one, or at earlier calls?"
    )
