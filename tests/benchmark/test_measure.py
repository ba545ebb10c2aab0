"""Tests of how programs are timed and what machines can do."""

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.benchmark import ceilings
from r3jax.benchmark import measure
from r3jax.parallel import meshes


class TestTimer:
  def test_times_the_repeats_behind_the_warmup(self):
    calls = []

    def run():
      calls.append(len(calls))
      return jnp.float32(len(calls))

    timer = measure.Timer(warmup=2, repeats=3)
    measurement, result = timer.time("program", run, 1.5, {"temporaries": 7})
    assert len(calls) == 5 and result == 5
    assert len(measurement.seconds) == len(measurement.cpu_seconds) == 3
    assert measurement.compile_seconds == 1.5
    assert measurement.peak_bytes > 1e6

  def test_medians_leave_an_outlier_out(self):
    measurement = measure.Measurement(
      "program", (1.0, 9.0, 2.0), (4.0, 3.0, 8.0), 0.0, {}, 0
    )
    assert measurement.median_seconds == 2.0
    assert measurement.median_cpu_seconds == 4.0

  def test_peak_starts_anew(self):
    block = np.ones(2**26, np.uint8)
    with_block = measure.peak_bytes()
    del block
    measure.reset_peak()
    assert measure.peak_bytes() < with_block


class TestCeilings:
  def test_all_devices_of_the_mesh_work(self, monkeypatch):
    monkeypatch.setattr(ceilings, "_CPU_SIDE", 64)
    monkeypatch.setattr(ceilings, "_CPU_BYTES", 2**16)
    mesh = meshes.make_mesh_on(jax.devices()[:2], 2, 1, 1)
    measured = ceilings.measure(mesh, jnp.bfloat16)
    assert measured.flops > 0 and measured.bandwidth > 0

  def test_the_better_of_two_measurements_counts(self):
    first = ceilings.Ceilings(flops=2.0, bandwidth=30.0)
    second = ceilings.Ceilings(flops=3.0, bandwidth=20.0)
    assert ceilings.best(first, second) == ceilings.Ceilings(3.0, 30.0)
