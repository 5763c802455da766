"""The three models of the demo, all small enough to be trained hundreds of times on a laptop's CPU."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import ImageClassifierOutput

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


class ResNet9Config(PreTrainedConfig):
    """Configuration of a [`ResNet9ForImageClassification`].

    Args:
        num_channels: Channels of the input image.
        width: Channels after the first convolution; they double twice.
        num_groups: Groups of every `GroupNorm`; must divide `width`.
        stem_stride: Stride of the first convolution; 2 makes everything after it four times cheaper.

    Example:
        >>> ResNet9Config(id2label={0: "cat", 1: "dog", 2: "fish"}).num_labels
        3
    """

    model_type = "hf_attribution_resnet9"

    num_channels: int = 1
    width: int = 8
    num_groups: int = 4
    stem_stride: int = 2


def _convolution(in_channels: int, out_channels: int, num_groups: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(num_groups, out_channels),
        nn.GELU(),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, channels, num_groups), _convolution(channels, channels, num_groups)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


class ResNet9ForImageClassification(PreTrainedModel):
    """ResNet-9 (Page 2018) with `GroupNorm` in place of `BatchNorm`, so that examples do not mix in a batch.

    Registered with `AutoConfig` and `AutoModelForImageClassification`.

    Example:
        >>> model = ResNet9ForImageClassification(ResNet9Config())
        >>> import torch
        >>> model(torch.zeros(2, 1, 28, 28)).logits.shape
        torch.Size([2, 2])
    """

    config: ResNet9Config
    config_class = ResNet9Config
    main_input_name = "pixel_values"

    def __init__(self, config: ResNet9Config) -> None:
        super().__init__(config)
        width, groups = config.width, config.num_groups
        self.features = nn.Sequential(
            _convolution(config.num_channels, width, groups, stride=config.stem_stride),
            _convolution(width, 2 * width, groups),
            nn.MaxPool2d(2),
            _Residual(2 * width, groups),
            _convolution(2 * width, 4 * width, groups),
            nn.MaxPool2d(2),
            _Residual(4 * width, groups),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(4 * width, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: float32 `[B, num_channels, height, width]`.
            labels: int64 `[B]`; with them there is a loss.

        Returns:
            `loss` (mean cross-entropy, or None) and `logits` `[B, num_labels]`.
        """
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(ResNet9Config.model_type, ResNet9Config)
AutoModelForImageClassification.register(ResNet9Config, ResNet9ForImageClassification)


def minilm_classifier(path: Path, num_labels: int = 2) -> PreTrainedModel:
    """Load MiniLM with a new classifier, and freeze all but its last layer, pooler and classifier.

    Dropout is off: it would add noise to every retraining and slow it down, with so few trainable layers.

    Args:
        path: The folder of the pretrained encoder, see [`~hf_attribution.demo.data.minilm_path`].
        num_labels: Number of classes.

    Returns:
        A `BertForSequenceClassification`; the classifier's weights are drawn from torch's global generator.

    Example:
        >>> from hf_attribution.demo.data import minilm_path
        >>> model = minilm_classifier(minilm_path())
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        1923074
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.requires_grad_(False)
    for module in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
        module.requires_grad_(True)
    return model


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that begins every text with `<|endoftext|>`.

    Args:
        texts: What to train on.
        vocab_size: Size of the vocabulary, at least 258: the bytes and two special tokens.
        max_length: Longest sequence of the model.

    Returns:
        The tokenizer; its padding token is its own, so that the end of a text is never masked as padding.

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=260, max_length=8)
        >>> tokenizer.decode(tokenizer("to be")["input_ids"], skip_special_tokens=True)
        'to be'
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, bpe.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=max_length,
    )


def small_gpt2(tokenizer: PreTrainedTokenizerFast, width: int = 64, num_layers: int = 2) -> GPT2LMHeadModel:
    """Build a GPT-2 with fresh weights, without dropout, for texts of the tokenizer's longest length.

    Args:
        tokenizer: Gives the vocabulary, the special tokens and the number of positions.
        width: Size of the hidden states.
        num_layers: Number of blocks.

    Returns:
        The model; its weights are drawn from torch's global generator.

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=260, max_length=8)
        >>> small_gpt2(tokenizer).config.n_positions
        8
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=tokenizer.model_max_length,
        n_embd=width,
        n_layer=num_layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)
