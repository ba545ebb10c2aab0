"""A tiny random BAGEL of the embedded world, and configs with which R3 on it compiles fast.

The text half is scripted: embeddings and head make a Markov chain of a few words, so that random
layers still write well-formed thoughts, edits and stops. The image half is random, and
`brightness` is a reward that tells its images apart.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import r3_geneval
from r3jax import types
from r3jax.agent import experience
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import tokenizer_files
from r3jax.checkpoint import training
from r3jax.data import contamination
from r3jax.data import pipeline
from r3jax.data import records
from r3jax.evaluation import chains
from r3jax.model import architecture
from r3jax.parallel import meshes
from r3jax.rewards import combine
from r3jax.rl import iteration
from r3jax.rl import replica_stages
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run import evaluation_setup
from r3jax.run import prompt_selection
from r3jax.run import sessions
from r3jax.run import setup
from r3jax.sampling import flow_matching
from r3jax.sft import small_bagel
from r3jax.worlds.shapes import prompts as prompts_lib
from r3jax.worlds.shapes import verifier
from r3jax.worlds.shapes import vocabulary

SIZES = {
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "vision_hidden_size": 32,
  "vision_intermediate_size": 64,
  "vision_num_layers": 1,
  "vision_num_heads": 4,
  "autoencoder_channels": 32,
  "autoencoder_multipliers": (1, 1, 1, 1),
}
# mean brightness, of 255, that earns 0, by the width of the images: what the random models draw
# lies beyond it, and not far; sum beyond it that earns 1
LEAST, RANGE = {48: 80, 80: 163}, 2**14
SCRIPT = {  # word -> {next word: probability}
  "<|im_start|>": {"<think>": 0.9, "red": 0.1},
  "<think>": {"red": 0.6, "</think>": 0.4},
  "red": {"</think>": 0.7, "red": 0.1, "<|im_end|>": 0.2},
  "</think>": {"<|im_end|>": 0.4, "red": 0.35, "no": 0.25},
  "no": {"further": 1.0},
  "further": {"edit": 1.0},
  "edit": {"<|im_end|>": 1.0},
}
SETTINGS = {
  "total_steps": 3,
  "groups_per_step": 2,
  "group_size": 4,
  "sequence.thought_tokens": 6,
  "sequence.answer_tokens": 8,
  "sequence.instruction_tokens": 7,
  "reason.points": 4,
  "reason.interval": (0.7, 1.0),
  "reason.sde_index_max": 3,
  "refine.points": 4,
  "refine.sde_index_max": 2,
  "optimizer.und_learning_rate": 1e-3,
  "optimizer.gen_learning_rate": 1e-3,
  "optimizer.warmup_updates": 2,
  "checkpoint.every": 2,
  "log.samples_every": 2,
  "log.samples": 2,
  "mesh.data": 1,
  "eval.prompts": 6,
  "eval.rounds": 3,
  "eval.points": 3,
  "eval.temperature": 1.0,
  "eval.batch_size": 6,
  "eval.labelled_images": "",
}


def redness(image: np.ndarray, prompt: records.Prompt) -> float:
  """Scores an image of any size by its first channel, in [0, 1]."""
  del prompt
  return float(image[..., 0].mean() / 255)


# Changes for images that are not square, which no world verifies; see `sizes_for`.
NOT_SQUARE = {
  "image.height": 48,
  "image.width": 80,
  "reward.name": f"{__name__}:{redness.__name__}",
}


def _draw(
  path: str, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
  if path.endswith("scale"):
    return np.ones(shape, np.float32)
  inputs = np.prod(shape[:-1]) if path.endswith("kernel") else 100
  return rng.normal(0, inputs**-0.5, shape).astype(np.float32)


def random_weights(sizes) -> dict:
  """Returns random weights of a model of these sizes."""
  rng, leaves = np.random.default_rng(0), {}
  for tensor in bagel_names.table(sizes):
    leaves.setdefault(tensor.path, []).append(
      _draw(tensor.path, tensor.shape, rng)
    )
    if tensor.layer is None:
      (leaves[tensor.path],) = leaves[tensor.path]
  tree = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = np.asarray(leaf)
  return tree


def _write_script(policy: dict, ids: dict[str, int]):
  """Gives word i of the script its own direction i, which outweighs what the layers add."""
  embedding, head = (
    policy["embed_tokens"]["embedding"],
    policy["lm_head"]["kernel"],
  )
  # what the final norm makes of that direction
  unit = np.sqrt(embedding.shape[1])
  for i, (word, following) in enumerate(SCRIPT.items()):
    embedding[ids[word], i] += 20
    head[i] = -8 / unit
    for other, probability in following.items():
      head[i, ids[other]] = np.log(probability) / unit


def sizes_for(height: int, width: int) -> architecture.BagelConfig:
  """Returns the sizes of a tiny model that keeps images of a size; the shorter side is first."""
  sizes = small_bagel.sizes(ml_collections.ConfigDict(SIZES))
  cell = sizes.vision.patch_size
  transform = architecture.ImageTransform(width, height, cell)
  return dataclasses.replace(
    sizes,
    vision=dataclasses.replace(sizes.vision, positions_per_side=width // cell),
    max_latent_side=width // cell,
    max_patches_per_side=width // cell,
    autoencoder_transform=transform,
    vision_transform=transform,
  )


def write_model(
  folder: pathlib.Path, sizes: architecture.BagelConfig | None = None
):
  """Writes the model in BAGEL's format, and `train.jsonl` and `heldout.jsonl` beside it."""
  folder.mkdir(parents=True)
  vocabulary.build_tokenizer().save(str(folder / "tokenizer.json"))
  sizes = sizes or small_bagel.sizes(ml_collections.ConfigDict(SIZES))
  weights = random_weights(sizes)
  _write_script(weights["policy"], tokenizer_files.load(folder).vocabulary)
  bagel_files.save(weights, sizes, folder)
  for split, split_records in (
    ("train", prompts_lib.train_records()),
    ("heldout", prompts_lib.heldout_records()),
  ):
    lines = [
      json.dumps(record.to_json())
      for record in prompt_selection.evenly(split_records, 12, 0)
    ]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def settings(folder: pathlib.Path) -> dict:
  """Returns what differs from the config of `:shapes`, by dotted key."""
  files = {
    f"data.{split}": str(folder / f"{split}.jsonl")
    for split in ("train", "heldout")
  }
  return SETTINGS | files | {"model.folder": str(folder)}


