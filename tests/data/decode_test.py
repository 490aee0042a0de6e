"""Tables of pictures, videos and sounds of every kind: what each decodes to, or how it is refused."""

import io
import pathlib
import struct
import sys
import tempfile
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import decode, sound_file
from anyexperts_jax.data.decode import decode_audio, decode_film_file, decode_picture, decode_video
from anyexperts_jax.data.example import SAMPLE_RATE
from anyexperts_jax.data.video_file import read_video

NAN = float("nan")


def png(image, **options):
    return encoded(image, "PNG", **options)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def wav(samples, rate=SAMPLE_RATE):
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, samples)
    return buffer.getvalue()


def short(value):
    """Returns a short name for a case, because pytest would print bytes in full."""
    return value[:24] if isinstance(value, str) else type(value).__name__


def grey(values, dtype):
    return Image.fromarray(np.array(values, dtype))


def transparent(mode, colour):
    return Image.new(mode, (1, 1), colour)


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    return png(image, transparency=0)


MODES = [  # the picture, and the red, green and blue of its pixels in order
    (Image.new("1", (1, 1), 1), [255, 255, 255]),
    (Image.new("L", (1, 1), 77), [77, 77, 77]),
    (Image.new("RGB", (1, 1), (1, 2, 3)), [1, 2, 3]),
    (palette_with_transparency(), [255, 255, 255, 200, 100, 0]),
    (transparent("RGBA", (200, 0, 0, 0)), [255, 255, 255]),
    (transparent("RGBA", (0, 0, 0, 128)), [127, 127, 127]),
    (transparent("LA", (0, 0)), [255, 255, 255]),
    (png(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9)), [255, 255, 255]),
    (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [255, 0, 0]),
    (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF"), [0, 0, 0] * 64),
    (grey([[0, 257, 32768, 65535]], np.uint16), [0] * 3 + [1] * 3 + [128] * 3 + [255] * 3),
    (png(grey([[0, 257, 32768, 65535]], np.uint16)), [0] * 3 + [1] * 3 + [128] * 3 + [255] * 3),
    (encoded(grey([[100]], np.uint16), "TIFF"), [0] * 3),  # the mode holds 16 bits, so 100 is nearly black
    (grey([[0, 128, 255]], np.int32), [0] * 3 + [128] * 3 + [255] * 3),
    (grey([[0, 32768, 65535]], np.int32), [0] * 3 + [128] * 3 + [255] * 3),
    (grey([[0.0, 0.5, 1.0]], np.float32), [0] * 3 + [128] * 3 + [255] * 3),
    (grey([[0.0, 128.0, 255.0]], np.float32), [0] * 3 + [128] * 3 + [255] * 3),
]


