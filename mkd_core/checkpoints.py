"""Checkpoints: written whole or not at all, read without unpickling."""

import errno
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .records import write_atomically


def write(state: dict[str, Any], folder: Path, names: Sequence[str]) -> None:
    """Write one file under all of the names, in their order; each appears whole or not at all. OSError on a full disk."""
    first, link = folder / names[0], folder / ".checkpoint.link.tmp"
    try:
        write_atomically(first, partial(torch.save, state))
        for name in names[1:]:
            link.unlink(missing_ok=True)
            try:
                os.link(first, link)
            except OSError:  # a file system without links
                shutil.copyfile(first, link)
            os.replace(link, folder / name)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as "unexpected pos"
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        needed, free = sum(t.nbytes for t in tensors) / 2**20, shutil.disk_usage(folder).free / 2**20
        text = f"{', '.join(names)} could not be written to {folder} ({needed:,.0f} MB needed, {free:,.0f} free): {error}"
        raise OSError(getattr(error, "errno", None) or errno.ENOSPC, text) from error
    finally:
        link.unlink(missing_ok=True)


def read(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Read the state that a run left; nothing is unpickled. ValueError where there is none or it is damaged."""
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: the run is not so far, or kept none (keep_every)")
    keys = ("step", "method", "optimizers", "history", "data", "classes", "seconds", "seconds_training")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return {"commit": "unknown", "id": "unknown"} | state | {key: state[key] for key in keys}
    # Not the file's fault, nothing to delete. Of a file that was cut, torch raises a plain OSError.
    except (PermissionError, IsADirectoryError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises half a dozen unrelated classes here, with advice to unpickle
        what = f"damaged, or no checkpoint of this suite ({type(error).__name__})"
        raise ValueError(f"{path} is {what}; delete it and the run starts anew") from error
