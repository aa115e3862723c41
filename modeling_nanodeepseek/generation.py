"""How `generate()` is ours: its caches of latents, its drafts by multi-token prediction, and its limits, asked before
anything is written.

All else of it is transformers'; the methods here are places where it lets a model decide.
"""

from transformers.generation import GenerationMixin
from transformers.utils import logging

from .cache import Fp8LatentCache, LatentCache, check_offloading
from .checks import check_drafting
from .continuous import start_continuous_batching
from .mtp import Drafter, DraftReport

logger = logging.get_logger(__name__)


class LatentGenerationMixin(GenerationMixin):
    """For a model with a config of ours whose decoder, `model`, has multi-token prediction's `predictors`.

    Attributes:
        draft_report: of the latest generate(use_mtp=True).
    """

    draft_report: DraftReport | None = None
    _drafts: int | None = None  # tokens drafted at a time, from `_prepare_generation_config` to `_get_drafter`

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """`generate()` builds our caches where transformers would build its dynamic, offloaded and quantised ones."""
        if "offloaded" in (generation_config.cache_implementation or ""):
            check_offloading()
        ours = self.config.attention_type == "mla" and generation_config.use_cache is not False
        build = self._latent_caches().get(generation_config.cache_implementation) if ours else None
        if build is None or model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        model_kwargs["past_key_values"] = build(generation_config.cache_config or {})
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def _latent_caches(self) -> dict:
        """How to build a cache for each `cache_implementation` that is ours, from the `cache_config`."""
        config = self.config

        def quantized(settings: dict) -> Fp8LatentCache:
            if settings not in ({}, {"backend": "fp8"}):
                raise ValueError(f"cache_config={settings!r} is not possible for MLA: only {{'backend': 'fp8'}} is.")
            return Fp8LatentCache(config)

        return {
            None: lambda settings: LatentCache(config),
            "dynamic": lambda settings: LatentCache(config),
            "offloaded": lambda settings: LatentCache(config, offloading=True),
            "quantized": quantized,
        }

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Notes how many tokens the caller wants drafted at a time; transformers fills in 20 where nobody says."""
        given = [kwargs.get("num_assistant_tokens"), getattr(generation_config, "num_assistant_tokens", None)]
        given += [self.generation_config.num_assistant_tokens, self.config.num_nextn_predict_layers]
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if prepared.use_mtp:
            check_drafting(prepared)
        self._drafts = next(number for number in given if number is not None)
        return prepared, model_kwargs

    def _get_stopping_criteria(self, generation_config, stopping_criteria=None, **kwargs):
        if generation_config.use_mtp and stopping_criteria:
            raise ValueError(
                "use_mtp=True with stopping_criteria is not possible: several tokens are accepted at a time, and the "
                "text would run beyond them. End it by eos_token_id or max_new_tokens."
            )
        return super()._get_stopping_criteria(generation_config, stopping_criteria=stopping_criteria, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """Assisted decoding gives the whole text also where a cache holds its beginning: only the rest is read."""
        whole = inputs_embeds is None and (attention_mask is None or attention_mask.shape[-1] == input_ids.shape[1])
        if is_first_iteration and next_sequence_length is None and past_key_values is not None and whole:
            past = past_key_values.get_seq_length()
            next_sequence_length = input_ids.shape[1] - past if 0 < past < input_ids.shape[1] else None
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _get_candidate_generator(self, generation_config, *args, logits_processor=None, assistant_model=None, **kwargs):
        """With use_mtp our own modules draft. Refuses an assistant that would reach its last position before we do:
        later, the text would be lost."""
        if generation_config.use_mtp:
            if assistant_model is not None or kwargs.get("model_kwargs", {}).get("inputs_embeds") is not None:
                raise ValueError("use_mtp=True is not possible with an assistant_model, nor with inputs_embeds.")
            return self._get_drafter(generation_config, logits_processor)
        kwargs["logits_processor"] = logits_processor
        limit = getattr(getattr(assistant_model, "config", None), "max_position_embeddings", None)
        longest = generation_config.max_length
        if limit is not None and longest > limit + 1:
            raise ValueError(
                f"The assistant's max_position_embeddings is {limit}, and max_length {longest}: at most {limit + 1} "
                "is possible with it."
            )
        return super()._get_candidate_generator(generation_config, *args, assistant_model=assistant_model, **kwargs)

    def _get_drafter(self, generation_config, logits_processor) -> Drafter:
        if not self.model.predictors:
            raise ValueError(
                "use_mtp=True is not possible: the model has no modules of multi-token prediction "
                f"(num_nextn_predict_layers={self.config.num_nextn_predict_layers})."
            )
        if self._drafts < 1:
            raise ValueError(f"num_assistant_tokens={self._drafts} is not possible: at least 1 token is drafted.")
        drafter = Drafter(self, self._drafts, generation_config, logits_processor)
        self.draft_report = drafter.report
        return drafter

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, under `generate_batch` and `transformers serve --continuous-batching`; see
        `continuous.py` for what is refused."""
        return start_continuous_batching(self, *args, **kwargs)

    def _prepare_generated_length(self, generation_config, input_ids_length, inputs_tensor, **kwargs):
        """Refuses a prompt beyond max_position_embeddings, and ends what would run beyond it there: an error in the
        middle would lose what was written. The last token is never fed, so one more than the limit can be written."""
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            input_ids_length=input_ids_length,
            inputs_tensor=inputs_tensor,
            **kwargs,
        )
        prompt, limit = inputs_tensor.shape[1], self.config.position_limit
        if prompt > limit:
            raise ValueError(f"The prompt has {prompt} tokens, and max_position_embeddings is {limit}.")
        longest = input_ids_length + limit + 1 - prompt
        if generation_config.max_length > longest:
            logger.warning(
                f"max_position_embeddings is {limit}: after a prompt of {prompt} tokens at most {limit + 1 - prompt} "
                f"are written, not {generation_config.max_length - input_ids_length}."
            )
            generation_config.max_length = longest
        return generation_config
