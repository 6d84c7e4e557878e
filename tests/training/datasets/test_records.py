"""The table of published data sets against the numbers of its papers."""

from clipship.training.datasets.base import Dataset
from clipship.training.datasets.load import READERS
from clipship.training.datasets.records import PUBLISHED_DATASETS

# Name, folder, classes, base and new classes, images to train, validate and test.
PUBLISHED = """
ImageNet             imagenet             1000 500 500 1281167 50000 50000
Caltech101           caltech-101          100  50  50  4128    1649  2465
OxfordPets           oxford_pets          37   19  18  2944    736   3669
StanfordCars         stanford_cars        196  98  98  6509    1635  8041
OxfordFlowers        oxford_flowers       102  51  51  4093    1633  2463
Food101              food-101             101  51  50  50500   20200 30300
FGVCAircraft         fgvc_aircraft        100  50  50  3334    3333  3333
SUN397               sun397               397  199 198 15880   3970  19850
DescribableTextures  dtd                  47   24  23  2820    1128  1692
EuroSAT              eurosat              10   5   5   13500   5400  8100
UCF101               ucf101               101  51  50  7639    1898  3783
ImageNetV2           imagenetv2           1000 500 500 0       0     10000
ImageNetSketch       imagenet-sketch      1000 500 500 0       0     50889
ImageNetA            imagenet-adversarial 200  100 100 0       0     7500
ImageNetR            imagenet-rendition   200  100 100 0       0     30000
AWA2                 awa2                 50   40  10  23527   0     13795
CUB                  cub                  200  150 50  7057    0     4731
SUN                  sun                  717  645 72  10320   0     4020
"""


LINES = [line.split() for line in PUBLISHED.strip().splitlines()]


def numbers_of(dataset: Dataset) -> list[str]:
    """A line of the table."""
    num_classes, num_base = len(dataset.class_names), dataset.num_base
    images = [len(dataset.items(split)) for split in ("train", "val", "test")]
    numbers = (num_classes, num_base, num_classes - num_base, *images)
    return [dataset.record.name, dataset.record.folders[0], *map(str, numbers)]


def test_the_eleven_four_and_three_data_sets_are_known() -> None:
    assert [[record.name, record.folders[0]] for record in PUBLISHED_DATASETS] == [line[:2] for line in LINES]


def test_no_two_records_are_told_by_the_same_name_or_file() -> None:
    for attribute in ("folders", "marks"):
        told = [one for record in PUBLISHED_DATASETS for one in set(getattr(record, attribute)) - {"classnames.txt"}]
        assert len(told) == len(set(told))
    split_files = [record.split_file for record in PUBLISHED_DATASETS if record.split_file]
    assert len(split_files) == len(set(split_files)) == 9


def test_every_record_can_be_read_and_says_where_to_get_it() -> None:
    for record in PUBLISHED_DATASETS:
        assert record.reader in READERS
        assert bool(record.split_file) == (record.reader == "split-file")
        assert "http" in record.source
        assert record.template.count("{}") == 1


def test_templates_are_those_of_the_zero_shot_clip_of_coop() -> None:
    own = {record.name: record.template for record in PUBLISHED_DATASETS if record.template != "a photo of a {}."}
    assert own == {
        "OxfordPets": "a photo of a {}, a type of pet.",
        "OxfordFlowers": "a photo of a {}, a type of flower.",
        "FGVCAircraft": "a photo of a {}, a type of aircraft.",
        "DescribableTextures": "{} texture.",
        "EuroSAT": "a centered satellite photo of {}.",
        "Food101": "a photo of {}, a type of food.",
        "UCF101": "a photo of a person doing {}.",
    }
