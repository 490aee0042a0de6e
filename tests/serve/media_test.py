"""A published model that sees and hears behind the server: each answer is that of `generate` alone."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pretrained.tiny_omni import MARKS, TEMPLATE, omni_checkpoint
from pretrained.tiny_vl import vl_checkpoint

from anyexperts_jax import load_pretrained
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.wav_file import write_wav
from anyexperts_jax.pretrained.pictures import Video
from anyexperts_jax.serve.engine import Engine, Finished
from anyexperts_jax.serve.model import serve_pretrained
from serve.tiny import job, text_of

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from anyexperts_jax.tokenizers.train import train_tokenizer

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 21, 37, 3), np.uint8)
FILM = np.random.default_rng(1).integers(0, 256, (4, 16, 24, 3), np.uint8)
LENGTH, NEW = 128, 6


def with_tokenizer(folder):
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300, special=MARKS).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = with_tokenizer(omni_checkpoint(tmp_path_factory.mktemp("hub") / "omni", seed=1))
    write_wav(folder / "a.wav", (0.1 * np.random.default_rng(0).standard_normal(4000)).astype(np.float32))
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return load_pretrained(with_tokenizer(vl_checkpoint(tmp_path_factory.mktemp("hub") / "vl")))


@pytest.fixture(scope="module")
def served(model):
    return serve_pretrained(model, "mine")


def image_of(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image(number=0):
    return {"type": "image_url", "image_url": {"url": image_of(PIXELS[number])}}


def sound(model):
    data = base64.b64encode((model.path / "a.wav").read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def film(frames=FILM, fps=None):
    """Frames as vLLM takes them, as base64 between commas."""
    parts = [image_of(frame).partition(",")[2] for frame in frames]
    url = f"data:video/png;base64,{','.join(parts)}"
    return {"type": "video_url", "video_url": {"url": url} | ({} if fps is None else {"fps": fps})}


def moving_file():
    """An animated GIF of the film, a quarter of a second for a frame."""
    file = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in FILM]
    first.save(file, "gif", save_all=True, append_images=rest, duration=250)
    return file.getvalue()


def film_file():
    url = f"data:video/gif;base64,{base64.b64encode(moving_file()).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


TEXT = {"type": "text", "text": "Hello"}


def asks(model):
    """(messages of a request, budget, media for `generate` in the place of theirs)."""
    wave = str(model.path / "a.wav")
    return [
        ([{"role": "user", "content": "Hello world"}], None, {}),
        ([{"role": "user", "content": [image(), TEXT]}], None, {"images": [PIXELS[0]]}),
        ([{"role": "user", "content": [TEXT, sound(model)]}], 2.0, {"audios": [wave]}),
        ([{"role": "user", "content": [image(1), sound(model), image(), TEXT]}], None,
         {"images": [PIXELS[1], PIXELS[0]], "audios": [wave]}),
    ]  # fmt: skip


def asks_about_films():
    return [
        ([{"role": "user", "content": [film(fps=4), TEXT, image()]}], None,
         {"images": [PIXELS[0]], "videos": [Video(FILM, 4)]}),
        ([{"role": "user", "content": [film(), TEXT]}], None, {"videos": [Video(FILM, 2.0)]}),
        ([{"role": "user", "content": [film_file(), TEXT]}], None, {"videos": [Video(moving_file())]}),
    ]  # fmt: skip


def for_generate(messages):
    """The same conversation with parts that stand for what is given beside it."""
    kinds = {"image_url": "image", "input_audio": "audio", "video_url": "video"}
    return [
        {"role": message["role"], "content": message["content"] if isinstance(message["content"], str) else [
            part if part["type"] == "text" else {"type": kinds[part["type"]]} for part in message["content"]
        ]}
        for message in messages
    ]  # fmt: skip


def check_answers(model, served, cases):
    """Checks that answers given in one batch are those of `generate` to each prompt alone."""
    engine = Engine(
        served.weights, served.tokenizer, served.stop_ids, slots=3, length=LENGTH, watch=lambda name, amount: None
    )
    events = [[] for _ in cases]
    for own, (messages, budget, _) in zip(events, cases, strict=True):
        engine.submit(job(served, served.reader.chat(messages), NEW, budget, own))
    while engine.step():
        pass
    for own, (messages, budget, media) in zip(events, cases, strict=True):
        many = {name: [given] for name, given in media.items()}
        alone = model.generate_many([for_generate(messages)], max_new_tokens=NEW, budget=budget, **many)
        assert text_of(own) == alone.texts[0]
        (end,) = [event for event in own if isinstance(event, Finished)]
        assert end.usage.completion_tokens == len(alone.decoded.tokens[0])
        assert end.usage.real_experts == pytest.approx(alone.decoded.real_experts)


@pytest.mark.slow
def test_answers_in_company_are_those_of_generate_alone(model, served):
    check_answers(model, served, asks(model))


@pytest.mark.slow
def test_answers_about_videos_are_those_of_generate_alone(seeing):
    check_answers(seeing, serve_pretrained(seeing, "mine"), asks_about_films())


def test_a_model_without_ears_says_what_it_reads(seeing):
    reader = serve_pretrained(seeing, "mine").reader
    assert reader.media == ("image", "video")
    assert reader.chat([{"role": "user", "content": [image(), TEXT]}]).placed is not None
    wave = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    with pytest.raises(UserError, match=r"type='input_audio'; this model reads text, image_url, video_url"):
        reader.chat([{"role": "user", "content": [wave]}])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "the server fetches nothing"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,####"}}, "not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, r"content\[0\]"),
        ({"type": "video_url", "video_url": {"url": "data:"}}, r"give the video as a data URL, data:video/mp4"),
        ({"type": "video_url", "video_url": {"url": "https://a.b/c.mp4"}}, "the server fetches nothing"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,####"}}, "not base64"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "video 0: "),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA", "fps": 2}}, "the file says it"),
        ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA,AAAA"}}, "video 0, frame 0: "),
        ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,,"}}, "video 0, frame 0: "),
        (
            {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA", "fps": 5e-324}},
            "from 0.001 to 1000",
        ),
        ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA", "fps": "two"}}, "a number > 0"),
        ({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA", "fps": True}}, "a number > 0"),
        ({"type": "image_url", "image_url": {"url": "data:video/mp4;base64,AAAA"}}, "give the picture as a data URL"),
        ({"type": "smell", "smell": 1}, "this model reads text, image_url, video_url, input_audio"),
    ],
)
def test_what_cannot_be_read(served, part, message):
    with pytest.raises(UserError, match=message) as error:
        served.reader.chat([{"role": "user", "content": [part]}])
    assert "\n" not in str(error.value)


def test_a_prompt_that_its_media_make_too_long(served, model):
    wide = np.zeros((64, 1000, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "png")
    part = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens with its media, the model 128 positions"):
        served.reader.chat([{"role": "user", "content": [part] * 6}])


@pytest.mark.slow
def test_over_http(served, model):
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    import http.client

    from anyexperts_jax.serve.run import in_thread, make_service

    messages, _, media = asks(model)[1]
    body = json.dumps({"model": "mine", "messages": messages, "max_tokens": NEW, "temperature": 0})
    with in_thread(make_service(served, slots=3, length=LENGTH)) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        connection.request("GET", "/v1/models")
        (card,) = json.loads(connection.getresponse().read())["data"]
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
    assert card["modalities"] == ["text", "image", "video", "audio"]
    alone = model.generate(for_generate(messages), max_new_tokens=NEW, **media)
    assert answer["choices"][0]["message"]["content"] == alone
