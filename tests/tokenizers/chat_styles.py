"""Chat templates in the style of published models, each with a small matching tokenizer."""

import dataclasses
import functools
import json

from small_tokenizers import byte_level, sentence_piece

from anyexperts_jax.tokenizers.huggingface import HuggingFaceTokenizer

CONVERSATION = (
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Where is the café?"},
    {"role": "assistant", "content": "On the left. 🎉"},
    {"role": "user", "content": " And the cat? "},
    {"role": "assistant", "content": "The cat sits on\nthe mat."},
)
WITHOUT_SYSTEM = CONVERSATION[1:]

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set said = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set said = '' %}{% set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + (said if loop.first else '') + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
DEEPSEEK = """\
{%- set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
"""


@dataclasses.dataclass(frozen=True)
class Style:
    """A template, the special tokens it names, other special tokens, and the kind of tokenizer it is used with."""

    template: str
    named: dict
    extra: tuple[str, ...] = ()
    sentence_piece: bool = False
    conversation: tuple = CONVERSATION

    @functools.cached_property
    def tokenizer(self):
        special = tuple(dict.fromkeys([*self.named.values(), *self.extra]))
        made = sentence_piece("none", ("<unk>", *special)) if self.sentence_piece else byte_level(special, 600)
        config = {**self.named, "chat_template": self.template, "additional_special_tokens": list(self.extra)}
        texts = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(config)}
        return HuggingFaceTokenizer(texts, "style")


STYLES = {
    "chatml": Style(CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ("<|im_start|>",)),
    "llama 3": Style(
        LLAMA_3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "mistral": Style(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, sentence_piece=True),
    "gemma": Style(
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ("<start_of_turn>", "<end_of_turn>"),
        sentence_piece=True,
        conversation=WITHOUT_SYSTEM,
    ),
    "zephyr": Style(ZEPHYR, {"bos_token": "<s>", "eos_token": "</s>"}, sentence_piece=True),
    "deepseek": Style(
        DEEPSEEK,
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
}
