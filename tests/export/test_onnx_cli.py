"""`fastddpm export`, the example that runs its file without fastddpm, and the layout for a server."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_only.py"


def run(arguments, folder):
    return subprocess.run(arguments, cwd=folder, env=tiny.environment(), capture_output=True, text=True, check=False)


def grids(folder, *options):
    """The example's grid and the command line's, of the shipped model."""
    for command in (
        tiny.command("export", "mnist", "digits.onnx", "--what", "chain"),
        [sys.executable, EXAMPLE, "digits.onnx", *options],
        tiny.command("sample", "mnist", *options, "--grid", "reference.png"),
    ):
        done = run(command, folder)
        assert done.returncode == 0, done.stderr
    return [np.asarray(Image.open(folder / name)).astype(int) for name in ("grid.png", "reference.png")]


def check_grids(grid, reference):
    assert grid.shape == reference.shape
    assert np.abs(grid - reference).max() <= 1  # a level that lies on the edge between two may fall to either side
    assert (grid != reference).mean() < 1e-3


def test_example_draws_what_sample_draws(tmp_path):
    check_grids(*grids(tmp_path, "--n", "9", "--seed", "3"))


@pytest.mark.slow
def test_example_draws_what_sample_draws_by_default(tmp_path):
    check_grids(*grids(tmp_path))


def test_example_needs_neither_torch_nor_fastddpm():
    code = EXAMPLE.read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    assert imported == {"argparse", "json", "math", "numpy", "onnxruntime", "PIL"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def test_server_repository(checkpoint, tmp_path):
    done = run(tiny.command("export", checkpoint, "my model.onnx", "--what", "network", "--server", "repo"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote my model.onnx (" in done.stdout and "wrote repo/my_model" in done.stdout
    place = tmp_path / "repo" / "my_model"
    assert (place / "1" / "model.onnx").read_bytes() == (tmp_path / "my model.onnx").read_bytes()
    text = (place / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}")
    assert 'name: "my_model"\nbackend: "onnxruntime"\nmax_batch_size: 64\ndynamic_batching {' in text
    names = re.findall(r'^(?:input|output) {\n  name: "(\w+)"', text, re.M)
    assert names == ["x", "t", "y", "out"]
    assert re.findall(r'key: "(\w+)"', text) == names[:-1]


def test_a_server_repository_that_cannot_be_written_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    from fastddpm.export import export_onnx, server

    exported = export_onnx(checkpoint, tmp_path / "m.onnx", what="network")
    (tmp_path / "repo" / "other").mkdir(parents=True)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.shutil, "copyfile", fail)
    for folder, left in (("repo", ["other"]), ("new/repo", [])):
        with pytest.raises(OSError, match="No space left"):
            server.write_repository(tmp_path / folder, exported)
        assert [path.name for path in (tmp_path / folder).glob("*")] == left
    assert not (tmp_path / "new").exists()


def test_server_configuration_parses_as_the_published_message(checkpoint, tmp_path):
    from google.protobuf import text_format

    from fastddpm.export import OnnxSession, export_onnx
    from fastddpm.export.server import config

    schema, types = model_config_schema(), {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
    for options in ({"what": "network"}, {"what": "step", "steps": 3, "tensorrt": True, "batch": 4}):
        session = OnnxSession(export_onnx(checkpoint, tmp_path / "m.onnx", **options).files[0], "cpu")
        parsed = text_format.Parse(config("m", session), schema.ModelConfig())
        assert (parsed.name, parsed.backend) == ("m", "onnxruntime")
        assert [value.name for value in parsed.input] == list(session.inputs)
        assert [value.name for value in parsed.output] == session.outputs
        assert parsed.max_batch_size == (64 if session.batch is None else 0)
        for value in parsed.input:
            dtype, shape = session.inputs[value.name]
            assert types[schema.DataType.Name(value.data_type)] is dtype
            if session.batch is None:
                dims = list(value.reshape.shape) if value.HasField("reshape") else list(value.dims)
                assert dims == list(shape[1:])
            else:
                assert list(value.dims) == list(shape)
        assert set(parsed.model_warmup[0].inputs) == set(session.inputs)


def model_config_schema():
    """Triton's published messages, from their own file: the package around it needs grpcio and another protobuf."""
    try:
        files = importlib.metadata.files("tritonclient") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs tritonclient")
    place = next(file for file in files if file.as_posix() == "tritonclient/grpc/model_config_pb2.py").locate()
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_tensorrt_names_its_command(checkpoint, tmp_path):
    words = ("export", checkpoint, "m.onnx", "--what", "network", "--tensorrt", "--batch", "4")
    done = run(tiny.command(*words), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trtexec --onnx=m.onnx --saveEngine=m.engine" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("m.txt",), "the file name must end in .onnx"),
        (("m.onnx", "--fp16", "--int8"), "--fp16 and --int8 must not both be given"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(checkpoint, tmp_path, words, message):
    done = run(tiny.command("export", checkpoint, *words), tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastddpm: error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert os.listdir(tmp_path) == []


def test_metadata_name_the_licence_of_the_card(checkpoint):
    from fastddpm.export.model_file import licence_of

    assert licence_of(checkpoint) is None
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    assert licence_of(checkpoint) == "apache-2.0"
    (checkpoint / "README.md").write_text("# Card\nlicense: none of this\n")
    assert licence_of(checkpoint) is None
    assert json.dumps(licence_of(None)) == "null"
