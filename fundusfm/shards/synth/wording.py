"""Words for findings, severities and places in English and Chinese, for reports and zero-shot prompts."""

from __future__ import annotations

from fundusfm.shards.synth.findings import (
    DRUSEN,
    EXUDATES,
    FLUID,
    HAEMORRHAGES,
    HAZE,
    LARGE_CUP,
    MICROANEURYSMS,
    NORMAL,
)

LANGUAGES = ("en", "zh")

# label -> language -> phrases. Severity and place are added by the report, never by these.
PHRASES: dict[str, dict[str, list[str]]] = {
    NORMAL: {
        "en": ["normal fundus", "no abnormality seen", "healthy retina and optic disc"],
        "zh": ["眼底未见异常", "眼底正常", "视盘及视网膜未见明显异常"],
    },
    MICROANEURYSMS: {
        "en": ["microaneurysms", "dot-like microaneurysms", "red-dot microaneurysms"],
        "zh": ["微血管瘤", "点状微血管瘤", "红点样微血管瘤"],
    },
    HAEMORRHAGES: {
        "en": ["retinal haemorrhages", "blot haemorrhages", "dot and blot haemorrhages"],
        "zh": ["视网膜出血", "片状出血", "点片状出血"],
    },
    EXUDATES: {
        "en": ["hard exudates", "waxy hard exudates", "yellow-white exudates"],
        "zh": ["硬性渗出", "蜡样硬性渗出", "黄白色渗出"],
    },
    DRUSEN: {
        "en": ["drusen", "soft drusen", "pale drusen deposits"],
        "zh": ["玻璃膜疣", "软性玻璃膜疣", "淡黄色玻璃膜疣"],
    },
    LARGE_CUP: {
        "en": ["large optic cup", "enlarged cup-to-disc ratio", "glaucomatous cupping of the optic disc"],
        "zh": ["视杯扩大", "杯盘比增大", "青光眼样视杯凹陷"],
    },
    HAZE: {
        "en": ["cataract haze", "hazy view through a cataract", "clouded view from lens opacity"],
        "zh": ["白内障致眼底模糊", "屈光介质混浊", "晶状体混浊致眼底朦胧"],
    },
    FLUID: {
        "en": ["macular fluid", "fluid within the macula on OCT", "cystoid fluid spaces on OCT"],
        "zh": ["黄斑区积液", "OCT示黄斑积液", "OCT示囊样液性暗区"],
    },
    "dr_none": {
        "en": ["no diabetic retinopathy", "no sign of diabetic retinopathy"],
        "zh": ["无糖尿病视网膜病变", "未见糖尿病视网膜病变"],
    },
    "dr_mild": {
        "en": ["mild non-proliferative diabetic retinopathy", "mild diabetic retinopathy"],
        "zh": ["轻度非增殖期糖尿病视网膜病变", "轻度糖尿病视网膜病变"],
    },
    "dr_moderate": {
        "en": ["moderate non-proliferative diabetic retinopathy", "moderate diabetic retinopathy"],
        "zh": ["中度非增殖期糖尿病视网膜病变", "中度糖尿病视网膜病变"],
    },
    "dr_severe": {
        "en": ["severe non-proliferative diabetic retinopathy", "severe diabetic retinopathy"],
        "zh": ["重度非增殖期糖尿病视网膜病变", "重度糖尿病视网膜病变"],
    },
}

# language -> severity (mild, moderate, severe) -> words; how many of something, or how much of it
COUNTED = {
    "en": (("few", "mild", "scanty"), ("several", "moderate"), ("numerous", "severe", "extensive")),
    "zh": (("少量", "轻度"), ("较多", "中度"), ("大量", "重度")),
}
MEASURED = {
    "en": (("mild", "slight"), ("moderate",), ("severe", "marked")),
    "zh": (("轻度", "轻微"), ("中度",), ("重度", "明显")),
}

QUADRANT_WORDS = {
    "en": {
        "superotemporal": ("superotemporal", "upper temporal"),
        "inferotemporal": ("inferotemporal", "lower temporal"),
        "superonasal": ("superonasal", "upper nasal"),
        "inferonasal": ("inferonasal", "lower nasal"),
    },
    "zh": {
        "superotemporal": ("颞上", "颞上侧"),
        "inferotemporal": ("颞下", "颞下侧"),
        "superonasal": ("鼻上", "鼻上侧"),
        "inferonasal": ("鼻下", "鼻下侧"),
    },
}
MACULA_WORDS = {"en": ("at the macula", "in the macular area"), "zh": ("黄斑区", "黄斑部")}
ALL_QUADRANTS = {"en": ("in all four quadrants", "in every quadrant"), "zh": ("四个象限", "各象限")}

# What a report rules out, by the findings that must be absent for it to be true.
ABSENT: dict[tuple[str, ...], dict[str, list[str]]] = {
    (HAEMORRHAGES, EXUDATES): {"en": ["no haemorrhages or exudates"], "zh": ["未见出血及渗出"]},
    (LARGE_CUP,): {"en": ["cup-to-disc ratio within normal limits"], "zh": ["杯盘比在正常范围"]},
    (DRUSEN,): {"en": ["no drusen"], "zh": ["未见玻璃膜疣"]},
    (HAZE,): {"en": ["clear media"], "zh": ["屈光介质清"]},
    (HAEMORRHAGES,): {"en": ["no haemorrhages"], "zh": ["未见出血"]},
}

WITH_PLACE = (MICROANEURYSMS, HAEMORRHAGES, EXUDATES, DRUSEN)
