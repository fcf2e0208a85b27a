"""RunConfig: one run; Grid: one table. Both are checked before anything starts. Equal runs have equal ids."""

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import segmentation_models_pytorch as smp
import timm
from pydantic import AfterValidator, Field, StrictInt, ValidationInfo, field_validator, model_validator

from .augment import STRONG
from .choices import Checked, choose, complete_options
from .data import DATASETS
from .data.base import folder_name, local
from .methods import METHODS
from .models import ARCHITECTURES, file_sha256, imagenet_file, stride
from .parameters import lay_over, read_parameters
from .records import PLACES, ROOT

# Not in the id: where things lie, on what they run (other hardware changes bits, and training
# amplifies them), how often the run is logged and saved. Weights enter by their hash.
NOT_IDENTITY = {*PLACES, "device", "devices", "threads", "workers", "tensorboard"}
NOT_IDENTITY |= {"activation_checkpointing", "checkpoint_every", "keep_every", "log_every"}
# Fields of options: the field that says whose they are, and the constructors that take them.
OPTIONS: dict[str, Any] = {"options": ("method", METHODS), "dataset_options": ("dataset", DATASETS)}
DEVICE = r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$"
PARAMETERS = ROOT / "parameters"
TABLE = {"common", "recipes", "rows", "columns"}  # keys of a table's file; a single run's has none of them
OF_METHOD = ("method", "options", "weak_photometric", "bn_momentum")  # of a single run's file, for a row


def _encoder(name: str) -> str:
    if name.startswith("tu-"):
        return "tu-" + choose("timm model", name[3:], timm.list_models())
    return choose("encoder", name, smp.encoders.get_encoder_names())


def _options(field: Any, name: str, options: Mapping[str, Any], changed: bool = False) -> dict[str, Any]:
    """Check and complete options of a method or data set; changed: return those that are not at their default."""
    owner, known = OPTIONS[field]
    called = name if owner == "method" else f"data set {name!r}"
    return complete_options(called, known[name], options, changed)


Dataset = Annotated[str, AfterValidator(lambda name: choose("data set", name, DATASETS))]
MethodName = Annotated[str, AfterValidator(lambda name: choose("method", name, METHODS))]
Encoder = Annotated[str, AfterValidator(_encoder)]
Side = Annotated[int, Field(gt=0)]
Zoom = Annotated[float, Field(ge=0.05, le=20)]


