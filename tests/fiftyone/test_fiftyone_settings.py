"""The tests have a database of their own."""

import os


def test_the_database_is_this_run_s_and_writable(fo, photographs):
    assert fo.config.database_name == f"agglo_tests_{os.getpid()}"
    made = fo.Dataset()
    made.add_images([str(path) for path in sorted(photographs.iterdir())[:5]])
    assert made.count() == 5
    made.delete()
