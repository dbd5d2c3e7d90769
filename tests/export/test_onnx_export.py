"""Exported files: the three levels against PyTorch, what they say about themselves, and what is refused."""

import concurrent.futures
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from fastddpm import CheckpointError, ModelSpec, NoiseSchedule, Sampler  # noqa: E402
from fastddpm.export import OnnxSampler, export_onnx  # noqa: E402
from fastddpm.export.graph import Graph, in_order  # noqa: E402
from fastddpm.export.model_file import write_model  # noqa: E402
from fastddpm.export.modules import Ask, step_of  # noqa: E402
from fastddpm.export.normals import add_words, first_noise, step_noise  # noqa: E402
from fastddpm.export.session import OnnxSession  # noqa: E402
from fastddpm.export.tensorrt import check_tensorrt  # noqa: E402
from fastddpm.kernels.philox import (  # noqa: E402
    NORMALS_ATOL,
    X_T_COUNTER,
    normals_reference,
    philox4x32_reference,
)
from tests.networks import one_level_sampler, tiny_sampler, two_layers_sampler  # noqa: E402

CHAIN_ATOL = 1e-3
"""The promise for float32; on these small networks the difference is about 1e-7."""
TIGHT = 2e-6

FILES = {
    "network": {"what": "network"},
    "step": {"what": "step", "solver": "ddpm", "steps": 6},
    "step_input": {"what": "step", "solver": "dpmpp_3m", "steps": 7, "tensorrt": True, "batch": 2},
    "chain": {"what": "chain", "solver": "ddim", "steps": 6, "eta": 0.5},
    "chain_3m": {"what": "chain", "solver": "dpmpp_3m", "steps": 16},
    "noise": {"what": "step", "solver": "ddpm", "steps": 3, "noise": "input", "guidance": False},
}
UNETS = ("step",)
"""The file of a U-Net; the others are of a network of two layers, because tracing takes long."""
ASKED = {"seed": 2**63 + 5, "sample_ids": [3, 2**33, 2**64 - 1], "class_labels": [0, 2, 1], "progress": False}


@pytest.fixture(scope="module")
def sampler():
    return tiny_sampler()


