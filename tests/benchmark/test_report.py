"""Tests of the table and the JSON of a benchmark."""

import types

import jax
import pytest

from configs import benchmark
from r3jax.benchmark import ceilings
from r3jax.benchmark import measure
from r3jax.benchmark import report
from r3jax.benchmark import workload
from r3jax.costs import count
from r3jax.parallel import meshes


@pytest.fixture
def result(monkeypatch) -> report.Result:
  """Returns two programs on a machine of 100 operations and 10 bytes a second."""
  workloads = {
    "think": workload.Workload(count.Cost(20.0, 16.0), tokens=6),
    "image_decode": workload.Workload(count.Cost(50.0, 1.0), images=8),
  }
  monkeypatch.setattr(workload, "of_programs", lambda session: workloads)
  mesh = meshes.make_mesh_on(jax.devices()[:2], 2, 1, 1)
  session = types.SimpleNamespace(config=benchmark.get_config(), mesh=mesh)
  measurements = [
    measure.Measurement(name, (2.0, 2.0, 3.0), (3.0,), 5.0, {}, 2**30)
    for name in workloads
  ]
  before = ceilings.Ceilings(100.0, 8.0)
  after = ceilings.Ceilings(80.0, 10.0)
  return report.Result(session, measurements, before, after)


class TestResult:
  def test_shares_are_of_the_better_ceilings(self, result):
    think, decode = result.rows()
    assert think.product_share == 20 / 2 / 100
    assert think.copy_share == 16 / 2 / 10
    assert (think.times, decode.times) == (1, 2)

  def test_table_has_a_row_per_program(self, result):
    _, _, heading, _, think, decode = report.table(result).splitlines()
    cells = dict(zip(heading.split("|"), think.split("|"), strict=True))
    cells = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert cells["program"] == "think"
    assert cells["s"] == "2.000"
    assert cells["of product"] == "10%"
    assert cells["tokens/s"] == "3.0"
    assert "image_decode (each of 2)" in decode
    assert " 2.000 " in decode  # images per second on each of two chips

  def test_json_has_the_numbers(self, result):
    numbers = report.as_json(result)
    assert numbers["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert numbers["ceilings"]["before"] == {"flops": 100.0, "bandwidth": 8.0}
    decode = numbers["programs"][1]
    assert decode["name"] == "image_decode"
    assert decode["images_per_second_per_chip"] == 8 / 2 / 2
    assert numbers["config"]["sizes"]["hidden_size"] == 512


class TestPage:
  PAGE = "before\n<!-- benchmark peer -->\nold\n<!-- end -->\nbehind\n"

  def test_table_takes_the_place_of_the_old_one(self):
    page = report.with_table(self.PAGE, "peer", "new")
    assert page == (
      "before\n<!-- benchmark peer -->\n\nnew\n\n<!-- end -->\nbehind\n"
    )
    assert report.with_table(page, "peer", "new") == page

  def test_page_without_the_block_is_refused(self):
    with pytest.raises(ValueError, match="must hold the lines"):
      report.with_table(self.PAGE, "1b", "new")
