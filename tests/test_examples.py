"""The launchers in examples/: short, and their commands are ones that fastddpm knows."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from fastddpm.shards.part import Part, part_of

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCHERS = ["torchrun.sh", "slurm_array.sh", "kubernetes_job.yaml", "ray_job.sh"]


def text_of(name):
    return (EXAMPLES / name).read_text(encoding="utf-8")


def words_of(name):
    """The fastddpm command of a launcher, without the program's name."""
    if name.endswith(".yaml"):
        [container] = yaml.safe_load(text_of(name))["spec"]["template"]["spec"]["containers"]
        command = container["command"]
    else:
        lines = re.sub(r"\\\n", " ", text_of(name)).splitlines()
        [line] = [line for line in lines if "fastddpm sample" in line and not line.startswith("#")]
        command = shlex.split(line.replace("${1:?OUT}", "OUT").replace("${2:?OUT}", "OUT"))
    return command[command.index("fastddpm") + 1 :]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_short(name):
    assert len(text_of(name).splitlines()) <= 20


@pytest.mark.parametrize("name", LAUNCHERS)
def test_its_command_is_one_of_ours(name):
    from fastddpm.cli import app

    command, *rest = words_of(name)
    made = typer.main.get_command(app).commands[command].make_context(command, rest)
    assert made.params["n"] == 50_000 and made.params["shards"]
    assert made.params["ray"] == ("auto" if name == "ray_job.sh" else None)


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name.endswith(".sh")])
def test_a_shell_can_read_it(name):
    subprocess.run([shutil.which("sh") or "sh", "-n", EXAMPLES / name], check=True)
    done = subprocess.run([EXAMPLES / name], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "OUT" in done.stderr or "address" in done.stderr


def test_kubernetes_knows_all_that_the_job_says():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    job = yaml.safe_load(text_of("kubernetes_job.yaml"))
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    job["spec"]["completionsMode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionsMode"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_eight_pods_begin_far_from_each_other():
    job = yaml.safe_load(text_of("kubernetes_job.yaml"))["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    parts = [part_of({"JOB_COMPLETION_INDEX": str(i)}) for i in range(job["completions"])]
    assert parts == [Part(i, None) for i in range(8)]
