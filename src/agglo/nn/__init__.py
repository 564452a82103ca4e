"""Pure tensor code: no model knows of a recipe, a file or a device here."""
