"""The layouts of masked autoencoders: RETFound's files, with or without a decoder, and UrFound's."""

from __future__ import annotations

from fundusfm.models.layout_rules import Rule

RETFOUND = [
    Rule(r"(cls_token|pos_embed)", r"vision.trunk.\1"),
    Rule(r"(patch_embed\.proj|norm)\.(weight|bias)", r"vision.trunk.\1.\2"),
    Rule(
        r"(blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))", r"vision.trunk.\1"
    ),
    Rule(r"mask_token", "decoder.mask_token"),
    Rule(r"decoder_pos_embed", "decoder.pos_embed"),
    Rule(r"decoder_(embed|norm|pred)\.(weight|bias)", r"decoder.\1.\2"),
    Rule(
        r"decoder_(blocks\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))",
        r"decoder.\1",
    ),
]
_BERT = r"bert_encoder\.model\."
URFOUND = [
    *RETFOUND,
    Rule(r"bert_mlp\.(weight|bias)", r"image_to_text.\1"),
    Rule(_BERT + r"bert\.((?:embeddings|encoder)\.(?!position_ids).+)", r"text.trunk.\1"),
    Rule(_BERT + r"cls\.predictions\.transform\.dense\.(weight|bias)", r"words.dense.\1"),
    Rule(_BERT + r"cls\.predictions\.transform\.LayerNorm\.(weight|bias)", r"words.norm.\1"),
    Rule(_BERT + r"cls\.predictions\.decoder\.(weight|bias)", r"words.scores.\1"),
]
# A pooler that is never used, and the bias of the word scores a second time.
IGNORED = rf"{_BERT}bert\.pooler\..+|{_BERT}bert\.embeddings\.position_ids|{_BERT}cls\.predictions\.bias"
