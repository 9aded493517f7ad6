"""Tiny image-text models of classes that LocalVLM runs by their own processors, as folders like any other."""

from tests.vlm import tiny_vlm

KINDS = ("gemma3", "llava", "idefics3")
_SIDE = 56  # pixels
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
_SEEN = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": _SIDE,
    "patch_size": 14,
}  # fmt: skip
_MARKS = {
    "gemma3": ("<bos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    "llava": ("<image>",),
    "idefics3": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
}  # fmt: skip


def save(folder, kind, **more):
    """Writes a random model with its processor; `more` fields of the text model's config. Returns the folder's name."""
    import transformers as tf

    picture = "<start_of_image>" if kind == "gemma3" else "<image>"
    template = tiny_vlm.TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", picture)
    tokenizer = tiny_vlm.make_tokenizer(template, marks=_MARKS[kind])
    number = tokenizer.convert_tokens_to_ids
    text = _TEXT | {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        **more,
    }  # fmt: skip
    made = {"chat_template": template}
    if kind == "gemma3":
        made["chat_template"] = "<bos>" + template
        tokenizer.bos_token = "<bos>"
        for name, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
            tokenizer._set_model_specific_special_tokens({f"{name}_token": token})
        text |= {
            "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
            "bos_token_id": number("<bos>"),
        }  # fmt: skip
        config = tf.Gemma3Config(
            text_config=text, vision_config=_SEEN | {"model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
            boi_token_index=number("<start_of_image>"), eoi_token_index=number("<end_of_image>"),
            image_token_index=number("<image_soft_token>"), tie_word_embeddings=False,
        )  # fmt: skip
        pictures = tf.Gemma3ImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
        processor = tf.Gemma3Processor(pictures, tokenizer, image_seq_length=4, **made)
    elif kind == "llava":
        config = tf.LlavaConfig(
            text_config=text | {"model_type": "llama"}, tie_word_embeddings=False,
            vision_config=_SEEN | {"model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=number("<image>"),
        )  # fmt: skip
        pictures = tf.CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})
        processor = tf.LlavaProcessor(
            pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
            num_additional_image_tokens=1, **made,
        )  # fmt: skip
    else:
        config = tf.Idefics3Config(
            text_config=text | {"model_type": "llama"}, vision_config=_SEEN, image_token_id=number("<image>"),
            scale_factor=2, tie_word_embeddings=False,
        )  # fmt: skip
        pictures = tf.Idefics3ImageProcessorPil(size={"longest_edge": _SIDE}, max_image_size={"longest_edge": _SIDE})
        processor = tf.Idefics3Processor(pictures, tokenizer, image_seq_len=4, **made)
    tiny_vlm.random_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
