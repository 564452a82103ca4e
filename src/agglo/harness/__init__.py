"""Measuring models as the papers do: suites and published protocols, run once, kept with everything that was chosen."""
