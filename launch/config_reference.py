r"""Writes docs/reference/config.md: every key of the configs, from their source and their rules.

  python launch/config_reference.py

tests/test_docs.py fails where the page is not what this writes.
"""

import importlib
import pathlib

from r3jax.cli import help_text
from r3jax.cli import main

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "reference" / "config.md"
_INTRODUCTION = """# Keys of the configs

Written by `python launch/config_reference.py` from the configs, their comments and the rules that \
every value is checked by. A key is set by `--config.KEY=VALUE` on a command line, and as \
`config.KEY` in a config file. Variants of a config have other defaults: `r3jax train \
--config=r3_geneval:shapes --help` prints those of one.
"""
_CONFIGS = {
  "r3_geneval": "`train`, `evaluate`, `generate` and the other commands that draw",
  "sft_shapes": "`sft`",
  "benchmark": "`benchmark`",
}


def text() -> str:
  """Returns the page."""
  blocks = [_INTRODUCTION]
  for name, commands in _CONFIGS.items():
    config_rules = importlib.import_module(main.RULES[name])
    table = help_text.as_markdown(name, config_rules.RULES)
    blocks.append(f"## {name}\n\nOf {commands}.\n\n{table}\n")
  return "\n".join(blocks)


if __name__ == "__main__":
  PAGE.write_text(text())
