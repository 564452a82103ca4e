"""The tests have a database of their own."""


def test_the_database_is_empty_and_writable(fo, photographs):
    assert fo.list_datasets() == []
    made = fo.Dataset()
    made.add_images([str(path) for path in sorted(photographs.iterdir())[:5]])
    assert made.count() == 5
    made.delete()
