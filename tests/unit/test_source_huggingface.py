"""Hugging Face datasets: on disk, as parquet files, on the hub; the image column is detected or configured."""

import json
import os
import pickle
import zipfile

import pytest

from agglo.config import build
from agglo.data.loader import Loader
from agglo.data.views import Partition
from agglo.recipe import Views
from agglo.sources import huggingface
from agglo.sources.huggingface import HuggingFace
from agglo.types import ConfigError, ImageError, MissingExtraError
from support.datasets import jpeg

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    datasets.disable_progress_bars()


def rows(count=6, **columns):
    cells = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(count)]
    data = {"label": list(range(count)), "picture": cells}
    features = {"label": datasets.Value("int64"), "picture": datasets.Image()}
    for name, (feature, values) in columns.items():
        data[name], features[name] = values, feature
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    rows().save_to_disk(tmp_path / "pets")
    return tmp_path / "pets"


def test_saved_dataset(saved):
    source = HuggingFace(dataset=str(saved))
    assert (len(source), source.column) == (6, "picture")
    assert [source.name(i) for i in (0, 5, -1)] == ["pets/train/0", "pets/train/5", "pets/train/5"]
    assert source.encoded(3) == jpeg(3)  # the stored bytes, undecoded
    assert source.read(3).size == (40, 30)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.name(2), copy.encoded(2)) == ("pets/train/2", jpeg(2))
    assert len(build("sources", {"kind": "huggingface", "dataset": str(saved)})) == 6


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage", "state"])
@pytest.mark.parametrize("splits", [False, True])
def test_damaged_saved_dataset_is_named(tmp_path, damage, splits):
    saved = rows() if not splits else datasets.DatasetDict({"train": rows()})
    saved.save_to_disk(tmp_path / "pets")
    arrow = next((tmp_path / "pets").glob("**/*.arrow"))
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:300])
    elif damage == "gone":
        arrow.unlink()
    elif damage == "garbage":
        arrow.write_bytes(b"no table" * 100)
    else:
        (arrow.parent / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"pets is a damaged dataset \(.*\): copy or download.*`save_to_disk`"):
        HuggingFace(dataset=str(tmp_path / "pets"))


def test_saved_dataset_with_splits(tmp_path, monkeypatch):
    datasets.DatasetDict({"train": rows(4), "validation": rows(2)}).save_to_disk(tmp_path / "pets")
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert len(HuggingFace(dataset="${PLACE}/pets", split="validation")) == 2
    with pytest.raises(ConfigError, match=r"has no split 'test'; choose from: train, validation"):
        HuggingFace(dataset=str(tmp_path / "pets"), split="test")


@pytest.mark.parametrize("form", ["one file", "a folder", "a glob"])
def test_parquet_files(tmp_path, form):
    folder = tmp_path / "pets"
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        rows().select(range(3 * part, 3 * part + 3)).to_parquet(folder / "data" / f"{part}.parquet")
    paths = {"one file": "data/0.parquet", "a folder": "", "a glob": "data/*.parquet"}
    source = HuggingFace(dataset=str(folder / paths[form]))
    assert [source.encoded(i) for i in range(len(source))] == [jpeg(i) for i in range(3 if form == "one file" else 6)]


def test_plain_parquet_with_bytes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [0, 1], "jpg": [jpeg(0), jpeg(1)], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "plain.parquet")
    source = HuggingFace(dataset=str(tmp_path / "plain.parquet"))
    assert (source.column, source.encoded(1), source.name(1)) == ("jpg", jpeg(1), "plain/train/1")


def test_image_column_is_detected_or_configured(tmp_path):
    two = [{"bytes": jpeg(9), "path": None}] * 6
    rows(mask=(datasets.Image(), two)).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"columns picture, mask could all hold the images; set `column` to one"):
        HuggingFace(dataset=str(tmp_path / "two"))
    assert HuggingFace(dataset=str(tmp_path / "two"), column="mask").encoded(0) == jpeg(9)
    with pytest.raises(ConfigError, match=r"no column 'pictures'; did you mean 'picture'\? \(columns: label \(int64\)"):
        HuggingFace(dataset=str(tmp_path / "two"), column="pictures")
    with pytest.raises(ConfigError, match=r"column 'label' cannot hold images"):
        HuggingFace(dataset=str(tmp_path / "two"), column="label")
    rows().remove_columns("picture").save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has no image column; .*label \(int64\)"):
        HuggingFace(dataset=str(tmp_path / "none"))


