"""The loss of the reference's trainer, for comparing runs (docs/algorithm.md#differences).

The reference scores other velocities than it samples. `compat.reference_loss` turns four of its
defects on together: drafts are scored without guidance, edits with the global renorm, the copies
for guidance have transposed positions, and the guidance interval is closed below. Rollouts stay as
they are, so that on-policy ratios are no longer 1.
"""

import dataclasses

import numpy as np

from r3jax.agent import rollout_settings
from r3jax.sequence import layouts
from r3jax.sequence import segments


def reason(
  flow: rollout_settings.FlowSettings, layout: segments.Layout
) -> tuple[rollout_settings.FlowSettings, segments.Layout]:
  """Returns settings and layout that the reference's trainer scores drafts with: no guidance."""
  guidance = dataclasses.replace(flow.guidance, text_scale=1.0)
  flow = dataclasses.replace(flow, guidance=guidance)
  return flow, _transposed(layout, layouts.DRAFT[1:])


def refine(
  flow: rollout_settings.FlowSettings, layout: segments.Layout
) -> tuple[rollout_settings.FlowSettings, segments.Layout]:
  """Returns settings and layout that the reference's trainer scores edits with: global renorm."""
  guidance = dataclasses.replace(
    flow.guidance, renorm="global", interval=_closed(flow.guidance.interval)
  )
  flow = dataclasses.replace(flow, guidance=guidance)
  return flow, _transposed(layout, layouts.EDIT[1:])


def _transposed(
  layout: segments.Layout, names: tuple[str, ...]
) -> segments.Layout:
  """Returns the layout with rows and columns of the named noise segments swapped."""

  def transpose(segment: segments.Segment) -> segments.Segment:
    if segment.name not in names or segment.grid is None:
      return segment
    return dataclasses.replace(segment, grid=segment.grid[::-1])

  return segments.Layout(tuple(transpose(s) for s in layout.segments))


def _closed(interval: tuple[float, float]) -> tuple[float, float]:
  """Returns an interval open below that also holds, in float32, the given one's lower bound."""
  low, high = interval
  # The next float32 below, so that `low < t` holds for t = low in float32.
  below_low = np.nextafter(np.float32(low), np.float32(0))
  return float(below_low), high
