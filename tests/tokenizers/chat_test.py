import datetime
import json
import pickle

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from chat_styles import CHATML, CONVERSATION, STYLES, WITHOUT_SYSTEM, Style
from small_tokenizers import byte_level, of_library

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.tokenizers.bytes import BytesTokenizer
from anyexperts_jax.tokenizers.chat import ChatTemplate, encode_chat

GOLDEN = {
    "chatml": "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nWhere is the café?<|im_end|>\n"
    "<|im_start|>assistant\n[On the left. 🎉<|im_end|>]\n<|im_start|>user\n And the cat? <|im_end|>\n"
    "<|im_start|>assistant\n[The cat sits on\nthe mat.<|im_end|>]\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nAnswer briefly.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhere is the café?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[On the left. 🎉<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd the cat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[The cat sits on\nthe mat.<|eot_id|>]",
    "mistral": "<s>[INST] Answer briefly.\n\nWhere is the café? [/INST]<[ On the left. 🎉</s>]>"
    "[INST] And the cat? [/INST]<[ The cat sits on\nthe mat.</s>]>",
    "gemma": "<bos><start_of_turn>user\nWhere is the café?<end_of_turn>\n"
    "<start_of_turn>model\n[On the left. 🎉<end_of_turn>]\n<start_of_turn>user\nAnd the cat?<end_of_turn>\n"
    "<start_of_turn>model\n[The cat sits on\nthe mat.<end_of_turn>]\n",
    "zephyr": "<|system|>\nAnswer briefly.</s>\n<|user|>\nWhere is the café?</s>\n"
    "<|assistant|>\n[On the left. 🎉</s>]\n<|user|>\n And the cat? </s>\n"
    "<|assistant|>\n[The cat sits on\nthe mat.</s>]\n",
    "deepseek": "<｜begin▁of▁sentence｜>Answer briefly.<｜User｜>Where is the café?"
    "<｜Assistant｜>[On the left. 🎉<｜end▁of▁sentence｜>]<｜User｜> And the cat? "
    "<｜Assistant｜>[The cat sits on\nthe mat.<｜end▁of▁sentence｜>]",
}
PROMPTS = {
    "chatml": " And the cat? <|im_end|>\n<|im_start|>assistant\n",
    "llama 3": "And the cat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] And the cat? [/INST]",
    "gemma": "And the cat?<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": " And the cat? </s>\n<|assistant|>\n",
    "deepseek": "<｜User｜> And the cat? <｜Assistant｜>",
}


def bracketed(rendered, name):
    """Returns the text with brackets around the assistant's turns."""
    opening, closing = ("<[", "]>") if name == "mistral" else ("[", "]")
    text, done = "", 0
    for start, stop in rendered.assistant:
        text += rendered.text[done:start] + opening + rendered.text[start:stop] + closing
        done = stop
    return text + rendered.text[done:]


def plain(source, **changes):
    return ChatTemplate(source, {"eos_token": "</s>"}, **changes)


@pytest.mark.parametrize("name", STYLES)
def test_a_style_renders_correctly_and_the_assistants_turns_are_found(name):
    style = STYLES[name]
    template = ChatTemplate.of(style.tokenizer)
    assert template.marks_the_assistant == (name == "chatml")
    assert bracketed(template.render(style.conversation), name) == GOLDEN[name]
    prompt = template.render(style.conversation[:-1], add_generation_prompt=True)
    assert prompt.text.endswith(PROMPTS[name])
    whole = template.render(style.conversation)
    assert whole.text.startswith(prompt.text)
    assert prompt.assistant == whole.assistant[:-1]
    assert whole.assistant[-1][0] == len(prompt.text), "a turn begins after the generation prompt"


