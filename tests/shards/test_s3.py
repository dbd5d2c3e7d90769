"""Shards in an object store: a real S3 server, on this machine, that the test starts."""

import json
import os
import socket

import numpy as np
import pytest

from fastddpm.shards.claims import Claims, standing
from fastddpm.shards.part import Part
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done
from tests.command_line import good, refused
from tests.shards.runs import maker, small_sampler, tree, work
from tests.tiny import save_checkpoint

s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
moto_server = pytest.importorskip("moto.server", reason="needs moto with its server")


@pytest.fixture(scope="module")
def server():
    made = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        yield boto3.client("s3")
    made.stop()


@pytest.fixture
def bucket(server, request):
    name = f"bucket-{abs(hash(request.node.name)) % 10**10}"
    server.create_bucket(Bucket=name)
    return name


def objects(server, bucket):
    """Every object of the bucket with its content."""
    found = server.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {entry["Key"]: server.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read() for entry in found}


@pytest.fixture(scope="module")
def sampler():
    return small_sampler()


@pytest.mark.parametrize("form", ["npz", "tar", "png"])
def test_the_objects_are_the_files_of_a_disk(server, bucket, tmp_path, sampler, form):
    assert work(maker(f"s3://{bucket}/deep/run", form, sampler)) == Done(5, 0, 22)
    work(maker(tmp_path, form, sampler))
    assert objects(server, bucket) == {f"deep/run/{name}": content for name, content in tree(tmp_path).items()}
    assert work(maker(f"s3://{bucket}/deep/run", form, sampler), Part(0, 2)) == Done()


def test_a_shard_counts_when_its_record_is_there_and_fits(server, bucket, sampler):
    made = maker(f"s3://{bucket}/run", sampler=sampler)
    work(made)
    before = objects(server, bucket)
    server.delete_object(Bucket=bucket, Key="run/shard-00001.json")
    server.put_object(Bucket=bucket, Key="run/shard-00003.npz", Body=before["run/shard-00003.npz"][:-1] + b"x")
    assert [(f.shard.number, f.state) for f in made.set.verify() if not f] == [(1, "missing"), (3, "damaged")]
    assert made.set.recorded() == {0, 2, 3, 4}
    assert work(maker(f"s3://{bucket}/run", sampler=sampler)) == Done(2, 1, 10)
    assert objects(server, bucket) == before


def test_one_of_two_claims_an_object(server, bucket, sampler):
    store = Store(f"s3://{bucket}/run")
    assert store.create("run.json", b"first") and not store.create("run.json", b"second")
    made = maker(f"s3://{bucket}/other", sampler=sampler)
    shard = made.set.plan[0]
    first, second = (Claims(made.set.store, f"{i}/2") for i in range(2))
    assert first.take(shard) and not second.take(shard) and standing(made.set.store) == {"shard-00000": 0}
    first.release(shard)
    assert second.take(shard)


def test_another_run_is_refused(bucket, sampler):
    maker(f"s3://{bucket}/run", sampler=sampler)
    with pytest.raises(ValueError, match="holds a run with other settings: seed was 7, is 8"):
        maker(f"s3://{bucket}/run", sampler=sampler, seed=8)


def test_the_command_line(server, bucket, fastddpm, place, tmp_path):
    model, out = save_checkpoint(tmp_path / "tiny"), f"s3://{bucket}/run"
    drawn = good(fastddpm("sample", model, "-n", 6, "--steps", 2, "--shards", out, "--shard-size", 4))
    assert drawn == f"wrote 2 shards (6 pictures) to {out}; all 2 are there\n"
    assert good(fastddpm("shards", "verify", out)) == f"{out}: 2 of 2 shards are whole\n"
    assert good(fastddpm("shards", "gather", out, "all.npz")) == "wrote all.npz (6 pictures)\n"
    assert len(np.load("all.npz")["arr_0"]) == 6
    assert json.loads(objects(server, bucket)["run/run.json"])["n"] == 6


def test_a_bucket_that_is_not_there(server, fastddpm, place, tmp_path):
    model = save_checkpoint(tmp_path / "tiny")
    refused(
        fastddpm("sample", model, "-n", 2, "--steps", 2, "--shards", "s3://nobodys-bucket/run"),
        "s3://nobodys-bucket/run must be there and writable, got The specified bucket does not exist",
    )
    refused(fastddpm("shards", "verify", "s3://nobodys-bucket/run"), "must hold a run's shards, got no run.json there")


def test_a_store_that_nobody_answers_for(server, request, monkeypatch, fastddpm, place, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()  # one that is made already knows the other address
    request.addfinalizer(s3fs.S3FileSystem.clear_instance_cache)
    model = save_checkpoint(tmp_path / "tiny")
    refused(
        fastddpm("sample", model, "-n", 2, "--steps", 2, "--shards", "s3://bucket/unreachable"),
        "s3://bucket/unreachable must be there and readable, got Could not connect to the endpoint", "check address",
    )  # fmt: skip
    assert os.listdir(place) == []


def test_what_fails_leaves_no_object(bucket):
    store = Store(f"s3://{bucket}")
    with pytest.raises(RuntimeError), store.writing("a.npz") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert store.sizes() == {}
