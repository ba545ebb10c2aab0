"""The code blocks of the pages in docs/, so that tests run what the pages show."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def code_blocks(page: str, language: str) -> list[str]:
  """Returns the code blocks of a page in their order.

  Args:
    page: the path of the page in docs/.
    language: the word behind the opening fence, for example "python".
  """
  blocks = _BLOCK.findall((DOCS / page).read_text())
  return [code for name, code in blocks if name == language]