@pytest.mark.parametrize("name", STYLES)
def test_the_assistants_tokens_are_answers_and_end_of_turn_tokens(name):
    style = STYLES[name]
    template = ChatTemplate.of(style.tokenizer)
    chat = encode_chat(style.tokenizer, template, style.conversation)
    assert len(chat.assistant_T) == len(chat.tokens)
    ids = chat.tokens.ids_T[chat.assistant_T]
    said = [message["content"] for message in style.conversation if message["role"] == "assistant"]
    assert [text.strip() for text in style.tokenizer.decode(ids).split("\n", 1)]  # both lines decode to text
    assert style.tokenizer.decode(ids).replace(" ", "") == "".join(said).replace(" ", "")
    (edges,) = np.nonzero(np.diff(chat.assistant_T.astype(int)) == -1)
    ends = {int(chat.tokens.ids_T[i]) for i in (*edges, np.nonzero(chat.assistant_T)[0][-1])}
    spelled = {"<end_of_turn>"} if name == "gemma" else {style.named["eos_token"]}
    assert {style.tokenizer.pieces([i])[0] for i in ends} == spelled
    prompt = encode_chat(style.tokenizer, template, style.conversation[:-1], add_generation_prompt=True)
    np.testing.assert_array_equal(chat.tokens.ids_T[: len(prompt.tokens)], prompt.tokens.ids_T)


def test_marks_and_prefixes_find_the_same_turns():
    marked = STYLES["chatml"]
    unmarked = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    by_prefixes = ChatTemplate(unmarked, marked.named, marked.tokenizer.control_tokens)
    assert not by_prefixes.marks_the_assistant
    assert by_prefixes.render(CONVERSATION) == ChatTemplate.of(marked.tokenizer).render(CONVERSATION)


def test_a_byte_tokenizer_can_take_any_template():
    chat = encode_chat(BytesTokenizer(), plain(CHATML), CONVERSATION)
    assert bytes(chat.tokens.ids_T[chat.assistant_T].tolist()).decode() == (
        "On the left. 🎉<|im_end|>The cat sits on\nthe mat.<|im_end|>"
    )


def test_spaces_within_an_answer_are_kept_and_those_after_its_end_dropped():
    source = "{% for m in messages %}{{ m.role + ':' + m.content + '</s> \n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "  so \n"}]
    for control, end in (((), "</s> \n"), (("</s>",), "</s>")):
        rendered = ChatTemplate(source, {}, control).render(messages)
        ((start, stop),) = rendered.assistant
        assert rendered.text[start:stop] == "  so \n" + end


def test_marks_inside_macros_blocks_and_captured_text_are_followed():
    source = """\
{%- macro turn(m) %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endmacro %}
{%- set said %}{% for m in messages %}[{% if m.role == 'assistant' %}{{ turn(m) }}{% else %}{{ m.content }}\
{% endif %}]{% endfor %}{% endset %}{{ 'é' + said }}"""
    rendered = plain(source).render(CONVERSATION)
    assert [rendered.text[a:b] for a, b in rendered.assistant] == [
        "On the left. 🎉</s>",
        "The cat sits on\nthe mat.</s>",
    ]


def test_templates_find_the_functions_and_variables_they_expect():
    source = (
        "{{ messages | tojson }}|{{ strftime_now('%d %b %Y') }}|{{ tools | tojson(indent=1) }}|{{ documents is none }}"
        "|{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
        "|{% generation %}x{% endgeneration %}|{{ unknown is defined }}|{{ style }}"
    )
    now = datetime.datetime(2026, 3, 9, 12, 0, 0)
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]
    text = plain(source, now=now).render(messages, tools=[{"name": "f"}], style="s").text
    assert text == (
        '[{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]|09 Mar 2026|'
        '[\n {\n  "name": "f"\n }\n]|True|<é>|x|False|s'
    )


def test_the_default_time_is_now():
    text = plain("{{ strftime_now('%Y') }}{% generation %}x{% endgeneration %}").render(CONVERSATION).text
    assert abs(int(text[:-1]) - datetime.datetime.now().year) <= 1


def test_content_parts_reach_the_template_without_their_media():
    source = (
        "{% for m in messages %}{% for p in m.content %}{{ '<image>' if 'image' in p else p.text }}"
        "{{ p.image if p.image is string }};{% endfor %}{% endfor %}"
    )
    content = [
        {"type": "text", "text": "What is"},
        {"type": "image", "image": np.zeros((2, 2))},
        {"type": "image", "image": "a.png"},
    ]
    rendered = plain(source).render([{"role": "user", "content": content}], add_generation_prompt=True)
    assert rendered.text == "What is;<image><medium>;<image>a.png;"


