"""Each public format of conversations is read without conversion."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import Columns
from anyexperts_jax.data.conversation import Conversation, Document, Medium, Text
from anyexperts_jax.data.records import Reading, read_record


def png(colour, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples=800):
    buffer = io.BytesIO()
    wavfile.write(buffer, 16000, np.full(samples, 1000, np.int16))
    return buffer.getvalue()


FILES = {"red.png": png("red"), "blue.png": png("blue"), "a.wav": wav()}
RED = base64.b64encode(FILES["red.png"]).decode()
SOUND = base64.b64encode(FILES["a.wav"]).decode()


def read(row, **options):
    def file(path):
        if path not in FILES:
            raise UserError(f"there is no file {path}")
        return FILES[path]

    return read_record(row, Reading("mine", "file row", file, **options))


def outline(item):
    """Returns roles and parts: a text as it is, a medium as its kind and its shape or first pixel."""
    return [(m.role, [p.text if isinstance(p, Text) else shown(p) for p in m.parts]) for m in item.messages]


def shown(medium: Medium):
    if medium.kind == "audio":
        return f"audio {len(medium.values)}"
    return f"{medium.kind} {'red' if medium.values.reshape(-1, 3)[0][0] else 'blue'}"


ASKED = [("user", ["image red", "What?"]), ("assistant", ["red"])]
TWO = [("user", ["First ", "image red", " and ", "image blue", "?"]), ("assistant", ["red, blue"])]


def chat(*content, answer="red"):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]}


def text(words):
    return {"type": "text", "text": words}


FORMS = {
    "transformers": (chat({"type": "image", "image": "red.png"}, text("What?")), ASKED),
    "transformers path": (chat({"type": "image", "path": "red.png"}, text("What?")), ASKED),
    "transformers url": (chat({"type": "image", "url": f"data:image/png;base64,{RED}"}, text("What?")), ASKED),
    "transformers, null keys": (chat({"type": "image", "image": "red.png", "text": None}, text("What?")), ASKED),
    "row's images": ({**chat({"type": "image"}, text("What?")), "images": ["red.png"]}, ASKED),
    "bytes": (chat({"type": "image", "image": {"bytes": FILES["red.png"], "path": None}}, text("What?")), ASKED),
    "openai": (
        chat(
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED}", "detail": "low"}}, text("What?")
        ),
        ASKED,
    ),
    "openai audio": (
        chat({"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}}, answer="hm"),
        [("user", ["audio 800"]), ("assistant", ["hm"])],
    ),
    "plain strings": (
        {
            "messages": [
                {"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "a"), ("assistant", "b"))
            ]
        },
        [("system", ["Be brief."]), ("user", ["a"]), ("assistant", ["b"])],
    ),
    "llava": (
        {
            "image": "red.png",
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}],
        },
        ASKED,
    ),
    "llava, two": (
        {
            "image": ["red.png", "blue.png"],
            "conversations": [
                {"from": "human", "value": "First <image> and <image>?"},
                {"from": "gpt", "value": "red, blue"},
            ],
        },
        TWO,
    ),
    "two in one question": (
        chat(
            text("First "),
            {"type": "image", "image": "red.png"},
            text(" and "),
            {"type": "image", "image": "blue.png"},
            text("?"),
            answer="red, blue",
        ),
        TWO,
    ),
    "question and answer": ({"image": "red.png", "question": "What?", "answer": "red"}, ASKED),
    "a number as the answer": ({"question": "1+1?", "answer": 2}, [("user", ["1+1?"]), ("assistant", ["2"])]),
    "transcript": ({"audio": "a.wav", "text": "hm"}, [("user", ["audio 800"]), ("assistant", ["hm"])]),
}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS)
def test_each_format_is_read(row, expected):
    item = read(row)
    assert isinstance(item, Conversation)
    assert outline(item) == expected


def test_text_alone_is_a_document():
    assert read({"text": "words", "id": 3}) == Document("mine", "words", "file row")


def test_the_configuration_names_the_columns():
    columns = Columns(question="prompt", answer="label")
    item = read({"prompt": "which?", "label": 1}, columns=columns, labels={"label": ["no", "yes"]})
    assert outline(item) == [("user", ["which?"]), ("assistant", ["yes"])]
    assert outline(read({"question": "a", "answer": "b"}, columns=columns))[1] == ("assistant", ["b"]), (
        "the default names"
    )


def test_evidence_is_kept():
    parts = [
        {"type": "image", "image": "red.png", "evidence": [[0, 0, 4, 8]]},
        {"type": "audio", "audio": "a.wav", "evidence": [[0.0, 0.02]]},
        {"type": "text", "text": "find it", "evidence": [[5, 7]]},
    ]
    image, audio, words = read(chat(*parts)).messages[0].parts
    assert image.evidence[:, :4].all()
    assert not image.evidence[:, 4:].any()
    assert audio.evidence == ((0.0, 0.02),)
    assert words.evidence == ((5, 7),)


WRONG = {
    "no columns": ({"prompt": "a", "output": "b"}, r"no column 'question'.*its columns are prompt, output"),
    "no answer": ({"question": "a"}, r"no column 'answer'"),
    "unknown role": (
        {"messages": [{"role": "human", "content": "a"}]},
        r"message 0: role='human' is unknown; valid: system, developer, user",
    ),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, r"no turn of the assistant, only user"),
    "assistant says nothing": (chat(text("a"), answer=""), r"message 1: the assistant says nothing"),
    "empty": ({"messages": []}, r"the conversation is empty"),
    "not a list": ({"messages": "hello"}, r"messages must be a list of objects, not str"),
    "unknown part": (chat({"type": "picture", "image": "red.png"}), r"message 0, part 0: type='picture' is unknown"),
    "unknown key": (chat({"type": "text", "txt": "a"}), r"message 0, part 0 has unknown keys txt"),
    "no such file": (chat({"type": "image", "image": "no.png"}), r"there is no file no.png"),
    "not a picture": (chat({"type": "image", "image": "a.wav"}), r"cannot read the picture in a.wav"),
    "on the web": (chat({"type": "image", "url": "https://x/y.png"}), r"https://x/y.png is on the web; download it"),
    "not base64": (chat({"type": "image", "base64": "%%"}), r"its data is not base64"),
    "too few pictures": ({**chat({"type": "image"}), "images": []}, r"points to another image, but the row holds 0"),
    "too many pictures": ({**chat(text("a")), "images": ["red.png"]}, r"holds 1 of image, but its messages point to 0"),
    "llava role": (
        {"conversations": [{"from": "bot", "value": "a"}]},
        r"message 0: from='bot' is unknown; valid: human, gpt",
    ),
    "evidence outside": (chat({"type": "text", "text": "ab", "evidence": [[1, 9]]}), r"\(1, 9\) is outside the text"),
    "box outside": (
        chat({"type": "image", "image": "red.png", "evidence": [[0, 0, 99, 4]]}),
        r"box \[0, 0, 99, 4\] is outside the picture of 8 x 8",
    ),
    "level": ({"question": "a", "answer": "b", "level": 7}, r"level=7 is unknown"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_a_malformed_record_is_refused_in_one_line(row, message):
    with pytest.raises(UserError, match=message) as caught:
        read(row)
    assert "\n" not in str(caught.value)
