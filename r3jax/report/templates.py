"""Loads the templates of the pages that r3jax writes."""

import base64
import hashlib
import importlib.resources

import jinja2
import markupsafe


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


def asset(name: str) -> markupsafe.Markup:
  """Returns a file of this folder as markup that is not escaped."""
  path = importlib.resources.files("r3jax.report") / name
  return markupsafe.Markup(path.read_text(encoding="utf-8"))


def csp_hash(text: str) -> str:
  """Returns the source expression that allows exactly this inline style or script."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"