@pytest.mark.parametrize(("picture", "expected"), MODES, ids=short)
def test_a_picture_of_any_mode_is_decoded(picture, expected):
    pixels = decode_picture(picture, "here")
    assert pixels.dtype == np.uint8
    assert pixels.reshape(-1).tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_by_their_exif_orientation(orientation):
    """Stores a red pixel with a blue one to its right as a rotated camera would, with the matching EXIF tag."""
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0, 0], upright[0, 1] = (255, 0, 0), (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    tags = Image.Exif()
    tags[0x0112] = orientation
    found = decode_picture(png(Image.fromarray(np.ascontiguousarray(stored)), exif=tags), "here")
    np.testing.assert_array_equal(found, upright)


ARRAYS = [
    (np.array([[[0, 100, 255]]], np.uint8), [0, 100, 255]),
    ([[[0, 100, 255]]], [0, 100, 255]),
    (np.array([[[0, 32768, 65535]]], np.uint16), [0, 128, 255]),
    (np.array([[[0.0, 0.5, 1.0]]]), [0, 128, 255]),
    (np.array([[[0.0, 0.5, 1.0]]], np.float16), [0, 128, 255]),
    (np.array([[[0.0, 127.6, 255.0]]], np.float32), [0, 128, 255]),
    (np.array([[[True, False, True]]]), [255, 0, 255]),
]


@pytest.mark.parametrize(("values", "expected"), ARRAYS)
def test_pixel_arrays_are_scaled_by_type_and_range(values, expected):
    assert decode_picture(values, "here").tolist() == [[expected]]
    assert decode_video([values, values], "here").tolist() == [[[expected]], [[expected]]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [3, 4]], r"here: pixels of shape \(2, 2\) must have 3 axes, the last of size 3"),
        ([[[1, 2, 300]]], r"here: pixels must be in \[0, 255\]; these are from 1 to 300"),
        ([[[-1, 2, 3]]], r"here: pixels must be in \[0, 255\]; these are from -1 to 3"),
        ([[[0.0, 0.5, NAN]]], "here: pixels must be finite; 1 of 3 are missing, NaN or infinite"),
        ([[[0.0, None, 1.0]]], "here: pixels must be finite; 1 of 3 are missing"),
        ([[[0.0, -0.5, 1.0]]], r"here: pixels in floats must be in \[0, 1\] or \[0, 255\]; these are from -0.5 to 1"),
        ([[[0.0, 65535.0, 1.0]]], r"here: pixels in floats must be in .* to 65535"),
        ([[[1, 2, 3]], [[1, 2]]], "here: pixels must be numbers of one shape"),
        (np.zeros((0, 4, 3), np.uint8), r"here: there are no pixels in shape \(0, 4, 3\)"),
        ([[["a", "b", "c"]]], "here: pixels must be numbers, not <U1"),
        ({"a": 1}, "here: pixels must be numbers, not object"),
        (grey([[0, 70000]], np.int32), r"here: pixels must be in \[0, 255\]; these are from 0 to 70000"),
        (grey([[0, NAN]], np.float32), "here: pixels must be finite"),
        (b"", "cannot read the picture in here: "),
        (b"text", "cannot read the picture in here: Pillow knows no such format"),
        (pathlib.Path("/no/such/file.png"), "cannot read the picture in here: No such file or directory"),
        (png(Image.new("RGB", (99, 99)))[:60], "cannot read the picture in here: "),
    ],
    ids=short,
)
def test_unusable_pictures_are_refused(values, message):
    with pytest.raises(UserError, match=message) as refused:
        decode_picture(values, "here")
    assert "\n" not in str(refused.value)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    for side in (20_000, 12_000):  # Pillow refuses the first, and warns of the second
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = bytearray(png(Image.new("RGB", (1, 1))))
        bomb[16:29] = header
        bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
        with pytest.raises(UserError, match="the picture in here has more than 89,478,485 pixels; scale it down"):
            decode_picture(bytes(bomb), "here")


def test_video_arrays_are_decoded():
    red, blue = Image.new("RGB", (2, 1), (255, 0, 0)), Image.new("RGB", (2, 1), (0, 0, 255))
    expected = [[[[255, 0, 0]] * 2], [[[0, 0, 255]] * 2]]
    assert decode_video([red, png(blue)], "here").tolist() == expected
    assert decode_video(encoded(red, "GIF", save_all=True, append_images=[blue]), "here").tolist() == expected
    assert decode_video(png(red, save_all=True, append_images=[blue]), "here").tolist() == expected
    with pytest.raises(UserError, match="here: frames of one film differ in size: 2 x 1, 3 x 1 pixels"):
        decode_video([red, Image.new("RGB", (3, 1))], "here")
    with pytest.raises(UserError, match="cannot read the picture in here, frame 1: "):
        decode_video([red, b"text"], "here")
    with pytest.raises(UserError, match=r"cannot read the film in here: .*animated GIF, PNG or WebP"):
        decode_video(b"\0\0\0\x18ftypmp42", "here")
    with pytest.raises(UserError, match=r"here: pixels of shape \(1, 1, 3\) must have 4 axes"):
        decode_video([[[1, 2, 3]]], "here")


def test_a_video_is_sampled_at_the_frame_rate_asked_for():
    red, blue = Image.new("RGB", (2, 1), (255, 0, 0)), Image.new("RGB", (2, 1), (0, 0, 255))
    shown = {"save_all": True, "append_images": [blue]}
    frames, rate = decode_film_file(encoded(red, "GIF", duration=[100, 300], **shown), "here", 8)
    assert rate == pytest.approx(2 / 0.4)
    assert frames.tolist() == [[[[255, 0, 0]] * 2], [[[0, 0, 255]] * 2]]
    with pytest.raises(UserError, match="the film in here does not say how long its frames are shown; give them and"):
        decode_film_file(encoded(red, "GIF", **shown), "here", 8)
    frames, rate = decode_film_file(film(range(0, 120, 20)), "here", 3)  # six frames in 1.2 seconds
    assert len(frames) == 3
    assert rate == pytest.approx(2.5)


