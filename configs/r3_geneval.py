"""R3 on GenEval.

  python launch/tpu.py --config=configs/r3_geneval.py:shapes --workdir=DIR

`:shapes` trains on the embedded world of coloured shapes: a small BAGEL that comes with the package
and an exact verifier inside the compiled step. It takes minutes on two CPU cores; what it reaches
stands in docs/embedded_world.md.

  python launch/tpu.py --config=configs/r3_geneval.py:smoke --workdir=DIR

`:smoke` does the same with tiny numbers: two iterations and both evaluations in under a minute on
two CPU cores, compilation included. It shows that an installation works and learns nothing.

  python launch/tpu.py --config=configs/r3_geneval.py --workdir=DIR --config.model.folder=DIR \
    --config.data.heldout=FILE --config.reward.endpoints="('http://HOST:8000',)"

Without a variant the config is BAGEL-7B on GenEval, for a TPU pod. `model.folder` holds the weights
(docs/checkpoints.md), `data.heldout` is GenEval's file of 553 prompts, and the reward is a service
with a detector (`launch/serve_reward.py --reward=geneval`, or another, see docs/rewards.md).
Training prompts are generated, without those of the test set. The variants in `slices.py` spread it
over TPU slices. Hyperparameters are those of the reference's script; nothing of this size has been
run with r3jax.
"""

import ml_collections

from configs import slices

ConfigDict = ml_collections.ConfigDict


def _set_run(config: ConfigDict):
  """Sets what is trained, and for how long."""
  # Seed of all randomness of training; evaluation has its own, `eval.seed`.
  config.seed = 0
  # Iterations. Each makes one update of the reason stage and `reflect_rounds` of the others, or
  # one of all with step.chain="full".
  config.total_steps = 500
  # Prompts of an iteration, over all devices.
  config.groups_per_step = 8
  # Samples of a prompt, which are compared with each other.
  config.group_size = 16
  # Rounds of reflect and refine in an iteration; 0 trains the reason stage alone.
  config.reflect_rounds = 1
  # A world of prompts with an exact verifier: "shapes", or "package.module:ATTRIBUTE" of your own.
  # `data.train`, `data.heldout`, `reward.name` and `model.folder` take "world": that of this world.
  config.world = ""


def _set_model(config: ConfigDict):
  """Sets the model and which of its weights are trained."""
  model = config.model = ConfigDict()
  # Folder of the model: BAGEL's files, a converted folder, or the workdir of a run.
  model.folder = ""
  # Type in which the network computes; trained parameters and the optimizer stay in float32.
  model.dtype = "bfloat16"
  # What the backward pass computes again: "full" (every layer), "dots" (all but products), "none".
  model.remat = "full"
  # "splash" (a block-sparse kernel for TPUs), "by_head" (loops of plain products, for CPUs) or
  # "xla" (any platform); "auto" is the one for the platform.
  model.attention = "auto"

  # Low-rank adapters: trains updates A B * alpha / rank of these projections and nothing else.
  lora = config.model.lora = ConfigDict()
  # Rank of the updates; 0 trains the whole policy.
  lora.rank = 0
  lora.alpha = 32.0  # scale of the updates is alpha / rank
  # Projections of the understanding expert with an adapter.
  lora.und = ("q", "k", "v", "o", "gate", "up", "down")
  # Projections of the generation expert with an adapter.
  lora.gen = ("q", "k", "v", "o", "gate", "up", "down")


