"""`fastddpm export`, the example that runs its file without fastddpm, and the layout for a server."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.command_line import files, good, refused
from tests.networks import two_layers_sampler

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_only.py"


def run(arguments, folder):
    return subprocess.run(arguments, cwd=folder, env=tiny.environment(), capture_output=True, text=True, check=False)


def grids(fastddpm, folder, model, *options):
    """The example's grid and the command line's."""
    good(fastddpm("export", model, "digits.onnx", "--what", "chain"))
    done = run([sys.executable, EXAMPLE, "digits.onnx", *options], folder)
    assert done.returncode == 0, done.stderr
    good(fastddpm("sample", model, *options, "--grid", "reference.png"))
    return [np.asarray(Image.open(folder / name)).astype(int) for name in ("grid.png", "reference.png")]


def check_grids(grid, reference):
    assert grid.shape == reference.shape
    assert np.abs(grid - reference).max() <= 1  # a level that lies on the edge between two may fall to either side
    assert (grid != reference).mean() < 1e-3


def test_example_draws_what_sample_draws(fastddpm, place, checkpoint):
    check_grids(*grids(fastddpm, place, checkpoint, "--n", "4", "--seed", "3"))


@pytest.mark.slow
def test_example_draws_what_sample_draws_by_default(fastddpm, place):
    check_grids(*grids(fastddpm, place, "mnist"))


def test_example_needs_neither_torch_nor_fastddpm():
    code = EXAMPLE.read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    assert imported == {"argparse", "json", "math", "numpy", "onnxruntime", "PIL"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    unet = dataclasses.replace(tiny.UNET, channels=(8,), attention=(True,))
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "model", unet)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The network of a sampler of two layers, which does not take long."""
    from fastddpm.export import export_onnx

    return export_onnx(two_layers_sampler(), tmp_path_factory.mktemp("exported") / "m.onnx", what="network")


def test_server_repository(fastddpm, checkpoint, place):
    out = good(fastddpm("export", checkpoint, "my model.onnx", "--what", "network", "--server", "repo"))
    assert "wrote my model.onnx (" in out and "wrote repo/my_model" in out
    repository = place / "repo" / "my_model"
    assert (repository / "1" / "model.onnx").read_bytes() == (place / "my model.onnx").read_bytes()
    text = (repository / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}")
    assert 'name: "my_model"\nbackend: "onnxruntime"\nmax_batch_size: 64\ndynamic_batching {' in text
    names = re.findall(r'^(?:input|output) {\n  name: "(\w+)"', text, re.M)
    assert names == ["x", "t", "y", "out"]
    assert re.findall(r'key: "(\w+)"', text) == names[:-1]


def test_a_server_repository_that_cannot_be_written_leaves_nothing(exported, tmp_path, monkeypatch):
    from fastddpm.export import server

    (tmp_path / "repo" / "other").mkdir(parents=True)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.shutil, "copyfile", fail)
    for folder, left in (("repo", ["other"]), ("new/repo", [])):
        with pytest.raises(OSError, match="No space left"):
            server.write_repository(tmp_path / folder, exported)
        assert [path.name for path in (tmp_path / folder).glob("*")] == left
    assert not (tmp_path / "new").exists()


def test_server_configuration_parses_as_the_published_message(exported, tmp_path):
    from google.protobuf import text_format

    from fastddpm.export import OnnxSession, export_onnx
    from fastddpm.export.server import config

    schema, types = model_config_schema(), {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
    fixed = {"what": "step", "steps": 3, "tensorrt": True, "batch": 4}
    for made in (exported, export_onnx(two_layers_sampler(), tmp_path / "m.onnx", **fixed)):
        session = OnnxSession(made.files[0], "cpu")
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
def test_tensorrt_names_its_command(fastddpm, checkpoint, place):
    out = good(fastddpm("export", checkpoint, "m.onnx", "--what", "network", "--tensorrt", "--batch", "4"))
    assert "trtexec --onnx=m.onnx --saveEngine=m.engine" in out
    assert files(place) == ["m.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("m.txt",), "the file name must end in .onnx"),
        (("m.onnx", "--fp16", "--int8"), "--fp16 and --int8 must not both be given"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(fastddpm, checkpoint, place, words, message):
    result = fastddpm("export", checkpoint, *words)
    assert refused(result, message) and result.out == "" and files(place) == []


def test_metadata_name_the_licence_of_the_card(checkpoint):
    from fastddpm.export.model_file import licence_of

    assert licence_of(checkpoint) is None
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    assert licence_of(checkpoint) == "apache-2.0"
    (checkpoint / "README.md").write_text("# Card\nlicense: none of this\n")
    assert licence_of(checkpoint) is None
    assert json.dumps(licence_of(None)) == "null"
