import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.process.timesteps import check_timesteps, respace, spaced_timesteps
from tests.helpers import peers_dir

# (peer, mode) → how that peer arrives at its timesteps.
PEER_MODES = {
    ("diffusers_cifar_like", "ancestral"): lambda: spaced_timesteps(1000, 20, "leading"),
    ("diffusers_cifar_like", "ancestral_small_trailing"): lambda: spaced_timesteps(1000, 15, "trailing"),
    ("diffusers_cifar_like", "ddim"): lambda: spaced_timesteps(1000, 10, "leading"),
    ("diffusers_cifar_like", "dpmpp_2m"): lambda: spaced_timesteps(1000, 11, "leading")[:-1],
    ("diffusers_trained_default", "ancestral"): lambda: spaced_timesteps(1000, 16, "leading"),
    ("diffusers_trained_default", "ancestral_linspace"): lambda: spaced_timesteps(1000, 12, "linspace"),
    ("diffusers_trained_default", "ddim_noclip_trailing"): lambda: spaced_timesteps(1000, 10, "trailing"),
    ("diffusers_trained_default", "dpmpp_2m"): lambda: spaced_timesteps(1000, 11, "leading")[:-1],
    ("lucidrains_pred_v", "ddim"): lambda: spaced_timesteps(1000, 10, "trailing"),
    ("openai_guided", "ancestral"): lambda: respace(1000, "12"),
    ("openai_guided", "ddim"): lambda: respace(1000, "ddim10"),
    ("openai_guided", "ddim_eta"): lambda: respace(1000, "10"),
    ("openai_improved", "ancestral"): lambda: respace(4000, "20"),
    ("openai_improved", "ddim"): lambda: respace(4000, "ddim10"),
    ("openai_improved", "ddim_eta"): lambda: respace(4000, "10"),
    ("pesser_ho", "cross_ancestral"): lambda: respace(1000, 20),
    ("w86763777_ddpm", "cross_ddim"): lambda: respace(1000, "ddim10"),
}


@pytest.mark.parametrize(("peer", "mode"), PEER_MODES, ids=["-".join(key) for key in PEER_MODES])
def test_timesteps_equal_the_peers(peer, mode):
    theirs = np.load(peers_dir() / peer / "oracle.npz")[f"{mode}/t"]
    ours = PEER_MODES[peer, mode]()
    assert ours.dtype == torch.int64
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("peer", ["diffusers_cifar_like", "diffusers_trained_default"])
def test_spacing_rules_equal_every_scheduler_config_of_the_peer(peer):
    data = np.load(peers_dir() / peer / "oracle.npz")
    checked = 0
    for folder in sorted((peers_dir() / peer / "schedulers").iterdir()):
        config = json.loads((folder / "scheduler_config.json").read_text())
        theirs = data[f"{folder.name}/t"].tolist()
        extra = 1 if config["_class_name"] == "DPMSolverMultistepScheduler" else 0
        ours = spaced_timesteps(
            config["num_train_timesteps"],
            len(theirs) + extra,
            config["timestep_spacing"],
            steps_offset=config["steps_offset"],
        )
        assert ours.tolist()[: len(theirs)] == theirs, folder.name
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize(
    ("T", "spec", "expected"),
    [
        (10, "2,3", [9, 7, 5, 4, 0]),
        (11, "2,2", [10, 6, 5, 0]),  # the remainder lengthens the first section
        (10, "1,1", [5, 0]),
        (10, "0,2", [9, 5]),
        (6, "3", [5, 2, 0]),  # 2.5 is rounded to even
        (4, "", [3, 2, 1, 0]),
        (1, "1", [0]),
        (10, "ddim4", [9, 6, 3, 0]),
        (10, "ddim2", [5, 0]),
        (10, 5, [9, 7, 4, 2, 0]),
    ],
)
def test_respacing_strings(T, spec, expected):
    assert respace(T, spec).tolist() == expected


def test_ddim_25_of_1000_is_every_40th():
    assert respace(1000, "ddim25").tolist() == list(range(960, -1, -40))


@pytest.mark.parametrize(
    ("spacing", "offset", "expected"),
    [
        ("leading", 0, [6, 4, 2, 0]),
        ("leading", 1, [7, 5, 3, 1]),
        ("leading", 3, [9, 7, 5, 3]),
        ("trailing", 0, [9, 7, 4, 1]),  # 10, 7.5, 5, 2.5 rounded to even, less one
        ("linspace", 0, [9, 6, 3, 0]),
    ],
)
def test_spacing_by_hand(spacing, offset, expected):
    assert spaced_timesteps(10, 4, spacing, steps_offset=offset).tolist() == expected


