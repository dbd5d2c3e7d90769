"""The before/after examples of docs/drop-in.md: few lines change, both versions run, and they draw the same."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import peers_dir
from tests.pages import ROOT, run_python

TEXT = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
EXAMPLES = [
    (library.split()[0].strip(), block)
    for library, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
    for block in re.findall(r"^```diff\n(.*?)^```$", section, re.S | re.M)
]
PYTHON = [(library, block) for library, block in EXAMPLES if "fastddpm sample" not in block]
FILES = {
    "denoising-diffusion-pytorch": "lucidrains_pred_v/model-4.pt",
    "improved-diffusion": "openai_guided/ema_0.9999_010000.pt",
    "pesser/pytorch_diffusion": "pesser_ho/model-790000.ckpt",
    "w86763777/pytorch-ddpm": "w86763777_ddpm/ckpt.pt",
}
# Where torchvision is missing, the package does not import as a whole.
STAND_IN = """from fastddpm.bench.lucidrains_package import package_module
package_module("denoising_diffusion_pytorch")
"""
MODEL = "model = lambda x, t: x / (1 + t.view(-1, 1, 1, 1) / 100)\n"


def version(block: str, sign: str) -> str:
    return "".join(line[1:] for line in block.splitlines(keepends=True) if line[0] in (" ", sign))


def ids(examples):
    return [f"{library}-{i}" for i, (library, _) in enumerate(examples)]


@pytest.mark.parametrize("library, block", EXAMPLES, ids=ids(EXAMPLES))
def test_at_most_five_lines_change(library, block):
    assert sum(line.startswith("+") for line in block.splitlines()) <= 5


def provide(library: str, folder: Path) -> str:
    """Put what the example reads into a folder; returns what must run before it."""
    if library in FILES:
        source = peers_dir() / FILES[library]
        shutil.copy(source, folder / source.name)
    if library == "diffusers":
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "my-ddpm")
    return {"denoising-diffusion-pytorch": STAND_IN, "Your": MODEL}.get(library, "")


@pytest.mark.parametrize("library, block", PYTHON, ids=ids(PYTHON))
def test_example(library, block, place, single_thread):
    if library == "denoising-diffusion-pytorch":
        pytest.importorskip("einops")
    prelude = provide(library, place)
    after = run_python(prelude + version(block, "+"), "drop-in.md")["images"]
    if "\n images" in block:
        before = run_python(prelude + version(block, "-"), "drop-in.md")["images"]
        before, after = torch.as_tensor(before), torch.as_tensor(after)
        assert after.shape == before.shape and (after - before).abs().max() <= 1e-4
    else:
        assert len(after) == 2
        assert isinstance(after, list) or bool(torch.isfinite(torch.as_tensor(after)).all())
