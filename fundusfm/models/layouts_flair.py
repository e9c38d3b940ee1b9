"""The files of FLAIR and KeepFIT: a torchvision ResNet-50, a BERT, heads, a temperature, attention."""

from __future__ import annotations

from fundusfm.models.layout_rules import Rule, leading_axes

_TOWERS = [
    Rule(r"logit_scale", "log_scale", leading_axes(1)),
    # timm took torchvision's names for this network.
    Rule(r"vision_model\.model\.((conv1|bn1|layer[1-4])\..+)", r"vision.trunk.\1"),
    Rule(r"vision_model\.projection_head_vision\.projection\.weight", "vision.proj.weight"),
    # Files of older transformers carry the numbers 0 to 511 as a tensor.
    Rule(r"text_model\.model\.(embeddings\.position_ids|pooler\.dense\.(weight|bias))", ()),
    Rule(r"text_model\.model\.((embeddings|encoder)\..+)", r"text.trunk.\1"),
    Rule(r"text_model\.projection_head_text\.projection\.weight", "text_proj.weight"),
]
FLAIR = [*_TOWERS, Rule(r"attention\.W_[qkvo]\.weight", ())]
KEEPFIT = [*_TOWERS, Rule(r"attention\.W_([qkvo])\.weight", r"revision.\1.weight")]