def test_keys_without_a_value_are_left_out():
    source = "{% for m in messages %}{{ m.content is defined }} {{ m.tool_calls is defined }};{% endfor %}"
    messages = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ]
    assert plain(source).render(messages).text == "True False;False True;"


def test_templates_are_found_by_name_and_in_their_own_file(tmp_path):
    named = {
        "eos_token": "<|eos|>",
        "chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}],
    }
    tokenizer = of_library(byte_level(), config=named)
    prompt = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}
    assert ChatTemplate.of(tokenizer, "rag").render(**prompt).text == "r"
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert ChatTemplate.of(type(tokenizer).load(tmp_path)).render(**prompt).text == "of a processor"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert ChatTemplate.of(type(tokenizer).load(tmp_path)).render(**prompt).text == "from the file"
    with pytest.raises(UserError, match="chat template of tokenizer 'small'='plan' is unknown; valid: default, rag"):
        ChatTemplate.of(tokenizer, "plan")
    for without in (BytesTokenizer(), of_library(byte_level())):
        with pytest.raises(UserError, match="comes without a chat template; give one"):
            ChatTemplate.of(without)


def test_templates_can_be_pickled():
    template = ChatTemplate.of(STYLES["llama 3"].tokenizer, now=datetime.datetime(2026, 1, 1))
    copy = pickle.loads(pickle.dumps(template))
    assert copy.render(CONVERSATION) == template.render(CONVERSATION)


# Errors

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }", r"does not compile: line 2: unexpected '}'"),
        ("{% for m in messages %}", "does not compile: line 1: Unexpected end of template"),
        ("{{ x | nofilter }}", "does not compile: line 1: No filter named 'nofilter'"),
        ("{% generation %}x", "does not compile: line 1: Unexpected end of template"),
    ],
)
def test_a_template_that_does_not_compile_is_one_line(source, message):
    with pytest.raises(UserError, match=f"the chat template {message}"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation is empty"),
        ([USER, {"role": "bot", "content": "b"}], r"message 1: role='bot' is unknown; valid: system, developer, user"),
        ([USER], "the conversation has no turn of the assistant, only user: there is nothing to learn in it"),
        ([USER, "b"], "message 1 is a str, not an object with role and content"),
        ([{"content": "a"}, ANSWER], "message 0 has no role; valid: system"),
        ([{"role": "user", "content": None}, ANSWER], "message 0 of the user has no content"),
        ([{"role": "user", "content": 3}, ANSWER], "message 0: its content is a int, neither a text nor a list"),
        ([{"role": "user", "content": ["a"]}, ANSWER], "message 0: its content is a list, neither a text nor a list"),
        ([USER, {**ANSWER, "tool_calls": [{1, 2}]}], "message 1 holds a set, which is neither text, number, list"),
        ([USER, {"role": "assistant", "content": "\ufdd0"}], r"holds U\+FDD0 or U\+FDD1, which is no text"),
    ],
)
def test_a_malformed_conversation_is_one_line(messages, message):
    with pytest.raises(UserError, match=message):
        plain(CHATML).render(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only\nin turns') }}", "refuses the conversation: only in turns"),
        ("{{ messages[9].content.upper() }}", "refuses the conversation: list object has no element 9"),
        ("{{ 'a' + 3 }}", "fails: TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ messages.append('x') }}", "refuses the conversation: .*append.* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: access to attribute '__class__'"),
        (
            "{% set ns = namespace() %}{% set ns.__class__ = 3 %}",
            "refuses the conversation: .*private name '__class__'",
        ),
        ("{{ range(10000000) | list }}", "fails: OverflowError: Range too big"),
        (
            "{{ messages[-1].content }}",
            "does not let the assistant's turns be found: what it makes of the messages before number 1 is not the "
            "beginning of the whole; put the assistant's turns between {% generation %} and {% endgeneration %}",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '!' if loop.last }}{% endfor %}",
            "messages before number 1 is not the beginning",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "the chat template writes nothing for message 1 of the assistant",
        ),
        (
            "x{% for m in messages if false %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "the chat template marks no turn of the assistant with {% generation %}",
        ),
        (
            "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
            "marks cannot be followed: they are nested",
        ),
        (
            "{% set x %}{% generation %} x {% endgeneration %}{% endset %}{{ x | trim }}",
            "marks cannot be followed: .*changes the text around them, for example with a filter",
        ),
        (
            "{% set x %}{% generation %}x{% endgeneration %}{% endset %}{{ x | reverse }}",
            "marks cannot be followed",
        ),
    ],
)
def test_a_template_that_fails_on_a_conversation_is_one_line(source, message):
    with pytest.raises(UserError, match=message) as caught:
        plain(source).render([USER, ANSWER])
    assert "\n" not in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_needs_marks():
    """Templates of reasoning models do so: they drop the reasoning of earlier turns."""
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] if not loop.last else m.content }};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    thinking = [USER, {"role": "assistant", "content": "<think>so</think>b"}]
    assert plain(source).render(thinking).assistant == (
        (len("user:a;assistant:"), len("user:a;assistant:<think>so</think>b;")),
    )
    with pytest.raises(UserError, match="up to and with number 1 is not the beginning of the whole"):
        plain(source).render([*thinking, USER, ANSWER])


