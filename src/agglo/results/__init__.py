"""Results of evals: records, the hashes that identify them, tables, and the comparison of two models."""