class RunConfig(Checked):
    """Everything that decides a run. Errors list what is allowed, for unknown names and values out of range.

    `options` are keyword arguments of the method's constructor, `dataset_options` of the data set's.
    Defaults are filled in, so that the record of a run states every hyper-parameter.
    """

    dataset: Dataset = Field("shapes", description="shapes, folder, voc, voc_aug, cityscapes, coco")
    root: str = Field("", description="folder of the data set; not needed for shapes")
    dataset_options: dict[str, Any] = Field({}, description="of its class: classes, val ...")
    split: str = Field("random/32", description='"cps/1_16", "classic/92", "random/1_16", or a list folder')
    # Method and networks.
    method: MethodName = Field("mkd", description="mkd methods lists them")
    options: dict[str, Any] = Field({}, description="of the method: mkd methods NAME")
    arch: Literal[ARCHITECTURES] = "deeplabv3plus"  # type: ignore[valid-type]
    encoder: Encoder = "resnet50"
    encoder_depth: int = Field(5, ge=3, le=5, description="stages that run; 4: a ResNet ends after layer3")
    weights: str = Field("", description="file of the encoder's weights; imagenet: fetched; '': random ones")
    # The second network of MKD, CPS and GCT, where it is another one.
    encoder2: Encoder | Literal[""] = ""
    arch2: Literal["", *ARCHITECTURES] = Field("", description="of encoder2")  # type: ignore[valid-type]
    weights2: str = Field("", description="of encoder2")
    channels: int = Field(256, gt=0, le=4096, description="of the decoder")
    dropout: float = Field(0.0, ge=0, lt=1, description="in the decoder")
    norm: Literal["batch", "group"] = "batch"
    bn_momentum: float = Field(0.1, gt=0, le=1, description="share of a batch in BatchNorm's averages")
    # Views.
    crop: tuple[Side, Side] = Field((512, 512), description="height, width; multiples of models.stride")
    scale: tuple[Zoom, Zoom] = Field((0.5, 2.0), description="range of the random scale")
    base: int = Field(0, ge=0, le=16_384, description="0: native size; else the long side is scale * base")
    strong: Literal[tuple(STRONG)] = "one_of"  # type: ignore[valid-type]
    weak_photometric: bool = Field(False, description="colour distortion in the weak view too (released MKD)")
    # Optimisation.
    steps: int = Field(30_000, gt=0, description="of training")
    batch: int = Field(16, gt=0, description="labeled images a step, and as many unlabeled ones")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.0025, gt=0, description="of the encoders, at the start")
    head_lr: float = Field(1.0, gt=0, description="rate of all but the encoders in units of lr (UniMatch 10)")
    weight_decay: float = Field(5e-4, ge=0, description="of the optimizer")
    supervised_loss: Literal["cross_entropy", "ohem"] = "cross_entropy"
    ohem_keep: int = Field(50_000, gt=0, description="pixels per labeled image that OHEM keeps at least")
    power: float = Field(0.9, ge=0, description="poly schedule: lr (1 - step / steps) ** power")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="or bfloat16; on a GPU, TF32")
    seed: int = Field(0, ge=0, description="of the first weights, the order of images, random splits")
    # Evaluation.
    protocol: Literal["whole", "long512", "sliding"] = Field("whole", description="or long512, sliding")
    evaluate_every: int = Field(0, ge=0, description="steps; 0: at the end only")
    quality_images: int = Field(64, ge=0, description="unlabeled images on which pseudo-labels are measured")
    # Machine: not part of the id.
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, cuda:1 ...")
    devices: int = Field(1, ge=1, description="GPUs of this machine, a process each, that share every batch")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of torch; 0: as many as cores are idle")
    workers: int = Field(-1, ge=-1, le=1024, description="loader processes; -1: 8 with a GPU, else none")
    activation_checkpointing: bool = Field(False, description="less memory, a longer step, the same numbers")
    checkpoint_every: int = Field(1_000, gt=0, description="steps")
    keep_every: int = Field(0, ge=0, description="steps between checkpoints that stay; 0: the last alone")
    log_every: int = Field(50, gt=0, description="steps")
    cache: str = Field("", description="folder that keeps pictures decoded: for large PNGs (Cityscapes)")
    tensorboard: bool = Field(False, description="TensorBoard's event files too, in the run's folder")

    @field_validator("weights", "weights2")
    @classmethod
    def _by_name(cls, weights: str, info: ValidationInfo) -> str:
        encoder = info.data.get(str(info.field_name).replace("weights", "encoder"))
        return imagenet_file(encoder) if weights == "imagenet" and encoder else weights

    @field_validator("options", "dataset_options")
    @classmethod
    def _complete(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        owner = info.data.get(OPTIONS[str(info.field_name)][0])
        return _options(info.field_name, owner, options) if owner else options  # of a name refused already

    @field_validator("crop")
    @classmethod
    def _sides(cls, crop: tuple[int, int], info: ValidationInfo) -> tuple[int, int]:
        arch, encoder, arch2, encoder2 = map(info.data.get, ("arch", "encoder", "arch2", "encoder2"))
        for net in ((arch, encoder), (arch2 or arch, encoder2 or encoder)) if arch and encoder else ():
            if crop[0] % (least := stride(*net)) or crop[1] % least:
                raise ValueError(f"'crop': sides must be multiples of {least}; got {crop}")
        return crop

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keep, every, own = self.keep_every, self.checkpoint_every, self.model_dump(exclude_defaults=True)
        faults = {
            f"scale is (low, high); got {self.scale}": self.scale[0] > self.scale[1],
            f"base must be 0 or the long side of an image, from 16 on; got {self.base}": 0 < self.base < 16,
            "batch must be at least 2: BatchNorm cannot take one image, norm='group' can":
                self.batch < 2 and self.norm == "batch",
            f"{self.devices} devices share a batch equally; device is auto, cpu or cuda then":
                self.batch % self.devices or (self.devices > 1 and ":" in self.device),
            f"keep_every must be a multiple of checkpoint_every, {every}": keep % every,
            "weights2 are of encoder2, which is not given": self.weights2 and not self.encoder2,
            "ohem_keep is of supervised_loss 'ohem'": "ohem_keep" in own and "supervised_loss" not in own,
        }  # fmt: skip
        if found := [fault for fault, is_there in faults.items() if is_there]:
            raise ValueError("; ".join(found))
        return self

    @property
    def second(self) -> Self:
        """This run with its second network as the first."""
        keys = {"encoder": self.encoder2 or self.encoder, "arch": self.arch2 or self.arch}
        return self.model_copy(update=keys | {"weights": self.weights2 if self.encoder2 else self.weights})

    def absolute(self) -> Self:
        """Return this run with absolute places of data and weights, which hold from anywhere."""
        given = {key: local(place).absolute() for key in PLACES if (place := getattr(self, key))}
        return self.model_copy(update={key: str(place) for key, place in given.items()})

    @property
    def named(self) -> bool:
        """Whether the files that `id` takes in are there: the weights, a folder's lists."""
        there = all(local(path).is_file() for path in (self.weights, self.weights2) if path)
        return there and (self.dataset != "folder" or local(self.root).is_dir())

    @property
    def id(self) -> str:
        """Prefix to read and hash of all that can change the result: shapes-random_32-mkd-s0-1f2e3d4c.

        What is at its default is not in it: an option that is added later leaves the ids of old runs alone.
        """
        identity = self.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_defaults=True)
        for key, (owner, _) in OPTIONS.items():
            identity[key] = _options(key, getattr(self, owner), getattr(self, key), changed=True)
        for key in ("weights", "weights2"):
            identity |= {key: file_sha256(path)} if (path := getattr(self, key)) else {}
        if self.dataset == "folder":  # its lists tell one folder from another, wherever it lies
            root, split = local(self.root).resolve(), self.split
            own = [self.dataset_options["train"], self.dataset_options["val"], "classes.txt"]
            files = [root / n for n in (*own, f"{split}/labeled.txt", f"{split}/unlabeled.txt") if n]
            identity["lists"] = [file_sha256(path) for path in files if path.is_file()]
            identity["root"] = folder_name(root)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{identity.get('root') or self.dataset}-{self.split}-{self.method}-s{self.seed}-{digest}"
        return name.replace("/", "_").replace(" ", "_")


