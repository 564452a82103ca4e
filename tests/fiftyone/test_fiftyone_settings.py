"""The tests have a database of their own."""


def test_the_database_is_this_run_s_and_writable(fo, photographs):
    assert set(fo.list_datasets()) <= {"photographs"}, "only what the fixture `curated` makes"
    made = fo.Dataset()
    made.add_images([str(path) for path in sorted(photographs.iterdir())[:5]])
    assert made.count() == 5
    made.delete()
