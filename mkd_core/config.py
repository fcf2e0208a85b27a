"""RunConfig: one run; Grid: one table. Both are checked before anything starts; equal configurations have equal ids."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import segmentation_models_pytorch as smp
import timm
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from .augment import STRONG
from .choices import choose, complete_options, refuse_bool, spell_out
from .data import DATASETS
from .data.base import local
from .methods import METHODS
from .models import ARCHITECTURES, file_sha256

# Left out of the id by choice: where things lie and on what they run (other hardware changes bits, and training amplifies them), how often
# the run is logged and saved; weights enter by their hash.
NOT_IDENTITY = {"root", "device", "threads", "workers", "checkpoint_every", "keep_every", "log_every", "weights"}


# Raised when a change of the code changes results, so that runs from before it are not taken for new ones. 1 is left out of the id: runs
# are older than this number.
RESULTS = 1

# Options younger than some runs, with the value that those runs had: left out of the id at that value.
YOUNGER = {"mkd": {"fda_ramp": "cosine", "fda_detach": True, "law": "xor"}}


class _Checked(BaseModel):
    """A model whose faults are told in our words, not in pydantic's."""

    def __init__(self, **keys: Any):
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise ValueError(spell_out(error)) from None


class RunConfig(_Checked):
    """Everything that decides a run. Flat; unknown keys, methods, options and values out of range are errors that list what is allowed.

    `options` are the keyword arguments of the method's constructor, `dataset_options` those of the data set's; defaults are filled in, so
    the record of a run states every hyper-parameter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # Data.
    dataset: str = Field("shapes", description="shapes, folder, voc, voc_aug, cityscapes, coco")
    root: str = Field("", description="folder of the data set; not needed for shapes")
    dataset_options: dict[str, Any] = {}
    split: str = Field("random/32", description='"cps/1_16", "u2pl/1_8", "classic/92", "pseudoseg/1_512", "random/1_16", or a list folder')
    # Method and networks.
    method: str = "mkd"
    options: dict[str, Any] = {}
    arch: Literal[ARCHITECTURES] = "deeplabv3plus"  # type: ignore[valid-type]
    encoder: str = "resnet50"
    encoder_depth: int = Field(5, ge=3, le=5, description="stages of the encoder that run; 4: a ResNet ends after layer3")
    weights: str = Field("", description="local file with the encoder's ImageNet weights; '' starts from random ones")
    channels: int = Field(256, gt=0, le=4096, description="of the decoder")
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: Literal["batch", "group"] = "batch"
    bn_momentum: float = Field(0.1, gt=0, le=1)
    # Views.
    crop: tuple[int, int] = Field((512, 512), description="height, width; multiples of 16")
    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the random scale")
    base: int = Field(0, ge=0, le=16_384, description="0: scale the native size; else, from 16 on, the long side becomes scale * base")
    strong: Literal[tuple(STRONG)] = "one_of"  # type: ignore[valid-type]
    weak_photometric: bool = Field(False, description="colour distortion in the weak view and on labeled images (released MKD)")
    # Optimisation.
    steps: int = Field(30_000, gt=0)
    batch: int = Field(16, gt=0, description="labeled images a step, and as many unlabeled ones")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.0025, gt=0)
    head_lr: float = Field(1.0, gt=0, description="learning rate of all but the encoders, as a multiple of lr (UniMatch 10)")
    weight_decay: float = Field(5e-4, ge=0)
    power: float = Field(0.9, ge=0, description="poly schedule: lr (1 - step / steps) ** power")
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(0, ge=0)
    # Evaluation.
    protocol: Literal["whole", "long512", "sliding"] = "whole"  # evaluate.PROTOCOLS
    evaluate_every: int = Field(0, ge=0, description="steps; 0: at the end only")
    quality_images: int = Field(64, ge=0, description="unlabeled images with withheld labels on which pseudo-labels are measured")
    # Machine: not part of the id.
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1 ...")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of torch; 0: its own choice")
    workers: int = Field(0, ge=0, le=1024, description="loader processes")
    checkpoint_every: int = Field(1_000, gt=0)
    keep_every: int = Field(0, ge=0, description="steps between checkpoints that stay, for the explorer; 0: only the last one stays")
    log_every: int = Field(50, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key, value in data.items() if isinstance(data, dict) else ():
            choose("RunConfig key", key, cls.model_fields)
            refuse_bool(key, cls.model_fields[key].annotation, *(value if isinstance(value, list | tuple) else [value]))
        return data

    @field_validator("dataset")
    @classmethod
    def _dataset(cls, name: str) -> str:
        return choose("data set", name, DATASETS)

    @field_validator("method")
    @classmethod
    def _method(cls, name: str) -> str:
        return choose("method", name, METHODS)

    @field_validator("encoder")
    @classmethod
    def _encoder(cls, name: str) -> str:
        if name.startswith("tu-"):
            return "tu-" + choose("timm model", name[3:], timm.list_models())
        return choose("encoder", name, smp.encoders.get_encoder_names())

    @field_validator("crop")
    @classmethod
    def _crop(cls, crop: tuple[int, int]) -> tuple[int, int]:
        if any(side <= 0 or side % 16 for side in crop):
            raise ValueError(f"crop sides must be positive multiples of 16 (the encoder's stride); got {crop}")
        return crop

    @field_validator("scale")
    @classmethod
    def _scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0.05 <= scale[0] <= scale[1] <= 20:
            raise ValueError(f"scale must be (low, high) with 0.05 <= low <= high <= 20; got {scale}")
        return scale

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        object.__setattr__(self, "options", complete_options(self.method, METHODS[self.method], self.options, "build"))
        object.__setattr__(
            self, "dataset_options", complete_options(f"data set {self.dataset!r}", DATASETS[self.dataset], self.dataset_options, "root")
        )
        if self.batch < 2 and self.norm == "batch":
            raise ValueError(
                "batch must be at least 2: BatchNorm cannot normalise a single image (DeepLabV3+ pools to 1 x 1); or norm='group'"
            )
        if 0 < self.base < 16:
            raise ValueError(f"base must be 0, or the long side of an image in pixels, at least 16; got {self.base}")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every must be a multiple of checkpoint_every ({self.checkpoint_every}); got {self.keep_every}")
        return self

    @property
    def named(self) -> bool:
        """Whether the files that `id` takes in are there: the weights, a folder's lists."""
        weights = not self.weights or os.path.isfile(local(self.weights))
        return weights and (self.dataset != "folder" or os.path.isdir(local(self.root)))

    @property
    def id(self) -> str:
        """Readable prefix and a hash of all that can change the result: `shapes-random_32-mkd-s0-1f2e3d4c`."""
        identity = self.model_dump(mode="json", exclude=NOT_IDENTITY)
        identity["weights"] = file_sha256(self.weights) if self.weights else ""
        young = YOUNGER.get(self.method, {}).items()
        identity["options"] = {name: value for name, value in self.options.items() if (name, value) not in young}
        for key, default in {"encoder_depth": 5, "head_lr": 1.0}.items():  # younger than some runs
            if identity[key] == default:
                del identity[key]
        if RESULTS > 1:
            identity["results"] = RESULTS
        if self.dataset == "folder":  # its lists tell one folder from another, wherever it lies
            root, options = local(self.root).resolve(), self.dataset_options
            names = [options["train"], options["val"], "classes.txt", f"{self.split}/labeled.txt", f"{self.split}/unlabeled.txt"]
            identity["root"] = root.name
            identity["lists"] = [file_sha256(root / name) for name in names if name and (root / name).is_file()]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        data = identity.get("root") or self.dataset
        return f"{data}-{self.split}-{self.method}-s{self.seed}-{digest}".replace("/", "_").replace(" ", "_")


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of a run folder; ValueError where there is none, or none that this version of the suite knows."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"there is no run in {folder}")
    try:
        return RunConfig(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another version of the suite: {error}") from error


class Grid(_Checked):
    """The runs of a table: every row in every column with every seed; no columns: one without a name.

    A row's keys win over a column's, and these over the common ones; "{seed}" in a split's name is filled in.

    All configurations are checked when the grid is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    common: dict[str, Any]
    rows: dict[str, dict[str, Any]] = Field(min_length=1)
    columns: dict[str, dict[str, Any]] = Field({"": {}}, min_length=1)
    seeds: list[StrictInt] = Field(min_length=1)

    @cached_property
    def cells(self) -> dict[str, dict[str, list[RunConfig]]]:
        """Row name -> column name -> one configuration a seed."""

        def config(row: str, column: str, seed: int) -> RunConfig:
            keys = self.common | self.columns[column] | self.rows[row] | {"seed": seed}
            try:
                return RunConfig(**keys | {"split": str(keys["split"]).replace("{seed}", str(seed))} if "split" in keys else keys)
            except ValueError as error:
                raise ValueError(f"{', '.join(filter(None, (row, column)))}, seed {seed}: {error}") from None

        return {row: {column: [config(row, column, seed) for seed in self.seeds] for column in self.columns} for row in self.rows}

    @property
    def runs(self) -> dict[str, list[RunConfig]]:
        """Row name -> its configurations, column by column, seed by seed."""
        return {name: [config for configs in row.values() for config in configs] for name, row in self.cells.items()}

    @model_validator(mode="after")
    def _all_valid(self) -> Grid:
        if any("seed" in keys for keys in (self.common, *self.rows.values(), *self.columns.values())):
            raise ValueError("seed stands in `seeds`, not among the keys of the runs")
        if odd := [name for name in (*self.rows, *self.columns) if name.splitlines() not in ([], [name])]:
            raise ValueError(f"names of rows and columns are one line; got {odd[0]!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is given twice: {self.seeds}")
        places: dict[str, list[str]] = {}
        for row, columns in self.cells.items():
            for column, configs in columns.items():
                for config in filter(lambda c: c.named, configs):  # others are planned without their files
                    places.setdefault(config.id, []).append(", ".join(filter(None, (row, column))))
        for run, of in places.items():
            if len(of) > 1:
                raise ValueError(f"two rows are the same run: {' and '.join(map(repr, of))} are {run}")
        return self
