"""`voc` and `voc_aug`, PASCAL VOC 2012 and its augmented training set, in the layout of the VOC devkit."""

from pathlib import Path

from torchvision import datasets
from torchvision.models.segmentation import FCN_ResNet50_Weights

from ..choices import choose
from .base import DataError, FileDataset, colormap, find_root
from .splits import published


class VOC(FileDataset):
    """1,464 training and 1,449 validation images, 21 classes, 255 = void.

    root               VOC2012, or the folder above it or above VOCdevkit
    prefer_aug_masks   training masks from SegmentationClassAug where it has them (released MKD, U2PL, CCT);
                       val keeps VOC's own (U2PL evaluates on the augmented ones)

    The lists in ImageSets/Segmentation are used where they exist (a part of the data may be listed
    there), else the published ones.
    """

    name = "voc"
    classes = ("background", *FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:])
    palette = colormap(21)
    pattern = r"\d{4}_\d{6}"
    where = (
        "VOC 2012 (JPEGImages, SegmentationClass, ImageSets): http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
        "VOCtrainval_11-May-2012.tar, or `mkd check voc --root FOLDER --download`."
    )
    train_list = "train"

    def __init__(self, root: str, prefer_aug_masks: bool = False):
        below = ("", "VOC2012", "VOCdevkit/VOC2012")
        self.root = find_root(self.name, root, ["JPEGImages"], self.where, below)
        self.train = self._list(self.train_list, f"{self.name}/train")
        self.val = self._list("val", "voc/val")
        # annotated by VOC itself; another file in SegmentationClass is at best a copy of the augmented mask
        self._own_first = frozenset(self.val + (() if prefer_aug_masks else self._list("train", "voc/train")))

    def _list(self, file: str, key: str) -> tuple[str, ...]:
        path = self.root / "ImageSets/Segmentation" / f"{file}.txt"
        return self.read_list(path) if path.is_file() else published(key, self.pattern)

    def files(self, id: str) -> tuple[Path, Path]:
        """Prefer SegmentationClass where VOC annotated the image, else, or if asked to, SegmentationClassAug."""
        masks = [self.root / folder / f"{id}.png" for folder in ("SegmentationClass", "SegmentationClassAug")]
        masks = masks if id in self._own_first else masks[::-1]
        mask = next((mask for mask in masks if mask.is_file()), masks[0])
        return self.root / "JPEGImages" / f"{id}.jpg", mask


class VOCAug(VOC):
    """VOC with the 10,582 images of train_aug, masks of SBD in SegmentationClassAug or SegmentationClass."""

    name = "voc_aug"
    where = VOC.where + (
        " SegmentationClassAug: the archive that the READMEs of CCT and AdvSemiSeg link, or SBD as PNG ("
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz)."
    )
    train_list = "train_aug"


def download(name: str, root: str) -> None:
    """Download VOC 2012, 2 GB, into root/VOCdevkit/VOC2012; torchvision verifies its checksum.

    The augmented masks have no official archive.
    """
    choose("data set to download", name, ["voc", "voc_aug"])
    if not root:
        raise DataError("a download needs root, the folder to put the data in")
    try:
        datasets.VOCSegmentation(root, year="2012", image_set="trainval", download=True)
    except OSError as error:
        raise DataError(f"{error}: fetch it by other means. {VOC.where}") from error