def film(times, form="mp4", codec="mpeg4", size=(32, 16), turned=False, options=None):
    """Encodes a video whose n-th frame has grey value 40 n and begins at `times[n]`, in hundredths of a second."""
    av = pytest.importorskip("av")
    path, tick = pathlib.Path(tempfile.mkdtemp()) / "film", Fraction(1, 100)  # `faststart` reads the file again
    with av.open(str(path), "w", format=form, options=options or {}) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = tick
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 40 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    if turned:  # a quarter turn to the right, as phones record it
        matrix = data.index(b"tkhd") + 44
        data[matrix : matrix + 36] = struct.pack(">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)
    return bytes(data)


@pytest.mark.parametrize("form", ["mp4", "mov", "avi", "matroska"])
def test_a_video_of_any_format_is_decoded(form):
    found = decode_video(film([0, 10, 20], form), "here")
    assert found.shape == (3, 16, 32, 3)
    assert np.abs(found.astype(int) - np.array([0, 40, 80]).reshape(3, 1, 1, 1)).max() <= 6


def test_frames_are_sampled_by_time_not_by_number():
    """Four frames last a second and a half; the third lasts longer than the other three together."""
    found = decode_video(film([0, 10, 20, 140]), "here")
    assert np.rint(found[:, 0, 0, 0] / 40).tolist() == [1, 2, 2, 2]
    assert np.rint(read_video(film([0, 10, 20, 30, 40, 50]), "here", 2)[:, 0, 0, 0] / 40).tolist() == [1, 4]


def test_a_video_is_turned_by_its_display_matrix():
    assert decode_video(film([0, 10], turned=True), "here").shape == (2, 32, 16, 3)


def test_a_large_video_gives_fewer_frames(monkeypatch):
    data = film([0, 10, 20, 30])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * 16 * 32)
    assert np.rint(decode_video(data, "here")[:, 0, 0, 0] / 40).tolist() == [1, 3]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 32 - 1)
    with pytest.raises(UserError, match="the film in here has frames of more than 511 pixels; scale it down"):
        decode_video(data, "here")


def sound_in_a_film():
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def without_frames():
    """Returns the header of a fragmented video, without any fragment."""
    data = film([0, 10], options={"movflags": "frag_keyframe+empty_moov"})
    return data[: data.index(b"moof") - 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sound_in_a_film, "the film in here holds no video, or was cut short; it must be"),
        (without_frames, "the film in here has no frames; it must be"),
        (lambda: film([0, 10, 20])[:300], "the film in here holds no video, or was cut short"),
        (lambda: film([0, 10, 20], options={"movflags": "faststart"})[:-40], "it was cut short, 2 frames of 3"),
        (lambda: wav(np.ones(99, np.int16)), "the film in here holds no video|cannot read the film in here"),
        (lambda: b"{}", "cannot read the film in here: .*MP4, WebM"),
        (lambda: b"", "cannot read the film in here: "),
    ],
)
def test_a_file_without_a_video_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        decode_video(make(), "here")
    assert "\n" not in str(caught.value)


def test_without_pyav_the_error_names_the_extra(monkeypatch):
    data = film([0])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"cannot read the film in here: .* needs the extra `media`: pip install 'any"):
        decode_video(data, "here")


def test_a_video_that_is_too_long_is_refused(monkeypatch):
    frames = [Image.new("RGB", (2, 1), (40 * i, 0, 0)) for i in range(4)]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert len(decode_video(film, "here")) == 4
    monkeypatch.setattr(decode, "MAX_FRAMES", 3)
    with pytest.raises(UserError, match="the film in here has more than 3 frames; take some out"):
        decode_video(film, "here")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(UserError, match="the film in here has more than 5 pixels; scale it down"):
        decode_video(film, "here")