class Grid(Checked):
    """The runs of a table: every row in every column with every seed; no columns: one without a name.

    A row's keys win over a column's, and these over `common`. "{seed}" in a split's name is filled in.
    A row with `recipe: NAME` starts from that one of `recipes`. `base`: the files below, see `with_bases`.
    All configurations are checked when the grid is made.
    """

    base: str | list[str] = ""
    common: dict[str, Any] = Field({})
    recipes: dict[str, dict[str, Any]] = Field({})
    rows: dict[str, dict[str, Any]] = Field(min_length=1)
    columns: dict[str, dict[str, Any]] = Field({"": {}}, min_length=1)
    seeds: list[StrictInt] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _on_bases(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_bases(values)

    @cached_property
    def cells(self) -> dict[str, dict[str, list[RunConfig]]]:
        """Row name -> column name -> one configuration a seed."""
        return {r: {c: [self._config(r, c, s) for s in self.seeds] for c in self.columns} for r in self.rows}

    @property
    def runs(self) -> dict[str, list[RunConfig]]:
        """Row name -> its configurations, column by column, seed by seed."""
        return {name: [c for configs in row.values() for c in configs] for name, row in self.cells.items()}

    def _config(self, row: str, column: str, seed: int) -> RunConfig:
        own = dict(self.rows[row])
        try:
            if recipe := own.pop("recipe", None):
                own = lay_over(self.recipes[choose("recipe", recipe, self.recipes)], own)
            keys = self.common | self.columns[column] | own
            if "seed" in keys:
                raise ValueError("seed stands in `seeds`, not among the keys of the runs")
            if isinstance(keys.get("split"), str):
                keys["split"] = keys["split"].replace("{seed}", str(seed))
            return RunConfig(**keys, seed=seed)
        except ValueError as error:
            raise ValueError(f"{', '.join(filter(None, (row, column)))}, seed {seed}: {error}") from None

    @model_validator(mode="after")
    def _no_run_twice(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} hold the same run twice")
        found: dict[str, str] = {}
        for row, configs in self.runs.items():
            for config in filter(lambda c: c.named, configs):  # others are planned without their files
                if (other := found.setdefault(config.id, row)) != row:  # columns of a row may share one
                    raise ValueError(f"rows {other!r} and {row!r} hold the same run, {config.id}")
        return self


def read_config(folder: str | Path) -> RunConfig:
    """Read the configuration of a run folder; ValueError where it cannot be read."""
    path = Path(folder) / "config.json"
    try:
        return RunConfig(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another version of the suite: {error}") from error


def with_bases(
    values: Mapping[str, Any], folder: Path = PARAMETERS, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Lay parameters over the files that `base` names: a path, or a list in which later ones win.

    A path is relative to `folder`, where the parameters lie, to parameters/, or to where one works.
    Below a table, a single run's file NAME.yaml gives its values to `common`, and what belongs to
    its method to the recipe NAME. A number as `base` is no file: it is that key of a single run.
    """
    names, result = values.get("base", ""), dict[str, Any]()
    if isinstance(names, int):
        return dict(values)
    for name in filter(None, [names] if isinstance(names, str) else names):
        places = (folder / name, PARAMETERS / name, Path(name))
        path = next((place.resolve() for place in places if place.is_file()), None)
        if path is None:
            raise ValueError(f"base: there is no file {name!r} in {folder}, {PARAMETERS} or where one works")
        if path in above:
            raise ValueError(f"base: {' -> '.join(p.name for p in (*above, path))} is a circle")
        below = with_bases(read_parameters(path), path.parent, (*above, path))
        if TABLE & values.keys() and not TABLE & below.keys():
            recipe = {key: below[key] for key in OF_METHOD if key in below}
            common = {key: value for key, value in below.items() if key not in ("method", "options")}
            below = {"common": common, "recipes": {path.stem: recipe}}
        result = lay_over(result, below)
    return lay_over(result, {key: value for key, value in values.items() if key != "base"})


def drop_foreign_options(values: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Drop what a file holds for another method, or data set, than the one typed; options that are typed stay.

    values: a run's parameters; typed: names of those given beside the file, as in "options.alpha".
    """
    result = dict(values)
    for options, (key, known) in OPTIONS.items():
        if key in typed and options not in typed and values[key] in known:
            has, given = inspect.signature(known[values[key]]).parameters, values.get(options, {})
            mine = {name: of for name, of in given.items() if f"{options}.{name}" in typed}
            result[options] = mine if given.keys() - has.keys() - mine.keys() else given
    return result
