"""Tiny random models and datasets in folders, as users have them."""

import numpy as np
import transformers as tf
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "bad", "boring", "dull", "film", "fine", "good", "great", "is", "it", "of", "plot", "the", "was"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(pair_template=True):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if not pair_template:  # as a decoder's: no padding, nothing added
        return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]")
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def texts(size, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 9))) for _ in range(size)]


def reviews(size, seed=0):
    """Texts with a label of the class `neg` or `pos`, both there."""
    columns = {"text": texts(size, seed), "label": [i % 2 for i in range(size)], "source": ["x"] * size}
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["neg", "pos"]), "source": Value("string")}
    )
    return Dataset.from_dict(columns, features=features)


def pictures(size, seed=0, label="digit"):
    rng = np.random.default_rng(seed)
    images = [Pillow.fromarray(rng.integers(0, 256, (10, 10), dtype=np.uint8)) for _ in range(size)]
    features = Features({"image": Image(), label: ClassLabel(names=["zero", "one", "two"])})
    return Dataset.from_dict({"image": images, label: [i % 3 for i in range(size)]}, features=features)


def save_splits(folder, make, train=12, test=3):
    DatasetDict({"train": make(train), "test": make(test, seed=1)}).save_to_disk(str(folder))
    return str(folder)


def _bert_config(**settings):
    return tf.BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        **settings,
    )


def save_classifier(folder, names=("neg", "pos"), seed=0):
    tf.set_seed(seed)
    ids = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    tf.BertForSequenceClassification(_bert_config(**ids)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_headless(folder):
    tf.set_seed(0)
    tf.BertModel(_bert_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_masked_lm(folder):
    tf.set_seed(0)
    tf.BertForMaskedLM(_bert_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_causal_lm(folder):
    tf.set_seed(0)
    config = tf.GPT2Config(vocab_size=len(SPECIAL + WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=16)
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer(pair_template=False).save_pretrained(folder)
    return str(folder)


def save_seq2seq(folder):
    tf.set_seed(0)
    config = tf.T5Config(
        vocab_size=len(SPECIAL + WORDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    tf.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_image_classifier(folder, channels=1):
    tf.set_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=channels, num_labels=3)
    tf.ViTForImageClassification(config).save_pretrained(folder)
    halves = [0.5] * channels
    size = {"height": 8, "width": 8}
    tf.ViTImageProcessorPil(size=size, image_mean=halves, image_std=halves).save_pretrained(folder)
    return str(folder)