SAMPLES = [
    (np.array([0.0, 0.5, -1.0]), [0, 0.5, -1]),
    (np.array([0.0, 0.5, 1.25], np.float32), [0, 0.5, 1]),  # a codec's overshoot
    (np.array([0, 2**14, -(2**15)], np.int16), [0, 0.5, -1]),
    ([0, 2**14, -(2**15)], [0, 0.5, -1]),  # 16-bit samples as Python integers
    (np.array([0, 2**14, -(2**15)], np.int32), [0, 0.5, -1]),
    ([0, 2**30, -(2**31)], [0, 0.5, -1]),
    (np.array([0, 64, -128], np.int8), [0, 0.5, -1]),
    (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
]


@pytest.mark.parametrize(("values", "expected"), SAMPLES)
def test_samples_are_scaled_by_type_and_range(values, expected):
    found = decode_audio(values, "here")
    assert found.dtype == np.float32
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.0], [0.5]], r"here: audio of shape \(2, 1\) must be mono"),
        ([], "here: the audio is empty"),
        ([0.0, NAN], "here: samples must be finite; 1 of 2 are missing, NaN or infinite"),
        ([0.0, float("inf")], "here: samples must be finite"),
        ([0.0, None], "here: samples must be finite"),
        ([0, None], "here: samples must be finite"),
        ([0.0, 30000.0], r"here: samples must be floats in \[-1, 1\], or integers of 16 or 32 bits; these reach 30000"),
        ([0, 2**20], "here: samples that reach 1,048,576 may be of 24 or of 32 bits; give them as floats"),
        ([0, 2**40], "here: samples that reach 1,099,511,627,776 may be of"),
        (np.array([0, 1], np.uint16), "here: samples in uint16 have no known full scale; give floats"),
        ([True, False], "here: audio must be numbers, not bool"),
        (["a"], "here: audio must be numbers, not <U1"),
        (b"text", "cannot read the sound in here: .*it must be a WAV file"),
        (pathlib.Path("/no/such/file.wav"), "cannot read the sound in here: No such file.*; it must be a WAV file"),
        (wav(np.zeros(0, np.int16)), "the sound in here is empty; give a WAV file with samples in it"),
        (wav(np.array([0, NAN], np.float32)), "here: samples must be finite; 1 of 2"),
        (wav(np.zeros(9, np.int16), rate=1), "the sound in here has 1 samples a second; valid: 1000 to 768000"),
        (wav(np.zeros(99, np.int16))[:20], "cannot read the sound in here: .*; it must be a WAV file"),
        (wav(np.zeros(99, np.int16))[:99], "cannot read the sound in here: it was cut short, 99 bytes of 242"),
    ],
    ids=short,
)
def test_unusable_sounds_are_refused(values, message):
    with pytest.raises(UserError, match=message) as refused:
        decode_audio(values, "here")
    assert "\n" not in str(refused.value)


def test_samples_at_another_rate_are_refused():
    with pytest.raises(UserError, match="here: audio at 8000 Hz must be resampled to 16000 Hz"):
        decode_audio([0.0], "here", 8000)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64, ">i2"])
def test_a_wav_file_of_any_sample_type_is_read(dtype):
    silence, half = (128, 192) if dtype == np.uint8 else (0, 0.5)
    if np.dtype(dtype).kind == "i":
        half = -np.iinfo(dtype).min // 2
    samples = np.repeat(np.array([silence, half], dtype), 200)
    found = decode_audio(wav(np.stack([samples, samples], axis=1)), "here")
    np.testing.assert_allclose(found, np.repeat([0, 0.5], 200), atol=1e-4)


def test_sound_files_are_resampled_to_our_rate():
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
    found = decode_audio(wav((tone * 2**14).astype(np.int16), 44_100), "here")
    expected = np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE) / 2
    assert found.shape == (SAMPLE_RATE,)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=3e-3)


