import os
import pathlib

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.files import parse_json, parse_json_object, read_text, require_local, require_printable


@pytest.mark.parametrize(
    "path", ["runs/a", "/x/gs:/y", "C:/runs", "exp[lr=1e-3]", "a:b/c", "-x", ".", "~/runs", "x:", "1:/"]
)
def test_local_paths_are_accepted(path):
    assert require_local(path, "run directory") == pathlib.Path(path)


@pytest.mark.parametrize(
    "address", ["gs://bucket/x", "s3://bucket/x", "hf://datasets/a", "https://host/x", "file:///x", "memory://x"]
)
def test_addresses_are_refused_as_given_even_after_pathlib_has_read_them(address):
    for given in (address, pathlib.Path(address)):
        with pytest.raises(UserError, match=r"^run directory \w+://\w+") as error:
            require_local(given, "run directory")
        assert "\n" not in str(error.value)


def test_a_nul_character_is_refused():
    with pytest.raises(UserError, match=r"run directory 'a\\x00b' has a NUL character"):
        require_local("a\0b", "run directory")


@pytest.mark.parametrize("name", ["new\nline", "tab\t", b"caf\xe9", "\x7f"])
def test_unprintable_names_are_refused_for_new_paths(name):
    path = pathlib.Path(os.fsdecode(name)) / "run"
    with pytest.raises(UserError, match="control characters or bytes that are not UTF-8") as error:
        require_printable(path, "run directory")
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    path = tmp_path / "config.toml"
    for data, text in ((b"a = '\xc3\xa9'\n", "a = 'é'\n"), (b"\xef\xbb\xbfa = 1", "a = 1"), (b"", "")):
        path.write_bytes(data)
        assert read_text(path, "config") == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a = 1".encode("utf-16"), "it looks like UTF-16"),
        ("a = 1".encode("utf-16-be"), None),  # valid UTF-8 with NUL characters, which no parser accepts
        ("a = 'é'".encode("latin-1"), "byte 5 is not"),
        (b"\x80", "byte 0 is not"),
    ],
)
def test_other_encodings_are_named(tmp_path, data, message):
    path = tmp_path / "config.toml"
    path.write_bytes(data)
    if message is None:
        assert "\0" in read_text(path, "config")
        return
    with pytest.raises(UserError, match=rf"^config .*config\.toml is not UTF-8 text \({message}\); save it as UTF-8$"):
        read_text(path, "config")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read config .*none\.toml: No such file"):
        read_text(tmp_path / "none.toml", "config")
    with pytest.raises(UserError, match=r"cannot read config .*: Is a directory"):
        read_text(tmp_path, "config")


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nul", "[" * 100_000, "1" * 5_000, '{"a": 1} x', "\0"])
def test_invalid_json_is_a_one_line_error(text):
    with pytest.raises(UserError, match=r"^one\.json: not valid JSON: ") as error:
        parse_json(text, "one.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["5", "[]", '"a"', "null", "true"])
def test_json_other_than_an_object_is_refused(text):
    with pytest.raises(UserError, match=r"^one\.json: not a JSON object$"):
        parse_json_object(text, "one.json")
    assert parse_json_object('{"a": [1]}', "one.json") == {"a": [1]}