def test_rows_with_paths_or_empty(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    data = {"file": [str(tmp_path / "a.jpg"), str(tmp_path / "gone.jpg"), None]}
    datasets.Dataset.from_dict(data).save_to_disk(tmp_path / "paths")
    source = HuggingFace(dataset=str(tmp_path / "paths"), column="file")
    assert source.encoded(0) == jpeg(0)
    with pytest.raises(ImageError, match=r"paths/train/1: .*gone\.jpg cannot be read \(no such file"):
        source.read(1)
    with pytest.raises(ImageError, match=r"paths/train/2: column file of its row holds no image"):
        source.read(2)


def test_bad_rows_do_not_stop_a_run(tmp_path):
    cells = [{"bytes": jpeg(i)[: 300 if i == 2 else None], "path": None} for i in range(5)] + [None]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "bad")
    loader = Loader([HuggingFace(dataset=str(tmp_path / "bad"))], None, [Partition([16], 3)], Views(), workers=2)
    assert len(list(loader.iterate(0, 6))) == 6
    assert sorted(loader.skipped) == ["bad/train/2", "bad/train/5"]


def test_missing_or_empty_datasets(tmp_path, saved):
    with pytest.raises(ConfigError, match=r"pet' does not exist; did you mean .*pets\?"):
        HuggingFace(dataset=str(tmp_path / "pet"))
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"neither .* nor parquet files; use `kind: folder` for image files"):
        HuggingFace(dataset=str(tmp_path / "photos"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match=r"broken\.parquet cannot be read as parquet"):
        HuggingFace(dataset=str(tmp_path / "broken.parquet"))
    rows(0).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match="has no rows"):
        HuggingFace(dataset=str(tmp_path / "empty.parquet"))


def test_hub_without_network(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/pets' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(huggingface.SourceError) as caught:
        HuggingFace(dataset="owner/pets")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert "Unset HF_HUB_OFFLINE, or on a machine with a network" in str(caught.value)
    assert "hf download --repo-type dataset owner/pets --local-dir pets" in str(caught.value)
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(huggingface.SourceError, match=r"the hub cannot be reached.* On a machine with a network"):
        HuggingFace(dataset="owner/pets")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/pets' is a gated dataset on the Hub."),
            "is gated: .*"
            r"huggingface\.co/datasets/owner/pets, then run `hf auth login`",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/pets' doesn't exist"), "no such dataset on the hub"),
        (
            ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."),
            r"split 'dev': Unknown split .*'test'",
        ),
        (ValueError("Config name is missing.\nPlease pick one among ..."), "Config name is missing"),
    ],
)
def test_hub_errors(monkeypatch, error, why):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=why):
        HuggingFace(dataset="owner/pets", split="dev")


def test_hub_arguments_are_passed_on(monkeypatch):
    requests = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: requests.append((args, options)) or rows())
    source = HuggingFace(dataset="owner/pets", split="dev", config="small", revision="main")
    assert requests == [(("owner/pets", "small"), {"split": "dev", "revision": "main"})]
    assert source.name(0) == "pets/dev/0"


def test_missing_package_is_named(monkeypatch, saved):
    def absent(module, extra):
        raise MissingExtraError(f'{module} is not installed: pip install "agglo[{extra}]"')

    monkeypatch.setattr(huggingface, "require", absent)
    with pytest.raises(MissingExtraError, match=r'datasets is not installed: pip install "agglo\[data\]"'):
        HuggingFace(dataset=str(saved))


def test_classes_from_the_label_column(tmp_path):
    kinds = datasets.ClassLabel(names=["cat", "dog"])
    rows(3, species=(kinds, [1, 0, None]), colour=(datasets.Value("string"), ["red", "blue", "red"])).save_to_disk(
        tmp_path / "pets"
    )
    named = HuggingFace(dataset=str(tmp_path / "pets"))  # the only ClassLabel, not the column named `label`
    assert named.classes == ("cat", "dog")
    assert [named.label(i) for i in range(3)] == [1, 0, None]
    free = HuggingFace(dataset=str(tmp_path / "pets"), label="colour")
    assert free.classes == ()
    assert [free.label(i) for i in range(3)] == ["red", "blue", "red"]
    plain = HuggingFace(dataset=str(tmp_path / "pets"), label="label")
    assert plain.label(2) == "2"
    assert named.read(1).size == (40, 30)
    with pytest.raises(ConfigError, match=r"no column 'colur'; did you mean 'colour'"):
        HuggingFace(dataset=str(tmp_path / "pets"), label="colur")


