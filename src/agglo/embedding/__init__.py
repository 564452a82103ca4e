"""Embed image collections: summaries and text-aligned embeddings, files of them, and search by text."""

from agglo.embedding.encoding import Hit, Progress, embed, embed_file, encode, search
from agglo.embedding.features import MIN_SIDE, ImageFeatures, image_features
from agglo.embedding.images import as_files
from agglo.embedding.limits import ENDINGS, check_memory, check_output, legal_size, memory_bytes
from agglo.embedding.tables import Embeddings, EmbeddingsFile

__all__ = [
    "ENDINGS",
    "MIN_SIDE",
    "Embeddings",
    "EmbeddingsFile",
    "Hit",
    "ImageFeatures",
    "Progress",
    "as_files",
    "check_memory",
    "check_output",
    "embed",
    "embed_file",
    "encode",
    "image_features",
    "legal_size",
    "memory_bytes",
    "search",
]
