"""The published data sets: 11 and 4 variants of ImageNet in the CoOp layout, 3 with proposed zero-shot splits.

Folder names, templates and counts are those of the CoOp code base (KaiyangZhou/CoOp, DATASETS.md) and of the splits
that Xian et al. proposed in "Zero-Shot Learning - A Comprehensive Evaluation of the Good, the Bad and the Ugly"
(their second version).
"""

from __future__ import annotations

from clipship.core.vocabulary import DEFAULT_TEMPLATES
from clipship.training.datasets.base import Counts, DatasetRecord, Reader, base_new_split

Numbers = tuple[int, int, int, int]
"""Classes, and images to train, validate and test."""

_GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_MIRROR = "https://huggingface.co/datasets/zhengli97/prompt_learning_dataset"
_SPLITS_GZSL = "http://datasets.d2.mpi-inf.mpg.de/xian/xlsa17.zip"
_VAL_V2 = "imagenetv2-matched-frequency-format-val"
_PLAIN = DEFAULT_TEMPLATES[0]


def _counts(numbers: Numbers, base: int | None = None) -> Counts:
    classes, train, val, test = numbers
    return Counts(classes=classes, base=base or base_new_split(classes), train=train, val=val, test=test)


def _split_file(folder: str, name: str, image_dir: str, numbers: Numbers, template: str = _PLAIN) -> DatasetRecord:
    return DatasetRecord(
        name=name,
        split_file=f"split_zhou_{name}.json",
        folders=(folder,),
        image_dir=image_dir,
        template=template,
        source=f"{_GUIDE} or {_MIRROR}",
        counts=_counts(numbers),
    )


def _imagenet(
    folder: str, name: str, image_dir: str, numbers: Numbers, reader: Reader, marks: tuple[str, ...] = ()
) -> DatasetRecord:
    return DatasetRecord(
        name=name,
        reader=reader,
        folders=(folder,),
        marks=marks,
        image_dir=image_dir,
        source=_GUIDE,
        counts=_counts(numbers),
    )


def _gzsl(name: str, image_dir: str, numbers: Numbers, seen: int, images: str) -> DatasetRecord:
    return DatasetRecord(
        name=name,
        reader="gzsl",
        folders=(name.lower(), name),
        image_dir=image_dir,
        source=f"{_SPLITS_GZSL} (data/{name}), the images from {images}",
        counts=_counts(numbers, seen),
    )


PUBLISHED_DATASETS = (
    _imagenet("imagenet", "ImageNet", "images", (1000, 1_281_167, 50_000, 50_000), "imagenet",
              ("classnames.txt", "images/val")),
    _split_file("caltech-101", "Caltech101", "101_ObjectCategories", (100, 4128, 1649, 2465)),
    _split_file("oxford_pets", "OxfordPets", "images", (37, 2944, 736, 3669), "a photo of a {}, a type of pet."),
    _split_file("stanford_cars", "StanfordCars", ".", (196, 6509, 1635, 8041)),
    _split_file("oxford_flowers", "OxfordFlowers", "jpg", (102, 4093, 1633, 2463),
                "a photo of a {}, a type of flower."),
    _split_file("food-101", "Food101", "images", (101, 50_500, 20_200, 30_300), "a photo of {}, a type of food."),
    DatasetRecord(
        name="FGVCAircraft", reader="aircraft", folders=("fgvc_aircraft",), marks=("variants.txt", "images"),
        image_dir="images", template="a photo of a {}, a type of aircraft.", source=f"{_GUIDE} or {_MIRROR}",
        counts=_counts((100, 3334, 3333, 3333)),
    ),
    _split_file("sun397", "SUN397", "SUN397", (397, 15_880, 3970, 19_850)),
    _split_file("dtd", "DescribableTextures", "images", (47, 2820, 1128, 1692), "{} texture."),
    _split_file("eurosat", "EuroSAT", "2750", (10, 13_500, 5400, 8100), "a centered satellite photo of {}."),
    _split_file("ucf101", "UCF101", "UCF-101-midframes", (101, 7639, 1898, 3783), "a photo of a person doing {}."),
    _imagenet("imagenetv2", "ImageNetV2", _VAL_V2, (1000, 0, 0, 10_000), "imagenet-numbered", (_VAL_V2,)),
    _imagenet("imagenet-sketch", "ImageNetSketch", "images", (1000, 0, 0, 50_889), "imagenet-test"),
    _imagenet("imagenet-adversarial", "ImageNetA", "imagenet-a", (200, 0, 0, 7500), "imagenet-part",
              ("imagenet-a",)),
    _imagenet("imagenet-rendition", "ImageNetR", "imagenet-r", (200, 0, 0, 30_000), "imagenet-part",
              ("imagenet-r",)),
    _gzsl("AWA2", "JPEGImages", (50, 23_527, 0, 5882 + 7913), 40, "https://cvml.ista.ac.at/AwA2"),
    _gzsl("CUB", "images", (200, 7057, 0, 1764 + 2967), 150, "https://www.vision.caltech.edu/datasets/cub_200_2011"),
    _gzsl("SUN", "images", (717, 10_320, 0, 2580 + 1440), 645,
          "https://cs.brown.edu/~gmpatter/sunattributes.html"),
)  # fmt: skip
"""In the order in which the papers list them."""
