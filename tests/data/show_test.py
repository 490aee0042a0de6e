import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.io import wavfile

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.names import file_name
from anyexperts_jax.data import domain as domains
from anyexperts_jax.data import show
from anyexperts_jax.data.array_records import export_array_record
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.source import GeneratedSource


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


@pytest.mark.parametrize("name", domains.DOMAIN_NAMES)
def test_every_domain_is_printed_and_drawn(name, tmp_path, console):
    written = show.show(name, "test", 3, tmp_path / "out", start=5, console=console)
    assert set(written) == set((tmp_path / "out").iterdir())
    assert np.asarray(Image.open(tmp_path / "out" / f"{name}_test.png")).std() > 5
    printed = console.file.getvalue()
    for i in (5, 6, 7):
        example = domains.domain(name).example("test", i)
        assert example.question_type in printed
        assert example.answer in printed
    sounds = [path for path in written if path.suffix == ".wav"]
    assert len(sounds) == (3 if name == "speech" else 0)


def test_the_written_sound_is_the_examples(tmp_path, console):
    show.show("speech", "train", 1, tmp_path, seed=3, console=console)
    rate, samples = wavfile.read(tmp_path / "speech_train_0.wav")
    assert rate == 16_000
    assert samples.dtype == np.int16
    np.testing.assert_array_equal(samples / np.float32(32768), domains.domain("speech").example("train", 0, 3).audio)


def test_each_kind_of_media_gets_its_own_sheet(tmp_path, console):
    examples = [(i, domains.domain(name).example("train", i)) for i, name in enumerate(("nlp", "ocr", "speech"))]
    written = show.show_examples(examples, "mixed", tmp_path, console=console)
    assert {path.name for path in written} == {"mixed_text.png", "mixed_image.png", "mixed_audio.png", "mixed_2.wav"}


def test_evidence_is_described_in_words():
    fields = {"domain": "d", "question_type": "q", "level": 1, "question": "?", "answer": "a", "source": ""}
    frames = np.zeros((8, 2, 2), bool)
    frames[[0, 4, 5, 6]] = True
    video = Example(**fields, video=np.zeros((8, 2, 2, 3), np.uint8), video_evidence=frames)
    assert show.describe_evidence(video) == "frames 0, 4-6"
    spans = ((0.1, 0.2), (0.2, 0.3), (0.5, 0.6))
    audio = Example(**fields, audio=np.zeros(16_000, np.float32), audio_evidence=spans)
    assert show.describe_evidence(audio) == "0.10-0.30 s, 0.50-0.60 s"
    half = np.array([[True, False], [False, True]])
    image = Example(**fields, image=np.zeros((2, 2, 3), np.uint8), image_evidence=half)
    assert show.describe_evidence(image) == "50% of image"
    assert show.describe_evidence(Example(**fields)) == ""


def test_bad_arguments_are_refused_in_one_line(tmp_path, console):
    with pytest.raises(UserError, match=r"count=0 must be in \[1, 96\]"):
        show.show("ocr", "train", 0, tmp_path, console=console)
    with pytest.raises(UserError, match="start=-1"):
        show.show("ocr", "train", 1, tmp_path, start=-1, console=console)
    with pytest.raises(UserError, match="domain='ocean' is unknown"):
        show.show("ocean", "train", 1, tmp_path, console=console)
    with pytest.raises(UserError, match="no examples to show"):
        show.show_examples([], "none", tmp_path, console=console)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        show.show("ocr", "train", 1, tmp_path / "file", console=console)


def own_folder(path, count=3, split="train"):
    export_array_record(GeneratedSource("nlp", split, count, 0, (1, 2, 3)), path, split)
    return path


def test_a_domain_of_a_folder_is_shown_up_to_its_end(tmp_path, console):
    config = DataConfig(domains=("own",), folders=(f"own={own_folder(tmp_path / 'own')}",))
    written = show.show_domain(config, "own", "train", 12, tmp_path / "out", start=1, console=console)
    assert [path.name for path in written] == ["own_train.png"]
    printed = console.file.getvalue()
    assert "own has 3 train examples; 2 are shown\n" in printed
    assert all(domains.domain("nlp").example("train", i).answer in printed for i in (1, 2))
    with pytest.raises(UserError, match="start=3: own has 3 train examples, counted from 0"):
        show.show_domain(config, "own", "train", 1, tmp_path / "out", start=3, console=console)


@pytest.mark.parametrize("name", ["[/red]", "[bold]x[/bold]", "a/b", "$x$ \\frac", ":cat:", "..", "x|<b>", "日本"])
def test_names_are_shown_verbatim(name, tmp_path, console):
    """The terminal library, matplotlib and file systems each give some characters a special meaning."""
    example = Example(name, name, 1, f"is it {name}?", name, name)
    written = show.show_examples([(0, example)], name, tmp_path / "out[bold]", console=console)
    assert [path.parent for path in written] == [tmp_path / "out[bold]"]
    assert written[0].is_file()
    printed = console.file.getvalue()
    assert printed.count(name) >= 4
    assert "out[bold]" in printed


def test_file_names_are_distinct():
    names = ["[/red]", "a b", "a%20b", "日本", "_x", "x_train", "a/b", "a\\b", "a\nb"]
    assert file_name("own-data_2.b") == "own-data_2.b"
    assert file_name("[/red]") == "%5B%2Fred%5D"
    assert len({file_name(name) for name in names}) == len(names)
