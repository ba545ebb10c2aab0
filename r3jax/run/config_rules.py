"""What every key of the R3 configs may be: one line a key, in the order of their defaults.

The defaults and the meaning of the keys stand in `configs/r3_geneval.py`; a key without a rule here
fails `tests/test_docs.py`. A range is where the program computes what the key says: outside are
numbers that overflow float32, make it divide by zero, or count beyond int32. What depends on
several keys, on the model or on the devices is checked where these meet, also before anything is
compiled or written.
"""

import ml_collections

from r3jax.data import benchmarks
from r3jax.data import sets
from r3jax.files import rules
from r3jax.model import low_rank
from r3jax.model import mot
from r3jax.parallel import sharding
from r3jax.rewards import registry as rewards_registry
from r3jax.rewards.remote import protocol
from r3jax.rl import iteration_settings
from r3jax.run import model_setup
from r3jax.worlds import registry as worlds_registry

_MOST = 2**31 - 1  # of int32
SEED = rules.Whole(0, 2**32 - 1)
_COUNT = rules.Whole(1, _MOST)
_COUNT_OR_0 = rules.Whole(0, _MOST)
_SAMPLES = 65_536  # of a batch that is drawn at once
_SHARE = rules.Real(0, 1)
_WEIGHT = rules.Real(0, 1e6)
_SECONDS = rules.Real(1e-3, 1e6)
TEMPERATURE = rules.Real(0.01, 100, also=(0,))
POINTS = rules.Whole(2, 10_000)
ROUNDS = rules.Whole(1, 1_000)
NUM_IMAGES = rules.Whole(1, 10_000)  # of a prompt
# Text between the begin and the end of a segment.
_SLOTS = rules.Whole(3, 8_192)
_SAMPLED_TOKENS = rules.Whole(1, 8_191)
_NAMES = rules.Several(rules.Text("a text", may_be_empty=False))
_PROJECTIONS = rules.Several(rules.OneOf(low_rank.PROJECTIONS))
_AXES = rules.Table(
  sharding.LOGICAL, rules.Several(rules.OneOf(sharding.INNER))
)
_FOLDER = rules.Text("the path of a folder, or hf://OWNER/NAME")
_FILE = rules.Text("the path or URL of a file")
_PROMPTS = rules.Text(
  "'generated', 'world', or the path or URL of a file, or hf://OWNER/NAME/FILE"
)
_FORMAT = rules.OneOf(protocol.FORMATS)

_FLOW = {
  "points": POINTS,
  "shift": rules.Real(0.01, 100),
  "eta_mode": rules.OneOf(("constant", "monotonic")),
  "eta": rules.Real(1e-4, 100),
  "sde_index_max": rules.Whole(1, 10_000),
  "text_scale": rules.Real(0, 1000),
  "image_scale": rules.Real(0, 1000),
  "renorm": rules.OneOf(("global", "channel", "text_channel")),
  "renorm_min": _SHARE,
  "interval": rules.Interval(0, 1),
}
# Guidance in evaluation: -1 and () take what training has.
_EVALUATION_GUIDANCE = {
  "text_scale": rules.Real(0, 1000, also=(-1,)),
  "image_scale": rules.Real(0, 1000, also=(-1,)),
  "interval": rules.Interval(0, 1, may_be_empty=True),
}

