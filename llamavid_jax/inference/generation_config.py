"""transformers' GenerationConfig, or anything with its fields, -> Settings."""

from collections.abc import Mapping
from typing import Any

from llamavid_jax.inference.request import RequestError, Settings

FIELDS = {"max_new_tokens": "max_new_tokens", "top_p": "top_p", "top_k": "top_k", "stop_strings": "stop"}
# Unsupported fields that would change the answer, with their value that changes nothing; None never does.
OFF = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "length_penalty"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "min_p"), 0),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "force_words_ids")),
    **dict.fromkeys(("penalty_alpha", "guidance_scale", "max_time", "constraints", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "dola_layers")),
}


def read_settings(config: Any, eos: int, do_sample: bool | None = None, **given: Any) -> Settings:
    """`given` settings override those of `config`, and those the defaults; None means not given.

    `do_sample` False is greedy, True samples, at temperature 1 if none is given.  Raises RequestError, naming the
    field, for what is not supported.
    """
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if config is not None and not fields:
        raise RequestError(f"generation_config is {config!r}; give a GenerationConfig or a mapping of its fields")
    for name, value in fields.items():
        if name in OFF and value is not None and value != OFF[name]:
            raise RequestError(f"generation_config has {name} {value!r}, which is not done here; leave it out")
    if fields.get("max_new_tokens") is None and fields.get("max_length") not in (None, 20):  # transformers' default
        raise RequestError(f"generation_config has max_length {fields['max_length']}; set max_new_tokens in its place")
    if fields.get("eos_token_id") not in (None, eos, [eos]):
        raise RequestError(f"generation_config has eos_token_id {fields['eos_token_id']}; this model ends at {eos}")

    settings = {ours: fields[name] for name, ours in FIELDS.items() if fields.get(name) is not None}
    if config is not None:  # in a GenerationConfig a temperature alone does not sample
        temperature = fields.get("temperature")
        settings["temperature"] = (1.0 if temperature is None else temperature) if fields.get("do_sample") else 0.0
    settings |= {name: value for name, value in given.items() if value is not None}
    if do_sample is False:
        settings["temperature"] = 0.0
    elif do_sample and not settings.get("temperature"):
        if given.get("temperature") is not None:
            raise RequestError(f"do_sample is True and temperature {given['temperature']!r}; use one above 0")
        settings["temperature"] = fields.get("temperature") or 1.0
    return Settings(**settings)
