"""Pure tensor code: layers, geometry and linear algebra, without recipes and files."""
