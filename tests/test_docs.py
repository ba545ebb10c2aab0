"""What the documentation names exists: pages, anchors, links, files, functions."""

import ast
import functools
import pathlib
import re

import pytest

from configs import benchmark
from configs import r3_geneval
from configs import sft_shapes
from launch import config_reference
from r3jax.benchmark import config_rules as benchmark_rules
from r3jax.files import rules
from r3jax.run import config_rules
from r3jax.sft import config_rules as sft_rules
from tests import documented
from tests import test_imports

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")],
)
SOURCE_FOLDERS = ("r3jax", "configs", "launch", "tests")
SOURCE_SUFFIXES = (".py", ".sh", ".ipynb")

_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_HEADING = re.compile(r"^#+ +(.+?)(?: *\{#([\w-]+)\})? *$", re.M)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CITATION = re.compile(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?")
_PATH = re.compile(
  r"(?<![\w/.])(?:r3jax|configs|launch|tests|docs)/[\w/.-]*\w\.(?:py|md|sh|ipynb)"
)
_READERS_OWN = re.compile(r"Save this file as `([^`]+)`")
_DOTTED = re.compile(r"`(r3jax(?:\.\w+)+)`")


def anchors(markdown: str) -> set[str]:
  """Returns the anchors of a page: explicit ids, otherwise slugs of the headings."""
  found = set()
  for title, explicit in _HEADING.findall(_FENCE.sub("", markdown)):
    words = re.sub(r"[^\w\s-]", "", title.lower()).strip()
    found.add(explicit or re.sub(r"[\s]+", "-", words))
  return found


def broken_citations(text: str) -> list[str]:
  """Returns the `docs/PAGE.md` and `docs/PAGE.md#anchor` in a text that do not exist."""
  broken = []
  for citation in _CITATION.findall(text):
    page, _, anchor = citation.partition("#")
    path = ROOT / page
    if not path.exists() or (anchor and anchor not in _anchors_of(path)):
      broken.append(citation)
  return broken


def broken_links(page: pathlib.Path, markdown: str) -> list[str]:
  """Returns the relative links and images of a page whose target does not exist."""
  broken = []
  for target in _LINK.findall(_FENCE.sub("", markdown)):
    if re.match(r"[a-z]+:", target):
      continue
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not path.exists() or (anchor and anchor not in _anchors_of(path)):
      broken.append(target)
  return broken


def resolves(dotted: str) -> bool:
  """Returns whether a dotted name is a package, a module, or something a module defines."""
  parts = dotted.split(".")
  for count in range(len(parts), 0, -1):
    stem = ROOT.joinpath(*parts[:count])
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    if path.exists():
      return _defines(ast.parse(path.read_text()).body, parts[count:])
  return False


def _defines(body: list[ast.stmt], names: list[str]) -> bool:
  if not names:
    return True
  for node in body:
    if isinstance(node, ast.ClassDef) and node.name == names[0]:
      return _defines(node.body, names[1:])
    if len(names) == 1 and names[0] in _names_of(node):
      return True
  return False


def _names_of(node: ast.stmt) -> set[str]:
  if isinstance(node, ast.FunctionDef):
    return {node.name}
  targets = []
  if isinstance(node, ast.Assign):
    targets = node.targets
  elif isinstance(node, ast.AnnAssign):
    targets = [node.target]
  return {target.id for target in targets if isinstance(target, ast.Name)}


@functools.cache
def _anchors_of(path: pathlib.Path) -> set[str]:
  return anchors(path.read_text())


def _sources() -> list[pathlib.Path]:
  return [
    path
    for folder in SOURCE_FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SOURCE_SUFFIXES and path != pathlib.Path(__file__)
  ]


def _named(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


def test_every_page_that_the_code_cites_exists():
  broken = {
    _named(path): broken_citations(path.read_text()) for path in _sources()
  }
  assert {path: names for path, names in broken.items() if names} == {}


@pytest.mark.parametrize("page", PAGES, ids=_named)
class TestPage:
  def test_cites_existing_pages(self, page):
    assert broken_citations(page.read_text()) == []

  def test_links_to_existing_files(self, page):
    assert broken_links(page, page.read_text()) == []

  def test_names_existing_files(self, page):
    text = page.read_text()
    paths = set(_PATH.findall(text)) - set(_READERS_OWN.findall(text))
    assert [path for path in paths if not (ROOT / path).exists()] == []

  def test_names_existing_functions(self, page):
    names = _DOTTED.findall(page.read_text())
    assert [name for name in names if not resolves(name)] == []


def test_every_page_is_in_the_navigation_of_the_site():
  navigation = re.findall(
    r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M
  )
  pages = [
    path.relative_to(ROOT / "docs").as_posix()
    for path in (ROOT / "docs").rglob("*.md")
  ]
  assert sorted(navigation) == sorted(pages)


def test_the_picture_of_the_packages_has_every_floor_in_order():
  page = (ROOT / "docs/architecture.md").read_text()
  boxes = re.findall(r"^ *(\w+)\[", page, re.M)
  floors = [name for name in test_imports.FLOORS if name != "__main__"]
  assert boxes[::-1] == floors


@pytest.mark.parametrize(
  "config, table",
  [
    (r3_geneval.get_config(), config_rules.RULES),
    (sft_shapes.get_config(), sft_rules.RULES),
    (benchmark.get_config(), benchmark_rules.RULES),
  ],
  ids=["r3", "sft", "benchmark"],
)
def test_every_config_key_has_a_rule(config, table):
  keys = set(rules.leaves(config, table))
  assert keys - set(table) == set(), "see CONTRIBUTING.md, rule 10"
  assert set(table) - keys == set()


def test_the_reference_of_the_configs_is_up_to_date():
  assert config_reference.PAGE.read_text() == config_reference.text(), (
    "python launch/config_reference.py writes it"
  )


def test_reference_pages_show_existing_modules():
  pages = "".join(path.read_text() for path in PAGES)
  modules = re.findall(r"^::: ([\w.]+)$", pages, re.M)
  assert modules
  assert [module for module in modules if not resolves(module)] == []


def test_the_debugging_guide_names_documented_metrics():
  guide = (ROOT / "docs/howto/debug.md").read_text()
  prefixes = "reason|edit|pool|mismatch|optimizer|seconds|evaluation"
  names = set(re.findall(rf"`((?:{prefixes})/\w+)`", guide))
  kinds = {row.when for row in documented.rows()}
  assert len(names) > 20
  assert documented.undocumented(names, *kinds) == set()


class TestChecks:
  """The checks themselves find what is planted."""

  def test_a_missing_page_and_a_missing_anchor_are_reported(self):
    text = "docs/algorithm.md, docs/algorithm.md#kl, docs/nowhere.md, docs/algorithm.md#no"
    assert broken_citations(text) == ["docs/nowhere.md", "docs/algorithm.md#no"]

  def test_a_broken_link_is_reported(self):
    page = ROOT / "docs" / "algorithm.md"
    text = "[a](#pool) [b](#no) [c](metrics.md) [d](no.md) [e](https://arxiv.org) ![f](no.png)"
    assert broken_links(page, text) == ["#no", "no.md", "no.png"]

  def test_anchors_are_slugs_or_explicit(self):
    text = "# Two words, a comma\n```\n# no heading\n```\n## Other {#own}\n"
    assert anchors(text) == {"two-words-a-comma", "own"}

  @pytest.mark.parametrize(
    "name, exists",
    [
      ("r3jax.rl", True),
      ("tests.documented.rows", True),
      ("tests.documented.Row.when", True),
      ("tests.test_imports.FLOORS", True),
      ("tests.documented.Row.no", False),
      ("r3jax.nowhere", False),
    ],
  )
  def test_dotted_names_are_looked_up_in_the_source(self, name, exists):
    assert resolves(name) == exists
