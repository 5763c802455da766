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


def qwen2_moe():
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return _decoder("Qwen2Moe", num_experts=4, num_experts_per_tok=2, **sizes)


def gpt_oss():
    return _decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)


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


def electra():
    config = tf.ElectraConfig(**_TEXT, embedding_size=8, num_labels=3)
    return tf.ElectraForSequenceClassification(config), text_batch(labels="class")


def albert():
    """The same layers several times in a row."""
    config = tf.AlbertConfig(**_TEXT, embedding_size=8, num_labels=3)
    return tf.AlbertForSequenceClassification(config), text_batch(labels="class")


def mpnet():
    config = tf.MPNetConfig(**{**_TEXT, "max_position_embeddings": 40}, num_labels=3)
    return tf.MPNetForSequenceClassification(config), text_batch(labels="class")


def modernbert():
    config = tf.ModernBertConfig(**_TEXT, num_labels=3, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0)
    return tf.ModernBertForSequenceClassification(config), text_batch(labels="class")


def bert_regression():
    model, batch = tf.BertForSequenceClassification(tf.BertConfig(**_TEXT, num_labels=1)), text_batch(labels="class")
    return model, {**batch, "labels": batch["labels"].float() / 2}


def gpt_neox():
    config = tf.GPTNeoXConfig(**_TEXT, bos_token_id=0, eos_token_id=0)
    return tf.GPTNeoXForCausalLM(config), text_batch()


def falcon():
    config = tf.FalconConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0
    )
    return tf.FalconForCausalLM(config), text_batch()


def bloom():
    config = tf.BloomConfig(vocab_size=V, hidden_size=D, n_layer=2, n_head=2)
    return tf.BloomForCausalLM(config), text_batch()


def phi():
    return _decoder("Phi")


def mistral():
    return _decoder("Mistral", sliding_window=3)


def gemma2():
    return _decoder("Gemma2", head_dim=8, sliding_window=3)


def gemma3():
    config = tf.Gemma3TextConfig(**_TEXT, num_key_value_heads=1, head_dim=8, sliding_window=3)
    return tf.Gemma3ForCausalLM(config), text_batch()


def olmo2():
    return _decoder("Olmo2")


def mamba():
    config = tf.MambaConfig(vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=2, pad_token_id=1)
    return tf.MambaForCausalLM(config), text_batch()


def marian():
    config = tf.MarianConfig(
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
        decoder_start_token_id=1,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    return tf.MarianMTModel(config), text_batch(labels="decoder")


def _vit_like(name, **extra):
    config = getattr(tf, f"{name}Config")(
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        **extra,
    )
    return getattr(tf, f"{name}ForImageClassification")(config), image_batch()


def deit():
    return _vit_like("DeiT")


def beit():
    return _vit_like("Beit", use_relative_position_bias=True, out_indices=[1, 2])


def dinov2():
    return _vit_like("Dinov2")


def clip():
    vision = {
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
    }
    config = tf.CLIPConfig(vision_config=vision, num_labels=3)
    return tf.CLIPForImageClassification(config), image_batch()


def efficientnet():
    config = tf.EfficientNetConfig(
        image_size=16,
        width_coefficient=0.25,
        depth_coefficient=0.1,
        hidden_dim=320,
        in_channels=[8, 8],
        out_channels=[8, 8],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 2],
        depthwise_padding=[],
        num_labels=3,
    )
    return tf.EfficientNetForImageClassification(config), image_batch(3, 16)


def wav2vec2():
    config = tf.Wav2Vec2Config(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_stride=[4, 2],
        conv_kernel=[4, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
    )
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_values": torch.randn(3, 64, generator=generator),
        "labels": torch.randint(0, 3, (3,), generator=generator),
    }
    return tf.Wav2Vec2ForSequenceClassification(config), batch


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
        qwen2_moe,
        gpt_oss,
        t5,
        bart,
        vit,
        resnet,
        convnext,
        swin,
        mobilenet,
        electra,
        albert,
        mpnet,
        modernbert,
        bert_regression,
        gpt_neox,
        falcon,
        bloom,
        phi,
        mistral,
        gemma2,
        gemma3,
        olmo2,
        mamba,
        marian,
        deit,
        beit,
        dinov2,
        clip,
        efficientnet,
        wav2vec2,
    )
}


TEXT = [name for name, function in FAMILIES.items() if "input_ids" in function()[1]]


def moved(batch, left=0, right=0, only=None):
    """The batch with the real tokens of each row moved: `left` and `right` columns of padding around the longest.

    `only` gives that row alone. Token labels move along; decoder labels and classes stay.
    """
    rows = range(len(batch["input_ids"])) if only is None else [only]
    keep = [batch["attention_mask"][row].bool() for row in rows]
    longest = max(int(mask.sum()) for mask in keep)

    def place(values, fill):
        out = values.new_full((len(keep), left + longest + right), fill)
        for new, (row, mask) in enumerate(zip(rows, keep, strict=True)):
            start = left + (longest - int(mask.sum()) if left else 0)
            out[new, start : start + int(mask.sum())] = values[row][mask]
        return out

    token_labels = batch["labels"].shape == batch["input_ids"].shape
    labels = place(batch["labels"], -100) if token_labels else batch["labels"][list(rows)]
    return {
        "input_ids": place(batch["input_ids"], 1),
        "attention_mask": place(batch["attention_mask"], 0),
        "labels": labels,
    }


def make(family, seed=0):
    """A model of a family, in eval mode with weights away from their symmetric start, and a batch for it."""
    torch.manual_seed(seed)
    model, batch = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), batch
