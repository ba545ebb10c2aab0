"""Contexts of the golden flow cases, cached, with the noise segments that come after them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from r3jax.model import network
from r3jax.parity import case_arrays
from r3jax.parity import goldens
from r3jax.parity import passes
from r3jax.sampling import classifier_free
from r3jax.sequence import layouts
from r3jax.sequence import segments

UNUSED = 2  # capacity of a text segment that a case does not have


@dataclasses.dataclass(frozen=True)
class Scene:
  """A cached context and the noise segments that are sampled after it.

  Attributes:
    golden: the folder of goldens.
    layout: the sequence.
    output: of the context.
    lengths: [B] of the text segments.
    noise: noise segments: full context, without text and, of an edit, without image.
    guidance: of the sampling.
    size: height and width of the images, in pixels.
  """

  golden: goldens.Golden
  layout: segments.Layout
  output: network.Output
  lengths: dict[str, jax.Array]
  noise: tuple[str, ...]
  guidance: classifier_free.Guidance
  size: tuple[int, int]

  @property
  def rows(self) -> int:
    """Sequences in the batch."""
    return next(iter(self.lengths.values())).shape[0]

  @property
  def past(self) -> tuple[network.Cache]:
    """The context's cache."""
    return (self.output.cache,)

  @property
  def active(self) -> tuple[str, ...]:
    """The noise segments that the guidance combines."""
    return self.noise[: 1 + self.guidance.uses_text + self.guidance.uses_image]

  def branches(
    self, latent: jax.Array, t: float, names: tuple[str, ...] | None = None
  ) -> tuple[jax.Array, ...]:
    """Returns the velocities of branches (all if None) at the latent [B, N, C] and the time."""
    return passes.velocities(
      self.golden,
      self.golden.policy,
      self.layout,
      names or self.noise,
      latent,
      jnp.full(latent.shape[0], t, latent.dtype),
      self.lengths,
      self.past,
    )


def scene(golden: goldens.Golden, case: str) -> Scene:
  """Returns the context of a flow case."""
  return draft(golden, case) if case.endswith("gen") else edit(golden, case)


@functools.cache
def draft(golden: goldens.Golden, case: str) -> Scene:
  """Returns the context of a `*_gen` case: the reason stage without a thought."""
  arrays = golden.arrays(case)
  prompt, prompt_lengths = case_arrays.texts(golden, case, "prompt_ids")
  system_rows = [arrays["system_ids"]] * len(prompt)
  system, system_lengths = case_arrays.padded(system_rows)
  height, width = arrays.get("image_hw", golden.constants["image_hw"])
  size = (int(height), int(width))
  layout = layouts.reason(
    layouts.Capacities(
      system=system.shape[1],
      prompt=prompt.shape[1],
      thought=UNUSED,
      question=UNUSED,
      answer=UNUSED,
      instruction=UNUSED,
      latent_grid=golden.towers(size).latent_grid,
      vit_grid=(1, 1),
    )
  )
  lengths = {
    "system": system_lengths,
    "prompt": prompt_lengths,
    "thought": 0 * prompt_lengths,
  }
  inputs = {"system": system, "prompt": prompt}
  output = passes.run(golden, layout, inputs, lengths)
  text_scale, _ = _scales(golden, case)
  guidance = classifier_free.Guidance(text_scale, 1.0, "global")
  return Scene(golden, layout, output, lengths, layouts.DRAFT, guidance, size)


@functools.cache
def edit(golden: goldens.Golden, case: str) -> Scene:
  """Returns the context of a `*_edit` case: the refine stage."""
  ids, id_lengths = case_arrays.texts(golden, case, "edit_ids")
  images = case_arrays.images(golden, case)
  _, height, width, _ = images.shape
  size = (height, width)
  towers = golden.towers(size)
  layout = layouts.refine(
    layouts.Capacities(
      system=UNUSED,
      prompt=UNUSED,
      thought=UNUSED,
      question=UNUSED,
      answer=UNUSED,
      instruction=ids.shape[1],
      latent_grid=towers.latent_grid,
      vit_grid=towers.vit_grid,
    )
  )
  features, latent = passes.look(golden, images)
  lengths = {"instruction": id_lengths, "instruction_alone": id_lengths}
  inputs = {
    "source": network.Noised(latent, jnp.zeros(len(ids))),
    "siglip": features,
    "instruction": ids,
    "instruction_alone": ids,
  }
  output = passes.run(golden, layout, inputs, lengths)
  text_scale, image_scale = _scales(golden, case)
  guidance = classifier_free.Guidance(text_scale, image_scale, "text_channel")
  return Scene(golden, layout, output, lengths, layouts.EDIT, guidance, size)


def _scales(golden: goldens.Golden, case: str) -> tuple[float, float]:
  """Returns the text and the image scale of the guidance."""
  text_scale, image_scale, *_ = golden.arrays(case)["scales"].tolist()
  return text_scale, image_scale