@pytest.fixture(scope="module")
def source(sampler):
    """A function: name of a file → the sampler that it is made of."""
    other = two_layers_sampler(engine="eager")
    return lambda name: sampler if name in UNETS else other


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """A function: level → what was exported, each made once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(name):
        if name not in made:
            made[name] = export_onnx(source(name), folder / f"{name}.onnx", **FILES[name])
        return made[name]

    return get


def method(name):
    return {key: value for key, value in FILES[name].items() if key in ("solver", "steps", "eta")}


@pytest.mark.parametrize("scale", [1.0, [1.0, 2.5, 0.0]], ids=["plain", "guided"])
@pytest.mark.parametrize("name", ["step", "step_input", "chain", "chain_3m"])
def test_pictures_equal_pytorchs(source, exported, name, scale):
    ours = source(name).sample(3, guidance_scale=scale, **method(name), **ASKED)
    theirs = OnnxSampler(exported(name).files[0], "cpu").sample(3, guidance_scale=scale, **ASKED)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("output", ["unit", "raw", "uint8", "pil"])
def test_a_network_takes_every_option_of_the_sampler(source, exported, output):
    sampler = source("network")
    options = {"solver": "dpmpp_2m", "timesteps": [30, 12, 3], "guidance_scale": 2.0, **ASKED}
    theirs = OnnxSampler(exported("network").files[0], "cpu").sample(3, output=output, **options)
    ours = sampler.sample(3, output=output, **options)
    if output == "pil":
        theirs, ours = (torch.stack([torch.from_numpy(np.array(image)) for image in p]) for p in (theirs, ours))
    atol = TIGHT if theirs.is_floating_point() else 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_network_output(source, exported, batch):
    sampler = source("network")
    x, t, y = torch.randn(batch, 1, 8, 8), torch.arange(batch) * 7, torch.arange(batch) % 4
    theirs = OnnxSampler(exported("network").files[0], "cpu").network(x, t, y)
    torch.testing.assert_close(theirs, sampler.network(x, t, y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["step", "chain"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_picture_does_not_depend_on_its_batch(exported, name, batch_size):
    model = OnnxSampler(exported(name).files[0], "cpu")
    options = {"class_labels": [0, 1, 2, 0, 1], "guidance_scale": [1, 3, 1, 2, 1], "progress": False}
    whole = model.sample(5, **options)
    parts = model.sample(5, batch_size=batch_size, **options)
    torch.testing.assert_close(parts, whole, rtol=0, atol=TIGHT)


def test_what_depends_on_time_alone_is_tabulated_and_classes_are_told():
    """A table of projections of all classes would be larger than the weights."""
    ours = tiny_sampler(T=400)
    table = ours.table(solver="ddpm")
    network = Ask(step_of(ours.model, ours.spec, table), ours.spec, table)
    assert network.conditions.shape == (401, ours.model.config.embedding_dim)
    x, step, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 399]), torch.tensor([1, 0, 3])
    with torch.no_grad():
        theirs = network(x, step, y)
    torch.testing.assert_close(theirs, ours.network(x, table.timesteps[step], y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["function", "generator"])
def test_noise_of_the_callers(exported, kind, source):
    path = exported("noise").files[0]

    def noise():
        if kind == "generator":
            return torch.Generator().manual_seed(4)
        return lambda i, t, ids: torch.full((len(ids), 1, 8, 8), float(i + t) / 50)

    ours = source("noise").sample(2, class_labels=1, noise=noise(), solver="ddpm", steps=3, progress=False)
    theirs = OnnxSampler(path, "cpu").sample(2, class_labels=1, noise=noise(), progress=False)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TIGHT)
    other = OnnxSampler(path, "cpu").sample(2, class_labels=1, progress=False)
    assert (other - theirs).abs().max() > 1e-2


def test_callback_sees_each_step(source, exported):
    def collect(into):
        return lambda preview: into.append((preview.step, preview.timestep, preview.x.clone(), preview.x_start.clone()))

    ours, theirs = [], []
    source("step_input").sample(2, class_labels=1, callback=collect(ours), progress=False, **method("step_input"))
    model = OnnxSampler(exported("step_input").files[0], "cpu")
    model.sample(2, class_labels=1, callback=collect(theirs), progress=False)
    assert [seen[:2] for seen in theirs] == [seen[:2] for seen in ours]
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a[2:], b[2:], rtol=0, atol=1e-4)


def test_a_finished_sample_stays_as_it_is_beside_one_under_way(exported):
    session = OnnxSession(exported("step").files[0], "cpu")
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8), dtype=np.float32)
    x[0, 0, 0, 0] = -0.0
    one, ids = np.ones(2, dtype=np.float32), np.arange(2)
    result = session.run(
        {"x": x, "step": np.array([6, 2]), "sample_id": ids, "seed": ids, "y": ids, "guidance": one * 2}
    )
    assert result["x_next"][0].tobytes() == x[0].tobytes()
    assert result["step_next"].tolist() == [6, 3]
    assert not np.allclose(result["x_next"][1], x[1])


@pytest.mark.parametrize(("batch", "quads"), [(1, 1), (3, 49), (2, 768)])
def test_philox_words_are_bit_exact(batch, quads):
    graph = Graph("words")
    for name in ("seed", "sample_id"):
        graph.take(name, np.int64, ["batch"])
    graph.take("counter", np.int64, ["batch", 1, 1])
    graph.give(add_words(graph, quads), np.uint64, ["batch", 2, quads])
    session = onnxruntime.InferenceSession(graph.model(20).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(batch)
    seed, sample_id = rng.integers(-(2**63), 2**63, (2, batch))
    t = rng.integers(0, 2**32, batch)
    seed[0], sample_id[0], t[0] = {1: (0, 0, 0), 3: (-1, -1, 2**32 - 1), 2: (-(2**63), 2**31, 2**31)}[batch]
    (pairs,) = session.run(None, {"seed": seed, "sample_id": sample_id, "counter": t[:, None, None] + 2**32})
    theirs = [word for pair in (pairs[:, 0], pairs[:, 1]) for word in (pair >> 32, pair & (2**32 - 1))]
    key, ids = torch.from_numpy(seed)[:, None], torch.from_numpy(sample_id)[:, None]
    ours = philox4x32_reference(
        torch.arange(quads)[None],
        torch.from_numpy(t)[:, None],
        *(part & (2**32 - 1) for part in (ids, ids >> 32, key, key >> 32)),
    )
    for a, b in zip(theirs, ours, strict=True):
        assert np.array_equal(a.astype(np.int64), b.expand(batch, quads).numpy())
    if batch == 1:
        assert [f"{int(word[0, 0]):08x}" for word in theirs] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 1, 1)], ids=str)
def test_normals_are_the_references(shape):
    """Whole quads, and numbers of elements that are no multiple of four."""
    timesteps = np.array([39, 20, 0, 0])
    seed, ids, step = np.array([5, -1, 2**40, 7]), np.array([0, -(2**63), 3, 2**33]), np.array([0, 1, 2, 9])
    row = torch.from_numpy(timesteps[step.clip(max=3)])
    numel = shape[0] * shape[1] * shape[2]
    for part, fed, counter in (
        (step_noise(timesteps, shape, 20), {"seed": seed, "sample_id": ids, "step": step}, row),
        (first_noise(shape, 20), {"seed": seed, "sample_id": ids}, torch.full((4,), X_T_COUNTER)),
    ):
        for name in fed:
            part.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch"]))
        onnx.checker.check_model(part, full_check=True)
        session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        (theirs,) = session.run(None, fed)
        ours = normals_reference(torch.from_numpy(seed), torch.from_numpy(ids), counter, numel)
        torch.testing.assert_close(torch.from_numpy(theirs).flatten(1), ours, rtol=0, atol=NORMALS_ATOL)


def test_the_noise_and_the_update_take_few_operators(exported):
    """They cost what their number is: on small pictures an operator takes as long to start as to run."""
    nodes = onnx.load(exported("step").files[0]).graph.node
    counts = {part: sum(node.name.startswith(part) for node in nodes) for part in ("noise/", "update/")}
    assert counts["noise/"] <= 71 and counts["update/"] <= 25


@pytest.mark.parametrize("name", FILES)
def test_file_is_valid_and_says_what_it_is(source, exported, name):
    path = exported(name).files[0]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    facts = json.loads(metadata["fastddpm"])
    assert (model.producer_name, facts["what"]) == ("fastddpm", FILES[name]["what"])
    assert model.producer_version and len(facts["weights_sha256"]) == 64 and facts["licence"] == "not stated"
    assert NoiseSchedule.from_config(facts["schedule"]).T == 40
    assert ModelSpec.from_dict(facts["spec"]) == source(name).spec
    assert facts == exported(name).facts
    for value in (*model.graph.input, *model.graph.output):
        assert facts["meaning"][value.name]
    text = str(model)
    assert os.getcwd() not in text and ".py" not in text and "site-packages" not in text


def test_the_step_has_no_control_flow_and_the_chain_one_scan(exported):
    kinds = {name: [node.op_type for node in onnx.load(exported(name).files[0]).graph.node] for name in FILES}
    for name, found in kinds.items():
        assert found.count("Scan") == (1 if FILES[name]["what"] == "chain" else 0) and not {"If", "Loop"} & set(found)


@pytest.mark.slow
def test_same_bytes_in_another_process(exported, tmp_path):
    code = (
        "import sys; from tests.networks import tiny_sampler; from fastddpm.export import export_onnx;"
        f"export_onnx(tiny_sampler(), sys.argv[1], **{FILES['step']!r})"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.onnx")], env=environment, check=True, cwd=tmp_path)
    assert (tmp_path / "x.onnx").read_bytes() == exported("step").files[0].read_bytes()


def test_external_weights(exported, tmp_path):
    paths = write_model(tmp_path / "m.onnx", onnx.load(exported("step").files[0]), external=True)
    assert [path.name for path in paths] == ["m.onnx", "m.onnx.data"] == sorted(os.listdir(tmp_path))
    assert paths[0].stat().st_size < exported("step").files[0].stat().st_size / 2 < paths[1].stat().st_size
    options = {"class_labels": 1, "progress": False}
    inside = OnnxSampler(exported("step").files[0], "cpu").sample(2, **options)
    assert torch.equal(OnnxSampler(paths[0], "cpu").sample(2, **options), inside)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(paths[0], moved)
    with pytest.raises(CheckpointError, match=r"m\.onnx: must be a whole ONNX model"):
        OnnxSampler(moved / "m.onnx", "cpu")


@pytest.mark.parametrize(
    ("make", "what", "precision"),
    [
        (two_layers_sampler, "network", "fp32"),
        (two_layers_sampler, "chain", "fp16"),
        *(
            pytest.param(tiny_sampler, *case, marks=pytest.mark.slow)
            for case in itertools.product(("network", "step", "chain"), ("fp32", "fp16"))
        ),
    ],
)
def test_models_that_are_too_large_for_one_file(tmp_path, monkeypatch, make, what, precision):
    """The limit is 2 GB; nothing on the way may copy or check such a model as one message."""
    monkeypatch.setattr("fastddpm.export.model_file.LIMIT", 1000)
    sampler, method = make(), {"solver": "ddpm", "steps": 3}
    given = {} if what == "network" else method
    files = export_onnx(sampler, tmp_path / "m.onnx", what=what, precision=precision, **given).files
    assert [file.name for file in files] == ["m.onnx", "m.onnx.data"] == sorted(os.listdir(tmp_path))
    onnx.checker.check_model(str(files[0]), full_check=True)
    options = {"class_labels": [1, 0], "guidance_scale": 2.0, "progress": False}
    theirs = OnnxSampler(files[0], "cpu").sample(2, **options, **({} if given else method))
    atol = TIGHT if precision == "fp32" else 1e-3
    torch.testing.assert_close(theirs, sampler.sample(2, **options, **method), rtol=0, atol=atol)


def test_models_that_are_too_large_are_refused_as_one_file(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("fastddpm.export.model_file.LIMIT", 1000)
    with pytest.raises(ValueError, match="weights of 2 GB and more must go to a file of their own"):
        write_model(tmp_path / "m.onnx", onnx.load(exported("network").files[0]), external=False)
    assert os.listdir(tmp_path) == []


def with_other_weights(model):
    """The same model with zeros for its weights, those that stay in its own file too."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.raw_data) >= 32:  # no scales of a picture's sides
            tensor.raw_data = bytes(len(tensor.raw_data))
    return model


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_full_disk_leaves_the_old_file(exported, tmp_path, external):
    model, other = (onnx.load(exported("step").files[0]) for _ in range(2))
    target = write_model(tmp_path / "m.onnx", with_other_weights(other), external=external)[0]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_model(target, model, external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(target)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_stay_with_their_model_when_two_write_at_once(exported, tmp_path):
    models = [onnx.load(exported("step").files[0]) for _ in range(2)]
    models = [model.SerializeToString() for model in (models[0], with_other_weights(models[1]))]

    def write(data):
        for _ in range(8):
            write_model(tmp_path / "m.onnx", onnx.load_model_from_string(data), external=True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(write, models))
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]

    def values(model):
        return [onnx.numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer]

    assert values(onnx.load(tmp_path / "m.onnx")) in [values(onnx.load_model_from_string(data)) for data in models]


