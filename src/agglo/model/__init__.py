"""The artefact: conditioner, student and heads; its folder, its inputs, and how a recipe creates one."""