@pytest.mark.parametrize("T", [777, 1000, 4000])
def test_spacing_rules_equal_the_numpy_expressions_of_diffusers(T):
    for S in [*range(1, 150), 250, 333, 500, T]:
        trailing = np.round(np.arange(T, 0, -T / S))[:S] - 1
        linspace = np.linspace(0, T - 1, S).round()[::-1]
        leading = (np.arange(0, S) * (T // S)).round()[::-1]
        for rule, theirs in (("trailing", trailing), ("linspace", linspace), ("leading", leading)):
            assert spaced_timesteps(T, S, rule).tolist() == theirs.astype(np.int64).tolist(), (S, rule)


@given(data=st.data(), spacing=st.sampled_from(["leading", "trailing", "linspace"]))
def test_spaced_timesteps_are_valid_and_as_many_as_asked(data, spacing):
    T = data.draw(st.integers(1, 4000))
    S = data.draw(st.integers(1, T))
    steps = spaced_timesteps(T, S, spacing)
    assert len(steps) == S
    check_timesteps("test", T, steps)
    if spacing == "trailing" or (spacing == "linspace" and S > 1):
        assert steps[0] == T - 1
    if spacing != "trailing":
        assert steps[-1] == 0
    if S == T:
        assert steps.tolist() == list(range(T - 1, -1, -1))


@given(data=st.data())
def test_respaced_timesteps_are_valid_and_as_many_as_asked(data):
    T = data.draw(st.integers(1, 2000))
    sections = data.draw(st.integers(1, min(4, T)))
    counts = [data.draw(st.integers(1, T // sections)) for _ in range(sections)]
    steps = respace(T, ",".join(map(str, counts)))
    assert len(steps) == sum(counts)
    check_timesteps("test", T, steps)
    assert steps[-1] == 0


@given(T=st.integers(-1, 50), spec=st.text(alphabet="dim0123,. -x٣", max_size=6))
def test_no_respacing_string_raises_anything_undocumented(T, spec):
    try:
        check_timesteps("test", T, respace(T, spec))
    except ValueError as error:
        assert str(error).startswith("respace:")


@pytest.mark.parametrize(
    ("T", "spec", "match"),
    [
        (10, "11", "at most 10 steps in section 0, got 11"),
        (10, "1,6", "section 1"),
        (1000, "ddim300", "use '300'"),
        (10, "ddim0", "integer stride"),
        (10, "ddim2,3", "must be like"),
        (10, "2.5", "must be like"),
        (10, "-3", "must be like"),
        (10, "5,", "must be like"),
        (10, "0", "at least one step"),
        (0, "1", "T must be"),
    ],
)
def test_bad_respacing_strings(T, spec, match):
    with pytest.raises(ValueError, match=match):
        respace(T, spec)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((10, 11), "S must be in 1 … T = 10, got 11"),
        ((10, 0), "S must be"),
        ((10, 5, "even"), "spacing must be"),
    ],
)
def test_bad_spacing(arguments, match):
    with pytest.raises(ValueError, match=match):
        spaced_timesteps(*arguments)


@pytest.mark.parametrize(("S", "offset"), [(1000, 1), (10, 101), (10, -1)])
def test_offsets_that_leave_the_range_are_refused(S, offset):
    with pytest.raises(ValueError, match="steps_offset must be"):
        spaced_timesteps(1000, S, "leading", steps_offset=offset)


def test_wrong_types():
    for call in (
        lambda: spaced_timesteps(10.0, 5),
        lambda: spaced_timesteps(10, True),
        lambda: respace(10, 2.5),
        lambda: check_timesteps("f", 10, torch.tensor([1.5])),
        lambda: check_timesteps("f", 10, torch.tensor([True])),
    ):
        with pytest.raises(TypeError, match="must be"):
            call()


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([], "at least one"),
        ([[1, 0]], "1-D"),
        ([10, 3], "got 10"),
        ([3, -1], "got -1"),
        ([3, 3], "got 3 followed by 3"),
        ([1, 2], "got 1 followed by 2"),
    ],
)
def test_bad_lists(steps, match):
    with pytest.raises(ValueError, match=match):
        check_timesteps("f", 10, torch.tensor(steps))


def test_checked_timesteps_are_a_copy():
    given_steps = torch.tensor([3, 2])
    checked = check_timesteps("f", 10, given_steps)
    given_steps[0] = 9
    assert checked.tolist() == [3, 2]
