"""Results of evals as they are kept: records, what identifies them, tables, and the comparison of two models."""
