"""Reads GGUF files: dequantised tensors under their names on the hub, and a config.json made from the metadata."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.sources import Reader, TensorInfo

_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}
_KEYS = {  # key of config.json -> key of the metadata, without the architecture's prefix
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of the hub: a whole tensor of the file, or one expert of a stacked tensor."""

    tensor: Any
    expert: int | None
    heads: int | None  # number of heads, for query or key rows that the file interleaves


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """The tensors and the configuration of a GGUF file."""

    where: str
    hub: HubConfig
    tensors: Mapping[str, TensorInfo]
    entries: Mapping[str, _Entry]
    dequantize: Callable[[Any, Any], np.ndarray]

    @classmethod
    def find(cls, path: pathlib.Path) -> "GgufFile":
        """Reads the metadata; the weights stay in the file.

        Raises:
          UserError: if the package is missing, the file is damaged, or it has an architecture, a tensor or a
            quantisation that is not supported; the message names it.
        """
        library = require_package("gguf", "pretrained", "GGUF files need")
        try:
            reader = library.GGUFReader(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, IndexError, OverflowError, KeyError) as error:
            raise UserError(f"{path} is no whole GGUF file: {error}") from error
        found = {name: field.contents() for name, field in reader.fields.items() if not name.endswith(_LONG)}
        hub = _hub_config(found, reader, str(path))
        entries = dict(_entries(reader, hub, str(path)))
        kinds = {entry.tensor.tensor_type for entry in entries.values()}
        unread = sorted(kind.name for kind in kinds if not _is_readable(library, kind))
        require(not unread, f"{path}: quantisation {comma_list(unread)} is not read; use another file of the model")
        tensors = {name: _info(entry) for name, entry in entries.items()}
        return cls(str(path), hub, tensors, entries, library.quants.dequantize)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Reader]:
        yield _Dequantised(self)


_LONG = ("ggml.tokens", "ggml.merges", "ggml.token_type", "ggml.scores")


class _Dequantised:
    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def read(self, name: str) -> np.ndarray:
        entry = self._file.entries[name]
        data = entry.tensor.data if entry.expert is None else entry.tensor.data[entry.expert]
        value = np.asarray(self._file.dequantize(data, entry.tensor.tensor_type), np.float32)
        value = value.reshape(self._file.tensors[name].shape)
        return value if entry.heads is None else _deinterleave_rows(value, entry.heads)


def _deinterleave_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Restores the hub's order of a head's rows.

    llama.cpp rotates neighbouring rows, so it stores row i beside row i + half. The hub's models rotate halves: all
    first rows of the pairs come first, then all second ones.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _is_readable(library: Any, kind: Any) -> bool:
    """Whether the package can dequantise this type, found out on one block of zeros."""
    block = np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        library.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _hub_config(found: Mapping[str, Any], reader: Any, where: str) -> HubConfig:
    architecture = str(found.get("general.architecture"))
    require_one_of(f"{where}: general.architecture", architecture, _CLASSES)
    values = {key: found.get(f"{architecture}.{name}") for key, name in _KEYS.items()}
    require(
        architecture != "llama" or not values["num_experts"],
        f"{where}: Mixtral as GGUF is not read; use its safetensors",
    )
    names = {tensor.name for tensor in reader.tensors}
    table = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    require(table is not None, f"{where} has no token_embd.weight")
    assert table is not None
    scaling = found.get(f"{architecture}.rope.scaling.type", "none")
    factor = found.get(f"{architecture}.rope.scaling.factor")
    frequencies = "rope_freqs.weight" in names
    require(
        not frequencies and scaling in ("none", "linear"),
        f"{where}: rope scaling {'llama3' if frequencies else scaling!r} in a GGUF file is not read; use safetensors",
    )
    return HubConfig(
        {
            "architectures": [_CLASSES[architecture]],
            "model_type": {"qwen3moe": "qwen3_moe"}.get(architecture, architecture),
            **{key: value for key, value in values.items() if value is not None},
            **({"rope_scaling": {"rope_type": "linear", "factor": factor}} if scaling == "linear" else {}),
            **({"norm_topk_prob": True} if architecture == "qwen3moe" else {}),
            "attention_bias": "blk.0.attn_q.bias" in names,
            "vocab_size": int(table.shape[1]),
            "tie_word_embeddings": "output.weight" not in names,
            "hidden_act": "silu",
            **{
                f"{ours}_token_id": found[key]
                for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
                if (key := f"tokenizer.ggml.{theirs}_token_id") in found
            },
        },
        where,
    )


def _entries(reader: Any, hub: HubConfig, where: str) -> Iterator[tuple[str, _Entry]]:
    permuted = hub.get("model_type") == "llama"
    heads = {"attn_q": hub.whole("num_attention_heads")}
    heads["attn_k"] = hub.whole("num_key_value_heads", heads["attn_q"])
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        if stem in _TOP:
            yield f"{_TOP[stem]}.{kind}", _Entry(tensor, None, None)
            continue
        block = _BLOCK.fullmatch(tensor.name)
        known = block is not None and (block[2] in _IN_LAYER or block[2] in _EXPERTS)
        require(known, f"{where}: tensor {tensor.name} is unknown in a model of class {hub.get('architectures')[0]}")
        assert block is not None
        layer = f"model.layers.{block[1]}."
        if block[2] in _IN_LAYER:
            own_heads = heads.get(block[2]) if permuted else None
            yield f"{layer}{_IN_LAYER[block[2]]}.{block[3]}", _Entry(tensor, None, own_heads)
            continue
        for expert in range(int(tensor.shape[-1])):
            yield f"{layer}mlp.experts.{expert}.{_EXPERTS[block[2]]}.{block[3]}", _Entry(tensor, expert, None)


def _info(entry: _Entry) -> TensorInfo:
    shape = tuple(int(n) for n in reversed(entry.tensor.shape))
    return TensorInfo(shape if entry.expert is None else shape[1:], np.dtype(np.float32), entry.tensor.tensor_type.name)