def make_config(
  folder: pathlib.Path, changes: dict | None = None
) -> ml_collections.ConfigDict:
  """Returns the config of `:shapes` with few samples, steps and slots; `changes` by dotted key."""
  config = r3_geneval.get_config("shapes")
  config.update_from_flattened_dict(settings(folder) | (changes or {}))
  return config


def brightness(images, target, needed=None) -> types.Score:
  """Scores images by the sum of their first channel, exactly; the brighter ones are perfect.

  Arrays of numpy stay arrays of numpy: on the host a reward must not compute with JAX, whose
  devices wait for it.
  """
  del target, needed
  least = LEAST[images.shape[2]]
  differences = images[..., 0].astype(np.int32) - least
  beyond = differences.sum(axis=(1, 2), dtype=np.int32)
  value = beyond.clip(0, RANGE).astype(np.float32) / RANGE
  valid = value >= 0  # every one
  strict = (value == 1).astype(np.float32)
  return types.Score(value, valid, {"strict": strict})


@dataclasses.dataclass(frozen=True)
class Bench:
  """What tests of the step start from: a session without a workdir, and its first state."""

  session: sessions.Session
  policy: dict

  @property
  def stages(self) -> replica_stages.ReplicaStages:
    return self.session.stages

  @property
  def frozen(self) -> train_state.Frozen:
    return self.session.frozen

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.session.mesh

  def state(self) -> train_state.TrainState:
    """Returns the state before the first iteration."""
    return self.session.init(self.policy)

  def rows(self, number: int) -> np.ndarray:
    """Returns which training prompts iteration `number` draws here."""
    groups = self.stages.settings.num_groups
    return np.arange(number * groups, (number + 1) * groups)

  def batch(self, number: int) -> experience.Prompts:
    """Returns the prompts of iteration `number`."""
    return jax.tree.map(lambda x: x[self.rows(number)], self.session.prompts)

  def run(self, number: int) -> list[tuple]:
    """Runs iterations of the fused step; returns (state, metrics, samples) of each as numpy."""
    with jax.set_mesh(self.mesh):
      found, state = [], self.state()
      step = self.session.compile(state)
      for i in range(number):
        state, metrics, samples = step(state, self.rows(i))
        found.append(jax.device_get((state, metrics, samples)))
    return found

  def run_staged(self, stages, number: int) -> list[tuple]:
    """Does the same with stages that are programs of their own, see `step.split`."""
    with jax.set_mesh(self.mesh):
      found, state = [], self.state()
      for i in range(number):
        state, metrics, samples = iteration.run(
          stages, state, self.frozen, self.batch(i), np.uint32(0)
        )
        found.append(jax.device_get((state, metrics, samples)))
    return found


