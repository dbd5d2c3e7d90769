"""Where in a file its networks are: in a trainer's list, in a dict of its state, behind a wrapper's prefix."""

import pytest
import torch

from fastddpm import CheckpointError, load_checkpoint
from tests.foreign import FLAGS, foreign_network, foreign_state


def state_of(dialect, shift=0.0):
    """A network's state dict, told from others by its last bias."""
    network = foreign_network(dialect)
    network.conv_out.bias.data += shift
    return foreign_state(dialect, network)


def loaded(tmp_path, dialect, values, **flags):
    torch.save(values, tmp_path / "file.pth")
    return load_checkpoint(tmp_path / "file.pth", **FLAGS[dialect], **flags)


def shift_of(checkpoint, dialect):
    difference = checkpoint.network.conv_out.bias.detach() - foreign_network(dialect).conv_out.bias.detach()
    return round(float(difference.mean()), 3)


def behind(prefix, state):
    return {prefix + name: value for name, value in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_ermongroups_list(tmp_path, prefix):
    """[model, optimizer, epoch, step, ema]: the averaged weights are sampled from; a run without them has four."""
    raw, averaged = behind(prefix, state_of("pesser", 1.0)), state_of("pesser", 2.0)
    checkpoint = loaded(tmp_path, "pesser", [raw, OPTIMIZER, 3, 1000, averaged])
    assert (checkpoint.dialect, shift_of(checkpoint, "pesser")) == ("pesser", 2.0)
    assert checkpoint.training == {"model": "ema", "steps": 1000}
    assert checkpoint.settings["model"] == ("ema", "default")
    checkpoint = loaded(tmp_path, "pesser", [raw, OPTIMIZER, 3, 1000, averaged], model="model")
    assert (checkpoint.training["model"], shift_of(checkpoint, "pesser")) == ("model", 1.0)
    checkpoint = loaded(tmp_path, "pesser", [raw, OPTIMIZER, 3, 1000])
    assert (checkpoint.training["model"], shift_of(checkpoint, "pesser")) == ("model", 1.0)


def test_ermongroups_sigmoid_schedule(tmp_path):
    flags = {**FLAGS["pesser"], "beta_schedule": "sigmoid", "num_diffusion_timesteps": 50}
    torch.save([state_of("pesser"), OPTIMIZER, 3, 1000], tmp_path / "file.pth")
    betas = load_checkpoint(tmp_path / "file.pth", **flags).schedule.betas
    expected = torch.sigmoid(torch.linspace(-6, 6, 50, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4
    torch.testing.assert_close(betas, expected)


@pytest.mark.parametrize("dialect", FLAGS)
@pytest.mark.parametrize("prefix", ["model.", "net.", "diffusion.denoise_fn.", "model.module."])
def test_a_lightning_file(tmp_path, dialect, prefix):
    values = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"lr": 1e-4},
        "optimizer_states": [OPTIMIZER],
        "state_dict": {**behind(prefix, state_of(dialect, 1.0)), "metric.sum": torch.zeros(())},
    }
    checkpoint = loaded(tmp_path, dialect, values)
    assert (checkpoint.dialect, shift_of(checkpoint, dialect)) == (dialect, 1.0)
    assert checkpoint.training == {"model": f"state_dict.{prefix[:-1]}", "steps": 20}
    assert checkpoint.settings["model"][1] == "file"
    with pytest.raises(CheckpointError, match=rf"under state_dict\.{prefix[:-1]}: the file does not say "):
        load_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("dialect", FLAGS)
def test_of_several_networks_the_averaged_one_is_taken(tmp_path, dialect):
    first, second = state_of(dialect, 1.0), state_of(dialect, 2.0)
    for values in (
        {"model": first, "ema": second},
        {"state_dict": {**behind("model.", first), **behind("model_ema.", second)}},
        {"nets": {"unet": first, "unet_ema": second}, "step": 3},
    ):
        assert shift_of(loaded(tmp_path, dialect, values), dialect) == 2.0
    values = {"first": first, "second": second}
    with pytest.raises(CheckpointError, match=r"does not say model \(one of first, second\)"):
        loaded(tmp_path, dialect, values)
    assert shift_of(loaded(tmp_path, dialect, values, model="second"), dialect) == 2.0
    with pytest.raises(CheckpointError, match=r"model must be a network of the file \(first, second\), got 'third'"):
        loaded(tmp_path, dialect, values, model="third")


def test_what_is_wrong_is_said_of_its_place(tmp_path):
    state = state_of("pesser")
    del state["conv_out.bias"]
    with pytest.raises(CheckpointError, match=r"under ema: weights do not fit: conv_out\.bias is missing"):
        loaded(tmp_path, "pesser", [state, OPTIMIZER, 3, 1000, state])


def test_a_list_of_something_else(tmp_path):
    torch.save([torch.zeros(2), {"a": torch.zeros(1)}, [1, [2, [3, [4]]]]], tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="is of no kind that fastddpm reads .*, got list"):
        load_checkpoint(tmp_path / "file.pth")