def _set_prompts(config: ConfigDict):
  """Sets the prompts, the size of images and the slots of texts."""
  data = config.data = ConfigDict()
  # Decides the tags of the prompts: "geneval", "geneval_plus", "tiif", "ocr", or a benchmark of
  # your own as "package.module:ATTRIBUTE", see docs/howto/add_a_benchmark.md.
  data.benchmark = "geneval"
  # Training prompts: "generated", "world", or a file or URL: JSON lines, or a text a line, see
  # docs/reference/prompts.md.
  data.train = "generated"
  # Held-out prompts: such a file or URL (GenEval's 553), "world", or "generated" where the
  # benchmark generates its own test set ("ocr").
  data.heldout = ""
  # Number of training prompts that "generated" makes, before those of the test set are dropped.
  data.generated = 20_000
  # Seed of the generated prompts.
  data.generated_seed = 0
  # Further files of prompts that must not be trained on.
  data.more_tests = ()
  # Tags whose training prompts are kept although they are in the test set, for example
  # ("single_object",). The run is then reported as contaminated.
  data.keep_tags = ()
  # What is drawn equally often: "none" every training prompt, "tag" every tag, so that prompts of
  # rare tags are drawn several times an epoch.
  data.balance = "none"

  image = config.image = ConfigDict()
  image.height = 512  # pixels
  image.width = 512  # pixels

  # Slots of the text segments: every text is padded to its slots. A longer prompt is refused, a
  # longer sampled text is cut.
  sequence = config.sequence = ConfigDict()
  sequence.prompt_tokens = 96  # with begin and end
  # Tokens of a thought that are sampled at most; one more slot holds the end.
  sequence.thought_tokens = 196
  sequence.question_tokens = (
    192  # of the question about an image, with begin and end
  )
  # Tokens of a reflection that are sampled at most; one more slot holds the end.
  sequence.answer_tokens = 384
  sequence.instruction_tokens = (
    385  # of an edit instruction, with begin and end
  )
  # Reads thoughts and instructions out of sampled text: "strings" on the host, for any
  # vocabulary, or "tokens" in the graph, for vocabularies of whole words.
  sequence.parser = "strings"


def _set_sampling(config: ConfigDict):
  """Sets how texts and images are sampled in training."""
  text = config.text = ConfigDict()
  text.temperature = 0.9  # of thoughts and reflections; 0 is greedy
  text.top_p = 0.9  # share of the probability that is sampled from; 1 is all
  text.top_k = 0  # number of tokens that is sampled from; 0 is all

  # Drafts of the reason stage.
  reason = config.reason = ConfigDict()
  reason.points = (
    16  # times of the schedule, noise and data included: one step less
  )
  reason.shift = 3.0  # of the times towards noise; 1 is uniform
  # Noise of the SDE step: "constant" is eta, "monotonic" eta * sqrt(t / (1 - min(t, 0.95))).
  reason.eta_mode = "monotonic"
  reason.eta = 0.7  # scale of that noise
  # One step of a trajectory is an SDE step, drawn from the first so many; the others are ODE steps.
  reason.sde_index_max = 15
  reason.text_scale = 4.0  # guidance scale of the text; 1 does not guide
  reason.image_scale = 1.0  # guidance scale of the image; 1 does not guide
  # What rescales the guided velocity to the norm of the unguided one: "global" (whole image),
  # "channel" (every token) or "text_channel" (every token, before the image guides).
  reason.renorm = "global"
  reason.renorm_min = 0.0  # lower bound of that factor
  reason.interval = (0.4, 1.0)  # guidance acts where low < t <= high

  # Edits of the refine stage; the keys are those of `reason`.
  refine = config.refine = ConfigDict()
  refine.points = 21
  refine.shift = 3.0
  refine.eta_mode = "monotonic"
  refine.eta = 1.0
  refine.sde_index_max = 2
  refine.text_scale = 4.0
  refine.image_scale = 1.5
  refine.renorm = "text_channel"
  refine.renorm_min = 0.0
  refine.interval = (0.4, 1.0)