def test_fp16_keeps_norms_and_state_in_float32(tmp_path):
    sampler = one_level_sampler()
    path = export_onnx(sampler, tmp_path / "m.onnx", what="network", precision="fp16").files[0]
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    weights = {kinds[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}
    assert weights == {onnx.TensorProto.FLOAT16}
    for node in model.graph.node:
        if node.op_type == "InstanceNormalization":
            assert kinds.get(node.input[1], onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 20, 39]), torch.tensor([0, 1, 3])
    ours, theirs = sampler.network(x, t, y), OnnxSampler(path, "cpu").network(x, t, y)
    assert theirs.dtype == torch.float32
    error = float((theirs - ours).abs().max() / ours.abs().max())
    assert 1e-6 < error < 5e-3


@pytest.mark.slow
def test_int8_is_calibrated_and_close(sampler, tmp_path):
    path = export_onnx(sampler, tmp_path / "m.onnx", what="network", precision="int8").files[0]
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "DequantizeLinear" in kinds
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 20, 39]), torch.tensor([0, 1, 3])
    ours, theirs = sampler.network(x, t, y), OnnxSampler(path, "cpu").network(x, t, y)
    assert 1e-5 < float((theirs - ours).square().mean().sqrt() / ours.std()) < 0.2


def test_tensorrt_takes_the_step_with_noise_from_outside_only(exported):
    check_tensorrt(onnx.load(exported("step_input").files[0]))
    with pytest.raises(ValueError, match="open shape.*without tensorrt|BitShift.*without tensorrt"):
        check_tensorrt(onnx.load(exported("step").files[0]))
    inputs = OnnxSession(exported("step_input").files[0], "cpu").inputs
    assert "sample_id" not in inputs and inputs["x"][1] == (2, 1, 8, 8)


