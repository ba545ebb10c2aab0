"""Tests of rewards/remote/judge.py against a server that speaks OpenAI's chat protocol."""

import base64
import json
import re

import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome as outcome_lib
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import judge as judge_lib
from r3jax.rewards.remote import protocol
from tests import documented
from tests.rewards import defaults
from tests.rewards import scripted

IMAGES = (
  np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
)
PLUS = records.Prompt.from_json(
  {
    "tag": "size_spatial_attr",
    "prompt": "A photo of a larger bench on the left and two red cows on the below",
    "include": [
      {"class": "bench", "count": 1, "region": "left", "size": "larger"},
      {"class": "cow", "count": 2, "color": "red", "region": "below"},
    ],
  }
)
TIIF = records.Prompt.from_json(
  {
    "tag": "action+2d",
    "prompt": "Near a pet shop, no hamsters run.",
    "questions": [
      ["Is there a pet shop?", "yes"],
      ["Is there a hamster?", "no"],
      ["Is it near?", "yes"],
    ],
  }
)
POSITION = records.Prompt.from_json(
  {
    "tag": "position",
    "prompt": "a photo of a dog right of a bear",
    "include": [
      {"class": "bear", "count": 1},
      {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
  }
)


class Chat:
  """Answers as a chat server; `say` is the text of every answer except the first, the probe's."""

  first = '{"correct": 1}'

  def __init__(self, say="", models=("m",), takes_schema=True):
    self.say, self.models, self.takes_schema = say, models, takes_schema
    self.bodies = []

  def __call__(self, request):
    if request.method == "GET":
      return 200, json.dumps(
        {"data": [{"id": name} for name in self.models]}
      ).encode()
    body = json.loads(request.body)
    if "response_format" in body and not self.takes_schema:
      return 400, b'{"error": "response_format is not supported"}'
    self.bodies.append(body)
    if len(self.bodies) == 1:
      return 200, completion(self.first)
    say = self.say(body) if callable(self.say) else self.say
    return 200, completion(say)


def completion(content, finish_reason="stop", **message) -> bytes:
  """Returns a chat completion."""
  message = {"role": "assistant", "content": content} | message
  choice = {"finish_reason": finish_reason, "message": message}
  return json.dumps({"choices": [choice]}).encode()


def error(message, code=None) -> bytes:
  """Returns the body with which OpenAI's protocol refuses a request."""
  return json.dumps({"error": {"message": message, "code": code}}).encode()


def make(server, task, path="", **changes):
  settings = defaults.client(
    endpoints=(server.url + path,), deadline=5.0, attempts=2, pause=0.01
  )
  return judge_lib.Judge(
    http_client.Client(settings), defaults.judge(task=task, **changes), (8, 8)
  )


def outcome(task, record, say) -> outcome_lib.Outcome:
  with scripted.serve(Chat(say)) as server:
    (found,) = make(server, task).score(IMAGES[:1], [record])
  return found


class TestScore:
  def test_tiif_is_the_share_of_the_questions_asked(self):
    found = outcome("tiif", TIIF, '{"1": "yes", "2": "Yes", "3": "yes"}')
    assert found.score == pytest.approx(2 / 3)
    assert found.parts == {"strict": 0}
    assert found.detail == {"answer": '{"1": "yes", "2": "Yes", "3": "yes"}'}
    assert outcome(
      "tiif", TIIF, '{"3": "yes", "2": "no", "1": "yes"}'
    ) == outcome_lib.Ok(
      1.0, {"strict": 1.0}, {"answer": '{"3": "yes", "2": "no", "1": "yes"}'}
    )

  def test_verdict_is_zero_or_one(self):
    assert (
      outcome("geneval_plus", PLUS, '{"reason": "one cow", "correct": 0}').score
      == 0
    )
    assert outcome("geneval_plus", PLUS, '{"correct": "1"}').score == 1

  def test_text_with_a_line_break_is_read(self):
    """Models write them where no schema holds them, though JSON has none."""
    say = '{"reason": "one cow\nand a dog", "correct": 1}'
    assert outcome("geneval_plus", PLUS, say).score == 1

  def test_checklist_asks_about_every_expectation(self):
    assert outcome("checklist", PLUS, '{"1": "yes", "2": "no"}').score == 0.5

  @pytest.mark.parametrize(
    "say",
    [
      '{"1": "yes"}',  # the reference would call it 1 of 1
      '{"1": "yes", "2": "no", "3": "yes"} or {"1": "no", "2": "no", "3": "no"}',
      '<think> so {"1": "yes", "2": "no", "3": "yes"} is',
      '{"answers": {"1": "yes", "2": "no", "3": "yes"}}',
      '["yes", "no", "yes"]',
      '{"1": "yes", "2": "maybe", "3": "yes"}',
      '{"1": true, "2": "no", "3": "yes"}',
      '{"1": "yes", "1": "no", "2": "no", "3": "yes"}',
      "yes, no, yes",
      "",
      " ",
      '{"1": "yes", "2": "no", "3": "ye',
      "{" * 100_000,
      '{"1":' * 100_000,
    ],
  )
  def test_other_answer_is_no_verdict(self, say):
    found = outcome("tiif", TIIF, say)
    assert isinstance(found, outcome_lib.Invalid)
    assert (
      found.reason.startswith("no verdict: ")
      and repr(say[:1000]) in found.reason
    )

  @pytest.mark.parametrize(
    "say",
    [
      '```json\n{"1": "yes", "2": "no", "3": "yes"}\n```',
      '<think>{"1": "no"}</think> {"1": "YES", "2": " no", "3": "yes"}',
      'The answer is {"1": "yes", "2": "no", "3": "yes"}',
      'So {1: yes}:\n```\n{"1": "yes", "2": "no", "3": "yes"}\n```\nAll hold.',
      '{"1": "yes", "2": "no", "3": "yes", "4": "yes"}',
      '{"explanation": {"1": "no"}, "1": "yes", "2": "no", "3": "yes"}',
      '{"1": "yes", "2": "no", "3": "yes"} {"3": "yes", "2": "no", "1": "yes"}',
    ],
  )
  def test_answers_are_read_by_key(self, say):
    assert outcome("tiif", TIIF, say).score == 1

  @pytest.mark.parametrize(
    "reply, reason",
    [
      (
        completion(None, "length", reasoning_content="I look again"),
        r"ran out of tokens \(finish_reason 'length'; reward.judge.max_tokens is 4096\)",
      ),
      (completion('{"correct": 1}', "length"), "ran out of tokens"),
      (completion(None, refusal="I cannot see faces"), "I cannot see faces"),
      (completion(None, "content_filter"), "withholds the answer"),
      (completion(None), "the answer is empty"),
      (completion(""), "the answer is empty"),
      (b'{"choices": [{"message": {}}]}', "the answer is empty"),
    ],
  )
  def test_answer_without_a_verdict_is_invalid_at_once(self, reply, reason):
    chat, broken = Chat('{"correct": 1}'), []
    with scripted.serve(
      lambda request: (200, reply) if broken else chat(request)
    ) as server:
      judge = make(server, "geneval_plus")
      broken.append(True)
      num_before = len(server.requests)
      # Ten of them would open the breaker of an endpoint that failed.
      found = judge.score(np.repeat(IMAGES[:1], 10, axis=0), [PLUS] * 10)
      assert len(server.requests) - num_before == 10
      metrics = judge.metrics()
      assert (metrics["failed"], metrics["retries"]) == (0, 0)
      assert metrics["endpoints_open"] == 0
    for result in found:
      assert isinstance(result, outcome_lib.Invalid)
      assert re.search(reason, result.reason)

  def test_refused_content_is_invalid_and_another_refusal_a_failure(self):
    chat, bodies = Chat('{"correct": 1}'), []
    with scripted.serve(
      lambda request: (400, bodies[-1]) if bodies else chat(request)
    ) as server:
      judge = make(server, "geneval_plus")
      bodies.append(error("this is violent", "content_filter"))
      (refused,) = judge.score(IMAGES[:1], [PLUS])
      bodies.append(error("the context holds 2048"))
      (failed,) = judge.score(IMAGES[:1], [PLUS])
    assert refused == outcome_lib.Invalid(
      "no verdict: the judge refuses: the service answered with status 400: this is violent"
    )
    assert failed == outcome_lib.Failed(
      "the service answered with status 400: the context holds 2048"
    )

  @pytest.mark.parametrize(
    "reply",
    [
      b"<html>",
      b"{}",
      b'{"choices": []}',
      b'{"choices": [{"message": null}]}',
      b'{"choices": [{"message": {"content": [1]}}]}',
    ],
  )
  def test_other_reply_is_a_failure(self, reply):
    chat, broken = Chat('{"correct": 1}'), []
    with scripted.serve(
      lambda request: (200, reply) if broken else chat(request)
    ) as server:
      judge = make(server, "geneval_plus")
      broken.append(True)
      (found,) = judge.score(IMAGES[:1], [PLUS])
    assert isinstance(found, outcome_lib.Failed)
    assert found.reason.startswith("a reply that is not of the protocol")

  def test_failing_image_leaves_the_other_its_score(self):
    with scripted.serve(
      Chat(lambda body: '{"correct": 1}' if "cow" in str(body) else "no idea")
    ) as server:
      found = make(server, "geneval_plus").score(IMAGES, [PLUS, POSITION])
    assert [type(one) for one in found] == [outcome_lib.Ok, outcome_lib.Invalid]


def images_of(body: dict) -> list[np.ndarray]:
  """Returns the PNG images of a request."""
  images = []
  for part in body["messages"][-1]["content"]:
    if part["type"] == "image_url":
      url = part["image_url"]["url"]
      file = base64.b64decode(url.removeprefix("data:image/png;base64,"))
      images.append(protocol.decode_image(file, "png", 64))
  return images


class TestRequest:
  def test_says_image_prompt_and_expectations(self):
    chat = Chat('{"correct": 1}')
    with scripted.serve(chat) as server:
      make(server, "geneval_plus", image_format="png", max_tokens=77).score(
        IMAGES[:1], [PLUS]
      )
    first, body = chat.bodies
    (image,) = images_of(first)
    assert (image == 128).all() and image.shape == (8, 8, 3)
    assert (body["model"], body["temperature"], body["max_tokens"]) == (
      "m",
      0,
      77,
    )
    (image,) = images_of(body)
    assert (image == IMAGES[0]).all()
    (message,) = body["messages"]
    _, text = message["content"]
    for part in (
      PLUS.text,
      "- exactly 1 x larger bench on the left side of the frame\n",
      "- exactly 2 x red cow in the lower part of the frame\n",
      "photograph",
      "collage",
    ):
      assert part in text["text"]
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["reason", "correct"] and schema["properties"][
      "correct"
    ] == {"enum": [1, 0]}

  def test_questions_are_numbered_and_held_to_a_schema(self):
    chat = Chat('{"1": "yes", "2": "no", "3": "yes"}')
    with scripted.serve(chat) as server:
      make(server, "tiif").score(IMAGES[:1], [TIIF])
    assert (
      "1. Is there a pet shop?\n2. Is there a hamster?\n3. Is it near?"
      in str(chat.bodies[1]["messages"][0]["content"][1]["text"])
    )
    schema = chat.bodies[1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {
      key: {"enum": ["yes", "no"]} for key in "123"
    }

  def test_relation_names_the_other_object(self):
    chat = Chat('{"1": "yes", "2": "yes"}')
    with scripted.serve(chat) as server:
      make(server, "checklist").score(IMAGES[:1], [POSITION])
    assert "2. Does the image show exactly 1 x dog right of the bear?" in str(
      chat.bodies[1]
    )

  def test_server_without_schemas_is_asked_without(self):
    chat = Chat('{"correct": 1}', takes_schema=False)
    with scripted.serve(chat) as server:
      (found,) = make(server, "geneval_plus").score(IMAGES[:1], [PLUS])
    assert found.score == 1
    assert "response_format" not in chat.bodies[0]

  def test_official_wording_is_taken_from_a_file(self, tmp_path):
    path = tmp_path / "official.txt"
    path.write_text('Judge: $prompt\n$expectations\nSay {"correct": 0 or 1}.')
    chat = Chat('{"correct": 1}')
    with scripted.serve(chat) as server:
      judge = make(server, "geneval_plus", prompt_file=str(path))
      judge.score(IMAGES[:1], [PLUS])
      assert (
        judge.describe()["wording_sha256"]
        != make(server, "geneval_plus").describe()["wording_sha256"]
      )
    text = chat.bodies[1]["messages"][0]["content"][1]["text"]
    assert text.startswith(
      f"Judge: {PLUS.text}\n- exactly 1 x"
    ) and text.endswith('Say {"correct": 0 or 1}.')

  def test_evaluation_has_wordings_of_its_own(self, tmp_path):
    files = {}
    for name in ("system", "eval_system", "eval_prompt"):
      path = tmp_path / name
      path.write_text(f"\ufeff{name} says: $prompt")
      files[f"{name}_file"] = str(path)
    chat = Chat('{"correct": 1}')
    with scripted.serve(chat) as server:
      trains = make(server, "geneval_plus", **files)
      evaluates = judge_lib.Judge(
        trains._client,
        defaults.judge(task="geneval_plus", **files).for_evaluation(),
        (8, 8),
      )
      for judge in (trains, evaluates):
        judge.score(IMAGES[:1], [PLUS])
    # The first questions have the system message too: some servers refuse it.
    systems = [body["messages"][0] for body in chat.bodies]
    assert [message["content"].split()[0] for message in systems] == [
      "system",
      "eval_system",
      "system",
      "eval_system",
    ]
    assert {message["role"] for message in systems} == {"system"}
    texts = [
      body["messages"][1]["content"][1]["text"] for body in chat.bodies[2:]
    ]
    assert texts[0].startswith("You check a generated image")
    assert texts[1] == f"eval_prompt says: {PLUS.text}"
    for key in ("wording_sha256", "system_message_sha256"):
      assert trains.describe()[key] != evaluates.describe()[key]

  @pytest.mark.parametrize(
    "text, message",
    [
      (
        "Is it good?",
        r"must insert \$questions, and may insert .*; it has \[\]",
      ),
      (
        "Is the picture of $prompt good?",
        r"must insert \$questions, .*; it has \['prompt'\]",
      ),
      ("$promt $questions", "it has .'promt', 'questions'"),
      ("costs 5$", "an invalid"),
      (None, "must be readable"),
    ],
  )
  def test_bad_wording_is_refused(self, tmp_path, text, message):
    path = tmp_path / "wording.txt"
    if text is not None:
      path.write_text(text)
    with pytest.raises(ValueError, match=message):
      defaults.judge(task="tiif", prompt_file=str(path)).read_wording()


class TestStart:
  @pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
  def test_v1_in_the_endpoint_is_understood(self, path):
    with scripted.serve(Chat('{"correct": 1}')) as server:
      (found,) = make(server, "geneval_plus", path).score(IMAGES[:1], [PLUS])
      assert found.score == 1
      assert {request.path for request in server.requests} == {
        "/v1/models",
        "/v1/chat/completions",
      }

  def test_judge_that_takes_no_images_is_refused(self):
    chat = Chat('{"correct": 1}')

    def answer(request):
      if b"image_url" in request.body:
        return 400, error("m takes no images")
      return chat(request)

    message = (
      "must answer a first question, which shows an image, before a run starts: "
      "the service answered with status 400: m takes no images"
    )
    with (
      scripted.serve(answer) as server,
      pytest.raises(ValueError, match=message),
    ):
      make(server, "tiif")

  @pytest.mark.parametrize("takes_schema", [True, False])
  def test_judge_whose_first_answer_is_no_verdict_is_refused(
    self, takes_schema
  ):
    chat = Chat(takes_schema=takes_schema)
    chat.first = "I cannot see any image."
    message = "before a run starts: no verdict: .*'I cannot see any image.'$"
    with (
      scripted.serve(chat) as server,
      pytest.raises(ValueError, match=message),
    ):
      make(server, "tiif")

  def test_unknown_task_is_refused(self):
    with pytest.raises(ValueError, match="reward.judge.task must be one of"):
      defaults.judge(task="beauty")

  @pytest.mark.parametrize(
    "model, served", [("other", ("m",)), ("", ("m", "n")), ("", ())]
  )
  def test_model_that_is_not_served_is_refused(self, model, served):
    with (
      scripted.serve(Chat("{}", models=served)) as server,
      pytest.raises(
        ValueError, match="reward.judge.model must be one that the service has"
      ),
    ):
      make(server, "tiif", model=model)

  def test_judge_that_does_not_answer_is_refused(self):
    def answer(request):
      return Chat()(request) if request.method == "GET" else (500, b"")

    with (
      scripted.serve(answer) as server,
      pytest.raises(
        ValueError, match="must answer a first question, which shows an image"
      ),
    ):
      make(server, "tiif")

  def test_judge_that_refuses_everything_is_refused(self):
    def answer(request):
      return Chat()(request) if request.method == "GET" else (401, b"")

    with (
      scripted.serve(answer) as server,
      pytest.raises(
        ValueError,
        match="before a run starts: the service answered with status 401$",
      ),
    ):
      make(server, "tiif")

  @pytest.mark.parametrize(
    "task, record",
    [("tiif", PLUS), ("geneval_plus", TIIF), ("checklist", TIIF)],
  )
  def test_record_with_nothing_to_ask_is_refused(self, task, record):
    with (
      scripted.serve(Chat("{}")) as server,
      pytest.raises(ValueError, match="needs prompts with"),
    ):
      make(server, task).check(record)


class TestMetrics:
  def test_judge_that_always_says_yes_is_seen(self):
    with scripted.serve(Chat('{"1": "yes", "2": "yes", "3": "yes"}')) as server:
      judge = make(server, "tiif")
      judge.score(IMAGES, [TIIF] * 2)
      found = judge.metrics()
      assert (found["yes_rate"], found["always_yes"], found["always_no"]) == (
        1,
        1,
        0,
      )
      assert (found["right_on_yes"], found["right_on_no"]) == (1, 0)
      assert found["requests"] == 3  # the probe too
      assert "yes_rate" not in judge.metrics()
      names = {f"service/judge/{name}" for name in found}
      assert not documented.undocumented(
        names, "judge", "service"
      ) and not documented.missing(names, "judge")