def make_bench(
  folder: pathlib.Path,
  shape: tuple[int, int, int] = (1, 1, 1),
  changes: dict | None = None,
) -> Bench:
  """Returns a bench on the first devices, rewarded by brightness.

  Args:
    folder: see `write_model`.
    shape: of the mesh: data, fsdp, tensor.
    changes: of the config, by dotted key.
  """
  config = make_config(folder, changes)
  experiment = setup.build(config)
  reward = combine.GraphReward(
    verifier.encode_records, lambda mesh: brightness, ("strict",)
  )
  experiment = dataclasses.replace(experiment, reward=reward)
  mesh = meshes.make_mesh_on(jax.devices()[: np.prod(shape)], *shape)
  policy, frozen = experiment.start(mesh, config.seed)
  prompts = experiment.encode(experiment.train)
  evaluation = (
    None
    if config.eval.batch_size % shape[0]
    else evaluation_setup.build(config, experiment, mesh)
  )
  session = sessions.Session(
    config,
    None,
    experiment,
    mesh,
    experiment.stages(mesh),
    prompts,
    frozen,
    evaluation,
    contamination.Leaked({}, True),
  )
  return Bench(session, policy)


def draw(
  sampler: chains.Sampler,
  policy,
  towers,
  prompts: experience.Prompts,
  images: int,
) -> list[chains.Round]:
  """Returns one numpy `Round` per round for images of every prompt, prompt by prompt."""
  rows, parts = (
    [(i, j) for i in range(len(prompts.index)) for j in range(images)],
    [],
  )
  for batch, number in chains.batches(rows, sampler.batch_size):
    made = sampler.run(
      policy,
      towers,
      jax.tree.map(lambda x, rows=batch[:, 0]: x[rows], prompts),
      batch[:, 1],
      number,
    )
    parts.append(
      [
        jax.tree.map(lambda x, count=number: x[:count], turn.round)
        for turn in made
      ]
    )
  return [
    jax.tree.map(lambda *leaves: np.concatenate(leaves), *turn)
    for turn in zip(*parts)
  ]


def drafts(bench: Bench) -> stage_outputs.Drafts:
  """Makes up a rollout of the reason stage: there is no program for one to compile."""
  settings, rng = bench.stages.settings, np.random.default_rng(0)
  rows, tokens = (
    settings.num_groups * settings.group_size,
    bench.stages.rollout.capacities.thought,
  )

  def latent():
    return rng.normal(
      size=(rows, 9, bench.stages.modules.bagel.config.latent_dim)
    ).astype(np.float32)

  def number(value):
    return np.full(rows, value, np.float32)

  text = experience.Text(
    rng.integers(4, 90, (rows, tokens)).astype(np.int32),
    np.full(rows, tokens, np.int32),
    np.zeros((rows, tokens - 1), np.float32),
  )
  flow = flow_matching.Trajectory(
    latent(), latent(), latent(), number(0.8), number(0.1), number(0.0)
  )
  rollout = experience.Reason(
    text, flow, np.zeros((rows, 48, 48, 3), np.uint8), np.ones(rows, bool)
  )
  return stage_outputs.Drafts(
    rollout, bench.batch(0), number(1.0), np.zeros(rows, np.int32)
  )


def write_workdir(folder, config, policy):
  """Makes a workdir as the main job leaves it."""
  (folder / "checkpoints").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  saved = training.Checkpoints(folder / "checkpoints", every=1, keep=1)
  optimizer = train_state.make_optimizer(
    train_state.OptimizerSettings(**config.optimizer)
  )
  policy = jax.tree.map(jnp.asarray, policy)
  state = train_state.TrainState(policy, optimizer.init(policy), jnp.int32(0))
  saved.save(7, state, pipeline.prompt_iterator(12, 2, 0), {})
  saved.close()
  return folder