def test_a_wav_file_without_a_length_is_read_to_its_end():
    data = bytearray(wav(np.full(300, 2**14, np.int16)))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(decode_audio(bytes(data), "here")) == 300


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 44_101])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_number_of_channels_are_read(rate, channels):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    found = decode_audio(wav(np.repeat(tone[:, None], channels, axis=1).astype(np.float32), rate), "here")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE)
    assert abs(len(found) - len(expected)) <= 1
    np.testing.assert_allclose(found[500:7000], expected[500:7000], atol=2e-3)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "DOUBLE"), ("WAV", "ULAW"), ("WAV", "ALAW"),
     ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("FLAC", "PCM_S8"), ("FLAC", "PCM_24"),
     ("AIFF", "PCM_16"), ("OGG", "OPUS")],
)  # fmt: skip
def test_any_bit_depth_and_encoding_are_read(form, subtype):
    soundfile = pytest.importorskip("soundfile")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone, SAMPLE_RATE, format=form, subtype=subtype)
    found = decode_audio(buffer.getvalue(), "here")
    np.testing.assert_allclose(found[4000:8000], tone[4000:8000], atol=0.05)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_sound_that_was_cut_short_is_refused(form, share):
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLE_RATE), SAMPLE_RATE, format=form)
    data = buffer.getvalue()
    with pytest.raises(UserError, match="cannot read the sound in here: ") as caught:
        decode_audio(data[: int(share * len(data))], "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_sound_of_length_zero_is_refused(form):
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0), SAMPLE_RATE, format=form)
    with pytest.raises(UserError, match=r"the sound in here is empty|cannot read the sound in here"):
        decode_audio(buffer.getvalue(), "here")


def test_a_sound_that_is_too_long_is_refused(monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((60, 2)), SAMPLE_RATE, format="FLAC")
    monkeypatch.setattr(sound_file, "MAX_SAMPLES", 100)
    for data in (buffer.getvalue(), wav(np.zeros(120, np.int16))):
        with pytest.raises(UserError, match="the sound in here has 120 samples, more than 100; cut it into pieces"):
            decode_audio(data, "here")


@pytest.mark.parametrize(
    "make", [lambda: png(Image.new("RGB", (1, 1))), lambda: b"text, not sound", lambda: film([0, 10])]
)
def test_a_file_without_a_sound_is_refused_in_one_line(make):
    with pytest.raises(UserError, match=r"cannot read the sound in here: .*; it must be a WAV file") as caught:
        decode_audio(make(), "here")
    assert "\n" not in str(caught.value)


def test_without_soxr_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    assert len(decode_audio(wav(np.ones(30, np.int16)), "here")) == 30
    with pytest.raises(UserError, match=r"here has 8000 samples a second, not 16000: resampling it needs the"):
        decode_audio(wav(np.ones(30, np.int16), 8000), "here")


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3"])
def test_other_formats_are_read_with_soundfile(form):
    soundfile = pytest.importorskip("soundfile")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone, SAMPLE_RATE, format=form)
    found = decode_audio(buffer.getvalue(), "here")
    np.testing.assert_allclose(found[4000:8000], tone[4000:8000], atol=0.02)
    with pytest.raises(UserError, match="cannot read the sound in here"):
        decode_audio(buffer.getvalue()[:20], "here")


def test_without_soundfile_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"no WAV header; it must be a WAV file, or one .*pip install soundfile"):
        decode_audio(b"fLaC", "here")


def damaged(data, rng, number):
    """Returns the file cut short or with some bytes changed."""
    for length in (*range(0, min(len(data), 60), 3), len(data) // 2, len(data) - 1):
        yield data[:length]
    for _ in range(number):
        changed = bytearray(data)
        for place in rng.integers(min(len(data), 200), size=rng.integers(1, 5)):
            changed[place] = rng.integers(256)
        yield bytes(changed)


def refused(read, *arguments):
    """Returns the message with which `read` refuses its arguments, or None if it accepts them."""
    try:
        read(*arguments)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"])
def test_damaged_pictures_are_read_or_refused_in_one_line(form):
    rng = np.random.default_rng(0)
    said = []
    for data in damaged(encoded(Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)), form), rng, 30):
        said += [refused(read, data, "here") for read in (decode_picture, decode_video)]
    lines = [line for line in said if line is not None]
    assert len(lines) > 10
    assert all("here" in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_damaged_sounds_are_read_or_refused_in_one_line(dtype):
    rng = np.random.default_rng(0)
    said = [refused(decode_audio, data, "here") for data in damaged(wav(np.ones((200, 2), dtype)), rng, 60)]
    lines = [line for line in said if line is not None]
    assert len(lines) > 10
    assert all("here" in line and "\n" not in line for line in lines)
