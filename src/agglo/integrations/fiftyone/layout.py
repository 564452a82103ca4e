"""Two-dimensional layouts of a collection for FiftyOne's Embeddings panel."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from agglo.config import nearest
from agglo.extras import require
from agglo.integrations.fiftyone.vectors import COMPUTE, check_options, fill, patches_path, read_vectors
from agglo.types import ConfigError

METHODS = ("umap", "tsne", "pca")


def visualization(
    samples: Any,
    *,
    embeddings: Any = None,
    brain_key: str | None = None,
    method: str = "umap",
    num_dims: int = 2,
    seed: int = 51,
    similarity_index: Any = None,
    model: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    patches_field: str | None = None,
    **options: Any,
) -> Any:
    """Lay out vectors in two dimensions, repeatably, and for few samples too.

    Calls ``fiftyone.brain.compute_visualization`` with a seed, after checking the vectors, and with t-SNE's perplexity,
    learning rate and PCA dimensions and UMAP's neighbours fitted to the number of samples. UMAP compares by cosine.

    Args:
        samples: dataset or view.
        embeddings: name of the field with the vectors, or an array ``(N, D)``; with ``model``, the field to fill.
        brain_key: key of the run, by which the App's Embeddings panel lists it.
        method: ``umap`` (needs umap-learn), ``tsne`` or ``pca``.
        num_dims: dimensions of the layout.
        seed: seed of the method: the same vectors give the same layout.
        similarity_index: an index or its brain key, in place of ``embeddings``.
        model: model or name of a zoo model that computes missing vectors.
        model_kwargs: arguments of the zoo model.
        patches_field: label field whose labels have the vectors, in their attribute ``embeddings``.
        options: arguments of ``compute_visualization`` and of the method's configuration.

    Returns:
        FiftyOne's ``VisualizationResults``.

    Raises:
        ConfigError: unknown method or option, too few samples for it, or vectors that cannot be used
            (:func:`~agglo.integrations.fiftyone.vectors.read_vectors`).
    """
    if method not in METHODS:
        raise ConfigError(f"visualization: unknown method {method!r}{nearest(method, METHODS)}")
    if method == "umap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # umap: no TensorFlow, no ParametricUMAP
            require("umap", "fiftyone")
    check_options(options, _known(method))
    if patches_field is None:
        fill(samples, embeddings, model, model_kwargs, **{k: options[k] for k in COMPUTE if k in options})
    vectors = read_vectors(samples, embeddings, similarity_index=similarity_index, patches_field=patches_field)
    if patches_field is not None and isinstance(embeddings, str):
        _declare(samples, patches_path(samples, patches_field, embeddings))
    limits = _limits(method, len(vectors.values), vectors.values.shape[1], num_dims)
    if isinstance(embeddings, str):
        source: Any = embeddings
    else:  # ids, so that samples without a vector are left out
        source = dict(zip(vectors.sample_ids.tolist(), vectors.values, strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value", category=UserWarning)  # umap: a seed means one thread
        warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn|umap")
        return require("fiftyone.brain", "fiftyone").compute_visualization(
            samples,
            patches_field=patches_field,
            embeddings=source,
            brain_key=brain_key,
            method=method,
            num_dims=num_dims,
            seed=seed,
            model=model if isinstance(model, str) else None,
            model_kwargs=None if model_kwargs is None else dict(model_kwargs),
            **{**limits, **options},
        )


def _declare(samples: Any, path: str) -> None:
    """Add the attribute of labels to the schema: FiftyOne would load a default model instead of reading it."""
    if not samples.has_field(path):
        samples._dataset.add_sample_field(path, require("fiftyone", "fiftyone").VectorField)


def _known(method: str) -> set[str]:
    """Options of a method. FiftyOne's configurations accept any keyword and ignore it."""
    configs = require("fiftyone.brain.visualization", "fiftyone")
    config = {"umap": "UMAP", "tsne": "TSNE", "pca": "PCA"}[method] + "VisualizationConfig"
    own = set(inspect.signature(getattr(configs, config)).parameters)
    return (own | {*COMPUTE, "create_index", "force_square", "alpha"}) - {"kwargs", "similarity_index", "model"}


def _limits(method: str, samples: int, width: int, num_dims: int) -> dict[str, Any]:
    """Settings of a method that the numbers of samples and of values allow; raises below its minimum."""
    least = {"umap": num_dims + 2, "tsne": max(num_dims, 4), "pca": num_dims}[method]
    if samples < least:
        raise ConfigError(f"visualization: {method} of {samples} samples; at least {least} are needed")
    if width < num_dims:
        raise ConfigError(f"visualization: {num_dims} dimensions of vectors with {width} values")
    if method == "umap":
        return {"num_neighbors": min(15, samples - 1), "metric": "cosine", "verbose": False}
    if method == "tsne":
        return {
            "pca_dims": min(50, samples, width),
            "perplexity": min(30.0, (samples - 1) / 3),
            # scikit-learn's "auto" is at least 50, FiftyOne's 200: both tear groups of few samples apart.
            "learning_rate": "auto" if samples >= 600 else max(samples / 12, 1.0),
            "verbose": False,
        }
    return {}