def test_nodes_are_put_in_order():
    node = onnx.helper.make_node
    nodes = [node("Add", ["b", "c"], ["d"]), node("Neg", ["a"], ["b"]), node("Neg", ["b"], ["c"])]
    assert [n.output[0] for n in in_order(nodes)] == ["b", "c", "d"]


class Branches(torch.nn.Module):
    def forward(self, x, t):
        return x * 2 if float(x.sum()) > 0 else x


def bare(model):
    return Sampler(model, NoiseSchedule.linear(20), ModelSpec(shape=(1, 8, 8)), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 99}, r"opset must be in 18 … 23, got 99"),
        ({"opset": True}, r"opset must be in"),
        ({"what": "everything"}, r"what must be one of network, step, chain, got 'everything'"),
        ({"precision": "fp8"}, r"precision must be one of"),
        ({"what": "chain", "noise": "input"}, r"noise must be philox for chain"),
        ({"what": "network", "guidance": True}, r"guidance must be False here"),
        ({"what": "chain", "tensorrt": True}, r"what must be network or step for TensorRT, got chain"),
        ({"batch": 0}, r"batch must be a positive int or None, got 0"),
        ({"solver": "euler"}, r"solver must be one of"),
        ({"steps": 10**6}, r"steps must be in 1 … 40"),
    ],
)
def test_refused_options_write_nothing(sampler, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        export_onnx(sampler, tmp_path / "m.onnx", **options)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_a_network_that_cannot_be_traced(tmp_path):
    with pytest.raises(ValueError, match="the network must be traceable") as caught:
        export_onnx(bare(Branches()), tmp_path / "m.onnx", what="network")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_a_bare_function_can_be_exported(tmp_path):
    sampler = bare(lambda x, t: x / (1 + t.view(-1, 1, 1, 1) / 10))
    path = export_onnx(sampler, tmp_path / "m.onnx", what="network").files[0]
    theirs = OnnxSampler(path, "cpu").sample(3, solver="ddpm", steps=4, progress=False)
    torch.testing.assert_close(theirs, sampler.sample(3, solver="ddpm", steps=4, progress=False), rtol=0, atol=TIGHT)


def test_the_onnx_engine_keeps_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDDPM_CACHE", str(tmp_path))
    options = {"class_labels": [0, 1, 2], "guidance_scale": 2.0, "solver": "ddpm", "steps": 5, "progress": False}
    sampler, written = one_level_sampler(), []
    ours = sampler.sample(3, **options)
    for _ in range(2):
        other = Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine="onnx")
        torch.testing.assert_close(other.sample(3, **options), ours, rtol=0, atol=TIGHT)
        assert other.engine.used == "onnx"
        written.append([(path.name, path.stat().st_ino) for path in tmp_path.glob("*.onnx")])
    assert len(written[0]) == 1 and written[0] == written[1]
    with pytest.raises(ValueError, match="precision must be fp32 for the onnx engine, got bf16"):
        Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine="onnx", precision="bf16")


