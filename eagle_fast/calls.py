"""How the methods of `EaModel` run a call: follow base_model, check what is asked, run rounds, collect or stream."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from eagle_fast.config import ROOT_ALONE, TreeConfig
from eagle_fast.decoding.adapt import Experience, TreeChooser
from eagle_fast.decoding.choice import candidates
from eagle_fast.decoding.generation import Decoding
from eagle_fast.decoding.hooks import StopsComeOut
from eagle_fast.decoding.memory import check_memory
from eagle_fast.decoding.records import Keeps
from eagle_fast.decoding.request import Request, end_of_turn, make_request, pad_id, padded, special_ids
from eagle_fast.decoding.round import Round
from eagle_fast.decoding.states import IdleStates
from eagle_fast.decoding.validate import check_flags
from eagle_fast.head import DraftHead
from eagle_fast.messages import warn_user
from eagle_fast.options import option_names, refuse_unknown
from eagle_fast.target import Exactness, Target
from eagle_fast.target.check import checked_target
from eagle_fast.target.exactness import BITWISE
from eagle_fast.target.rank_check import ranked_target
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.turns import autocast_on

AUTOCAST = (
    "torch.autocast is on and does not apply: the model decodes in the precision of its weights; load it with dtype= "
    "for another"
)
TIMING_DECIDES = (
    "adaptive=True: the tree of each round is chosen by measured times, and this model rounds by the number of rows "
    "({where}), so two calls may give texts that part where two scores are about a rounding apart"
)


class CallsMixin:
    """For `EaModel`."""

    base_model: PreTrainedModel
    ea_layer: DraftHead
    tree: TreeConfig
    target: Target
    states: IdleStates
    experience: Experience
    tokenizer: Any
    generate: Callable
    _adaptive: bool | None
    _is_followed: Callable[[], bool]
    _look_at_parts: Callable[[], None]
    _refuse_touched: Callable[[], None]

    @property
    def exactness(self) -> Exactness:
        """How exactly decoding with the head gives the text of the engine's own plain decoding, as measured of
        base_model when it was loaded, or changed.

        "bitwise": in this model's dtype on this device, it gives the bits of plain decoding, and so its text.
        "rounding": the two may differ by rounding, from the module `exactness.module` on, and a text may part where the
        two best scores are about a rounding apart. `exactness.reason` says why. See docs/exactness.md.
        """
        return self.target.exactness

    @property
    def adaptive(self) -> bool:
        """Whether the tree of each round is the one that pays: asked for, or else where changing it changes no text,
        which is where `exactness` is "bitwise", and in float32."""
        if self._adaptive is not None:
            return self._adaptive
        return self.exactness == BITWISE or _is_float32(self.target)

    def _warn_if_timing_decides(self) -> None:
        if self.adaptive and self.exactness != BITWISE and not _is_float32(self.target):
            where = f"from {self.exactness.module} on" if self.exactness.module else "see model.exactness.reason"
            warn_user(TIMING_DECIDES.format(where=where))

    def trees(self, batch: int = 1) -> tuple[TreeConfig, ...]:
        """The trees that rounds of `batch` sequences may have: what was given alone, or those that the engine chooses
        from, none of them more than that."""
        if not self.adaptive or self.tree == ROOT_ALONE:
            return (self.tree,)
        return candidates(self.tree, batch, self.target.device.type == "cpu")

    def _chooser(self, state: Round, request: Request, kind: type[TreeChooser]) -> TreeChooser | None:
        if len(state.trees) == 1:
            return None
        worth = self.experience.worth(request.sampling.temperature, request.shared_noise)
        context = sum(map(len, request.prompts)) / state.batch
        where = {"on_host": bool(request.processors), "on_cpu": self.target.device.type == "cpu"}
        return kind(state.trees, self.experience, worth, state.batch, context, **where)

    def _new_target(self) -> Any:
        boundaries, cut = tuple(self.ea_layer.config.feature_layers), cut_of(self.base_model)
        if cut is not None:
            return ranked_target(self.base_model, cut, boundaries, self.ea_layer.device, self.tree.total_token)
        return checked_target(self.base_model, boundaries, self.ea_layer.device, self.tree.total_token)

    def _follow(self) -> None:
        """Before a call: where base_model was changed since the last one, work with what it is now."""
        if autocast_on():
            warn_user(AUTOCAST)
        self._refuse_touched()
        turn = self.target.turn
        with turn.lock, turn():
            if self.target.is_current() and self._is_followed():
                return
            self._look_at_parts()
            target = self._new_target()
            if target.vocab_size != self.target.vocab_size:
                raise ValueError(
                    f"base_model has a vocabulary of {target.vocab_size} tokens now, and had {self.target.vocab_size} "
                    "when the head was loaded: load a head for it"
                )
            self.states.follow(target)  # first: an interrupt in between makes the next call follow once more
            self.experience = Experience(self.ea_layer.config.acceptance)
            self.target = target
            self.states.head, self.states.tree = self.ea_layer, self.tree

    def _refuse_unknown(self, method: str, options: dict[str, Any]) -> None:
        if not options:
            return
        behind = self._stream if method in ("ea_generate", "naive_generate") else self._collect
        taken = option_names(getattr(self, method), behind, self._prepare, make_request)
        refuse_unknown(method, options, taken, option_names(self.generate, GenerationMixin.generate), self.base_model)

    def _prepare(
        self,
        speculative: bool,
        input_ids: torch.Tensor,
        *,
        is_llama3: bool = False,
        eos_token_id=None,
        use_distributed: bool = False,
        **options,
    ) -> tuple[Request, torch.Tensor]:
        """Check everything a call brings: the request, and input_ids on the CPU."""
        is_llama3, _ = check_flags(is_llama3=is_llama3, use_distributed=use_distributed)
        self._follow()
        if eos_token_id is None:
            eos_token_id = special_ids(self.base_model, "eos_token_id")
            if is_llama3:
                eos_token_id = [*eos_token_id, *end_of_turn(self.tokenizer)]
        request, ids = make_request(self.target, input_ids, eos_token_id=eos_token_id, **options)
        lengths = {name: options[name] for name in ("max_new_tokens", "max_length")}
        check_memory(self.states, speculative, len(request.prompts), request.longest, lengths)
        return request, ids

    @torch.inference_mode(False)  # buffers live longer than a call, and an inference tensor can't be written outside
    @torch.no_grad()
    def _rounds(
        self, speculative: bool, request: Request, max_length: int = 0, chooser: type[TreeChooser] | None = None
    ) -> abc.Generator[Decoding, None, None]:
        """Run a request; yields its `Decoding` with the tokens of each round, and frees the state when closed."""
        longest = max(request.longest, max_length)
        keeps = Keeps.NOTHING if request.processors else request.record.keeps
        batch, texts = len(request.prompts), request.prompts if request.reuse_cache else None
        with self.states.lease(speculative, batch, longest, keeps, texts, self.trees(batch)) as (state, step, _):
            decoding = Decoding(state, step, request, self._chooser(state, request, chooser or TreeChooser))
            decoding.begin()
            while not decoding.finished:
                if decoding.advance():
                    yield decoding

    def _collect(self, speculative: bool, log: bool, input_ids, return_dict_in_generate: bool = False, **options):
        log, return_dict_in_generate = check_flags(log=log, return_dict_in_generate=return_dict_in_generate)
        request, ids = self._prepare(speculative, input_ids, return_dict_in_generate=return_dict_in_generate, **options)
        pad = pad_id(self.base_model)
        with StopsComeOut(), closing(self._rounds(speculative, request)) as running:
            for decoding in running:  # noqa: B007  # the last one holds all tokens
                pass
        sequences = padded(ids, decoding.new_tokens, pad).to(input_ids.device)
        statistics = decoding.statistics
        if return_dict_in_generate:
            return decoding.result(sequences, pad)
        return (sequences, sum(statistics.new_tokens), statistics.rounds - 1) if log else sequences

    def _stream(self, speculative: bool, log: bool, input_ids, return_dict_in_generate: bool = False, **options):
        _, return_dict_in_generate = check_flags(log=log, return_dict_in_generate=return_dict_in_generate)
        request, ids = self._prepare(speculative, input_ids, return_dict_in_generate=return_dict_in_generate, **options)
        pad = pad_id(self.base_model)

        def rounds():
            with closing(self._rounds(speculative, request)) as running:
                for decoding in running:
                    sequences = padded(ids, decoding.new_tokens, pad).to(input_ids.device)
                    yield decoding.result(sequences, pad) if return_dict_in_generate else sequences

        return rounds()


def _is_float32(target: Target) -> bool:
    """Whether roundings are far smaller than the gaps between scores."""
    tf32 = target.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return target.dtype == torch.float32 and not tf32
