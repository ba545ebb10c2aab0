"""Contexts of the golden flow cases, cached, with the noise segments that come after them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from r3jax.model import network
from r3jax.parity import goldens
from r3jax.parity import model
from r3jax.sampling import classifier_free
from r3jax.sequence import layouts
from r3jax.sequence import segments

UNUSED = 2  # capacity of a text segment that a case does not have


@dataclasses.dataclass(frozen=True)
class Scene:
  """A cached context and the noise segments that are sampled after it."""

  golden: goldens.Golden
  layout: segments.Layout
  output: network.Output  # of the context
  lengths: dict[str, jax.Array]
  noise: tuple[str, ...]  # conditional, without text[, without image]
  guidance: classifier_free.Guidance
  size: tuple[int, int]  # pixels

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
    t = jnp.full(latent.shape[0], t, latent.dtype)
    golden = self.golden
    return model.velocities(
      golden,
      golden.policy,
      self.layout,
      names or self.noise,
      latent,
      t,
      self.lengths,
      self.past,
    )


def _scales(golden: goldens.Golden, case: str) -> tuple[float, float]:
  return float(golden.arrays(case)["scales"][0]), float(
    golden.arrays(case)["scales"][1]
  )


@functools.cache
def draft(golden: goldens.Golden, case: str) -> Scene:
  """Returns the context of a `*_gen` case: the reason stage without a thought."""
  arrays = golden.arrays(case)
  prompt, prompt_lengths = model.texts(golden, case, "prompt_ids")
  system, system_lengths = model.padded([arrays["system_ids"]] * len(prompt))
  size = tuple(
    int(x) for x in arrays.get("image_hw", golden.constants["image_hw"])
  )
  capacities = layouts.Capacities(
    system.shape[1],
    prompt.shape[1],
    UNUSED,
    UNUSED,
    UNUSED,
    UNUSED,
    golden.towers(size).latent_grid,
    (1, 1),
  )
  layout = layouts.reason(capacities)
  lengths = {
    "system": system_lengths,
    "prompt": prompt_lengths,
    "thought": 0 * prompt_lengths,
  }
  output = model.run(
    golden, layout, {"system": system, "prompt": prompt}, lengths
  )
  guidance = classifier_free.Guidance(_scales(golden, case)[0], 1.0, "global")
  return Scene(golden, layout, output, lengths, layouts.DRAFT, guidance, size)


@functools.cache
def edit(golden: goldens.Golden, case: str) -> Scene:
  """Returns the context of a `*_edit` case: the refine stage."""
  ids, id_lengths = model.texts(golden, case, "edit_ids")
  pictures = model.images(golden, case)
  size = tuple(pictures.shape[1:3])
  towers = golden.towers(size)
  capacities = layouts.Capacities(
    UNUSED,
    UNUSED,
    UNUSED,
    UNUSED,
    UNUSED,
    ids.shape[1],
    towers.latent_grid,
    towers.vit_grid,
  )
  layout = layouts.refine(capacities)
  features, latent = model.look(golden, pictures)
  lengths = {"instruction": id_lengths, "instruction_alone": id_lengths}
  clean = network.Noised(latent, jnp.zeros(len(ids)))
  inputs = {
    "source": clean,
    "vision": features,
    "instruction": ids,
    "instruction_alone": ids,
  }
  output = model.run(golden, layout, inputs, lengths)
  guidance = classifier_free.Guidance(*_scales(golden, case), "text_channel")
  return Scene(golden, layout, output, lengths, layouts.EDIT, guidance, size)


def scene(golden: goldens.Golden, case: str) -> Scene:
  """Returns the context of a flow case."""
  return draft(golden, case) if case.endswith("gen") else edit(golden, case)
