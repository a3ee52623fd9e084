"""What a model's ``generation_config`` asks of the texts it writes, beside where they end."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, LogitsProcessorList

from recbole_mllm.mllm.loading import UNREADABLE
from recbole_mllm.mllm.sources import gguf_of, source_of

_PENALTY = "repetition_penalty"
# Fields that change greedy text one token at a time, each with the values that do nothing
_FOLLOWED: dict[str, tuple[Any, ...]] = {
    _PENALTY: (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "remove_invalid_values": (False,),
}
# Fields that ask for another way of decoding altogether, which is not followed
_PASSED_OVER: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "stop_strings": ([], ""),
    "max_time": (),
    "token_healing": (False,),
    "watermarking_config": (),
}


def own_rules(name: str, *, trust_remote_code: bool = False) -> str:
    """Return what the ``generation_config`` of model `name` asks for, as JSON; "" for nothing. No weights are read."""
    source = source_of(name)
    if gguf_of(source) is not None:
        return ""
    try:
        found = GenerationConfig.from_pretrained(source)
    except UNREADABLE:
        try:  # older models keep it in their config.json
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            found = GenerationConfig.from_model_config(config)
        except UNREADABLE:  # said when it is loaded
            return ""
    return _told({key: getattr(found, key, None) for key in _FOLLOWED})


def with_penalty(rules: str, penalty: float | None, *, served: bool = False) -> str:
    """Return `rules` with the user's own repetition penalty, if any; a server must be told of 1 as well."""
    if penalty is None:
        return rules
    if served:
        return json.dumps({_PENALTY: penalty})
    return _told((json.loads(rules) if rules else {}) | {_PENALTY: penalty})


def passed_over(config: Any) -> str:
    """Return what a ``generation_config`` asks for that is not followed, for people; "" for nothing."""
    found = _set({key: getattr(config, key, None) for key in _PASSED_OVER}, _PASSED_OVER)
    return ", ".join(f"{key}: {value}" for key, value in found.items())


def processors(model: Any, rules: str, prompt: Tensor, stop: Collection[int], most: int) -> LogitsProcessorList:
    """Return what transformers' own ``generate`` would do to the logits behind one `prompt`.

    Args:
        model: The causal language model.
        rules: As of `own_rules`.
        prompt: ``[1, T]`` token ids.
        stop: The tokens that end an answer.
        most: How many tokens it may have.
    """
    config = GenerationConfig(**json.loads(rules), do_sample=False, max_length=prompt.size(1) + most)
    config._eos_token_tensor = torch.tensor(sorted(stop), device=prompt.device) if stop else None
    return model._get_logits_processor(
        config,
        input_ids_seq_length=prompt.size(1),
        encoder_input_ids=prompt,
        logits_processor=LogitsProcessorList(),
        device=prompt.device,
        model_kwargs={},
    )


def _told(values: Mapping[str, Any]) -> str:
    found = _set(values, _FOLLOWED)
    return json.dumps(found, sort_keys=True) if found else ""


def _set(values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return those of `values` that do something."""
    return {key: value for key, value in values.items() if value is not None and value not in neutral[key]}