def _set_learning(config: ConfigDict):
  """Sets the objective and the optimizer."""
  loss = config.loss = ConfigDict()
  loss.text_weight = 1.0  # of the policy loss of texts
  loss.image_weight = 2.0  # of the policy loss of images
  loss.text_kl = (
    0.001  # of the texts' KL to the reference policy, inside text_weight
  )
  loss.image_kl = 0.001  # of the images' KL to the reference policy
  loss.clip_range = 0.2  # ratios of tokens are clipped to 1 - c .. 1 + c
  # The same of images. Their log-probs are means over all numbers of a latent, so that their ratios
  # stay far closer to 1, see `image_ratio_deviation` in docs/metrics.md.
  loss.image_clip_range = 0.2
  loss.divide_by_std = (
    False  # divides advantages by the standard deviation of their group
  )
  loss.format_weight = 1.0  # of the format reward in the returns of texts

  pool = config.pool = ConfigDict()
  # Probability that a group of the edit stages starts from a perfect image, where there is one.
  pool.perfect = 0.15
  # Images of the pool from the second round on: "drafts", or "edits" of the round before.
  pool.source = "drafts"

  optimizer = config.optimizer = ConfigDict()
  optimizer.und_learning_rate = (
    5e-6  # of the understanding expert, embeddings and head
  )
  optimizer.gen_learning_rate = 5e-6  # of the generation expert
  optimizer.warmup_updates = 10  # over which the rates rise linearly from 0
  optimizer.b1 = 0.9  # decay of AdamW's first moment
  optimizer.b2 = 0.95  # decay of AdamW's second moment
  optimizer.eps = 1e-8  # of AdamW
  optimizer.weight_decay = 0.0  # of AdamW
  optimizer.clip_norm = 1.0  # bound of the gradient's global norm
  optimizer.freeze_und = (
    False  # keeps everything that `und_learning_rate` would train
  )

  compat = config.compat = ConfigDict()
  # Computes the loss of the reference code literally, see docs/algorithm.md#differences.
  compat.reference_loss = False


def _set_reward(config: ConfigDict):
  """Sets what scores images."""
  reward = config.reward = ConfigDict()
  # "world", "service", "flow_grpo", "unirl", "judge", "sum", or a function of your own as
  # "package.module:function", see docs/rewards.md.
  reward.name = "service"
  # What training uses: "score", which is shaped, or a part of it: "correct", "strict".
  reward.value = "score"
  # Divides the score by 1 + this * `clutter`, the share of an image that shows nothing readable;
  # with `shapes` 9 makes an unreadable cell cost as much as an object too many.
  reward.clutter_weight = 0.0
  # Base URLs of the services; requests are spread over them.
  reward.endpoints = ("http://localhost:8000",)
  # Name of the environment variable that holds the services' token; "" sends none.
  reward.token_env = ""
  reward.batch = 16  # images of a request
  # "png", or "jpeg", which is smaller and not exact.
  reward.image_format = "png"
  reward.cache = 4096  # scores that are remembered; 0 asks every time
  # Members of "sum": name -> {"name": ..., "weight": ..., other keys of this section}.
  reward.members = ConfigDict()
  # A run stops when a larger share of the images of `failure_window` iterations has no score.
  reward.max_failed_fraction = 0.2
  reward.failure_window = 20  # iterations
  # Control experiment: gives every sample the reward of another one.
  reward.shuffle = False

  # HTTP requests to services.
  client = config.reward.client = ConfigDict()
  client.deadline = 60.0  # seconds for a request with all its retries
  client.attempts = 4  # tries of a request at most
  client.pause = (
    0.5  # seconds before the second try, doubled before each further one
  )
  client.concurrency = 8  # requests under way at once
  client.failures_to_open = (
    5  # failures in a row after which an endpoint is left alone
  )
  client.open_seconds = 10.0  # how long it is left alone

  # Reward of a UniRL service behind the reward "unirl".
  unirl = config.reward.unirl = ConfigDict()
  unirl.reward = ""  # its name there, as "clip"; "" takes the only one
  # Name of the number that is the score; "" takes the only one.
  unirl.number = ""
  # Values of that number that become the scores 0 and 1; one outside fails.
  unirl.range = (0.0, 1.0)

  # Vision-language model behind the reward "judge".
  judge = config.reward.judge = ConfigDict()
  judge.task = "geneval_plus"  # or "tiif", "checklist"
  judge.model = (
    ""  # its name on the server; "" takes the only one that the server has
  )
  judge.prompt_file = ""  # file with another wording of the request
  judge.system_file = ""  # file with a system message; "" sends none
  # The same two of evaluations; "" takes those of training.
  judge.eval_prompt_file = ""
  judge.eval_system_file = ""
  judge.max_tokens = 4096  # of an answer
  judge.image_format = "jpeg"  # or "png"


