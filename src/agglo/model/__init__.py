"""The saved and loaded unit: conditioner, student and heads; its folder, its inputs, and its creation from a recipe."""
