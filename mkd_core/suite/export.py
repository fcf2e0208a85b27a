"""A trained network as a file that runs without this suite: a torch.export program, and a JSON that says how to feed it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from ..augment import MEAN, STD, normalise
from ..data.base import local
from ..models import file_sha256
from ..records import write_atomically
from .predict import Predictor, refuse_existing

MULTIPLE = 32  # of free image sides: the stride of the deepest encoders


@torch.no_grad()
def export(
    run: str | Path, out: str | Path = "", *, predictor: str = "", step: int | str | None = None, overwrite: bool = False
) -> list[Path]:
    """Write <predictor>.pt2 and <predictor>.json to `out` or, without it, to the run folder; returns both. run .. step: see Predictor.

    The program maps (B, 3, H, W) float32, preprocessed as the JSON says, to logits (B, C, H, W). B is free; H and W are free multiples of
    MULTIPLE where torch.export can trace and write that, else the run's crop: the JSON says which. It is read back first and must give the
    labels of its network on random images.

    ValueError where it does not, where it cannot be traced at all, where files would be overwritten, and as Predictor.
    """
    model = Predictor(run, predictor, step, device="cpu")
    if len(model.nets) > 1:
        raise ValueError("'mean' is several networks, a program holds one: name it")
    folder = local(out) if str(out) else model.folder
    program, about = (folder / f"{model.name.replace(' ', '_')}{suffix}" for suffix in (".pt2", ".json"))
    refuse_existing([program, about], overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    content, sizes = _program(model.nets[0], model.config.crop)
    loaded = torch.export.load(io.BytesIO(content)).module()
    for count, size in enumerate(sizes, 1):
        x = normalise(torch.rand(count, 3, *size))
        if not torch.equal(loaded(x).argmax(1), model.nets[0](x).argmax(1)):
            raise ValueError(f"the exported program gives other labels than its network on images of {size}: nothing was written")
    height, width = [f"any multiple of {MULTIPLE}"] * 2 if len(set(sizes)) > 1 else sizes[0]
    facts = {
        "run": model.config.id, "predictor": model.name, "checkpoint_sha256": file_sha256(model.folder / model.checkpoint),
        "input": "(batch, 3, height, width) float32", "colour": "RGB", "scale": "(value / 255 - mean) / std", "mean": MEAN, "std": STD,
        "height": height, "width": width, "padding": "zeros after scaling, at the bottom and right; crop the logits",
        "output": "logits (batch, classes, height, width) float32", "classes": model.classes, "palette": model.palette.tolist(),
        "protocol": model.config.protocol, "window": model.config.crop, "torch": torch.__version__,
    }  # fmt: skip
    write_atomically(program, content)
    write_atomically(about, json.dumps(facts, indent=1) + "\n")
    return [program, about]


def _program(net: nn.Module, crop: tuple[int, int]) -> tuple[bytes, list[tuple[int, int]]]:
    """The content of a .pt2 file and image sizes to check it on: different ones where height and width are free."""
    any_size = {0: Dim("batch"), 2: MULTIPLE * Dim("rows"), 3: MULTIPLE * Dim("columns")}
    for shapes, sizes in ((any_size, [(96, 128), (32, 32), (64, 160)]), ({0: Dim("batch")}, [crop, crop])):
        try:
            buffer = io.BytesIO()
            torch.export.save(torch.export.export(net, (torch.rand(2, 3, *sizes[0]),), dynamic_shapes=(shapes,), strict=False), buffer)
            return buffer.getvalue(), sizes
        except Exception as error:  # of many types. timm's "same" padding, for one, can be traced for any size but not written
            failure = error
    raise ValueError(f"torch.export cannot write this network: {str(failure)[:300]}") from failure
