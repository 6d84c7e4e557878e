"""The published data sets: 11 and 4 variants of ImageNet in the CoOp layout, 3 with proposed zero-shot splits.

Folder names and templates are those of the CoOp code base (KaiyangZhou/CoOp, DATASETS.md) and of the splits
that Xian et al. proposed in "Zero-Shot Learning - A Comprehensive Evaluation of the Good, the Bad and the Ugly"
(their second version).
"""

from __future__ import annotations

from clipship.core.vocabulary import DEFAULT_TEMPLATES
from clipship.training.datasets.base import DatasetRecord, Reader

_GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_MIRROR = "https://huggingface.co/datasets/zhengli97/prompt_learning_dataset"
_SPLITS_GZSL = "http://datasets.d2.mpi-inf.mpg.de/xian/xlsa17.zip"
_VAL_V2 = "imagenetv2-matched-frequency-format-val"
_PLAIN = DEFAULT_TEMPLATES[0]


def _split_file(folder: str, name: str, image_dir: str, template: str = _PLAIN) -> DatasetRecord:
    return DatasetRecord(
        name=name,
        split_file=f"split_zhou_{name}.json",
        folders=(folder,),
        image_dir=image_dir,
        template=template,
        source=f"{_GUIDE} or {_MIRROR}",
    )


def _imagenet(folder: str, name: str, image_dir: str, reader: Reader, marks: tuple[str, ...] = ()) -> DatasetRecord:
    return DatasetRecord(
        name=name,
        reader=reader,
        folders=(folder,),
        marks=marks,
        image_dir=image_dir,
        source=_GUIDE,
    )


def _gzsl(name: str, image_dir: str, images: str) -> DatasetRecord:
    return DatasetRecord(
        name=name,
        reader="gzsl",
        folders=(name.lower(), name),
        image_dir=image_dir,
        source=f"{_SPLITS_GZSL} (data/{name}), the images from {images}",
    )


PUBLISHED_DATASETS = (
    _imagenet("imagenet", "ImageNet", "images", "imagenet", ("classnames.txt", "images/val")),
    _split_file("caltech-101", "Caltech101", "101_ObjectCategories"),
    _split_file("oxford_pets", "OxfordPets", "images", "a photo of a {}, a type of pet."),
    _split_file("stanford_cars", "StanfordCars", "."),
    _split_file("oxford_flowers", "OxfordFlowers", "jpg", "a photo of a {}, a type of flower."),
    _split_file("food-101", "Food101", "images", "a photo of {}, a type of food."),
    DatasetRecord(
        name="FGVCAircraft", reader="aircraft", folders=("fgvc_aircraft",), marks=("variants.txt", "images"),
        image_dir="images", template="a photo of a {}, a type of aircraft.", source=f"{_GUIDE} or {_MIRROR}",
    ),
    _split_file("sun397", "SUN397", "SUN397"),
    _split_file("dtd", "DescribableTextures", "images", "{} texture."),
    _split_file("eurosat", "EuroSAT", "2750", "a centered satellite photo of {}."),
    _split_file("ucf101", "UCF101", "UCF-101-midframes", "a photo of a person doing {}."),
    _imagenet("imagenetv2", "ImageNetV2", _VAL_V2, "imagenet-numbered", (_VAL_V2,)),
    _imagenet("imagenet-sketch", "ImageNetSketch", "images", "imagenet-test"),
    _imagenet("imagenet-adversarial", "ImageNetA", "imagenet-a", "imagenet-part", ("imagenet-a",)),
    _imagenet("imagenet-rendition", "ImageNetR", "imagenet-r", "imagenet-part", ("imagenet-r",)),
    _gzsl("AWA2", "JPEGImages", "https://cvml.ista.ac.at/AwA2"),
    _gzsl("CUB", "images", "https://www.vision.caltech.edu/datasets/cub_200_2011"),
    _gzsl("SUN", "images", "https://cs.brown.edu/~gmpatter/sunattributes.html"),
)  # fmt: skip
"""In the order in which the papers list them."""
