"""R3 on GenEval.

  python launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir=DIR

`:shapes` is the embedded world: the small BAGEL that comes with the package, an exact verifier in
the graph, minutes on two CPU cores.

  python launch/tpu.py --config=configs/r3_geneval.py --workdir=DIR --config.model.folder=DIR \
    --config.data.heldout=FILE --config.reward.endpoints="('http://HOST:8000',)"

Without it the config is BAGEL-7B on GenEval, for a TPU pod: `model.folder` holds the weights (see
docs/checkpoints.md), `data.heldout` is GenEval's file of 553 prompts, the reward a service with a
detector (`launch/serve_reward.py --reward=geneval`, or another, see docs/rewards.md). Training
prompts are generated, without those of the test. Hyperparameters are those of the reference's
script; nothing of this size has been run with r3jax.
"""

import ml_collections

from configs import slices

ConfigDict = ml_collections.ConfigDict


def _reference_script() -> ConfigDict:
  """The defaults: those of the reference's script, for BAGEL-7B at 512x512."""
  config = ConfigDict()
  config.seed = 0
  config.total_steps = 500  # iterations, two updates each
  config.groups_per_step = 8
  config.group_size = 16
  # "shapes", or "package.module:ATTRIBUTE"; what the keys below call "world" is that of this world
  config.world = ""

  config.model = ConfigDict(
    dict(
      # in BAGEL's format; "world" is the model that comes with the world
      folder="",
      dtype="bfloat16",
      remat="full",  # or "dots", "none": what the backward pass computes again
      # "splash" (block-sparse TPU kernel) or "xla"; auto is the first on a TPU
      attention="auto",
      # trains low-rank updates of these projections alone, scaled by alpha / rank
      lora=dict(
        rank=0,  # 0 trains the whole policy
        alpha=32.0,
        und=("q", "k", "v", "o", "gate", "up", "down"),
        gen=("q", "k", "v", "o", "gate", "up", "down"),
      ),
    )
  )
  config.data = ConfigDict(
    dict(
      benchmark="geneval",
      train="generated",  # or a file or URL of JSON lines, or "world"
      heldout="",  # GenEval's 553 prompts: a file or URL of JSON lines
      generated=20_000,
      generated_seed=0,
      more_tests=(),  # further files whose prompts must not be trained on
      # e.g. ("single_object",): all its prompts are in the test; the run is then contaminated
      keep_tags=(),
    )
  )
  config.image = ConfigDict(dict(height=512, width=512))
  config.sequence = ConfigDict(
    dict(
      prompt_tokens=96,
      thought_tokens=196,  # sampled at most; one more slot holds the end
      question_tokens=192,
      answer_tokens=384,
      instruction_tokens=385,
      # "tokens" parses in the graph, for word-level vocabularies
      parser="strings",
    )
  )
  config.text = ConfigDict(dict(temperature=0.9, top_p=0.9, top_k=0))
  config.reason = ConfigDict(
    dict(
      points=16,
      shift=3.0,
      eta_mode="monotonic",
      eta=0.7,
      sde_index_max=15,
      text_scale=4.0,
      image_scale=1.0,
      renorm="global",
      renorm_min=0.0,
      interval=(0.4, 1.0),
    )
  )
  config.refine = ConfigDict(
    dict(
      points=21,
      shift=3.0,
      eta_mode="monotonic",
      eta=1.0,
      sde_index_max=2,
      text_scale=4.0,
      image_scale=1.5,
      renorm="text_channel",
      renorm_min=0.0,
      interval=(0.4, 1.0),
    )
  )
  config.loss = ConfigDict(
    dict(
      text_weight=1.0,
      image_weight=2.0,
      text_kl=0.001,
      image_kl=0.001,
      clip_range=0.2,
      divide_by_std=False,
      format_weight=1.0,
    )
  )
  config.pool = ConfigDict(dict(perfect=0.15))
  config.reflect_rounds = 1  # 0 trains the reason stage only
  config.optimizer = ConfigDict(
    dict(
      und_learning_rate=5e-6,
      gen_learning_rate=5e-6,
      warmup_updates=10,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.0,
      clip_norm=1.0,
      freeze_und=False,
    )
  )
  config.reward = ConfigDict(
    dict(
      # "world", "service", "flow_grpo", "unirl", "judge" or "sum", see docs/rewards.md
      name="service",
      # what training uses: "score" (shaped), or a part: "correct", "strict"
      value="score",
      endpoints=("http://localhost:8000",),
      # name of the environment variable that holds the service's token
      token_env="",
      batch=16,  # images per request
      image_format="png",  # or "jpeg", smaller and not exact
      cache=4096,  # scores that are remembered; 0 asks every time
      client=dict(
        deadline=60.0,
        attempts=4,
        pause=0.5,
        concurrency=8,
        failures_to_open=5,
        open_seconds=10.0,
      ),
      judge=dict(
        task="geneval_plus",
        model="",
        prompt_file="",
        max_tokens=4096,
        image_format="jpeg",
      ),
      # of "sum": name -> {"name": ..., "weight": ..., other keys of this section}
      members={},
      # images without a score, of those of `failure_window` iterations
      max_failed_fraction=0.2,
      failure_window=20,
      # control experiment: give every sample the reward of another one
      shuffle=False,
    )
  )
  # the reference's literal loss, see rl/compat.py
  config.compat = ConfigDict(dict(reference_loss=False))
  config.step = ConfigDict(
    dict(
      mode="fused",  # "split" runs the stages as separate programs
      # parts of a replica's samples whose gradients are computed one after the other
      micro_batches=1,
    )
  )
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  # logical axis -> mesh axes, see parallel/sharding.py
  config.sharding = ConfigDict(
    dict(
      train=dict(
        embed=("fsdp",),
        table=("fsdp", "tensor"),
        vocab=("tensor",),
        heads=("tensor",),
        kv_heads=("tensor",),
        mlp=("tensor",),
        rows=("fsdp",),
      ),
      # nothing is gathered per token: without the fsdp axis for a layer's inputs
      rollout=dict(
        table=("fsdp", "tensor"),
        vocab=("tensor",),
        heads=("tensor",),
        kv_heads=("tensor",),
        mlp=("tensor",),
        rows=("fsdp",),
      ),
    )
  )
  config.checkpoint = ConfigDict(dict(every=50, keep=2))
  config.eval = ConfigDict(
    dict(
      prompts=0,  # 0 = all
      images_per_prompt=4,
      rounds=4,
      points=50,
      temperature=0.3,
      batch_size=64,
      seed=1,
      every=0,  # iterations between evaluations beside those before and after
      # questions about every draft: "match"; of the embedded world also "existence", "count", "color", "relation"
      ask=(),
      question_tokens=192,
    )
  )
  config.log = ConfigDict(
    dict(
      samples_every=10,  # iterations; 0 shows no samples
      samples=8,
      # Weights & Biases, where a project is named, see docs/metrics.md
      wandb=dict(project="", name="", mode="online"),
    )
  )
  # iterations start .. start + steps - 1 are traced
  config.profile = ConfigDict(dict(start=0, steps=0))
  return config


