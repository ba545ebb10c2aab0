"""Counts what the frozen image towers cost, from sizes alone: ViT and both halves of the FLUX VAE.

Products and convolutions are counted, with the zeros around an image as if they were pixels; norms,
activations and resizing are not. Bytes are those of the weights.
"""

import math

from r3jax.costs import cost
from r3jax.model import architecture
from r3jax.model import autoencoder
from r3jax.model import image_encoders

_SIDE = 3  # of the kernels of convolutions
_RGB = 3


def features(
  towers: image_encoders.Towers, images: int, copies: int
) -> cost.Cost:
  """Returns the cost of the ViT features of images.

  Args:
    towers: sizes, and the size of the images.
    images: number of images.
    copies: number of chips that read the weights.
  """
  vision = towers.config.vision
  patches = math.prod(towers.vit_grid)
  width = vision.hidden_size
  patch_dim = _RGB * vision.patch_size**2
  layer_weights = 4 * width**2 + 2 * width * vision.intermediate_size
  weights = patch_dim * width + vision.num_layers * layer_weights
  products = 2 * weights * patches
  # Every patch sees every patch: scores, then sums of values.
  attention = 4 * vision.num_layers * width * patches**2
  return _total(towers, products + attention, weights, images, copies)


def encode(
  towers: image_encoders.Towers, images: int, copies: int
) -> cost.Cost:
  """Returns the cost of the latents of images; arguments as `features`."""
  sizes = towers.config.autoencoder
  widths = _widths(sizes)
  cells = math.prod(towers.latent_grid) * towers.config.pixels_per_token**2
  chain = _Chain(cells)
  chain.convolution(_RGB, widths[0])
  in_width = widths[0]
  for i, width in enumerate(widths):
    chain.level(in_width, width, sizes.num_res_blocks)
    in_width = width
    if i < len(widths) - 1:
      chain.cells //= 4
      chain.convolution(width, width)
  chain.middle(in_width)
  chain.convolution(in_width, 2 * sizes.latent_channels)
  return _total(towers, chain.flops, chain.weights, images, copies)


def decode(
  towers: image_encoders.Towers, images: int, copies: int
) -> cost.Cost:
  """Returns the cost of the images of latents; arguments as `features`."""
  sizes = towers.config.autoencoder
  widths = _widths(sizes)
  cells = math.prod(towers.latent_grid) * towers.config.latent_patch**2
  chain = _Chain(cells)
  in_width = widths[-1]
  chain.convolution(sizes.latent_channels, in_width)
  chain.middle(in_width)
  for i in reversed(range(len(widths))):
    chain.level(in_width, widths[i], sizes.num_res_blocks + 1)
    in_width = widths[i]
    if i > 0:
      chain.upsample(in_width, autoencoder.adds_taps(towers.dtype))
  chain.convolution(in_width, _RGB)
  return _total(towers, chain.flops, chain.weights, images, copies)


def _widths(sizes: architecture.AutoencoderConfig) -> list[int]:
  return [sizes.channels * multiplier for multiplier in sizes.multipliers]


def _total(
  towers: image_encoders.Towers,
  flops: float,
  weights: int,
  images: int,
  copies: int,
) -> cost.Cost:
  """Returns the cost of some images, given the operations of one."""
  return cost.Cost(
    flops * images, cost.bytes_of(towers.dtype) * weights * copies
  )


class _Chain:
  """Adds up the layers that an image runs through.

  Attributes:
    cells: positions of the features at the layer that comes next.
    flops: operations so far.
    weights: elements of kernels so far.
  """

  def __init__(self, cells: int):
    """Starts with a number of positions."""
    self.cells = cells
    self.flops = 0
    self.weights = 0

  def convolution(self, inputs: int, outputs: int, side: int = _SIDE) -> None:
    """Adds a convolution whose result has `cells` positions."""
    kernel = side**2 * inputs * outputs
    self.weights += kernel
    self.flops += 2 * kernel * self.cells

  def block(self, inputs: int, outputs: int) -> None:
    """Adds a residual block."""
    self.convolution(inputs, outputs)
    self.convolution(outputs, outputs)
    if inputs != outputs:
      self.convolution(inputs, outputs, side=1)

  def level(self, inputs: int, outputs: int, num_blocks: int) -> None:
    """Adds the residual blocks of a level."""
    for _ in range(num_blocks):
      self.block(inputs, outputs)
      inputs = outputs

  def upsample(self, width: int, adds_taps: bool) -> None:
    """Adds the convolution of doubled sides; 4/9 of its products if taps are added up before."""
    kernel = _SIDE**2 * width**2
    self.weights += kernel
    self.cells *= 4
    flops = 2 * kernel * self.cells
    self.flops += flops * 4 // 9 if adds_taps else flops

  def middle(self, width: int) -> None:
    """Adds two residual blocks, and attention between them."""
    self.block(width, width)
    for _ in range(4):  # query, key, value, output
      self.convolution(width, width, side=1)
    self.flops += 4 * width * self.cells**2
    self.block(width, width)
