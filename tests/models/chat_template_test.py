"""Chat templates that came with a model: what they may do, and how long."""

import time

import pytest

from agrpo_jax import errors
from agrpo_jax.models import base
from agrpo_jax.models import chat_template
from agrpo_jax.models import tokens

MESSAGES = [{"role": "user", "content": "4*5"}]


@pytest.fixture
def encode(tmp_path):
  """Encodes a chat under a template, with the tokenizer of the tiny models."""
  ids = tokens.write_byte_tokenizer(tmp_path)
  vocabulary = base.Vocabulary(
    ids["vocab_size"],
    ids["mask_id"],
    ids["eos_id"],
    ids["pad_id"],
    end_of_turn="<|eot_id|>",
  )

  def run(template, messages=MESSAGES):
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = tokens.load(tmp_path, vocabulary)
    return tokenizer.decode_raw(tokenizer.encode_chat(messages))

  return run


def test_what_templates_of_released_models_use(encode):
  assert encode("{{ bos_token }}{{ messages | tojson }}") == (
    '<|startoftext|>[{"role": "user", "content": "4*5"}]'
  )
  template = """
    {%- set ns = namespace(last='') %}
    {%- for message in messages %}
      {%- set ns.last = message.content.split('*')[-1] | trim %}
      {%- if loop.last %}{% break %}{% endif %}
    {%- endfor %}
    {%- generation %}{{ ns.last }}{% endgeneration %}
    {%- if add_generation_prompt %}<{{ strftime_now('%Y') | length }}>
    {%- endif %}
  """
  assert encode(template).strip() == "5<4>"


@pytest.mark.parametrize(
  "template,part",
  [
    ("{% include 'secret.txt' %}", "no loader"),
    ("{% import 'os' as os %}", "no loader"),
    ("{{ range(10**9) | list }}", "range"),
    ("{{ messages.__class__.__mro__ }}", "__class__"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "__class__"),
    ("{{ messages.append(1) }}", "append"),
    ("{{ raise_exception('no system turn here') }}", "no system turn here"),
    ("{% for x in messages %}", "end of template"),
    ("{{ 'x' * 10**10 }}", "memory"),
    ("{{ '%0999999999d' | format(1) }}", "million|memory|characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ 1 // 0 }}", "division"),
    ("{{ 'x' * 20_000_000 }}", "10,000,000 characters"),
  ],
)
def test_what_is_refused(encode, template, part):
  with pytest.raises(errors.UserError, match=part) as caught:
    encode(template)
  assert "chat template cannot write these messages" in str(caught.value)


def test_many_chats_are_bounded_together():
  chats = [MESSAGES] * 64
  template = "{{ 'é' * %d }}"
  begin = time.monotonic()
  texts = chat_template.render(template % 100_000, {}, chats)
  assert time.monotonic() - begin < 30
  assert texts == ["é" * 100_000] * 64
  with pytest.raises(errors.UserError, match="10,000,000 characters"):
    chat_template.render(template % 200_000, {}, chats)


def test_an_endless_template_ends_and_the_next_one_works(encode):
  loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
  begin = time.monotonic()
  with pytest.raises(errors.UserError, match="within 10 seconds"):
    encode(loop)
  assert time.monotonic() - begin < 60
  assert encode("{{ messages[0].content }}") == "4*5"
