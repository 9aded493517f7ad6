"""Tiny vision-language models of three classes, with a tokenizer, as folders that transformers loads like any other."""

import json
import pathlib

from world_distill.judges.answers import SPELLINGS
from world_distill.vlm.local import LocalVLM

KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
         "<|video_pad|>", "<think>", "</think>")  # fmt: skip
TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{%- endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
# How templates of models that think differ.
KNOWS_THE_SWITCH = TEMPLATE + "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
OPENS_A_THOUGHT = TEMPLATE + "{{ '<think>\n' }}"


def make_tokenizer(template=TEMPLATE, whole=SPELLINGS, marks=()):
    """Single bytes, the spellings in `whole` as one token each, and more `marks` than those of Qwen."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    # Those with a space first: the merges of the others would break theirs.
    for text in sorted(
        (s.replace(" ", "Ġ") for spellings in whole.values() for s in spellings), key=lambda s: s[0] != "Ġ"
    ):
        for end in range(2, len(text) + 1):
            if text[:end] not in vocab:
                merges.append((text[: end - 1], text[end - 1]))
                vocab[text[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (*MARKS, *marks)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def make_model(kind, tokenizer, seed=0):
    """Random weights, large enough for what is seen to matter."""
    import transformers

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    tokens = {
        "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"], "tie_word_embeddings": False,
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1], "window_size": 28 * 4, "patch_size": 14}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    else:
        vision |= {"patch_size": 14, "num_position_embeddings": 64}
        if kind == "qwen3_vl":
            vision |= {"deepstack_visual_indexes": [0]}
            config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
        else:
            text |= {
                "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
                "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16,
            }  # fmt: skip
            text["rope_parameters"] |= {"partial_rotary_factor": 0.5}
            config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **tokens)
    return random_model(config, seed)


def random_model(config, seed=0):
    """A model with weights large enough for what is seen to matter."""
    import torch
    import transformers

    torch.set_num_threads(1)  # threads only wait for each other in models of this size
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 / weight[0].numel() ** 0.5)
        model.get_input_embeddings().weight[:, 0] = 8  # what `teach` builds on
    return model


def teach(folder, prompts):
    """Makes a saved model answer with yes or no: to `prompts` (messages, and whether it is yes) rightly.

    The first number of each token's embedding is large, and stands for "a word of an answer follows".
    """
    import torch

    vlm = LocalVLM(folder, dtype="float32")
    vlm.load()
    states, head = [], vlm._model.lm_head
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1].clone()))
    for messages, _ in prompts:
        vlm.next_token_log_probs(messages)
    hook.remove()
    wanted = torch.tensor([3.0 if yes else -3.0 for _, yes in prompts])
    difference = torch.linalg.lstsq(torch.stack(states), wanted[:, None], driver="gelsd").solution[:, 0] / 2
    head.weight *= 0.05
    for word, sign in (("yes", 1), ("no", -1)):
        for i, spelling in enumerate(SPELLINGS[word]):
            row = vlm.single_token(spelling)
            head.weight[row] = sign * difference
            head.weight[row, 0] += (6 - i / 3) / states[0][0]
    vlm._model.save_pretrained(folder)


def save(folder, kind, *, tokenizer=None, model=None):
    """Writes a model, its tokenizer and the settings of its pictures. Returns the folder as a string."""
    tokenizer = tokenizer or make_tokenizer()
    (model or make_model(kind, tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (pathlib.Path(folder) / "preprocessor_config.json").write_text(json.dumps(pictures))
    return str(folder)
