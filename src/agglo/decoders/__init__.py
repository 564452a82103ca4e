"""Segmentation decoders of SAM and SAM 3 on the features of another encoder."""
