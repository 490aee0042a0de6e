"""A strict reader of a published model's config.json."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError, comma_list, require, shown
from anyexperts_jax.core.files import parse_json_object, read_text
from anyexperts_jax.nn.config import RopeScaling

CONFIG = "config.json"
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NESTED = ("text_config", "thinker_config")  # parts that may hold rope settings
_REQUIRED: Any = object()


def keys(text: str) -> frozenset[str]:
    """Splits a text into keys."""
    return frozenset(text.split())


# Keys of any config.json that have no effect here: notes of tools, settings of training and of generation.
INERT = keys(
    """
    _attn_implementation _name_or_path add_cross_attention architectures attention_dropout bad_words_ids
    base_config_key begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """
)


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """The values of a config.json, and its path for error messages."""

    values: Mapping[str, Any]
    where: str

    @classmethod
    def read(cls, folder: pathlib.Path) -> "HubConfig":
        """Reads the configuration in a checkpoint's folder.

        Raises:
          UserError: if there is none, or it is not a JSON object.
        """
        path = folder / CONFIG
        require(path.is_file(), f"{folder} holds no {CONFIG}; give a folder with one, or a GGUF file")
        return cls(parse_json_object(read_text(path, CONFIG), str(path)), str(path))

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or the default if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        """Returns a whole number.

        Raises:
          UserError: if it is missing and has no default, or is of another type.
        """
        value = self._given(key, default)
        require(isinstance(value, int) and not isinstance(value, bool), f"{self._at(key)} must be a whole number")
        return int(value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Returns a finite number.

        Raises:
          UserError: if it is missing and has no default, or is of another type.
        """
        value = self._given(key, default)
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(real, f"{self._at(key)} must be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean.

        Raises:
          UserError: if it is of another type.
        """
        value = self.get(key, default)
        require(isinstance(value, bool), f"{self._at(key)} must be true or false")
        return bool(value)

    def num_experts(self) -> int:
        """Returns the number of routed experts, which has several names.

        Raises:
          UserError: if it is missing, or two names disagree.
        """
        found = {key: self.whole(key) for key in _EXPERT_COUNTS if self.get(key) is not None}
        require(bool(found), f"{self.where} says nowhere how many experts there are ({comma_list(_EXPERT_COUNTS)})")
        listed = comma_list(f"{key}={value}" for key, value in found.items())
        require(len(set(found.values())) == 1, f"{self.where}: {listed} disagree")
        return next(iter(found.values()))

    def only(self, key: str, *allowed: Any) -> None:
        """Checks that a key is missing, null or one of the supported values.

        Raises:
          UserError: naming the key and both values.
        """
        value = self.get(key)
        fits = value is None or any(type(value) is type(a) and value == a for a in allowed)
        require(fits, f"{self._at(key)} is not supported, only {comma_list(json.dumps(a) for a in allowed)}")

    def require_known(self, known: Collection[str]) -> None:
        """Checks that every key with a value is in `known` or has no effect here.

        Raises:
          UserError: naming the other keys.
        """
        unknown = [key for key, value in self.values.items() if value is not None and key not in {*known, *INERT}]
        listed = comma_list(f"{key}={shown(self.values[key])}" for key in unknown)
        require(not unknown, f"{self.where}: {listed}: not supported by this family")

    def part(self, key: str) -> "HubConfig":
        """Returns a nested configuration.

        Raises:
          UserError: if it is missing or not an object.
        """
        value = self._given(key, _REQUIRED)
        require(isinstance(value, Mapping), f"{self._at(key)} must be an object")
        return HubConfig(value, f"{self.where}: {key}")

    @property
    def thinker(self) -> "HubConfig":
        """The configuration of the decoder and its towers: `thinker_config` of Qwen3-Omni, else all of it."""
        return self.part("thinker_config") if self.get("thinker_config") is not None else self

    def rope(self, head_dim: int) -> dict[str, Any]:
        """Reads `rope_theta`, `rope_fraction` and `rope_scaling` of an AttentionConfig from all keys that hold them.

        Raises:
          UserError: if theta is missing, two keys disagree, or the scaling has an unknown type.
        """
        own = self.get("rope_parameters", {})
        require(isinstance(own, Mapping), f"{self._at('rope_parameters')} must be an object")
        nested = [key for key, value in own.items() if isinstance(value, Mapping)]
        require(not nested, f"{self.where}: rope_parameters differ by layer ({comma_list(nested)}): not supported")
        theta = self._agreed(
            {"rope_parameters.rope_theta": own.get("rope_theta"), "rope_theta": self.get("rope_theta")}
        )
        require(
            theta is not None,
            f"{self.where}: rope_theta is nowhere, neither in rope_parameters nor at the top; add the model's own: "
            "with a wrong one it writes nonsense",
        )
        rotary_dim = self.get("rotary_dim")
        fraction = self._agreed(
            {
                "rope_parameters.partial_rotary_factor": own.get("partial_rotary_factor"),
                "partial_rotary_factor": self.get("partial_rotary_factor"),
                "rotary_dim": None if rotary_dim is None else rotary_dim / head_dim,
            }
        )
        fields: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": self._rope_scaling()}
        return fields if fraction is None else {**fields, "rope_fraction": float(fraction)}

    def rope_settings(self) -> dict[str, Any]:
        """Merges `rope_scaling` and the newer `rope_parameters`, which takes precedence.

        Raises:
          UserError: if either is not an object.
        """
        found: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            held = self.get(key, {})
            require(isinstance(held, Mapping), f"{self._at(key)} must be an object")
            found |= {name: value for name, value in held.items() if value is not None}
        return found

    def _rope_scaling(self) -> RopeScaling | None:
        both = self.rope_settings()
        kind = both.get("rope_type", both.get("type", "default"))
        if kind == "default":
            return None
        known = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
        require(kind in known, f"{self.where}: rope type {kind!r} is not supported, only default, {comma_list(known)}")
        try:
            return known[kind](both, self)
        except KeyError as error:
            raise UserError(f"{self.where}: rope type {kind!r} needs {error.args[0]}") from error

    def _agreed(self, found: Mapping[str, Any]) -> Any:
        given = {key: value for key, value in found.items() if value is not None}
        for key, value in given.items():
            real = isinstance(value, int | float) and not isinstance(value, bool)
            require(real, f"{self.where}: {key}={shown(value)} must be a number")
        listed = comma_list(f"{key}={value}" for key, value in given.items())
        require(len(set(map(float, given.values()))) <= 1, f"{self.where}: {listed} disagree")
        return next(iter(given.values()), None)

    def _given(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        require(value is not _REQUIRED, f"{self.where} has no {key}")
        return value

    def _at(self, key: str) -> str:
        return f"{self.where}: {key}={shown(self.values.get(key))}"


def _linear(given: Mapping[str, Any], _: HubConfig) -> RopeScaling:
    return RopeScaling("linear", factor=float(given["factor"]))


def _llama3(given: Mapping[str, Any], _: HubConfig) -> RopeScaling:
    return RopeScaling(
        "llama3",
        factor=float(given["factor"]),
        original_length=given["original_max_position_embeddings"],
        low_rotations=float(given["low_freq_factor"]),
        high_rotations=float(given["high_freq_factor"]),
    )


def _yarn(given: Mapping[str, Any], hub: HubConfig) -> RopeScaling:
    original = given.get("original_max_position_embeddings", hub.get("max_position_embeddings"))
    factor = float(given["factor"])
    return RopeScaling(
        "yarn",
        factor=factor,
        original_length=original,
        low_rotations=float(given.get("beta_slow") or 1),
        high_rotations=float(given.get("beta_fast") or 32),
        whole_bounds=given.get("truncate", True),
        attention_factor=float(given.get("attention_factor") or _yarn_attention(given, factor)),
    )


def _yarn_attention(given: Mapping[str, Any], factor: float) -> float:
    """Returns YaRN's default factor of cosines and sines."""
    scale, scale_all = given.get("mscale"), given.get("mscale_all_dim")
    if not (scale and scale_all):
        return yarn_growth(factor)
    return yarn_growth(factor, scale) / yarn_growth(factor, scale_all)


def yarn_growth(factor: float, scale: float = 1.0) -> float:
    """Returns YaRN's growth of queries or keys for the factor by which it stretches wavelengths."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def both_rope_forms(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration with its rope settings under both the older and the newer keys."""
    own, legacy = dict(values.get("rope_parameters") or {}), dict(values.get("rope_scaling") or {})
    kind = own.get("rope_type", legacy.get("rope_type", legacy.get("type", "default")))
    theta = own.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        return dict(values) | {key: both_rope_forms(part) for key, part in values.items() if key in _NESTED and part}
    partial = own.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    settings = {k: v for k, v in {**legacy, **own}.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    rotary = {} if partial is None else {"partial_rotary_factor": partial}
    new = {**settings, "rope_type": kind, "rope_theta": theta, **rotary}
    old = {**settings, "rope_type": kind} if kind != "default" or set(settings) - {"rope_type"} else None
    return {**values, "rope_parameters": new, "rope_theta": theta, "rope_scaling": old, **rotary}


def eos_ids(values: Mapping[str, Any]) -> Sequence[int]:
    """Returns the end-of-text ids of a config.json or generation_config.json."""
    found = values.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]