def test_a_system_turn_is_refused_by_a_style_without_that_role():
    with pytest.raises(UserError, match="refuses the conversation: no system role"):
        ChatTemplate.of(STYLES["gemma"].tokenizer).render(CONVERSATION)


def test_a_tokenizer_that_drops_the_answer_is_refused():
    content = json.loads(byte_level().to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "b"}, "content": ""}
    tokenizer = of_library(byte_level())
    texts = {**tokenizer.files, "tokenizer.json": json.dumps(content)}
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}\
{% endgeneration %}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="'dropping' has no token for anything that the assistant says"):
        encode_chat(type(tokenizer)(texts, "dropping"), plain(source), [USER, ANSWER])


# Agreement with transformers


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def theirs(transformers, folder, style: Style):
    style.tokenizer.save(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


CONVERSATIONS = (
    WITHOUT_SYSTEM,
    WITHOUT_SYSTEM[:2],
    ({"role": "user", "content": "12345  spaces\n\n"}, {"role": "assistant", "content": "  é🎉\n"}),
    ({"role": "user", "content": "a </s> b <|im_end|> c"}, {"role": "assistant", "content": "<s>"}),
)


@pytest.mark.parity
@pytest.mark.parametrize("name", STYLES)
def test_ids_are_those_of_transformers(transformers, tmp_path, name):
    style = STYLES[name]
    other, template = theirs(transformers, tmp_path, style), ChatTemplate.of(style.tokenizer)
    assert len(other) == style.tokenizer.vocab_size
    assert set(other.all_special_ids) <= {
        style.tokenizer._text.token_to_id(t) for t in (*template.control_tokens, "<unk>")
    }
    for messages in (style.conversation, *CONVERSATIONS):
        chat = encode_chat(style.tokenizer, template, messages)
        assert chat.text == other.apply_chat_template(list(messages), tokenize=False)
        expected = other.apply_chat_template(list(messages), return_assistant_tokens_mask=name == "chatml")
        np.testing.assert_array_equal(chat.tokens.ids_T, expected["input_ids"])
        if name == "chatml":
            np.testing.assert_array_equal(chat.assistant_T, np.array(expected["assistant_masks"], bool))
        assert style.tokenizer.decode(chat.tokens.ids_T) == other.decode(
            expected["input_ids"], skip_special_tokens=True
        )
        prompt = encode_chat(style.tokenizer, template, messages[:-1], add_generation_prompt=True)
        expected = other.apply_chat_template(list(messages[:-1]), add_generation_prompt=True)
        np.testing.assert_array_equal(prompt.tokens.ids_T, expected["input_ids"])