@pytest.fixture
def copied(tmp_path):
    """A dataset of the hub as `hf download` writes it: three training rows and two test rows."""
    folder = tmp_path / "pets"
    (folder / "data").mkdir(parents=True)
    rows(3).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    rows(5).select([3, 4]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def images(source):
    return [source.encoded(i) for i in range(len(source))]


@pytest.mark.parametrize("place", ["", "data/*.parquet", "**/*.parquet"])
def test_split_of_local_parquet_files_is_honoured(copied, place):
    path = str(copied / place) if place else str(copied)
    assert images(HuggingFace(dataset=path)) == [jpeg(0), jpeg(1), jpeg(2)]
    test = HuggingFace(dataset=path, split="test")
    assert images(test) == [jpeg(3), jpeg(4)]
    assert test.name(0).endswith("/test/0")
    with pytest.raises(ConfigError, match=r"has no split 'dev'; choose from: (train, test|test, train)"):
        HuggingFace(dataset=path, split="dev")


def test_split_expressions_of_local_folders(copied):
    assert images(HuggingFace(dataset=str(copied), split="train[:2]")) == [jpeg(0), jpeg(1)]
    assert len(HuggingFace(dataset=str(copied), split="train+test")) == 5
    with pytest.raises(ConfigError, match="has no split 'dev'"):
        HuggingFace(dataset=str(copied), split="train+dev[:1]")


def test_a_file_that_is_named_by_itself_needs_no_split(copied):
    file = str(copied / "data" / "test-00000-of-00001.parquet")
    assert HuggingFace(dataset=file).name(0) == "test-00000-of-00001/test/0"
    assert len(HuggingFace(dataset=file, split="test")) == 2
    with pytest.raises(ConfigError, match=r"has no split 'train'; choose from: test"):
        HuggingFace(dataset=file, split="train")


def test_splits_in_folder_names(tmp_path, caplog):
    for name, count in (("train/a", 3), ("validation/a", 1), ("more/a", 2)):
        (tmp_path / "pets" / name).parent.mkdir(parents=True)
        rows(count).to_parquet(tmp_path / "pets" / f"{name}.parquet")
    assert len(HuggingFace(dataset=str(tmp_path / "pets"), split="validation")) == 1
    assert "left out 1 files that belong to none of the splits train, validation" in caplog.text
    assert len(HuggingFace(dataset=str(tmp_path / "pets" / "*" / "a.parquet"), split="validation")) == 1
    assert len(HuggingFace(dataset=str(tmp_path / "pets" / "validation" / "a.parquet"), split="validation")) == 1


def test_names_with_the_letters_of_patterns(tmp_path):
    folder = tmp_path / "my[1]*{a,b}"
    folder.mkdir()
    rows(3).to_parquet(folder / "train-[0].parquet")
    rows(2).to_parquet(folder / "test-[0].parquet")
    assert len(HuggingFace(dataset=str(folder), split="test")) == 2
    assert len(HuggingFace(dataset=str(folder / "train-[0].parquet"))) == 3
    datasets.DatasetDict({"train": rows(2), "test": rows(1)}).save_to_disk(tmp_path / "saved[1]")
    assert len(HuggingFace(dataset=str(tmp_path / "saved[1]"), split="test")) == 1


def test_configs_of_a_local_folder(copied):
    (copied / "small").mkdir()
    rows(1).to_parquet(copied / "small" / "x.parquet")
    (copied / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: small/*.parquet\n- config_name: all\n  data_files:\n"
        "  - {split: train, path: data/train*}\n  - {split: test, path: data/test*}\n---\n"
    )
    with pytest.raises(ConfigError, match=r"Config name is missing.*'small', 'all'"):
        HuggingFace(dataset=str(copied))
    assert len(HuggingFace(dataset=str(copied), config="small")) == 1
    assert len(HuggingFace(dataset=str(copied), config="all", split="test")) == 2
    with pytest.raises(ConfigError, match=r"has no config 'large'; choose from: small, all"):
        HuggingFace(dataset=str(copied), config="large")


@pytest.mark.parametrize("option", ["config", "revision"])
def test_options_that_local_data_cannot_honour_are_refused(copied, option):
    forms = [copied, copied / "data" / "*.parquet", copied / "data" / "test-00000-of-00001.parquet"]
    for path in forms:
        with pytest.raises(ConfigError, match=rf"has no {option} 'other'"):
            HuggingFace(dataset=str(path), **{option: "other"})


def test_options_that_saved_datasets_cannot_honour_are_refused(copied, saved, tmp_path):
    for option in ("config", "revision"):
        with pytest.raises(ConfigError, match=rf"has no {option} 'other'"):
            HuggingFace(dataset=str(saved), **{option: "other"})
    with pytest.raises(ConfigError, match=r"pets holds one dataset without splits, not 'test'; remove `split`"):
        HuggingFace(dataset=str(saved), split="test")
    datasets.load_dataset(str(copied / "data"), split="test").save_to_disk(tmp_path / "kept")
    assert HuggingFace(dataset=str(tmp_path / "kept")).name(0) == "kept/test/0"
    with pytest.raises(ConfigError, match=r"holds the split 'test', not 'train'; set `split: test`"):
        HuggingFace(dataset=str(tmp_path / "kept"), split="train")


def test_image_folders_have_splits_and_the_same_class_numbers(tmp_path):
    for number, name in enumerate(("train/cat/0.jpg", "train/dog/1.jpg", "test/dog/2.jpg")):
        file = tmp_path / "animals" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(number))
    source = HuggingFace(dataset=str(tmp_path / "animals"), split="test")
    assert images(source) == [jpeg(2)]
    assert (source.classes[source.label(0)], source.label(0)) == ("dog", 1)
    assert len(HuggingFace(dataset=str(tmp_path / "animals"))) == 2
    with pytest.raises(ConfigError, match=r"has no split 'validation'; choose from: train, test"):
        HuggingFace(dataset=str(tmp_path / "animals"), split="validation")


def test_relative_paths_in_rows_are_relative_to_the_dataset(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg(5))
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "images/a.jpg"}]}), tmp_path / "t.parquet")
    assert HuggingFace(dataset=str(tmp_path / "t.parquet")).encoded(0) == jpeg(5)


def test_splits_that_were_saved_together(tmp_path):
    saved = {"train": rows(4), "test": rows(2)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "both")

    def read(split, folder="both"):
        source = HuggingFace(dataset=str(tmp_path / folder), split=split)
        return [source.encoded(i) for i in range(len(source))]

    assert read("train[1:3]+test[:50%]") == [jpeg(1), jpeg(2), jpeg(0)]  # as of files and of the hub
    for split, own in saved.items():
        own.to_parquet(tmp_path / "files" / f"{split}.parquet")
    assert read("train[1:3]+test[:50%]", "files") == read("train[1:3]+test[:50%]")
    assert read("train[1:3]+test[:50%]", "files/*.parquet") == read("train[1:3]+test[:50%]")
    for folder in ("both", "files", "files/*.parquet"):
        with pytest.raises(ConfigError, match=r"no split 'val'; choose from: (train, test|test, train)"):
            read("train+val", folder)
    with pytest.raises(ConfigError, match=r"train\[1:x\]"):
        read("train[1:x]")
    assert len(read(None, "both/test")) == 2
    with pytest.raises(ConfigError, match=r"holds the split 'test', not 'train'"):
        read("train", "both/test")


def test_images_that_metadata_does_not_list_are_counted(tmp_path, caplog):
    folder = tmp_path / "pets" / "train"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": "a"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert len(HuggingFace(dataset=str(tmp_path / "pets"))) == 2
    assert f"left out 1 images that its metadata does not list, first {folder / '2.jpg'}" in caplog.text
    caplog.clear()
    (folder / "2.jpg").unlink()
    HuggingFace(dataset=str(tmp_path / "pets"))
    assert not caplog.text


def test_zipped_images(tmp_path):
    folder = tmp_path / "zipped"
    folder.mkdir()
    for split, count in (("train", 2), ("test", 1)):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for i in range(count):
                archive.writestr(f"cat/{i}.jpg", jpeg(i + count))
    source = HuggingFace(dataset=str(folder), split="test")
    assert [source.encoded(i) for i in range(len(source))] == [jpeg(1)]
    assert folder / "test.zip" in source.data_files()
    (folder / "test.zip").unlink()
    with pytest.raises(ImageError, match=r"test\.zip cannot be read"):
        source.read(0)


def test_image_files_are_data_files(tmp_path):
    folder = tmp_path / "pets"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    found = HuggingFace(dataset=str(folder)).data_files()
    assert {folder / "0.jpg", folder / "1.jpg"} < set(found)
    rows().to_parquet(tmp_path / "p.parquet")
    assert all(file.suffix == ".arrow" for file in HuggingFace(dataset=str(tmp_path / "p.parquet")).data_files())


def test_replaced_parquet_file_of_the_same_time_is_read(tmp_path, monkeypatch):
    file = tmp_path / "p.parquet"
    for whole in (huggingface._WHOLE, 0):
        monkeypatch.setattr(huggingface, "_WHOLE", whole)
        rows(3).to_parquet(file)
        facts = file.stat()
        assert len(HuggingFace(dataset=str(file))) == 3
        rows(5).to_parquet(file)
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert len(HuggingFace(dataset=str(file))) == 5
