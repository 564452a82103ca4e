"""The claims of the C-RADIOv4 recipe, one class each: its arms, measurements and goal."""
