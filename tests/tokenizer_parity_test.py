"""Ten kinds of tokenizers: ids and texts as those of transformers, over a hundred strings."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from klrl.models import load_tokenizer
from klrl.tasks import data

SHARED = pathlib.Path(__file__).parents[2] / "shared"
GPT2 = SHARED / "tokenizers" / "gpt2"

LINES = [
  "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
  "Once upon a time, there was a little girl named Lily. She loved to play outside!",
  "def add(a, b):\n  return a + b  # 12 + 345 = 357",
  "naïve café, Straße, Ångström, ﬁne; 你好世界。 Привет, мир!",
  "It's what we've said: don't, I'm, they're.",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = ["a", " ", "the", "dog", "12", "345", ".", ",", "  ", "\n", "\t", "don't", "é", "é"]
WORDS += [
  "你好",
  "😀",
  "👩‍👩‍👧",
  "ﬁ",
  "Ⅷ",
  "İ",
  "ß",
  "\u200b",
  "\xa0",
  "<s>",
  "</s>",
  "<unk>",
  "<pad>",
]
WORDS += [
  "<tool>",
  "<tool",
  "<|x|>",
  "x<|x|>y",
  "▁",
  "Ġ",
  "##ing",
  "\x00",
  "\u202e",
  "zebra",
  "THE",
]


def strings():
  """Returns over a hundred strings: each word alone, between others, in pairs and in rows."""
  found = [*LINES[:5], "", *WORDS]
  found += [f"the {word} dog" for word in WORDS]
  found += [f"{a}{b}" for a, b in zip(WORDS, WORDS[7:], strict=False)]
  found += [" ".join(WORDS[i : i + 5]) + " " for i in range(0, len(WORDS), 3)]
  return list(dict.fromkeys(found))


def trained(model, trainer, **parts):
  tokenizer = tokenizers.Tokenizer(model)
  for name, part in parts.items():
    setattr(tokenizer, name, part)
  tokenizer.train_from_iterator(LINES, trainer)
  return tokenizer


def bpe(**options):
  return trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, **options)


def with_bos(tokenizer, single="<s> $A"):
  ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
  tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
  return tokenizer


def byte_level():
  return trained(
    models.BPE(),
    bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
    decoder=decoders.ByteLevel(),
    post_processor=processors.ByteLevel(trim_offsets=True),
  )


def digits_apart():
  tokenizer = trained(
    models.BPE(),
    bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    normalizer=normalizers.NFC(),
    pre_tokenizer=pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    ),
    decoder=decoders.ByteLevel(),
  )
  return with_bos(tokenizer)


BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece(**parts):
  tokenizer = trained(
    models.BPE(unk_token="<unk>", fuse_unk=True),
    trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
    pre_tokenizer=pre_tokenizers.Metaspace(),
  )
  content = json.loads(tokenizer.to_str())
  vocab = content["model"]["vocab"]
  vocab |= {token: len(vocab) + i for i, token in enumerate(BYTES)}
  content["model"]["byte_fallback"] = True
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  for name, part in parts.items():
    setattr(tokenizer, name, part)
  return with_bos(tokenizer)


def llama_legacy():
  """As in Llama 2: a blank before every stretch between special tokens."""
  return sentencepiece(
    normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    pre_tokenizer=None,
    decoder=decoders.Sequence(
      [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
      ]
    ),
  )


def metaspace_bpe():
  return sentencepiece(
    pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
  )


def unigram():
  return trained(
    models.Unigram(),
    trainers.UnigramTrainer(
      vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    ),
    normalizer=normalizers.NFKC(),
    pre_tokenizer=pre_tokenizers.Metaspace(),
    decoder=decoders.Metaspace(),
  )


def word_piece():
  tokenizer = trained(
    models.WordPiece(unk_token="<unk>"),
    trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
    normalizer=normalizers.Sequence(
      [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    ),
    pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    decoder=decoders.WordPiece(),
  )
  return with_bos(tokenizer)


def word_level():
  return trained(
    models.WordLevel(unk_token="<unk>"),
    trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
    pre_tokenizer=pre_tokenizers.Whitespace(),
  )


def with_added_tokens():
  tokenizer = byte_level()
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),
      tokenizers.AddedToken("dog", single_word=True),
      tokenizers.AddedToken("  ", normalized=False),
    ]
  )
  tokenizer.add_special_tokens([tokenizers.AddedToken("<|x|>", lstrip=True, special=True)])
  return with_bos(tokenizer)


def unmarked():
  """Its special tokens are in the vocabulary, and only tokenizer_config.json says what they are."""
  content = json.loads(metaspace_bpe().to_str()) | {"added_tokens": []}
  return tokenizers.Tokenizer.from_str(json.dumps(content))


def marked_as_ordinary():
  """Its added tokens are not special, but tokenizer_config.json names them."""
  content = json.loads(byte_level().to_str())
  content["added_tokens"] = [token | {"special": False} for token in content["added_tokens"]]
  return tokenizers.Tokenizer.from_str(json.dumps(content))


def gpt2():
  if not GPT2.is_dir():
    pytest.skip("needs the shared tokenizer")
  tokenizer = tokenizers.Tokenizer(
    models.BPE.from_file(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt"))
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
END = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
LLAMA = NAMES | {"tokenizer_class": "LlamaTokenizerFast"}
KINDS = {
  "byte-level": (byte_level, NAMES),
  "gpt2": (gpt2, END),
  "digits": (digits_apart, NAMES),
  "llama-legacy": (llama_legacy, NAMES),
  "llama-class": (llama_legacy, LLAMA | {"legacy": False}),
  "llama-class-legacy": (llama_legacy, LLAMA | {"legacy": True, "add_bos_token": False}),
  "llama-class-bare": (unmarked, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}),
  "metaspace": (metaspace_bpe, NAMES | {"clean_up_tokenization_spaces": True}),
  "unigram": (unigram, NAMES | {"clean_up_tokenization_spaces": True}),
  "word-piece": (word_piece, NAMES | {"extra_special_tokens": ["dog"]}),
  "word-level": (word_level, NAMES),
  "added-tokens": (with_added_tokens, NAMES | {"additional_special_tokens": ["<tool>"]}),
  "unmarked": (unmarked, NAMES),
  "ordinary": (marked_as_ordinary, NAMES),
  "split-special": (byte_level, NAMES | {"split_special_tokens": True}),
}


def directory_of(path, kind):
  make, named = KINDS[kind]
  tokenizer = make()
  path.mkdir(exist_ok=True)
  tokenizer.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps(named))
  size = tokenizer.get_vocab_size() + 8
  config = {"model_type": "llama", "vocab_size": size, "hidden_size": 8, "intermediate_size": 8}
  config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
  (path / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
  return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind, tmp_path):
  transformers = pytest.importorskip("transformers")
  directory = directory_of(tmp_path / "model", kind)
  ours = load_tokenizer(directory)
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  assert ours.tokenizer.get_vocab() == theirs.get_vocab()
  assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
  texts = strings()
  assert len(texts) > 100
  expected = [ids[:] for ids in theirs(texts)["input_ids"]]
  bare = theirs(texts, add_special_tokens=False)["input_ids"]
  begins = theirs("")["input_ids"][:1]
  for text, row, ids, without in zip(texts, ours.encode_batch(texts), expected, bare, strict=True):
    # A text that brings its BOS gets no other.
    wanted = without if begins and without[:1] == begins else ids
    assert row.ids == wanted, text
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    prompt, completion = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    before = theirs.decode(prompt, skip_special_tokens=True)
    whole = theirs.decode(ids, skip_special_tokens=True)
    if whole.startswith(before):
      assert data.decode_continuation(ours, prompt, completion) == whole[len(before) :], text