def test_the_onnx_engine_notices_changed_weights(tmp_path):
    changing = two_layers_sampler(engine="eager")
    other = Sampler(changing.model, changing.schedule, changing.spec, device="cpu", engine="onnx")
    options = {"class_labels": [0, 1, 2], "steps": 3, "progress": False}
    before = other.sample(3, **options)
    with torch.no_grad():
        changing.model.last.bias.add_(0.5)
    after = other.sample(3, **options)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, changing.sample(3, **options), rtol=0, atol=TIGHT)
    path = export_onnx(other, tmp_path / "m.onnx", what="network").files[0]  # of the network underneath
    assert OnnxSampler(path, "cpu").facts["weights_sha256"]


class SelfConditioned(torch.nn.Module):
    def forward(self, x, t, x_self_cond):
        return 0.4 * x + 0.3 * torch.tanh(x_self_cond) + t.view(-1, 1, 1, 1) / 40


def test_self_conditioning_and_dynamic_thresholds(tmp_path):
    spec = ModelSpec(shape=(1, 8, 8), self_condition=True, to_unit="affine", threshold=(0.9, 2.0))
    sampler = Sampler(SelfConditioned(), NoiseSchedule.linear(20), spec, device="cpu", engine="eager")
    method = {"solver": "ddpm", "steps": 6}
    path = export_onnx(sampler, tmp_path / "m.onnx", **method).files[0]
    ours = sampler.sample(3, progress=False, **method)
    torch.testing.assert_close(OnnxSampler(path, "cpu").sample(3, progress=False), ours, rtol=0, atol=1e-5)
    plain = sampler.sample(3, progress=False, clip=1.0, **method)
    assert (plain - ours).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["m.txt", "m", "folder.onnx"])
