"""The reference's literal loss, for comparing runs: what its trainer computes, not what was sampled.

`compat.reference_loss` turns defects 2 to 5 of R3.md section 8 on, together: drafts are scored
without guidance, edits with the global renorm, copies for guidance have transposed positions, and
the guidance interval is closed below. Rollouts stay as they are, so on-policy ratios leave 1.
"""

import dataclasses

import numpy as np

from r3jax.agent import rollout_settings
from r3jax.sequence import layouts
from r3jax.sequence import segments


def _transposed(
  layout: segments.Layout, copies: tuple[str, ...]
) -> segments.Layout:
  """Returns the layout with rows and columns of the named noise segments swapped."""
  swap = lambda segment: dataclasses.replace(segment, grid=segment.grid[::-1])
  return segments.Layout(
    tuple(swap(s) if s.name in copies else s for s in layout.segments)
  )


def _closed(interval: tuple[float, float]) -> tuple[float, float]:
  """Returns an interval open below that holds, in float32, the lower bound of the given one too."""
  return float(np.nextafter(np.float32(interval[0]), np.float32(0))), interval[
    1
  ]


def reason(
  flow: rollout_settings.FlowSettings, layout: segments.Layout
) -> tuple[rollout_settings.FlowSettings, segments.Layout]:
  """Returns settings and layout that the reference's trainer scores drafts with: no guidance."""
  guidance = dataclasses.replace(flow.guidance, text_scale=1.0)
  return dataclasses.replace(flow, guidance=guidance), _transposed(
    layout, layouts.DRAFT[1:]
  )


def refine(
  flow: rollout_settings.FlowSettings, layout: segments.Layout
) -> tuple[rollout_settings.FlowSettings, segments.Layout]:
  """Returns settings and layout that the reference's trainer scores edits with: global renorm."""
  interval = _closed(flow.guidance.interval)
  guidance = dataclasses.replace(
    flow.guidance, renorm="global", interval=interval
  )
  return dataclasses.replace(flow, guidance=guidance), _transposed(
    layout, layouts.EDIT[1:]
  )
