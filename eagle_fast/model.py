"""`EaModel`: a stock causal LM and an EAGLE head, decoding together.

Signatures of the methods that SafeAILab/EAGLE has are supersets of its own. What is stricter: output ends at the first
stop token and never passes `max_new_tokens`, `max_length` is usable to its last token, and bad input is a ValueError
before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, StoppingCriteriaList

from eagle_fast.checkpoint import read_head
from eagle_fast.config import SamplingParams, TreeConfig
from eagle_fast.generation import Generation, Generator, Statistics, StopRules
from eagle_fast.graph import WARMUP_STEPS, GraphedStep
from eagle_fast.head import DraftHead
from eagle_fast.hf_generate import HFGenerateMixin
from eagle_fast.placement import resolve_device, warn_if_slow
from eagle_fast.round import Round
from eagle_fast.target import Target
from eagle_fast.tune import pick_total_token
from eagle_fast.validate import check_prompts, check_stop_ids, token_budgets

HEAD_OPTIONS = ("feature_layers", "norm_before_residual", "norm_output", "rope_theta", "rope_interleaved")
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
LENGTH_STEP = 1024


class EaModel(HFGenerateMixin, nn.Module):
    """Speculative decoding of `base_model` with `ea_layer`; `base_model` itself stays usable and unchanged.

    base_model: any stock causal LM whose attention goes through transformers' AttentionInterface, on one device.
    ea_layer: the draft head, on the same device. Raises UnsupportedModel, with the reason, for other models.
    """

    def __init__(self, base_model: nn.Module, ea_layer: DraftHead, *, tree: TreeConfig | None = None, name: str = ""):
        super().__init__()
        self.base_model, self.ea_layer = base_model, ea_layer
        self.config = base_model.config
        self.tree = tree or TreeConfig()
        self.target = Target(base_model, tuple(ea_layer.config.feature_layers))
        self.device_map: dict[str, Any] = {"": self.target.device}
        self._name, self._tokenizer = name or getattr(base_model, "name_or_path", ""), None
        self._idle: list[tuple[Round, GraphedStep]] = []
        if self.tree.total_token == -1:
            self.tree = pick_total_token(self.target, ea_layer, self.tree)
        warn_if_slow(base_model)

    @classmethod
    def from_pretrained(
        cls,
        use_eagle3: bool | None = None,
        base_model_path: str | nn.Module | None = None,
        ea_model_path: str | None = None,
        total_token: int = 60,
        depth: int = 7,
        top_k: int = 10,
        threshold: float = 1.0,
        *,
        device_map=None,
        ea_revision: str | None = None,
        **kwargs,
    ) -> EaModel:
        """Load a target and a head from the hub or from folders.

        use_eagle3 None detects the kind of head from its tensors; a value that contradicts the file is an error.
        base_model_path may be a loaded model. threshold is accepted for SafeAILab/EAGLE's sake and changes nothing.
        feature_layers, norm_before_residual, norm_output, rope_theta, rope_interleaved override what the head's config
        says; everything else (dtype or torch_dtype, quantization_config, revision, token, ...) goes to
        AutoModelForCausalLM.from_pretrained. Raises ValueError for what does not fit together.
        """
        if base_model_path is None or ea_model_path is None:
            raise ValueError("from_pretrained needs base_model_path= and ea_model_path=")
        tree = TreeConfig(total_token, depth, top_k)
        head_options = {key: kwargs.pop(key) for key in HEAD_OPTIONS if key in kwargs}
        hub_options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if isinstance(base_model_path, nn.Module):
            if kwargs or device_map is not None:
                names = sorted([*kwargs, *(["device_map"] if device_map is not None else [])])
                raise ValueError(f"{names} cannot change a model that is loaded already: pass them where you load it")
            base_model = base_model_path
        else:
            device = resolve_device(device_map)
            if device.type == "cuda":
                kwargs["device_map"] = {"": device}
            base_model = AutoModelForCausalLM.from_pretrained(base_model_path, **kwargs)
            capped = getattr(base_model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
            if capped and "attn_implementation" not in kwargs:
                base_model.set_attn_implementation("eager")  # the default, SDPA, leaves the softcap out
        base_model.eval()
        embedding, lm_head = base_model.get_input_embeddings(), base_model.get_output_embeddings()
        config = base_model.config.get_text_config(decoder=True)
        checkpoint = read_head(
            ea_model_path,
            target_hidden_size=config.hidden_size,
            target_vocab_size=lm_head.weight.shape[0],
            num_target_layers=config.num_hidden_layers,
            use_eagle3=use_eagle3,
            revision=ea_revision,
            **head_options,
            **hub_options,
        )
        head = DraftHead(
            checkpoint,
            embedding=embedding.weight,
            lm_head_weight=lm_head.weight,
            lm_head_bias=getattr(lm_head, "bias", None),
            dtype=lm_head.weight.dtype,
            device=lm_head.weight.device,
        )
        return cls(base_model, head, tree=tree, name=str(base_model_path) if isinstance(base_model_path, str) else "")

    # -- tokenizer -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The target's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            if not self._name:
                raise ValueError("the base model was passed in without a name: load its tokenizer yourself")
            self._tokenizer = AutoTokenizer.from_pretrained(self._name)
        return self._tokenizer

    def get_tokenizer(self):
        """The target's tokenizer."""
        return self.tokenizer

    # -- decoding --------------------------------------------------------------------------------------------------

    def eagenerate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ):
        """Decode with speculation. input_ids [B, L], with attention_mask= where prompts differ in length.

        Returns ids [B, L + longest], padded behind; with log=True (ids, new tokens over all sequences, index of the
        last round); with return_dict_in_generate=True a `Generation`. options:
            attention_mask [B, L]; padding may stand on either side
            seed            an integer, or one for each sequence; None draws from torch's default generator
            min_p           see SamplingParams
            shared_noise    False: at temperature > 0 the draft ranks without the target's noise (the text is the same)
            eos_token_id    stop ids instead of those of the model's generation_config
            logits_processor, stopping_criteria   transformers' lists; they run on the host
        Raises ValueError for arguments that cannot be meant, NaNLogitsError.
        """
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
        return self._collect(True, log, input_ids, max_length=max_length, is_llama3=is_llama3, **settings, **options)

    def naivegenerate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ):
        """The same without speculation, one token a round: the same text for the same seed. See `eagenerate`."""
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
        return self._collect(False, log, input_ids, max_length=max_length, is_llama3=is_llama3, **settings, **options)

    def ea_generate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ) -> Iterator[torch.Tensor]:
        """`eagenerate` as a generator: yields the ids so far after each round. It may be closed early."""
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
        return self._stream(True, input_ids, max_length=max_length, is_llama3=is_llama3, **settings, **options)

    def naive_generate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
        **options,
    ) -> Iterator[torch.Tensor]:
        """`naivegenerate` as a generator: yields the ids so far after each token."""
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
        return self._stream(False, input_ids, max_length=max_length, is_llama3=is_llama3, **settings, **options)

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, output_orig=False, position_ids=None):
        """The target alone, as in SafeAILab/EAGLE: (outputs, hidden), or (outputs, logits, hidden) with output_orig.

        hidden [B, L, H] is the last hidden state after the final norm, logits [B, L, V].
        """
        kept = {}

        def keep(module, args, output):
            kept["outputs"] = output

        handle = self.base_model.get_decoder().register_forward_hook(keep)
        try:
            with torch.inference_mode():
                logits = self.base_model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                ).logits
        finally:
            handle.remove()
        outputs = kept["outputs"]
        return (outputs, logits, outputs[0]) if output_orig else (outputs, outputs[0])

    @torch.no_grad()
    def warmup(self, batch: int = 1, max_length: int = 2048) -> None:
        """Compile kernels and capture the graphs for `batch` sequences of up to `max_length` tokens, before the clock."""
        for speculative in (True, False):
            with self._lease(speculative, batch, max_length) as (state, step):
                prompts, budget = [[0, 0]] * batch, (WARMUP_STEPS + 2) * state.max_path
                list(Generator(state, step, prompts, [min(budget, max_length - 2)] * batch, StopRules()))

    # -- behind them -----------------------------------------------------------------------------------------------

    def _prepare(
        self,
        input_ids,
        *,
        temperature=0.0,
        top_p=0.0,
        top_k=0,
        min_p=0.0,
        seed=None,
        max_new_tokens=512,
        max_length=2048,
        is_llama3=False,
        attention_mask=None,
        shared_noise=True,
        eos_token_id=None,
        logits_processor=None,
        stopping_criteria=None,
    ):
        """Check everything a call brings: (prompts, budgets, ids on the CPU, sampling, rules)."""
        params = SamplingParams(temperature, top_p, top_k, min_p, tuple(seed) if isinstance(seed, list) else seed)
        prompts, ids = check_prompts(input_ids, attention_mask, self.target.vocab_size)
        if isinstance(params.seed, tuple) and len(params.seed) != len(prompts):
            raise ValueError(f"{len(params.seed)} seeds for {len(prompts)} sequences: pass one integer or one for each")
        budgets = token_budgets(prompts, max_new_tokens, max_length, self.target.max_positions)
        stop_ids = self._stop_ids(is_llama3) if eos_token_id is None else _as_list(eos_token_id)
        rules = StopRules(
            check_stop_ids(stop_ids, self.target.vocab_size),
            StoppingCriteriaList(stopping_criteria) if stopping_criteria else None,
            LogitsProcessorList(logits_processor) if logits_processor else None,
        )
        return prompts, budgets, ids, (params, shared_noise), rules

    @torch.no_grad()
    def _rounds(self, speculative: bool, prompts, budgets, sampling, rules):
        """Yields (texts so far without the prompts, statistics) after each round; frees the state when closed."""
        longest = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True))
        with self._lease(speculative, len(prompts), longest) as (state, step):
            state.sampling.load(*sampling)
            generator = Generator(state, step, prompts, budgets, rules)
            for new in generator:
                yield new, generator.statistics

    def _collect(self, speculative: bool, log: bool, input_ids, return_dict_in_generate: bool = False, **options):
        prompts, budgets, ids, sampling, rules = self._prepare(input_ids, **options)
        texts: list[list[int]] = [[] for _ in prompts]
        statistics = Statistics()
        for new, statistics in self._rounds(speculative, prompts, budgets, sampling, rules):
            for text, tokens in zip(texts, new, strict=True):
                text += tokens
        sequences = self._pad(ids, texts).to(input_ids.device)
        if return_dict_in_generate:
            return Generation(sequences, statistics)
        return (sequences, sum(statistics.new_tokens), statistics.rounds - 1) if log else sequences

    def _stream(self, speculative: bool, input_ids, **options):
        prompts, budgets, ids, sampling, rules = self._prepare(input_ids, **options)

        def rounds():
            texts: list[list[int]] = [[] for _ in prompts]
            with closing(self._rounds(speculative, prompts, budgets, sampling, rules)) as running:
                for new, _ in running:
                    for text, tokens in zip(texts, new, strict=True):
                        text += tokens
                    yield self._pad(ids, texts).to(input_ids.device)

        return rounds()

    @contextmanager
    def _lease(self, speculative: bool, batch: int, max_length: int):
        """A decoding state nobody else uses, large enough: an idle one, or a new one in place of one too small."""

        def fits(state: Round) -> bool:
            return state.batch == batch and (state.drafter is not None) == speculative

        matching = [each for each in self._idle if fits(each[0])]
        leased = next((each for each in matching if each[0].max_length >= max_length), None)
        self._idle = [each for each in self._idle if each is not leased and (leased or each not in matching)]
        if leased is None:
            matching.clear()
            rounded = -(-max_length // LENGTH_STEP) * LENGTH_STEP
            state = Round(self.target, self.ea_layer if speculative else None, self.tree, batch, rounded)
            leased = state, GraphedStep(state.step, self.target.device)
        try:
            yield leased
        finally:
            self._idle.append(leased)

    def _stop_ids(self, is_llama3: bool) -> list[int]:
        generation_config = getattr(self.base_model, "generation_config", None)
        ids = _as_list(getattr(generation_config, "eos_token_id", None))
        ids = ids or _as_list(getattr(self.target.config, "eos_token_id", None))
        if is_llama3:
            ids = [*ids, self.tokenizer.convert_tokens_to_ids("<|eot_id|>")]
        return ids

    def _pad(self, ids: torch.Tensor, texts: list[list[int]], pad: int | None = None) -> torch.Tensor:
        """[B, L + longest text] on the CPU: the prompts as given, then the texts, padded behind."""
        pad = self._pad_id() if pad is None else pad
        new = torch.full((len(texts), max(len(text) for text in texts)), pad, dtype=torch.long)
        for row, text in enumerate(texts):
            new[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        return torch.cat([ids, new], 1)

    def _pad_id(self) -> int:
        generation_config = getattr(self.base_model, "generation_config", None)
        for source in (generation_config, self.target.config):
            for name in ("pad_token_id", "eos_token_id"):
                found = _as_list(getattr(source, name, None))
                if found:
                    return found[0]
        return 0


def _as_list(ids) -> list[int]:
    """Token ids as transformers' configs hold them: None, one id, a list or a tensor."""
    if ids is None:
        return []
    if isinstance(ids, torch.Tensor):
        return ids.flatten().tolist()
    return [ids] if isinstance(ids, int) else list(ids)
