"""Sets that are split off: by image, whatever the order and number of records."""

import dataclasses

import pytest

from world_distill.data.records.reader import RecordError, write_records
from world_distill.data.records.record_format import AnnotatedRecord
from world_distill.data.records.splits import Splits, check_names

IMAGES = [f"{i:016x}" for i in range(2000)]
VALIDATION, TEST = [1, 15, 17, 23, 27, 30, 41, 43, 44, 45, 49], [4, 11, 16]  # of the first 60


def of(splits, images=IMAGES):
    return {image: splits.set_of(image) for image in images}


def test_shares_are_about_right_and_belong_to_the_image():
    sets = of(Splits(0.1, 0.05))
    counts = {name: sum(value == name for value in sets.values()) for name in ("validation", "test", None)}
    assert abs(counts["validation"] - 200) < 40 and abs(counts["test"] - 100) < 30 and sum(counts.values()) == 2000
    assert of(Splits(0.1, 0.05), IMAGES[::-7]) == {image: sets[image] for image in IMAGES[::-7]}
    # Sets that were made once are made again with these.
    assert [i for i in range(60) if sets[IMAGES[i]] == "validation"] == VALIDATION
    assert [i for i in range(60) if sets[IMAGES[i]] == "test"] == TEST


def test_a_larger_share_keeps_the_images_of_a_smaller_one():
    small, large, other = of(Splits(0.02, 0.1)), of(Splits(0.1, 0.1)), of(Splits(0.02, 0.3))
    assert all(large[image] == name for image, name in small.items() if name)
    assert all(other[image] == name for image, name in small.items() if name)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_share_that_takes_no_image_says_which_would(name):
    with pytest.raises(RecordError, match=f"none of 5 images falls into {name} at a share of 0.001: give") as error:
        Splits(**{name: 0.001}).check(IMAGES[:5])
    enough = float(str(error.value).split(f"--{name} ")[1].split()[0])
    Splits(**{name: enough}).check(IMAGES[:5])
    with pytest.raises(RecordError, match="leaves none of 1 images to train on"):
        Splits(validation=0.9999).check(IMAGES[:1])


def records(images):
    return [AnnotatedRecord(f"r{i}", image, b"png", "task", "s", "a", "k", {}) for i, image in enumerate(images)]


def test_names_that_would_be_replaced_are_protected(tmp_path):
    splits = Splits(0.1)
    check_names(tmp_path, "train", splits)
    write_records(tmp_path, "validation", records("a"), metadata=splits.metadata("train_annotated"))
    check_names(tmp_path, "train", splits)
    check_names(tmp_path, "train", dataclasses.replace(splits, validation=0.2))
    with pytest.raises(RecordError, match="split off from train_annotated with `--validation 0.1`: without"):
        check_names(tmp_path, "train", Splits())
    with pytest.raises(RecordError, match="has a set validation of its own"):
        check_names(tmp_path, "other", splits)
    with pytest.raises(RecordError, match="--name validation and --validation: one set cannot be"):
        check_names(tmp_path, "validation", splits)
    check_names(tmp_path, "other", Splits())
