"""agglo's models in FiftyOne's model zoo. The classes are in the installed package, so workers can pickle them."""

try:
    from agglo.integrations.fiftyone.form import parse_parameters, resolve_input
    from agglo.integrations.fiftyone.zoo import download_zoo_model as download_model
    from agglo.integrations.fiftyone.zoo import load_zoo_model as load_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('agglo is not installed: pip install "agglo[fiftyone]"') from error

__all__ = ["download_model", "load_model", "parse_parameters", "resolve_input"]
