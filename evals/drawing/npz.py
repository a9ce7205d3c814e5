"""Many pictures in one NumPy archive, with one of them in memory at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel.errors import AccelError


def write_npz(target: Path, pictures: Sequence[Path], labels: Sequence[int] | None) -> None:
    """`arr_0` (N, H, W, 3) uint8 of the pictures, and `arr_1` (N,) int64 where there are labels; holds one picture at a time.

    Raises AccelError for a picture that cannot be read or has another size than the first. The file appears when it is whole.
    """
    import numpy as np

    part = target.with_name(f".{target.name}.part")
    shape = _pixels(pictures[0]).shape
    with zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), *shape)})
            for path in pictures:
                pixels = _pixels(path)
                if pixels.shape != shape:
                    sizes = " and ".join(f"{width}×{height}" for height, width, _ in (pixels.shape, shape))
                    raise AccelError(f"{path} and {pictures[0].name} are {sizes} pixels: one array holds one size. Delete {path} and run again")
                file.write(pixels.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
    part.replace(target)


def _pixels(path: Path) -> Any:
    """(H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise AccelError(f"cannot read the picture {path}: {error}. Delete it and run the same command again") from error
