import json
import shutil

import pytest

from benchmarks import loss_curve
from data.processed import load_dataset
from data.schemas import InputError
from tests.tiny_dataset import MODEL_SIZES, random_tokenizer, walks, write_interactions


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write_interactions(folder / "log.csv")
    config = walks(folder / "dataset", folder / "log.csv")
    load_dataset(config)
    random_tokenizer(config).save_pretrained(folder / "tokenizer")
    return folder


def test_a_curve_repeats_itself_and_agrees_with_itself(prepared):
    dataset, tokenizer = loss_curve.open_prepared(prepared)
    options = {"num_steps": 5, "batch_size": 16, "device": "cpu", "sizes": MODEL_SIZES}
    first, second = (loss_curve.train(dataset, tokenizer, **options) for _ in range(2))
    assert first == second
    assert first[-1] < first[0]
    row = {"dataset_hash": "a", "tokenizer_hash": "b", "batch_size": 16, "losses": first}
    compared = loss_curve.compare(row, row)
    assert compared["agrees"]
    assert compared["largest_difference"] == 0


@pytest.mark.parametrize(
    ("losses", "agrees"), [([4.0, 3.002, 2.0], True), ([4.0, 3.004, 2.0], False), ([4.001, 3.0, 2.0], False)]
)
def test_tolerances_by_hand(losses, agrees):
    row = {"dataset_hash": "a", "tokenizer_hash": "b", "batch_size": 1}
    compared = loss_curve.compare(row | {"losses": losses}, row | {"losses": [4.0, 3.0, 2.0, 1.0]})
    assert compared["compared_steps"] == 3
    assert compared["agrees"] is agrees


def test_curves_of_other_data_are_refused(tmp_path):
    row = {"dataset_hash": "a", "tokenizer_hash": "b", "batch_size": 1, "losses": [1.0]}
    with pytest.raises(InputError, match="the other curve has another dataset_hash"):
        loss_curve.compare(row, row | {"dataset_hash": "c"})
    (tmp_path / "x.json").write_text(json.dumps({"rows": [{}]}))
    with pytest.raises(InputError, match="no curve of this benchmark"):
        loss_curve.read_curve(tmp_path / "x.json")


def test_a_folder_needs_one_data_set(prepared, tmp_path):
    with pytest.raises(InputError, match="expected one prepared data set, got 0"):
        loss_curve.open_prepared(tmp_path)
    shutil.copytree(prepared / "dataset", tmp_path / "dataset" / "a")
    shutil.copytree(prepared / "dataset", tmp_path / "dataset" / "b")
    with pytest.raises(InputError, match="got 2"):
        loss_curve.open_prepared(tmp_path)
