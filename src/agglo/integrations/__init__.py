"""agglo inside other applications, one folder for each."""
