"""Files in an S3-compatible store: moto's server, where it is installed (`pip install
'moto[s3,server]'`, 300 MB).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from shared.files.objects import PART_BYTES, open_store
from shared.files.store import ContentMissing, StoreUnavailable
from tests.integration.conftest import ApiProcess, Jobs, WorkerProcess
from tests.integration.test_batches import lines_of, over, start, sums
from vdiff import bundled

moto_server = pytest.importorskip(
    "moto.server", reason="moto is heavy and no dependency: see the docstring"
)
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket; the environment says where it is."""
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    where = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in where}
    os.environ.update(where)
    boto3.client(
        "s3", endpoint_url=where["AWS_ENDPOINT_URL"], region_name="us-east-1"
    ).create_bucket(Bucket="vdiff")
    yield "vdiff"
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    server.stop()


def keys_of(bucket: str) -> set[str]:
    import boto3

    client = boto3.client(
        "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1"
    )
    found: list[dict[str, Any]] = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {item["Key"] for item in found}


async def test_content_is_seen_whole_or_not_at_all(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/own")
    data = os.urandom(2 * PART_BYTES + 12_345)  # three parts
    async with store.writer("file-a") as writer:
        for at in range(0, len(data), 1 << 20):
            await writer.write(data[at : at + (1 << 20)])
            assert keys_of(bucket) == set()
    assert keys_of(bucket) == {"own/files/file-a"}
    assert b"".join([part async for part in store.read("file-a", len(data))]) == data
    with pytest.raises(RuntimeError):
        async with store.writer("file-b") as writer:
            await writer.write(data)
            raise RuntimeError
    assert keys_of(bucket) == {"own/files/file-a"}
    await store.delete("file-a")
    await store.delete("file-a")
    with pytest.raises(ContentMissing):
        async for _ in store.read("file-a", len(data)):
            pass
    with pytest.raises(StoreUnavailable):
        async with open_store("s3://no-such-bucket").writer("file-c") as writer:
            await writer.write(b"x")


def test_a_batch_with_its_files_in_s3(bucket: str, jobs: Jobs, tmp_path: Path) -> None:
    with ExitStack() as stack:
        worker = WorkerProcess(
            jobs,
            tmp_path / "worker.log",
            model=bundled.folder(bundled.DEFAULT_MODEL),
            served_model_name="vdiff-tiny",
        )
        stack.callback(worker.end)
        api = ApiProcess(jobs, tmp_path / "api.log", file_store=f"s3://{bucket}/files")
        stack.callback(api.end)
        worker.wait_ready()
        api.wait_ready()
        client = stack.enter_context(
            OpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)
        )
        batch = over(client, start(client, sums(5)).id)
        assert (batch.status, batch.outcome) == ("completed", "all_succeeded")
        assert len(lines_of(client, batch.output_file_id)) == 5
        assert len(keys_of(bucket)) == 2
        big = os.urandom(PART_BYTES + 5)
        file = client.files.create(file=("big.bin", io.BytesIO(big)), purpose="evals")
        assert client.files.content(file.id).content == big
        for file_id in (batch.input_file_id, batch.output_file_id, file.id):
            client.files.delete(file_id)
        assert keys_of(bucket) == set()