def _set_devices(config: ConfigDict):
  """Sets how an iteration is compiled and spread over devices."""
  step = config.step = ConfigDict()
  # "tree": groups edit images of a pool, and every stage has its update. "full": samples edit their
  # own images, and one update follows all stages, see docs/algorithm.md#full-chain.
  step.chain = "tree"
  # "fused" compiles an iteration as one program, "split" every stage on its own.
  step.mode = "fused"
  # Compiles for CPUs with hardly any optimization: quick to start, and slower to run.
  step.quick_compile = False
  # Parts of a replica's samples whose gradients are computed one after the other, to save memory.
  step.micro_batches = 1

  mesh = config.mesh = ConfigDict()
  mesh.data = -1  # replicas of the model; -1 takes the devices that are left
  mesh.fsdp = 1  # devices that parameters and optimizer state are split over
  mesh.tensor = 1  # devices that heads and hidden units are split over

  # Mesh axes that every logical axis of a parameter is split over, see parallel/sharding.py.
  config.sharding = ConfigDict()
  train = config.sharding.train = ConfigDict()  # in updates
  train.embed = ("fsdp",)
  train.table = ("fsdp", "tensor")
  train.vocab = ("tensor",)
  train.heads = ("tensor",)
  train.kv_heads = ("tensor",)
  train.mlp = ("tensor",)  # hidden width of the und expert
  train.gen_mlp = ("tensor",)
  train.rows = ("fsdp",)
  # In rollouts. The inputs of a layer are not split over fsdp: nothing is gathered for a token.
  rollout = config.sharding.rollout = ConfigDict()
  rollout.table = ("fsdp", "tensor")
  rollout.vocab = ("tensor",)
  rollout.heads = ("tensor",)
  rollout.kv_heads = ("tensor",)
  rollout.mlp = ("tensor",)
  rollout.gen_mlp = ("tensor",)
  rollout.rows = ("fsdp",)


def _set_outputs(config: ConfigDict):
  """Sets what a run evaluates, keeps and logs."""
  checkpoint = config.checkpoint = ConfigDict()
  checkpoint.every = 50  # iterations
  checkpoint.keep = 2  # the last so many

  preemption = config.preemption = ConfigDict()
  # Seconds that the iteration and its checkpoint may take after SIGTERM or SIGINT. Longer than what
  # the platform gives does no harm: it kills the run then, as `grace_s` does.
  preemption.grace_s = 100.0

  # An update whose numbers are not finite is skipped, see docs/howto/debug.md.
  health = config.health = ConfigDict()
  # Iterations in a row with a skipped update after which the run stops.
  health.max_skipped = 10
  # Warns when a ratio is further from 1 (`mismatch/*`); 0 takes 0.001 in float32, 0.05 in bfloat16.
  health.mismatch_limit = 0.0
  health.mismatch_stop = False  # stops the run there

  # Keys are named `evaluation` here only because `eval` is a function of Python.
  evaluation = config.eval = ConfigDict()
  evaluation.prompts = (
    0  # held-out prompts, the same number of every tag; 0 takes all
  )
  evaluation.images_per_prompt = 4  # chains of images
  evaluation.rounds = 4  # images of a chain, the draft included
  evaluation.points = 50  # times of the ODE's schedule
  evaluation.temperature = 0.3  # of texts
  # Draws and scores chains beyond their stops too, which shows what stopping is worth. A service is
  # then asked about every image of every chain.
  evaluation.never_stop = False
  # Guidance of drafts in evaluation, in the keys of `reason`; -1 and () take what training has.
  drafts = evaluation.reason = ConfigDict()
  drafts.text_scale = -1.0
  drafts.image_scale = -1.0
  drafts.interval = ()
  # Guidance of edits in evaluation, likewise of `refine`.
  edits = evaluation.refine = ConfigDict()
  edits.text_scale = -1.0
  edits.image_scale = -1.0
  edits.interval = ()
  evaluation.batch_size = 64  # images that are drawn at once, over all devices
  evaluation.seed = 1  # of all randomness of an evaluation
  # Iterations between evaluations, besides those before the first and after the last; 0 adds none.
  evaluation.every = 0
  # Kinds of questions about every draft and last image: "match"; with the reward "world" also the
  # kinds of that world (shapes: "existence", "count", "color", "relation").
  evaluation.ask = ()
  # Labelled images that every model is asked the same questions about: "world" for the world's
  # own, or a file of JSON lines, see docs/evaluation.md#understanding; "" asks about none.
  evaluation.labelled_images = ""
  evaluation.question_tokens = 192  # slots of a question

  log = config.log = ConfigDict()
  # Iterations between samples on the report, and between two versions of it; 0 shows no samples.
  log.samples_every = 10
  log.samples = 8  # prompts that are shown
  log.tensorboard = True  # writes workdir/tensorboard too
  wandb = config.log.wandb = (
    ConfigDict()
  )  # Weights & Biases, see docs/metrics.md
  wandb.project = ""  # "" does not log there
  wandb.name = ""  # of the run
  wandb.mode = "online"  # or "offline"

  profile = config.profile = ConfigDict()
  profile.start = 0  # iteration from which on a trace is written
  profile.steps = 0  # iterations that are traced; 0 traces none