RULES: dict[str, rules.Rule] = {
  "seed": SEED,
  "total_steps": _COUNT_OR_0,
  "groups_per_step": rules.Whole(1, _SAMPLES),
  "group_size": rules.Whole(2, _SAMPLES),
  "reflect_rounds": rules.Whole(0, 1_000),
  "world": rules.Named(("", *worlds_registry.REGISTERED)),
  # The model.
  "model.folder": _FOLDER,
  "model.dtype": rules.OneOf(tuple(model_setup.DTYPES)),
  "model.remat": rules.OneOf(("none", *mot.REMAT_POLICIES)),
  "model.attention": rules.OneOf(("auto", "by_head", "splash", "xla")),
  "model.lora.rank": rules.Whole(0, 65_536),
  "model.lora.alpha": rules.Real(1e-6, 1e6),
  "model.lora.und": _PROJECTIONS,
  "model.lora.gen": _PROJECTIONS,
  # Prompts, images, texts.
  "data.benchmark": rules.Named(tuple(benchmarks.BENCHMARKS)),
  "data.train": _PROMPTS,
  "data.heldout": _PROMPTS,
  "data.balance": rules.OneOf(sets.BALANCES),
  "data.generated": rules.Whole(1, 10_000_000),
  "data.generated_seed": SEED,
  "data.more_tests": _NAMES,
  "data.keep_tags": _NAMES,
  "image.height": rules.Whole(1, 16_384),
  "image.width": rules.Whole(1, 16_384),
  "sequence.prompt_tokens": _SLOTS,
  "sequence.thought_tokens": _SAMPLED_TOKENS,
  "sequence.question_tokens": _SLOTS,
  "sequence.answer_tokens": _SAMPLED_TOKENS,
  "sequence.instruction_tokens": _SLOTS,
  "sequence.parser": rules.OneOf(("strings", "tokens")),
  # Sampling.
  "text.temperature": TEMPERATURE,
  "text.top_p": rules.Real(1e-6, 1),
  "text.top_k": _COUNT_OR_0,
  **{f"reason.{key}": rule for key, rule in _FLOW.items()},
  **{f"refine.{key}": rule for key, rule in _FLOW.items()},
  # The objective and the optimizer.
  "loss.text_weight": _WEIGHT,
  "loss.image_weight": _WEIGHT,
  "loss.text_kl": _WEIGHT,
  "loss.image_kl": _WEIGHT,
  "loss.clip_range": rules.Real(1e-6, 1),
  "loss.image_clip_range": rules.Real(1e-6, 1),
  "loss.divide_by_std": rules.Flag(),
  "loss.format_weight": _WEIGHT,
  "pool.perfect": _SHARE,
  "pool.source": rules.OneOf(iteration_settings.POOL_SOURCES),
  "optimizer.und_learning_rate": rules.Real(0, 1),
  "optimizer.gen_learning_rate": rules.Real(0, 1),
  "optimizer.warmup_updates": _COUNT_OR_0,
  "optimizer.b1": rules.Real(0, 0.99999),
  "optimizer.b2": rules.Real(0, 0.99999),
  "optimizer.eps": rules.Real(1e-20, 1),
  "optimizer.weight_decay": rules.Real(0, 100),
  "optimizer.clip_norm": rules.Real(1e-6, 1e9),
  "optimizer.freeze_und": rules.Flag(),
  "compat.reference_loss": rules.Flag(),
  # The reward.
  "reward.name": rules.Named(tuple(rewards_registry.BUILDERS)),
  "reward.value": rules.Text("'score' or a part of it", may_be_empty=False),
  "reward.endpoints": rules.Several(rules.Url()),
  "reward.token_env": rules.ENVIRONMENT_VARIABLE,
  "reward.batch": rules.Whole(1, _SAMPLES),
  "reward.image_format": _FORMAT,
  "reward.cache": _COUNT_OR_0,
  "reward.members": rules.Sections("a name and a weight"),
  "reward.max_failed_fraction": _SHARE,
  "reward.failure_window": _COUNT,
  "reward.shuffle": rules.Flag(),
  "reward.clutter_weight": rules.Real(0, 1e6),
  "reward.client.deadline": _SECONDS,
  "reward.client.attempts": rules.Whole(1, 1_000),
  "reward.client.pause": _SECONDS,
  "reward.client.concurrency": rules.Whole(1, 10_000),
  "reward.client.failures_to_open": _COUNT,
  "reward.client.open_seconds": _SECONDS,
  "reward.unirl.reward": rules.Text("the name of a reward"),
  "reward.unirl.number": rules.Text("the name of a number"),
  "reward.unirl.range": rules.Interval(-1e6, 1e6),
  "reward.judge.task": rules.OneOf(("checklist", "geneval_plus", "tiif")),
  "reward.judge.model": rules.Text("the name of a model"),
  "reward.judge.prompt_file": _FILE,
  "reward.judge.system_file": _FILE,
  "reward.judge.eval_prompt_file": _FILE,
  "reward.judge.eval_system_file": _FILE,
  "reward.judge.max_tokens": rules.Whole(1, 1_000_000),
  "reward.judge.image_format": _FORMAT,
  # Devices.
  "step.chain": rules.OneOf(iteration_settings.CHAINS),
  "step.mode": rules.OneOf(("fused", "split")),
  "step.quick_compile": rules.Flag(),
  "step.micro_batches": rules.Whole(1, _SAMPLES),
  "mesh.data": rules.Whole(1, 1_000_000, also=(-1,)),
  "mesh.fsdp": rules.Whole(1, 1_000_000),
  "mesh.tensor": rules.Whole(1, 1_000_000),
  "sharding.train": _AXES,
  "sharding.rollout": _AXES,
  # What a run evaluates, keeps and logs.
  "checkpoint.every": _COUNT,
  "checkpoint.keep": _COUNT,
  "preemption.grace_s": _SECONDS,
  "health.max_skipped": _COUNT,
  "health.mismatch_limit": rules.Real(0, 1e6),
  "health.mismatch_stop": rules.Flag(),
  "eval.prompts": rules.Whole(0, 100_000),
  "eval.images_per_prompt": NUM_IMAGES,
  "eval.rounds": ROUNDS,
  "eval.points": POINTS,
  "eval.temperature": TEMPERATURE,
  "eval.batch_size": rules.Whole(1, _SAMPLES),
  "eval.seed": SEED,
  "eval.every": _COUNT_OR_0,
  "eval.ask": _NAMES,
  "eval.labelled_images": rules.Text("'world', or the path of a file"),
  "eval.question_tokens": _SLOTS,
  "eval.never_stop": rules.Flag(),
  **{f"eval.reason.{key}": rule for key, rule in _EVALUATION_GUIDANCE.items()},
  **{f"eval.refine.{key}": rule for key, rule in _EVALUATION_GUIDANCE.items()},
  "log.samples_every": _COUNT_OR_0,
  "log.samples": _COUNT_OR_0,
  "log.tensorboard": rules.Flag(),
  "log.wandb.project": rules.Text("the name of a project"),
  "log.wandb.name": rules.Text("the name of a run"),
  "log.wandb.mode": rules.OneOf(("offline", "online")),
  "profile.start": _COUNT_OR_0,
  "profile.steps": _COUNT_OR_0,
}


def check(config: ml_collections.ConfigDict) -> None:
  """Checks every value of an R3 config that is wrong whatever the others are.

  Raises:
    ValueError: values break their rules; the message has a line for each.
  """
  lines = rules.problems(config, RULES)
  if not lines:
    lines = _problems_of_members(config.reward)
  if lines:
    raise ValueError("\n".join(lines))


def _problems_of_members(reward: ml_collections.ConfigDict) -> list[str]:
  """Returns a line for every value of a member of a sum that breaks the rule of its key."""
  lines = []
  for name, member in reward.members.items():
    for key, value in rules.leaves(member, ()).items():
      rule = RULES.get(f"reward.{key}")
      if key == "weight":
        rule = rules.Real(1e-6, 1e6)
      if rule:  # the reward itself names unknown keys
        lines.append(rules.problem(f"reward.members.{name}.{key}", rule, value))
  return list(filter(None, lines))
