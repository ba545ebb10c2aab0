"""Templates of the pages that r3jax writes."""

from collections.abc import Callable

import jinja2


def template(
  name: str, filters: dict[str, Callable] | None = None
) -> jinja2.Template:
  """Loads a template of this folder; it escapes every value and refuses undefined ones."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("r3jax", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= filters or {}
  return environment.get_template(name)
