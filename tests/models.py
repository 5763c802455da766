"""Tiny random models of many families, and a batch for each, padded on either side."""

import torch
import transformers as tf

V, D = 50, 16


def text_batch(padding="right", labels="tokens", batch=3, length=6, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, V, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        where = slice(0, row) if padding == "left" else slice(length - row, length)
        mask[row, where] = 0
        ids[row, where] = 1
    batch_inputs = {"input_ids": ids, "attention_mask": mask}
    if labels == "tokens":
        batch_inputs["labels"] = ids.masked_fill(mask == 0, -100)
    elif labels == "class":
        batch_inputs["labels"] = torch.randint(0, num_classes, (batch,), generator=generator)
    elif labels == "masked":
        batch_inputs["labels"] = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.5, -100)
        batch_inputs["labels"][:, -3] = ids[:, -3]
    else:
        batch_inputs["labels"] = torch.randint(5, V, (batch, 4), generator=generator)
        batch_inputs["labels"][1, 2:] = -100
    return batch_inputs


def image_batch(channels=1, size=8, batch=3, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(batch, channels, size, size, generator=generator),
        "labels": torch.randint(0, num_classes, (batch,), generator=generator),
    }


_TEXT = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**_TEXT, num_labels=3)), text_batch(labels="class")


def bert_mlm():
    return tf.BertForMaskedLM(tf.BertConfig(**_TEXT)), text_batch(labels="masked")


def roberta():
    config = tf.RobertaConfig(**{**_TEXT, "max_position_embeddings": 40}, num_labels=3)
    return tf.RobertaForSequenceClassification(config), text_batch(labels="class")


def distilbert():
    config = tf.DistilBertConfig(
        vocab_size=V,
        dim=D,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        pad_token_id=1,
        max_position_embeddings=32,
        num_labels=3,
    )
    return tf.DistilBertForSequenceClassification(config), text_batch(labels="class")


def deberta():
    config = tf.DebertaV2Config(
        **_TEXT,
        num_labels=3,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        max_relative_positions=8,
    )
    return tf.DebertaV2ForSequenceClassification(config), text_batch(labels="class")


def gpt2(padding="right"):
    config = tf.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return tf.GPT2LMHeadModel(config), text_batch(padding)


def gpt2_left():
    return gpt2("left")


def gpt2_classification():
    config = tf.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=1)
    return tf.GPT2ForSequenceClassification(config), text_batch(labels="class")


def opt():
    config = tf.OPTConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        word_embed_proj_dim=D,
        pad_token_id=1,
    )
    return tf.OPTForCausalLM(config), text_batch()


def _decoder(name, padding="right", **extra):
    config = getattr(tf, f"{name}Config")(**_TEXT, num_key_value_heads=1, **extra)
    return getattr(tf, f"{name}ForCausalLM")(config), text_batch(padding)


def llama():
    return _decoder("Llama")


def llama_left():
    return _decoder("Llama", "left")


def qwen3():
    return _decoder("Qwen3", head_dim=8)


def gemma():
    return _decoder("Gemma", head_dim=8)


def mixtral():
    return _decoder("Mixtral", num_local_experts=2, num_experts_per_tok=1)


def t5():
    config = tf.T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=1, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config), text_batch(labels="decoder")


def bart():
    config = tf.BartConfig(
        vocab_size=V,
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        pad_token_id=1,
        max_position_embeddings=32,
        scale_embedding=True,
        decoder_start_token_id=0,
    )
    return tf.BartForConditionalGeneration(config), text_batch(labels="decoder")


def vit():
    config = tf.ViTConfig(
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return tf.ViTForImageClassification(config), image_batch()


def resnet():
    config = tf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    return tf.ResNetForImageClassification(config), image_batch(3, 16)


def convnext():
    config = tf.ConvNextConfig(
        num_channels=3, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
    )
    return tf.ConvNextForImageClassification(config), image_batch(3, 16)


def swin():
    config = tf.SwinConfig(
        image_size=16,
        patch_size=2,
        num_channels=3,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=3,
    )
    return tf.SwinForImageClassification(config), image_batch(3, 16)


def mobilenet():
    config = tf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3)
    return tf.MobileNetV2ForImageClassification(config), image_batch(3, 32)


FAMILIES = {
    function.__name__: function
    for function in (
        bert,
        bert_mlm,
        roberta,
        distilbert,
        deberta,
        gpt2,
        gpt2_left,
        gpt2_classification,
        opt,
        llama,
        llama_left,
        qwen3,
        gemma,
        mixtral,
        t5,
        bart,
        vit,
        resnet,
        convnext,
        swin,
        mobilenet,
    )
}


def make(family, seed=0):
    """A model of a family, in eval mode with weights away from their symmetric start, and a batch for it."""
    torch.manual_seed(seed)
    model, batch = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), batch
