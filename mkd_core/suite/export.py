"""A trained network as a file that runs without this suite, and a JSON: how to feed it, and its model card."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..augment import MEAN, STD, normalise
from ..data.base import local
from ..models import file_sha256
from ..records import load, write_atomically
from ..trained import OpenRun
from .predict import open_predictor, refuse_existing

MULTIPLE = 32  # of free image sides: the stride of the deepest encoders
Size = tuple[int, int]
Program = tuple[bytes, Callable[[Tensor], Tensor]]  # the content of a file, and what it does when read back


@torch.no_grad()
def export(
    run: str | Path, out: str | Path = "", *, predictor: str = "", step: int | str | None = None,
    onnx: bool = False, licence: str = "", overwrite: bool = False,
) -> list[Path]:  # fmt: skip
    """Write <predictor>.pt2 (torch.export) or .onnx, and <predictor>.json, to `out`; return both.

    The program maps (B, 3, H, W) float32, preprocessed as the JSON says, to logits (B, C, H, W). B is
    free; H and W are free multiples of MULTIPLE where the network can be traced so (a .pt2 of a vision
    transformer: from 64 on), else the run's crop: the JSON says which. It is read back first, the .onnx
    by onnxruntime, and must give the logits of its network on random images of several sizes.
    ValueError where it does not, or cannot be written.

    out      default: the run folder; run, predictor and step as in `predict`
    licence  of the data, for the model card
    """
    opened, model, name = open_predictor(run, predictor, step, "", "cpu")
    if name == "mean":
        raise ValueError("'mean' is several networks, a program holds one: name it")
    folder = local(out) if str(out) else opened.folder
    suffixes = (".onnx" if onnx else ".pt2", ".json")
    program, about = (folder / f"{name.replace(' ', '_')}{suffix}" for suffix in suffixes)
    refuse_existing([program, about], overwrite)
    content, sizes = _program(_onnx if onnx else _pt2, model.nets[name].eval(), opened.config.crop)
    free = f"any multiple of {MULTIPLE}, at least {min(sizes)[0]}"
    height, width = [free] * 2 if len(set(sizes)) > 1 else sizes[0]
    facts = _card(opened, name) | {
        "licence_of_data": licence or "not stated",
        "checkpoint_sha256": file_sha256(opened.folder / opened.checkpoint),
        "input": "(batch, 3, height, width) float32", "colour": "RGB", "scale": "(value / 255 - mean) / std",
        "mean": MEAN, "std": STD, "height": height, "width": width,
        "padding": "zeros after scaling, at the bottom and right; crop the logits. The scores were made so too, but "
        "for sides that are all multiples of 16, and images of a vision transformer, which were not padded",
        "output": "logits (batch, classes, height, width) float32", "palette": opened.palette.tolist(),
        "scored_by": {"protocol": opened.config.protocol, "window": opened.config.crop},
        "torch": torch.__version__,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(program, content)
    write_atomically(about, json.dumps(facts, indent=1) + "\n")
    return [program, about]


def _program(write: Callable[..., Program], net: nn.Module, crop: Size) -> tuple[bytes, list[Size]]:
    """The content of a program and the image sizes it was checked on: different ones where they are free."""
    for least in (1, 2, 0):  # a grid halved to one patch is traced as a case of its own; 0: at the crop alone
        sizes, shapes = [crop, crop], {0: Dim("batch")}
        if least:
            sizes = [(96, 128), (least * MULTIPLE, least * MULTIPLE), (64, 160)]
            shapes |= {i: MULTIPLE * Dim(side, min=least) for i, side in ((2, "rows"), (3, "columns"))}
        try:
            content, read = write(net, torch.rand(2, 3, *sizes[0]), shapes)
            for count, size in enumerate(sizes, 1):
                x = normalise(torch.rand(count, 3, *size))
                exact = net(x)
                if not (read(x) - exact).abs().max() <= 1e-3 * exact.abs().max():
                    raise ValueError(f"it gives other logits than its network on images of {size}")
            return content, sizes
        except ImportError as error:
            raise ValueError(f"{error}; pip install onnx onnxscript onnxruntime") from error
        except Exception as error:  # of many types: PSPNet's pooling, for one, is of a fixed size in ONNX
            failure = error
    raise ValueError(f"this network cannot be exported: {str(failure)[:300]}") from failure


def _pt2(net: nn.Module, x: Tensor, shapes: dict[int, Any]) -> Program:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=(shapes,), strict=False), buffer)
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def _onnx(net: nn.Module, x: Tensor, shapes: dict[int, Any]) -> Program:
    import onnxruntime

    program = torch.onnx.export(
        net, (x,), dynamo=True, dynamic_shapes=(shapes,), input_names=["image"], output_names=["logits"], verbose=False
    )  # fmt: skip
    content = program.model_proto.SerializeToString()  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(content)
    return content, lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def _card(opened: OpenRun, name: str) -> dict[str, Any]:
    """What a network is and how good, in percent, where the run's record is about these weights."""
    config, record = opened.config, load(opened.folder)
    use = "names the class of each pixel of images like those it was trained on; not judged on others"
    card: dict[str, Any] = {"run": opened.folder.name, "method": config.method, "predictor": name}
    card |= {"data": config.dataset, "intended_use": use}
    if record and opened.checkpoint == "checkpoint.pt":
        card |= {"split": record.split, "evaluated": record.evaluated, "miou": record.predictors[name]}
        if name == next(iter(record.predictors)):
            card["iou"] = dict(zip(record.classes, record.iou, strict=True))
    return card | {"classes": opened.classes}
