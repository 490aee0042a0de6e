"""Object stores: temporary failures are retried, lasting ones are one line, and no credential is printed."""

import io
import json

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.sources import places
from anyexperts_jax.data.sources.places import find_files, with_retries, without_secrets

SECRETS = {
    "s3://me:password@bucket/x": "s3://bucket/x",
    "https://h/x?X-Amz-Signature=abc": "https://h/x",
    "key AKIAABCDEFGHIJKLMNOP is not valid": "key *** is not valid",
    "aws_secret_access_key=abcd/efg": "aws_secret_access_key=***",
    "{'token': 'ya29.abc'}": "{'token': ***",
    "Authorization: Bearer ya29.a0Ab_c": "Authorization: Bearer ***",
    "authorization: Basic bWU6c2VjcmV0": "authorization: Basic ***",
    "AccountKey=abc+d/e==;": "AccountKey=***",
    "bad -----BEGIN PRIVATE KEY----- MIIabc -----END PRIVATE KEY----- there": "bad *** there",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIabc": "***",
    "a basic error": "a basic error",
    "gs://bucket/data.jsonl": "gs://bucket/data.jsonl",
}


@pytest.mark.parametrize(("text", "clean"), SECRETS.items())
def test_no_credential_is_shown(text, clean):
    assert without_secrets(text) == clean


def failing(times, error):
    left = [error] * times

    def action():
        if left:
            raise left.pop()
        return "read"

    return action


def test_a_temporary_failure_is_retried_after_growing_waits():
    waits = []
    assert with_retries(failing(3, OSError("reset")), "read it", waits.append) == "read"
    assert waits == [0.5, 1.0, 2.0]


REFUSED = {
    "for good": (OSError("token=abc"), "cannot read it: token=.*tried 6 times over 15.5 s; the same command goes on"),
    "not there": (FileNotFoundError("x"), "cannot read it: there is no such file or bucket"),
    "no access": (PermissionError("x"), "cannot read it: access is denied; sign in, or give keys in the environment"),
}


@pytest.mark.parametrize(("error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_lasting_failure_is_one_line(error, message):
    with pytest.raises(UserError, match=message) as caught:
        with_retries(failing(9, error), "read it", lambda wait: None)
    assert "abc" not in str(caught.value)
    assert "\n" not in str(caught.value)


PLACES = {
    "nothing there": ("gone", "the data directory gone does not exist"),
    "no file": ("gone.jsonl", "the data file gone.jsonl does not exist"),
    "no match": ("*.jsonl", r"the data file \*.jsonl does not exist"),
    "unknown store": ("nope://x/y", "nope://x/y: .*give a path, or an address as gs:// or s3://"),
    "a password": ("s3://me:secret@b/x", "s3://b/x: the address holds a password"),
    "nul": ("a\0b", "has a NUL character"),
}


@pytest.mark.parametrize(("place", "message"), PLACES.values(), ids=PLACES)
def test_a_missing_place_is_one_line(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        find_files(place)
    assert "secret" not in str(caught.value)


@pytest.fixture
def s3_bucket(monkeypatch):
    """A bucket of moto's server: its address, its file system, and a function that makes it unreachable."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing-secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield "s3://bucket", system, server.stop
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def gs_bucket(monkeypatch):
    """A bucket of gcp-storage-emulator: its address, its file system, and a function that makes it unreachable."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    monkeypatch.setenv(
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # this feature needs gRPC, which the emulator lacks
    gcsfs = pytest.importorskip("gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", _no_sleep)  # gcsfs retries too
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "gs://bucket", gcsfs.GCSFileSystem(), server.stop
    server.stop()
    gcsfs.GCSFileSystem.clear_instance_cache()


async def _no_sleep(seconds):
    """Replaces asyncio.sleep."""


@pytest.fixture(params=["s3_bucket", "gs_bucket"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.mark.filterwarnings("ignore")
def test_a_bucket_is_read_and_its_loss_is_one_line(bucket, monkeypatch):
    from PIL import Image

    address, system, lose = bucket
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (7, 0, 0)).save(picture, "PNG")
    rows = [{"question": f"q{i}?", "answer": f"a{i}", "image": "p/red.png"} for i in range(20)]
    system.pipe("bucket/data/all.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    system.pipe("bucket/data/p/red.png", picture.getvalue())
    data = DataConfig(domains=("mine",), folders=(f"mine={address}/data/all.jsonl",), threads=0)
    source = open_source(data, "mine", "train")
    assert source[0].image[0, 0, 0] == 7
    with pytest.raises(UserError, match=rf"there is no data at {address}/none|no such file or bucket"):
        find_files(f"{address}/none.jsonl")
    monkeypatch.setattr(places, "WAITS", (0.01,))
    lose()
    with pytest.raises(UserError, match=rf"line \d+: cannot read {address}/data/p/red.png") as caught:
        source[1]
    assert "testing-secret" not in str(caught.value)
