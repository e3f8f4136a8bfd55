"""Small multimodal models of transformers' own classes, raydr's networks of their parts, and folders of models that
answer in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydr.models.multimodal import (
    LatentAttention,
    LlavaVision,
    MultimodalEmbedder,
    MultimodalPooling,
    Preprocessing,
    QwenVision,
)

VOCABULARY = 200
IMAGE = VOCABULARY - 1
PREPROCESSING = Preprocessing(32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
_WORDS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llava_model(vocab_size: int = VOCABULARY, **config: Any) -> Any:
    from transformers import LlavaNextConfig, LlavaNextModel

    torch.manual_seed(0)
    words = {"model_type": "mistral", **_WORDS, "vocab_size": vocab_size}
    return LlavaNextModel(
        LlavaNextConfig(text_config=words, vision_config=_VISION, **{"image_token_index": IMAGE, **config})
    ).eval()


def qwen_model(kind: str, vocab_size: int = VOCABULARY, **config: Any) -> Any:
    import transformers

    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(
        text_config={**_WORDS, "vocab_size": vocab_size, "rope_parameters": rope},
        vision_config=vision,
        video_token_id=VOCABULARY - 2,
        vision_start_token_id=VOCABULARY - 3,
        vision_end_token_id=VOCABULARY - 4,
        **{"image_token_id": IMAGE, **config},
    )
    return getattr(transformers, f"{name}Model")(made).eval()


def dual_model(kind: str, vocab_size: int = VOCABULARY) -> Any:
    import transformers

    vision = {name: value for name, value in _VISION.items() if name != "model_type"}
    torch.manual_seed(0)
    if kind == "clip":
        text = {name: value for name, value in _WORDS.items() if name != "num_key_value_heads"}
        config = transformers.CLIPConfig(
            text_config={**text, "vocab_size": vocab_size}, vision_config=vision, projection_dim=48
        )
        return transformers.CLIPModel(config).eval()
    words = transformers.BertConfig(**{**_WORDS, "vocab_size": vocab_size, "initializer_range": 0.2})
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.CLIPVisionConfig(**vision), words, projection_dim=64
    )
    return transformers.VisionTextDualEncoderModel(config).eval()


def llava_network(*, pooling: MultimodalPooling = "mean", bidirectional: bool = False) -> MultimodalEmbedder:
    model = llava_model()
    return _network(model, LlavaVision(model, PREPROCESSING), pooling, bidirectional)


def qwen_network(kind: str, *, pooling: MultimodalPooling = "mean", bidirectional: bool = False) -> MultimodalEmbedder:
    model = qwen_model(kind)
    return _network(model, QwenVision(model, PREPROCESSING), pooling, bidirectional)


def _network(model: Any, vision: Any, pooling: MultimodalPooling, bidirectional: bool) -> MultimodalEmbedder:
    latent = LatentAttention(64, num_latents=8, num_heads=2, head_dim=64, hidden=128) if pooling == "latent" else None
    return MultimodalEmbedder(
        model.language_model,
        vision,
        image_token_id=IMAGE,
        pooling=pooling,
        latent=latent,
        bidirectional=bidirectional,
    ).eval()


_ANSWERING = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 32 numbers, the least that vLLM's attention takes on a CPU
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # large, so that what is read makes a clear difference
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_TILES = [[32, 64], [64, 32], [64, 64]]
LLAVA_CHAT = (  # LLaVA-NeXT's own: it shows texts in parts alone, and pictures before all of them
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% else %}{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% endif %}{% endfor %}"
)
QWEN_CHAT = (  # Qwen2-VL's, which takes texts as they are as well
    "{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write_image_text_lm(kind: str, folder: Path) -> Path:
    """A random network that reads pictures and answers in words, `LlavaNext` or `Qwen2VL`, with what prepares its
    pictures (tiles and patches of 8 pixels) and a tokenizer to which `True` and `False` are tokens.
    """
    import transformers
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from tests.causal_lms import byte_pair_tokenizer

    around = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    own = ["<image>"] if kind == "LlavaNext" else around
    tokenizer = byte_pair_tokenizer("Qwen3", "True", " True", "true", "False", " False", "false")
    tokenizer.add_special_tokens({"additional_special_tokens": own})
    ids = dict(zip(own, tokenizer.convert_tokens_to_ids(own), strict=True))
    words = {**_ANSWERING, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if kind == "LlavaNext":
        tokenizer.chat_template = LLAVA_CHAT
        config: Any = transformers.LlavaNextConfig(
            text_config={"model_type": "mistral", "head_dim": 32, **words},
            vision_config={**_VISION, "initializer_range": 0.3},
            image_token_index=ids["<image>"],
            image_grid_pinpoints=_TILES,
        )
        transformers.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
        square = {"height": 32, "width": 32}
        pictures = LlavaNextImageProcessorPil(size=square, crop_size=square, image_grid_pinpoints=_TILES)
        transformers.LlavaNextProcessor(
            image_processor=pictures,
            tokenizer=tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(folder)
        return folder
    tokenizer.chat_template = QWEN_CHAT
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "embed_dim": 64, "hidden_size": 64, "initializer_range": 0.3}
    config = transformers.Qwen2VLConfig(
        text_config={**words, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 256, "longest_edge": 4096}, patch_size=8).save_pretrained(folder)
    return folder