def _bagel() -> ConfigDict:
  """Returns the defaults: those of the reference's script, for BAGEL-7B at 512x512."""
  config = ConfigDict()
  _set_run(config)
  _set_model(config)
  _set_prompts(config)
  _set_sampling(config)
  _set_learning(config)
  _set_reward(config)
  _set_devices(config)
  _set_outputs(config)
  return config


def _use_shapes(config: ConfigDict):
  """Changes the config to the embedded world: 48x48 canvases and the model that comes with it."""
  config.world = "shapes"
  config.model.folder = "world"
  config.data.train = "world"
  config.data.heldout = "world"
  config.data.balance = "tag"
  config.reward.name = "world"

  config.total_steps = 40
  config.groups_per_step = 8
  config.model.dtype = "float32"
  config.model.remat = "none"
  config.image.height = 48
  config.image.width = 48
  config.sequence.prompt_tokens = 12
  config.sequence.thought_tokens = 23
  config.sequence.question_tokens = 14
  config.sequence.answer_tokens = 43
  config.sequence.instruction_tokens = 22
  config.sequence.parser = "tokens"
  config.text.temperature = 1.0
  config.reason.sde_index_max = 4
  # So small a model needs anchors: without them its images soon stop following its plans, see
  # docs/embedded_world.md.
  config.loss.text_kl = 0.02
  config.loss.image_kl = 20.0
  config.optimizer.und_learning_rate = 1.5e-4
  config.optimizer.gen_learning_rate = 1e-4
  config.optimizer.warmup_updates = 4
  config.checkpoint.every = 10
  config.eval.prompts = 120
  config.eval.images_per_prompt = 1
  config.eval.points = 20
  config.eval.batch_size = 120
  config.eval.question_tokens = 18
  config.eval.never_stop = True  # the verifier costs nothing
  config.eval.labelled_images = "world"
  config.log.samples_every = 5
  config.log.samples = 4


def _use_smoke(config: ConfigDict):
  """Changes the embedded world to two iterations with as little work as they can have."""
  _use_shapes(config)
  config.total_steps = 2
  config.groups_per_step = 2
  config.group_size = 2
  config.reason.points = 3
  config.reason.sde_index_max = 2
  config.refine.points = 3
  # Without the pass of the reference policy, and with a program per stage, there
  # is less to compile.
  config.loss.text_kl = 0.0
  config.loss.image_kl = 0.0
  config.step.mode = "split"
  config.step.quick_compile = True
  config.mesh.data = 1  # two devices would take longer to compile for
  config.checkpoint.every = 2
  config.eval.prompts = 6
  config.eval.rounds = 1
  config.eval.points = 3
  config.eval.batch_size = 6
  config.eval.labelled_images = ""
  config.log.samples_every = 1
  config.log.samples = 2
  config.log.tensorboard = False


_WORLDS = {"shapes": _use_shapes, "smoke": _use_smoke}


def get_config(variant: str = "bagel") -> ConfigDict:
  """Returns the config of a variant: "bagel", "shapes", "smoke", or a slice of `slices.py`."""
  config = _bagel()
  if variant in _WORLDS:
    _WORLDS[variant](config)
  else:
    slices.spread(config, variant, tuple(_WORLDS))
  return config.lock()
