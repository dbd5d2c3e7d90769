"""LabelledPictures: a data set as a list of pictures with their classes; image files are read when their turn comes."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.pictures.data import classes_of, image_files, load_images
from fastddpm.pictures.inputs import Picture


@dataclasses.dataclass(frozen=True)
class LabelledPictures:
    """Pictures of a data set, in order.

    Attributes:
        pictures: paths of image files, or uint8 [C, H, W] each.
        labels: int64 [N], or None.
        class_names: one name per class, or None without labels.
        source: what they are from, for messages.
    """

    pictures: Sequence[Picture]
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    source: str

    def __len__(self) -> int:
        """N."""
        return len(self.pictures)

    def labels_for(self, num_classes: int | None, class_names: tuple[str, ...] | None) -> Tensor | None:
        """The labels by which a network knows the pictures' classes: by name if it has all names, else as they are.

        Args:
            num_classes: of the network; None for one without classes.
            class_names: what it calls them, or None.

        Returns:
            int64 [N], or None where the network or the pictures have no classes.

        Raises:
            ValueError: a class is none of the network's.
        """
        if self.labels is None or num_classes is None:
            return None
        known = {name: label for label, name in enumerate(class_names or ())}
        if self.class_names is not None and set(self.class_names) <= known.keys():
            return torch.tensor([known[name] for name in self.class_names])[self.labels]
        highest = int(self.labels.max())
        if highest >= num_classes:
            raise ValueError(
                f"{self.source}: classes must be those of the network, 0 … {num_classes - 1}, got {highest}; leave the "
                "classes out (--no-classes)"
            )
        return self.labels

    def checksum(self) -> str:
        """What tells the pictures from others, by files' names and sizes or by contents, in hexadecimal."""
        digest = 0
        for picture in self.pictures:
            if isinstance(picture, Tensor):
                content = picture.contiguous().numpy().tobytes()
            else:
                path = Path(str(picture))
                content = f"{path.name} {path.stat().st_size}\n".encode()
            digest = zlib.crc32(content, digest)
        return f"{digest:08x}"


def open_labelled(path: str | Path, *, classes: bool = True) -> LabelledPictures:
    """Open an idx file, an .npz archive or a folder, as `load_images` does; but a folder's images are not read yet.

    Args:
        path: the file or the folder.
        classes: whether to look for classes.

    Raises:
        FileNotFoundError: there is nothing of that path.
        ValueError: what is there is damaged, foreign or inconsistent.
    """
    source = Path(path)
    if source.is_dir() and not list(source.glob("train-images*idx3-ubyte*")):
        files, _ = image_files(source)
        names, labels = classes_of(source, files) if classes else (None, None)
        numbers = None if labels is None else torch.from_numpy(labels).long()
        return LabelledPictures(files, numbers, None if names is None else tuple(names), source.name)
    data = load_images(source, classes=classes)
    return LabelledPictures(list(data.images), data.labels, data.class_names, data.source)