def _shapes(config: ConfigDict) -> ConfigDict:
  """The embedded world: 48x48 canvases, the shipped model, learning rates for its size."""
  config.total_steps = 40
  config.groups_per_step = 8
  config.world = "shapes"
  config.model.update(folder="world", dtype="float32", remat="none")
  config.data.update(train="world", heldout="world")
  config.image.update(height=48, width=48)
  config.sequence.update(
    prompt_tokens=12,
    thought_tokens=23,
    question_tokens=14,
    answer_tokens=43,
    instruction_tokens=22,
    parser="tokens",
  )
  config.text.temperature = 1.0
  config.reason.sde_index_max = 4
  # So small a model needs anchors: its images soon stop following its plans, see docs/embedded_world.md.
  config.loss.update(text_kl=0.02, image_kl=20.0)
  config.optimizer.update(
    und_learning_rate=1.5e-4, gen_learning_rate=1e-4, warmup_updates=4
  )
  config.reward.name = "world"
  config.checkpoint.every = 10
  config.eval.update(
    prompts=120,
    images_per_prompt=1,
    points=20,
    batch_size=120,
    question_tokens=18,
  )
  config.log.update(samples_every=5, samples=4)
  return config


def get_config(variant: str = "bagel") -> ConfigDict:
  """Returns the config of a variant: "bagel", "shapes", or a slice of `slices.py`."""
  config = _reference_script()
  return (
    _shapes(config)
    if variant == "shapes"
    else slices.on(config, variant, ("shapes",))
  ).lock()
