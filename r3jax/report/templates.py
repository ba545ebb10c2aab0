"""Loads the templates of the pages that r3jax writes."""

import jinja2


def load(name: str) -> jinja2.Template:
  """Returns a template of this folder; it escapes every value and refuses undefined ones."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("r3jax", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template(name)