def test_bad_file_names(sampler, tmp_path, name):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises((ValueError, OSError), match=r"must end in \.onnx|it is a folder"):
        export_onnx(sampler, tmp_path / name)


def damaged(kind, path, tmp_path):
    """A damaged or foreign file of each kind."""
    target = tmp_path / "m.onnx"
    if kind == "absent":
        return target
    data = path.read_bytes()
    if kind == "foreign":
        model = onnx.load(path)
        del model.metadata_props[:]
        data = model.SerializeToString()
    elif kind == "partial":
        model = onnx.load(path)
        next(entry for entry in model.metadata_props if entry.key == "fastddpm").value = '{"format":1}'
        data = model.SerializeToString()
    elif kind == "weights":
        weights = write_model(target, onnx.load(path), external=True)[1]
        weights.write_bytes(weights.read_bytes()[:-5000])
        return target
    elif kind == "later":
        model = onnx.load(path)
        entry = next(entry for entry in model.metadata_props if entry.key == "fastddpm")
        entry.value = entry.value.replace('"format":1', '"format":99')
        data = model.SerializeToString()
    target.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello" * 99}.get(kind, data))
    return target


@pytest.mark.parametrize("kind", ["absent", "truncated", "empty", "text", "foreign", "partial", "weights", "later"])
def test_bad_files(exported, tmp_path, kind):
    with pytest.raises(CheckpointError) as caught:
        OnnxSampler(damaged(kind, exported("step").files[0], tmp_path), "cpu")
    assert "\n" not in str(caught.value) and "m.onnx" in str(caught.value)


