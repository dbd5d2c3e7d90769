"""The Hugging Face Hub: "owner/name", "owner/name/file.pt", each perhaps with "@revision", to a path on this machine.

Only what is needed is fetched: the configurations first, which may rule a repository out, and then one set of weights.
Without a network, or with HF_HUB_OFFLINE=1, the library's cache serves what is in it.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from fastddpm.checkpoints import diffusers, native
from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.diffusers_scheduler import SCHEDULER_NAME
from fastddpm.checkpoints.diffusers_weights import check_variant, choose_weights, missing_weights, shards_of
from fastddpm.common.wording import first_line

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<file>(?:/[\w.+=-]+)*)(?:@(?P<revision>[\w./-]+))?"
)
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_TIMEOUT = 20.0
_CONFIGS = (
    diffusers.INDEX_NAME,
    diffusers.CONFIG_NAME,
    SCHEDULER_NAME,
    f"scheduler/{SCHEDULER_NAME}",
    *(f"{folder}/{diffusers.CONFIG_NAME}" for folder in diffusers.SUBFOLDERS),
)


@dataclasses.dataclass(frozen=True)
class HubId:
    """A repository of models on the Hub, perhaps one file of it."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


def parse_id(name: str) -> HubId | None:
    """What a name means on the Hub, or None if it cannot mean anything there.

    Three parts and more are a file of weights in a repository. Two parts of which the second is named like a file of
    weights are a path on this machine.
    """
    found = _ID.fullmatch(name)
    if found is None or ".." in name or len(found["repo"]) > 96:
        return None
    file = found["file"][1:] or None
    if (file or found["repo"]).endswith(_SUFFIXES) != (file is not None):
        return None
    return HubId(found["repo"], file, found["revision"])


def fetch(wanted: HubId, flags: Mapping[str, object]) -> Path:
    """Bring a checkpoint to this machine, or find it in the cache.

    Args:
        wanted: What to fetch.
        flags: May hold `variant` and `subfolder`, as for diffusers' folders on disk.

    Returns:
        A folder, or a file of weights.

    Raises:
        CheckpointError: If there is no such repository, revision or file, it holds no checkpoint, access to it is
            refused, or there is neither a network nor a copy in the cache.
    """
    files = _list_files(wanted)
    if files is None:
        return _cached(wanted)
    if wanted.file is not None:
        if wanted.file not in files:
            raise CheckpointError(f"{wanted}: there is no such file on the Hub; there are {_some(files)}")
        return _download(wanted, [wanted.file]) / wanted.file
    configs = [name for name in _CONFIGS if name in files]
    if not configs:
        return _only_file(wanted, files)
    root = _download(wanted, configs)
    diffusers.check_pipeline(root)
    return _download(wanted, configs + _weights(wanted, root, files, flags))


def _weights(wanted: HubId, root: Path, files: Collection[str], flags: Mapping[str, object]) -> list[str]:
    """The files of weights that a folder's loader will read."""
    if native.detect(root) and native.WEIGHTS_NAME in files:
        return [native.WEIGHTS_NAME]
    variant = check_variant(flags.get("variant"), str(wanted))
    folders = [name for name in diffusers.SUBFOLDERS if f"{name}/{diffusers.CONFIG_NAME}" in files]
    chosen = flags.get("subfolder") or (folders[0] if folders else "")
    prefix = f"{chosen}/" if chosen else ""
    names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    name = choose_weights(names, variant)
    if name is None:
        raise CheckpointError(missing_weights(f"{wanted}, on the Hub", names, variant))
    return [prefix + part for part in (name, *shards_of(name, names))]


def _only_file(wanted: HubId, files: Collection[str]) -> Path:
    """A repository without configurations is a place for files of weights."""
    weights = [name for name in files if PurePosixPath(name).suffix in _SUFFIXES]
    if len(weights) != 1:
        got = _some(weights) if weights else f"{_some(files)}, none of weights"
        raise CheckpointError(
            f"{wanted}, on the Hub: must be a repository with {diffusers.INDEX_NAME} or {diffusers.CONFIG_NAME}, or "
            f"one file of weights, got {got}; name a file like {wanted.repo}/model.pt"
        )
    return _download(wanted, weights) / weights[0]


def _some(files: Collection[str]) -> str:
    return ", ".join(sorted(files)[:5]) + (" …" if len(files) > 5 else "") or "no files"


def _list_files(wanted: HubId) -> list[str] | None:
    """All files of the repository, or None if the Hub does not answer."""
    import huggingface_hub  # late: it is needed for this alone
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(wanted.repo, revision=wanted.revision, timeout=_TIMEOUT)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{wanted}: access is restricted on the Hub; accept its terms on its page and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no checkpoint at {wanted}, and the Hub has no repository {wanted.repo} that you may read; check the "
            "name, or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{wanted}: the Hub has {wanted.repo}, but no revision {wanted.revision}") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"no checkpoint at {wanted}, and it cannot be a name on the Hub; check it") from error
    except Exception:  # no network, a time-out, a server in trouble: each release has its own types; the cache may help
        return None
    return [sibling.rfilename for sibling in info.siblings or ()]


def _download(wanted: HubId, files: Sequence[str]) -> Path:
    """Fetch these files, unless the cache has them; returns the repository's folder in the cache."""
    from huggingface_hub import snapshot_download

    try:
        patterns = [glob.escape(name) for name in files]
        return Path(snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=patterns))
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, a cache that cannot be written
            raise
        raise CheckpointError(
            f"{wanted}: fetching it from the Hub failed ({first_line(error)}); run the same again, it goes on"
        ) from error


def _cached(wanted: HubId) -> Path:
    """What the cache has of a repository: its folder, or the one file."""
    from huggingface_hub import constants, snapshot_download

    missing = CheckpointError(_unreachable(wanted, constants.HF_HUB_OFFLINE))
    try:
        root = Path(snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
    except Exception as error:
        # A copy that is known to lack files, which is what fetching only some of them makes.
        partial = getattr(error, "snapshot_path", None)
        if partial is None:
            raise missing from error
        root = Path(partial)
    if wanted.file is None and any((root / name).is_file() for name in _CONFIGS):
        return root
    named = [root / wanted.file] if wanted.file else [path for path in root.rglob("*") if path.suffix in _SUFFIXES]
    found = [path for path in named if path.is_file()]
    if len(found) != 1:
        raise missing
    return found[0]


def _unreachable(wanted: HubId, offline: bool) -> str:
    why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face Hub cannot be reached"
    remedy = "unset it" if offline else "connect to the network"
    return f"no checkpoint at {wanted}; {why}, and the cache has no such repository: {remedy}, or give a path on disk"
