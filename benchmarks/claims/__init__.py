"""The claims of the C-RADIOv4 recipe, one class each: its arms, what is measured, and what must show."""
