#!/usr/bin/env bash
# datasets leaves out files without a split word once one file name has one
#
# Guess:    load_dataset(FOLDER) adds Parquet files without a split word (train, test, validation, ...) to train.
# Happens:  it does so only while no file name has a split word. Once one has, the files without one are in no split,
#           without an error or a warning.
# Way out:  compare load_dataset_builder(FOLDER).config.data_files with the files of the folder, and pass data_files for
#           the missing ones.
# Versions: datasets 5.2.0, pyarrow 26.0.1, Python 3.11
# Date:     2026-11-30

set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 ||
    { echo "the packages cannot be installed: the behaviour was not tested" >&2; exit 2; }

export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import platform
import sys
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(sys.argv[1])
datasets.disable_progress_bars()

print("Python", platform.python_version(), "- datasets", datasets.__version__, "- pyarrow", pa.__version__)

messages = []


class Keep(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())


logging.getLogger("datasets").addHandler(Keep(logging.WARNING))
warnings.showwarning = lambda message, *rest, **more: messages.append(str(message))


def names(loaded):
    return {split: sorted(loaded[split]["name"][:]) for split in loaded}


def load(name, files, expected):
    """Load a folder with these files, each of one row with its own name; return the files that are in no split."""
    where = ROOT / name
    where.mkdir()
    for file in files:
        pq.write_table(pa.table({"name": [file]}), where / file)
    found = names(datasets.load_dataset(str(where)))
    print(f"{name:8} files {files}\n{'':8} splits {found}")
    if found != expected:
        sys.exit(f"The behaviour has changed: the folder '{name}' loads as {found}, not as {expected}.")
    if messages:
        sys.exit(f"The behaviour has changed: the folder '{name}' gives a message: {messages[0]}")
    resolved = datasets.load_dataset_builder(str(where)).config.data_files
    used = {Path(path).name for paths in resolved.values() for path in paths}
    return sorted(set(files) - used)


plain, words = ["cats.parquet", "dogs.parquet"], ["birds-test.parquet", "cats.parquet", "dogs.parquet"]
if load("plain", plain, {"train": plain}):
    sys.exit("The way out fails: files that were loaded are reported as missing.")
missing = load("words", words, {"test": ["birds-test.parquet"]})
print(f"{'':8} missing, found through config.data_files: {missing}")
if missing != plain:
    sys.exit(f"The way out fails: config.data_files gives {missing} as missing, not {plain}.")
given = {"train": [str(ROOT / "words" / file) for file in missing], "test": str(ROOT / "words" / words[0])}
complete = names(datasets.load_dataset("parquet", data_files=given))
print(f"{'':8} with data_files {complete}")
if complete != {"train": plain, "test": words[:1]}:
    sys.exit(f"The way out fails: with data_files the splits are {complete}.")
print("As described: beside a file with a split word, the files without one are in no split, without a message.")
PYTHON
