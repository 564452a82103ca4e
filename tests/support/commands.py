"""The command line, run in this process."""

from typer.testing import CliRunner, Result

from agglo.cli.main import app


def agglo(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