def test_missing_providers(exported, monkeypatch):
    path = exported("network").files[0]
    with pytest.raises(ValueError, match="provider must be auto, cpu, cuda or tensorrt, got 'npu'"):
        OnnxSampler(path, "npu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=r"provider must be one of this onnxruntime's \(cpu\), got 'cuda'; install"):
        OnnxSampler(path, "cuda")
    assert OnnxSampler(path).session.provider == "cpu"


def test_a_provider_whose_libraries_are_missing_falls_back_with_a_warning(exported, monkeypatch):
    if torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu on a machine without a GPU")
    monkeypatch.setattr("fastddpm.export.session.GPU_FILES", ("/",))
    path = exported("network").files[0]
    with pytest.warns(UserWarning, match="cuda does not work here, running on the cpu"):
        assert OnnxSampler(path).session.provider == "cpu"
    with pytest.raises(ValueError, match="provider cuda must find its libraries"):
        OnnxSampler(path, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 1, 8, 8))}, "x must be an array of float32, got float64"),
        ({"x": np.zeros((2, 3, 8, 8), dtype=np.float32)}, r"x must have shape \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        ({"t": np.zeros(3, dtype=np.int64)}, r"t must have shape \(2,\), got \(3,\)"),
        ({"t": [0, 0]}, "t must be an array of int64, got list"),
        ({"z": np.zeros(2)}, "inputs must be x, t, y, got"),
    ],
)
def test_wrong_inputs(exported, change, message):
    session = OnnxSession(exported("network").files[0], "cpu")
    feeds = {"x": np.zeros((2, 1, 8, 8), dtype=np.float32), "t": np.zeros(2, dtype=np.int64)}
    with pytest.raises((TypeError, ValueError), match=message):
        session.run({**feeds, "y": np.zeros(2, dtype=np.int64), **change})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain", {"x_T": torch.zeros(2, 1, 8, 8)}, "x_T must be left out for a chain"),
        ("chain", {"callback": print}, "callback must be left out for a chain"),
        ("chain", {"output": "raw"}, "output must not be raw for this file"),
        ("chain", {"solver": "ddpm"}, "solver must be left out for a chain, got 'ddpm'"),
        ("step", {"noise": torch.zeros(6, 2, 1, 8, 8)}, "noise must be left out for this file"),
        ("step", {"steps": 7}, "steps must be left out for a step, got 7"),
        ("step_input", {"batch_size": 3}, "batch_size must be the file's, 2, got 3"),
        ("step_input", {"noise": torch.zeros(5, 2, 1, 8, 8)}, "noise must have shape"),
        ("step", {"class_labels": [5, 0]}, "class_labels must be in"),
        ("step", {"output": "png"}, "output must be unit, raw, uint8 or pil"),
    ],
)
def test_what_a_file_cannot_do(exported, name, options, message):
    model = OnnxSampler(exported(name).files[0], "cpu")
    with pytest.raises(ValueError, match=message):
        model.sample(2, **{"class_labels": 1, "progress": False, **options})


def test_unknown_options_are_refused(exported):
    model = OnnxSampler(exported("chain").files[0], "cpu")
    with pytest.raises(TypeError, match="options must be those of Sampler.sample, got sede"):
        model.sample(2, sede=1)
    with pytest.raises(ValueError, match="the file must be a network, got a chain"):
        model.network(torch.zeros(1, 1, 8, 8), torch.zeros(1))


def test_cuda_graphs_need_a_step_of_fixed_batch(exported):
    with pytest.raises(ValueError, match="cuda_graph must be False for a chain"):
        OnnxSession(exported("chain").files[0], "cpu", cuda_graph=True)
    with pytest.raises(ValueError, match="export a step with a fixed batch"):
        OnnxSession(exported("step").files[0], "cpu", cuda_graph=True)
